"""Damages that know a file's structure: fields, lengths, types, offsets, nesting, limits.

Of documents (JSON, YAML) values are exchanged in their tree; of a container with a JSON header
(safetensors) the header's; of all others numbers where they stand. One in three is damaged in its
bytes whatever it is.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

LIMITS = [0, 1, 3, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 1e308, 1e-320, "", "x", "../x", "\0", "\ud800", "é" * 500),
    *(2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, float("inf"), float("nan")),
    *([], {}, [[]], {"": None}, ["x"] * 1000),
]
_DOCUMENTS = (".json", ".yaml", ".jsonl")


def _no_file(file: Path, whole: bytes) -> None:
    """Leave nothing there."""


def _dead_link(file: Path, whole: bytes) -> None:
    file.symlink_to("nowhere")


def _endless(file: Path, whole: bytes) -> None:
    file.symlink_to("/dev/zero")


def _pipe(file: Path, whole: bytes) -> None:
    """A named pipe into which nobody writes."""
    os.mkfifo(file)


def _directory(file: Path, whole: bytes) -> None:
    file.mkdir()


def _huge(file: Path, whole: bytes) -> None:
    """The valid file and a terabyte of nothing behind it, which takes no room on the disk."""
    file.write_bytes(whole)
    os.truncate(file, 1 << 40)


def _all_nothing(file: Path, whole: bytes) -> None:
    file.touch()
    os.truncate(file, 1 << 40)


STAND_INS = (_no_file, _dead_link, _endless, _pipe, _directory, _huge, _all_nothing)
"""What may stand where a file should; each takes its path and the content of a valid one."""


def mutated(data: bytes, suffix: str, random: Random) -> bytes:
    """Return a file's content with one to three damages.

    Args:
        data: a valid file's.
        suffix: by which its kind is known.
        random: where choices come from.
    """
    for _ in range(random.randint(1, 3)):
        structured = random.random() < 2 / 3
        if structured and suffix in _DOCUMENTS:
            data = _document(data, suffix, random)
        elif structured and suffix == ".safetensors":
            data = _safetensors(data, random)
        else:
            data = _bytes(data, random)
    return data


def _document(data: bytes, suffix: str, random: Random) -> bytes:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _lines(data, random)
    if suffix == ".yaml" and random.random() < 0.05:
        return _with_aliases(document, random)
    if isinstance(document, dict) and random.random() < 0.7:
        document.pop("xxh3_128", None)  # or the checksum refuses it before its reader sees it
    text = json.dumps(_changed(document, random)).encode("utf-8", "surrogatepass")
    if random.random() < 0.02:
        text = text.replace(b": ", b": " + random.choice([b"[", b'{"a":']) * 100_000, 1)
    return text


def _lines(data: bytes, random: Random) -> bytes:
    """Remove, double or damage one line; of JSON in most cases by its tree."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    at = random.randrange(len(lines))
    what = random.randrange(6)
    changed = [[], lines[at : at + 1] * 2, [_bytes(lines[at], random)]]
    if what >= len(changed) and lines[at].startswith((b"{", b"[")):
        with suppress(ValueError, RecursionError):
            json.loads(lines[at])
            changed = [[_document(lines[at], ".json", random) + b"\n"]]
    return b"".join([*lines[:at], *changed[what % len(changed)], *lines[at + 1 :]])


def _with_aliases(document: Any, random: Random) -> bytes:
    """Write YAML in which a value stands for others, more of them with each of a few levels."""
    places = [(holder, key) for holder, key in _places(document) if isinstance(holder, dict)]
    if not places:
        return json.dumps(document).encode()
    holder, key = random.choice(places)
    holder[key] = "ALIASED"
    levels, width = random.choice([1, 3, 8]), random.choice([1, 2, 10])
    value = "&a0 [1]"
    for level in range(1, levels):
        value = f"&a{level} [{value}{f', *a{level - 1}' * width}]"
    if random.random() < 0.2:
        value = f"&self [{value}, *self]"
    return json.dumps(document).replace('"ALIASED"', value).encode("utf-8", "surrogatepass")


def _safetensors(data: bytes, random: Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        return _bytes(data, random)
    text = json.dumps(_changed(header, random)).encode("utf-8", "surrogatepass")
    said = random.choice([*LIMITS, len(data)]) if random.random() < 0.1 else len(text)
    return struct.pack("<Q", said) + text + data[8 + size :]


def _changed(document: Any, random: Random) -> Any:
    """Exchange, remove, double or nest one value of a tree."""
    places = list(_places(document))
    if not places:
        return random.choice(VALUES)
    holder, key = random.choice(places)
    what = random.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1:
        holder[key] = _nested(holder[key], random.choice([1, 2, 50, 250]))
    elif what == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * random.choice([1, 100]))
    elif what == 2:
        holder[f"{key} "] = holder[key]
    elif what == 3:
        other, there = random.choice(places)
        holder[key] = json.loads(json.dumps(other.get(there) if isinstance(other, dict) else 0))
    elif what == 4 and isinstance(holder[key], int | float):
        holder[key] = random.choice([holder[key] + 1, -holder[key], *LIMITS])
    else:
        holder[key] = random.choice(VALUES)
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else []
        if isinstance(each, list):
            keys = list(range(min(len(each), 40)))
        for key in keys:
            yield each, key
            waiting.append(each[key])


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _bytes(data: bytes, random: Random) -> bytes:
    """Cut, double, flip or overwrite: most at the beginning, where headers are."""
    size = max(len(data), 1)
    at = random.randrange(size if random.random() < 0.4 else min(size, 2000))
    piece = random.choice([1, 4, 8, 24, 100, 1000])
    what = random.randrange(6)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + data[at : at + piece] * random.choice([0, 2, 100]) + data[at + piece :]
    if what == 2:
        return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
    if what == 3:
        return data[:at] + random.randbytes(piece) + data[at:]
    code = random.choice(["<B", "<I", "<Q"])
    number = random.choice(LIMITS) if random.random() < 0.6 else random.randint(0, 20)
    number %= 2 ** (8 * struct.calcsize(code))
    return data[:at] + struct.pack(code, number) + data[at + struct.calcsize(code) :]
