"""JSON documents that say whether they are still what was written.

The last key of a sealed document is a checksum of all others, in their values and order; how the
text is indented does not matter. One without it is of an older version and is read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from common.errors import PspError
from common.files import read_json, write_json

SEAL = "xxh3_128"
"""Key of the checksum."""


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document, ready for JSON, with its checksum."""
    return {**document, SEAL: _checksum(document)}


def unsealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document without its checksum.

    Raises:
        ValueError: it is another one's.
    """
    held = dict(document)
    stated = held.pop(SEAL, None)
    if stated is not None and stated != _checksum(held):
        raise ValueError("damaged (its checksum differs)")
    return held


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document with its checksum, whole or not at all."""
    write_json(path, sealed(document))


def read_sealed(path: Path, error: type[PspError], remedy: str) -> dict[str, Any]:
    """Read a JSON object without its checksum.

    Raises:
        error: as `read_json`, or the checksum is another one; the line ends in `remedy`.
    """
    document = read_json(path, error, remedy)
    try:
        return unsealed(document)
    except ValueError as problem:
        raise error(f"{path}: {problem}", remedy) from problem


def seal_of(path: Path) -> str | None:
    """Return the checksum that a document states, None of one that cannot be read or has none.

    By it others call an artifact whose index is sealed.
    """
    try:
        stated = read_json(path, PspError, "").get(SEAL)
    except PspError:
        return None
    return stated if isinstance(stated, str) else None


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
