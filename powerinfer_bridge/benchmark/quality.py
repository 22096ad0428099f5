"""Quality beside speed: perplexity by every engine, and what the predictors get right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from common.decisions import DecisionCounts, mean_metrics
from common.errors import EngineError
from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.benchmark.beside import DenseFile
from powerinfer_bridge.benchmark.journal import Journal
from powerinfer_bridge.benchmark.setup import Setup
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_score, perplexity, perplexity_windows
from powerinfer_bridge.score import Score, gap_error
from results.bench import SECOND
from results.parts import METRICS, Layer, Metrics


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What quality was found.

    Attributes:
        layers: metrics by layer.
        ppl_dense: perplexity with all neurons.
        ppl_sparse: with predicted ones.
        standard_error: of the logarithm of the second over the first, None where unknown.
        ppl_transformers: transformers' own of the checkpoint; None without one.
        ppl_threads: with predicted ones and as many threads as are timed; None if those that
            `ppl_sparse` was measured with are as many.
        ppl_arms: of other files in their own programs, by arm.
    """

    layers: tuple[Layer, ...]
    ppl_dense: float
    ppl_sparse: float
    standard_error: float | None
    ppl_transformers: float | None
    ppl_threads: float | None
    ppl_arms: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """What the embedded engine finds in one pass."""

    sparse: Score
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
    embedded = journal.remember("embedded", _Embedded, partial(_embedded, setup))
    sparse, threads = embedded.sparse, None
    if setup.programs.powerinfer is not None:
        sparse = journal.remember("predicted", Score, partial(_powerinfer, setup, "predicted"))
        if setup.config.threads > setup.programs.exact_threads:
            timed = partial(_powerinfer, setup, "predicted", threads=setup.config.threads)
            threads = journal.remember("threads", Score, timed).perplexity
    dense = journal.remember("all", Score, partial(_all, setup))
    arms = dict(_dense(setup, journal)) | dict(_second(setup, journal))
    own = None
    if setup.config.model is not None:
        own = journal.remember("transformers", float, partial(_transformers, setup))
    return Quality(
        layers=embedded.layers,
        ppl_dense=dense.perplexity,
        ppl_sparse=sparse.perplexity,
        standard_error=gap_error(dense, sparse),
        ppl_transformers=own,
        ppl_threads=threads,
        ppl_arms=arms,
    )


def _embedded(setup: Setup) -> _Embedded:
    """Count the metrics of all layers on the windows of the perplexity."""
    engine = setup.engine
    counts = engine.count()
    found = _engine_score(setup, engine, "predicted", "sparse")
    engine.counts = None
    return _Embedded(sparse=found, layers=count_layers(engine, counts))


def _engine_score(setup: Setup, engine: Engine, kind: str, shown: str) -> Score:
    text, chunks = setup.text, setup.config.chunks
    found = engine_score(engine, text, setup.context, chunks, f"perplexity, {shown}")
    return _finite(setup, found, kind)


def _all(setup: Setup) -> Score:
    """Score with all neurons by PowerInfer, or else by the embedded engine."""
    if setup.programs.powerinfer is not None:
        return _powerinfer(setup, "all", DENSE_THRESHOLD)
    engine = setup.engine.with_threshold(DENSE_THRESHOLD)
    return _engine_score(setup, engine, "all", "dense")


def _powerinfer(
    setup: Setup, kind: str, threshold: float | None = None, threads: int | None = None
) -> Score:
    """Score in PowerInfer, with as many threads as keep its sums exact unless others are asked."""
    config, programs = setup.config, setup.programs
    assert programs.powerinfer is not None
    threads = threads or programs.exact_threads
    title = f"perplexity, {kind}, -t {threads}"
    with tqdm(bar_format=f"{title}: {{elapsed}}", disable=None) as programs.heartbeat.bar:
        found = programs.powerinfer.score(
            config.file,
            setup.text,
            setup.context,
            config.chunks,
            threads=threads,
            threshold=threshold,
            vram_budget=config.vram_budget_bytes,
        )
    return _finite(setup, found, kind)


def _dense(setup: Setup, journal: Journal) -> Iterator[tuple[str, float]]:
    """Yield the perplexity of each dense file in llama.cpp by its arm; none a build cannot tell."""
    for name, file in setup.programs.llama_cpp_files.items():
        kept = journal.remember(name, Scores, partial(_llama_cpp, setup, file))
        for found in kept.scores:
            yield name, _finite(setup, found, "dense").perplexity


def _second(setup: Setup, journal: Journal) -> Iterator[tuple[str, float]]:
    """Yield the perplexity of the model in PowerInfer's second engine, if it is given."""
    if setup.programs.second is not None:
        found = journal.remember(SECOND, Score, partial(_second_score, setup))
        yield SECOND, _finite(setup, found, "exactly sparse").perplexity


def _second_score(setup: Setup) -> Score:
    config, second = setup.config, setup.programs.second
    assert second is not None
    heartbeat = setup.programs.heartbeat
    with tqdm(bar_format="perplexity, second engine: {elapsed}", disable=None) as heartbeat.bar:
        return second.engine.score(
            second.file.path,
            setup.text,
            setup.context,
            config.chunks,
            threads=1,  # its sums depend on which thread took which neurons
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One score, or none of a program that cannot tell."""

    scores: tuple[Score, ...]


def _llama_cpp(setup: Setup, file: DenseFile) -> Scores:
    config, program = setup.config, setup.programs.llama_cpp
    assert program is not None
    heartbeat = setup.programs.heartbeat
    with tqdm(bar_format="perplexity, llama.cpp: {elapsed}", disable=None) as heartbeat.bar:
        found = program.score(
            file.path,
            setup.text,
            setup.context,
            config.chunks,
            threads=config.threads,
            n_gpu_layers=config.n_gpu_layers,
        )
    return Scores(scores=() if found is None else (found,))


def _transformers(setup: Setup) -> float:
    """Return transformers' own perplexity of the checkpoint, same ids and windows."""
    from architectures.checkpoint import Checkpoint
    from architectures.model import load_model

    config, vocabulary = setup.config, setup.engine.vocabulary
    ids = vocabulary.text_ids(setup.text.removesuffix("\n"))  # as PowerInfer reads files
    windows = perplexity_windows(ids, vocabulary.bos, setup.context, config.chunks)
    model = load_model(Checkpoint.open(str(config.model)), dtype=torch.float32, device="cpu")

    def evaluate(window: list[int]) -> torch.Tensor:
        return model.logits(torch.tensor([window]))[0]

    value = perplexity(evaluate, windows, "perplexity, transformers")
    return _finite(setup, Score(perplexity=value), "transformers'").perplexity


def _finite(setup: Setup, found: Score, kind: str) -> Score:
    if not math.isfinite(found.perplexity):
        raise EngineError(
            f"{setup.config.file}: perplexity with {kind} neurons is {found.perplexity}",
            "the model is damaged, see 'psp verify'",
        )
    return found


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
