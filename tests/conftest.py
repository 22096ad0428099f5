"""Shared fixtures: tiny random checkpoints in their real on-disk layout, and exact predictors."""

from __future__ import annotations

import gc
import io
import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from outside import (  # noqa: F401
    llama_cpp_bin,
    no_programs,
    powerinfer_bin,
    published_dir,
    second_engine_bin,
    transformers_4,
    vllm_python,
)
from readied import new_python  # noqa: F401

from common.errors import PspError

if TYPE_CHECKING:  # 2 s, which a process that only hands tests out to others does not need
    import torch
    from click.testing import Result

    from gguf_export.bundle import Bundle
    from predictor.artifact import PredictorArtifact
    from predictor.collection.settings import CollectConfig
    from predictor.traces.store import TraceStore

TRACE_TOKENS, TRACE_CONTEXT = 3000, 100
NARROW_D_FF = 348
SHARD_ROWS = 1024
"""A tiny model would never fill a shard of the usual size."""

TEXT = (
    "The quick brown fox jumps over the lazy dog.\n"
    "def f(x):\n    return [y ** 2 for y in range(x) if y % 3]\n\n"
    "import os, sys\n\nclass Café:\n\t'''naïve — tests'''\n\n"
    "In the beginning there was a token, and the token was predicted.\n"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run tests marked slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A process more than there are cores: some tests wait for what they have started."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while tests are imported: there is next to none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --runslow"))


@pytest.fixture(scope="session", autouse=True)
def _fixed_threads() -> None:
    """One thread: tiny matrices gain nothing from more, and bytes depend on the number."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _collected_tests_are_no_garbage() -> Iterator[None]:
    """Take 6,600 tests and what they import out of what every collection of garbage looks at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()  # else libraries tell of leaks at the end


@pytest.fixture(scope="session")
def trainer_is_imported() -> None:
    """Take what transformers' Trainer imports out of the garbage that every run of it collects."""
    import torch.utils.tensorboard  # noqa: F401

    import prosparse.trainer  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_cache() -> None:
    """Nothing that the user of this machine tuned; tests that keep something name a place."""
    os.environ["PSP_CACHE_DIR"] = os.devnull


@pytest.fixture
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub be there, so that stubs of its library are called as with a network."""
    for module in ("common.hub", "common.text_sources.hub"):
        monkeypatch.setattr(f"{module}.absence", lambda: None)


@contextmanager
def refused(kind: type[PspError], *parts: str) -> Iterator[None]:
    """Expect an error of one line that holds all parts."""
    with pytest.raises(kind) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@dataclass(frozen=True)
class ModelMaker:
    """Writes random ReGLU checkpoints."""

    tokenizer: bytes

    def __call__(self, path: Path, *, seed: int = 0, shards: str = "5GB", **changes: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        settings: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 1012,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "hidden_act": "relu",
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.15,
        } | changes
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings)).half()
        with torch.no_grad():
            for _, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.uniform_(0.5, 1.5)
        model.save_pretrained(path, max_shard_size=shards)
        (path / "tokenizer.model").write_bytes(self.tokenizer)
        return path


@pytest.fixture(scope="session")
def tokenizer_bytes() -> bytes:
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_model(tokenizer_bytes: bytes) -> ModelMaker:
    return ModelMaker(tokenizer_bytes)


@pytest.fixture(scope="session")
def model_dir(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "random-reglu")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    lines = (json.dumps({"text": f"Document {number}.\n{TEXT}"}) for number in range(12))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text."""
    path = tmp_path_factory.mktemp("text") / "held out.txt"
    path.write_text(TEXT * 2, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def long_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of uneven length, of about 4,000 tokens in all, under `body`."""
    path = tmp_path_factory.mktemp("data") / "long.jsonl"
    texts = [f"{number}: " + TEXT[number % 7 :] * (number % 3 + 1) for number in range(16)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def settings(model_dir: Path, long_data: Path) -> Callable[..., CollectConfig]:
    """Make settings of a collection on the tiny model."""
    from predictor.collection.settings import CollectConfig

    def make(out: Path, **changes: Any) -> CollectConfig:
        chosen: dict[str, Any] = {
            "model": str(model_dir),
            "data": str(long_data),
            "field": "body",
            "tokens": TRACE_TOKENS,
            "context": TRACE_CONTEXT,
            "shard_rows": SHARD_ROWS,
        }
        return CollectConfig(out=out, **(chosen | changes))

    return make


@pytest.fixture(scope="session")
def traces(
    settings: Callable[..., CollectConfig], tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    """Traces of three shards, made in one go."""
    from predictor.collection.collect import collect

    store = collect(settings(tmp_path_factory.mktemp("traces") / "whole"))
    assert len(store.progress.shards) == 3
    return store


@pytest.fixture(scope="session")
def narrow_model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the same kind, a third as wide, for what runs it many times."""
    path = tmp_path_factory.mktemp("narrow") / "random-reglu"
    return make_model(path, intermediate_size=NARROW_D_FF)


@pytest.fixture(scope="session")
def ranked_traces(
    model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    """Traces whose importance can rank neurons."""
    from predictor.collection.collect import collect
    from predictor.collection.settings import CollectConfig

    out = tmp_path_factory.mktemp("ranked") / "traces"
    sizes: dict[str, Any] = {"tokens": 2000, "context": 64, "importance_bits": 8}
    return collect(CollectConfig(model=str(model_dir), data=str(data_file), out=out, **sizes))


@pytest.fixture(scope="session")
def narrow_traces(
    narrow_model: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    """Return traces of the narrow model, to train whole sets of predictors from."""
    from predictor.collection.collect import collect
    from predictor.collection.settings import CollectConfig

    out = tmp_path_factory.mktemp("narrow") / "traces"
    sizes: dict[str, Any] = {"tokens": 1000, "context": 64, "importance_bits": 8}
    return collect(CollectConfig(model=str(narrow_model), data=str(data_file), out=out, **sizes))


def exact(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fc1 and fc2 whose logits are the gate itself, at rank 2 · d_model.

    fc1 = [I; −I] and fc2 = [W, −W] give fc2·relu(fc1·x) = W·x.
    """
    import torch

    identity = torch.eye(gate.shape[1])
    return torch.cat([identity, -identity]), torch.cat([gate, -gate], dim=1)


def write_predictors(
    model: Path,
    out: Path,
    make: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = exact,
) -> PredictorArtifact:
    """Write predictors made from each layer's gate matrix (times its norm), without training."""
    import torch

    from architectures.checkpoint import Checkpoint
    from predictor.artifact import PredictorArtifact, PredictorHeader
    from predictor.stored import LayerPredictor

    checkpoint = Checkpoint.open(model)
    shape = checkpoint.shape
    layers = []
    for layer in range(shape.n_layers):
        gate = checkpoint.layer_tensor(layer, "mlp.gate_proj.weight").float()
        norm = checkpoint.layer_tensor(layer, "post_attention_layernorm.weight").float()
        fc1, fc2 = make(gate * norm)
        layers.append(LayerPredictor(fc1.half(), fc2.half(), torch.arange(shape.d_ff)))
    header = PredictorHeader(
        model=str(model),
        model_fingerprint=checkpoint.fingerprint,
        architecture="llama",
        activation="relu",
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        rank=len(layers[0].fc1),
        threshold=0.0,
        traces_identity="",
        recipe={"name": "made by hand"},
        holdout=0.1,
        label_top_fraction=None,
        seed=0,
    )
    artifact = PredictorArtifact(out, header)
    for number, predictor in enumerate(layers):
        artifact.add(number, predictor, {"activation_recall": 1.0})
    return artifact


@pytest.fixture(scope="session")
def exact_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exact") / "predictors"
    write_predictors(model_dir, path)
    return path


def make_export(model: Path, predictors: Path, out: Path, *, force: bool = False) -> Bundle:
    from gguf_export.bundle import export
    from gguf_export.settings import ExportConfig

    return export(ExportConfig(model=str(model), predictors=predictors, out=out, force=force))


@pytest.fixture(scope="session")
def exact_bundle(
    model_dir: Path, exact_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("export") / "exact.powerinfer.gguf"
    return make_export(model_dir, exact_dir, out)


@pytest.fixture
def psp() -> Callable[..., Result]:
    """Run the command line in this process; bugs keep their traceback."""
    import torch
    from click.testing import CliRunner

    from cli import main

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        torch.set_num_threads(1)  # --threads outlives the call
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
