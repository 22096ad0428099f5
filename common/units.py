"""Bytes as people write and read them."""

from __future__ import annotations

import re
from decimal import Decimal

from common.errors import ExportError

MIB, GIB = 1 << 20, 1 << 30

_UNITS = {
    prefix + unit: base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for unit, base in (("b", 1000), ("ib", 1024))
    if power or unit == "b"
} | {"": 1}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]*)")


def parse_size(text: str) -> int:
    """Return a size in bytes; binary units end in iB, decimal ones in B, none means bytes.

    Args:
        text: such as `24GiB`, `24GB`, `1.5 GiB` or `25769803776`.

    Raises:
        ExportError: it is no such size.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ExportError(f"size {text!r}: expected bytes or a number with unit, such as 24GiB")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def size(number: float) -> str:
    """Return bytes in the largest binary unit that they fill, three digits or more."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            break
        number /= 1024
    digits = 0 if unit == "B" or number >= 100 else 1
    return f"{number:,.{digits}f} {unit}"


def decimal_size(count: int) -> str:
    """Return bytes in the largest decimal unit, as disks are sold, three digits at most."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: float) -> str:
    """Return a time as people say it, two digits of what counts."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
