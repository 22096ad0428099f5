"""Places that users name by a URL: prefixes in object stores, beside paths on disks."""

from __future__ import annotations

import re
from pathlib import Path

_FORM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/\s]+(/[^/\s]+)*")
_ON_DISK = ("file", "local")
"""Protocols that say a path in another way."""


class Url(str):
    """A prefix in an object store, such as `s3://bucket/traces`."""

    __slots__ = ()


def is_url(text: str) -> bool:
    """Whether a text names no path."""
    return "://" in text


def path_or_url(text: str) -> Path | Url:
    """Return what a text names.

    Raises:
        ValueError: it is no plain URL, one of a disk, or holds a password, which is not repeated.
    """
    if not is_url(text):
        return Path(text)
    if "@" in text:
        raise ValueError("a URL holds no credentials; they come from the library's environment.")
    if text.split(":")[0] in _ON_DISK:
        raise ValueError(f"{text!r} is on a disk; pass the path itself.")
    found = text.rstrip("/")
    if not _FORM.fullmatch(found) or {".", ".."} & set(found.split("/")):
        raise ValueError(f"{text!r} is no place in an object store; write s3://BUCKET/PREFIX.")
    return Url(found)
