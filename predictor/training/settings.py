"""Settings of `psp train-predictor`, and how its recipes train: the published one and ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cluster.settings import RayAddress, RayCpus, RayGpus, Verbose
from common.element_types import ELEMENT_NAMES, ELEMENT_TYPES, F16, Q4_0
from common.errors import PredictorError
from common.settings import (
    MODEL_FORMS,
    Device,
    Force,
    Option,
    Resume,
    Seed,
    check_settings,
    layers_option,
    text_option,
)
from common.text_sources.names import Sources
from common.urls import Url, path_or_url
from predictor.size import Size

AUTO = "auto"
_RATE_OF_PAIRS = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run; one loop serves all recipes.

    Attributes:
        name: name on the command line.
        start: `random`; `pairs`, the gate's truncated SVD as pairs of units; or `constant`, that
            SVD with one unit for what is constant in inputs, which has nearly twice the rank,
            trained in whitened coordinates. It falls back to `pairs` where nothing is constant.
        normalise: train on inputs scaled to unit root mean square. At threshold 0 the decisions of
            a bias-free predictor do not depend on that scale, so it is exported unchanged.
        importance: weight positives by their share of the FFN's output instead of equally.
        importance_power: power of that share. An error grows with its square, 2; training with all
            of that leaves too little to learn from in what is small.
        importance_cap: most that a positive may weigh, relative to the batch's mean.
        negative_weight: weight of a negative relative to the batch's density.
        negative_floor: added to the weight of a negative.
        epochs: passes over the training rows, at most.
        learning_rate: peak rate of AdamW.
        second_decay: of AdamW's mean square of the gradient, β2.
        scale_rate: lower the rate of a matrix in proportion to its fan-in beyond the sizes that the
            rate was tuned at, d_model 512 and rank 128 (maximal update parametrisation, Adam,
            arXiv 2203.03466 table 3).
        cosine: anneal the rate to zero along a cosine instead of keeping it.
        weight_decay: of AdamW.
        batch: rows a step.
        best_recall: keep the epoch with the best holdout recall instead of the last one.
        stop_recall: stop once holdout recall reaches this.
        patience: stop after this many epochs without a better recall.
    """

    name: str
    start: str
    normalise: bool
    importance: bool
    importance_power: float
    importance_cap: float
    negative_weight: float
    negative_floor: float
    epochs: int
    learning_rate: float
    second_decay: float
    scale_rate: bool
    cosine: bool
    weight_decay: float
    batch: int
    best_recall: bool
    stop_recall: float
    patience: int

    def with_pairs(self) -> Recipe:
        """Return the recipe that starts at pairs, which takes eight times the epochs."""
        if self.start != "constant":
            return self
        epochs, rate = 8 * self.epochs, _RATE_OF_PAIRS * self.learning_rate
        return replace(self, start="pairs", epochs=epochs, learning_rate=rate)


DEJAVU = Recipe(
    name="dejavu",
    start="random",
    normalise=False,
    importance=False,
    importance_power=1.0,
    importance_cap=1.0,
    negative_weight=1.0,
    negative_floor=0.005,
    epochs=20,
    learning_rate=1e-3,
    second_decay=0.999,
    scale_rate=False,
    cosine=False,
    weight_decay=0.01,
    batch=1024,
    best_recall=True,
    stop_recall=0.99,
    patience=5,
)
"""The recipe behind ProSparse's published recall and sparsity (DejaVu_predictor): raw residual,
random start, BCE with weight 1 for positives and batch density + 0.005 for negatives, AdamW, best
epoch by recall. Unlike the original, its holdout shares no document with the training rows."""

PSP = Recipe(
    name="psp",
    start="constant",
    normalise=True,
    importance=True,
    importance_power=1.5,
    importance_cap=32.0,
    negative_weight=0.33,
    negative_floor=0.0,
    epochs=1,
    learning_rate=1.5e-2,
    second_decay=0.99,
    scale_rate=True,
    cosine=True,
    weight_decay=0.01,
    batch=256,
    best_recall=False,
    stop_recall=1.0,
    patience=4,
)
"""SVD start, whitened inputs, importance-weighted positives, cosine schedule."""

SVD = replace(PSP, name="svd", epochs=0)
"""No training at all: the start of `psp`, with thresholds chosen by measurement (after arXiv
2603.14110)."""

RECIPES = {recipe.name: recipe for recipe in (PSP, SVD, DEJAVU)}


def published_rank(d_model: int, kind: str = AUTO) -> int:
    """Return the rank of `DEJAVU`: a quarter of d_model, cut to one that PowerInfer can run."""
    quarter, multiple = d_model // 4, ELEMENT_TYPES[F16 if kind == AUTO else kind].row_multiple
    return max(multiple, quarter - quarter % multiple)


def candidate_ranks(d_model: int, kind: str = F16) -> list[int]:
    """Return powers of two times what a type allows, up to a quarter of d_model."""
    ranks = [ELEMENT_TYPES[kind].row_multiple]
    while 2 * ranks[-1] <= d_model // 4:
        ranks.append(2 * ranks[-1])
    return ranks


def possible_sizes(
    config: TrainConfig, d_model: int, layer: int = 0, *, bounded: bool
) -> list[Size]:
    """Return what a layer's predictor may be.

    Types are weighed against each other where a bound says what either is worth. A float16
    predictor of half the lowest rank of Q4_0 takes more bytes than one of that, so it is none of
    them.

    Args:
        config: settings.
        d_model: hidden size.
        layer: number of the layer.
        bounded: whether thresholds are chosen by a bound.
    """
    kinds = [config.predictor_type]
    if config.predictor_type == AUTO:
        coarse = bounded and config.recipe != DEJAVU.name
        fits = d_model % ELEMENT_TYPES[Q4_0].row_multiple == 0
        kinds = [Q4_0, F16] if coarse and fits else [F16]
    if not (ranks := config.fixed_ranks):
        return [Size(kind, rank) for kind in kinds for rank in candidate_ranks(d_model, kinds[0])]
    rank = ranks[layer] if len(ranks) > 1 else ranks[0]
    return [Size(k, rank) for k in kinds if rank % ELEMENT_TYPES[k].row_multiple == 0]


def rank_of(text: str) -> int | str | tuple[int, ...]:
    """Return `auto`, one rank, or one for each layer such as `32,64,64`.

    Raises:
        ValueError: it is neither.
    """
    if text == AUTO:
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise ValueError(f"{text!r} is no rank; write auto, 32, or one for each layer.")
    ranks = tuple(map(int, parts))
    return ranks if len(ranks) > 1 else ranks[0]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training."""

    traces: Annotated[
        Path | Url,
        Option("What psp collect made, on disk or at s3://.", "TRACES", parse=path_or_url),
    ]
    out: Annotated[Path, Option("Directory for the predictors.", "PREDICTORS")]
    recipe: Annotated[
        str,
        Option(
            "psp: ours. svd: without training. dejavu: the published method.",
            choices=tuple(RECIPES),
        ),
    ] = "psp"
    rank: Annotated[
        int | str | tuple[int, ...],
        Option(
            "Hidden units, multiples of 32: chosen, one for all layers, or one for each. With "
            "--recipe dejavu auto is a quarter of the hidden size.",
            "auto|N|N,N,...",
            parse=rank_of,
        ),
    ] = AUTO
    max_ppl_gap: Annotated[
        float | None,
        Option(
            "Skip neurons as far as perplexity grows by no more.",
            above=0,
            unset="0.1% if --rank is auto, else every threshold is 0",
        ),
    ] = None
    ffn_bytes: Annotated[
        float | None,
        Option("Instead: skip neurons until no more of the FFN's bytes is read.", above=0, most=1),
    ] = None
    predictor_type: Annotated[
        str,
        Option(
            "Element type that they are stored in. auto: whichever keeps the bound in fewer bytes, "
            "f16 without a bound.",
            choices=(AUTO, *ELEMENT_NAMES),
        ),
    ] = AUTO
    outtype: Annotated[
        str | None,
        Option(
            "Element type that the model will be exported in: a gap is measured with its rounding, "
            "bytes are relative to it.",
            choices=ELEMENT_NAMES,
            unset="f16; a GGUF model's own",
        ),
    ] = None
    model: Annotated[
        str | None, Option("To measure with.", MODEL_FORMS, unset="the traces' own")
    ] = None
    data: Annotated[
        Sources, text_option("Text to measure on, all of it.", unset="the traces' held-out part")
    ] = ()
    eval_tokens: Annotated[int, Option("Tokens to measure on, at most.", least=64)] = 16384
    device: Device = "auto"
    hardware: Annotated[
        str | None,
        Option(
            "With --rank auto: choose ranks for a model larger than the VRAM of this hardware "
            "(see psp estimate), where predictors' bytes cost less.",
            "NAME|FILE.yaml",
            unset="every byte costs the same",
        ),
    ] = None
    report: Annotated[
        Path | None, Option("Also write metrics, curves and plots to DIR.", "DIR")
    ] = None
    holdout: Annotated[float, Option("Share of rows held out, by document.", above=0, most=0.9)] = (
        0.1
    )
    label_top_fraction: Annotated[
        float | None,
        Option(
            "Train on each token's largest activations only (0.15 is the published clipping).",
            above=0,
            most=1,
        ),
    ] = None
    layers: Annotated[
        tuple[int, ...] | None,
        layers_option("Train these layers only; the rest later, with --resume."),
    ] = None
    precision: Annotated[
        str,
        Option(
            "Of training's matrix products; auto: bfloat16 on a GPU.",
            choices=("auto", "float32", "bfloat16"),
        ),
    ] = "auto"
    jobs: Annotated[
        int,
        Option(
            "Layers trained at once, sharing the threads; 0: one a thread if they are small.",
            least=0,
        ),
    ] = 0
    ray: RayAddress = None
    ray_cpus: RayCpus = 1
    ray_gpus: RayGpus = 0.0
    verbose: Verbose = False
    seed: Seed = 0
    resume: Resume = False
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse settings that no model can have."""
        check_settings(self, PredictorError)
        kind = F16 if self.predictor_type == AUTO else self.predictor_type
        multiple = ELEMENT_TYPES[kind].row_multiple
        for rank in self.fixed_ranks:
            if rank < multiple or rank % multiple:
                raise PredictorError(
                    f"rank {rank} cannot run in PowerInfer in type {kind}",
                    f"use a positive multiple of {multiple}",
                )
        if isinstance(self.rank, str) and self.rank != AUTO:
            raise PredictorError(f"rank {self.rank!r}: pass a number, a list or {AUTO}")
        if self.max_ppl_gap is not None and self.ffn_bytes is not None:
            raise PredictorError("--max-ppl-gap and --ffn-bytes are two bounds", "pass one of them")

    @property
    def fixed_ranks(self) -> tuple[int, ...]:
        """Ranks that were asked for: one for all layers, one for each, or none."""
        if isinstance(self.rank, str):
            return ()
        return (self.rank,) if isinstance(self.rank, int) else self.rank
