"""What was measured, as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METRICS = (
    "activation_sparsity",
    "activation_recall",
    "precision",
    "predicted_sparsity",
    "ffn_bytes_ratio",
)
ARMS = ("predicted", "all_neurons", "dense_powerinfer", "dense_llama_cpp")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Tokens per second over the rounds of a run.

    Attributes:
        median: of the rounds.
        quartiles: the middle half lies between them.
        samples: each round's own figure, in order; may be empty.
        rounds: how many there were.
    """

    median: float
    quartiles: tuple[float, float]
    samples: tuple[float, ...]
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that were timed against each other.

    Attributes:
        name: one of `ARMS`.
        decode: speed of decoding.
        prompt: speed of reading the prompt, None where it was not measured.
        notes: what the program said that a reader must know.
        facts: whatever else the result says about it.
    """

    name: str
    decode: Spread
    prompt: Spread | None
    notes: tuple[str, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast one arm decodes as another."""

    arm: str
    over: str
    ratio: float
    quartiles: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's metrics, by the names in `METRICS`."""

    number: int
    rank: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class HotNeurons:
    """Shares of all activations that the most often active neurons make.

    Attributes:
        curve: shares of neurons, ascending, and of activations.
        on_gpu: the shares on the GPU, None without a GPU split.
    """

    curve: tuple[tuple[float, ...], tuple[float, ...]]
    on_gpu: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A result of `psp bench-powerinfer`.

    Attributes:
        metrics: the predicted model's, by the names in `METRICS`.
        perplexity: by arm, and under `transformers` if measured.
        gap: the predicted model's perplexity over that with all neurons, less 1.
        devices: bytes by part, by device.
        estimate: tokens per second by arm, and the hardware they are for.
        warnings: one line each.
        facts: the result as it stands.
    """

    model: str
    engine: str
    metrics: Mapping[str, float]
    layers: tuple[Layer, ...]
    perplexity: Mapping[str, float]
    gap: float
    arms: tuple[Arm, ...]
    speedups: tuple[Ratio, ...]
    same_text: bool | None
    hot: HotNeurons | None
    devices: Mapping[str, Mapping[str, float]]
    estimate: Estimate | None
    warnings: tuple[str, ...]
    facts: Mapping[str, Any]

    def arm(self, name: str) -> Arm | None:
        """Return an arm, None if it was not measured."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def speedup(self, over: str) -> Ratio | None:
        """Return how many times as fast the predicted model is as another arm."""
        pairs = (("predicted", over) == (each.arm, each.over) for each in self.speedups)
        return next(
            (each for each, wanted in zip(self.speedups, pairs, strict=True) if wanted), None
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the cost model expects.

    Attributes:
        hardware: what it is for.
        tokens_per_second: by `dense`, `all_neurons`, `predicted`.
    """

    hardware: str
    tokens_per_second: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Predictors:
    """A report of `psp train-predictor`.

    Attributes:
        layers: metrics of each layer on held-out traces.
        points: what the search explored: FFN bytes ratio, perplexity gap, whether chosen.
        hot: of all layers together, None if no neuron was ever active.
        facts: the report's settings.
    """

    model: str
    layers: tuple[Layer, ...]
    points: tuple[tuple[float, float, bool], ...]
    hot: HotNeurons | None
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one directory holds; each result may be missing, not all of them.

    Attributes:
        name: tells the run from the others on the page.
        path: the directory as given.
        density: a result of the density benchmark, checked, as it stands.
    """

    name: str
    path: str
    bench: Bench | None
    predictors: Predictors | None
    estimate: Estimate | None
    density: Mapping[str, Any] | None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the benchmark, or else of the predictors' report."""
        if self.bench is not None:
            return self.bench.layers
        return self.predictors.layers if self.predictors is not None else ()

    @property
    def hot(self) -> HotNeurons | None:
        """Activation shares of the benchmark, or else of the predictors' report."""
        if self.bench is not None and self.bench.hot is not None:
            return self.bench.hot
        return self.predictors.hot if self.predictors is not None else None
