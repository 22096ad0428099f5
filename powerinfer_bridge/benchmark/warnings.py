"""What a reader of a benchmark must know before believing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from powerinfer_bridge.benchmark.arms import ALL_NEURONS, EMBEDDED, PREDICTED
from powerinfer_bridge.benchmark.machine import Machine

FEW_ROUNDS = 5
"""Quartiles of fewer are guesses."""

PPL_GAP, TRANSFORMERS_GAP = 0.01, 0.01
IDLE_LOAD = 0.5
"""Running processes on an otherwise idle machine, over a minute."""

_NO_WARNING = ("GPU index applied", "built without CUDA")
"""Notes of programs that are as they should be, or warned of by themselves."""

_GIB = 1 << 30
Warned = Iterator[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the document does not say.

    Attributes:
        machine: with its load before the benchmark.
        n_layers: the model's blocks.
        cuda: whether PowerInfer was built with CUDA, None if unknown or it does not run.
        vram_budget: VRAM that PowerInfer takes, None where it uses no GPU.
        model_bytes: of the sparse file.
        activation_threshold: FATReLU's, 0 for ReLU.
        index_problem: what is wrong with the GPU index.
        dense_architectures: `general.architecture` of the dense arms' files, by arm.
        estimate_problem: why `--hardware` gave no estimate.
        llama_cpp_cuda: as `cuda`, of llama.cpp.
    """

    machine: Machine
    n_layers: int
    cuda: bool | None = None
    vram_budget: int | None = None
    model_bytes: int = 0
    activation_threshold: float = 0.0
    index_problem: str | None = None
    dense_architectures: Mapping[str, str] = field(default_factory=dict)
    llama_cpp_cuda: bool | None = None
    estimate_problem: str | None = None


def find_warnings(document: Mapping[str, Any], around: Circumstances) -> list[dict[str, str]]:
    """Return every warning that applies, the graver first.

    Args:
        document: the benchmark's, all but its warnings.
        around: what else decides them.
    """
    found = [
        *_engine(document),
        *_gpu_use(document, around),
        *_baselines(document, around),
        *_quality(document, around),
        *_noise(document, around),
    ]
    return [{"code": code, "text": text} for code, text in found]


def _engine(document: Mapping[str, Any]) -> Warned:
    if document["engine"] == EMBEDDED:
        yield (
            "embedded-engine",
            "embedded engine; its tokens/s are not PowerInfer's (pass --powerinfer-bin)",
        )


def _gpu_use(document: Mapping[str, Any], around: Circumstances) -> Warned:
    if document["settings"]["vram_budget"] is not None and around.cuda is False:
        yield (
            "no-cuda",
            "this PowerInfer was built without CUDA and ignores --vram-budget: all ran on the CPU",
        )
    for arm in document["arms"]:
        if arm["engine"] == "PowerInfer" and arm["n_gpu_layers"] and around.cuda is False:
            yield "no-cuda", f"{arm['title']}: built without CUDA, -ngl ignored: ran on the CPU"
    if around.index_problem is not None and around.vram_budget is not None:
        yield "gpu-index-unusable", around.index_problem
    for arm in document["arms"]:
        for note in arm["notes"]:
            yield from _note(arm["title"], note)


def _note(title: str, note: str) -> Warned:
    """Warn of what a program said of itself."""
    fate = next((fate for fate in ("rebuilt", "refused") if f"GPU index {fate}" in note), None)
    if fate is not None:
        remedy = "run 'psp gpu-split' for this budget"
        yield f"gpu-index-{fate}", f"{title}: {note}: not the choice of psp; {remedy}"
    elif not any(known in note for known in _NO_WARNING):
        yield "engine-note", f"{title}: {note}"


def _offloads(arm: Mapping[str, Any], around: Circumstances) -> int:
    """Return the layers that a dense arm really offloads, as far as its build tells."""
    cuda = around.llama_cpp_cuda if arm["engine"] == "llama.cpp" else around.cuda
    return 0 if cuda is False else arm["n_gpu_layers"] or 0


def _baselines(document: Mapping[str, Any], around: Circumstances) -> Warned:
    arms = {arm["name"]: arm for arm in document["arms"]}
    dense = [arm for name, arm in arms.items() if name not in (PREDICTED, ALL_NEURONS)]
    offloaded = [arm for arm in dense if _offloads(arm, around) >= around.n_layers]
    for arm in dense if around.vram_budget is not None else []:
        if not _offloads(arm, around):
            yield (
                "cpu-dense-against-hybrid",
                f"{arm['title']} ran on the CPU alone, PowerInfer with a GPU: not a fair "
                "comparison; give it layers with -ngl",
            )
    largest = max((gpu.memory_bytes for gpu in around.machine.gpus), default=0)
    if around.model_bytes <= largest and document["engine"] != EMBEDDED and not offloaded:
        yield (
            "fits-in-vram",
            f"the model ({around.model_bytes / _GIB:.1f} GiB) fits into the GPU "
            f"({largest / _GIB:.1f} GiB): a fair dense baseline is fully offloaded, pass "
            "--llama-cpp-bin and -ngl",
        )
    kinds = {arm["element_type"] for arm in arms.values()}
    if len(kinds) > 1:
        stated = ", ".join(f"{arm['title']}: {arm['element_type']}" for arm in arms.values())
        yield "different-types", f"element types differ, and so do bytes to read: {stated}"
    if len({arm["threads"] for arm in arms.values()}) > 1:
        stated = ", ".join(f"{arm['title']}: {arm['threads']}" for arm in arms.values())
        yield "different-threads", f"threads differ: {stated}"
    for arm in dense:
        if around.dense_architectures.get(arm["name"]) == "llama":
            yield (
                "dense-silu",
                f"{arm['title']}: computes SiLU, not this model's ReLU; its speed counts, its "
                "text would be wrong",
            )


def _quality(document: Mapping[str, Any], around: Circumstances) -> Warned:
    if around.activation_threshold:
        yield (
            "fatrelu",
            f"the model has FATReLU at {around.activation_threshold:g}, PowerInfer computes ReLU: "
            "perplexity with all neurons is the unshifted model's",
        )
    if abs(document["ppl_gap"]) > PPL_GAP:
        yield (
            "ppl-gap",
            f"predictors change perplexity by {document['ppl_gap']:+.2%}: the speedup is not at "
            "equal quality",
        )
    # With FATReLU transformers compute another model, on purpose.
    own = None if around.activation_threshold else document["ppl_transformers"]
    if own is not None and abs(document["ppl_dense"] / own - 1) > TRANSFORMERS_GAP:
        yield (
            "ppl-transformers",
            f"perplexity with all neurons is {document['ppl_dense']:.4f}, in transformers "
            f"{own:.4f}: the file does not compute what the checkpoint does, see 'psp verify'",
        )
    if not document["greedy_text_same"]:
        yield "texts-differ", "greedy texts with predicted and with all neurons differ"
    elif not "".join(document["continuations"].values()).strip():
        yield (
            "blank-text",
            "the greedy text is blank, so that it is the same says nothing; pass another --prompt",
        )
    if around.estimate_problem is not None:
        yield "no-estimate", f"no estimate: {around.estimate_problem}"


def _noise(document: Mapping[str, Any], around: Circumstances) -> Warned:
    # Figures of the embedded engine mean nothing, so neither does their noise.
    real = {arm["name"] for arm in document["arms"] if arm["engine"] != EMBEDDED}
    titles = {arm["name"]: arm["title"] for arm in document["arms"]}
    for each in document["speedups"]:
        low, high = each["quartiles"]
        if {each["arm"], each["over"]} <= real and low <= 1 <= high:
            yield (
                "spread",
                f"no effect beyond the spread: against {titles[each['over']]} the quartiles of "
                f"the speedup are {low:.3f} and {high:.3f}; more --repeats, longer -n",
            )
    if not real:
        return
    if document["settings"]["repeats"] < FEW_ROUNDS:
        yield (
            "few-rounds",
            f"rounds: {document['settings']['repeats']}; quartiles of fewer than {FEW_ROUNDS} are "
            "guesses; raise --repeats",
        )
    threads = max(arm["threads"] for arm in document["arms"])
    if threads > around.machine.cpus:
        yield (
            "more-threads-than-cores",
            f"{threads} threads on {around.machine.cpus} cores: they wait for each other; lower "
            "--threads",
        )
    if around.machine.load > IDLE_LOAD:
        yield (
            "busy-machine",
            f"the machine was busy before the benchmark (load {around.machine.load:.2f}): stop "
            "other work and measure again",
        )
