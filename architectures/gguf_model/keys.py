"""Metadata of a model's file as plain numbers, whichever type its maker chose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import CheckpointError
from gguf_files.reader import GGUFFile

FETCH_FILE = "fetch the file again, or pass the model's Hugging Face directory"


@dataclass(frozen=True)
class Keys:
    """Keys of the file's architecture, such as `llama.block_count`, named without its prefix.

    Attributes:
        file: the file.
        architecture: `general.architecture`.
    """

    file: GGUFFile
    architecture: str

    def error(self, problem: str, remedy: str = FETCH_FILE) -> CheckpointError:
        """Return the error for what a file says."""
        return CheckpointError(f"{self.file.path}: {problem}", remedy)

    def full(self, key: str) -> str:
        """Return the key as it stands in the file."""
        return f"{self.architecture}.{key}"

    def has(self, key: str) -> bool:
        """Whether the file has it."""
        return self.full(key) in self.file.values

    def size(self, key: str, default: int | None = None) -> int:
        """Return a size; files may give one for each layer, all alike.

        Raises:
            CheckpointError: missing without a default, or no integer.
        """
        found = self._one(key, default)
        if isinstance(found, bool) or not isinstance(found, int):
            raise self.error(f"key {self.full(key)} is {found!r}, expected an integer")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        """Return a number, see `shortest`.

        Raises:
            CheckpointError: missing without a default, or no finite number.
        """
        found = self._one(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self.error(f"key {self.full(key)} is {found!r}, expected a number")
        if not math.isfinite(found):
            raise self.error(f"key {self.full(key)} is {found}, expected a finite number")
        return shortest(found)

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        value = self.file.values.get(self.full(key))
        return default if value is None else text_of(value.data)

    def _one(self, key: str, default: Any) -> Any:
        value = self.file.values.get(self.full(key))
        if value is None:
            if default is None:
                raise self.error(f"key {self.full(key)} is missing")
            return default
        if value.element is None:
            return value.data
        numbers = {number.item() for number in np.unique(np.asarray(value.data))[:2]}
        if len(numbers) != 1:
            raise self.error(
                f"key {self.full(key)} differs between layers", "psp needs layers of one shape"
            )
        return numbers.pop()


def text_of(data: object) -> str:
    """Return a string value as text; what is no string as it prints."""
    return data.decode("utf-8", "replace") if isinstance(data, bytes) else repr(data)


def shortest(number: float) -> float:
    """Return the shortest decimal that is rounded to the same float32.

    So 1e-05, which a file holds as 0.00000999999975, is what the model's config.json says.
    """
    return float(str(np.float32(number)))
