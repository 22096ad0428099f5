"""Quality beside speed: perplexity by every engine, and what the predictors get right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGUFValueType
from tqdm import tqdm

from common.decisions import mean_metrics
from common.errors import CheckpointError, EngineError
from gguf_export.pwri.reader import GGUFFile
from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.benchmark.journal import Journal
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.subject import Subject
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_perplexity, perplexity, perplexity_windows
from powerinfer_bridge.programs.powerinfer import PowerInfer

_MODEL_KEY = "psp.model_fingerprint"


def check_model(config: BenchConfig, file: GGUFFile) -> None:
    """Demand that `--model` is what the file was made from, as far as the file tells.

    Raises:
        CheckpointError: it is not, or no checkpoint at all.
    """
    if config.model is None:
        return
    from architectures.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(config.model)
    if _MODEL_KEY not in file.values:
        return
    if file.value(_MODEL_KEY, GGUFValueType.STRING) != checkpoint.fingerprint:
        raise CheckpointError(
            f"{config.model}: is not the model that {config.file} was made from",
            "pass that as --model",
        )


@dataclass(frozen=True, kw_only=True)
class QualityRun:
    """What quality is measured with.

    Attributes:
        config: settings.
        subject: files and programs.
        text: held-out text.
        journal: keeps each figure as it is found.
    """

    config: BenchConfig
    subject: Subject
    text: str
    journal: Journal

    @property
    def context(self) -> int:
        """Tokens of a window: as asked for, at most the model's context."""
        return min(self.config.context, self.subject.engine.hyper.context_length)

    def measure(self) -> dict[str, Any]:
        """Return all figures in the glossary's words, ready for JSON.

        Raises:
            EngineError: an engine fails, or a perplexity is no number.
            CheckpointError: `--model` cannot be run.
        """
        embedded = self.journal.remember("embedded", self._embedded)
        layers = [
            {key: row[key] for key in row if key not in ("layer", "rank")}
            for row in embedded["layers"]
        ]
        sparse = self._perplexity("predicted", None, embedded["ppl_sparse"])
        dense = self._perplexity("all", DENSE_THRESHOLD, None)
        own = None
        if self.config.model is not None:
            own = self.journal.remember("transformers", self._transformers)
        return {
            **mean_metrics(layers),
            "layers": embedded["layers"],
            "ppl_dense": dense,
            "ppl_sparse": sparse,
            "ppl_gap": sparse / dense - 1,
            "ppl_transformers": own,
        }

    def _embedded(self) -> dict[str, Any]:
        """Return the metrics of all layers, counted on the windows of the perplexity."""
        engine = self.subject.engine
        counts = engine.count()
        value = self._engine_perplexity(engine, "sparse")
        engine.counts = None
        hyper = engine.hyper
        layers = [
            {
                "layer": number,
                "rank": engine.rank(number),
                **layer.metrics(
                    rank=engine.rank(number),
                    d_model=hyper.d_model,
                    d_ff=hyper.d_ff,
                    ffn_matrices=3 if hyper.graph.gated else 2,
                    predictor_width=engine.weights.width(f"blk.{number}.fc2")
                    / engine.weights.width(f"blk.{number}.ffn_up"),
                ),
            }
            for number, layer in enumerate(counts)
        ]
        return {"ppl_sparse": self._finite(value, "predicted"), "layers": layers}

    def _engine_perplexity(self, engine: Engine, kind: str) -> float:
        chunks = self.config.chunks
        return engine_perplexity(engine, self.text, self.context, chunks, f"perplexity, {kind}")

    def _perplexity(self, kind: str, threshold: float | None, embedded: float | None) -> float:
        """Return the perplexity by PowerInfer, or else by the embedded engine."""

        def measure() -> float:
            real = self.subject.powerinfer
            if real is None:
                assert threshold is not None
                engine = self.subject.engine.with_threshold(threshold)
                return self._finite(self._engine_perplexity(engine, "dense"), kind)
            return self._finite(self._powerinfer(real, kind, threshold), kind)

        if self.subject.powerinfer is None and embedded is not None:
            return embedded
        return self.journal.remember(kind, measure)

    def _powerinfer(self, real: PowerInfer, kind: str, threshold: float | None) -> float:
        description = f"perplexity, {kind}: {{elapsed}}"
        with tqdm(bar_format=description, disable=None) as self.subject.heartbeat.bar:
            return real.perplexity(
                self.config.file,
                self.text,
                self.context,
                self.config.chunks,
                # The CPU's parallel sum is not exact; a hybrid run needs more than one thread.
                threads=self.config.threads if self.subject.cuda else 1,
                threshold=threshold,
                vram_budget=self.config.vram_budget_bytes,
            )

    def _transformers(self) -> float:
        """Return transformers' own perplexity of the checkpoint, same ids and windows."""
        from architectures.checkpoint import Checkpoint
        from architectures.model import load_model

        checkpoint = Checkpoint.open(str(self.config.model))
        vocabulary = self.subject.engine.vocabulary
        ids = vocabulary.text_ids(self.text.removesuffix("\n"))  # as PowerInfer reads files
        bos = vocabulary.bos
        windows = perplexity_windows(ids, bos, self.context, self.config.chunks)
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
