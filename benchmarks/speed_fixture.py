"""A model to time PowerInfer with: random weights, and an exact share of neurons predicted.

Writes a random ReGLU LLaMA of the given shape with predictors of `benchmarks.exact_density`,
exports it as `psp export-gguf` does, counts the predicted neurons token by token in the embedded
engine and prints one JSON line: the files and their bytes, the density, peak memory, seconds.

    python benchmarks/speed_fixture.py --out DIR --density 0.1 --tokenizer tokenizer.model
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from benchmarks.exact_density import (
    FixtureShape,
    Weights,
    activation_counts,
    layer_weights,
    outer_weights,
    predictor,
)
from benchmarks.shared import made_header, peak_rss_bytes, print_line, reglu_settings
from common.element_types import ELEMENT_NAMES, Q4_0
from common.errors import CheckpointError, EngineError, PspError
from common.files import refuse_existing, write_error, write_json
from gguf_export.bundle import Bundle, export
from gguf_export.pwri.element_types import OUTTYPES
from gguf_export.settings import ExportConfig
from predictor.artifact import PredictorArtifact
from predictor.feedback import by_itself
from predictor.stored import LayerPredictor

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_CHECKED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class FixtureConfig:
    """What to make.

    Attributes:
        shape: sizes and density.
        tokenizer: SentencePiece `tokenizer.model`, whose pieces are the vocabulary.
        out: directory for the export bundle, one for each fixture.
        outtype: element type of the model's matrices, `f16` or `q4_0`.
        predictor_type: of the predictors', likewise; either decides the same.
        dense: write the dense file too.
        keep_model: keep the checkpoint and predictors from which the files were made.
    """

    shape: FixtureShape
    tokenizer: Path
    out: Path
    outtype: str = "f16"
    predictor_type: str = "f16"
    dense: bool = False
    keep_model: bool = False

    @property
    def name(self) -> str:
        """Name of the model."""
        return f"density-{self.shape.density:g}"

    @property
    def bundle(self) -> Bundle:
        """Where the files go."""
        return Bundle.beside(self.out / f"{self.name}.powerinfer.gguf")


def make_fixture(config: FixtureConfig) -> Bundle:
    """Write the checkpoint, its predictors and the exported files.

    Raises:
        PspError: existing outputs, an unreadable tokenizer, or a refused write.
    """
    refuse_existing(config.bundle.model_file, force=False)
    kept = config.out / config.name
    refuse_existing(kept, force=False)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=config.out, prefix=".fixture-") as work:
            model = write_model(Path(work) / config.name, config)
            predictors = write_predictors(model / "predictors", model, config)
            bundle = export(
                ExportConfig(
                    model=str(model),
                    predictors=predictors,
                    out=config.bundle.model_file,
                    outtype=config.outtype,
                    dense=config.dense,
                )
            )
            if config.keep_model:
                model.rename(kept)
    except OSError as error:
        raise write_error(config.out, error) from error
    return bundle


def write_model(path: Path, config: FixtureConfig) -> Path:
    """Write the checkpoint, one block in memory at a time."""
    from safetensors.torch import save_file

    shape = config.shape
    vocab_size, ordinary = read_tokenizer(config.tokenizer)
    settings = reglu_settings(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_attention_heads=shape.n_heads,
        num_hidden_layers=shape.n_layers,
        rms_norm_eps=1e-5,
        dtype=torch.float16,
    )
    settings.save_pretrained(path)
    shutil.copy(config.tokenizer, path / "tokenizer.model")
    names: dict[str, str] = {}

    def keep(number: int, tensors: Weights) -> None:
        file = f"model-{number:05d}-of-{shape.n_layers + 1:05d}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(tensors, file))

    keep(1, outer_weights(shape, vocab_size, ordinary))
    for layer in tqdm(range(shape.n_layers), unit="layer", desc="model", disable=None):
        keep(layer + 2, layer_weights(shape, layer))
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    return path


def read_tokenizer(path: Path) -> tuple[int, torch.Tensor]:
    """Return the number of pieces and the ids of those that are ordinary text.

    Raises:
        CheckpointError: not SentencePiece's.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: no SentencePiece model", "pass a LLaMA checkpoint's tokenizer.model"
        ) from error
    size = pieces.vocab_size()
    kinds = (pieces.is_control, pieces.is_unknown, pieces.is_byte, pieces.is_unused)
    ordinary = [number for number in range(size) if not any(kind(number) for kind in kinds)]
    return size, torch.tensor(ordinary)


def write_predictors(path: Path, model: Path, config: FixtureConfig) -> Path:
    """Write the predictors of a checkpoint made by `write_model`."""
    shape, kind = config.shape, config.predictor_type
    header = made_header(model, shape.rank, "exact density")
    artifact = PredictorArtifact(path, replace(header, predictor_type=kind))
    metrics = {"activation_recall": 1.0, "predicted_sparsity": 1 - shape.exact_density}
    for layer in range(shape.n_layers):
        fc1, fc2 = predictor(shape, layer)
        if kind == Q4_0:
            fc1, fc2 = by_itself(fc1.float()), by_itself(fc2.float())
        counts = activation_counts(shape, layer)
        artifact.add(layer, LayerPredictor(fc1, fc2, counts), metrics)
    return path


def predicted_neurons(file: Path, count: int = _CHECKED_TOKENS) -> set[int]:
    """Return how many neurons the tokens of a text predict, one token and layer at a time."""
    from common.documents import sample_text
    from powerinfer_bridge.engine.attention import KVCache
    from powerinfer_bridge.engine.engine import Engine

    engine = Engine(file)
    cache, found = KVCache(engine.hyper.n_layers), set()
    for token in engine.vocabulary.text_ids(sample_text()[: 20 * count])[:count]:
        counts = engine.count()
        engine.forward([token], cache)
        found |= {layer.predicted for layer in counts}
    return found


def make_and_check(config: FixtureConfig) -> dict[str, object]:
    """Make a fixture and hold it to its density.

    Returns:
        One JSON-ready document; the memory is that of making, before the engine runs.

    Raises:
        PspError: see `make_fixture`, or a token that predicts another number of neurons.
    """
    start, shape = time.perf_counter(), config.shape
    bundle = make_fixture(config)
    seconds, memory = time.perf_counter() - start, peak_rss_bytes()
    found = predicted_neurons(bundle.model_file)
    if found != {shape.predicted}:
        raise EngineError(
            f"{bundle.model_file}: tokens predict {sorted(found)} neurons, expected "
            f"{shape.predicted}",
            "this is a bug, or another program changed the file",
        )
    files = [bundle.model_file, *([bundle.dense_file] if config.dense else [])]
    return {
        **bundle.outputs,
        "warnings": list(bundle.warnings),
        **({"model": str(config.out / config.name)} if config.keep_model else {}),
        "bytes": {file.name: file.stat().st_size for file in files},
        "shape": asdict(shape),
        "outtype": config.outtype,
        "predictor_type": config.predictor_type,
        "predicted_neurons": shape.predicted,
        "density": shape.exact_density,
        "checked_tokens": _CHECKED_TOKENS,
        "seconds": seconds,
        "peak_rss_bytes": memory,
    }


def shape_options(command: Any) -> Any:
    """Add the options of a model's sizes, passed as `FixtureShape` has them."""
    default = FixtureShape(density=1)
    for option, name, text in (
        ("--seed", "seed", "Of all random numbers."),
        ("--rank", "rank", "Hidden units of every predictor."),
        ("--layers", "n_layers", "Blocks."),
        ("--heads", "n_heads", "Attention heads."),
        ("--d-ff", "d_ff", "Neurons in a layer."),
        ("--d-model", "d_model", "Hidden size."),
    ):
        value = getattr(default, name)
        command = click.option(option, name, default=value, show_default=True, help=text)(command)
    return command


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New directory.")
@click.option("--density", type=float, required=True, help="Share of neurons predicted, 0 to 1.")
@click.option("--tokenizer", type=FILE, required=True, help="A LLaMA's tokenizer.model.")
@shape_options
@click.option("--outtype", type=click.Choice(list(OUTTYPES)), default="f16", show_default=True)
@click.option(
    "--predictor-type", type=click.Choice(ELEMENT_NAMES), default="f16", show_default=True
)
@click.option("--dense", is_flag=True, help="Write the dense file too.")
@click.option("--keep-model", is_flag=True, help="Keep the checkpoint and its predictors.")
def main(
    out: Path,
    tokenizer: Path,
    outtype: str,
    predictor_type: str,
    dense: bool,
    keep_model: bool,
    **sizes: Any,
) -> None:
    """Make one fixture."""
    try:
        shape = FixtureShape(**sizes)
        config = FixtureConfig(
            shape=shape,
            tokenizer=tokenizer,
            out=out,
            outtype=outtype,
            predictor_type=predictor_type,
            dense=dense,
            keep_model=keep_model,
        )
        if shape.exact_density != shape.density:
            click.echo(
                f"{shape.predicted} of {shape.d_ff} neurons are predicted: a density of "
                f"{shape.exact_density:.6g}",
                err=True,
            )
        print_line(make_and_check(config))
    except PspError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
