"""What a reader of a benchmark must know before believing it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from common.units import size
from gguf_files.names import SMALLTHINKER
from powerinfer_bridge.benchmark.setup import Setup
from powerinfer_bridge.programs.build import THRESHOLD_VARIABLE, threshold_told
from results.bench import (
    DAMAGE,
    DENSE_POWERINFER,
    EMBEDDED,
    LLAMA_CPP,
    POWERINFER,
    SECOND,
    Arm,
    Bench,
    Warned,
)

FEW_ROUNDS = 5
"""Quartiles of fewer are guesses."""

PPL_GAP, TRANSFORMERS_GAP = 0.01, 0.01
_ERRORS = 2
"""Standard errors within which a gap is no more than scatter."""

IDLE_LOAD = 0.5
"""Running processes on an otherwise idle machine, over a minute."""

_NO_WARNING = ("GPU index applied", "built without CUDA")
"""Notes of programs that are as they should be, or warned of by themselves."""

Warnings = Iterator[tuple[str, str]]


def find_warnings(
    result: Bench, setup: Setup, estimate_problem: str | None = None
) -> Iterator[Warned]:
    """Yield every warning that applies, the graver first.

    Args:
        result: what was measured.
        setup: with what.
        estimate_problem: why `--hardware` gave no estimate.
    """
    found = (
        _engine(result),
        _gpu_use(result, setup),
        _baselines(result, setup),
        _quality(result, setup, estimate_problem),
        _noise(result, setup),
    )
    for warnings in found:
        yield from (Warned(code=code, text=text) for code, text in warnings)


def _engine(result: Bench) -> Warnings:
    if result.engine == EMBEDDED:
        yield (
            "embedded-engine",
            "embedded engine; its tokens/s are not PowerInfer's (pass --powerinfer-bin)",
        )


def _gpu_use(result: Bench, setup: Setup) -> Warnings:
    if setup.config.vram_budget is not None and setup.programs.cuda is False:
        yield (
            "no-cuda",
            "this PowerInfer was built without CUDA and ignores --vram-budget: all ran on the CPU",
        )
    for arm in result.arms:
        if arm.engine == POWERINFER and arm.n_gpu_layers and setup.programs.cuda is False:
            yield "no-cuda", f"{arm.title}: built without CUDA, -ngl ignored: ran on the CPU"
    if setup.neurons.problem is not None and setup.vram_budget is not None:
        yield "gpu-index-unusable", setup.neurons.problem
    for arm in result.arms:
        for note in arm.notes:
            yield from _note(arm.title, note)


def _note(title: str, note: str) -> Warnings:
    """Warn of what a program said of itself."""
    fate = next((fate for fate in ("rebuilt", "refused") if f"GPU index {fate}" in note), None)
    if fate is not None:
        remedy = "run 'psp gpu-split' for this budget"
        yield f"gpu-index-{fate}", f"{title}: {note}: not the choice of psp; {remedy}"
    elif not any(known in note for known in _NO_WARNING):
        yield "engine-note", f"{title}: {note}"


def _offloads(arm: Arm, setup: Setup) -> int:
    """Return the layers that a dense arm really offloads, as far as its build tells."""
    cuda = setup.programs.llama_cpp_cuda if arm.engine == LLAMA_CPP else setup.programs.cuda
    return 0 if cuda is False else arm.n_gpu_layers or 0


def _baselines(result: Bench, setup: Setup) -> Warnings:
    arms = result.arms
    dense = [arm for arm in arms if arm.dense]
    offloaded = [arm for arm in dense if _offloads(arm, setup) >= len(result.layers)]
    for arm in dense if setup.vram_budget is not None else []:
        if not _offloads(arm, setup):
            yield (
                "cpu-dense-against-hybrid",
                f"{arm.title} ran on the CPU alone, PowerInfer with a GPU: not a fair "
                "comparison; give it layers with -ngl",
            )
    largest = max((gpu.memory_bytes for gpu in result.hardware.gpus), default=0)
    model = next(each.bytes for each in result.inputs if each.role == "model")
    if model <= largest and result.engine != EMBEDDED and not offloaded:
        yield (
            "fits-in-vram",
            f"the model ({size(model)}) fits into the GPU ({size(largest)}): a fair dense "
            "baseline is fully offloaded, pass --llama-cpp-bin and -ngl",
        )
    kinds = {arm.element_type for arm in arms}
    if len(kinds) > 1:
        stated = ", ".join(f"{arm.title}: {arm.element_type}" for arm in arms)
        yield "different-types", f"element types differ, and so do bytes to read: {stated}"
    second = result.arm(SECOND)
    if second is not None and second.threads >= result.hardware.cpus > 1:
        yield (
            "second-engine-spins",
            f"{second.title}: its threads wait for each other at full speed, so what else runs on "
            "this machine slows it down more than others; leave a core free, or take fewer "
            "--threads",
        )
    if len({arm.threads for arm in arms}) > 1:
        stated = ", ".join(f"{arm.title}: {arm.threads}" for arm in arms)
        yield "different-threads", f"threads differ: {stated}"
    programs = setup.programs
    for path in programs.unsure:
        yield (
            "unknown-model",
            f"{path}: it or the sparse file does not say which model it was made from, so nothing "
            "tells that both are of one; only their vocabularies are known to be the same",
        )
    files = {DENSE_POWERINFER: programs.powerinfer_dense, **programs.llama_cpp_files}
    if programs.unused_dense is not None:
        yield (
            "dense-arch",
            f"{programs.unused_dense.path}: of arch {SMALLTHINKER}, for which PowerInfer's dense "
            "mode has no graph, and not measured there; export with --dense-arch llama to time it",
        )
    experts = [
        file for file in programs.llama_cpp_files.values() if file.architecture == SMALLTHINKER
    ]
    if experts and result.experts_cost is None:
        yield (
            "experts-cost",
            "llama.cpp computes ReLU in its graph of experts; what that costs against arch llama "
            "is not measured here (pass a file of --dense-arch llama as --dense-gguf too)",
        )
    for arm in dense:
        file = files.get(arm.name)
        if file is not None and file.architecture == "llama":
            yield (
                "dense-silu",
                f"{arm.title}: computes SiLU, not this model's ReLU; its speed counts, its "
                "text would be wrong",
            )


def _quality(result: Bench, setup: Setup, estimate_problem: str | None) -> Warnings:
    told = setup.machine.threshold
    if told is not None:
        yield (
            "threshold-variable",
            f"{THRESHOLD_VARIABLE} is {threshold_told(told)}: it was left out here, where the "
            f"file's {setup.engine.hyper.threshold:g} counts; a PowerInfer run by hand would take "
            "it, unset it",
        )
    if not setup.engine.hyper.skips_neurons:
        yield (
            "no-predictors",
            "the file has no predictors and skips no neuron: predicted and all neurons are the "
            "same, and their speeds differ by noise",
        )
    threshold = setup.engine.hyper.activation_threshold
    if threshold:
        yield (
            "fatrelu",
            f"the model has FATReLU at {threshold:g}, PowerInfer computes ReLU: "
            "perplexity with all neurons is the unshifted model's",
        )
    if abs(result.ppl_gap) > PPL_GAP:
        error = result.ppl_gap_error
        scatter = error is not None and abs(math.log1p(result.ppl_gap)) < _ERRORS * error
        yield (
            "ppl-gap",
            f"predictors change perplexity by {result.ppl_gap:+.2%}: "
            + (
                "no more than windows differ by; raise --chunks"
                if scatter
                else "the speedup is not at equal quality"
            ),
        )
    if result.damage is not None and abs(result.damage) > DAMAGE:
        yield (
            "threads",
            f"with the {setup.config.threads} threads that were timed perplexity is "
            f"{result.ppl_threads:.4f}, {result.damage:+.2%}: PowerInfer's threads overwrite each "
            f"other's sums (docs/powerinfer.md, Threads); its text is right with -t "
            f"{setup.programs.exact_threads} or a PowerInfer that is mended",
        )
    # With FATReLU transformers compute another model, on purpose.
    own = None if threshold else result.ppl_transformers
    if own is not None and abs(result.ppl_dense / own - 1) > TRANSFORMERS_GAP:
        yield (
            "ppl-transformers",
            f"perplexity with all neurons is {result.ppl_dense:.4f}, in transformers "
            f"{own:.4f}: the file does not compute what the checkpoint does, see 'psp verify'",
        )
    if not result.greedy_text_same:
        yield "texts-differ", "greedy texts with predicted and with all neurons differ"
    elif not (result.continuations.sparse + result.continuations.dense).strip():
        yield (
            "blank-text",
            "the greedy text is blank, so that it is the same says nothing; pass another --prompt",
        )
    if estimate_problem is not None:
        yield "no-estimate", f"no estimate: {estimate_problem}"


def _noise(result: Bench, setup: Setup) -> Warnings:
    # Figures of the embedded engine mean nothing, so neither does their noise.
    real = {arm.name for arm in result.arms if arm.engine != EMBEDDED}
    titles: dict[str, str] = {arm.name: arm.title for arm in result.arms}
    for each in result.speedups:
        low, high = each.quartiles
        if {each.arm, each.over} <= real and low <= 1 <= high:
            yield (
                "spread",
                f"no effect beyond the spread: against {titles[each.over]} the quartiles of "
                f"the speedup are {low:.3f} and {high:.3f}; more --repeats, longer -n",
            )
    if not real:
        return
    if setup.config.repeats < FEW_ROUNDS:
        yield (
            "few-rounds",
            f"rounds: {setup.config.repeats}; quartiles of fewer than {FEW_ROUNDS} are "
            "guesses; raise --repeats",
        )
    threads = max(arm.threads for arm in result.arms)
    if threads > result.hardware.cpus:
        yield (
            "more-threads-than-cores",
            f"{threads} threads on {result.hardware.cpus} cores: they wait for each other; lower "
            "--threads",
        )
    if setup.machine.load > IDLE_LOAD:
        yield (
            "busy-machine",
            f"the machine was busy before the benchmark (load {setup.machine.load:.2f}): stop "
            "other work and measure again",
        )
