"""Small whole runs, and what of a directory must be the same however a run went."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from common.provenance import PROVENANCE
from common.sealed import SEAL
from gguf_export.manifest import MANIFEST
from pipeline.plan import prepare
from pipeline.probe import Rates
from pipeline.run import Outcome, execute
from pipeline.settings import RunConfig
from pipeline.state import RunState

SMALL: dict[str, Any] = {
    "name": "tiny",
    "tokens": 1200,
    "context": 64,
    "rank": 32,
    "chunks": 2,
    "generate": 4,
    "repeats": 1,
    "threads": 1,
}
DETERMINED = ("held-out.jsonl", "traces", "predictors", "export", "verify.json")
"""What does not hold times or speeds."""


RATES = Rates(
    load_layer=0.01,
    token_layer=1e-5,
    row_bytes=300.0,
    sparsity=0.5,
    layer_fixed=0.1,
    layer_row=1e-5,
    jobs=1,
    write=1e8,
    read=1e10,
)
"""Of a probe, so that none is needed."""


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let runs put their figures together but not lay them out and draw them, most of their time.

    For runs whose pictures nobody looks at: those of `test_run`'s unbroken one are drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    def write(figure: Figure, place: Path | io.StringIO, **options: object) -> None:
        if isinstance(place, io.StringIO):
            place.write('<svg viewBox="0 0 1 1"></svg>')
        else:
            place.write_text("not drawn")

    patch.setattr(Figure, "savefig", write)
    patch.setattr(ConstrainedLayoutEngine, "execute", lambda engine, figure: None)


class Killed(BaseException):
    """What nothing catches, as a kill."""


def settings(model: Path, data: Path, out: Path, **changes: Any) -> RunConfig:
    return RunConfig(model=str(model), data=str(data), out=out, **(SMALL | changes))


def run(config: RunConfig, said: list[str] | None = None) -> Outcome:
    lines: list[str] = [] if said is None else said
    return execute(prepare(config, lines.append), lines.append)


_SEALED = re.compile(rf',\n "{SEAL}": "[0-9a-f]+"'.encode())
"""The checksum of a document, which changes with a name in it."""


def contents(out: Path) -> dict[str, bytes]:
    """Return what is determined in a run's directory, by relative path; its own name is blank."""
    found = {}
    for name in DETERMINED:
        place = out / name
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for path in files:
            if path.is_file() and not path.name.endswith((PROVENANCE, MANIFEST)):
                data, own = path.read_bytes(), str(out).encode()
                if own in data:
                    data = _SEALED.sub(b"", data.replace(own, b""))
                found[str(path.relative_to(out))] = data
    return found


def times(out: Path) -> dict[str, int]:
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.is_file()
    }


def run_until(writes: int, config: RunConfig) -> None:
    """Run until the state has been written more than so often, then end as by a kill."""
    left, write = [writes], RunState.write

    def killing(state: RunState) -> None:
        write(state)
        if not left[0]:
            raise Killed
        left[0] -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "write", killing)
        run(config)
