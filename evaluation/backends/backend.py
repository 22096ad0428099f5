"""What every backend takes and gives: token ids in, log-likelihoods or texts out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

RequestKind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
"""lm-eval's names of what a task may ask for."""

NOT_FINITE = "look at the model's weights, or try --dtype float32"
"""What to do where numbers have left their type."""

KINDS: tuple[RequestKind, ...] = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Token ids to run, and what may follow.

    Attributes:
        ids: what the model reads, BOS first; the last token of a target is not among them.
        targets: each as many token ids as the last positions of `ids` predict. Several if they
            differ in their last token alone, which one run scores.
    """

    ids: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Score:
    """How likely a target is.

    Attributes:
        loglikelihood: natural logarithm of its probability after what precedes it.
        greedy: whether each of its tokens is the most likely one.
    """

    loglikelihood: float
    greedy: bool


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a text is continued.

    Attributes:
        stop: texts, the first of which ends the continuation; none is empty.
        max_new_tokens: of the continuation, at most.
        temperature: 0 takes the most likely token, always.
        top_p: share of probability that is drawn from; 1 is all. Of no meaning at temperature 0.
        top_k: how many tokens are drawn from; 0 is all. Likewise.
        seed: of what is drawn.
    """

    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is continued.

    Attributes:
        text: as the task wrote it, cut at its left end where it was too long.
        ids: of the text, BOS first.
        seed: of what is drawn for it, beside that of all.
    """

    text: str
    ids: tuple[int, ...]
    seed: int = 0


@dataclass
class Zeros:
    """FFN neurons that gave exactly zero, counted over tokens and layers.

    Attributes:
        zero: such neurons.
        total: all.
    """

    zero: int = 0
    total: int = 0


class Answering(Protocol):
    """What answers, whoever does it."""

    @property
    def kinds(self) -> Sequence[RequestKind]:
        """Which requests it can answer."""
        ...

    @property
    def why_not(self) -> str:
        """Why it cannot answer the others, one line; empty where it can."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens that it can read at once, BOS included."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class Backend(Answering, Protocol):
    """A loaded model that answers."""

    def score(self, batch: Sequence[Scoring]) -> list[list[Score]]:
        """Return a score for each target of each request.

        Raises:
            CheckpointError: no memory for a batch of this size.
            EngineError: the engine stopped, or what it says cannot be read.
        """
        ...

    def generate(self, batch: Sequence[Prompt], decoding: Decoding) -> list[str]:
        """Return the continuation of each prompt, which may run on past a stop text.

        Raises:
            CheckpointError: no memory for a batch of this size.
            EngineError: the engine stopped, or what it says cannot be read.
        """
        ...

    def zeros(self) -> Zeros | None:
        """Return what was counted since the last call; None where nothing counts."""
        ...


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What was made of a batch.

    Attributes:
        made: scores or texts, see `Backend`.
        zeros: see `Backend`.
        seconds: that it took.
    """

    made: list[Any]
    zeros: Zeros | None
    seconds: float


@runtime_checkable
class Spread(Answering, Protocol):
    """Models on several machines that answer several batches at once."""

    def several(
        self, batches: Sequence[Sequence[Scoring] | Sequence[Prompt]], decoding: Decoding | None
    ) -> Iterator[tuple[int, Answered]]:
        """Yield the place of every batch with what was made of it, as they are answered.

        Args:
            batches: to score, or to continue by `decoding`.
            decoding: None scores.

        Raises:
            EngineError: no memory for a batch of this size.
        """
        ...
