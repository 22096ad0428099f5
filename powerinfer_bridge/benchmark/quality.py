"""Quality beside speed: perplexity by every engine, and what the predictors get right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.decisions import DecisionCounts, mean_metrics
from common.errors import EngineError
from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.benchmark.journal import Journal
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.setup import Setup
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_perplexity, perplexity, perplexity_windows
from results.measures import METRICS, Layer, Metrics


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What quality was found.

    Attributes:
        layers: metrics by layer.
        ppl_dense: perplexity with all neurons.
        ppl_sparse: with predicted ones.
        ppl_transformers: transformers' own of the checkpoint; None without one.
    """

    layers: tuple[Layer, ...]
    ppl_dense: float
    ppl_sparse: float
    ppl_transformers: float | None


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """What the embedded engine finds in one pass."""

    ppl_sparse: float
    layers: tuple[Layer, ...]


def measure_quality(setup: Setup, journal: Journal) -> Quality:
    """Measure perplexity by every engine, and count what the predictors get right.

    Recall and sparsity always come from the embedded engine, which sees every neuron.

    Args:
        setup: what is measured.
        journal: keeps each figure as it is found.

    Raises:
        EngineError: an engine fails, or a perplexity is no number.
        CheckpointError: `--model` cannot be run.
    """
    return _Measuring(setup, journal).measure()


@dataclass(frozen=True)
class _Measuring:
    """Measures with a setup; the journal keeps each figure as it is found."""

    setup: Setup
    journal: Journal

    @property
    def config(self) -> BenchConfig:
        return self.setup.config

    def measure(self) -> Quality:
        embedded = self.journal.remember("embedded", _Embedded, self._embedded)
        sparse = embedded.ppl_sparse
        if self.setup.programs.powerinfer is not None:
            sparse = self.journal.remember("predicted", float, self._predicted)
        dense = self.journal.remember("all", float, self._all)
        own = None
        if self.config.model is not None:
            own = self.journal.remember("transformers", float, self._transformers)
        return Quality(
            layers=embedded.layers, ppl_dense=dense, ppl_sparse=sparse, ppl_transformers=own
        )

    def _embedded(self) -> _Embedded:
        """Count the metrics of all layers on the windows of the perplexity."""
        engine = self.setup.engine
        counts = engine.count()
        value = self._engine_perplexity(engine, "sparse")
        engine.counts = None
        return _Embedded(
            ppl_sparse=self._finite(value, "predicted"),
            layers=count_layers(engine, counts),
        )

    def _engine_perplexity(self, engine: Engine, kind: str) -> float:
        text, chunks = self.setup.text, self.config.chunks
        return engine_perplexity(engine, text, self.setup.context, chunks, f"perplexity, {kind}")

    def _predicted(self) -> float:
        return self._powerinfer("predicted", None)

    def _all(self) -> float:
        """Return the perplexity with all neurons by PowerInfer, or else by the embedded engine."""
        if self.setup.programs.powerinfer is not None:
            return self._powerinfer("all", DENSE_THRESHOLD)
        engine = self.setup.engine.with_threshold(DENSE_THRESHOLD)
        return self._finite(self._engine_perplexity(engine, "dense"), "all")

    def _powerinfer(self, kind: str, threshold: float | None) -> float:
        programs, description = self.setup.programs, f"perplexity, {kind}: {{elapsed}}"
        assert programs.powerinfer is not None
        with tqdm(bar_format=description, disable=None) as programs.heartbeat.bar:
            value = programs.powerinfer.perplexity(
                self.config.file,
                self.setup.text,
                self.setup.context,
                self.config.chunks,
                # The CPU's parallel sum is not exact; a hybrid run needs more than one thread.
                threads=self.config.threads if programs.cuda else 1,
                threshold=threshold,
                vram_budget=self.config.vram_budget_bytes,
            )
        return self._finite(value, kind)

    def _transformers(self) -> float:
        """Return transformers' own perplexity of the checkpoint, same ids and windows."""
        from architectures.checkpoint import Checkpoint
        from architectures.model import load_model

        checkpoint = Checkpoint.open(str(self.config.model))
        vocabulary = self.setup.engine.vocabulary
        ids = vocabulary.text_ids(self.setup.text.removesuffix("\n"))  # as PowerInfer reads files
        windows = perplexity_windows(ids, vocabulary.bos, self.setup.context, self.config.chunks)
        model = load_model(checkpoint, dtype=torch.float32, device="cpu")

        def evaluate(window: list[int]) -> torch.Tensor:
            return model.logits(torch.tensor([window]))[0]

        value = perplexity(evaluate, windows, "perplexity, transformers")
        return self._finite(value, "transformers'")

    def _finite(self, value: float, kind: str) -> float:
        if not math.isfinite(value):
            raise EngineError(
                f"{self.config.file}: perplexity with {kind} neurons is {value}",
                "the model is damaged, see 'psp verify'",
            )
        return value


def count_layers(engine: Engine, counts: Sequence[DecisionCounts]) -> tuple[Layer, ...]:
    """Return the metrics of what an engine decided, layer by layer."""
    hyper, found = engine.hyper, []
    for number, layer in enumerate(counts):
        rank = engine.rank(number)
        metrics = layer.metrics(
            rank=rank,
            d_model=hyper.d_model,
            d_ff=hyper.d_ff,
            ffn_matrices=3 if hyper.graph.gated else 2,
            predictor_width=engine.weights.width(f"blk.{number}.fc2")
            / engine.weights.width(f"blk.{number}.ffn_up"),
        )
        found.append(Layer(layer=number, rank=rank, **metrics))
    return tuple(found)


def mean_layer(layers: Sequence[Layer]) -> Metrics:
    """Return the means of the metrics over layers."""
    return Metrics(
        **mean_metrics([{key: getattr(each, key) for key in METRICS} for each in layers])
    )
