"""What psp reads, each format as a directory of valid files and the readers of all of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Reader = Callable[[Path], object]
TEXT = "The quick brown fox jumps over the lazy dog.\ndef f(x): return [y ** 2 for y in range(x)]\n"
D_MODEL, D_FF, RANK = 32, 1001, 32
SECONDS = 2.0
"""That reading a small file may take."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        make: writes valid files into a directory, which it returns.
        damaged: patterns of the files that are damaged; the others only belong to them.
        read: everything that psp does to read them; takes the directory.
        seconds: that this may take.
    """

    make: Callable[[Path], Path]
    damaged: tuple[str, ...]
    read: Reader
    seconds: float = SECONDS

    def files(self, directory: Path) -> list[Path]:
        """Return the files that are damaged, in order."""
        return sorted({file for kind in self.damaged for file in directory.glob(kind)})


def make_model(path: Path, **changes: Any) -> Path:
    """Write a random ReGLU LLaMA of one narrow layer with its SentencePiece tokenizer."""
    import sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **{"vocab_size": 320, "hidden_size": D_MODEL, "intermediate_size": D_FF},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"max_position_embeddings": 128, "hidden_act": "relu", "bos_token_id": 1},
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).half()
    model.save_pretrained(path)
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20),
        model_writer=proto,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(proto.getvalue())
    settings = {"add_bos_token": True, "chat_template": "{{ messages[0].content }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def make_json_tokenizer(path: Path) -> Path:
    """Write the same model with a byte-level tokenizer.json."""
    import tokenizers

    make_model(path)
    (path / "tokenizer.model").unlink()
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(TEXT.splitlines() * 20, trainer)
    rust.save(str(path / "tokenizer.json"))
    return path


def make_torch_shards(path: Path) -> Path:
    """Write the model's tensors as a file of `torch.save` with an index."""
    from safetensors.torch import load_file

    make_model(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model-1-of-1.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model-1-of-1.bin")}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def read_model(path: Path) -> None:
    """Open a checkpoint, read all of its tensors and a text by its tokenizer."""
    from architectures.checkpoint import Checkpoint
    from architectures.tokenizer import chat_template_of

    checkpoint = Checkpoint.open(str(path))
    checkpoint.layer_tensor(0, "mlp.gate_proj.weight")
    assert checkpoint.fingerprint
    chat_template_of(path)
    tokenizer = checkpoint.tokenizer()
    tokenizer.decode(tokenizer.encode(TEXT))


def make_predictors(path: Path) -> Path:
    """Write a model and predictors of psp's for it."""
    from architectures.checkpoint import Checkpoint
    from benchmarks.shared import made_header
    from predictor.artifact import PredictorArtifact
    from predictor.stored import LayerPredictor

    model = make_model(path / "model")
    artifact = PredictorArtifact(path / "made", made_header(model, RANK, "made by hand"))
    for layer in range(Checkpoint.open(str(model)).shape.n_layers):
        fc1, fc2 = torch.randn(RANK, D_MODEL).half(), torch.randn(D_FF, RANK).half()
        predictor = LayerPredictor(fc1, fc2, torch.arange(D_FF))
        artifact.add(layer, predictor, {"activation_recall": 1.0})
    return path


def read_predictors(path: Path) -> None:
    """Read what an export and `psp inspect` read of predictors."""
    from pipeline.artifacts import describe, described_table
    from predictor.artifact import PredictorArtifact

    artifact = PredictorArtifact.open(path / "made")
    artifact.require_complete()
    for layer in range(min(artifact.header.n_layers, 4)):
        artifact.layer(layer)
    described_table(describe(path / "made"))


def make_exported(path: Path) -> Path:
    """Export the model for PowerInfer."""
    from gguf_export.bundle import export
    from gguf_export.settings import ExportConfig

    made = make_predictors(path)
    out = path / "m.powerinfer.gguf"
    export(ExportConfig(model=str(made / "model"), predictors=made / "made", out=out))
    return path


def read_exported(path: Path, name: str = "m.powerinfer.gguf") -> None:
    """Inspect and verify an exported file; what verify finds refuses it."""
    from common.errors import FormatError
    from gguf_export.pwri.inspection import inspect_file, inspection_table
    from powerinfer_bridge.verify.verification import verification_table, verify

    file = path / name
    report = verify(file)
    assert verification_table(report)
    json.dumps(report.document(), allow_nan=False)
    assert inspection_table(inspect_file(file))
    if not report.ok:
        raise FormatError(f"{file}: verify finds damage", "export again")


def make_foreign(path: Path) -> Path:
    """Write predictors and statistics in PowerInfer's form."""
    (path / "theirs").mkdir(parents=True)
    (path / "activation").mkdir()
    tensors = {
        "fc1.weight": torch.ones(RANK, D_MODEL).half(),
        "fc2.weight": torch.ones(64, RANK).half(),
    }
    torch.save(tensors, path / "theirs" / "model_0.pt")
    torch.save(torch.arange(64), path / "activation" / "activation_0.pt")
    (path / "theirs" / "config.json").write_text(json.dumps({"sparse_threshold": 0.5}))
    return path


def read_foreign(path: Path) -> None:
    """Read them as an export does."""
    from gguf_export.predictor_kinds import open_predictors
    from gguf_export.predictor_source import read_ranks
    from gguf_export.pwri.statistics import read_statistics

    read_statistics(path, 1, 64)
    source = open_predictors(path / "theirs")
    json.loads(source.recipe)
    read_ranks(source, D_MODEL, 64)


def make_traces(path: Path) -> Path:
    """Collect a few hundred tokens of the model."""
    from predictor.collection.collect import collect
    from predictor.collection.settings import CollectConfig

    model = make_model(path / "model")
    (path / "text.jsonl").write_text(json.dumps({"text": TEXT * 5}) + "\n")
    data = str(path / "text.jsonl")
    out, device = path / "traces", "cpu"
    collect(
        CollectConfig(model=str(model), data=data, out=out, tokens=200, context=32, device=device)
    )
    return path


def read_traces(path: Path) -> None:
    """Read what training and `psp traces` read."""
    from predictor.traces.store import TraceStore
    from predictor.traces.summary import check_traces, trace_summary

    store = TraceStore.open(path / "traces")
    trace_summary(store)
    store.require_complete()
    for layer in store.header.layers:
        store.weights(layer)
        store.layer(layer)
    check_traces(store)


def make_settings(path: Path) -> Path:
    """Write a schedule and hardware, as JSON, which is YAML too."""
    from cost_model.hardware import _presets

    stage = {"kind": "substitution", "lambda": 0, "until_step": 10}
    preset: Any = next(iter(_presets().values()))
    (path / "hardware.yaml").write_text(json.dumps(preset, default=str))
    (path / "schedule.yaml").write_text(
        json.dumps({"stages": [stage, {"kind": "sft", "lambda": 0, "until_step": 20}]})
    )
    return path


def read_settings(path: Path) -> None:
    """Read both; each may be damaged."""
    from cost_model.hardware import load_hardware
    from prosparse.schedule import read_schedule

    read_schedule(path / "schedule.yaml")
    load_hardware(str(path / "hardware.yaml"))


def make_texts(path: Path) -> Path:
    """Write documents in every form."""
    import pyarrow
    from pyarrow import parquet

    lines = [json.dumps({"text": f"{TEXT}{number}"}) for number in range(5)]
    (path / "a.jsonl").write_text("\n".join(lines))
    (path / "b.csv").write_text("text,other\nfour words of text,1\nmore,2\n")
    (path / "c.txt").write_text(TEXT)
    (path / "d.json").write_text(f"[{','.join(lines)}]")
    parquet.write_table(pyarrow.table({"text": [TEXT, "x"]}), path / "e.parquet")
    return path


def read_texts(path: Path) -> None:
    """Read all documents of all files."""
    from common.documents import read_text

    for name in ("a.jsonl", "b.csv", "c.txt", "d.json", "e.parquet"):
        read_text(str(path / name))


def make_provenance(path: Path) -> Path:
    """Write what an artifact was made with."""
    from common.clock import now
    from common.provenance import record

    settings = {"tokens": 5, "layers": [1, 2]}
    record(
        path / "provenance.json",
        now(),
        artifact="traces",
        identity="x",
        seed=0,
        settings=settings,
        ingredients=(),
    )
    return path


def read_provenance(path: Path) -> object:
    """Read it."""
    from common.provenance import read

    return read(path / "provenance.json")


def make_index_of_tensors(path: Path) -> Path:
    """Write a checkpoint of foreign predictors in safetensors."""
    names = {"fc1": torch.ones(RANK, D_MODEL).half(), "fc2": torch.ones(64, RANK).half()}
    tensors = {f"model.layers.0.mlp.predictor.{name}.weight": t for name, t in names.items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def read_index_of_tensors(path: Path) -> object:
    """Read it as an export does."""
    from gguf_export.predictor_kinds import open_predictors
    from gguf_export.predictor_source import read_ranks

    return read_ranks(open_predictors(path), D_MODEL, 64)


FORMATS = {
    "config.json": Format(make_model, ("*.json",), read_model),
    "foreign predictors": Format(make_foreign, ("*/*.pt", "*/*.json"), read_foreign),
    "foreign safetensors": Format(make_index_of_tensors, ("*",), read_index_of_tensors),
    "gguf": Format(make_exported, ("*.gguf",), read_exported),
    "predictors": Format(make_predictors, ("made/*",), read_predictors),
    "provenance.json": Format(make_provenance, ("*",), read_provenance),
    "safetensors": Format(make_model, ("*.safetensors",), read_model),
    "settings": Format(make_settings, ("*.yaml",), read_settings),
    "texts": Format(make_texts, ("*",), read_texts),
    "tokenizer.json": Format(make_json_tokenizer, ("tokenizer*.json",), read_model),
    "tokenizer.model": Format(make_model, ("tokenizer.model",), read_model),
    "torch checkpoint": Format(make_torch_shards, ("pytorch_model*",), read_model),
    "traces": Format(make_traces, ("traces/**/*.*",), read_traces),
}
