"""One display for a whole run: what is going on, how far it is, and when it will end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

from common.units import duration

Note = Callable[[str], None]
_TICK = 1.0
_ALMOST = 0.98
"""Of a step that takes longer than expected: it is not done before it is."""

_PACE = (0.1, 10.0)
"""Limits of how many times as long as expected the rest is taken to be."""


class Progress:
    """Tells of the steps of a run, in expected seconds; the steps' own bars stand above it.

    Where standard error is no terminal there is no bar, but a line when a step begins and ends.
    """

    def __init__(self, expected: Mapping[str, float], note: Note) -> None:
        """Begin.

        Args:
            expected: seconds of each step that is left, in order.
            note: takes lines where there is no bar.
        """
        self._expected, self._note = dict(expected), note
        self._done = self._taken = self._passed = 0.0
        self._number = 0
        self._bar = tqdm(
            total=sum(expected.values()),
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}",
            disable=None if self._expected else True,
        )

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Tell of a step while it is at work; it counts as expected, however long it took."""
        self._number += 1
        expected, begun, ended = self._expected[name], time.monotonic(), threading.Event()
        self._bar.set_description_str(f"{self._number}/{len(self._expected)} {name}")
        if self._bar.disable:
            self._note(f"{self._number}/{len(self._expected)} {name}, about {duration(expected)}")
        ticker = threading.Thread(target=self._tick, args=(expected, begun, ended), daemon=True)
        ticker.start()
        try:
            yield
        finally:
            ended.set()
            ticker.join()
        taken = time.monotonic() - begun
        self._done, self._taken = self._done + expected, self._taken + taken
        self._show(self._done, self.left(0.0, 0.0))
        if self._bar.disable:
            self._note(f"{name} took {duration(taken)}, {duration(self.left(0.0, 0.0))} left")

    def passed(self, name: str) -> None:
        """Leave out a step that was expected and turned out to be done."""
        if name in self._expected:
            self._number += 1
            self._done += self._expected[name]
            self._passed += self._expected[name]

    def left(self, expected: float, taken: float) -> float:
        """Return the seconds to the end, at the pace of the steps so far.

        Args:
            expected: seconds of the step at work.
            taken: that it has been at work.
        """
        slow, fast = _PACE
        worked = self._done - self._passed
        pace = min(max(self._taken / worked, slow), fast) if worked else 1.0
        rest = sum(self._expected.values()) - self._done - expected
        return pace * rest + max(pace * expected - taken, 0.0)

    def _tick(self, expected: float, begun: float, ended: threading.Event) -> None:
        while not ended.wait(_TICK):
            taken = time.monotonic() - begun
            at = self._done + min(taken, _ALMOST * expected)
            self._show(at, self.left(expected, taken))

    def _show(self, at: float, left: float) -> None:
        if not self._bar.disable:
            self._bar.n = at
            self._bar.set_postfix_str(f"about {duration(left)} left", refresh=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
