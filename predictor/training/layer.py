"""Training of one layer's predictor, from its traces to what is stored of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import torch

from common.decisions import DecisionCounts
from common.element_types import ELEMENT_TYPES, F16
from common.errors import PredictorError
from common.machine import device_named
from predictor.artifact import Epoch
from predictor.module import Predictor, decide
from predictor.optimiser import AdamW, cosine
from predictor.size import Size
from predictor.stored import LayerPredictor
from predictor.thresholds.choose import Bound
from predictor.thresholds.curves import LayerCurves, measure_layer
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from predictor.training.loss import Batch, batches, loss_of, read_batches, set_gradients
from predictor.training.settings import Recipe, TrainConfig
from predictor.training.start import Start, Starter, start_sample

_EVALUATION_ROWS = 2048
_TOLD_ROWS = 1024
"""Held-out rows that epochs are told by, at most."""

_MOMENTUM = 0.9
_TUNED_WIDTH = 512
_TUNED_RANK = 128
_WHITENED = 0.25
"""Of the rate, for fc1 where it takes whitened inputs."""

_SMALL_LAYER = 1 << 22
"""Entries of a gate matrix below which threads do better on a layer each than on one together."""


def train_layer(
    start: Start,
    rows: LabelledRows,
    *,
    train: torch.Tensor,
    holdout: torch.Tensor,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int], object] = lambda steps: None,
    on_epoch: Callable[[Epoch], object] | None = None,
) -> Predictor:
    """Train a predictor at threshold 0, where its start is.

    Args:
        start: with the recipe to train by; it is trained in place.
        rows: the layer's trace rows, for the start's device.
        train: (n,) int64, rows to train on.
        holdout: (m,) int64, rows that choose the epoch where the recipe asks for that.
        generator: source of the order of rows.
        dtype: type of matrix products; weights and optimiser are float32.
        on_step: called after every step with the number of steps in all.
        on_epoch: called after every epoch; without it none is measured.

    Returns:
        float32 predictor on the CPU; `Starter.store` rounds it, before which it is not measured.
    """
    recipe, predictor = start.recipe, start.predictor
    betas = _MOMENTUM, recipe.second_decay
    optimiser = AdamW(_rates(start), betas=betas, weight_decay=recipe.weight_decay, fused=True)
    steps = math.ceil(len(train) / recipe.batch) * recipe.epochs
    held = [] if on_epoch is None else read_batches(recipe, *rows.at_hand(_sample(holdout)))
    step, best, best_recall, bad = 0, start.plain(), -1.0, 0
    for _ in range(recipe.epochs):
        losses = []
        order = train[torch.randperm(len(train), generator=generator)]
        for batch in batches(recipe, rows, order):
            losses.append(set_gradients(predictor, batch, dtype, start.coordinates))
            optimiser.step(cosine(step, steps) if recipe.cosine else 1.0)
            step += 1
            on_step(steps)
        trained = start.plain()
        if on_epoch is not None:
            on_epoch(_epoch(losses, trained, held))
        if not recipe.best_recall:
            best = trained
            continue
        counts = evaluate(trained, rows, holdout)
        recall = counts.hits / max(counts.active, 1)
        if recall > best_recall:
            best, best_recall, bad = trained, recall, 0
        else:
            bad += 1
        if recall >= recipe.stop_recall or bad >= recipe.patience:
            break
    return best


def _rates(start: Start) -> list[tuple[torch.nn.Parameter, float]]:
    recipe, predictor = start.recipe, start.predictor
    rank, d_model = predictor.fc2.shape[1], predictor.fc1.shape[1]
    if not recipe.scale_rate:
        return [(matrix, recipe.learning_rate) for matrix in (predictor.fc1, predictor.fc2)]
    share = _WHITENED if start.coordinates else 1.0
    return [
        (predictor.fc1, share * recipe.learning_rate * min(1.0, _TUNED_WIDTH / d_model)),
        (predictor.fc2, recipe.learning_rate * min(1.0, _TUNED_RANK / rank)),
    ]


def _sample(holdout: torch.Tensor) -> torch.Tensor:
    """Return held-out rows to tell epochs by, from all of their documents."""
    return holdout[:: math.ceil(len(holdout) / _TOLD_ROWS) or 1]


@torch.no_grad()
def _epoch(losses: list[torch.Tensor], trained: Predictor, held: Sequence[Batch]) -> Epoch:
    """Tell of an epoch.

    Args:
        losses: of its batches.
        trained: what it ended with, on the CPU.
        held: held-out rows, on the device of training.
    """
    predictor = trained.on(losses[0].device)
    told, counted = [], []
    for batch in held:
        logits = predictor(batch.inputs)
        above = (logits >= 0).view(-1)
        told.append(loss_of(logits, batch))
        counted.append(torch.stack([above.sum(), above[batch.places].sum()]))
    rows, loss = 0, 0.0
    for batch, mean in zip(held, torch.stack(told).tolist(), strict=True):
        rows, loss = rows + len(batch.inputs), loss + len(batch.inputs) * mean
    active = sum(len(batch.places) for batch in held)
    predicted, hits = torch.stack(counted).sum(0).tolist()
    return Epoch(
        loss=float(torch.stack(losses).mean()),
        held_out_loss=loss / rows,
        held_out_error=(predicted + active - 2 * hits) / (rows * len(predictor.fc2)),
    )


def evaluate(predictor: Predictor, rows: LabelledRows, index: torch.Tensor) -> DecisionCounts:
    """Count decisions at threshold 0 against the uncut labels of the chosen rows."""
    counts, predictor = DecisionCounts(), predictor.on(rows.device)
    for held, part in rows.parts(index, _EVALUATION_ROWS):
        counts.add(held.active(part), decide(predictor, held.rows.inputs_at(part), 0.0))
    return counts


@dataclass(frozen=True)
class LayerResult:
    """A trained layer.

    Attributes:
        predictor: as it will be exported at threshold 0.
        metrics: on held-out documents, at threshold 0.
        curves: what other thresholds lead to; None where nobody will choose some.
        epochs: how training went.
    """

    predictor: LayerPredictor
    metrics: dict[str, float]
    curves: LayerCurves | None
    epochs: Sequence[Epoch]


@dataclass(frozen=True, kw_only=True)
class LayerTrainer:
    """Trains layers by number and rank.

    Attributes:
        config: settings of the run.
        store: the traces.
        recipe: settings of the recipe.
        bound: what thresholds must keep to, None where all are 0.
        train: (n,) int64, rows to train on.
        holdout: (m,) int64, rows of held-out documents.
        outtype: type of the model that predictors are for.
    """

    config: TrainConfig
    store: TraceStore
    recipe: Recipe
    bound: Bound | None
    train: torch.Tensor
    holdout: torch.Tensor
    outtype: str = F16

    @property
    def dtype(self) -> torch.dtype:
        """Type of matrix products."""
        return product_dtype(self.config)

    @property
    def device(self) -> torch.device:
        """Where predictors are trained."""
        return torch.device(device_named(self.config.device))

    @property
    def jobs(self) -> int:
        """How many layers are trained at once, sharing the threads.

        The bytes of a layer depend on its share of them, so it is the same for those that a killed
        run left, were it one alone.
        """
        header = self.store.header
        return min(jobs_for(self.config, header.d_model, header.d_ff), header.n_layers)

    def rows(self, layer: int) -> LabelledRows:
        """Return a layer's rows as the recipe wants them, for the device of training."""
        share = self.config.label_top_fraction
        return LabelledRows(
            self.store.layer(layer, self.device),
            self.store.weights(layer),
            normalise=self.recipe.normalise,
            top=0 if share is None else max(1, int(share * self.store.header.d_ff)),
        )

    def generator(self, layer: int) -> torch.Generator:
        """Return a layer's source of random numbers, from its beginning."""
        return torch.Generator().manual_seed(self.config.seed * 1000 + layer)

    def run(
        self,
        layer: int,
        size: Size,
        on_step: Callable[[int], object],
        on_epoch: Callable[[Sequence[Epoch]], object],
    ) -> LayerResult:
        """Train and measure a layer.

        Args:
            layer: its number.
            size: of its predictor.
            on_step: see `train_layer`.
            on_epoch: called after every epoch with all so far.

        Raises:
            PredictorError: training diverged, or memory ran out.
            TraceError: inputs hold NaN or inf.
        """
        with _enough_memory(layer):
            rows, epochs = self.rows(layer), list[Epoch]()

            def told(epoch: Epoch) -> None:
                if not all(map(math.isfinite, astuple(epoch))):
                    raise _diverged(layer)
                epochs.append(epoch)
                on_epoch(epochs)

            stored = self._trained(layer, size, rows, on_step, told)
            return self._measured(layer, rows, stored, epochs)

    def _trained(
        self,
        layer: int,
        size: Size,
        rows: LabelledRows,
        on_step: Callable[[int], object],
        on_epoch: Callable[[Epoch], object],
    ) -> LayerPredictor:
        generator = self.generator(layer)
        starter = Starter(self.recipe, rows, start_sample(self.recipe, self.train, generator))
        start = starter.at(size, generator)
        trained = train_layer(
            start,
            rows,
            train=self.train,
            holdout=self.holdout,
            generator=generator,
            dtype=self.dtype,
            on_step=on_step,
            on_epoch=on_epoch,
        )
        if not all(torch.isfinite(weight).all() for weight in trained.parameters()):
            raise _diverged(layer)
        return starter.store(start, trained, size.kind)

    def _measured(
        self, layer: int, rows: LabelledRows, stored: LayerPredictor, epochs: Sequence[Epoch]
    ) -> LayerResult:
        header, element = self.store.header, ELEMENT_TYPES[stored.kind]
        predictor = stored.predictor()
        metrics = evaluate(predictor, rows, self.holdout).metrics(
            rank=element.padded(stored.rank),
            d_model=header.d_model,
            d_ff=header.d_ff,
            ffn_matrices=header.ffn_matrices,
            predictor_width=element.width / ELEMENT_TYPES[self.outtype].width,
        )
        curves = None
        if self.bound is not None:
            generator = self.generator(layer)
            curves = measure_layer(predictor, rows, self.train, self.holdout, generator)
        counted = replace(stored, activation_counts=rows.rows.counts)
        return LayerResult(counted, metrics, curves, epochs)


def product_dtype(config: TrainConfig) -> torch.dtype:
    """Return the type of training's matrix products."""
    automatic = "float32" if torch.device(device_named(config.device)).type == "cpu" else "bfloat16"
    name = automatic if config.precision == "auto" else config.precision
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def jobs_for(config: TrainConfig, d_model: int, d_ff: int) -> int:
    """Return how many layers of this size are trained at once."""
    if config.jobs:
        return config.jobs
    alone = torch.device(device_named(config.device)).type != "cpu" or d_model * d_ff > _SMALL_LAYER
    return 1 if alone else torch.get_num_threads()


def _diverged(layer: int) -> PredictorError:
    return PredictorError(
        f"layer {layer}: training diverged", "check the traces of this layer, or try --recipe psp"
    )


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
