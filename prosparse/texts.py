"""The text of a run: cut into windows of token ids, packed into files, and drawn in order.

A window is BOS and then the next tokens of one long stream: all documents in order, each started by
BOS. Nothing is padded, so every token weighs the same; only the rest of the stream that fills no
window is dropped. The order of training is a permutation an epoch, drawn from the seed and the
epoch's number alone, so a resumed run sees the windows that an unbroken one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import Tokenizer
from common.documents import look_at_documents, read_documents
from common.errors import DataError, SparsityError
from common.files import atomic_path
from common.text_sources.names import Sources, shown
from prosparse.saving import newest_checkpoint
from prosparse.settings import SparsifyConfig

Windows = npt.NDArray[np.int32]
Item = dict[str, torch.Tensor]
Report = Callable[[str], None]

_SPREAD = 4
"""Windows are drawn from so many times as many as training takes: a text begins with few of its
documents, and a model trained on those alone knows the others less well."""


def cut_stream(documents: Iterable[str], tokenizer: Tokenizer, context: int) -> Iterator[list[int]]:
    """Yield windows of exactly `context` token ids, BOS first.

    Args:
        documents: texts.
        tokenizer: the model's tokenizer.
        context: length of a window, at least 2.
    """
    bos = tokenizer.bos_id()
    held: list[int] = []
    for document in documents:
        # A window that begins with the document has its BOS already.
        held += [bos] * bool(held) + tokenizer.encode(document)
        whole = len(held) // (context - 1) * (context - 1)
        for start in range(0, whole, context - 1):
            yield [bos, *held[start : start + context - 1]]
        held = held[whole:]


def pack(windows: Iterable[Sequence[int]], path: Path, most: int) -> None:
    """Write windows, as from `cut_stream`, to a file of int32 ids; stop after so many."""
    with atomic_path(path) as part, part.open("wb") as file:
        for window in islice(windows, most):
            file.write(np.asarray(window, np.int32).tobytes())


def open_windows(path: Path, context: int) -> Windows:
    """Map packed windows, (n, context) int32; n may be 0."""
    if not path.stat().st_size:
        return np.zeros((0, context), np.int32)
    return np.memmap(path, np.int32, "r").reshape(-1, context)


def need_windows(config: SparsifyConfig, name: str, source: Sources, found: int, step: int) -> None:
    """Refuse a text that gives too few windows.

    Args:
        config: settings.
        name: what the text is for.
        source: the text.
        found: windows that it is known to give.
        step: windows that a step takes.

    Raises:
        DataError: naming the source and how much it gives.
    """
    least = {"train": step + _held_back(config, found), "sft": step, "eval": 1}[name]
    if found < least:
        raise DataError(
            f"{shown(source)}: gives {found} windows of {config.context} tokens, needed are "
            f"{least}",
            "pass more text, or lower --context or --batch",
        )


class WindowSet(Dataset[Item]):
    """Windows in the order in which they are trained on or measured."""

    def __init__(self, parts: Sequence[tuple[Windows, int]], seed: int | None) -> None:
        """Say how many items each part gives.

        Args:
            parts: windows, and how many items to draw from them before the next part's turn.
            seed: of the permutations; None takes the windows as they come.
        """
        self._parts = parts
        self._seed = seed
        self._permutation = lru_cache(maxsize=1)(self._permute)

    def __len__(self) -> int:
        """Return the items of all parts."""
        return sum(count for _, count in self._parts)

    def __getitem__(self, index: int) -> Item:
        """Return `input_ids` and `labels`, (context,) int64 each and the same."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for number, (windows, count) in enumerate(self._parts):
            if index < count:
                epoch, row = divmod(index, len(windows))
                row = row if self._seed is None else int(self._permutation(number, epoch)[row])
                ids = torch.from_numpy(windows[row].astype(np.int64))
                return {"input_ids": ids, "labels": ids}
            index -= count
        raise AssertionError

    def _permute(self, part: int, epoch: int) -> npt.NDArray[np.int64]:
        assert self._seed is not None
        rows = len(self._parts[part][0])
        return np.random.default_rng([self._seed, part, epoch]).permutation(rows)


def check_texts(config: SparsifyConfig, checkpoint: Checkpoint, processes: int) -> None:
    """Refuse what cannot be trained on before anything is written.

    Only as much text is made into windows as one step takes.

    Raises:
        PspError: the context is too long for the model, or a text is unreadable or too short.
    """
    if config.context > checkpoint.shape.context_length:
        raise SparsityError(
            f"context is {config.context}, the model has {checkpoint.shape.context_length} "
            "positions",
            "lower --context",
        )
    step, cut = config.step_windows(processes), _cutter(config, checkpoint)
    for name, source in _sources(config).items():
        tokens = _most_windows(config, processes)[name] * config.context
        look_at_documents(source, config.field, "none", tokens, lambda line: None)
        most = {"train": step + config.eval_windows, "sft": step, "eval": 1}[name]
        found = sum(1 for _ in islice(cut(read_documents(source, config.field)), most))
        need_windows(config, name, source, found, step)


def pack_texts(
    config: SparsifyConfig, checkpoint: Checkpoint, processes: int, report: Report
) -> None:
    """Write the windows of every text; once there is a checkpoint they stay as they are.

    Args:
        config: settings.
        checkpoint: the model.
        processes: that train.
        report: takes lines about what was passed over in the texts.

    Raises:
        PspError: a text is unreadable.
    """
    begun = newest_checkpoint(config.training) is not None
    cut, most = _cutter(config, checkpoint), _most_windows(config, processes)
    for name, source in _sources(config).items():
        path = _packed(config, name)
        if not (begun and path.exists()):
            documents = read_documents(source, config.field)
            pack(cut(documents), path, most[name])
            for line in documents.notes:
                report(line)


def window_sets(config: SparsifyConfig, processes: int) -> tuple[WindowSet, WindowSet, float]:
    """Return the windows to train on, those held out, and how often the text is gone through.

    Raises:
        DataError: a text gives fewer windows than one step takes, or than are held out.
    """
    step = config.step_windows(processes)
    packed: dict[str, Windows] = {}
    for name, source in _sources(config).items():
        packed[name] = open_windows(_packed(config, name), config.context)
        need_windows(config, name, source, len(packed[name]), step)
    back = _held_back(config, len(packed["train"]))
    held, train = packed.get("eval", packed["train"][:back]), packed["train"][back:]
    first = config.schedule.start_of("sft") if config.sft_data else config.schedule.steps
    parts = [(train, first * step)]
    if config.sft_data:
        parts.append((packed["sft"], (config.schedule.steps - first) * step))
    passes = first * step / len(train)
    return WindowSet(parts, config.seed), WindowSet([(held, len(held))], None), passes


def _sources(config: SparsifyConfig) -> dict[str, Sources]:
    """Return name to source of every text of its own."""
    sources = {"train": config.data, "sft": config.sft_data, "eval": config.eval_data}
    return {name: source for name, source in sources.items() if source}


def _cutter(
    config: SparsifyConfig, checkpoint: Checkpoint
) -> Callable[[Iterable[str]], Iterator[list[int]]]:
    """Return what cuts documents into windows."""
    tokenizer = checkpoint.tokenizer()
    return lambda documents: cut_stream(documents, tokenizer, config.context)


def _most_windows(config: SparsifyConfig, processes: int) -> dict[str, int]:
    """Return how many windows of each text are made, at most."""
    trained = _SPREAD * config.schedule.steps * config.step_windows(processes)
    held = 0 if config.eval_data else config.eval_windows
    return {"train": trained + held, "sft": trained, "eval": config.eval_windows}


def _packed(config: SparsifyConfig, name: str) -> Path:
    return config.training / f"{name}.windows"


def _held_back(config: SparsifyConfig, found: int) -> int:
    """Return how many of the first windows of the text to train on are held out."""
    return 0 if config.eval_data else max(1, min(config.eval_windows, found // 10))
