"""`inspect`: what a GGUF or PWRI file holds, told by its header alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from common.errors import printable
from gguf_export.pwri.dense_layers import dense_layers, said_of
from gguf_export.pwri.gpu_index import BUCKET, INDEX_SUFFIX, IndexFile
from gguf_export.pwri.schema import DENSE_THRESHOLD, FC1, THRESHOLD_KEY, Role, parse_name
from gguf_files.names import SMALLTHINKER
from gguf_files.reader import DENSE_MAGIC, SPARSE_MAGIC, GGUFFile, Value
from gguf_files.split_set import open_gguf

_SHOWN_CHARACTERS = 120
_SHOWN_ELEMENTS = 5
_KINDS: dict[Role | None, str] = {
    "predictor": "predictors",
    "norm": "norms",
    "attention": "attention",
    "ffn": "ffn",
    "embedding": "embeddings_and_output",
    "output": "embeddings_and_output",
    None: "other",
}
"""What the kinds of tensors are called in a document."""


def inspect_file(path: Path) -> dict[str, Any]:
    """Describe a sparse (PWRI) or dense (GGUF) file, or a GPU index; no tensor data is read.

    Args:
        path: any file of GGUF version 2 or 3, or one of a split set, of which all is told. An
            index is known by its name, which PowerInfer fixes.

    Returns:
        A JSON-ready document. `keys` maps names to their type and value; long texts are cut and
        arrays shortened to their length and first elements; numbers that JSON does not have are
        texts. `tensors` are in the file's order, shapes in numpy's; sizes are bytes and so are
        offsets, which count from the beginning of the file that holds the tensor.
        `predictor_ranks` names the layers that have a predictor, `gpu_neurons` those of an index.
        `dense_layers` are those of which every neuron is computed, as the file says.
        `skips_neurons` is whether a sparse file has a threshold that any logit can be below.
        `experts` is how many a layer of arch `smallthinker` has, None of another arch.
        `bytes_by_kind` adds up to `tensor_bytes`.

    Raises:
        FormatError: not such a file, truncated, or a header that lies.
    """
    index = path.name.endswith(INDEX_SUFFIX)
    file = IndexFile(path) if index else open_gguf(path)
    name = file.values.get("general.architecture")
    text = name is not None and name.kind is GGUFValueType.STRING
    kinds = dict.fromkeys(_KINDS.values(), 0)
    for info in file.tensors.values():
        kinds[_KINDS[parse_name(info.name).role]] += info.size
    return {
        "file": str(path),
        "file_bytes": sum(each.stat().st_size for each in file.files),
        "magic": (SPARSE_MAGIC if file.sparse else DENSE_MAGIC).decode(),
        "kind": "gpu index" if index else "sparse" if file.sparse else "dense",
        "version": file.version,
        "architecture": _plain(name.data) if name is not None and text else None,
        "keys": {printable(key, 2**16): _value(value) for key, value in file.values.items()},
        "tensors": [
            {
                "name": printable(info.name, 2**16),
                "shape": list(info.shape),
                "type": info.kind.name,
                "bytes": info.size,
                "offset": info.start,
            }
            for info in file.tensors.values()
        ],
        "predictor_ranks": _first_sizes(file, FC1, 2, "rank"),
        "gpu_neurons": _first_sizes(file, BUCKET, 1, "neurons"),
        "dense_layers": list(dense_layers(file)),
        "skips_neurons": _skips(file),
        "experts": _experts(file),
        "bytes_by_kind": kinds,
        "tensor_bytes": sum(info.size for info in file.tensors.values()),
    }


def _plain(element: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(element, bytes):
        # A character takes at most four bytes; the rest would be cut anyway.
        return printable(
            element[: 8 * _SHOWN_CHARACTERS].decode("utf-8", "replace"), _SHOWN_CHARACTERS
        )
    if isinstance(element, np.generic):
        element = element.item()
    return str(element) if isinstance(element, float) and not math.isfinite(element) else element


def _value(value: Value) -> dict[str, object]:
    if value.element is None:
        return {"type": value.kind.name, "value": _plain(value.data)}
    return {
        "type": value.kind.name,
        "element": value.element.name,
        "length": len(value.data),
        "first": [_plain(element) for element in value.data[:_SHOWN_ELEMENTS]],
    }


def _first_sizes(file: GGUFFile, pattern: str, dimensions: int, size: str) -> list[dict[str, int]]:
    """Return the first size of every layer's tensor of a name and so many dimensions, by layer."""
    found = []
    for name, info in file.tensors.items():
        layer = parse_name(name).layer
        whole = layer is not None and name == pattern.format(layer=layer)
        if layer is not None and whole and len(info.shape) == dimensions:
            found.append({"layer": layer, size: info.shape[0]})
    return sorted(found, key=lambda row: row["layer"])


def inspection_table(document: Mapping[str, Any]) -> str:
    """Return a document of `inspect_file` as text."""
    tensors, total = document["tensors"], document["tensor_bytes"]
    magic, version = document["magic"], document["version"]
    facts = {
        "file": printable(document["file"], 2**16),
        "magic": f"{magic}, version {version}: {document['kind']}",
        "architecture": document["architecture"],
        "ranks": _sizes_line(document["predictor_ranks"], "rank", "no predictors"),
    }
    facts["ranks"] += said_of(document["dense_layers"])
    if document["kind"] == "sparse" and not document["skips_neurons"]:
        facts["ranks"] += "; no neuron is skipped, whatever they say"
    if document["experts"] is not None:
        facts["experts"] = f"{document['experts']} a layer, ReLU after the gate"
    if document["kind"] == "gpu index":
        facts["on the GPU"] = _sizes_line(document["gpu_neurons"], "neurons", "no layers")
    keys = {name: _value_line(value) for name, value in document["keys"].items()}
    shares = {
        kind.replace("_", " "): f"{size:,} ({size / total:.1%})" if total else "0"
        for kind, size in document["bytes_by_kind"].items()
    }
    lists = {
        t["name"]: f"{t['type']:<5} {tuple(t['shape'])}, {t['bytes']:,} bytes at {t['offset']:,}"
        for t in tensors
    }
    parts = [
        ("File", facts),
        (f"Keys ({len(keys)})", keys),
        (f"Tensors ({len(tensors)})", lists),
        ("Bytes", {**shares, "all tensors": f"{total:,}", "file": f"{document['file_bytes']:,}"}),
    ]
    return "\n\n".join(f"{title}\n{_aligned(rows)}".rstrip() for title, rows in parts)


def _sizes_line(sizes: list[dict[str, int]], name: str, none: str) -> str:
    """Return the sizes of all layers, one number where they are equal."""
    found = [row[name] for row in sizes]
    if len(set(found)) > 1:
        return ", ".join(f"{row['layer']}: {row[name]}" for row in sizes)
    return f"{found[0]} in each of {len(found)} layers" if found else none


def _experts(file: GGUFFile) -> int | None:
    value = file.values.get(f"{SMALLTHINKER}.expert_count")
    return value.data if value is not None and value.kind is GGUFValueType.UINT32 else None


def _skips(file: GGUFFile) -> bool:
    value = file.values.get(THRESHOLD_KEY)
    plain = value is not None and value.kind is GGUFValueType.FLOAT32
    return file.sparse and not (plain and value is not None and value.data <= DENSE_THRESHOLD)


def _value_line(value: Mapping[str, Any]) -> str:
    if "element" not in value:
        return f"{value['type'].lower()} {value['value']}"
    more = ", …" if value["length"] > len(value["first"]) else ""
    first = ", ".join(map(str, value["first"]))
    return f"{value['length']:,} {value['element'].lower()}: {first}{more}"


def _aligned(rows: Mapping[str, object]) -> str:
    width = min(48, max(map(len, rows), default=0))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
