"""What is asked for: tasks by name, or a suite with its table."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.scratch import Scratch
from evaluation.settings import EvaluateConfig
from evaluation.suites.card import CARD, CODE_TASKS, PUBLISHED, PUBLISHED_SPARSITY, card_tasks
from evaluation.suites.tiny import write_tiny
from results.evaluation import SPARSITY, PublishedRow


@dataclass(frozen=True)
class SuiteColumn:
    """A column of a table.

    Attributes:
        title: of it.
        names: of the tasks and groups that it is the mean of.
    """

    title: str
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is asked for.

    Attributes:
        names: of tasks and groups, or paths of task files.
        shots: by name; None leaves them to the tasks.
        columns: of the suite's table; none without one.
        published: rows beside it.
        notes: what a reader must know, a line each.
    """

    names: tuple[str, ...]
    shots: Mapping[str, int] | None = None
    columns: tuple[SuiteColumn, ...] = ()
    published: tuple[PublishedRow, ...] = ()
    notes: tuple[str, ...] = ()


def open_suite(config: EvaluateConfig) -> Suite:
    """Return what settings ask for; files of the suite `tiny` are there as long as it is.

    Raises:
        DataError: its text cannot be used.
    """
    if config.suite == "card":
        return _card(allow_code=config.allow_code)
    if config.suite == "tiny":
        return _tiny(config)
    return Suite(names=config.tasks)


def _tiny(config: EvaluateConfig) -> Suite:
    scratch = Scratch(prefix="psp-tiny-")
    try:
        write_tiny(config.data, scratch.path, seed=config.seed)
    except BaseException:
        scratch.close()
        raise
    suite = Suite(names=(str(scratch.path),))
    weakref.finalize(suite, scratch.close)
    return suite


def _card(*, allow_code: bool) -> Suite:
    shots = card_tasks(allow_code=allow_code)
    notes = (
        f"{' and '.join(CODE_TASKS)} are left out: they run programs that the model writes, which "
        "--allow-code allows"
    )
    return Suite(
        names=tuple(shots),
        shots=shots,
        columns=tuple(
            SuiteColumn(each.title, tuple(task.name for task in each.tasks)) for each in CARD
        ),
        published=tuple(map(_with_sparsity, PUBLISHED)),
        notes=() if allow_code else (notes,),
    )


def _with_sparsity(row: PublishedRow) -> PublishedRow:
    known = PUBLISHED_SPARSITY.get(row.name)
    return row if known is None else replace(row, percent={SPARSITY: known, **row.percent})
