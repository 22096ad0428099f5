"""One layer from its traces to what is stored of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from common.errors import PredictorError
from predictor.artifact import LayerPredictor
from predictor.calibration.calibrate import LayerCurves, measure_layer
from predictor.calibration.element_cost import ElementCost
from predictor.module import to_half
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from predictor.training.fit import evaluate, train_layer
from predictor.training.recipes import Recipe
from predictor.training.settings import TrainConfig
from predictor.training.start import Starter


@dataclass(frozen=True)
class LayerResult:
    """A trained layer.

    Attributes:
        predictor: as it will be exported at threshold 0.
        metrics: on held-out documents, at threshold 0.
        curves: what other thresholds lead to; None where nobody will choose some.
    """

    predictor: LayerPredictor
    metrics: dict[str, float]
    curves: LayerCurves | None


@dataclass(frozen=True, kw_only=True)
class LayerTraining:
    """All that training a layer needs but its number and rank.

    Attributes:
        config: settings of the run.
        store: the traces.
        recipe: settings of the recipe.
        train: (n,) int64, rows to train on.
        holdout: (m,) int64, rows of held-out documents.
    """

    config: TrainConfig
    store: TraceStore
    recipe: Recipe
    train: torch.Tensor
    holdout: torch.Tensor

    def rows(self, layer: int) -> LabelledRows:
        """Return a layer's rows as the recipe wants them."""
        share = self.config.label_top_fraction
        return LabelledRows(
            self.store.layer(layer),
            self.store.weights(layer),
            normalise=self.recipe.normalise,
            top=0 if share is None else max(1, int(share * self.store.header.d_ff)),
        )

    def __call__(self, layer: int, rank: int, on_step: Callable[[int], object]) -> LayerResult:
        """Train and measure a layer.

        Raises:
            PredictorError: training diverged, or memory ran out.
            TraceError: inputs hold NaN or inf.
        """
        with _enough_memory(layer):
            return self._train(layer, rank, on_step)

    def _train(self, layer: int, rank: int, on_step: Callable[[int], object]) -> LayerResult:
        config, rows, seed = self.config, self.rows(layer), self.config.seed * 1000 + layer
        generator, device = torch.Generator().manual_seed(seed), torch.device(config.device)
        trained = train_layer(
            Starter(self.recipe, rows, self.train, generator, device).at(rank),
            rows,
            train=self.train,
            holdout=self.holdout,
            generator=generator,
            dtype=config.dtype,
            on_step=on_step,
        )
        if not all(torch.isfinite(weight).all() for weight in trained.parameters()):
            raise PredictorError(
                f"layer {layer}: training diverged",
                "check the traces of this layer, or try --recipe psp",
            )
        final, header = to_half(trained), self.store.header
        element, curves = ElementCost(config.predictor_type), None
        metrics = evaluate(final, rows, self.holdout).metrics(
            rank=element.stored_rank(rank),
            d_model=header.d_model,
            d_ff=header.d_ff,
            ffn_matrices=header.ffn_matrices,
            predictor_width=element.width,
        )
        if config.bound is not None:
            generator = torch.Generator().manual_seed(seed)
            curves = measure_layer(final, rows, self.train, self.holdout, generator)
        predictor = LayerPredictor(
            fc1=final.fc1.detach().half(),
            fc2=final.fc2.detach().half(),
            activation_counts=rows.rows.counts,
        )
        return LayerResult(predictor, metrics, curves)


@contextmanager
def _enough_memory(layer: int) -> Iterator[None]:
    """Name the options that lower what training holds; torch's own message names none."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not memory and "allocate memory" not in str(error):
            raise
        raise PredictorError(
            f"layer {layer}: out of memory", "lower --jobs or --rank, then go on with --resume"
        ) from error
