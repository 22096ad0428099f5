"""Windows on the nodes of a cluster, where workers run the model that a gap is measured with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch
from tqdm import tqdm

from architectures.memory import model_memory
from cluster.nodes import Worker, first_that_fits
from cluster.pool import Pool
from cluster.watch import Watch
from cluster.worker import Tell, Work
from common.errors import TRAIN_AGAIN, PredictorError
from common.files import put_in_place
from predictor.artifact import PredictorArtifact
from predictor.tensor_files import StoredTensors, load_tensors, save_tensors
from predictor.thresholds.choose import Measure, folded
from predictor.thresholds.predicted_model import (
    MaskedModel,
    Quality,
    measured_dtype,
    quality_of,
)
from predictor.thresholds.price import Priced
from predictor.training.held_out import HeldOut


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a worker knows.

    Attributes:
        artifact: the predictors.
        held: model and text.
        device: where to compute.
        weights: see `load_model`.
        parts: directory for the workers' files.
    """

    artifact: Path
    held: HeldOut
    device: str
    weights: str
    parts: Path

    def dense(self, window: int) -> Path:
        """Return the file of a window's log-probabilities without predictors."""
        return self.parts / f"dense-{window:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A window to run.

    Attributes:
        number: of the window.
        thresholds: of all layers with a predictor, by their numbers.
        sign: of all thresholds.
    """

    number: int
    thresholds: StoredTensors
    sign: int


@contextmanager
def measuring_on_nodes(
    artifact: PredictorArtifact,
    held: HeldOut,
    *,
    asked: Worker,
    device: str,
    parts: Path,
    note: Callable[[str], None],
    verbose: bool,
) -> Iterator[Measure]:
    """Hire workers that hold the model.

    Args:
        artifact: complete.
        held: model and text.
        asked: what a worker is to take of a node, but for its memory.
        device: where workers compute.
        parts: directory on a disk that all nodes see.
        note: takes lines for the user.
        verbose: tell of every window.

    Raises:
        ClusterError: no node has room.
    """
    worker, weights = _worker(held, artifact, asked, device)
    run = _Run(
        artifact=artifact.path.absolute(),
        held=held,
        device=device,
        weights=weights,
        parts=parts,
    )
    with tqdm(unit="window", desc="perplexity gap", disable=None) as bar:
        watch = Watch(bar, note, what="windows", named=_named, verbose=verbose, each=False)
        pool: Pool[_Window, list[float]]
        with Pool(partial(_measuring, run), worker, most=len(held.windows)) as pool:

            def measure(priced: Priced, *, every: int) -> Quality:
                thresholds = {str(n): point.thresholds for n, point in priced.points.items()}
                file = parts / f"thresholds-{uuid4().hex}.safetensors"
                stored = StoredTensors.save(file, thresholds)
                numbers = range(0, len(held.windows), every)
                items = [_Window(number=n, thresholds=stored, sign=priced.sign) for n in numbers]
                sums: dict[int, list[float]] = {}
                for item, made in pool.made(items, watch):
                    sums[item.number] = made
                    bar.update()
                file.unlink()
                return quality_of([torch.tensor(sums[n], dtype=torch.float64) for n in numbers])

            yield measure


def _worker(
    held: HeldOut, artifact: PredictorArtifact, asked: Worker, device: str
) -> tuple[Worker, str]:
    """Return what a worker takes, and how it holds the model's weights."""
    checkpoint, header = held.checkpoint(), artifact.header
    floats = sum(artifact.ranks.values()) * (header.d_model + header.d_ff)
    context = max(map(len, held.windows))

    def takes(blocks: int) -> Worker:
        dtype = measured_dtype(checkpoint, device)
        model = model_memory(
            checkpoint, dtype, blocks=blocks, windows=1, context=context, head=True
        )
        return Worker(cpus=asked.cpus, gpus=asked.gpus, memory=model + 4 * floats)

    if asked.gpus:
        return takes(1), "auto"
    whole = takes(checkpoint.shape.n_layers)
    found = first_that_fits(whole, takes(1))
    return found, "resident" if found == whole else "streamed"


def _named(item: _Window) -> str:
    return f"window {item.number}"


def _measuring(run: _Run) -> Work[_Window, list[float]]:
    """Load the model and return how a window is run."""
    artifact = PredictorArtifact.open(run.artifact)
    model = MaskedModel(run.held.checkpoint(), run.device, run.weights)
    predictors, of = {}, None

    def measure(item: _Window, tell: Tell) -> list[float]:
        nonlocal predictors, of
        if of != item.thresholds:
            stored = item.thresholds
            tensors = load_tensors(stored.file, stored.digest, PredictorError, TRAIN_AGAIN)
            predictors = folded(artifact, {int(n): each for n, each in tensors.items()})
            of = stored
        window = run.held.windows[item.number]
        dense = _dense(run, model, item.number)
        return model.compared([(window, dense)], predictors, float(item.sign))[0].tolist()

    return measure


def _dense(run: _Run, model: MaskedModel, number: int) -> torch.Tensor:
    """Return a window's log-probabilities without predictors, which are computed once."""
    file = run.dense(number)
    if file.exists():
        return load_tensors(file, None, PredictorError, TRAIN_AGAIN)["dense"]
    dense = model.log_probabilities(run.held.windows[number]).half()
    made = file.with_name(f"{file.name}-{uuid4().hex}")
    save_tensors(made, {"dense": dense})
    put_in_place(made, file)
    return dense
