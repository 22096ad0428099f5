"""The text of a collection, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from tqdm import tqdm

from architectures.tokenizer import Tokenizer
from common.documents import read_documents
from common.errors import DataError, TraceError
from common.hashing import HashedFile
from common.overlap import one_ahead
from common.text_sources.names import shown
from predictor.collection.windows import (
    Window,
    cut_shards,
    cut_windows,
    order_windows,
    segments_of,
    text_sha256,
)
from predictor.traces.manifest import TraceHeader
from predictor.traces.store import TraceStore


@dataclass(frozen=True, kw_only=True)
class TextShard:
    """What a shard is recorded from.

    Attributes:
        number: of the shard.
        windows: longest first.
        segments: document number and rows of each run of rows.
        text_sha256: checksum of the token ids.
    """

    number: int
    windows: list[Window]
    segments: tuple[tuple[int, int], ...]
    text_sha256: str

    @property
    def rows(self) -> int:
        """Tokens."""
        return sum(rows for _, rows in self.segments)


def token_bar(store: TraceStore) -> tqdm:
    """Return a bar of a store's tokens, with those that are committed."""
    total, done = store.header.tokens, store.rows
    return tqdm(total=total, initial=done, unit="tok", desc="collect", disable=None)


class Text:
    """What a store's rows are made from."""

    def __init__(self, header: TraceHeader, tokenizer: Tokenizer) -> None:
        """Name the text.

        Args:
            header: of the store.
            tokenizer: the model's.
        """
        self._documents = read_documents(header.data, header.field, header.chat_template)
        self._header, self._tokenizer = header, tokenizer

    def missing(self, store: TraceStore, *, ahead: bool) -> Iterator[TextShard]:
        """Yield the shards that a store lacks, in order.

        Args:
            store: it may have been begun.
            ahead: cut the next one while the last is in use.

        Raises:
            PspError: the text is unreadable, or not the one that the store was begun with.
        """
        header, held = self._header, store.progress.shards
        windows = cut_windows(self._documents, self._tokenizer, header.context)
        shards: Iterable[list[Window]] = cut_shards(windows, header.shard_rows, header.tokens)
        shards = one_ahead(shards) if ahead else shards
        for number, (committed, cut) in enumerate(zip_longest(held, shards)):
            found = order_windows(cut or [])
            shard = TextShard(
                number=number,
                windows=found,
                segments=segments_of(found),
                text_sha256=text_sha256(found),
            )
            if committed is None:
                yield shard
            elif (committed.text_sha256, committed.segments) != (shard.text_sha256, shard.segments):
                raise TraceError(
                    f"{store}: {shown(header.data)} or the tokenizer has changed since the "
                    "store was begun",
                    "restore it, or use --force to start over",
                )

    def finish(
        self,
        store: TraceStore,
        model_files: tuple[HashedFile, ...],
        report: Callable[[str], None],
    ) -> None:
        """Mark a store complete, in which every shard is committed.

        Args:
            store: it.
            model_files: the model's weights.
            report: receives lines about rows that were passed over.

        Raises:
            DataError: there is no shard.
        """
        if not store.rows:
            raise DataError(
                f"{shown(self._header.data)}: gives no tokens",
                "pass a source with at least one document",
            )
        store.finish(skipped_rows=self._documents.skipped, model_files=model_files)
        for line in self._documents.row_notes:
            report(line)
