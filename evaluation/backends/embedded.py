"""An exported file in the embedded engine, one sequence after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import EngineError
from evaluation.backends.backend import (
    KINDS,
    Decoding,
    Prompt,
    RequestKind,
    Score,
    Scoring,
    Zeros,
)
from evaluation.backends.drawing import choose, random_of
from evaluation.backends.fit import room_for
from gguf_export.tokens.vocabulary import Vocabulary
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine

_BLOCK = 32
"""Tokens that are run at once. Sums depend on their number in the last bit, and rounding to float16
or eight bits makes of that up to hundredths of a nat. So sequences are always cut at the same
places, and only whole blocks are taken from the one before: then sharing changes no bit."""


class EmbeddedBackend:
    """The embedded engine, which computes what PowerInfer computes."""

    kinds: Sequence[RequestKind] = KINDS
    why_not = ""

    def __init__(self, path: Path, *, threshold: float | None = None) -> None:
        """Open a file.

        Args:
            path: `*.powerinfer.gguf`.
            threshold: replaces the file's.

        Raises:
            FormatError: the file breaks the contract.
        """
        self._engine = Engine(path, threshold=threshold)
        # A model that is read from its file at every use is read once for a sequence.
        self._block = _BLOCK if self._engine.weights.resident else self.max_length
        self._ids: tuple[int, ...] = ()
        self._cache = KVCache(self._engine.hyper.n_layers)

    @property
    def vocabulary(self) -> Vocabulary:
        """The file's."""
        return self._engine.vocabulary

    @property
    def max_length(self) -> int:
        """The file's context."""
        return self._engine.hyper.context_length

    def score(self, batch: Sequence[Scoring]) -> list[list[Score]]:
        """Score each request; blocks that it begins with as the one before it are not run again.

        Raises:
            EngineError: more ids than the context has, or one outside the vocabulary.
        """
        return [self._score(request) for request in batch]

    def _score(self, request: Scoring) -> list[Score]:
        logits = self._read(request.ids, len(request.targets[0]))
        logs = logits.double().log_softmax(-1)
        return [_score_of(logs, target) for target in request.targets]

    def _read(self, ids: tuple[int, ...], count: int) -> torch.Tensor:
        """Run a sequence.

        Returns:
            Logits (count, vocab_size) of the last positions.
        """
        if len(ids) > self.max_length:
            raise EngineError(
                f"{len(ids)} tokens: the file's context is {self.max_length}", "shorten the request"
            )
        start, first = self._known(ids, len(ids) - count), len(ids) - count
        cache, found = self._cache.prefix(start), list[torch.Tensor]()
        self._ids = ()  # should this end half-way
        while start < len(ids):
            end = min(len(ids), start + self._block)
            wanted = end - max(start, first)
            logits = self._engine.forward(list(ids[start:end]), cache, last=max(1, wanted))
            found += [logits] if wanted > 0 else []
            start = end
        self._ids, self._cache = ids, cache
        return torch.cat(found)

    def _known(self, ids: tuple[int, ...], most: int) -> int:
        """Return how many tokens, at most so many, need not be run: whole blocks run before."""
        same = min(_alike(self._ids, ids), most)
        return same - same % self._block

    def generate(self, batch: Sequence[Prompt], decoding: Decoding) -> list[str]:
        """Continue each prompt; a sampled text depends on its prompt and the seed alone.

        Raises:
            EngineError: as for `score`.
        """
        return [self._generate(prompt, decoding) for prompt in batch]

    def _generate(self, prompt: Prompt, decoding: Decoding) -> str:
        ids = prompt.ids
        logits, vocabulary = self._read(ids, 1), self.vocabulary
        cache, written = self._cache.prefix(len(ids)), bytearray()
        random = random_of(prompt, decoding)
        stops = [stop.encode("utf-8", "surrogatepass") for stop in decoding.stop]
        for left in reversed(range(room_for(len(ids), decoding.max_new_tokens, self.max_length))):
            token = choose(logits[0], decoding, random)
            # Texts of tokens are joined as they are: a space that begins one stays.
            text = vocabulary.decode([token])
            written += text
            ended = any(stop in written[-len(stop) - len(text) :] for stop in stops)
            if token == vocabulary.eos_id or ended or not left:
                break
            logits = self._engine.forward([token], cache, last=1)
        return written.decode("utf-8", "replace")

    def zeros(self) -> Zeros | None:
        """Return None: to count what predictors skip wrongly, the engine would run every gate."""
        return None

    def close(self) -> None:
        """Forget the last request."""
        self._ids, self._cache = (), KVCache(self._engine.hyper.n_layers)


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many ids two sequences share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _score_of(logs: torch.Tensor, target: tuple[int, ...]) -> Score:
    """Score a target by log-probabilities (its tokens, vocab_size), float64."""
    ids = torch.tensor(target)
    chosen = logs.gather(1, ids[:, None])
    return Score(float(chosen.sum()), bool((logs.argmax(-1) == ids).all()))
