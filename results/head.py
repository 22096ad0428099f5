"""What a head's predictor does on held-out text, as `head.json` holds it."""

from __future__ import annotations

from dataclasses import dataclass

from common.typed_json import Closed, Count, Positive, Share
from results.parts import Amount


@dataclass(frozen=True, kw_only=True)
class HeadPoint(Closed):
    """A predictor of a head, measured with the engine's rule: rows that are left out have logit 0.

    Attributes:
        method: `psp`; `svd`, without training; or what no file holds: `oracle`, the rows that all
            logits name, and `frequency`, the rows most used in the training text, always the same.
        rank: hidden units; 0 of the last two.
        price: of a row, by which rows were chosen; 0 of `frequency`.
        rows_read: share of the head's rows that a token reads.
        predictor_share: bytes of the predictor relative to the head's, both in Q4_0.
        ppl_head: perplexity with all rows of the model's own head in Q4_0.
        ppl_levelled: with all rows of the head that the predictor goes with, in Q4_0: the same but
            for how it is rounded.
        ppl_predicted: with those of its rows that are read.
        standard_error: of the logarithm of the growth, tokens taken as drawn alone.
        kl_divergence: mean of KL(all rows ‖ rows read), nats.
        ppl_renormalised: with the rows that are read alone, as if others had no probability, over
            the tokens whose successor is read.
        missed: share of tokens whose successor in the text is not read.
        changed: share of tokens whose most probable next token changes.
        chosen: whether the artifact holds it.
    """

    method: str
    rank: Count
    price: Amount
    rows_read: Share
    predictor_share: Amount
    ppl_head: Positive
    ppl_levelled: Positive
    ppl_predicted: Positive
    standard_error: Amount
    kl_divergence: float
    ppl_renormalised: Amount
    missed: Share
    changed: Share
    chosen: bool = False

    @property
    def bytes_ratio(self) -> float:
        """What a token reads, predictor and rows, relative to the head."""
        return self.predictor_share + self.rows_read

    @property
    def ppl_gap(self) -> float:
        """Growth of the perplexity by rows that are left out, a fraction."""
        return self.ppl_predicted / self.ppl_levelled - 1

    def keeps(self, max_ppl_gap: float, max_changed: float) -> bool:
        """Whether it keeps to the bounds."""
        return self.ppl_gap <= max_ppl_gap and self.changed <= max_changed
