"""`report.json` of `psp train-predictor --report`: what predictors do on held-out documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.typed_json import LEFT_OUT, AtLeastOne, Count, Range, Share
from results.parts import Amount, HotNeurons, Layer, Metrics, ResultFile


@dataclass(frozen=True, kw_only=True)
class PredictorMetrics(Metrics):
    """Metrics on held-out tokens, defined in `predictor.reporting.metrics`.

    Attributes:
        missed_importance: not in the file where the traces hold no importance, as the next.
    """

    average_precision: Share | None = field(default=None, metadata=LEFT_OUT)
    missed_importance: Share | None = field(default=None, metadata=LEFT_OUT)
    ffn_output_error: Amount | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class PredictorLayer(PredictorMetrics, Layer):
    """One layer's metrics.

    Attributes:
        type: that its predictor is stored in; None of predictors of an older psp.
        bytes_with_predictor: FFN bytes ratio of a dense layer with its predictor, at the others'
            price: it is computed whole instead. None of other layers.
    """

    type: str | None = field(default=None, metadata=LEFT_OUT)
    bytes_with_predictor: Amount | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """An operating point that the search explored.

    Attributes:
        price: of a computed neuron.
        ffn_bytes_ratio: mean over layers, by the rows that thresholds were chosen on.
        ppl_dense: the model's own perplexity; None where not measured, as the next four.
        ppl_sparse: with predictors in place.
        ppl_gap: measured growth of perplexity.
        kl_divergence: see `predictor.thresholds.predicted_model.Quality`.
        standard_error: likewise.
        chosen: whether the predictors have it.
    """

    price: float
    ffn_bytes_ratio: Amount
    ppl_dense: float | None = None
    ppl_sparse: float | None = None
    ppl_gap: Annotated[float, Range(-1)] | None = None
    kl_divergence: float | None = None
    standard_error: float | None = None
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One layer under one threshold; the last two as in `PredictorMetrics`.

    Attributes:
        chosen: whether it is the exported threshold.
        density: share of neurons computed.
    """

    layer: Count
    chosen: bool
    threshold: float
    density: Share
    recall: Share
    missed_importance: Share | None = field(default=None, metadata=LEFT_OUT)
    ffn_output_error: Amount | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class HotShare:
    """What a share of the most often active neurons makes of a layer's activations."""

    layer: int | Literal["all"]
    neuron_share: Share
    activation_share: Share


@dataclass(frozen=True, kw_only=True)
class EpochPoint:
    """How the training of a layer went, see `predictor.artifact.Epoch`; the first epoch is 1."""

    layer: Count
    epoch: Annotated[int, Range(1)]
    loss: Amount
    held_out_loss: Amount
    held_out_error: Share


@dataclass(frozen=True, kw_only=True)
class PredictorReport:
    """A report on predictors.

    Attributes:
        model: whose predictors they are.
        recipe: settings of training.
        threshold: the exported one.
        held_out_tokens: tokens that everything was measured on.
        average_precision_tokens: at most so many for average precision.
        predictor_type: element type that was asked for; `auto` lets each layer have its own.
        outtype: element type of the model, relative to whose bytes predictors' are counted; None
            of an older psp, which counted by float16's.
        mean: of the layers' metrics.
        search: what was explored; may be empty.
        curves: each layer under other thresholds, by ascending threshold.
        hot_neurons: each layer that is ever active, and all together.
        epochs: of every layer, in order; none of predictors of an older psp.
        worth: in which layers a predictor is worth its bytes, a sentence; None of an older psp.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    model: str
    recipe: dict[str, object]
    threshold: float
    held_out_tokens: Count
    average_precision_tokens: Count
    predictor_type: str
    mean: PredictorMetrics
    layers: Annotated[tuple[PredictorLayer, ...], AtLeastOne("layer")]
    search: tuple[SearchPoint, ...]
    curves: tuple[CurvePoint, ...]
    hot_neurons: tuple[HotShare, ...]
    epochs: tuple[EpochPoint, ...] = ()
    outtype: str | None = field(default=None, metadata=LEFT_OUT)
    worth: str | None = field(default=None, metadata=LEFT_OUT)

    def hot(self, layer: int | Literal["all"] = "all") -> HotNeurons | None:
        """Return a layer's curve, or that of all together; None if no neuron was ever active."""
        rows = [row for row in self.hot_neurons if row.layer == layer]
        if not rows:
            return None
        return HotNeurons(
            neuron_share=tuple(row.neuron_share for row in rows),
            activation_share=tuple(row.activation_share for row in rows),
        )


PREDICTORS = ResultFile(
    name="report.json",
    maker="psp train-predictor --traces DIR --out DIR --report DIR",
    content=PredictorReport,
)
