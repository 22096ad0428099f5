"""Reading of GGUF and PWRI files, hostile ones included.

Every count, length and offset is checked against the file's size before anything is allocated, so
a lying header costs a one-line error and nothing else. Layout: ggml's gguf.md, versions 2 and 3,
which differ in nothing where both are little-endian; types: the `gguf` package's constants.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from common.errors import FormatError
from common.files import refuse_pointer
from gguf_files.elements import PLAIN, data_size, decode

DENSE_MAGIC = b"GGUF"
SPARSE_MAGIC = b"PWRI"
"""A file that starts with these bytes PowerInfer runs sparsely; the layout is GGUF's."""

VERSION = 3
"""What psp writes; version 2 has the same layout, and PowerInfer reads both."""

VERSIONS = (2, VERSION)
ALIGNMENT = 32
"""Where a file does not say its own, in `general.alignment`."""

_LEAST_ALIGNMENT = 8

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_LENGTH = struct.Struct("<Q")
"""Of a string."""

_MAX_DIMS = 4
_REMEDY = "the file is damaged or foreign, fetch or export the file again"
_ANOTHER = "pass a file made by 'psp export-gguf'"


@dataclass(frozen=True)
class Value:
    """A metadata value.

    Attributes:
        kind: its type in the file; ARRAY for arrays.
        element: type of the elements of an array, else None.
        data: int, float, bool, bytes (strings stay undecoded), numpy array or list of bytes.
    """

    kind: GGUFValueType
    element: GGUFValueType | None
    data: Any


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: its name.
        shape: numpy order, slowest dimension first.
        kind: element type.
        start: absolute offset of its data.
        size: bytes of its data.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


class GGUFFile:
    """An opened file whose header has been checked against its size.

    Attributes:
        path: the file.
        remedy: what a user can do where it is damaged.
        files: all files that hold it, one here.
        sparse: whether its magic is PWRI.
        version: of its format.
        alignment: bytes that tensors start at multiples of.
        values: metadata by key.
        tensors: where they lie, by name, in the file's order.
    """

    def __init__(self, path: Path, remedy: str | None = None) -> None:
        """Read the header.

        Args:
            path: the file.
            remedy: see the attribute; by default that for a file that psp or PowerInfer made.

        Raises:
            FormatError: not such a file, truncated, a Git LFS pointer, or a header that lies.
        """
        self.path, self.remedy = path, remedy or _REMEDY
        self.files: tuple[Path, ...] = (path,)
        # Opening a pipe would wait for a writer.
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise FormatError(f"{path}: is no plain file", remedy or _ANOTHER)
        refuse_pointer(path, FormatError)
        try:
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "is empty"
            raise FormatError(f"{path}: {reason}", remedy or _ANOTHER) from error
        self._mapping = mapped.base
        self._bytes: npt.NDArray[np.uint8] = np.asarray(mapped)  # a memmap is slow to cut
        self._at = 0
        magic = self._take(4, "magic").tobytes()
        if magic not in (DENSE_MAGIC, SPARSE_MAGIC):
            raise self.error(f"magic is {magic!r}, expected {SPARSE_MAGIC!r} or {DENSE_MAGIC!r}")
        self.sparse = magic == SPARSE_MAGIC
        self.version = self._version()
        tensor_count = self._count("tensor count", least=24)
        value_count = self._count("value count", least=13)
        self.values: dict[str, Value] = {}
        for _ in range(value_count):
            name = self._name("key")
            if name in self.values:
                raise self.error(f"key {name} appears twice")
            self.values[name] = self._value(name)
        self.alignment = self._alignment()
        infos = [self._tensor_info() for _ in range(tensor_count)]
        self.tensors = self._place(infos)

    def error(self, problem: str) -> FormatError:
        """Return the error for a file that breaks PowerInfer's contract."""
        return FormatError(f"{self.path}: {problem}", self.remedy)

    def _version(self) -> int:
        version: int = self._scalar("<I", "version")
        if version in VERSIONS:
            return version
        swapped = int.from_bytes(struct.pack("<I", version), "big")
        found = f"{swapped}, big-endian" if 1 <= swapped <= VERSION else str(version)
        raise FormatError(
            f"{self.path}: version is {found}, expected {' or '.join(map(str, VERSIONS))}, "
            "little-endian",
            "convert the model again with a current converter",
        )

    def _take(self, size: int, what: str) -> npt.NDArray[np.uint8]:
        end = self._at + size
        if end > len(self._bytes):
            raise self.error(f"ends inside {what}")
        piece = self._bytes[self._at : end]
        self._at = end
        return piece

    def _scalar(self, code: str, what: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code), what).tobytes())[0]

    def _count(self, what: str, *, least: int) -> int:
        """Read a count of things that take at least `least` bytes each."""
        count = int(self._scalar("<Q", what))
        if count > (len(self._bytes) - self._at) // least:
            raise self.error(f"{what} {count} is more than the file can hold")
        return count

    def _string(self, what: str) -> bytes:
        return self._take(self._count(f"length of {what}", least=1), what).tobytes()

    def _name(self, what: str) -> str:
        try:
            return self._string(what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a {what} is not UTF-8") from error

    def _kind(self, what: str) -> GGUFValueType:
        code = self._scalar("<I", what)
        try:
            return GGUFValueType(code)
        except ValueError as error:
            raise self.error(f"{what} has unknown type {code}") from error

    def _value(self, name: str) -> Value:
        kind = self._kind(name)
        if kind is GGUFValueType.ARRAY:
            element = self._kind(name)
            return Value(kind, element, self._array(name, element))
        if kind is GGUFValueType.STRING:
            return Value(kind, None, self._string(name))
        return Value(kind, None, self._scalar(_SCALARS[kind], name))

    def _array(self, name: str, element: GGUFValueType) -> Any:
        if element is GGUFValueType.STRING:
            return self._strings(name)
        if element is GGUFValueType.ARRAY:
            raise self.error(f"{name} is an array of arrays, which PowerInfer does not read")
        code = _SCALARS[element]
        count = self._count(name, least=struct.calcsize(code))
        return self._take(count * struct.calcsize(code), name).view(np.dtype(code)).copy()

    def _strings(self, what: str) -> list[bytes]:
        """Read as many as a count says, in few calls: a vocabulary has up to 260,000."""
        count, size = self._count(what, least=8), len(self._bytes)
        found, at = list[bytes](), self._at
        with self._bytes.data as stored:
            for _ in range(count):
                if at + _LENGTH.size > size:
                    raise self.error(f"ends inside length of {what}")
                [length] = _LENGTH.unpack_from(stored, at)
                at += _LENGTH.size
                if length > size - at:
                    raise self.error(f"length of {what} {length} is more than the file can hold")
                found.append(stored[at : at + length].tobytes())
                at += length
        self._at = at
        return found

    def _alignment(self) -> int:
        value = self.values.get("general.alignment")
        if value is None:
            return ALIGNMENT
        found = value.data
        whole = value.kind is GGUFValueType.UINT32 and found >= _LEAST_ALIGNMENT
        if whole and not found & (found - 1):
            return int(found)
        said = found if value.element is None else "an array"
        raise self.error(
            f"general.alignment is {said}, expected a power of two from {_LEAST_ALIGNMENT} on as "
            "UINT32"
        )

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._name("tensor name")
        dims = self._scalar("<I", name)
        if not 1 <= dims <= _MAX_DIMS:
            raise self.error(f"tensor {name} has {dims} dimensions")
        shape = tuple(self._scalar("<Q", name) for _ in range(dims))[::-1]
        code = self._scalar("<I", name)
        try:
            kind = GGMLQuantizationType(code)
        except ValueError as error:
            raise self.error(f"tensor {name} has unknown type {code}") from error
        return name, shape, kind, self._scalar("<Q", name)

    def _place(
        self, infos: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]
    ) -> dict[str, TensorInfo]:
        base = -(-self._at // self.alignment) * self.alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in infos:
            size = data_size(shape, kind)
            if name in tensors:
                raise self.error(f"tensor {name} appears twice")
            if 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
                raise self.error(f"tensor {name} has shape {shape}, no multiple of its block")
            if offset % self.alignment:
                raise self.error(f"tensor {name} is not aligned to {self.alignment} bytes")
            if base + offset + size > len(self._bytes):
                raise self.error(f"tensor {name} ends after the file does")
            tensors[name] = TensorInfo(name, shape, kind, base + offset, size)
        return tensors

    def value(self, key: str, kind: GGUFValueType, element: GGUFValueType | None = None) -> Any:
        """Return a metadata value of a given type; strings come decoded.

        Raises:
            FormatError: the key is missing or of another type.
        """
        value = self.values.get(key)
        if value is None:
            raise self.error(f"key {key} is missing")
        if (value.kind, value.element) != (kind, element):
            found = (value.element or value.kind).name
            raise self.error(f"key {key} is {found}, expected {(element or kind).name}")
        if kind is GGUFValueType.STRING:
            return value.data.decode("utf-8", "replace")
        return value.data

    def optional(self, key: str, kind: GGUFValueType, default: Any) -> Any:
        """Return a metadata value, or `default` if there is no such key; see `value`."""
        return self.value(key, kind) if key in self.values else default

    def forget(self) -> None:
        """Give memory back that holds what was read of the file; it is read again when needed.

        Otherwise a walk over all tensors ends with the whole file in memory.
        """
        if isinstance(self._mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes in a mapping of its own, (size,) uint8.

        The memory goes back with the array. What is written to it does not reach the file.

        Raises:
            FormatError: the tensor is missing, or the file cannot be read any more.
        """
        info = self._info(name)
        try:
            return np.memmap(self.path, np.uint8, "c", info.start, (info.size,)).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise self.error(f"tensor {name} cannot be read ({error})") from error

    def holder(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.path

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise self.error(f"tensor {name} is missing")
        return info

    def tensor(self, name: str, rows: npt.NDArray[np.integer[Any]] | None = None) -> Any:
        """Return a tensor's numbers, numpy array.

        Args:
            name: its name.
            rows: return these rows of a matrix only.

        Returns:
            F32, F16 and I32 as they are, mapped from the file and read-only if whole; what is
            quantised as float32.

        Raises:
            FormatError: the tensor is missing or of another type.
        """
        info = self._info(name)
        data, shape = self._bytes[info.start : info.start + info.size], info.shape
        if rows is not None:
            if len(shape) == 1 and info.kind not in PLAIN:
                raise self.error(f"tensor {name} is a vector of {info.kind.name}, expected F32")
            data, shape = data.reshape(shape[0], -1)[rows].reshape(-1), (len(rows), *shape[1:])
        try:
            return decode(data, shape, info.kind)
        except NotImplementedError as error:
            raise FormatError(
                f"{self.path}: tensor {name} has type {info.kind.name}, which cannot be read",
                "export with f16 or q4_0",
            ) from error
