"""A CPU's figures fitted to PowerInfer's measured speed: bench.json and density.json as runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import EngineError
from common.files import read_json
from cost_model.calibration import Prediction, Run, calibrate, predictions
from cost_model.hardware import Hardware
from cost_model.measure import UNCALIBRATED
from cost_model.model_bytes import Activity, ModelBytes
from powerinfer_bridge.estimate.activity import BENCH_FILE, layer_activity, number_at
from powerinfer_bridge.estimate.file import EstimatedFile

DENSITY_FILE = "density.json"
_ARMS = ("all_neurons", "predicted", "dense_powerinfer")
_DENSITY_ARMS = {
    "all_neurons": "all_neurons",
    "predicted": "predicted",
    "dense": "dense_powerinfer",
}
_REMEDY = "pass results of psp bench-powerinfer or benchmarks/density.py, measured on this CPU"


def calibrate_hardware(
    hardware: Hardware, sources: Sequence[Path], file: EstimatedFile
) -> tuple[Hardware, dict[str, Any]]:
    """Fit the CPU to measured runs.

    Args:
        hardware: before the fit.
        sources: bench.json or density.json, or directories that hold them.
        file: the file to estimate; it also stands for measured files of its shape that are gone.

    Returns:
        The hardware with its fitted CPU, and a document: each run's seconds, the prediction of a
        fit that has not seen its group and the relative error, and the largest errors of seconds
        and of the ratio of predicted to all neurons.

    Raises:
        PspError: no usable runs, damaged results, or different numbers of threads.
    """
    found = [entry for source in sources for entry in _read(source, file)]
    threads = {count for count, _ in found if count is not None}
    if len(threads | {hardware.threads} - {None}) > 1:
        counts = ", ".join(map(str, sorted(threads)))
        raise EngineError(
            f"--calibrate: runs with {counts} threads, hardware {hardware.name} with "
            f"{hardware.threads or 'any number'}",
            "one calibration is for one --threads",
        )
    runs = [run for _, run in found]
    if not runs:
        raise EngineError("--calibrate: no run of PowerInfer on the CPU alone", _REMEDY)
    fitted = replace(
        hardware,
        cpu=calibrate(hardware.cpu, runs),
        threads=threads.pop() if threads else hardware.threads,
        notes=(
            *(note for note in hardware.notes if note != UNCALIBRATED),
            f"CPU fitted to {len(runs)} runs of PowerInfer",
        ),
    )
    return fitted, _document(predictions(hardware.cpu, runs))


def _document(found: Sequence[Prediction]) -> dict[str, Any]:
    rows = [
        {
            "run": each.run.name,
            "seconds": each.run.seconds,
            "estimated_seconds": each.seconds,
            "relative_error": each.error,
            "left_out": each.left_out,
        }
        for each in found
    ]
    errors = {each.run.name: each.error for each in found}
    ratios = [
        (1 + errors[f"{group}: all_neurons"]) / (1 + errors[f"{group}: predicted"]) - 1
        for group in dict.fromkeys(each.run.group for each in found)
        if {f"{group}: all_neurons", f"{group}: predicted"} <= errors.keys()
    ]
    return {
        "runs": rows,
        "largest_error": max(map(abs, errors.values())),
        "largest_ratio_error": max(map(abs, ratios)) if ratios else None,
        "left_out": all(each.left_out for each in found),
    }


def _read(source: Path, file: EstimatedFile) -> Iterator[tuple[int | None, Run]]:
    names = (BENCH_FILE, DENSITY_FILE)
    files = [source / name for name in names if (source / name).is_file()]
    if source.is_dir() and not files:
        raise EngineError(f"{source}: holds neither {' nor '.join(names)}", _REMEDY)
    for path in files or [source]:
        document = read_json(path, EngineError, _REMEDY)
        if document.get("kind") == "psp.density":
            yield from _density_runs(path, document, file)
        elif document.get("kind") == "psp.bench":
            yield from _bench_runs(path, document, file)
        else:
            raise EngineError(f"{path}: kind is {document.get('kind')!r:.40}", _REMEDY)


def _bench_runs(
    path: Path, document: Mapping[str, Any], file: EstimatedFile
) -> Iterator[tuple[int | None, Run]]:
    if document.get("engine") != "PowerInfer":
        raise EngineError(f"{path}: engine is {document.get('engine')!r:.40}", _REMEDY)
    model = _measured_file(path, document, file).bytes
    activities = layer_activity(path, document, len(model.layers))
    arms = document.get("arms")
    for arm in arms if isinstance(arms, list) else []:
        name = arm.get("name") if isinstance(arm, dict) else None
        speed = number_at(arm, "decode", "tokens_per_second")
        if name not in _ARMS or speed is None or _on_gpu(arm):
            continue
        threads = number_at(arm, "threads")
        run = _run(name, str(path), 1 / speed, model, activities, _position(document, name))
        yield (int(threads) if threads else None), run


def _on_gpu(arm: Mapping[str, Any]) -> bool:
    device = arm.get("device")
    cuda = isinstance(device, dict) and bool(device.get("cuda"))
    return cuda or bool(arm.get("n_gpu_layers")) or bool(arm.get("vram_budget_bytes"))


def _measured_file(path: Path, document: Mapping[str, Any], file: EstimatedFile) -> EstimatedFile:
    """Return the file that was measured, or the one to estimate if that has its shape."""
    name = document.get("file")
    measured = Path(name) if isinstance(name, str) else path
    for candidate in (measured, path.parent / measured):
        if candidate.is_file() and candidate.suffix == ".gguf":
            return EstimatedFile(candidate)
    if _placed_bytes(document, "ffn_neurons") != sum(layer.ffn for layer in file.bytes.layers):
        raise EngineError(
            f"{path}: its file {name!r:.200} is gone and has not the shape of {file.path}",
            "run where the file is, or estimate a file of its shape",
        )
    return file


def _placed_bytes(document: Mapping[str, Any], part: str) -> int:
    """Return the bytes of a part, summed over the devices of a bench.json's placement."""
    placement = document.get("placement")
    devices = placement.get("devices") if isinstance(placement, dict) else None
    found = (number_at(each, "bytes", part) for each in devices or [])
    return int(sum(size for size in found if size))


def _position(document: Mapping[str, Any], arm: str) -> float:
    """Return the mean number of tokens in the cache while an arm decoded."""
    samples = document.get("samples")
    found = [
        (number_at(each, "prompt_tokens") or 0.0) + (number_at(each, "decode_tokens") or 0.0) / 2
        for each in (samples if isinstance(samples, list) else [])
        if isinstance(each, dict) and each.get("arm") == arm
    ]
    return sum(found) / len(found) if found else 0.0


def _density_runs(
    path: Path, document: Mapping[str, Any], file: EstimatedFile
) -> Iterator[tuple[int | None, Run]]:
    """Yield the runs of a sweep over densities.

    Of the sweep's models half of the neurons are active at most: those beyond are always predicted
    and have an ordinary random gate (benchmarks/exact_density.py).
    """
    hyper = file.hyper
    for key, mine in (
        ("d_model", hyper.d_model),
        ("d_ff", hyper.d_ff),
        ("n_layers", hyper.n_layers),
    ):
        found = number_at(document, "shape", key)
        if found != mine:
            raise EngineError(
                f"{path}: {key} is {found}, {file.path} has {mine}", "estimate a file of its shape"
            )
    points, generated = document.get("points"), number_at(document, "settings", "generate")
    for point in points if isinstance(points, list) else []:
        density = number_at(point, "density")
        if density is None or density > 1:
            raise EngineError(f"{path}: a point has no density from 0 to 1", _REMEDY)
        both = min(density, number_at(point, "active") or min(density, 0.5))
        activities = [Activity(predicted=density, both=both, active=both)] * hyper.n_layers
        for arm, name in _DENSITY_ARMS.items():
            speed = number_at(point, arm, "tokens_per_second")
            if speed is not None:
                threads = number_at(document, "threads")
                group = f"{path} at {density:g}"
                run = _run(name, group, 1 / speed, file.bytes, activities, (generated or 0.0) / 2)
                yield (int(threads) if threads else None), run


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
    if name == "dense_powerinfer":
        matrix += sum(layer.ffn for layer in model.layers)
    else:
        for layer, activity in zip(model.layers, activities, strict=True):
            computed = activity.all_neurons if name == "all_neurons" else activity
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
