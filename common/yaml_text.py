"""The text of YAML files, refused where PyYAML would take minutes over it."""

from __future__ import annotations

import re
from pathlib import Path

from common.errors import PspError
from common.files import LARGEST_DOCUMENT, read_whole

_DEEPEST = 50
_BRACKET = re.compile(rb"[\[\]{}]")
_NESTED_IN_A_LINE = re.compile(rb"(?:[-?][ \t]+){%d}" % _DEEPEST)


def read_yaml_text(
    path: Path, error: type[PspError], remedy: str, *, limit: int = LARGEST_DOCUMENT
) -> bytes:
    """Read a YAML file that its parser can bear, whose time grows with the square of the depth.

    Args:
        path: as for `read_whole`, like all others.
        error: likewise.
        remedy: likewise.
        limit: likewise.

    Raises:
        error: as `read_whole`, or values lie in each other dozens of levels deep.
    """
    data = read_whole(path, error, remedy, limit=limit)
    depth = 0
    for bracket in _BRACKET.findall(data):
        depth += 1 if bracket in (b"[", b"{") else -1
        if depth > _DEEPEST:
            break
    if depth > _DEEPEST or _NESTED_IN_A_LINE.search(data):
        raise error(f"{path}: not valid YAML (more than {_DEEPEST} levels deep)", remedy)
    return data
