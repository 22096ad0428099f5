"""What a benchmark reads: the text, the prompts, and all of it told by content."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from xxhash import xxh3_128

from common.documents import read_documents
from common.errors import DataError
from common.files import read_whole
from common.hashing import hash_file
from common.text_sources.names import shown
from gguf_export.manifest import refuse_damaged
from gguf_export.tokens.vocabulary import Vocabulary
from powerinfer_bridge.benchmark.settings import BenchConfig
from results.bench import Input


def text_source(config: BenchConfig) -> str:
    """Return where that text comes from, for readers."""
    return shown(config.data) or "pydoc_data.topics"


def read_prompts(config: BenchConfig) -> list[str]:
    """Return what is continued, none of it empty: one prompt, or those of a file.

    A `.txt` file holds one a line, blank lines between them are skipped and nothing else is
    stripped. Prompts of several lines come from the structured kinds of `common.documents`, one a
    row.

    Raises:
        DataError: unreadable, no prompt in it, or one that no program can be passed.
    """
    if config.prompts is None:
        found = [config.prompt]
    elif not os.path.isfile(config.prompts):
        raise DataError(f"{config.prompts}: no such file", "check --prompts")
    elif config.prompts.suffix == ".txt":
        found = _lines(config.prompts)
    else:
        found = list(read_documents(str(config.prompts), config.field))
    if not found:
        raise DataError(f"{config.prompts}: holds no prompt", "write one a line")
    for number, prompt in enumerate(found, 1):
        if "\0" in prompt:  # an argument of a program ends there
            raise DataError(
                f"{config.prompts or '--prompt'}: prompt {number} holds a NUL", "remove it"
            )
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = read_whole(path, DataError, "check --prompts", piped=True).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 ({error.reason})", "convert the file to UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").split("\n")  # splitlines() knows too many ends of line
    return [line for line in lines if line.strip()]


def room_for(prompts: list[str], vocabulary: Vocabulary, generate: int, context_length: int) -> int:
    """Return the tokens that the longest prompt and its continuation take.

    Raises:
        DataError: more than the model's context.
    """
    longest = max(len(vocabulary.prompt_ids(prompt)) for prompt in prompts)
    needed = longest + generate
    if needed > context_length:
        raise DataError(
            f"prompt and -n need {needed} tokens, the model's context is {context_length}",
            "lower -n or shorten the prompt",
        )
    return needed


def describe_files(files: Mapping[str, Path | None]) -> Iterator[Input]:
    """Yield role, path, size and hash of each file that there is, by role; each is read once.

    Raises:
        DataError: one cannot be read.
        FormatError: one is not what was exported; see `gguf_export.manifest`.
    """
    hash_once = cache(hash_file)
    for role, path in files.items():
        if path is not None:
            size, digest = hash_once(path)
            refuse_damaged(path, digest)
            yield Input(role=role, path=str(path), bytes=size, xxh3_128=digest)


def describe_text(role: str, source: str, text: str) -> Input:
    """Hash a text as it was understood, whatever file or data set it came from."""
    data = text.encode("utf-8", "surrogateescape")
    return Input(role=role, path=source, bytes=len(data), xxh3_128=xxh3_128(data).hexdigest())
