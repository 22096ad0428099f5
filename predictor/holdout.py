"""The holdout by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def hold_out(segments: Sequence[Sequence[int]], share: float, seed: int) -> torch.Tensor:
    """Choose whole documents.

    Args:
        segments: document number and rows of each run of rows, of at least two documents.
        share: share of rows to hold out, at least, unless all documents but one fall short.
        seed: seed of the choice.

    Returns:
        (rows,) bool, true where the row belongs to a held-out document.
    """
    lengths: dict[int, int] = {}
    for document, rows in segments:
        lengths[document] = lengths.get(document, 0) + rows
    documents = sorted(lengths)
    wanted, held, taken = share * sum(lengths.values()), set(), 0
    for place in np.random.default_rng(seed).permutation(len(documents))[:-1]:
        if taken >= wanted:
            break
        held.add(documents[place])
        taken += lengths[documents[place]]
    chosen = torch.tensor([document in held for document, _ in segments])
    return torch.repeat_interleave(chosen, torch.tensor([rows for _, rows in segments]))
