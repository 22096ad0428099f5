"""Documents that training never sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def choose_documents(segments: Sequence[Sequence[int]], share: float, seed: int) -> set[int]:
    """Choose the documents to hold out.

    Args:
        segments: document number and rows of each run of rows, of at least two documents.
        share: share of rows to hold out, at least, unless all documents but one fall short.
        seed: seed of the choice.
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
    return held


def hold_out(segments: Sequence[Sequence[int]], share: float, seed: int) -> torch.Tensor:
    """Return which rows belong to held-out documents, (rows,) bool; see `choose_documents`."""
    held = choose_documents(segments, share, seed)
    chosen = torch.tensor([document in held for document, _ in segments])
    return torch.repeat_interleave(chosen, torch.tensor([rows for _, rows in segments]))
