"""What a decoded token reads of a model, and on which device it lies: numbers alone.

A token reads every weight of attention, norms, predictors and output head once, the keys and values
of the tokens before it, and of the FFN the neurons that are computed. The embedding gives one row
and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.typed_json import Misfit, Share

FLOAT_BYTES = 4
"""Activations and logits are F32 (PowerInfer@d3ebd7c ggml.c)."""


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """One layer.

    Attributes:
        attention: bytes of attention's matrices and biases and of all the layer's norms.
        fc1: bytes of the predictor's first matrix; 0 without one.
        fc2: bytes of its second.
        neuron_rows: bytes of a neuron's rows of gate (if there is one) and up.
        neuron_column: bytes of its row of the transposed down matrix.
        d_ff: neurons.
        gated: whether there is a gate.
    """

    attention: int
    fc1: int
    fc2: int
    neuron_rows: int
    neuron_column: int
    d_ff: int
    gated: bool

    @property
    def ffn(self) -> int:
        """Bytes of all neurons."""
        return self.d_ff * (self.neuron_rows + self.neuron_column)

    @property
    def predictor(self) -> int:
        """Bytes of the predictor."""
        return self.fc1 + self.fc2


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """A model.

    Attributes:
        d_model: hidden size.
        n_vocab: rows of the output head.
        layers: its layers.
        head: bytes of the output head and its norm.
        kv_token: bytes that one token keeps in one layer's cache, keys and values together.
    """

    d_model: int
    n_vocab: int
    layers: tuple[LayerBytes, ...]
    head: int
    kv_token: int

    def kv(self, tokens: float) -> float:
        """Return the bytes of one layer's keys and values of `tokens` tokens."""
        return self.kv_token * tokens

    @property
    def dense(self) -> int:
        """Bytes of the weights that the dense model has in memory: all but predictors."""
        return self.head + sum(layer.attention + layer.ffn for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Activity:
    """How many of a layer's neurons are computed.

    Gate and up read the neurons that the predictor lets through; down reads those of them whose
    activation is not zero, because the kernel skips zeros (PowerInfer@d3ebd7c
    ggml.c:ggml_compute_forward_mul_mat_axpy, `src1_ptr[ir1]==0`).

    Attributes:
        predicted: share of neurons that the predictor lets through.
        both: share that is let through and active; at most `predicted`.
        active: share that is active, let through or not; what down reads if all are computed.
    """

    predicted: Share
    both: Share
    active: Share

    def __post_init__(self) -> None:
        """Refuse shares that contradict each other."""
        if self.both > min(self.predicted, self.active):
            raise Misfit("both", "at most predicted and active")

    @property
    def all_neurons(self) -> Activity:
        """The same layer at threshold −1e30: the predictor runs and lets everything through."""
        return Activity(predicted=1.0, both=self.active, active=self.active)


@dataclass(frozen=True, kw_only=True)
class LayerPlace:
    """What of a layer lies in VRAM.

    Attributes:
        attention: share of attention's bytes.
        fc1: whether the predictor's first matrix does.
        fc2: whether its second does.
        neurons: share of the neurons.
        activations: share of all activations that these neurons account for, by the statistics.
    """

    attention: float = 0.0
    fc1: bool = False
    fc2: bool = False
    neurons: float = 0.0
    activations: float = 0.0

    def __post_init__(self) -> None:
        """Hold what callers rely on."""
        for share in (self.attention, self.neurons, self.activations):
            assert 0 <= share <= 1

    def hot(self, computed: float) -> float:
        """Return which share of all neurons is computed on the GPU, of `computed` that are at all.

        Computed neurons fall on the GPU in the proportion of the statistics' activations, as far as
        there are so many on either side: max(computed − cold, min(hot, activations · computed)).
        """
        cold = 1.0 - self.neurons
        return max(computed - cold, min(self.neurons, self.activations * computed))


@dataclass(frozen=True, kw_only=True)
class Place:
    """What of a model lies in VRAM.

    Attributes:
        layers: by layer.
        head: whether the output head does.
        kv: share of the KV cache: 0, 0.5 (values alone) or 1.
    """

    layers: tuple[LayerPlace, ...]
    head: bool = False
    kv: float = 0.0


def on_cpu(n_layers: int) -> Place:
    """Return the place of a model of which nothing lies in VRAM."""
    return Place(layers=(LayerPlace(),) * n_layers)


def dense_offload(model: ModelBytes, budget: float, context: int) -> int:
    """Return the largest llama.cpp `-ngl` whose layers fit.

    Whole layers go to the GPU, the last ones first, each with its part of the KV cache; one more
    than there are layers adds the output head (llama.cpp: `--n-gpu-layers`).

    Args:
        model: the model; predictors are not counted.
        budget: bytes of VRAM.
        context: tokens that the cache has room for.
    """
    left = budget
    for count, layer in enumerate(reversed(model.layers)):
        left -= layer.attention + layer.ffn + model.kv(context)
        if left < 0:
            return count
    return len(model.layers) + (left >= model.head)
