"""S2 and S3 on the CPU in half types, by two kernels that PyTorch has for another purpose.

An embedding bag looks up rows of a matrix and adds them up, each times a weight. That is S3: the
rows are neurons of `w2t`, the weights are `x1`. Its derivative by the weights is, for every row
looked up, the dot product with the gradient of the sum: that is S2, with `x` for the gradient. Both
read nothing but the rows looked up, take every floating type, and use PyTorch's own threads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from sparse_operators.reference import computes

_SUM = 0
"""Number of mode `sum` in ATen (native/EmbeddingBag.h:EmbeddingBagMode)."""

_GROUP = 32
"""Rows in a bag: few enough to stay in the cache while several tokens use them."""


def up(scores: Tensor, x: Tensor, w1: Tensor, *, threshold: float = 0.0) -> Tensor:
    """S2, as `cpu.up`.

    Source: pytorch@v2.13.0 aten/src/ATen/native/EmbeddingBag.cpp:
    _embedding_bag_per_sample_weights_backward_cpu_template.
    """
    x1 = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    # By neuron, then token: tokens that share a row use it while it is in the cache.
    rows, tokens = computes(scores, threshold).T.nonzero(as_tuple=True)
    if len(rows):
        # Public autograd would compute the sum, S3, first.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, w1, rows, tokens, tokens, _SUM
        )
        x1[tokens, rows] = scores[tokens, rows] * dots
    return x1


def down(x1: Tensor, w2t: Tensor) -> Tensor:
    """S3, as `cpu.down`.

    Source: pytorch@v2.13.0 aten/src/ATen/native/EmbeddingBag.cpp:index_select_scale_add.
    """
    tokens, active = len(x1), x1 != 0
    rows = active.any(0).nonzero().squeeze(1)
    # (groups, t, _GROUP), so that one group's bags follow each other, a bag for each token.
    groups = pad(active[:, rows], (0, -len(rows) % _GROUP)).view(tokens, -1, _GROUP).transpose(0, 1)
    group, token, place = groups.nonzero(as_tuple=True)
    neurons, ends = rows[group * _GROUP + place], groups.sum(-1).flatten().cumsum(0)
    sums = embedding_bag(
        neurons,
        w2t,
        pad(ends, (1, 0)),
        mode="sum",
        per_sample_weights=x1[token, neurons],
        include_last_offset=True,
    )
    return sums.view(-1, tokens, w2t.shape[1]).sum(0)
