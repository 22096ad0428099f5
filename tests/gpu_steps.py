"""Steps that a new process can import."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu.kit import Absent, Figure, Kit, Step
from common.errors import DataError


def good(kit: Kit) -> Iterator[Figure]:
    yield Figure(name="speed", value=3.0, unit="×", least=2.0, details={"device": kit.device})
    yield Figure(name="error", value=3, most=2.0)


def absent(kit: Kit) -> Iterator[Figure]:
    yield Figure(name="before", value=1.0)
    raise Absent("no PowerInfer: pass --powerinfer-bin")


def refused(kit: Kit) -> Iterator[Figure]:
    raise DataError("text.jsonl: is empty", "pass another")
    yield


def broken(kit: Kit) -> Iterator[Figure]:
    yield Figure(name="never", value=float(kit.dry) / 0)


def unheard(kit: Kit) -> Iterator[Figure]:
    yield Figure(name="whole", value=1.0)
    yield Figure(name="perplexity", value=float("nan"))


def infinite(kit: Kit) -> Iterator[Figure]:
    yield Figure(name="tuned", value=1.0, details={"tried": [1.0, float("inf")]})


def dead(kit: Kit) -> Iterator[Figure]:
    os._exit(7)
    yield


def endless(kit: Kit) -> Iterator[Figure]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Figure(name="child", value=child.pid)
    time.sleep(600)


GOOD, ABSENT, REFUSED, BROKEN, DEAD, ENDLESS, UNHEARD, INFINITE = (
    Step(name=run.__name__, seconds=1, run=run)
    for run in (good, absent, refused, broken, dead, endless, unheard, infinite)
)
