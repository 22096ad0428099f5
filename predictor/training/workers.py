"""Who trains the layers of a run: threads of this process, or others that do as they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from tqdm import tqdm

from common.overlap import several_at_once
from predictor.artifact import Epoch, PredictorArtifact
from predictor.size import Size
from predictor.thresholds.choose import Measure, measured_by
from predictor.thresholds.curves import Curves
from predictor.thresholds.predicted_model import PredictedModel
from predictor.training.held_out import HeldOut
from predictor.training.layer import LayerResult, LayerTrainer
from predictor.training.sizes import scout

Commit = Callable[[PredictorArtifact], None]
"""Puts a trained layer into the artifact."""


class Workers(Protocol):
    """Train and try several layers at once; the first exception stops them all."""

    def scouted(
        self, sizes: Mapping[int, Sequence[Size]], bar: tqdm
    ) -> Iterator[tuple[int, Mapping[Size, Curves]]]:
        """Yield every layer with the curves of its scouts, as they are ready.

        Args:
            sizes: layer number to what its predictor may be.
            bar: counts scouts.
        """

    def trained(self, sizes: Mapping[int, Size], shown: Shown) -> Iterator[tuple[int, Commit]]:
        """Yield every layer with what commits it, as they are ready.

        Args:
            sizes: layer number to the size of its predictor.
            shown: is told of steps and epochs.
        """

    def measuring(
        self, artifact: PredictorArtifact, held: HeldOut
    ) -> AbstractContextManager[Measure]:
        """Load the model that a gap is measured with.

        Args:
            artifact: complete.
            held: model and text.
        """


class Threads:
    """Layers in this process, several at once where they are small."""

    def __init__(self, trainer: LayerTrainer) -> None:
        """Name what trains them."""
        self._trainer = trainer

    def scouted(
        self, sizes: Mapping[int, Sequence[Size]], bar: tqdm
    ) -> Iterator[tuple[int, Mapping[Size, Curves]]]:
        """See `Workers`."""

        def work(layer: int, go_on: Callable[[], None]) -> dict[Size, Curves]:
            return scout(self._trainer, layer, sizes[layer], go_on, bar.update)

        return several_at_once(work, list(sizes), self._trainer.jobs)

    def trained(self, sizes: Mapping[int, Size], shown: Shown) -> Iterator[tuple[int, Commit]]:
        """See `Workers`."""

        def work(layer: int, go_on: Callable[[], None]) -> LayerResult:
            def on_step(steps: int) -> None:
                go_on()
                shown.step(layer, steps)

            return self._trainer.run(layer, sizes[layer], on_step, partial(shown.epoch, layer))

        for layer, result in several_at_once(work, list(sizes), self._trainer.jobs):
            yield layer, partial(_commit, layer, result)

    def measuring(
        self, artifact: PredictorArtifact, held: HeldOut
    ) -> AbstractContextManager[Measure]:
        """See `Workers`."""
        device = self._trainer.config.device
        return measured_by(artifact, PredictedModel(held.checkpoint(), held.windows, device))


def _commit(layer: int, result: LayerResult, artifact: PredictorArtifact) -> None:
    if result.curves is not None:
        artifact.add_curves(layer, result.curves.tensors())
    artifact.add(layer, result.predictor, result.metrics, result.epochs)


class Shown:
    """What the progress bar of a training tells.

    Attributes:
        bar: counts the steps of all layers.
    """

    def __init__(self, bar: tqdm, expected: dict[int, int], layers: int) -> None:
        """Name what is told of.

        Args:
            bar: counts the steps of all layers.
            expected: number of a layer that is missing to the steps that it is counted with.
            layers: how many there are, with those that are finished.
        """
        self.bar, self._expected, self._layers = bar, expected, layers
        self._missing = set(expected)

    def step(self, layer: int, steps: int) -> None:
        """Count a step of a layer that takes so many in all."""
        self.bar.total += steps - self._expected[layer]
        self._expected[layer] = steps
        self.bar.update()

    def whole(self, layer: int, epochs: Sequence[Epoch]) -> None:
        """Count all steps of a layer of which nothing was told before."""
        self.bar.update(self._expected[layer])
        if epochs:
            self.epoch(layer, epochs)

    def epoch(self, layer: int, epochs: Sequence[Epoch]) -> None:
        """Tell the last epoch of a layer."""
        last = epochs[-1]
        self._tell(
            layer=layer,
            epoch=len(epochs),
            loss=f"{last.loss:.3g}",
            held_out_loss=f"{last.held_out_loss:.3g}",
            held_out_error=f"{last.held_out_error:.2%}",
        )

    def finished(self, layer: int) -> None:
        """Count a layer."""
        self._missing.discard(layer)
        self._tell()

    def _tell(self, **last: object) -> None:
        done = self._layers - len(self._missing)
        self.bar.set_postfix({"layers": f"{done}/{self._layers}", **last})
