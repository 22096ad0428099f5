"""`bench-powerinfer`: speed and quality of an exported file, sparse against all neurons."""

from __future__ import annotations

import math
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.decisions import DecisionCounts, mean_metrics
from common.documents import read_text
from common.errors import EngineError
from common.files import sha256
from common.version import tool_version
from gguf_export.schema import DENSE_THRESHOLD
from powerinfer_bridge.engine import Engine
from powerinfer_bridge.powerinfer import PowerInfer
from powerinfer_bridge.runners import EmbeddedRunner, PowerInferRunner, Runner
from powerinfer_bridge.sample_text import sample_text


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of a benchmark.

    Attributes:
        file: `*.powerinfer.gguf`.
        powerinfer_bin: directory of a PowerInfer build, or None for the embedded engine.
        data: held-out text, see `common.documents`; None takes `sample_text`.
        field: key of the text in structured sources.
        context: perplexity window, tokens.
        chunks: perplexity windows, at most.
        prompt: text to continue.
        generate: tokens to generate a run.
        repeats: runs of each kind.
        threads: CPU threads.
    """

    file: Path
    powerinfer_bin: Path | None = None
    data: str | None = None
    field: str = "text"
    context: int = 512
    chunks: int = 16
    prompt: str = "The "
    generate: int = 64
    repeats: int = 3
    threads: int = 2

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing."""
        if self.generate < 2 or self.repeats < 1 or self.chunks < 1 or self.context < 8:
            raise EngineError(
                "nothing to measure: need at least 2 tokens, 1 repeat, 1 chunk and a context of 8"
            )
        if not self.prompt:
            raise EngineError("the prompt is empty; pass some text to continue")

    def document(self) -> dict[str, Any]:
        """Return the settings as a result records them, ready for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure a file.

    Both runs of a pair, sparse and all neurons (threshold −1e30), come from the same engine, in
    turn. Recall and sparsity always come from the embedded engine, which sees every neuron.

    Returns:
        One JSON-ready document in the glossary's words; `tokens_per_second` figures are medians.

    Raises:
        PspError: unreadable file or text, or an engine that fails.
    """
    real = PowerInfer(config.powerinfer_bin) if config.powerinfer_bin else None
    engine = Engine(config.file)
    text = read_text(config.data, config.field) if config.data else sample_text()
    room = _room(config, engine)
    context = min(config.context, engine.hyper.context_length)
    embedded = EmbeddedRunner(engine)
    counts = engine.count()
    ppl_sparse = embedded.perplexity(text, context, config.chunks, None)
    engine.counts = None
    runner: Runner = embedded
    if real is not None:
        runner = PowerInferRunner(real, config.file, config.threads, room)
        ppl_sparse = runner.perplexity(text, context, config.chunks, None)
    ppl_dense = runner.perplexity(text, context, config.chunks, DENSE_THRESHOLD)
    for kind, value in (("predicted", ppl_sparse), ("all", ppl_dense)):
        if not math.isfinite(value):
            raise EngineError(
                f"{config.file}: perplexity with {kind} neurons is {value}; the model is damaged, "
                "see 'psp verify'"
            )
    return {
        "model": engine.hyper.name,
        "file": str(config.file),
        "engine": runner.name,
        **_decisions(engine, counts),
        "ppl_dense": ppl_dense,
        "ppl_sparse": ppl_sparse,
        "ppl_gap": ppl_sparse / ppl_dense - 1,
        **_decoding(config, runner),
        "text": config.data or "pydoc_data.topics",
        "text_sha256": sha256(text.encode("utf-8", "surrogateescape")),
        "settings": config.document(),
        "context": context,
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "tool_version": tool_version(),
    }


def _room(config: BenchConfig, engine: Engine) -> int:
    """Return the tokens that prompt and continuation take."""
    needed = len(engine.vocabulary.prompt_ids(config.prompt)) + config.generate
    if needed > engine.hyper.context_length:
        raise EngineError(
            f"prompt and -n need {needed} tokens, the model's context is "
            f"{engine.hyper.context_length}; lower -n or shorten --prompt"
        )
    return needed


def _decoding(config: BenchConfig, runner: Runner) -> dict[str, Any]:
    """Return speeds and texts of alternating runs; one run of each kind warms up."""
    thresholds = {"sparse": None, "dense": DENSE_THRESHOLD}
    samples: dict[str, list[float]] = {kind: [] for kind in thresholds}
    texts: dict[str, str] = {}
    for number in tqdm(range(config.repeats + 1), unit="pair", desc="decode", disable=None):
        for kind, threshold in thresholds.items():
            decoded = runner.decode(config.prompt, config.generate, threshold)
            texts[kind] = decoded.text
            if number:
                samples[kind].append(decoded.tokens_per_second)
    sparse, dense = (statistics.median(samples[kind]) for kind in thresholds)
    return {
        "tokens_per_second": sparse,
        "tokens_per_second_dense": dense,
        "speedup": sparse / dense,
        "samples": samples,
        "continuations": texts,
    }


def _decisions(engine: Engine, counts: list[DecisionCounts]) -> dict[str, Any]:
    """Return the means over layers of all metrics, and the metrics of each layer."""
    hyper = engine.hyper
    layers = [
        layer.metrics(
            rank=engine.rank(number),
            d_model=hyper.d_model,
            d_ff=hyper.d_ff,
            ffn_matrices=3 if hyper.graph.gated else 2,
            predictor_width=engine.weights.width(f"blk.{number}.fc2")
            / engine.weights.width(f"blk.{number}.ffn_up"),
        )
        for number, layer in enumerate(counts)
    ]
    return {**mean_metrics(layers), "layers": layers}
