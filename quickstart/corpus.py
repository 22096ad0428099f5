"""The source text of the Python standard library: a corpus that every machine has."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.files import write_bytes

_SMALLEST, _LARGEST = 2_000, 100_000
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Text split by document.

    Attributes:
        directory: of both splits.
    """

    directory: Path

    @property
    def train(self) -> Path:
        """JSON lines with `text`, for training and traces."""
        return self.directory / "train.jsonl"

    @property
    def valid(self) -> Path:
        """Plain text of documents that are in no other split, for perplexity."""
        return self.directory / "valid.txt"


def library_files() -> list[Path]:
    """Return the library's source files in a fixed order, tests and installed packages excepted.

    Raises:
        DataError: this Python ships no source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED & set(path.relative_to(root).parts)
        and _SMALLEST <= path.stat().st_size <= _LARGEST
    ]
    if len(files) < 50:
        raise DataError(
            f"{root}: only {len(files)} source files", "install Python with its library"
        )
    return files


def write_corpus(directory: Path, *, characters: int, seed: int) -> Corpus:
    """Write a corpus of about `characters` characters, a tenth of it for validation.

    Args:
        directory: receives both splits.
        characters: size of both splits together.
        seed: chooses the documents and the split.
    """
    files = library_files()
    order = np.random.default_rng(seed).permutation(len(files))
    valid: list[str] = []
    train: list[str] = []
    for number in order:
        text = files[number].read_text(encoding="utf-8", errors="replace")
        split = valid if sum(map(len, valid)) < characters // 10 else train
        split.append(text)
        if sum(map(len, train)) >= characters - characters // 10:
            break
    corpus = Corpus(directory)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in train)
    write_bytes(corpus.train, "".join(lines).encode())
    write_bytes(corpus.valid, "\n".join(valid).encode())
    return corpus


def texts_of(corpus: Corpus) -> Iterable[str]:
    """Yield the training documents."""
    for line in corpus.train.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]
