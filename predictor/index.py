"""What `predictors.json` of a predictor artifact holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.element_types import F16
from common.hashing import HashedFile
from common.typed_json import Closed, Count
from results.predictors import SearchPoint


@dataclass(frozen=True, kw_only=True)
class PredictorHeader(Closed):
    """What predictors were made for and from.

    Attributes:
        model: the model as the user named it.
        model_fingerprint: `Checkpoint.fingerprint` of the model whose traces were used.
        architecture: name of the family.
        activation: activation of the FFN.
        n_layers: blocks.
        d_model: hidden size.
        d_ff: neurons in a layer.
        rank: hidden units of every predictor, or how they were to be chosen.
        threshold: a neuron is computed unless its logit is below this; 1 or -1 if each neuron's own
            threshold is folded in.
        traces_identity: `TraceStore.identity` of the traces.
        recipe: settings of the recipe, by name.
        holdout: share of rows held out, by document.
        label_top_fraction: clipping of the training labels, or None.
        seed: seed of the run.
        own_thresholds: each neuron has a threshold of its own, chosen once all layers are trained.
        predictor_type: that all are stored in, or `auto`: each layer has its own.
        outtype: type of the model that they are for, by whose bytes theirs are counted and with
            whose rounding a bound was measured.
    """

    model: str
    model_fingerprint: str
    architecture: str
    activation: str
    n_layers: Count
    d_model: Count
    d_ff: Count
    rank: int | str
    threshold: float
    traces_identity: str
    recipe: dict[str, object]
    holdout: float
    label_top_fraction: float | None
    seed: int
    own_thresholds: bool = False
    predictor_type: str = F16
    outtype: str = F16


@dataclass(frozen=True, kw_only=True)
class Epoch(Closed):
    """How the training of a layer went, told after each pass over the rows.

    Attributes:
        loss: the recipe's, mean over the epoch on rows of every batch.
        held_out_loss: the same after the epoch, on a sample of the held-out rows.
        held_out_error: share of the sample's decisions at threshold 0 that are wrong.
    """

    loss: float
    held_out_loss: float
    held_out_error: float


@dataclass(frozen=True, kw_only=True)
class ArtifactIndex:
    """`predictors.json`, see `predictor.artifact.PredictorArtifact`; dictionaries are by layer."""

    header: PredictorHeader
    ranks: dict[str, int]
    search: tuple[SearchPoint, ...]
    layers: tuple[dict[str, float], ...]
    epochs: dict[str, tuple[Epoch, ...]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    model_files: tuple[HashedFile, ...] = ()
    types: dict[str, str] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    tokens: Count = 0
