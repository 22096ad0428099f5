"""Drawing of tokens: what is drawn for a prompt hangs on its seed, and on no other prompt.

So arms whose batches differ, after a shortage of memory or a resume, still draw alike, and a
difference between them is one of the models.
"""

from __future__ import annotations

import torch

from common.errors import EngineError
from evaluation.backends.backend import NOT_FINITE, Decoding, Prompt

_SEEDS = 1 << 32


def random_of(prompt: Prompt, decoding: Decoding) -> torch.Generator:
    """Return what a prompt's tokens are drawn from."""
    return torch.Generator().manual_seed((decoding.seed + prompt.seed) % _SEEDS)


def choose(logits: torch.Tensor, decoding: Decoding, random: torch.Generator) -> int:
    """Return the next token's id.

    Temperature, then the `top_k` most likely, then the fewest of these that hold `top_p` of the
    probability, as transformers does.

    Args:
        logits: (vocab_size) float32.
        decoding: how.
        random: what is drawn from.

    Raises:
        EngineError: the logits are no numbers.
    """
    if decoding.temperature == 0:
        return int(logits.argmax())
    logs, ids = (logits.double() / decoding.temperature).sort(descending=True, stable=True)
    if logs[0].isnan():
        raise EngineError("the model's logits are no numbers", NOT_FINITE)
    if decoding.top_k:
        logs, ids = logs[: decoding.top_k], ids[: decoding.top_k]
    shares = logs.softmax(-1)
    before = shares.cumsum(-1) - shares
    shares = shares * (before < decoding.top_p)
    shares[0] = shares[0].clamp(min=torch.finfo(shares.dtype).tiny)  # top_p 0 leaves the first
    return int(ids[torch.multinomial(shares, 1, generator=random)])
