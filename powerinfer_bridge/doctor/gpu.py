"""Graphics cards of the machine, as its driver knows them, whatever torch was built for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import EngineError
from powerinfer_bridge.doctor.finding import Finding, ok, problem, size, warning
from powerinfer_bridge.programs.process import run_program

_SECONDS = 20.0
_MOSTLY_FREE = 0.9
_QUERY = "name,memory.total,memory.free,driver_version,compute_cap"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA card.

    Attributes:
        name: its model.
        memory: bytes in all; 0 if the driver does not tell.
        free: of them unused at the moment.
        driver: version of the driver.
        capability: compute capability such as `9.0`; empty if the driver does not tell.
    """

    name: str
    memory: int
    free: int
    driver: str
    capability: str


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """The machine's cards.

    Attributes:
        gpus: what is known of each.
        failure: why the driver's tool did not answer; None if it did, or there is none.
    """

    gpus: tuple[Gpu, ...]
    failure: str | None = None


def read_gpus(root: Path = Path("/"), program: str | None = None) -> GpuFacts:
    """Ask the driver's tool, else the driver's own files; no cards without a driver.

    Args:
        root: where the system's files are.
        program: the tool; looked for if not given.
    """
    program = program or shutil.which("nvidia-smi")
    if program is None:
        return GpuFacts(gpus=_from_files(root))
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        run = run_program(command, timeout=_SECONDS)
    except EngineError as error:
        return GpuFacts(gpus=_from_files(root), failure=error.problem)
    if run.code:
        said = " ".join((run.stdout or run.stderr).split()) or f"ended with code {run.code}"
        return GpuFacts(gpus=_from_files(root), failure=f"{program}: {said}")
    return GpuFacts(gpus=parse_query(run.stdout))


def parse_query(output: str) -> tuple[Gpu, ...]:
    """Return the cards that a query of `nvidia-smi` lists, one a line, memory in MiB."""
    rows = [[cell.strip() for cell in line.rsplit(",", 4)] for line in output.splitlines()]
    return tuple(
        Gpu(
            name=row[0],
            memory=_mebibytes(row[1]),
            free=_mebibytes(row[2]),
            driver=row[3],
            capability=row[4] if row[4][:1].isdigit() else "",
        )
        for row in rows
        if len(row) == 5
    )


def _mebibytes(cell: str) -> int:
    return int(cell) << 20 if cell.isascii() and cell.isdigit() else 0


def _from_files(root: Path) -> tuple[Gpu, ...]:
    """Return the cards in /proc/driver/nvidia, whose memory is not told there."""
    driver = root / "proc/driver/nvidia"
    found = []
    for path in sorted(driver.glob("gpus/*/information")):
        lines = {}
        with suppress(OSError):  # a card that fell off the bus; it is one all the same
            lines = dict(line.partition(":")[::2] for line in path.read_text().splitlines())
        name = lines.get("Model", "NVIDIA GPU").strip()
        found.append(Gpu(name=name, memory=0, free=0, driver="", capability=""))
    return tuple(found)


def gpu_findings(facts: GpuFacts) -> Iterator[Finding]:
    """Judge whether the driver answers, and how much of each card's memory is free."""
    if facts.failure is not None:
        remedy = "mend or reinstall the NVIDIA driver, or restart the machine after an update"
        yield problem("GPU", facts.failure, remedy)
    elif not facts.gpus:
        yield ok("GPU", "no NVIDIA card with a driver")
    for gpu in facts.gpus:
        yield _gpu(gpu)


def _gpu(gpu: Gpu) -> Finding:
    driver = f", driver {gpu.driver}" if gpu.driver else ""
    driver += f", compute capability {gpu.capability}" if gpu.capability else ""
    if not gpu.memory:
        return ok("GPU", f"{gpu.name}{driver}")
    found = f"{gpu.name}, {size(gpu.free)} of {size(gpu.memory)} free{driver}"
    if gpu.free < _MOSTLY_FREE * gpu.memory:
        return warning("GPU", found, "end the programs that hold the rest (see nvidia-smi)")
    return ok("GPU", found)
