"""`bench.json` of `psp bench-powerinfer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from common.typed_json import AtLeastOne, Count, Misfit, Positive, Range, Share
from results.parts import (
    Amount,
    HotNeurons,
    Layer,
    MachineFacts,
    Quartiles,
    Ratio,
    RatioOver,
    ResultFile,
    Speed,
    Speeds,
)

ArmName = Literal[
    "predicted",
    "all_neurons",
    "second_engine",
    "dense_powerinfer",
    "dense_llama_cpp",
    "dense_llama_cpp_silu",
]
PREDICTED: Final = "predicted"
ALL_NEURONS: Final = "all_neurons"
SECOND: Final = "second_engine"
"""The model in PowerInfer's second engine, which skips neurons whose gate is not above 0."""
DENSE_POWERINFER: Final = "dense_powerinfer"
DENSE_LLAMA_CPP: Final = "dense_llama_cpp"
DENSE_LLAMA_CPP_SILU: Final = "dense_llama_cpp_silu"
"""The same weights in llama.cpp as arch `llama`: for what the experts' graph costs."""

POWERINFER, LLAMA_CPP, EMBEDDED = "PowerInfer", "llama.cpp", "embedded engine"
SECOND_ENGINE = "PowerInfer's second engine"
"""Engines."""

DAMAGE = 0.01
"""Of the perplexity, from which what several threads write counts as another text."""

SAMPLES = "bench.csv"


@dataclass(frozen=True, kw_only=True)
class RoundSpeeds(Speed):
    """Tokens per second over rounds.

    Attributes:
        range: slowest and fastest round.
        rounds: how many there were.
    """

    range: Quartiles
    rounds: Annotated[int, Range(1)]


@dataclass(frozen=True, kw_only=True)
class ArmFacts:
    """What is timed, from the first run to the last.

    Attributes:
        title: for readers.
        engine: `POWERINFER`, `SECOND_ENGINE`, `LLAMA_CPP` or `EMBEDDED`.
        file: what it ran.
        element_type: type of most of the file's bytes.
        threads: CPU threads.
        n_gpu_layers: layers offloaded, None where neurons are placed instead.
        vram_budget_bytes: VRAM that PowerInfer might take, None for its own choice.
        threshold: replaced the file's; None kept it.
    """

    name: ArmName
    title: str
    engine: str
    file: str
    element_type: str
    threads: Count
    n_gpu_layers: Count | None = None
    vram_budget_bytes: Count | None = None
    threshold: float | None = None

    @property
    def dense(self) -> bool:
        """Whether it runs a dense file."""
        return self.name.startswith("dense")


@dataclass(frozen=True, kw_only=True)
class Arm(ArmFacts):
    """One of the things that were timed against each other.

    Attributes:
        decode: speed of decoding.
        perplexity: of another file in its own program, None where that was not measured; of the
            sparse file the benchmark has it.
        ffn_bytes_ratio: FFN bytes that the second engine reads, over all; None of others.
        prompt: speed of reading the prompt, None where it was not measured.
        speedup: over all neurons; None of that arm itself.
        load_seconds: reading the file, median; None if not told.
        command: the program and its arguments; empty of the embedded engine.
        environment: variables that were set for it.
        notes: what the program said that a reader must know.
        device: what it said about devices.
    """

    decode: RoundSpeeds
    perplexity: Positive | None = None
    ffn_bytes_ratio: Amount | None = None
    prompt: RoundSpeeds | None = None
    speedup: RatioOver | None = None
    load_seconds: float | None = None
    command: tuple[str, ...]
    environment: dict[str, object]
    notes: tuple[str, ...]
    device: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One run of one prompt; its fields are the columns of `bench.csv`.

    Attributes:
        arm: name of what ran.
        round: its round, from 1.
        prompt: number of the prompt, from 0.
    """

    arm: str
    round: Count
    prompt: Count
    decode_seconds: Positive
    decode_tokens: Count
    prompt_seconds: Positive | None = None
    prompt_tokens: Count | None = None
    load_seconds: float | None = None
    wall_seconds: float
    text_sha256: str | None = None

    def __post_init__(self) -> None:
        """Refuse seconds without their tokens."""
        if self.prompt_seconds is not None and self.prompt_tokens is None:
            raise Misfit("prompt_tokens", "a whole number, as prompt_seconds is known")


@dataclass(frozen=True, kw_only=True)
class BenchLayer(Layer):
    """One layer's metrics, and its shares on the GPU; None without a GPU index or statistics."""

    activation_share_on_gpu: Share | None = None
    neuron_share_on_gpu: Share | None = None


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file or text that was read, told by content."""

    role: str
    path: str
    bytes: Count
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of what measured; None for what did not, or does not tell."""

    psp: str
    python: str
    torch: str
    powerinfer: str | None = None
    second_engine: str | None = None
    llama_cpp: str | None = None


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device holds: bytes by part."""

    name: str
    bytes: dict[str, Count]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which device holds what; the budget is None for the CPU alone."""

    budget_bytes: Count | None = None
    devices: tuple[Device, ...]


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """What predicted and all neurons made of the first prompt."""

    sparse: str
    dense: str


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the cost model expects."""

    hardware: str
    tokens_per_second: Speeds


@dataclass(frozen=True, kw_only=True)
class Warned:
    """What a reader must know before believing it."""

    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark, in the glossary's words.

    Attributes:
        created: when, in UTC.
        model: its name.
        file: what was measured.
        engine: what ran it.
        settings: the command's.
        layers: metrics by the embedded engine; at the top are their means.
        ppl_dense: perplexity with all neurons.
        ppl_sparse: with predicted ones.
        ppl_gap: the second over the first, less 1.
        ppl_gap_error: standard error of the logarithm of the second over the first, by how windows
            differ; None where unknown.
        ppl_transformers: of the checkpoint, None if not measured.
        ppl_threads: with predicted neurons and the threads that speed was measured with; None where
            `ppl_sparse` was measured with as many.
        context: tokens of a perplexity window.
        text: what perplexity was measured on.
        tokens_per_second: of predicted neurons, median.
        tokens_per_second_dense: of all neurons.
        speedup: the first over the second.
        speedups: of predicted neurons over every other arm.
        greedy_text_same: whether predicted neurons leave all continuations as they are.
        prompts: how many.
        estimate: for `--hardware`; None without, or where there can be none.
    """

    kind: Literal["psp.bench"] = "psp.bench"
    schema_version: Literal[1] = 1
    tool_version: str
    created: str
    model: str
    file: str
    engine: str
    inputs: tuple[Input, ...]
    hardware: MachineFacts
    versions: Versions
    settings: dict[str, object]
    activation_sparsity: Share
    activation_recall: Share
    precision: Share
    predicted_sparsity: Share
    ffn_bytes_ratio: Amount
    layers: tuple[BenchLayer, ...]
    ppl_dense: Positive
    ppl_sparse: Positive
    ppl_gap: float
    ppl_gap_error: Amount | None = None
    ppl_transformers: Positive | None = None
    ppl_threads: Positive | None = None
    context: Count
    text: str
    tokens_per_second: Positive
    tokens_per_second_dense: Positive
    speedup: Positive
    arms: Annotated[tuple[Arm, ...], AtLeastOne("arm")]
    speedups: tuple[Ratio, ...]
    samples: tuple[SampleRow, ...]
    continuations: Continuations
    greedy_text_same: bool | None = None
    prompts: Count
    placement: Placement | None = None
    hot_neurons: HotNeurons | None = None
    estimate: Expectation | None = None
    warnings: tuple[Warned, ...]

    def arm(self, name: str) -> Arm | None:
        """Return an arm, None if it was not measured."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def fastest_dense(self) -> Arm | None:
        """Return the dense arm that decodes fastest, None if none was measured."""
        dense = [arm for arm in self.arms if arm.dense]
        return max(dense, key=lambda arm: arm.decode.tokens_per_second, default=None)

    @property
    def damage(self) -> float | None:
        """Perplexity as timed over that of exact sums, less 1; None where it is the same figure."""
        return None if self.ppl_threads is None else self.ppl_threads / self.ppl_sparse - 1

    @property
    def experts_cost(self) -> float | None:
        """Speed of llama.cpp's graph of experts over its arch llama's; None if not measured."""
        ours, theirs = self.arm(DENSE_LLAMA_CPP), self.arm(DENSE_LLAMA_CPP_SILU)
        if ours is None or theirs is None:
            return None
        return ours.decode.tokens_per_second / theirs.decode.tokens_per_second

    def over(self, name: str) -> Ratio | None:
        """Return how many times as fast predicted neurons are as another arm."""
        pair = (PREDICTED, name)
        return next((each for each in self.speedups if (each.arm, each.over) == pair), None)


def round_speeds(
    samples: Sequence[SampleRow], arm: str, phase: Literal["decode", "prompt"]
) -> dict[int, float]:
    """Return an arm's tokens per second by round, Σ tokens / Σ seconds over the prompts.

    A mean of the prompts' rates would weigh a fast prompt's second more than a slow one's. A round
    in which a run did not tell the phase is left out.
    """
    rounds: dict[int, list[tuple[int | None, float | None]]] = {}
    for row in samples:
        if row.arm == arm:
            decode = (row.decode_tokens, row.decode_seconds)
            each = decode if phase == "decode" else (row.prompt_tokens, row.prompt_seconds)
            rounds.setdefault(row.round, []).append(each)
    return {
        number: sum(tokens or 0 for tokens, _ in found) / sum(seconds or 0 for _, seconds in found)
        for number, found in sorted(rounds.items())
        if all(seconds is not None for _, seconds in found)
    }


BENCH = ResultFile(
    name="bench.json",
    maker="psp bench-powerinfer NAME.powerinfer.gguf --out DIR",
    content=Bench,
)
