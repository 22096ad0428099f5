"""Formats of exports, for `benchmarks.fuzz`: dense files, sets of files, the manifest."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.fuzz_formats import (
    Format,
    make_exported,
    make_model,
    make_predictors,
    read_exported,
    read_model,
)

DENSE, SECOND, SET = "m.dense.gguf", "m.smallthinker.gguf", "m-0000*-of-00002.gguf"


def make_dense(path: Path, arch: str) -> Path:
    """Export the model with a dense file of an arch beside it."""
    from gguf_export.bundle import export
    from gguf_export.settings import ExportConfig

    model, made = str(make_predictors(path) / "model"), path / "made"
    out = path / "m.powerinfer.gguf"
    export(ExportConfig(model=model, predictors=made, out=out, dense=True, dense_arch=arch))
    return path


def make_second_engine(path: Path) -> Path:
    """Export the model for PowerInfer's second engine, whose FFNs fill whole pages."""
    from gguf_export.dense import export_single
    from gguf_export.settings import SECOND_ENGINE, ExportConfig

    model = make_model(path / "model", intermediate_size=2048)
    export_single(ExportConfig(model=str(model), out=path / SECOND, engine=SECOND_ENGINE))
    return path


def make_set(path: Path) -> Path:
    """Write the dense file as a set of two, as gguf-split does."""
    from gguf import GGUFReader, GGUFWriter

    whole = GGUFReader(make_dense(path, "llama") / DENSE)
    half = -(-len(whole.tensors) // 2)
    writer = GGUFWriter(path / "m.gguf", "llama", split_max_tensors=half)
    for name, field in whole.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf_model(path: Path) -> None:
    """Read a file, or a set by its second one, as a model: weights, tokenizer, fingerprint."""
    from gguf_export.pwri.inspection import inspect_file, inspection_table

    file = (sorted(path.glob(SET)) or [path / DENSE])[-1]
    assert inspection_table(inspect_file(file))
    read_model(file)


def read_manifest(path: Path) -> None:
    """Read what was exported and with what, as every command that takes the file does."""
    from gguf_export.manifest import check_outputs
    from pipeline.artifacts import compare, comparison_table, describe, described_table, made_table
    from report.chain import chain_of

    file = path / "m.powerinfer.gguf"
    check_outputs(file, [file])
    found = describe(file)
    assert described_table(found)
    assert made_table(file)
    assert comparison_table(compare(found, found))
    chain_of(path)


EXPORTS = {
    "dense llama": Format(partial(make_dense, arch="llama"), (DENSE,), read_gguf_model),
    "dense smallthinker": Format(
        partial(make_dense, arch="smallthinker"), (DENSE,), partial(read_exported, name=DENSE)
    ),
    "export manifest": Format(make_exported, ("*.manifest.json",), read_manifest),
    "gguf set": Format(make_set, (SET,), read_gguf_model),
    "second engine": Format(make_second_engine, (SECOND,), partial(read_exported, name=SECOND)),
}
