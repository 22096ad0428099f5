"""Greedy text from the embedded engine, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from powerinfer_bridge.engine.engine import Engine, KVCache


@dataclass(frozen=True)
class Generation:
    """A greedy continuation.

    Attributes:
        text: the continuation, without the prompt.
        tokens: its ids.
        seconds: time to decode all but the first token.
    """

    text: str
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, prompt excluded."""
        return (len(self.tokens) - 1) / self.seconds


def generate(engine: Engine, prompt: str, count: int) -> Generation:
    """Continue a prompt greedily by `count` tokens (at least 2), end-of-sequence ignored.

    The prompt is encoded as PowerInfer's `main` does, see `FileVocabulary.prompt_ids`.
    """
    vocabulary = engine.vocabulary
    cache = KVCache(engine.hyper.n_layers)
    logits = engine.forward(vocabulary.prompt_ids(prompt), cache, last_only=True)
    made = [int(logits.argmax())]
    start = time.perf_counter()
    while len(made) < count:
        made.append(int(engine.forward(made[-1:], cache, last_only=True).argmax()))
    seconds = time.perf_counter() - start
    return Generation(vocabulary.decode(made).decode("utf-8", "replace"), made, seconds)
