"""How predictors are trained: the published recipe and ours, as plain settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.errors import PredictorError
from predictor.training.settings import RANK_MULTIPLE


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
    scale_rate: bool
    cosine: bool
    weight_decay: float
    batch: int
    best_recall: bool
    stop_recall: float
    patience: int

    def with_pairs(self) -> Recipe:
        """Return the recipe that starts at pairs, which takes four times the epochs."""
        if self.start != "constant":
            return self
        return replace(self, start="pairs", epochs=4 * self.epochs)


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
    epochs=2,
    learning_rate=1e-2,
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


def published_rank(d_model: int) -> int:
    """Return the rank of `DEJAVU`: a quarter of d_model, cut to one that PowerInfer can run."""
    quarter = d_model // 4
    return max(RANK_MULTIPLE, quarter - quarter % RANK_MULTIPLE)


def recipe_named(name: str) -> Recipe:
    """Return a recipe.

    Raises:
        PredictorError: unknown name.
    """
    if name not in RECIPES:
        raise PredictorError(f"recipe {name!r} is unknown", f"choose from {', '.join(RECIPES)}")
    return RECIPES[name]
