"""`density.json` of `benchmarks/density.py`: speed against the density of predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.typed_json import LEFT_OUT, AtLeastOne, Count, Range, Share
from results.parts import MachineFacts, Ratio, ResultFile, Speed, Speeds


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the models."""

    d_model: Count
    d_ff: Count
    n_heads: Count
    n_layers: Count
    rank: Count
    seed: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One density.

    Attributes:
        density: share of neurons predicted.
        density_wanted: before it was rounded to whole neurons.
        dense: of the dense file in PowerInfer; None if not measured.
        predicted: of predicted neurons.
        all_neurons: of all neurons in the same engine.
        dense_llama_cpp: of the dense file in llama.cpp.
        speedup: of predicted over all neurons.
        estimate: what the cost model expects; None if not asked for.
        ppl_gap: perplexity of predicted over that of all neurons, less 1.
        greedy_text_same: whether both continue texts alike.
    """

    density: Share
    density_wanted: float
    dense: Speed | None = None
    predicted: Speed
    all_neurons: Speed
    dense_llama_cpp: Speed | None = field(default=None, metadata=LEFT_OUT)
    speedup: Ratio
    estimate: Speeds | None = None
    ppl_gap: float
    greedy_text_same: bool


@dataclass(frozen=True, kw_only=True)
class Density:
    """A sweep over densities.

    Attributes:
        shape: of the models.
        hardware: what ran them.
        threads: CPU threads.
        settings: what all points share.
        points: by ascending density.
    """

    kind: Literal["psp.density"] = "psp.density"
    schema_version: Literal[1] = 1
    tool_version: str
    shape: Shape
    hardware: MachineFacts
    threads: Annotated[int, Range(1)]
    settings: dict[str, object]
    points: Annotated[tuple[Point, ...], AtLeastOne("point")]


DENSITY = ResultFile(
    name="density.json",
    maker="python benchmarks/density.py --powerinfer-bin DIR --tokenizer FILE --out DIR",
    content=Density,
)
