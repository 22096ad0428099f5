"""A Hugging Face config.json: single values of it, each held to what psp can use."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, NoReturn

from common.errors import CheckpointError

Config = Mapping[str, Any]
"""What `json.loads` made of it."""

MAX_SIZE = 1 << 24
"""Larger sizes than this are taken for damage, not for a model."""

MEND = "mend the checkpoint's config"


class ConfigError(CheckpointError):
    """A value that cannot be used; whoever knows where it comes from may say so instead.

    Attributes:
        key: of config.json.
        found: its value.
        expected: what it should be, in words.
    """

    def __init__(self, key: str, found: object, expected: str, remedy: str) -> None:
        """Say it as of a config.json."""
        super().__init__(f"config.json: {key} is {found!r}, expected {expected}", remedy)
        self.key, self.found, self.expected = key, found, expected


def refuse(key: str, found: object, expected: str, remedy: str) -> NoReturn:
    """Raise the one-line error for a config value that cannot be used."""
    raise ConfigError(key, found, expected, remedy)


def number(config: Config, key: str, default: int | None = None) -> int:
    """Return a positive integer size.

    Raises:
        CheckpointError: absent without a default, not an integer, or out of range.
    """
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIZE:
        refuse(key, value, f"an integer from 1 to {MAX_SIZE}", MEND)
    return value


def flag(config: Config, key: str, default: bool = False) -> bool:
    """Return a boolean, `default` when absent."""
    value = config.get(key)
    return default if value is None else bool(value)


def real(config: Config, key: str, default: float | None) -> float:
    """Return a positive, finite real number.

    Raises:
        CheckpointError: absent without a default, not a number, or not above zero.
    """
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        refuse(key, value, "a number above 0", MEND)
    return float(value)
