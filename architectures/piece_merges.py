"""Merges that find SentencePiece's ids: its BPE joins the pair whose piece scores highest."""

from __future__ import annotations

from collections.abc import Iterable


def merges_by_score(pieces: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a piece, in the order in which they are joined.

    Args:
        pieces: text and score of those that are joined, by rising id, which decides between equal
            scores; no control, unknown or byte pieces.
    """
    order = {piece: (-score, number) for number, (piece, score) in enumerate(pieces)}
    pairs = [
        (*rank, order[piece[:at]][1], order[piece[at:]][1], (piece[:at], piece[at:]))
        for piece, rank in order.items()
        for at in range(1, len(piece))
        if piece[:at] in order and piece[at:] in order
    ]
    return [pair for *_, pair in sorted(pairs)]
