"""Where training starts: the best approximation of a low rank of what a perfect predictor computes.

A row is worth reading if its logit exceeds a number that depends on the token alone (`price`).
Fitted linearly on the inputs, that number is a vector u, and the head with u taken from every row
decides by sign, as the engine does. Of it the rank is kept that loses least over the inputs' second
moments. The engine has no biases; what of u stands for a constant lies in the inputs' mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from predictor.head.measure import Text
from predictor.head.price import LinearFit, levelled
from predictor.head.rule import HeadPredictor

_RIDGE = 1e-3
_PART = 4096


@dataclass(frozen=True)
class Moments:
    """Second moments of inputs, factored: `root · rootᵀ`, uncentred, a little damped.

    Attributes:
        root: (d_model, d_model) float32.
        inverse: its inverse.
    """

    root: torch.Tensor
    inverse: torch.Tensor


def moments_of(text: Text) -> Moments:
    """Return the moments of a text's inputs."""
    d_model = text.head.shape[1]
    products = torch.zeros(d_model, d_model, dtype=torch.float64, device=text.head.device)
    for x, _ in text.batches():
        products += (x.T @ x).double()
    products /= len(text.rows)
    products += _RIDGE * products.diagonal().mean() * torch.eye(d_model, device=products.device)
    root = torch.linalg.cholesky(products)
    return Moments(root.float(), torch.linalg.inv(root).float())


@dataclass(frozen=True)
class Wanted:
    """What decides at a price.

    Attributes:
        price: of a row, nats.
        level: (d_model,) float32, to be added to every row of the head.
        least: (d_model,) float32; times an input it is the least logit read, the level added.
    """

    price: float
    level: torch.Tensor
    least: torch.Tensor


def wanted_at(text: Text, price: float) -> Wanted:
    """Fit level and least logit at a price on rows of a text."""
    fit = LinearFit(text.head.shape[1], text.head.device)
    head = text.head.float()
    for x, _ in text.batches():
        fit.add(x, *levelled(x @ head.T, price))
    level, least = fit.solve(_RIDGE)
    return Wanted(price, level, least)


def start_at(head: torch.Tensor, moments: Moments, wanted: Wanted, rank: int) -> HeadPredictor:
    """Return the best predictor of a rank that no training made.

    Args:
        head: (vocab_size, d_model), any floating type.
        moments: of the inputs.
        wanted: what it should decide.
        rank: hidden units, at most d_model.
    """
    moved = wanted.level - wanted.least
    gram = torch.zeros_like(moments.root)
    for rows in torch.split(head, _PART):
        part = (rows.float() + moved) @ moments.root
        gram += part.T @ part
    directions = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    fc1 = directions.T @ moments.inverse
    turned = moments.root @ directions
    fc2 = torch.cat([(rows.float() + moved) @ turned for rows in torch.split(head, _PART)])
    return HeadPredictor(fc1.contiguous(), fc2)
