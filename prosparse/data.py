"""Text as fixed windows of token ids, packed once into a file and mapped from there.

A window is BOS and then the next tokens of one long stream: all documents in order, each started by
BOS. Nothing is padded, so every token weighs the same; only the rest of the stream that fills no
window is dropped. The order of training is a permutation an epoch, drawn from the seed and the
epoch's number alone, so a resumed run sees the windows that an unbroken one would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from architectures.tokenizer import Tokenizer
from common.errors import DataError
from common.files import atomic_path

Windows = npt.NDArray[np.int32]
Item = dict[str, torch.Tensor]


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


def pack(windows: Iterable[Sequence[int]], path: Path, context: int, most: int) -> Windows:
    """Write windows to a file, and map it.

    Args:
        windows: as from `cut_stream`.
        path: the file, int32 ids.
        context: length of a window.
        most: stop after so many.

    Returns:
        (n, context) int32, mapped; n may be 0.
    """
    with atomic_path(path) as part, part.open("wb") as file:
        for window in islice(windows, most):
            file.write(np.asarray(window, np.int32).tobytes())
    return open_windows(path, context)


def open_windows(path: Path, context: int) -> Windows:
    """Map packed windows, (n, context) int32."""
    if not path.stat().st_size:
        return np.zeros((0, context), np.int32)
    return np.memmap(path, np.int32, "r").reshape(-1, context)


def need_windows(found: int, least: int, context: int, source: str) -> None:
    """Refuse text that gives too few windows.

    Raises:
        DataError: naming the source and how much it gives.
    """
    if found < least:
        raise DataError(
            f"{source}: gives {found} windows of {context} tokens, needed are {least}",
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
