"""Which files of a model directory hold its weights, where there may be several sets of them.

The order is transformers' own (transformers@5.23.0 `modeling_utils.py:
_get_resolved_checkpoint_files`): what config.json names as `transformers_weights`, then a single
safetensors file, then one with an index, then PyTorch's single file and its index. An earlier save
may have left any of the others behind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from architectures.directory import other_kind
from common.errors import FETCH_AGAIN, CheckpointError
from common.files import read_json, refuse_pointer

INDEX = ".index.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")
_ORDER = tuple(name for single in SINGLE for name in (single, f"{single}{INDEX}"))


@dataclass(frozen=True)
class WeightFiles:
    """The files that transformers would load.

    Attributes:
        shards: the files with tensors, in the order in which they are read.
        chosen: the file that decided: one of weights, or an index.
        passed_over: names of other weights that the directory holds.
    """

    shards: tuple[Path, ...]
    chosen: Path
    passed_over: tuple[str, ...]


def has_weights(path: Path) -> bool:
    """Whether a directory holds weights under one of transformers' names."""
    return any((path / name).is_file() for name in _ORDER)


def find_weights(path: Path, named: object = None) -> WeightFiles:
    """Choose among the weights of a directory.

    Args:
        path: the directory.
        named: `transformers_weights` of its config.json, None where it has no such key.

    Raises:
        CheckpointError: no weights, a name that leads out of the directory, a damaged index, a
            shard that is missing or a Git LFS pointer.
    """
    there = [name for name in _ORDER if (path / name).is_file()]
    if named is not None:
        there = [_explicit(path, named), *(name for name in there if name != named)]
    if not there:
        raise _none(path)
    chosen = path / there[0]
    refuse_pointer(chosen, CheckpointError)
    shards = _indexed(chosen) if chosen.name.endswith(INDEX) else [chosen]
    for shard in shards:
        if not os.path.isfile(shard):
            raise CheckpointError(f"{shard}: shard is missing", FETCH_AGAIN)
        refuse_pointer(shard, CheckpointError)
    return WeightFiles(tuple(shards), chosen, tuple(there[1:]))


def _explicit(path: Path, named: object) -> str:
    """Return the name in `transformers_weights`, for which transformers has the same rules."""
    safe = isinstance(named, str) and Path(named).name == named
    if not safe or not str(named).endswith((".safetensors", f".safetensors{INDEX}")):
        raise CheckpointError(
            f"{path / 'config.json'}: transformers_weights is {named!r}, expected the name of a "
            ".safetensors file, or of its index, in the directory",
            "mend or remove that key",
        )
    if not os.path.isfile(path / str(named)):
        raise CheckpointError(
            f"{path / str(named)}: not there, though config.json names it as transformers_weights",
            FETCH_AGAIN,
        )
    return str(named)


def _indexed(index: Path) -> list[Path]:
    """Return the files that an index lists, all in its own directory."""
    weight_map = read_json(index, CheckpointError, FETCH_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no 'weight_map'", FETCH_AGAIN)
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} is no plain file name", FETCH_AGAIN)
    return [index.parent / name for name in names]


def _none(path: Path) -> CheckpointError:
    if (found := other_kind(path)) is not None:
        return CheckpointError(*found)
    expected = " or ".join(SINGLE)
    problem = f"{path}: holds no weights, expected {expected} (or their index.json)"
    others = [
        f.name for suffix in ("safetensors", "bin", "pt", "pth") for f in path.glob(f"*.{suffix}")
    ]
    if others:
        problem += f"; found {', '.join(sorted(others)[:3])}"
    return CheckpointError(problem, FETCH_AGAIN)
