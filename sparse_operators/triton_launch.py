"""How the kernels are cut up: programs, rows at a time, columns, warps.

The default is chosen from the shape and the card alone, never from the data, so that nothing waits
for the device and a CUDA graph may hold the launch. `triton_tuning` measures better choices, which
a file of the card keeps for later processes; without it, or where a call asks for it, the same card
gives the same bits in every process, which automatic tuning could not promise.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from common.cache import cache_directory
from common.errors import EngineError
from common.files import write_json
from common.typed_json import Range, plain, read_document
from common.version import tool_version

Operator = Literal["up", "down", "up_down"]
Form = Literal["slots", "listed", "tiles"]
TypeName = Literal["float16", "bfloat16", "float32"]

Extent = Annotated[int, Range(1, 1 << 24)]

TENSOR_CORE_ROWS = 16
"""Least extent of a `tl.dot` operand: tokens are padded to it, and rows come in such groups."""

_SLOT_COLUMNS = 32
"""Columns of a program of S3 for one token: 64 bytes of float16, what an H100's L2 fetches at once.

As many as a word has bits, so that a slot's words and its columns lie in the same lanes.
"""

_LOAD_BYTES = 16
"""What a lane reads at a time, at most."""

_ROW_BYTES = 40 * 1024
"""Weights that a program of S2 for one token has on their way: 4 rows of 5120 float16."""

_LANE_BYTES = 256
"""Of these, a lane's share: 64 registers."""

_REMEDY = "the default launches run until psp bench-operators --tune measures again"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One way to cut up an operator.

    Attributes:
        programs: Programs that share out the rows.
        group: Rows read at a time by one program; by each slot if `form` is slots.
        columns: Columns at a time (`up` and `up_down` of one token take whole rows: 0).
        warps: Warps of a program.
        stages: Depth of the software pipeline over groups; 1 is none.
        form: Which kernel of `triton_down` runs S3 of one token; the rest have one form.
    """

    programs: int
    group: int
    columns: int
    warps: int
    stages: int = 1
    form: Form = "tiles"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a launch may depend on.

    Attributes:
        operator: S2, S3, or both fused.
        tokens: 1 to 8.
        d_model: Columns.
        d_ff: Rows.
        dtype: Type of every tensor.
        processors: Multiprocessors of the card.
    """

    operator: Operator
    tokens: Annotated[int, Range(1, 8)]
    d_model: Extent
    d_ff: Extent
    dtype: TypeName
    processors: Extent


@functools.cache
def default_launch(problem: Problem) -> Launch:
    """What was fastest, or as good as that, on an H100; other cards have `triton_tuning`.

    One token's kernels ask for tens of kilobytes on each multiprocessor at once: by Little's law an
    H100 (3.35 TB/s, about 0.7 µs latency) needs 18. S2 has half as many programs again as fit, so
    that those that find many active rows hold up nobody.
    """
    processors, rows = problem.processors, problem.d_ff
    if problem.tokens > 1:
        return _default_of_several(problem)
    if problem.operator == "down":
        # Two programs on a multiprocessor have half the registers each.
        two = -(-problem.d_model // _SLOT_COLUMNS) > processors
        group = 2 if two else 4
        return Launch(programs=1, group=group, columns=_SLOT_COLUMNS, warps=16, form="slots")
    if problem.operator == "up_down":
        # As many bytes of each weight, and four times the lanes.
        group, warps = whole_rows(problem, 2 * _ROW_BYTES, _LANE_BYTES // 2)
        return Launch(programs=min(processors, rows), group=group, columns=0, warps=warps)
    group, warps = whole_rows(problem, _ROW_BYTES, _LANE_BYTES)
    return Launch(programs=min(6 * processors, rows), group=group, columns=0, warps=warps)


def _default_of_several(problem: Problem) -> Launch:
    processors = problem.processors
    columns = max(TENSOR_CORE_ROWS, min(128, power_of_two(problem.d_model)))
    if problem.operator == "down":
        splits = max(1, 4 * processors // -(-problem.d_model // columns))
        programs = min(splits, -(-problem.d_ff // TENSOR_CORE_ROWS))
        return Launch(programs=programs, group=32, columns=columns, warps=4)
    programs = min(3 * processors, problem.d_ff)
    return Launch(programs=programs, group=TENSOR_CORE_ROWS, columns=columns, warps=4, stages=4)


def candidates(problem: Problem) -> Iterator[Launch]:
    """What tuning tries for one token: the default first, then its neighbours and other forms."""
    base = default_launch(problem)
    yield base
    others = _other_downs(problem) if problem.operator == "down" else _other_rows(problem, base)
    for launch in dict.fromkeys(others):
        if launch != base:
            yield launch


def _other_rows(problem: Problem, base: Launch) -> Iterator[Launch]:
    """Ways to take whole rows: other programs, rows and warps, or a group ahead."""
    fused = problem.operator == "up_down"
    row = _row_bytes(problem)
    scales = (1, 1.5, 2, 3) if fused else (0.5, 0.67, 1, 1.33, 2)
    powers = (1, 2, 4, 8, 16)
    for scale, group, warps, stages in itertools.product(scales, powers, powers, (1, 2)):
        programs = min(problem.d_ff, max(1, int(base.programs * scale)))
        near = base.group // 4 <= group <= 2 * base.group and base.warps // 4 <= warps
        # A group ahead takes registers of its own; the fused kernel always has one.
        usual = _LANE_BYTES if stages == 1 else _LANE_BYTES // 2
        share = group * row / (32 * warps * usual)
        some = share <= 1.25 and (share >= 0.5 or warps == 1)
        if near and some and not (fused and stages > 1):
            yield replace(base, programs=programs, group=group, warps=warps, stages=stages)


def _other_downs(problem: Problem) -> Iterator[Launch]:
    for warps, group in itertools.product((8, 16), (2, 3, 4, 6, 8)):
        yield Launch(programs=1, group=group, columns=_SLOT_COLUMNS, warps=warps, form="slots")
    for warps, group in itertools.product((8, 16), (512, 1024, 2048)):
        yield Launch(programs=1, group=group, columns=_SLOT_COLUMNS, warps=warps, form="listed")
    itemsize = _itemsize(problem.dtype)
    for columns, each, warps, lane in itertools.product(
        (128, 256, 512), (1, 2, 4), (4, 8), (128, 256)
    ):
        tiles = -(-problem.d_model // columns)
        # Programs for each multiprocessor; a power of two, so that sums are read at once.
        splits = min(_power_below(each * problem.processors // tiles), 32)
        group = warps * 32 * lane // (columns * itemsize)
        if columns <= power_of_two(problem.d_model) and 16 * splits <= problem.d_ff:
            yield Launch(programs=splits, group=group, columns=columns, warps=warps)


def whole_rows(problem: Problem, budget: int, lane: int) -> tuple[int, int]:
    """Group and warps for programs that read whole rows into registers.

    Args:
        problem: Gives the length and type of a row.
        budget: Bytes of weights that a program may have in registers at a time.
        lane: Bytes of them that a lane is to have.

    Returns:
        Rows of a group, 1 to 16, and warps, 1 to 16, both powers of two.
    """
    row = _row_bytes(problem)
    group = min(16, _power_below(budget // row))
    return group, min(16, _power_below(group * row // (32 * lane)))


def row_pieces(d_model: int) -> tuple[int, int]:
    """Columns of a piece of a row, a power of two, and how many pieces waste the fewest lanes."""
    longest = min(2048, power_of_two(d_model))
    sizes = [longest >> n for n in range(longest.bit_length()) if d_model <= 16 * (longest >> n)]
    piece = min(sizes or [longest], key=lambda size: -(-d_model // size) * size)
    return piece, -(-d_model // piece)


def row_lanes(launch: Launch, dtype: torch.dtype) -> int:
    """Rows that a program of S3 for one token reads with one load of each lane, at least 1."""
    return max(1, launch.warps * 32 * _LOAD_BYTES // (launch.columns * dtype.itemsize))


def _row_bytes(problem: Problem) -> int:
    """Weights of an active neuron in registers; the fused kernel has two rows, padded."""
    fused = problem.operator == "up_down"
    columns = 2 * power_of_two(problem.d_model) if fused else problem.d_model
    return columns * _itemsize(problem.dtype)


def _itemsize(name: TypeName) -> int:
    dtype: torch.dtype = getattr(torch, name)
    return dtype.itemsize


def rows_each(d_ff: int, programs: int, interleave: int = 1) -> int:
    """Rows that one program looks at: a power of two, runs of `interleave` included."""
    runs = -(-d_ff // interleave)
    return power_of_two(-(-runs // programs) * interleave)


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n`; Triton's blocks have such extents only."""
    return 1 << max(0, n - 1).bit_length()


def _power_below(n: int) -> int:
    """The greatest power of two that is at most `n`, at least 1."""
    return 1 << max(0, n.bit_length() - 1)


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of the card; a few where the interpreter plays it."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The fastest way that was measured to cut up an operator."""

    problem: Problem
    launch: Launch


@dataclass(frozen=True, kw_only=True)
class LaunchFile:
    """A card's measured choices on disk; they hold for the versions that measured them."""

    kind: str
    schema_version: int
    psp: str
    triton: str
    card: str
    choices: tuple[Choice, ...]


_tuned: dict[torch.device, dict[Problem, Launch]] = {}
"""Measured choices: what the card's file held at first, and what was kept since."""


def launch_for(problem: Problem, device: torch.device, *, deterministic: bool = False) -> Launch:
    """The measured choice if there is one, else the default.

    Args:
        problem: Operator, shape and type.
        device: The card.
        deterministic: Always the default, so that tuning cannot change the order of sums.
    """
    found = None if deterministic else tuned_launches(device).get(problem)
    return found or default_launch(problem)


def tuned_launches(device: torch.device) -> dict[Problem, Launch]:
    """The measured choices for a card, read from its file when they are first asked for."""
    if device not in _tuned:
        _tuned[device] = read_launches(launch_file(device), device)
    return _tuned[device]


def keep_launches(chosen: Mapping[Problem, Launch | None], device: torch.device) -> Path:
    """Use measured choices from now on, here and in later processes.

    Args:
        chosen: What was measured; None forgets an earlier choice.
        device: The card.

    Returns:
        The card's file.

    Raises:
        OutputError: It cannot be written.
    """
    kept = {**tuned_launches(device), **chosen}
    launches = {problem: launch for problem, launch in kept.items() if launch is not None}
    _tuned[device] = launches
    path = launch_file(device)
    choices = [Choice(problem=problem, launch=launch) for problem, launch in launches.items()]
    write_json(path, plain(_document(device, tuple(choices))))
    return path


def read_launches(path: Path, device: torch.device) -> dict[Problem, Launch]:
    """The choices in a file; none, and one line of warning, if it is not as this card's must be."""
    if not os.path.isfile(path):  # nor is there one where the system does not let us look
        return {}
    try:
        found = read_document(path, LaunchFile, error=EngineError, remedy=_REMEDY)
        _check(path, found, device)
    except EngineError as error:
        logging.getLogger(__name__).warning("warning: %s", error)
        return {}
    return {choice.problem: choice.launch for choice in found.choices}


def _check(path: Path, found: LaunchFile, device: torch.device) -> None:
    """Take nothing of another card or version, and only what tuning may have chosen."""
    for name, expected in plain(_document(device)).items():
        if name != "choices" and getattr(found, name) != expected:
            said = f"'{name}' is {getattr(found, name)!r:.80}, expected {expected!r}"
            raise EngineError(f"{path}: {said}", _REMEDY)
    for number, choice in enumerate(found.choices):
        tried = choice.problem.tokens == 1 and choice.problem.processors == processors_of(device)
        if not tried or choice.launch not in candidates(choice.problem):
            raise EngineError(
                f"{path}: 'choices[{number}]' is no launch that tuning tries", _REMEDY
            )


def launch_file(device: torch.device) -> Path:
    """Where a card's choices are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", _card(device).lower()).strip("-")
    return cache_directory() / "launches" / f"{name}.json"


def _card(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return f"{name}, {processors_of(device)} multiprocessors"


def _document(device: torch.device, choices: tuple[Choice, ...] = ()) -> LaunchFile:
    import triton

    return LaunchFile(
        kind="psp.launches",
        schema_version=1,
        psp=tool_version(),
        triton=triton.__version__,
        card=_card(device),
        choices=choices,
    )
