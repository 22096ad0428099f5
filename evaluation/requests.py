"""Requests as token ids: BOS once in front, whatever the tokenizer and the kind of request.

lm-eval (0.4.13 api/model.py:TemplateLM) leaves BOS to the tokenizer's settings, which give none,
one or two by turns, and cuts it off where a text is too long. Otherwise texts become ids as there:
a context and its continuation are encoded together, and spaces at a context's end belong to the
continuation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from architectures.tokenizer import OwnTokenizer
from common.errors import SettingsError
from evaluation.backends.backend import Decoding, Prompt, Scoring

DEFAULT_NEW_TOKENS = 256
"""Of a continuation whose task names no other number; lm-eval's."""

_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_IGNORED = ("num_return_sequences",)
_MEND = "mend generation_kwargs of the task"

_COLDEST = 1e-3
"""Least temperature above 0: by a smaller one logits leave the numbers that float32 has."""


@dataclass
class Encoder:
    """Makes ids of texts.

    Attributes:
        tokenizer: the checkpoint's own.
        max_length: tokens that a model can read at once, BOS included.
        shortened: texts so far that were too long and lost their left end.
    """

    tokenizer: OwnTokenizer
    max_length: int
    shortened: int = field(default=0, init=False)

    @property
    def bos(self) -> int:
        """The id in front of every request."""
        return self.tokenizer.bos_id()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without BOS; one that is written in front of it is left out."""
        return self.tokenizer.encode(text.removeprefix(self.tokenizer.bos_text))

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context without BOS, and those of what follows it.

        Where all that follows goes into the context's last token, that token is what follows: as
        nothing at all it would be certain.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return [], self.encode(continuation)
        ids, whole = self.encode(stripped), self.encode(stripped + continuation)
        if ids != whole and len(ids) >= len(whole):  # one token holds the end of both
            return whole[:-1], whole[-1:]
        return ids, whole[len(ids) :]

    def scoring(self, context: str, continuation: str) -> Scoring:
        """Return what scores a continuation; a context that is too long loses its left end.

        Raises:
            SettingsError: the continuation alone is longer than the model's context.
        """
        ids, target = self.pair(context, continuation)
        if len(target) > self.max_length:
            raise SettingsError(
                f"a continuation of {len(target)} tokens is longer than the model's context of "
                f"{self.max_length}: {continuation[:60]!r}",
                "leave out the task, or pass a model with a longer context",
            )
        read = [*ids, *target[:-1]]
        if len(read) > self.max_length - 1:
            self.shortened += 1
            read = read[len(read) - (self.max_length - 1) :]
        return Scoring(ids=(self.bos, *read), targets=(tuple(target),))

    def rolling(self, text: str) -> list[Scoring]:
        """Return windows that score every token of a text once.

        Each begins with BOS; all but the first then read the last token of the window before
        (lm_eval/utils.py:get_rolling_token_windows with a context of 1). The last one reads as
        much as fits.
        """
        tokens, size = self.encode(text), self.max_length
        windows, first = [], min(len(tokens), size)
        if first:
            windows.append(_window(self.bos, tokens[: first - 1], tokens[:first]))
        done = first
        while done < len(tokens):
            count = min(len(tokens) - done, size - 1)
            end = done + count
            read = tokens[max(0, end - size) : end - 1]
            windows.append(_window(self.bos, read, tokens[done:end]))
            done = end
        return windows

    def prompt(self, text: str, new_tokens: int) -> Prompt:
        """Return what is continued; a text that leaves no room for it loses its left end.

        Raises:
            SettingsError: the model's context has no room for a continuation of this length.
        """
        room = self.max_length - new_tokens
        if room < 2:
            raise SettingsError(
                f"a continuation of {new_tokens} tokens leaves no room for a prompt in the model's "
                f"context of {self.max_length}",
                "leave out the task, or pass a model with a longer context",
            )
        text = text.removeprefix(self.tokenizer.bos_text)
        ids = self.encode(text)
        if len(ids) > room - 1:
            self.shortened += 1
            ids = ids[len(ids) - (room - 1) :]
            text = self.tokenizer.decode(ids)
        return Prompt(text=text, ids=(self.bos, *ids))


def _window(bos: int, read: Sequence[int], target: Sequence[int]) -> Scoring:
    return Scoring(ids=(bos, *read), targets=(tuple(target),))


def merged(scorings: Sequence[Scoring]) -> list[tuple[Scoring, list[int]]]:
    """Put together what one run scores: the same ids, targets that differ in the last token.

    Returns:
        Each with the numbers of the scorings that its targets are of, in order.
    """
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, each in enumerate(scorings):
        groups.setdefault((each.ids, len(each.targets[0])), []).append(number)
    return [
        (Scoring(ids=ids, targets=tuple(scorings[n].targets[0] for n in numbers)), numbers)
        for (ids, _), numbers in groups.items()
    ]


def decoding(wanted: Mapping[str, Any], seed: int) -> Decoding:
    """Read lm-eval's generation settings, by lm-eval's rules but with nothing left open.

    Without `do_sample` a temperature above 0 samples; without either nothing does.

    Args:
        wanted: `generation_kwargs` of a task.
        seed: of what is drawn.

    Raises:
        SettingsError: a setting that psp does not know, or a value that is none.
    """
    if not isinstance(wanted, Mapping):
        raise SettingsError(f"generation settings {wanted!r} are none", _MEND)
    settings = {key: value for key, value in wanted.items() if key not in _IGNORED}
    until = settings.pop("until", None) or []
    counts = [settings.pop(name) for name in _NEW_TOKENS if name in settings]
    count = counts[0] if counts else DEFAULT_NEW_TOKENS
    temperature = settings.pop("temperature", None)
    sampled = settings.pop("do_sample", None)
    top_p, top_k = settings.pop("top_p", 1.0), settings.pop("top_k", 0)
    if settings:
        raise SettingsError(
            f"generation setting {next(iter(settings))!r} is none that psp knows",
            _MEND,
        )
    if sampled is None:
        sampled = bool(temperature)
    heat = (1.0 if temperature is None else temperature) if sampled else 0.0
    try:
        stop = [until] if isinstance(until, str) else list(until)
        if float(heat):
            _at_least(float(heat), _COLDEST, "temperature")
        return Decoding(
            stop=tuple(str(text) for text in stop if text),
            max_new_tokens=_at_least(int(count), 1, "max_gen_toks"),
            temperature=_at_least(float(heat), 0, "temperature"),
            top_p=_at_least(float(top_p), 0, "top_p"),
            top_k=_at_least(int(top_k), 0, "top_k"),
            seed=seed,
        )
    except (TypeError, ValueError) as error:
        raise SettingsError(f"generation settings {dict(wanted)!r}: {error}", _MEND) from error


def _at_least(number: Any, least: float, name: str) -> Any:
    if not number >= least:
        raise ValueError(f"{name} is {number}, expected at least {least}")
    return number


def answer_in(written: str, prompt: str, stop: Sequence[str]) -> str:
    """Return the answer in what a model wrote: up to a stop text, without the space before it.

    Tasks write a space between a question and its answer, and compare answers with texts that have
    none. Whether lm-eval's own models return it hangs on the tokenizer: LLaMA's decoder drops a
    first space, also where it indents code; byte-level ones keep it, and exact matches fail. Here
    one space goes, unless the prompt ends with white space, after which it is the answer's own.

    Args:
        written: the continuation.
        prompt: that was continued.
        stop: texts that end it.
    """
    ends = [at for at in (written.find(each) for each in stop) if at >= 0]
    text = written[: min(ends)] if ends else written
    own = not prompt or prompt[-1].isspace()
    return text if own else text.removeprefix(" ")


def request_keys(kind: str, arguments: Sequence[Sequence[Any]]) -> list[str]:
    """Return what tells requests apart, the first 32 digits of a SHA-256 each.

    Equal requests, of which a task may make several to draw several answers, are numbered.
    """
    seen: dict[str, int] = {}
    keys = []
    for each in arguments:
        digest = _digest([kind, *each])
        seen[digest] = seen.get(digest, 0) + 1
        keys.append(digest if seen[digest] == 1 else _digest([digest, seen[digest]]))
    return keys


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
