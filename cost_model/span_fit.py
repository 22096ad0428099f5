"""What spans of real runs say of a scheduler: its constants, and how long items take."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from cluster.spans import Span
from cost_model.scheduling import TERMS, Constants, makespan, simulate, without

ROUNDS = 7
"""Simulations with durations drawn anew, of whose times the median counts."""

POOR = 0.5
"""The share of workers' time, relative to one worker's, below which more of them are a waste."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What runs were like.

    Attributes:
        constants: what items waited for, means over all runs.
        durations: of each item's own work, as often as it was done.
    """

    constants: Constants
    durations: dict[int, tuple[float, ...]]

    def varies(self, items: Iterable[int]) -> bool:
        """Whether chance has a say in their durations."""
        return any(len(self.durations.get(item, ())) != 1 for item in items)

    def drawn(self, items: Iterable[int], chosen: random.Random) -> list[float]:
        """Return a duration for each item, one of its own or, if it was never done, anybody's."""
        everybody = [each for found in self.durations.values() for each in found]
        return [chosen.choice(self.durations.get(item) or everybody) for item in items]


def workers_of(run: Sequence[Span]) -> int:
    """Return how many workers did anything."""
    return len({(span.node, span.worker) for span in run})


def nodes_of(run: Sequence[Span]) -> int:
    """Return how many nodes they were on."""
    return len({span.node for span in run})


def fit(runs: Sequence[Sequence[Span]], known: Constants) -> Fitted:
    """Return what fits runs.

    Args:
        runs: at least one, each with a span.
        known: what spans do not tell: order, look-ahead, the first worker's start-up, and what an
            item takes of something shared, which is taken off its duration.
    """
    durations: dict[int, tuple[float, ...]] = {}
    for span in (span for run in runs for span in run):
        own = max(span.ended - span.begun - known.shared, 0.0)
        durations[span.item] = (*durations.get(span.item, ()), own)
    constants = replace(
        known,
        late=_mean(each for run in runs for each in _lateness(run)),
        dispatch=_mean(span.begun - span.sent for run in runs for span in run),
        returning=_mean(each for run in runs for each in _returns(run)),
        driver=_mean(end - begun for run in runs for begun, end in _commits(run)),
    )
    return Fitted(constants=constants, durations=durations)


def _lateness(run: Sequence[Span]) -> list[float]:
    """Return how long after the first worker's first item each other worker had its own."""
    first: dict[tuple[str, str], float] = {}
    for span in run:
        worker = span.node, span.worker
        first[worker] = min(first.get(worker, span.sent), span.sent)
    begun, *others = sorted(first.values())
    return [sent - begun for sent in others]


def _returns(run: Sequence[Span]) -> list[float]:
    """Return how long the driver was ignorant of what was made while it did nothing else."""
    busy = _commits(run)
    ends = [end for _, end in busy]
    found = []
    for span in run:
        after = bisect_right(ends, span.ended)
        if after == len(busy) or busy[after][0] >= span.received:
            found.append(max(span.received - span.ended, 0.0))
    return found


def _commits(run: Sequence[Span]) -> list[tuple[float, float]]:
    """Return when the driver was at each item, which it took up when it was free of others."""
    found, free = [], float("-inf")
    for span in sorted(run, key=lambda span: span.committed):
        found.append((max(span.received, free), span.committed))
        free = span.committed
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else 0.0


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A measured run beside what the others foretell of it.

    Attributes:
        nodes: that took part.
        workers: likewise, in all.
        seconds: that it took.
        simulated: seconds by constants and durations of the other runs.
        item_seconds: that an item took in it, mean.
        constants: of this run alone.
    """

    nodes: int
    workers: int
    seconds: float
    simulated: float
    item_seconds: float
    constants: Constants

    @property
    def error(self) -> float:
        """The simulation's relative error."""
        return self.simulated / self.seconds - 1


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A run that was not made.

    Attributes:
        workers: in all.
        seconds: that it would take.
        efficiency: one worker's seconds over those of all workers.
        gained: seconds that it would take less without each of `TERMS`.
    """

    workers: int
    seconds: float
    efficiency: float
    gained: dict[str, float]

    @property
    def cause(self) -> str:
        """The term without which it would gain most."""
        return max(self.gained, key=lambda term: self.gained[term])


def check(runs: Sequence[Sequence[Span]], known: Constants) -> list[Checked]:
    """Simulate each run by what the others tell; there are at least two."""
    found = []
    for number, run in enumerate(runs):
        others = fit([*runs[:number], *runs[number + 1 :]], known)
        workers, items = workers_of(run), sorted(span.item for span in run)
        found.append(
            Checked(
                nodes=nodes_of(run),
                workers=workers,
                seconds=makespan(run),
                simulated=_seconds(others, items, workers) - known.start_up,
                item_seconds=fmean(span.ended - span.begun for span in run),
                constants=fit([run], known).constants,
            )
        )
    return found


def scale(fitted: Fitted, items: Sequence[int], workers: Sequence[int]) -> list[Scaled]:
    """Simulate items on numbers of workers."""
    one = _seconds(fitted, items, 1)
    found = []
    for number in workers:
        seconds = _seconds(fitted, items, number)
        gained = {term: seconds - _seconds(fitted, items, number, term) for term in TERMS}
        found.append(
            Scaled(
                workers=number,
                seconds=seconds,
                efficiency=one / (number * seconds),
                gained=gained,
            )
        )
    return found


def stops(fitted: Fitted, items: Sequence[int], most: int) -> Scaled | None:
    """Return the fewest workers that are used poorly, None if so many are not.

    More workers are taken to be used no better than fewer.
    """
    one = _seconds(fitted, items, 1)

    def poor(workers: int) -> bool:
        return one < POOR * workers * _seconds(fitted, items, workers)

    fewest = bisect_left(range(1, most + 1), True, key=poor) + 1
    return scale(fitted, items, [fewest])[0] if fewest <= most else None


def _seconds(fitted: Fitted, items: Sequence[int], workers: int, term: str = "") -> float:
    """Return the median time of some runs, as if a term were not."""
    chosen = random.Random(0)
    times = []
    for _ in range(ROUNDS if fitted.varies(items) else 1):
        durations, constants = without(term, fitted.drawn(items, chosen), workers, fitted.constants)
        times.append(constants.start_up + makespan(simulate(durations, workers, constants)))
    return median(times)
