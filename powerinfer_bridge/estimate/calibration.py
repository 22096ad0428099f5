"""A CPU's figures fitted to PowerInfer's measured speed: bench.json and density.json as runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from common.errors import EngineError
from common.files import read_json
from cost_model.calibration import Prediction, Run, calibrate, predictions
from cost_model.hardware import Hardware
from cost_model.measure import UNCALIBRATED
from cost_model.model_bytes import Activity, ModelBytes
from powerinfer_bridge.estimate.file import EstimatedFile
from results.bench import ALL_NEURONS, BENCH, DENSE_POWERINFER, POWERINFER, PREDICTED, Arm, Bench
from results.density import DENSITY, Density
from results.estimate import CalibrationFacts

_ARMS = (ALL_NEURONS, PREDICTED, DENSE_POWERINFER)
_REMEDY = "pass results of psp bench-powerinfer or benchmarks/density.py, measured on this CPU"


def calibrate_hardware(
    hardware: Hardware, sources: Sequence[Path], file: EstimatedFile
) -> tuple[Hardware, CalibrationFacts]:
    """Fit the CPU to measured runs.

    Args:
        hardware: before the fit.
        sources: bench.json or density.json, or directories that hold them.
        file: the file to estimate; it also stands for measured files of its shape that are gone.

    Returns:
        The hardware with its fitted CPU, and each run's seconds, the prediction of a fit that has
        not seen its group and the relative error, and the largest errors of seconds and of the
        ratio of predicted to all neurons.

    Raises:
        PspError: no usable runs, damaged results, or different numbers of threads.
    """
    found = [each for source in sources for each in _read(source, file)]
    kept = [(count, run) for count, run in found if run is not None]
    threads, runs = {count for count, _ in kept}, [run for _, run in kept]
    passed_over = len(found) - len(kept)
    if len(threads | {hardware.threads} - {None}) > 1:
        counts = ", ".join(map(str, sorted(threads)))
        raise EngineError(
            f"--calibrate: runs with {counts} threads, hardware {hardware.name} with "
            f"{hardware.threads or 'any number'}",
            "one calibration is for one --threads",
        )
    if not runs:
        problem = f"no run of PowerInfer on the CPU alone, {passed_over} with a GPU"
        raise EngineError(f"--calibrate: {problem}", _REMEDY)
    hardware = replace(hardware, threads=threads.pop())
    fitted = replace(
        calibrate(hardware, runs),
        notes=(
            *(note for note in hardware.notes if note != UNCALIBRATED),
            f"CPU fitted to {len(runs)} runs of PowerInfer",
        ),
    )
    return fitted, _facts(runs, predictions(hardware, runs), passed_over)


def _facts(runs: Sequence[Run], found: Sequence[Prediction], passed_over: int) -> CalibrationFacts:
    errors = {each.run: each.relative_error for each in found}
    pairs = [
        (f"{group}: {ALL_NEURONS}", f"{group}: {PREDICTED}")
        for group in dict.fromkeys(run.group for run in runs)
    ]
    ratios = [
        (1 + errors[everything]) / (1 + errors[predicted]) - 1
        for everything, predicted in pairs
        if {everything, predicted} <= errors.keys()
    ]
    return CalibrationFacts(
        runs=tuple(found),
        largest_error=max(map(abs, errors.values())),
        largest_ratio_error=max(map(abs, ratios)) if ratios else None,
        left_out=all(each.left_out for each in found),
        passed_over=passed_over,
    )


def _read(source: Path, file: EstimatedFile) -> Iterator[tuple[int, Run | None]]:
    """Yield threads and runs on the CPU alone, None for those that had a GPU."""
    names = (BENCH.name, DENSITY.name)
    files = [source / name for name in names if (source / name).is_file()]
    if source.is_dir() and not files:
        raise EngineError(f"{source}: holds neither {' nor '.join(names)}", _REMEDY)
    for path in files or [source]:
        kind = read_json(path, EngineError, _REMEDY).get("kind")
        if kind == Density.kind:
            yield from _density_runs(path, DENSITY.read(path, _REMEDY), file)
        elif kind == Bench.kind:
            yield from _bench_runs(path, BENCH.read(path, _REMEDY), file)
        else:
            raise EngineError(f"{path}: kind is {kind!r:.40}", _REMEDY)


def _bench_runs(path: Path, bench: Bench, file: EstimatedFile) -> Iterator[tuple[int, Run | None]]:
    if bench.engine != POWERINFER:
        raise EngineError(f"{path}: engine is {bench.engine!r:.40}", _REMEDY)
    measured = _measured_file(path, bench, file)
    model, activities = measured.bytes, measured.measured_activity(bench, str(path))
    for arm in bench.arms:
        on_gpu = arm.device.get("cuda") or arm.n_gpu_layers or arm.vram_budget_bytes
        if arm.name in _ARMS and on_gpu:
            yield arm.threads, None
        elif arm.name in _ARMS:
            seconds, position = 1 / arm.decode.tokens_per_second, _position(bench, arm)
            yield arm.threads, _run(arm.name, str(path), seconds, model, activities, position)


def _measured_file(path: Path, bench: Bench, file: EstimatedFile) -> EstimatedFile:
    """Return the file that was measured, or the one to estimate if that has its shape."""
    measured = Path(bench.file)
    for candidate in (measured, path.parent / measured):
        if candidate.is_file() and candidate.suffix == ".gguf":
            return EstimatedFile(candidate)
    devices = bench.placement.devices if bench.placement else ()
    placed = sum(device.bytes.get("ffn_neurons", 0) for device in devices)
    if placed != sum(layer.ffn for layer in file.bytes.layers):
        raise EngineError(
            f"{path}: its file {bench.file!r:.200} is gone and has not the shape of {file.path}",
            "run where the file is, or estimate a file of its shape",
        )
    return file


def _position(bench: Bench, arm: Arm) -> float:
    """Return the mean number of tokens in the cache while an arm decoded."""
    rows = [row for row in bench.samples if row.arm == arm.name]
    return fmean((row.prompt_tokens or 0) + row.decode_tokens / 2 for row in rows) if rows else 0.0


def _density_runs(path: Path, sweep: Density, file: EstimatedFile) -> Iterator[tuple[int, Run]]:
    """Yield threads and runs of a sweep over densities.

    Of the sweep's models half of the neurons are active at most: those beyond are always predicted
    and have an ordinary random gate (benchmarks/exact_density.py).
    """
    for key in ("d_model", "d_ff", "n_layers"):
        found, mine = getattr(sweep.shape, key), getattr(file.hyper, key)
        if found != mine:
            raise EngineError(
                f"{path}: {key} is {found}, {file.path} has {mine}", "estimate a file of its shape"
            )
    generated = sweep.settings.get("generate")
    position = max(0, generated) / 2 if isinstance(generated, int) else 0.0
    for point in sweep.points:
        density, both = min(1.0, point.density), min(0.5, point.density)
        activity = Activity(predicted=density, both=both, active=both)
        activities = [activity] * file.hyper.n_layers
        speeds = {
            ALL_NEURONS: point.all_neurons,
            PREDICTED: point.predicted,
            DENSE_POWERINFER: point.dense,
        }
        for arm, speed in speeds.items():
            if speed is not None:
                seconds, group = 1 / speed.tokens_per_second, f"{path} at {point.density:g}"
                run = _run(arm, group, seconds, file.bytes, activities, position)
                yield sweep.threads, run


def _run(
    name: str,
    group: str,
    seconds: float,
    model: ModelBytes,
    activities: Sequence[Activity],
    position: float,
) -> Run:
    """Return what a measured arm read."""
    matrix = model.head + sum(each.attention + model.kv(position) for each in model.layers)
    rows = columns = 0.0
    if name == DENSE_POWERINFER:
        matrix += sum(layer.ffn for layer in model.layers)
    else:
        for layer, activity in zip(model.layers, activities, strict=True):
            computed = activity.all_neurons if name == ALL_NEURONS else activity
            matrix += layer.predictor
            rows += layer.d_ff * layer.neuron_rows * computed.predicted
            columns += layer.d_ff * layer.neuron_column * computed.both
    return Run(
        name=f"{group}: {name}",
        group=group,
        seconds=seconds,
        matrix=matrix,
        rows=rows,
        columns=columns,
        layers=len(model.layers),
    )
