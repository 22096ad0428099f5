"""What of a text becomes traces, and what is held out to measure on.

Traces are made of the text's first tokens, as `psp collect` takes them. Without a held-out text of
the user's own, whole documents after those are held out; a text that ends before gives up its last
ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from architectures.checkpoint import Checkpoint
from architectures.windows import document_windows
from common.documents import read_documents, read_text
from common.errors import DataError, OutputError
from common.files import atomic_path
from common.text_sources.names import Sources, TextFile, list_files, shown
from gguf_export.tokens.vocabulary import Vocabulary
from pipeline.layout import Layout
from pipeline.settings import RunConfig

Note = Callable[[str], None]

_LEAST_WINDOWS = 2
"""Of a perplexity; PowerInfer refuses fewer."""

_MARGIN = 1.2
"""By so much more tokens are held out than windows take: PowerInfer counts its own."""

_LEAST_DOCUMENTS = 2
"""Of traces: some are held out from training (`predictor.traces.store.TraceStore.holdout`)."""

_LONGEST_TOKEN = 32
"""Characters; a text of so many a token that is needed is surely long enough."""

_HELD_SHARE = 10
"""At least a tenth of a text that is too short for all that is asked for."""


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """How a text is used.

    Attributes:
        tokens: that traces are made of.
        documents: that they come from.
        median: tokens of such a document.
        ended: whether the text ends before the tokens that were asked for.
        held: number of the first document that is held out and of the one after the last; None
            with a held-out text of the user's own.
        template: chat template that documents are put in.
    """

    tokens: int
    documents: int
    median: int
    ended: bool
    held: tuple[int, int] | None
    template: str


def text_files(sources: Sources, layout: Layout) -> list[Path]:
    """Return the files that text sources stand for now, datasets of the hub left out.

    Raises:
        PspError: see `list_files`; or a file that the run makes itself, found by a pattern.
    """
    files = [Path(each.place) for each in list_files(sources)[0] if isinstance(each, TextFile)]
    for path in files:
        if layout.owns(path):
            raise OutputError(
                f"{shown(sources)}: stands for {path} too, which this run makes",
                "choose another --out, or name the text more closely",
            )
    return files


def plan_text(
    config: RunConfig, checkpoint: Checkpoint, template: str, note: Note = lambda line: None
) -> TextPlan:
    """Count a text's tokens, as far as they are asked for, and choose what is held out.

    Args:
        config: settings of the run.
        checkpoint: the model.
        template: chat template that documents are put in.
        note: takes lines about what is passed over of the text.

    Raises:
        DataError: an unreadable text, or too few tokens or documents.
    """
    context = min(config.context, checkpoint.shape.context_length)
    wanted = 0 if config.eval_data else int(_MARGIN * context * max(config.chunks, _LEAST_WINDOWS))
    documents = read_documents(config.data, config.field, template)
    lengths = _lengths(documents, checkpoint, context, config.tokens, wanted)
    for line in documents.notes:
        note(line)
    held = None if config.eval_data else _held(lengths, config.tokens, wanted, context)
    traced = lengths if held is None else lengths[: held[0]]
    least = 0 if held is None else _least(context)
    if len(traced) < _LEAST_DOCUMENTS or (held and sum(lengths[slice(*held)]) < least):
        own = "" if config.eval_data else " --eval-data FILE,"
        raise DataError(
            f"{shown(config.data)}: gives {sum(lengths)} tokens in {len(lengths)} documents, "
            f"needed are {_LEAST_DOCUMENTS} documents for traces and {least} tokens of others to "
            "measure on",
            f"pass more text,{own} or a lower --context",
        )
    needed = int(np.searchsorted(np.cumsum(traced), config.tokens)) + 1
    tokens = min(config.tokens, sum(traced))
    return TextPlan(
        tokens=tokens,
        documents=min(needed, len(traced)),
        median=int(np.median(traced)),
        ended=tokens < config.tokens,
        held=held,
        template=template,
    )


def _lengths(
    documents: Iterable[str], checkpoint: Checkpoint, context: int, tokens: int, held: int
) -> list[int]:
    """Return the tokens of documents in order, BOS of their windows included.

    Counted are those that `tokens` are made of, and behind them so many that they give `held`.
    """
    lengths: list[int] = []
    total = behind = 0
    cut = document_windows(documents, checkpoint.tokenizer(), context, as_powerinfer=True)
    for number, window in cut:
        if number >= len(lengths):
            enough = total >= tokens
            if enough and behind >= held:
                break
            lengths += [0] * (number + 1 - len(lengths))
        lengths[number] += len(window)
        total += len(window)
        behind += len(window) * enough
    return lengths


def _held(lengths: list[int], tokens: int, wanted: int, context: int) -> tuple[int, int]:
    """Return the first document that is held out, and the one after the last."""
    first = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
    if sum(lengths[first:]) < wanted:
        share = min(wanted, max(_least(context), sum(lengths) // _HELD_SHARE))
        behind = np.cumsum(lengths[::-1])
        first = max(0, len(lengths) - 1 - int(np.searchsorted(behind, share)))
    count = int(np.searchsorted(np.cumsum(lengths[first:]), wanted)) + 1
    return first, min(first + count, len(lengths))


def _least(context: int) -> int:
    return int(_MARGIN * _LEAST_WINDOWS * context)


def write_held_out(config: RunConfig, text: TextPlan, target: Path) -> None:
    """Write the held-out documents as JSON lines, `text` in each, in the form of the traces."""
    assert text.held is not None
    documents = read_documents(config.data, config.field, text.template)
    with atomic_path(target) as part, part.open("w", encoding="utf-8") as file:
        for document in islice(documents, *text.held):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")


def check_held_out(
    config: RunConfig, text: TextPlan, context: int, vocabulary: Vocabulary, note: Note
) -> None:
    """Refuse a held-out text that gives too few tokens, or at which PowerInfer stops.

    Args:
        config: settings of the run.
        text: how the text is used.
        context: tokens of a window.
        vocabulary: as PowerInfer will have it.
        note: takes lines about what is passed over of a text of the user's own.

    Raises:
        DataError: an unreadable text, or as said.
    """
    source, held = shown(config.eval_data or config.data), _held_text(config, text, note)
    _check_bytes(source, held, vocabulary)
    sure = _LONGEST_TOKEN * _LEAST_WINDOWS * context
    found = len(vocabulary.text_ids(held[:sure]))
    if found < _LEAST_WINDOWS * context:
        raise DataError(
            f"{source}: gives {found} tokens, perplexity with --context {context} needs "
            f"{_LEAST_WINDOWS * context}",
            "pass more text or a smaller --context",
        )


def _held_text(config: RunConfig, text: TextPlan, note: Note) -> str:
    """Return what the benchmark will read."""
    if text.held is None:
        return read_text(config.eval_data, config.field, note)
    documents = read_documents(config.data, config.field, text.template)
    return "\n".join(islice(documents, *text.held))


def _check_bytes(source: str, text: str, vocabulary: Vocabulary) -> None:
    absent = vocabulary.absent_bytes
    for line in text.split("\n") if absent else ():
        if absent.isdisjoint(line.encode()):
            continue
        try:
            vocabulary.encode(line)
        except DataError as error:
            raise DataError(
                f"{source}: of what is held out {error.problem}", error.remedy
            ) from error
