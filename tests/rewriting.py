"""GGUF files written again with something about them changed, through the format's own library."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

from gguf_files.reader import GGUFFile

Tensor = tuple[tuple[int, ...], GGMLQuantizationType, bytes]
"""Shape in numpy's order, type, and bytes."""

_AGAIN = ("general.architecture", "general.alignment")
"""Keys that the writer writes itself."""


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors as they are stored."""
    infos, content = GGUFFile(path).tensors.values(), path.read_bytes()
    return {i.name: (i.shape, i.kind, content[i.start : i.start + i.size]) for i in infos}


def stored(numbers: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> Tensor:
    """Return numbers as a tensor of some type, rounded by gguf's own quantiser."""
    data = quants.quantize(np.ascontiguousarray(numbers, dtype=np.float32), kind)
    return numbers.shape, kind, data.tobytes()


def recast(path: Path, kind: GGMLQuantizationType, *parts: str) -> dict[str, Tensor]:
    """Return those of a file's tensors whose names have one of the parts, in another type."""
    file = GGUFFile(path)
    names = [name for name in file.tensors if any(part in name for part in parts)]
    return {name: stored(file.tensor(name), kind) for name in names}


def rewritten(
    path: Path,
    out: Path,
    *,
    tensors: Mapping[str, Tensor | None] | None = None,
    keys: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    magic: bytes | None = None,
    version: int = 3,
    alignment: int | None = None,
) -> Path:
    """Write a file again.

    Args:
        path: the file.
        out: the new one.
        tensors: those that differ or are new; None leaves one out.
        keys: values that differ; None leaves one out.
        sizes: further keys, of uint32.
        magic: another.
        version: another, which changes no byte but its own.
        alignment: another.
    """
    file = GGUFFile(path)
    changed: dict[str, Tensor | None] = {**tensors_of(path), **(tensors or {})}
    with closing(
        GGUFWriter(out, file.value("general.architecture", GGUFValueType.STRING))
    ) as writer:
        if alignment is not None:
            writer.add_custom_alignment(alignment)
        for name, value in file.values.items():
            data = (keys or {}).get(name, _plain(value.data))
            if data is not None and name not in _AGAIN:
                writer.add_key_value(name, data, value.kind, value.element)
        for name, size in (sizes or {}).items():
            writer.add_uint32(name, size)
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        for name, (shape, kind, content) in kept.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), len(content), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        target = writer.fout[0]
        writer.write_padding(target, target.tell())
        for _, _, content in kept.values():
            target.write(content)
            writer.write_padding(target, len(content))
        target.seek(0)
        target.write((magic or path.read_bytes()[:4]) + struct.pack("<I", version))
    return out


def _plain(data: Any) -> Any:
    if isinstance(data, np.ndarray):
        return data.tolist()
    return data.decode("utf-8", "replace") if isinstance(data, bytes) else data
