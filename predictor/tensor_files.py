"""Safetensors files that an index vouches for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from xxhash import xxh3_128_hexdigest

from common.errors import PspError
from common.files import refuse_special, why_unreadable, write_bytes


@dataclass(frozen=True)
class StoredTensors:
    """Tensors that another process stored beside where they are going to be.

    Attributes:
        file: where they are.
        digest: what `save_tensors` returned.
    """

    file: Path
    digest: str

    @classmethod
    def save(cls, file: Path, tensors: Mapping[str, torch.Tensor]) -> StoredTensors:
        """Store them; see `save_tensors`."""
        return cls(file, save_tensors(file, tensors))


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write tensors, whole or not at all.

    Returns:
        XXH3 of the file's bytes, 128 bits, hexadecimal.

    Raises:
        OutputError: the system refused.
    """
    data = tensor_bytes(tensors)
    write_bytes(file, data)
    return xxh3_128_hexdigest(data)


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return a safetensors file of tensors."""
    data: bytes = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return data


def load_tensors(
    file: Path, digest: str | None, error: type[PspError], remedy: str
) -> dict[str, torch.Tensor]:
    """Read tensors and make sure that the file is what was written.

    Args:
        file: to read.
        digest: what `save_tensors` returned; None in an index of an older version.
        error: what is raised.
        remedy: how to get a good file.

    Raises:
        error: missing, damaged, or not the file that the index counts.
    """
    refuse_special(file, error, remedy)
    try:
        with safe_open(file, framework="pt"):
            pass  # a header that promises another size is refused before the data are read
        data = file.read_bytes()
        found: dict[str, torch.Tensor] = load(data)
    except (SafetensorError, OSError) as problem:
        why = why_unreadable(file, problem)
        raise error(f"{file}: missing or damaged ({why})", remedy) from problem
    if digest is not None and xxh3_128_hexdigest(data) != digest:
        raise error(f"{file}: damaged, or another run's (its checksum differs)", remedy)
    return found
