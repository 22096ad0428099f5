"""The tensors of a checkpoint directory by name: safetensors or PyTorch files, one or many shards.

Nothing is ever unpickled freely: `.bin` files go through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import zipfile
from functools import cached_property
from pathlib import Path

import safetensors
import torch

from common.errors import FETCH_AGAIN, CheckpointError, reason
from common.files import read_json

_KINDS = ("model.safetensors", "pytorch_model.bin")
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class TensorFiles:
    """Lazy access to the tensors of a directory; safetensors are preferred where both kinds are."""

    def __init__(self, path: Path) -> None:
        """Name the directory; nothing is read yet."""
        self.path = path
        self._opened: dict[Path, dict[str, torch.Tensor]] = {}

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Tensor name to the file that holds it.

        Raises:
            CheckpointError: no weights, a damaged index or a missing or damaged shard.
        """
        for kind in _KINDS:
            index = self.path / f"{kind}.index.json"
            if index.exists():
                return self._indexed(index)
            if (self.path / kind).exists():
                return self._names(self.path / kind)
        raise CheckpointError(
            f"{self.path}: holds no weights, expected {' or '.join(_KINDS)} (or their index.json)",
            FETCH_AGAIN,
        )

    def _indexed(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index, CheckpointError, FETCH_AGAIN).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no 'weight_map'", FETCH_AGAIN)
        present: dict[str, Path] = {}
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{index}: shard {shard!r} is no plain file name", FETCH_AGAIN
                )
            present |= self._names(self.path / shard)
        return present

    def _names(self, shard: Path) -> dict[str, Path]:
        if not shard.is_file():
            raise CheckpointError(f"{shard}: shard is missing", FETCH_AGAIN)
        if shard.suffix != ".safetensors":
            return dict.fromkeys(self._torch_file(shard), shard)
        try:
            with safetensors.safe_open(shard, framework="pt") as file:
                return dict.fromkeys(file.keys(), shard)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(shard, error) from error

    def _torch_file(self, shard: Path) -> dict[str, torch.Tensor]:
        if shard not in self._opened:
            try:
                # Only the zip format can be mapped; the one before it has to be read whole.
                content = torch.load(
                    shard, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(shard)
                )
            except Exception as error:
                # The reader raises many kinds: not a zip, an early end, a forbidden pickle.
                raise _damaged(shard, error) from error
            if not isinstance(content, dict) or not all(
                isinstance(name, str) and isinstance(value, torch.Tensor)
                for name, value in content.items()
            ):
                raise CheckpointError(f"{shard}: not a mapping of names to tensors", FETCH_AGAIN)
            self._opened[shard] = content
        return self._opened[shard]

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Return a tensor's shape and its dtype, as text where torch's checkpoints have none."""
        shard = self.shards[name]
        if shard.suffix != ".safetensors":
            tensor = self._torch_file(shard)[name]
            return tuple(tensor.shape), tensor.dtype
        with safetensors.safe_open(shard, framework="pt") as file:
            piece = file.get_slice(name)
            return tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype(), piece.get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored dtype, mapped where the file allows it."""
        shard = self.shards[name]
        if shard.suffix != ".safetensors":
            return self._torch_file(shard)[name]
        with safetensors.safe_open(shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, count: int) -> torch.Tensor:
        """Read the first rows of a tensor, in its stored dtype."""
        shard = self.shards[name]
        if shard.suffix != ".safetensors":
            return self._torch_file(shard)[name][:count]
        with safetensors.safe_open(shard, framework="pt") as file:
            rows: torch.Tensor = file.get_slice(name)[:count]
        return rows


def _damaged(shard: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{shard}: shard is truncated or damaged ({reason(error)})", FETCH_AGAIN)
