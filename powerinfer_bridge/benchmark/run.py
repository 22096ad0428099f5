"""`bench-powerinfer`: speed and quality of a file, predicted against all neurons and dense."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from common.clock import now
from common.errors import PspError
from common.files import write_bytes
from common.lock import locked
from common.outputs import drop_kept
from common.typed_json import plain
from common.version import tool_version
from cost_model.hardware import THIS, load_hardware
from gguf_export.commit import finish_commit
from powerinfer_bridge.benchmark.inputs import text_source
from powerinfer_bridge.benchmark.journal import Sample, check_out, open_journal
from powerinfer_bridge.benchmark.placement import frequency_curve, place, place_layer
from powerinfer_bridge.benchmark.quality import Quality, mean_layer, measure_quality
from powerinfer_bridge.benchmark.rounds import (
    TimedArm,
    compare_texts,
    make_arms,
    run_rounds,
    speedup,
    summarise,
)
from powerinfer_bridge.benchmark.second_engine import exact_bytes_ratio
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.setup import Setup, open_setup
from powerinfer_bridge.benchmark.warnings import find_warnings
from results.bench import BENCH, PREDICTED, SAMPLES, SECOND, Bench, Expectation, SampleRow


def bench(config: BenchConfig, note: Callable[[str], None] = lambda line: None) -> Bench:
    """Measure a file.

    Predicted and all neurons (threshold −1e30) come from the same engine.

    Args:
        config: settings.
        note: takes lines about the model and the text.

    Returns:
        The document in the glossary's words. With `config.out` it is also written there, with its
        samples as CSV and the journal.

    Raises:
        PspError: unreadable files or text, an `out` that may not be written, or an engine that
            fails.
    """
    finish_commit(config.file)
    if config.out is None:
        return _bench(config, note)
    with locked(config.out):
        found = _bench(config, note)
        drop_kept(config.out)
    return found


def _bench(config: BenchConfig, note: Callable[[str], None]) -> Bench:
    check_out(config.out, resume=config.resume, force=config.force)
    setup = open_setup(config, note)
    journal = open_journal(config.out, _identity(setup), resume=config.resume, force=config.force)
    quality = measure_quality(setup, journal)
    arms = make_arms(setup)
    samples = run_rounds(setup, arms, journal)
    measured = _document(setup, quality, arms, samples)
    expected, trouble = expect(setup, measured)
    result = replace(measured, estimate=expected)
    result = replace(result, warnings=tuple(find_warnings(result, setup, trouble)))
    if config.out is not None:
        write_bytes(config.out / SAMPLES, samples_csv(result.samples).encode())
        BENCH.write(config.out, result)
    return result


def _identity(setup: Setup) -> dict[str, object]:
    """Return what must be the same for a benchmark to go on, ready for JSON."""
    return {
        "inputs": plain(setup.inputs),
        "hardware": plain(setup.machine.facts),
        "versions": plain(setup.versions),
        "settings": setup.config.identity(),
    }


def _document(
    setup: Setup, quality: Quality, arms: Sequence[TimedArm], samples: Sequence[Sample]
) -> Bench:
    """Return all that was measured; what the cost model expects and warnings are added to it."""
    config, hyper, neurons = setup.config, setup.engine.hyper, setup.neurons
    rows = tuple(sample.row() for sample in samples)
    over_all, *_ = speedups = [
        speedup(rows, PREDICTED, arm.name) for arm in arms if arm.name != PREDICTED
    ]
    summaries = tuple(
        replace(
            summarise(arm, samples, rows),
            perplexity=quality.ppl_arms.get(arm.name),
            ffn_bytes_ratio=exact_bytes_ratio(quality.layers) if arm.name == SECOND else None,
        )
        for arm in arms
    )
    all_neurons, predicted, *_ = (arm.decode.tokens_per_second for arm in summaries)
    continuations, same = compare_texts(samples)
    return Bench(
        tool_version=tool_version(),
        created=now(),
        model=hyper.name,
        file=str(config.file),
        engine=arms[0].facts.engine,
        inputs=setup.inputs,
        hardware=setup.machine.facts,
        versions=setup.versions,
        settings=config.document(),
        **vars(mean_layer(quality.layers)),
        layers=tuple(place_layer(layer, neurons) for layer in quality.layers),
        ppl_dense=quality.ppl_dense,
        ppl_sparse=quality.ppl_sparse,
        ppl_gap=quality.ppl_sparse / quality.ppl_dense - 1,
        ppl_gap_error=quality.standard_error,
        ppl_transformers=quality.ppl_transformers,
        ppl_threads=quality.ppl_threads,
        context=setup.context,
        text=text_source(config),
        tokens_per_second=predicted,
        tokens_per_second_dense=all_neurons,
        speedup=over_all.ratio,
        arms=summaries,
        speedups=tuple(speedups),
        samples=rows,
        continuations=continuations,
        greedy_text_same=same,
        prompts=len(setup.prompts),
        placement=place(setup.file, hyper, neurons, setup.vram_budget, setup.room),
        hot_neurons=frequency_curve(neurons),
        warnings=(),
    )


def expect(setup: Setup, measured: Bench) -> tuple[Expectation | None, str | None]:
    """Return the cost model's estimate for `--hardware`, if it is named, or why there is none."""
    config = setup.config
    if config.hardware is None:
        return None, None
    from powerinfer_bridge.estimate.run import estimate
    from powerinfer_bridge.estimate.settings import EstimateConfig

    this = config.hardware == THIS  # is measured only now
    gpu = bool(setup.machine.gpus) if this else load_hardware(config.hardware).gpu is not None
    settings = EstimateConfig(
        file=config.file,
        hardware=config.hardware,
        bench=Path(BENCH.name),
        context=setup.room,
        vram_budget=config.vram_budget if gpu else None,
        threads=config.threads,
    )
    try:
        found = estimate(settings, measured)
    except PspError as error:  # what was measured is worth more
        return None, str(error)
    speeds = dict[str, float | None](found.tokens_per_second)
    return Expectation(hardware=found.hardware, tokens_per_second=speeds), None


def samples_csv(samples: Sequence[SampleRow]) -> str:
    """Return the samples as RFC 4180 has them, a row each; what is not known is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(SampleRow)])
    writer.writeheader()
    writer.writerows(map(plain, samples))
    return buffer.getvalue()
