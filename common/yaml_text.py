"""YAML files, refused where parsing them, or what they hold, would take minutes or all memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from common.errors import PspError
from common.files import read_whole

LARGEST = 1 << 19
"""Bytes; its parser takes a second over as many, and the largest published task file has 62 KB."""

_DEEPEST = 50
_BRACKET = re.compile(rb"[\[\]{}]")
_NESTED_IN_A_LINE = re.compile(rb"(?:[-?][ \t]+){%d}" % _DEEPEST)
_MOST_ADDED = 10_000
"""Values that aliases may add to those that are written out."""


def read_yaml_text(path: Path, error: type[PspError], remedy: str) -> bytes:
    """Read a YAML file that its parser can bear, whose time grows with the square of the depth.

    Args:
        path: as for `read_whole`, like the others.
        error: likewise.
        remedy: likewise.

    Raises:
        error: as `read_whole`, larger than `LARGEST`, or values lie in each other dozens of levels
            deep.
    """
    data = read_whole(path, error, remedy, limit=LARGEST)
    depth = 0
    for bracket in _BRACKET.findall(data):
        depth += 1 if bracket in (b"[", b"{") else -1
        if depth > _DEEPEST:
            break
    if depth > _DEEPEST or _NESTED_IN_A_LINE.search(data):
        raise error(f"{path}: not valid YAML (more than {_DEEPEST} levels deep)", remedy)
    return data


def safe_loader() -> type[Any]:
    """Return PyYAML's loader of plain values, the compiled one where it was built with it."""
    import yaml

    loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return loader


def parse_yaml(data: bytes, loader: type[Any] | None = None) -> object:
    """Return what a YAML text holds.

    Args:
        data: of `read_yaml_text`.
        loader: derived from `safe_loader`; that itself by default.

    Raises:
        yaml.YAMLError: not YAML, a value that holds itself, or aliases of aliases that stand for
            more than anybody writes.
        ValueError: an impossible date or encoding, which PyYAML lets through.
        RecursionError: too deep.
    """
    import yaml

    opened = (loader or safe_loader())(data)
    try:
        node = opened.get_single_node()
        if node is None:
            return None
        sizes: dict[int, int] = {}
        if _values(node, sizes) > len(sizes) + _MOST_ADDED:
            raise yaml.YAMLError(f"aliases add more than {_MOST_ADDED} values")
        return opened.construct_document(node)
    finally:
        opened.dispose()


def _values(node: Any, sizes: dict[int, int]) -> int:
    """Count the values of a tree, those behind an alias each time.

    Args:
        node: its root.
        sizes: what is counted already, by identity; 0 for what is being counted.
    """
    import yaml

    known = sizes.get(id(node))
    if known is not None:
        if known == 0:
            raise yaml.YAMLError("a value holds itself")
        return known
    sizes[id(node)] = 0
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = [each for pair in inner for each in pair]
    sizes[id(node)] = 1 + sum(_values(each, sizes) for each in inner)
    return sizes[id(node)]
