"""Random ReGLU LLaMA weights and predictors whose predicted density is exact for every token.

A few coordinates of the residual stream, the marks, carry +1 or -1 from the embedding to the end:
the rows of all output matrices that would write to them are zero. Neurons come in pairs that read
one mark of opposite sign, so every token predicts exactly one of each pair, and which one depends
on the token. As no logit is a sum of more than +1 and -1, no rounding, order of summation, engine
or element type can change a decision. The gate of a paired neuron reads the same mark: predictions
are exact, and all neurons give the same model.

    density <= 1/2   pairs, and neurons that are never predicted, whose gate is zero
    density > 1/2    pairs, and neurons that are always predicted, with an ordinary random gate
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from common.errors import ExportError
from gguf_export.pwri.schema import BLOCK, SMALLEST_D_FF

_BRANCH = 0.5
"""Size of what all attentions, and all FFNs, add up to relative to the embedding: the residual
stream stays finite however many layers there are, and yet every part shows in the logits."""

_SUCCESSOR_LOGIT = 8.0
"""Logit of the likeliest token, about: the others' have a spread near 1 or below."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class FixtureShape:
    """Sizes of a model, LLaMA-7B's with few layers by default, and the density wanted.

    Attributes:
        density: share of the neurons that every token shall predict.
        d_model: hidden size.
        d_ff: neurons in a layer.
        n_heads: attention heads.
        n_layers: blocks.
        rank: hidden units of every predictor, twice the number of marks.
        seed: of all random numbers.
    """

    density: float
    d_model: int = 4096
    d_ff: int = 11008
    n_heads: int = 32
    n_layers: int = 3
    rank: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be built, or what PowerInfer could not run if it were."""
        for key, size in (("d_model", self.d_model), ("rank", self.rank)):
            if size <= 0 or size % BLOCK:
                raise ExportError(f"{key} {size} is no multiple of {BLOCK}", "choose one")
        if self.rank > self.d_model:
            raise ExportError(
                f"rank {self.rank} would mark more than half of d_model {self.d_model}",
                "choose a rank of at most d_model",
            )
        if self.n_heads < 1 or self.d_model % (2 * self.n_heads):
            raise ExportError(
                f"d_model {self.d_model} does not make {self.n_heads} heads of an even size",
                "choose another number of heads",
            )
        if self.n_layers < 1:
            raise ExportError(f"layers {self.n_layers} is no model", "choose 1 or more")
        if self.d_ff < SMALLEST_D_FF:
            raise ExportError(
                f"d_ff {self.d_ff} is below {SMALLEST_D_FF}",
                "PowerInfer computes smaller FFNs wrongly, choose more",
            )
        if not (0 < self.density <= 1 and self.predicted):
            raise ExportError(
                f"density {self.density:g} is outside ({0.5 / self.d_ff:.2g}, 1], which at d_ff "
                f"{self.d_ff} is no neuron or more than all",
                "choose one in between",
            )

    @property
    def predicted(self) -> int:
        """Neurons that every token predicts: `density · d_ff` to the nearest integer."""
        return math.floor(self.density * self.d_ff + 0.5)

    @property
    def exact_density(self) -> float:
        """The density that results, `predicted / d_ff`."""
        return self.predicted / self.d_ff

    @property
    def pairs(self) -> int:
        """Pairs of which one is predicted."""
        return min(self.predicted, self.d_ff - self.predicted)

    @property
    def always(self) -> int:
        """Neurons that every token predicts."""
        return self.predicted - self.pairs

    @property
    def marks(self) -> int:
        """Coordinates of the residual stream that decide."""
        return self.rank // 2


@dataclass(frozen=True)
class Roles:
    """Which neurons of a layer are what, spread at random over d_ff.

    Attributes:
        positive: (pairs,) int64, predicted where their mark is +1.
        negative: (pairs,) int64, their partners, predicted where it is -1.
        always: (always,) int64.
        never: (d_ff - 2 · pairs - always,) int64.
        mark: (pairs,) int64, number of the mark that a pair reads, below `marks`.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    always: torch.Tensor
    never: torch.Tensor
    mark: torch.Tensor


def generator(shape: FixtureShape, *part: int) -> torch.Generator:
    """Return random numbers that belong to one part of the model alone."""
    number = shape.seed
    for value in part:
        number = number * 1_000_003 + value + 1
    return torch.Generator().manual_seed(number % 2**63)


def roles(shape: FixtureShape, layer: int) -> Roles:
    """Draw the roles of a layer's neurons."""
    source = generator(shape, 0, layer)
    order = torch.randperm(shape.d_ff, generator=source)
    rest = shape.d_ff - 2 * shape.pairs - shape.always
    sizes = [shape.pairs, shape.pairs, shape.always, rest]
    positive, negative, always, never = torch.split(order, sizes)
    mark = torch.randint(shape.marks, (shape.pairs,), generator=source)
    return Roles(positive, negative, always, never, mark)


def mark_coordinates(shape: FixtureShape) -> torch.Tensor:
    """Return where the marks are in the residual stream, (marks,) int64; one place for all layers.

    Each layer's pairs read them in a mixture of their own.
    """
    return torch.randperm(shape.d_model, generator=generator(shape, 1))[: shape.marks]


def predictor(shape: FixtureShape, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fc1 (rank, d_model) and fc2 (d_ff, rank), float16, for threshold 0.

    The hidden units are the positive and the negative part of every mark, so logits are the mark
    and its negation for a pair, the number of marks for `always`, and minus that for `never`.
    """
    fc1 = torch.zeros(shape.rank, shape.d_model, dtype=torch.float16)
    units = torch.arange(shape.marks)
    fc1[units, mark_coordinates(shape)] = 1
    fc1[shape.marks + units, mark_coordinates(shape)] = -1
    fc2 = torch.zeros(shape.d_ff, shape.rank, dtype=torch.float16)
    role = roles(shape, layer)
    for neurons, sign in ((role.positive, 1), (role.negative, -1)):
        fc2[neurons, role.mark] = sign
        fc2[neurons, shape.marks + role.mark] = -sign
    fc2[role.always], fc2[role.never] = 1, -1
    return fc1, fc2


def activation_counts(shape: FixtureShape, layer: int, tokens: int = 1000) -> torch.Tensor:
    """Return how often each neuron is predicted in so many tokens on average, (d_ff,) int64."""
    role = roles(shape, layer)
    counts = torch.full((shape.d_ff,), tokens // 2)
    counts[role.always], counts[role.never] = tokens, 0
    return counts


def layer_weights(shape: FixtureShape, layer: int) -> Weights:
    """Return one block's tensors by their name in a LLaMA checkpoint, float16."""
    source, d_model = generator(shape, 2, layer), shape.d_model
    marks, share = mark_coordinates(shape), _BRANCH / math.sqrt(shape.n_layers)

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0, scale, generator=source).half()

    unit = 1 / math.sqrt(d_model)  # keeps the size of what it multiplies
    tensors = {
        **{f"self_attn.{name}_proj": normal(d_model, d_model, unit) for name in "qkv"},
        "self_attn.o_proj": normal(d_model, d_model, share * unit),
        "mlp.gate_proj": torch.zeros(shape.d_ff, d_model, dtype=torch.float16),
        "mlp.up_proj": normal(shape.d_ff, d_model, unit),
        "mlp.down_proj": normal(d_model, shape.d_ff, share / math.sqrt(shape.predicted)),
        "input_layernorm": torch.ones(d_model, dtype=torch.float16),
        "post_attention_layernorm": torch.ones(d_model, dtype=torch.float16),
    }
    tensors["self_attn.o_proj"][marks] = tensors["mlp.down_proj"][marks] = 0
    role, gate = roles(shape, layer), tensors["mlp.gate_proj"]
    gate[role.positive, marks[role.mark]] = 1
    gate[role.negative, marks[role.mark]] = -1
    gate[role.always] = normal(shape.always, d_model, unit)
    return {f"model.layers.{layer}.{name}.weight": tensors[name] for name in tensors}


def outer_weights(shape: FixtureShape, vocab_size: int, ordinary: torch.Tensor) -> Weights:
    """Return embedding, head and last norm, float16.

    The head makes each ordinary token's likeliest successor another one, in a single cycle through
    all of them: greedy text never dwells on a few tokens, whose neurons a cache would hold.

    Args:
        shape: sizes.
        vocab_size: rows of embedding and head.
        ordinary: (n,) int64, ids of tokens that are ordinary text.
    """
    source, marks = generator(shape, 3), mark_coordinates(shape)
    embedding = torch.empty(vocab_size, shape.d_model).normal_(generator=source)
    signs = torch.randint(2, (vocab_size, shape.marks), generator=source)
    embedding[:, marks] = 2.0 * signs - 1
    cycle = ordinary[torch.randperm(len(ordinary), generator=source)]
    head = torch.zeros_like(embedding)
    head[cycle.roll(-1)] = embedding[cycle] * (_SUCCESSOR_LOGIT / shape.d_model)
    norm = torch.ones(shape.d_model)
    named = {"model.embed_tokens": embedding, "lm_head": head, "model.norm": norm}
    return {f"{name}.weight": tensor.half() for name, tensor in named.items()}
