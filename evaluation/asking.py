"""Asks a backend in batches, the longest first, each kept as soon as it is answered."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from architectures.model import OutOfMemory
from architectures.tokenizer import OwnTokenizer
from common.errors import EngineError
from evaluation.answers import Answer, Answers, Batch
from evaluation.backends.backend import (
    NOT_FINITE,
    Backend,
    Decoding,
    Prompt,
    RequestKind,
    Scoring,
    Spread,
    Zeros,
)
from evaluation.requests import Encoder, answer_in, decoding, merged, request_keys

Note = Callable[[str], None]
_SMALLER = "leave out the task, or pass --device cpu or a --dtype of fewer bytes"
What = TypeVar("What", Scoring, Prompt)


@dataclass(frozen=True)
class _Item(Generic[What]):
    """What a backend runs at once.

    Attributes:
        keys: of the answers that it gives.
        what: it runs.
    """

    keys: tuple[str, ...]
    what: What

    @property
    def order(self) -> tuple[int, str]:
        """The longest come first, so that a shortage of memory shows at once."""
        return -len(self.what.ids), self.keys[0]


@dataclass
class Asker:
    """Answers lm-eval's requests with a backend.

    Attributes:
        backend: what answers.
        tokenizer: the checkpoint's own; ids are its.
        answers: what was answered already, and where answers go.
        size: requests at once; less once memory did not do for them.
        seed: of what is drawn.
        note: takes lines that a reader must know.
    """

    backend: Backend | Spread
    tokenizer: OwnTokenizer
    answers: Answers
    size: int
    seed: int = 0
    note: Note = lambda line: None
    encoder: Encoder = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the size that an earlier process ended with."""
        self.size = min(self.size, self.answers.size or self.size)
        self.encoder = Encoder(self.tokenizer, self.backend.max_length)

    def ask(
        self, kind: RequestKind, arguments: Sequence[Sequence[Any]], title: str
    ) -> list[Answer]:
        """Return an answer to each request.

        Args:
            kind: of all of them.
            arguments: lm-eval's `Instance.args`: context and continuation, a text alone, or
                context and generation settings.
            title: of the progress bar, and of notes.

        Raises:
            PspError: the backend stopped, one request alone does not fit the memory, or settings
                that psp does not know.
        """
        keys = request_keys(kind, arguments)
        shortened = self.encoder.shortened
        if kind == "generate_until":
            found = self._texts(keys, arguments, title)
        else:
            found = self._scores(keys, arguments, title)
        if (lost := self.encoder.shortened - shortened) > 0:
            self.note(
                f"{title}: {lost} of {len(keys)} texts were longer than the model's context of "
                f"{self.backend.max_length} tokens and lost their left end, BOS kept"
            )
        return found

    def _scores(
        self, keys: Sequence[str], arguments: Sequence[Sequence[Any]], title: str
    ) -> list[Answer]:
        windows = {
            key: self.encoder.rolling(each[0]) if len(each) == 1 else [self.encoder.scoring(*each)]
            for key, each in zip(keys, arguments, strict=True)
        }
        parts = {key: [f"{key}.{n}" for n in range(len(w))] for key, w in windows.items()}
        every = dict(pair for key in keys for pair in zip(parts[key], windows[key], strict=True))
        waiting = [part for part in every if part not in self.answers.known]
        items = [
            _Item(tuple(waiting[n] for n in numbers), run)
            for run, numbers in merged([every[part] for part in waiting])
        ]

        def read(batch: Sequence[_Item[Scoring]], scores: list[Any]) -> list[Answer]:
            if not all(math.isfinite(each.loglikelihood) for row in scores for each in row):
                raise EngineError("a log-likelihood is no finite number", NOT_FINITE)
            return [(each.loglikelihood, each.greedy) for row in scores for each in row]

        with self._bar(title, len(every), len(every) - len(waiting)) as bar:
            self._run(items, None, read, bar)
        return [_sum(self.answers.known[part] for part in parts[key]) for key in keys]

    def _texts(
        self, keys: Sequence[str], arguments: Sequence[Sequence[Any]], title: str
    ) -> list[Answer]:
        groups: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(arguments):
            alike = json.dumps(settings, sort_keys=True, default=str)
            groups.setdefault(alike, []).append(number)
        known = sum(key in self.answers.known for key in keys)
        with self._bar(title, len(keys), known) as bar:
            for numbers in groups.values():
                settings = arguments[numbers[0]][1]
                self._continue({keys[n]: arguments[n][0] for n in numbers}, settings, bar)
        return [self.answers.known[key] for key in keys]

    def _continue(self, texts: Mapping[str, str], settings: Mapping[str, Any], bar: Any) -> None:
        """Continue prompts, by key, by the same settings."""
        own = decoding(settings, self.seed)
        items = [
            _Item((key,), self._prompt(key, text, own.max_new_tokens))
            for key, text in texts.items()
            if key not in self.answers.known
        ]

        def read(batch: Sequence[_Item[Prompt]], made: list[Any]) -> list[Answer]:
            return [
                answer_in(text, item.what.text, own.stop)
                for text, item in zip(made, batch, strict=True)
            ]

        self._run(items, own, read, bar)

    def _prompt(self, key: str, text: str, count: int) -> Prompt:
        """Return a prompt with a seed of its own, so that equal ones are not answered alike."""
        return replace(self.encoder.prompt(text, count), seed=int(key, 16))

    def _run(
        self,
        items: Sequence[_Item[What]],
        how: Decoding | None,
        read: Callable[[Sequence[_Item[What]], list[Any]], list[Answer]],
        bar: Any,
    ) -> None:
        """Answer items and keep each batch.

        Args:
            items: to run.
            how: they are continued; None scores them.
            read: makes answers of what the backend made of a batch.
            bar: counts answers.
        """
        waiting = sorted(items, key=lambda item: item.order)
        if isinstance(self.backend, Spread):
            self._spread(self.backend, waiting, how, read, bar)
        else:
            self._in_turn(self.backend, waiting, how, read, bar)

    def _spread(
        self,
        backend: Spread,
        items: Sequence[_Item[What]],
        how: Decoding | None,
        read: Callable[[Sequence[_Item[What]], list[Any]], list[Answer]],
        bar: Any,
    ) -> None:
        """Let several batches be answered at once."""
        batches = [items[start : start + self.size] for start in range(0, len(items), self.size)]
        asked = [[item.what for item in batch] for batch in batches]
        for number, answered in backend.several(asked, how):
            answers = read(batches[number], answered.made)
            self._keep(batches[number], answers, answered.seconds, answered.zeros)
            bar.update(len(answers))

    def _in_turn(
        self,
        backend: Backend,
        waiting: list[_Item[What]],
        how: Decoding | None,
        read: Callable[[Sequence[_Item[What]], list[Any]], list[Answer]],
        bar: Any,
    ) -> None:
        """Answer one batch after another; where memory does not do, by fewer from there on."""
        while waiting:
            batch, start = waiting[: self.size], time.perf_counter()
            backend.zeros()  # what a batch without answers left counted
            try:
                answers = read(batch, _made(backend, [item.what for item in batch], how))
            except OutOfMemory as error:
                if len(batch) == 1:
                    raise EngineError(f"{error.problem} for one request", _SMALLER) from error
                self.size = len(batch) // 2
                self.note(
                    f"not enough memory for {len(batch)} requests at once: {self.size} from here "
                    f"on, with which --batch-size {self.size} begins"
                )
                continue
            self._keep(batch, answers, time.perf_counter() - start, backend.zeros())
            del waiting[: len(batch)]
            bar.update(len(answers))

    def _keep(
        self,
        batch: Sequence[_Item[What]],
        answers: Sequence[Answer],
        seconds: float,
        zeros: Zeros | None,
    ) -> None:
        self.answers.add(
            Batch(
                keys=tuple(key for item in batch for key in item.keys),
                answers=tuple(answers),
                tokens=sum(len(item.what.ids) for item in batch),
                seconds=seconds,
                size=self.size,
                zero=None if zeros is None else zeros.zero,
                total=None if zeros is None else zeros.total,
            )
        )

    @staticmethod
    def _bar(title: str, total: int, known: int) -> Any:
        return tqdm(total=total, initial=known, unit="request", desc=title, disable=None)


def _made(backend: Backend, batch: Sequence[Any], how: Decoding | None) -> list[Any]:
    return list(backend.score(batch) if how is None else backend.generate(batch, how))


def _sum(answers: Any) -> Answer:
    """Add up the log-likelihoods of a text's windows."""
    total, greedy = 0.0, True
    for loglikelihood, same in answers:
        total, greedy = total + loglikelihood, greedy and same
    return total, greedy
