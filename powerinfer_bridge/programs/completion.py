"""Log-probabilities and texts of token ids, by requests to PowerInfer's `server`.

The server tells the probabilities of the token that it writes next, but of no given one, and by the
tokens' texts, which several tokens may share. So it is pushed (`logit_bias`): the token in question
by so much that it is the second of all, and another one, whose text is plain, by so much that it is
the first and is written. What was pushed is taken off again; all others are counted by their sum.

Source: PowerInfer@d3ebd7c examples/server/server.cpp. What it demands of a request:
- probabilities come in a stream only, and only if the token has a text that the server can send
  alone: none of a control token or of a part of a character (send_partial_response,
  process_token);
- they are those after penalties, which are on unless switched off (llama_sampling_sample);
- `cache_prompt` is right only where the prompt goes on after the last one with another token than
  the one that was written then: otherwise the cache lacks a token, or holds one twice
  (update_slots: cache_tokens counts a token that was never read, and `n_past--` comes after the
  cache was cut);
- at least four tokens are written, whatever `n_predict` says (process_token).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import EngineError
from gguf_export.tokens.vocabulary import Vocabulary
from powerinfer_bridge.programs.server import Server

LEAST_WRITTEN = 4
"""Tokens that the server writes at least, unless a text ends."""
EXTRA = LEAST_WRITTEN + 1
"""Positions that a request takes beyond its prompt; the server shifts the context where it ends."""
_PUSHES = ((60.0, 30.0), (75.0, 45.0), (90.0, 40.0), (100.0, 20.0), (100.0, 60.0))
"""Nats by which the written token and the one in question are pushed, tried in this order. The
server's probabilities are float32, whose smallest is exp(-87), or exp(-103) less exactly."""
_OTHER_PUSH = 8.0
"""Nats by which a token that its text does not name is pushed less the second time."""
_AGREES = 2e-3
_BASE = {
    "temperature": 0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


@dataclass(frozen=True)
class TokenScore:
    """How likely a token is.

    Attributes:
        log: natural logarithm of its probability.
        greedy: whether no token is likelier.
    """

    log: float
    greedy: bool


class Completion:
    """Asks a server that runs a file with this vocabulary."""

    def __init__(self, server: Server, vocabulary: Vocabulary) -> None:
        """Keep both."""
        self._server, self._vocabulary = server, vocabulary

    def score(self, ids: Sequence[int], targets: Sequence[Sequence[int]]) -> list[list[TokenScore]]:
        """Score what may follow ids token by token.

        Args:
            ids: what is read; BOS is not added.
            targets: each as many ids as the last positions of `ids` predict, alike but for the
                last.

        Returns:
            A score for each token of each target.

        Raises:
            EngineError: the program failed, hung, or its answer cannot be read.
        """
        first, taken = len(ids) - len(targets[0]) + 1, frozenset(ids)
        shared = [
            self._token(ids[: first + at], token, taken, going_on=at > 0)
            for at, token in enumerate(targets[0][:-1])
        ]
        found = list[list[TokenScore]]()
        for target in targets:
            going_on = bool(shared) and not found  # else the same prompt again
            last = self._token(ids, target[-1], taken, going_on=going_on)
            found.append([*shared, last])
        return found

    def _token(
        self, ids: Sequence[int], token: int, taken: frozenset[int], *, going_on: bool
    ) -> TokenScore:
        """Score one token.

        Args:
            ids: what is read.
            token: in question.
            taken: ids that this and later prompts hold.
            going_on: whether the prompt is the last one and one token more.
        """
        written = self._written(taken | {token})
        for push in _PUSHES:
            found = self._pushed(ids, token, written, push, going_on)
            going_on = False
            if found is None:
                continue
            if token in self._named:
                return found
            less = (push[0], push[1] - _OTHER_PUSH)
            again = self._pushed(ids, token, written, less, False)
            if again is not None and abs(again.log - found.log) < _AGREES:
                return found
        raise EngineError(
            f"PowerInfer's server: the probability of token {token} cannot be read after "
            f"{len(ids)} tokens, because it is too small or the numbers are none",
            "check the file with psp verify",
        )

    def _pushed(
        self,
        ids: Sequence[int],
        token: int,
        written: int,
        push: tuple[float, float],
        going_on: bool,
    ) -> TokenScore | None:
        """Score a token by one request; None if it was not seen where its push should bring it."""
        request = {
            **_BASE,
            "prompt": list(ids),
            "n_predict": 1,
            "stream": True,
            "cache_prompt": going_on,
            "n_probs": len(self._vocabulary.tokens),
            "logit_bias": [[written, push[0]], [token, push[1]]],
        }
        texts, shares = first_probabilities(self._server.complete(request), len(ids))
        expected = [self._shown[number] for number in (written, token)]
        if len(texts) != len(self._vocabulary.tokens) or texts[0] != expected[0]:
            return None
        if expected[1] is not None and texts[1] != expected[1]:
            return None
        return unpushed(shares, push)

    def continue_greedily(self, ids: Sequence[int], count: int, stop: Sequence[str]) -> str:
        """Return the text that follows, up to a stop text or the end-of-sequence token.

        Args:
            ids: what is read; BOS is not added.
            count: tokens to write at most, at least 1. Below `LEAST_WRITTEN` a character that
                several tokens spell counts as one.
            stop: texts, none empty.

        Raises:
            EngineError: the program failed, hung, or its answer cannot be read.
        """
        request = {**_BASE, "prompt": list(ids), "cache_prompt": False}
        if count >= LEAST_WRITTEN:
            request |= {"n_predict": count - 1, "stream": False, "stop": list(stop)}
            return str(_read(self._server.complete(request), len(ids)).get("content", ""))
        body = self._server.complete(request | {"n_predict": 1, "stream": True})
        events = [_object(event) for event in _events(body, len(ids))[:count]]
        return "".join(str(event.get("content", "")) for event in events)

    @cached_property
    def _shown(self) -> list[str | None]:
        """How the server shows each token; None where bytes that are no UTF-8 are replaced."""
        return [shown(self._vocabulary.decode([n])) for n in range(len(self._vocabulary.tokens))]

    @cached_property
    def _named(self) -> frozenset[int]:
        """Tokens that are known by how they are shown."""
        times = Counter(self._shown)
        named = (n for n, text in enumerate(self._shown) if text is not None and times[text] == 1)
        return frozenset(named)

    @cached_property
    def _plain(self) -> list[int]:
        """Tokens whose text the server sends alone, in ASCII letters."""
        texts = ((number, self._shown[number] or "") for number in sorted(self._named))
        return [number for number, text in texts if text.isascii() and text.isalpha()]

    def _written(self, others: Collection[int]) -> int:
        """Return a plain token that is none of the others."""
        found = next((number for number in self._plain if number not in others), None)
        if found is None:
            raise EngineError(
                "PowerInfer's server: the vocabulary has no token of letters alone besides those "
                "of the request",
                "use the embedded engine",
            )
        return found


def shown(text: bytes) -> str | None:
    """Return how the server shows a token (tokens_to_output_formatted_string), None if unsure."""
    if len(text) == 1 and text[0] & 0x80:
        return f"byte: \\x{text[0]:x}"
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def unpushed(shares: Sequence[float], push: tuple[float, float]) -> TokenScore | None:
    """Return the second token's score without the pushes.

    Args:
        shares: probabilities of all tokens, falling; the first two are of pushed tokens.
        push: by how much, nats.

    Returns:
        None where they are no probabilities.
    """
    first, second = (share * math.exp(-by) for share, by in zip(shares, push, strict=False))
    others = shares[2:]
    total = math.fsum((first, second, *others))
    if not (second > 0 and math.isfinite(total)):
        return None
    return TokenScore(math.log(second / total), second >= max((first, *others)))


def first_probabilities(body: bytes, length: int) -> tuple[list[str], list[float]]:
    """Return texts and probabilities of the token that was written first, likeliest first.

    Args:
        body: of an answer that was streamed.
        length: of the prompt, tokens.

    Raises:
        EngineError: it cannot be read.
    """
    first = _object(_events(body, length)[0])
    try:
        entries = first["completion_probabilities"][0]["probs"]
        return [str(e["tok_str"]) for e in entries], [float(e["prob"]) for e in entries]
    except (LookupError, TypeError, ValueError) as error:
        raise _unreadable(f"no probabilities ({type(error).__name__})") from error


def _events(body: bytes, length: int) -> list[bytes]:
    """Return what was streamed, if the last event says that the whole prompt was read."""
    found = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not found:
        raise _unreadable("no event")
    _read(found[-1], length)
    return found


def _read(body: bytes, length: int) -> dict[str, Any]:
    """Return a last answer, if it is about the whole prompt."""
    found = _object(body)
    if found.get("truncated") is not False or found.get("tokens_evaluated") != length:
        raise _unreadable(f"not all {length} tokens of the prompt were read")
    return found


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise _unreadable("no JSON") from error
    if not isinstance(found, dict):
        raise _unreadable("no JSON object")
    return found


def _unreadable(what: str) -> EngineError:
    return EngineError(
        f"PowerInfer's server: its answer cannot be read: {what}", "build PowerInfer at d3ebd7c"
    )
