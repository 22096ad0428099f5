"""One layer's rows of one shard: a safetensors file that is written while rows come in.

The number of rows is known beforehand, so every part but the last has its place from the start::

    counts      (d_ff,) int64                    tokens on which a neuron was active
    scale       (rows,) float32                  mean importance of a row's active neurons
    inputs      (rows, d_model) float16/bfloat16 the predictor's input
    active      (rows, ceil(d_ff / 8)) uint8     bit-packed, least significant bit first
    importance  (bytes,) uint8                   codes of the active neurons, row by row, packed

`scale` and `importance` are empty where no importance is stored. The header is written last and
holds the XXH3 checksum of all that follows it, so a file can be checked by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from common.errors import COLLECT_AGAIN, TraceError
from common.files import refuse_special, why_unreadable, write_error
from predictor.traces.packing import shift_codes, unpack_active

_PREFIX = 1024
"""Bytes before the data: the header's length (8) and the header, padded with spaces."""

_CHUNK = 1 << 20
_DIGEST = 32
"""Characters of a checksum."""

_CHECKED_ROWS = 1024
INPUT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_CODES = {"float16": "F16", "bfloat16": "BF16"}
_DTYPES = {
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class BatchRows:
    """Rows of one layer as the recorder hands them over, on the CPU.

    Attributes:
        inputs: (rows, d_model), already in the stored dtype.
        active: (rows, ceil(d_ff / 8)) uint8.
        counts: (d_ff,) int64.
        scale: (rows,) float32, or empty.
        codes: (bytes,) uint8, the codes of the active neurons, packed, or empty.
    """

    inputs: torch.Tensor
    active: torch.Tensor
    counts: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """Sizes of a shard file.

    Attributes:
        rows: rows of the shard.
        d_model: hidden size.
        d_ff: neurons.
        input_dtype: `float16` or `bfloat16`.
        importance_bits: bits an active neuron's importance takes; 0 stores none.
    """

    rows: int
    d_model: int
    d_ff: int
    input_dtype: str
    importance_bits: int

    def parts(self, importance_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Return safetensors type, shape and bytes of every part, in the order of the file."""
        scales = self.rows if self.importance_bits else 0
        shapes: dict[str, tuple[str, int, tuple[int, ...]]] = {
            "counts": ("I64", 8, (self.d_ff,)),
            "scale": ("F32", 4, (scales,)),
            "inputs": (_CODES[self.input_dtype], 2, (self.rows, self.d_model)),
            "active": ("U8", 1, (self.rows, -(-self.d_ff // 8))),
            "importance": ("U8", 1, (importance_bytes,)),
        }
        return {
            name: (kind, shape, size * math.prod(shape))
            for name, (kind, size, shape) in shapes.items()
        }

    def importance_bytes(self, active: int) -> int:
        """Return the bytes that the codes of `active` neurons take."""
        return -(-active * self.importance_bits // 8)

    def size(self, active: int) -> int:
        """Return the file's size in bytes with `active` active neurons in all rows together."""
        parts = self.parts(self.importance_bytes(active))
        return _PREFIX + sum(size for _, _, size in parts.values())


class ShardWriter:
    """Writes a shard file as rows come in; only what one call hands over is in memory."""

    def __init__(self, path: Path, layout: ShardLayout, name: Path | None = None) -> None:
        """Start a file.

        Args:
            path: a temporary name; the caller renames it once the file is closed.
            layout: sizes.
            name: the name that it will get, for errors.
        """
        self._name = name or path
        with self._explained():
            self._file = path.open("wb+")
        self._layout = layout
        self._rows = 0
        self._counts = np.zeros(layout.d_ff, np.int64)
        self._code_bits = 0
        self._begun_byte = np.uint8(0)
        self._finished = False
        self._offsets: dict[str, int] = {}
        offset = _PREFIX
        for part, (_, _, size) in layout.parts(0).items():
            self._offsets[part] = offset
            offset += size
        self.digest = ""

    def __enter__(self) -> ShardWriter:
        """Give out the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file if all went well; close it anyhow."""
        try:
            if kind is None:
                self.finish()
        finally:
            self._file.close()

    def append(self, batch: BatchRows) -> None:
        """Add rows after those that are there.

        Raises:
            OutputError: the system refused a write.
        """
        layout = self._layout
        with self._explained():
            self._put("inputs", batch.inputs, 2 * layout.d_model)
            self._put("active", batch.active, -(-layout.d_ff // 8))
            if layout.importance_bits:
                self._put("scale", batch.scale, 4)
                self._put_codes(batch.codes.numpy(), int(batch.counts.sum()))
        self._counts += batch.counts.numpy()
        self._rows += len(batch.inputs)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Name this file where the system refuses; several are open at once."""
        try:
            yield
        except OSError as error:
            raise write_error(self._name, error) from error

    def _put(self, name: str, rows: torch.Tensor, row_bytes: int) -> None:
        data = rows.contiguous().view(torch.uint8).numpy()
        assert data.nbytes == len(rows) * row_bytes
        self._file.seek(self._offsets[name] + self._rows * row_bytes)
        self._file.write(data.data)

    def _put_codes(self, packed: npt.NDArray[np.uint8], codes: int) -> None:
        """Write the bytes that are full; the last one may be begun only."""
        bytes_before, bits_before = divmod(self._code_bits, 8)
        if bits_before:
            packed = shift_codes(packed, bits_before)
            packed[0] |= self._begun_byte
        self._code_bits += codes * self._layout.importance_bits
        full = self._code_bits // 8 - bytes_before
        self._file.seek(self._offsets["importance"] + bytes_before)
        self._file.write(np.ascontiguousarray(packed[:full]).data)
        self._begun_byte = packed[full] if self._code_bits % 8 else np.uint8(0)

    def finish(self) -> None:
        """Write what comes last, once all rows are there; nothing if that is done.

        Raises:
            OutputError: the system refused a write.
        """
        if not self._finished:
            with self._explained():
                self._finish()
            self._finished = True

    def _finish(self) -> None:
        assert self._rows == self._layout.rows
        code_bytes = -(-self._code_bits // 8)
        if self._code_bits % 8:
            self._file.seek(self._offsets["importance"] + code_bytes - 1)
            self._file.write(self._begun_byte.tobytes())
        self._file.seek(self._offsets["counts"])
        self._file.write(self._counts.data)
        self._file.flush()
        self.digest = _digest(self._file)
        self._file.seek(0)
        self._file.write(_prefix(self._layout, code_bytes, self.digest))


def _prefix(layout: ShardLayout, code_bytes: int, digest: str) -> bytes:
    """Return what stands before the data: the header's length and the header."""
    header: dict[str, Any] = {"__metadata__": {"xxh3_128": digest}}
    offset = 0
    for name, (kind, shape, size) in layout.parts(code_bytes).items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode().ljust(_PREFIX - 8)
    assert len(text) == _PREFIX - 8
    return (_PREFIX - 8).to_bytes(8, "little") + text


def _digest(file: Any) -> str:
    digest = xxhash.xxh3_128()
    file.seek(_PREFIX)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def read_tensors(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """Map some tensors of a file, or all.

    Raises:
        TraceError: missing or damaged.
    """
    refuse_special(path, TraceError, COLLECT_AGAIN)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except (SafetensorError, OSError) as error:
        why = why_unreadable(path, error)
        raise TraceError(f"{path}: missing or damaged ({why})", COLLECT_AGAIN) from error


def read_shard(path: Path, layout: ShardLayout) -> dict[str, torch.Tensor]:
    """Map a shard file.

    Returns:
        The parts by name; their pages are read when they are used.

    Raises:
        TraceError: missing, damaged, or of other sizes than `layout`.
    """
    tensors = read_tensors(path)
    for name, (kind, shape, _) in layout.parts(0).items():
        if name == "importance":
            shape = (layout.importance_bytes(int(tensors["counts"].sum())),)
        part = tensors.get(name)
        found = (tuple(part.shape), part.dtype) if part is not None else (None, None)
        if found != (shape, _DTYPES[kind]):
            raise TraceError(
                f"{path}: {name} has shape {found[0]} and dtype {found[1]}, the manifest implies "
                f"{shape} and {_DTYPES[kind]}",
                COLLECT_AGAIN,
            )
    return tensors


def shard_counts(path: Path) -> torch.Tensor:
    """Return the (d_ff,) int64 counts of a shard file, the only part that is read.

    Raises:
        TraceError: missing or damaged.
    """
    return read_tensors(path, "counts")["counts"]


def stated_digest(path: Path) -> str:
    """Return the checksum that a shard file states, of which the data are not read.

    Raises:
        TraceError: missing or damaged.
    """
    refuse_special(path, TraceError, COLLECT_AGAIN)
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("xxh3_128"))
    except (SafetensorError, OSError) as error:
        why = why_unreadable(path, error)
        raise TraceError(f"{path}: missing or damaged ({why})", COLLECT_AGAIN) from error


def head_bytes(layout: ShardLayout) -> int:
    """Return the bytes that a file begins with, up to its counts."""
    return _PREFIX + 8 * layout.d_ff


def read_head(name: str, head: bytes, layout: ShardLayout) -> tuple[str, torch.Tensor]:
    """Return what a file states where it begins.

    Args:
        name: of the file, for errors.
        head: as many bytes as `head_bytes` says, or what there is.
        layout: its sizes.

    Returns:
        Its checksum, and its (d_ff,) int64 counts.

    Raises:
        TraceError: damaged, or of other sizes than `layout`.
    """
    counts = np.frombuffer(head[_PREFIX:].ljust(8 * layout.d_ff), np.int64, layout.d_ff).copy()
    try:
        digest = str(json.loads(head[8:_PREFIX])["__metadata__"]["xxh3_128"])
    except (ValueError, LookupError, TypeError, RecursionError):
        digest = ""
    code_bytes = layout.importance_bytes(max(0, int(counts.sum())))
    # The header can only be what the writer writes of such sizes, with such a checksum.
    if len(head) < head_bytes(layout) or not _is_prefix(head[:_PREFIX], layout, code_bytes, digest):
        raise TraceError(f"{name}: damaged, or of other sizes than the manifest's", COLLECT_AGAIN)
    return digest, torch.from_numpy(counts)


def _is_prefix(found: bytes, layout: ShardLayout, code_bytes: int, digest: str) -> bool:
    return len(digest) == _DIGEST and found == _prefix(layout, code_bytes, digest)


def vouch_shard(path: Path, layout: ShardLayout) -> str:
    """Read a shard file and make sure that its checksum is the one that it states.

    Returns:
        The checksum.

    Raises:
        TraceError: missing, damaged, or of other sizes than `layout`.
    """
    tensors = read_shard(path, layout)
    with path.open("rb") as file:
        prefix, found = file.read(_PREFIX), _digest(file)
    # The header holds the checksum of the data; itself it can only be what the writer writes.
    if prefix != _prefix(layout, len(tensors["importance"]), found):
        raise TraceError(
            f"{path}: header and data do not fit, its checksum is {found}", COLLECT_AGAIN
        )
    return found


def check_shard(path: Path, layout: ShardLayout) -> str:
    """Verify a shard file against its own checksum and `layout`, and its numbers.

    Returns:
        Its checksum.

    Raises:
        TraceError: it names what is wrong.
    """
    tensors, found = read_shard(path, layout), vouch_shard(path, layout)
    counted = torch.zeros(layout.d_ff, dtype=torch.int64)
    for start in range(0, layout.rows, _CHECKED_ROWS):
        rows = slice(start, start + _CHECKED_ROWS)
        counted += unpack_active(tensors["active"][rows], layout.d_ff).sum(0)
        if not torch.isfinite(tensors["inputs"][rows]).all():
            raise TraceError(f"{path}: inputs hold NaN or inf", COLLECT_AGAIN)
    if not torch.equal(counted, tensors["counts"]):
        raise TraceError(f"{path}: counts differ from the active bits", COLLECT_AGAIN)
    return found
