"""The tensors of a checkpoint directory by name: safetensors or PyTorch files, one or many shards.

Nothing is ever unpickled freely: files of `torch.save` go through `read_torch_file`, whoever made
them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import torch

from architectures.missing_tensors import explain_missing, wrapper_prefix
from architectures.weight_files import WeightFiles, find_weights
from common.errors import FETCH_AGAIN, CheckpointError, reason
from common.files import why_unreadable

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
    """Lazy access to the tensors of a directory, in the files that `find_weights` chooses.

    Where a wrapper (torch.compile, DataParallel) gave all names a first part, it is left out.
    """

    def __init__(self, path: Path, named: object = None) -> None:
        """Name the directory; nothing is read yet.

        Args:
            path: the directory.
            named: `transformers_weights` of its config.json.
        """
        self.path = path
        self.named = named
        self._opened: dict[Path, dict[str, torch.Tensor]] = {}

    @cached_property
    def weights(self) -> WeightFiles:
        """The files that hold the tensors.

        Raises:
            CheckpointError: as `find_weights`.
        """
        return find_weights(self.path, self.named)

    @cached_property
    def _stored(self) -> dict[str, Path]:
        """Stored name to file; of a name that several shards hold, the last counts."""
        stored: dict[str, Path] = {}
        for shard in self.weights.shards:
            stored |= self._names(shard)
        return stored

    @cached_property
    def prefix(self) -> str:
        """What stands before all stored names, see `wrapper_prefix`."""
        return wrapper_prefix(self._stored)

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Tensor name to the file that holds it.

        Raises:
            CheckpointError: no weights, a damaged index or a missing or damaged shard.
        """
        return {name.removeprefix(self.prefix): file for name, file in self._stored.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user may not expect of the choice of files and names, in lines."""
        weights, lines = self.weights, []
        if weights.passed_over:
            lines.append(
                f"weights are those of {weights.chosen}, as transformers chooses; "
                f"{', '.join(weights.passed_over)} beside it is passed over"
            )
        if self.prefix:
            lines.append(f"{weights.chosen}: {self.prefix!r} before all tensor names is left out")
        return tuple(lines)

    def _names(self, shard: Path) -> dict[str, Path]:
        if shard.suffix != ".safetensors":
            return dict.fromkeys(self._torch_file(shard), shard)
        with _safetensors(shard) as file:
            return dict.fromkeys(file.keys(), shard)

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

    def where(self, name: str) -> str:
        """Return the file that holds a tensor and its stored name, for messages."""
        return f"{self.shards[name]}: tensor {self.prefix}{name}"

    def missing(self, name: str, *, head: bool, bare: bool) -> tuple[str, str]:
        """Return problem and remedy for a tensor that is not there; see `explain_missing`."""
        problem, remedy = explain_missing(name, self.shards, head=head, bare=bare)
        return f"{self.path}: {problem}", remedy

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Return a tensor's shape and its dtype, as text where torch's checkpoints have none."""
        shard, name = self.shards[name], self.prefix + name
        if shard.suffix != ".safetensors":
            tensor = self._torch_file(shard)[name]
            return tuple(tensor.shape), tensor.dtype
        with _safetensors(shard) as file:
            piece = file.get_slice(name)
            return tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype(), piece.get_dtype())

    def read(self, name: str, count: int | None = None) -> torch.Tensor:
        """Read a tensor in its stored dtype, or its first `count` rows; mapped where possible."""
        shard, name = self.shards[name], self.prefix + name
        if shard.suffix == ".safetensors":
            with _safetensors(shard) as file:
                stored: torch.Tensor = (
                    file.get_tensor(name) if count is None else file.get_slice(name)[:count]
                )
                return stored
        tensor = self._torch_file(shard)[name]
        if not is_plain(tensor):
            problem = f"{shard}: tensor {name} does not hold all its numbers"
            raise CheckpointError(problem, FETCH_AGAIN)
        return tensor if count is None else tensor[:count]


@contextmanager
def _safetensors(shard: Path) -> Iterator[Any]:
    """Open a file, which may be gone since it was last looked at."""
    try:
        with safetensors.safe_open(shard, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise _damaged(shard, error) from error
    except OSError as error:
        problem = f"{shard}: cannot be read ({why_unreadable(shard, error)})"
        raise CheckpointError(problem, "look at the file and its disk") from error


def _damaged(shard: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{shard}: shard is truncated or damaged ({reason(error)})", FETCH_AGAIN)
