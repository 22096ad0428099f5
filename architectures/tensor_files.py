"""The tensors of a checkpoint directory by name: safetensors or PyTorch files, one or many shards.

Nothing is ever unpickled freely: files of `torch.save` go through `read_torch_file`, whoever made
them.
"""

from __future__ import annotations

import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

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
_PLAIN = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def read_torch_file(file: Path) -> Any:
    """Read a file of `torch.save` without running anything that it holds.

    Tensors in it may still be other than they look: ask `is_plain` before use.

    Raises:
        ValueError: damaged, or it holds more than tensors; the text says what is wrong.
    """
    try:
        # Only the zip format can be mapped; the one before it has to be read whole.
        zipped = zipfile.is_zipfile(file)
        if not (zipped and _packed(file)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        # The reader raises many kinds: not a zip, an early end, a forbidden pickle.
        raise ValueError(f"cannot be read ({reason(error)})") from error
    raise ValueError("is compressed, as torch.save writes none")


def _packed(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(part.compress_size < part.file_size for part in archive.infolist())


def is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor whose numbers are all there.

    A file may hold others: without data, sparse, quantised, or a few bytes seen as terabytes by
    way of strides of zero.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.dtype in _PLAIN
        and value.nbytes <= value.untyped_storage().nbytes()
    )


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
                content = read_torch_file(shard)
            except ValueError as error:
                raise _damaged(shard, error.__cause__ or error) from error
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

    def read(self, name: str, count: int | None = None) -> torch.Tensor:
        """Read a tensor in its stored dtype, or its first `count` rows; mapped where possible."""
        shard = self.shards[name]
        if shard.suffix == ".safetensors":
            with safetensors.safe_open(shard, framework="pt") as file:
                stored: torch.Tensor = (
                    file.get_tensor(name) if count is None else file.get_slice(name)[:count]
                )
                return stored
        tensor = self._torch_file(shard)[name]
        if not is_plain(tensor):
            problem = f"{shard}: tensor {name} does not hold all its numbers"
            raise CheckpointError(problem, FETCH_AGAIN)
        return tensor if count is None else tensor[:count]


def _damaged(shard: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{shard}: shard is truncated or damaged ({reason(error)})", FETCH_AGAIN)
