"""The trace store: what a model's FFNs did on each token, on disk or in an object store.

Layout of a store, see `predictor.traces.place` for where it may be::

    manifest.json                     written last at every commit; the truth about what is valid
    layer-00/weights.safetensors      gate (d_ff, d_model) float16 and down_norms (d_ff,) float32,
                                      see `LayerWeights`
    layer-00/shard-00000.safetensors  rows, see `shard_file`

A shard is committed by putting its file of every layer in its place, whole, and then the manifest
that counts it. A killed run leaves at most files that no manifest counts; the next run overwrites
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from common.errors import COLLECT_AGAIN, TraceError
from common.files import sha256
from common.hashing import HashedFile
from common.lock import refuse_written
from common.urls import Url
from predictor.traces.device_rows import rows_for
from predictor.traces.holdout import hold_out
from predictor.traces.manifest import Progress, Shard, TraceHeader, read_manifest, write_manifest
from predictor.traces.names import WEIGHTS, is_of_a_shard, layer_name, shard_name
from predictor.traces.objects import Objects, require_scratch
from predictor.traces.place import Directory, Place, place_of
from predictor.traces.rows import LayerRows, LayerWeights, ShardedRows, counted
from predictor.traces.shard_file import (
    ShardLayout,
    ShardWriter,
    check_shard,
    read_shard,
    vouch_shard,
)
from predictor.traces.staging import StagedFile, read_weights, write_weights
from predictor.traces.stated import stated_counts, stated_digests

_CPU = torch.device("cpu")


class TraceStore:
    """A store, opened for reading or for appending shards.

    Attributes:
        place: where it is.
    """

    def __init__(self, place: Place, header: TraceHeader, progress: Progress) -> None:
        """Wrap a place whose manifest holds `header` and `progress`."""
        self.place, self.header, self.progress = place, header, progress
        self._vouched: set[str] = set()

    def __str__(self) -> str:
        """Return how users name it."""
        return str(self.place)

    @property
    def path(self) -> Path:
        """The directory of a store that is in one."""
        assert isinstance(self.place, Directory)
        return self.place.where

    @classmethod
    def create(cls, where: Path | Url, header: TraceHeader) -> TraceStore:
        """Start an empty store.

        Raises:
            OutputError: the system, or the object store, refused.
        """
        progress = Progress(shards=(), weights=(), complete=False)
        store = cls(place_of(where), header, progress)
        write_manifest(store.place, header, progress, new=True)
        return store

    @classmethod
    def open(cls, where: Path | Url) -> TraceStore:
        """Open a store.

        Raises:
            TraceError: no store there, damaged manifest or another schema version, or an object
                store that does not answer.
        """
        place = place_of(where)
        if isinstance(place, Objects):
            place.ask(write=False)
        header, progress = read_manifest(place)
        return cls(place, header, progress)

    def require_complete(self) -> None:
        """Refuse a store whose collection was interrupted, or whose files are not those committed.

        Of the files only the checksums are read that they state; see `layer`.

        Raises:
            TraceError: with the command that goes on, or a file is another one.
        """
        if not self.progress.complete:
            if isinstance(self.place, Directory):
                refuse_written(self.path, TraceError)
            raise TraceError(
                f"{self}: collection was interrupted after {self.rows} rows",
                "finish it with 'psp collect ... --resume'",
            )
        for number, shard in enumerate(self.progress.shards):
            layout = self._layout(shard.rows)
            names = {shard_name(layer, number): layout for layer in self.header.layers}
            self._require_counted(number, stated_digests(self.place, names))

    def require_scratch(self, layers: int) -> None:
        """Refuse a scratch directory that does not hold as many layers as are read at once.

        A store in a directory needs none.

        Raises:
            OutputError: it is too small.
        """
        if isinstance(self.place, Objects):
            held = min(layers, len(self.header.layers))
            needed = held * self.place.largest(layer_name(n, "") for n in self.header.layers)
            require_scratch(needed, f"{self}: reading {held} of its layers at once")

    @property
    def rows(self) -> int:
        """Tokens recorded."""
        return sum(shard.rows for shard in self.progress.shards)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that are recorded."""
        return self.header.layers

    @property
    def next_shard(self) -> int:
        """Number of the first shard that is not committed."""
        return len(self.progress.shards)

    @property
    def documents(self) -> int:
        """Documents with at least one row."""
        return len({number for number, _ in self.segments})

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Document number and rows of each run of rows of one document, in order."""
        return [segment for shard in self.progress.shards for segment in shard.segments]

    @property
    def identity(self) -> str:
        """SHA-256 of what the rows were made from, whichever layers are recorded.

        Stores of one collection made in several passes over the layers share it.
        """
        header = asdict(self.header) | {"layers": None}
        texts = [shard.text_sha256 for shard in self.progress.shards]
        return sha256(json.dumps([header, texts], sort_keys=True).encode())

    def _commit(self, **progress: Any) -> None:
        """Write the manifest with progress that has been made."""
        self.progress = replace(self.progress, **progress)
        write_manifest(self.place, self.header, self.progress)

    def _layout(self, rows: int) -> ShardLayout:
        return shard_layout(self.header, rows)

    @contextmanager
    def shard(
        self,
        segments: Sequence[Sequence[int]],
        text_sha256: str,
        before: Callable[[], object] = lambda: None,
        number: int | None = None,
    ) -> Iterator[dict[int, ShardWriter]]:
        """Append one shard: yield a writer for each layer, commit if the block ends well.

        Args:
            segments: document number and rows of each run of rows, in the order of the rows.
            text_sha256: checksum of the shard's token ids.
            before: called before the commit; waits for those of shards that are still written.
            number: of the shard; None is the first that is not committed.

        Yields:
            Layer number to writer.
        """
        number = len(self.progress.shards) if number is None else number
        layout = self._layout(sum(rows for _, rows in segments))
        names = [shard_name(layer, number) for layer in self.header.layers]
        with self.place.writing(*names) as parts, ExitStack() as stack:
            writers = {}
            for layer, name, part in zip(self.header.layers, names, parts, strict=True):
                file = self.place.at(name)
                writer = ShardWriter(part, layout, file if isinstance(file, Path) else part)
                writers[layer] = stack.enter_context(writer)
            yield writers
            before()
        assert number == len(self.progress.shards)
        digests = {layer: writer.digest for layer, writer in writers.items()}
        self._count(segments, text_sha256, digests)

    def adopt(
        self,
        segments: Sequence[Sequence[int]],
        text_sha256: str,
        files: Mapping[int, StagedFile],
    ) -> None:
        """Append a shard that other processes wrote beside the store, see `staging`.

        Args:
            segments: as for `shard`.
            text_sha256: likewise.
            files: of every recorded layer.

        Raises:
            OutputError: the system refused.
        """
        number = len(self.progress.shards)
        for layer in self.header.layers:
            self.place.adopt(files[layer].file, shard_name(layer, number))
        digests = {layer: file.digest for layer, file in files.items()}
        self._count(segments, text_sha256, digests)

    def _count(
        self, segments: Sequence[Sequence[int]], text_sha256: str, digests: Mapping[int, str]
    ) -> None:
        """Commit a shard whose files are in their places."""
        digest = _joined(digests[layer] for layer in self.header.layers)
        kept = tuple((document, rows) for document, rows in segments)
        shard = Shard(segments=kept, text_sha256=text_sha256, sha256=digest)
        self._commit(shards=(*self.progress.shards, shard))

    def finish(self, *, skipped_rows: int = 0, model_files: tuple[HashedFile, ...] = ()) -> None:
        """Mark the store complete and remove what killed runs left behind.

        Args:
            skipped_rows: rows of the source without text.
            model_files: the model's weights.
        """
        layers, shards = self.header.layers, range(len(self.progress.shards))
        wanted = {shard_name(layer, number) for layer in layers for number in shards}
        ours = tuple(layer_name(layer, "") for layer in layers)
        found = (
            name for name in self.place.sizes() if name.startswith(ours) and is_of_a_shard(name)
        )
        self.place.remove(*(name for name in found if name not in wanted))
        self._commit(complete=True, skipped_rows=skipped_rows, model_files=model_files)

    def save_weights(self, layers: Iterable[tuple[int, LayerWeights]]) -> None:
        """Store the weights of every recorded layer, in order, gates as float16."""
        digests = [
            write_weights(self.place, layer_name(layer, WEIGHTS), weights)
            for layer, weights in layers
        ]
        self._commit(weights=tuple(digests))

    def adopt_weights(self, files: Sequence[StagedFile]) -> None:
        """Do the same with what other processes wrote beside the store, see `staging`.

        Raises:
            OutputError: the system refused.
        """
        for layer, file in zip(self.header.layers, files, strict=True):
            self.place.adopt(file.file, layer_name(layer, WEIGHTS))
        self._commit(weights=tuple(file.digest for file in files))

    @contextmanager
    def _one_collection(self) -> Iterator[None]:
        """Read files that are all of the collection that was opened.

        Files are opened by name, and `collect --force` exchanges the directory as a whole: if the
        manifest is the same afterwards, so were they.

        Raises:
            TraceError: another one has taken its place.
        """
        try:
            yield
        except TraceError:
            self._refuse_replaced()
            raise
        self._refuse_replaced()

    def _refuse_replaced(self) -> None:
        try:
            same = read_manifest(self.place) == (self.header, self.progress)
        except TraceError:
            same = False
        if not same:
            raise TraceError(f"{self}: was replaced while it was read", "start again")

    def weights(self, layer: int) -> LayerWeights:
        """Read what `save_weights` stored.

        Raises:
            TraceError: missing, damaged, of other sizes than the manifest says, or replaced since
                the store was opened.
        """
        with self._one_collection():
            return self._read_weights(layer)

    def _read_weights(self, layer: int) -> LayerWeights:
        with self.place.reading(layer_name(layer, WEIGHTS)) as [file]:
            stated = dict(zip(self.header.layers, self.progress.weights, strict=False)).get(layer)
            return read_weights(file, stated, self.header.d_model, self.header.d_ff)

    def layer(self, layer: int, device: torch.device = _CPU) -> ShardedRows:
        """Map all rows of one layer; only where each row's importance begins is held in memory.

        The first time that files are mapped they are read and compared with their checksums.

        Args:
            layer: its number.
            device: where rows are computed with; a GPU's memory holds them if they fit.

        Raises:
            TraceError: the layer was not recorded, a shard is missing, damaged or does not fit the
                manifest, or the store was replaced since it was opened.
        """
        if layer not in self.header.layers:
            raise TraceError(f"{self}: layer {layer} was not collected", "see --layers")
        if not self.progress.shards:
            raise TraceError(f"{self}: holds no rows yet", "go on with 'psp collect --resume'")
        shards = self._shards_of(layer)
        with self._one_collection(), self.place.reading(*shards) as files:
            pieces = [
                self._mapped(name, file, layout)
                for (name, layout), file in zip(shards.items(), files, strict=True)
            ]
        if device.type == "cuda":
            return rows_for(device, pieces, lambda: list(map(counted, pieces)))
        return ShardedRows(*map(counted, pieces))

    def _shards_of(self, layer: int) -> dict[str, ShardLayout]:
        """Return the names of a layer's shard files, with their sizes."""
        return {
            shard_name(layer, number): self._layout(shard.rows)
            for number, shard in enumerate(self.progress.shards)
        }

    def _require_counted(self, number: int, digests: Iterable[str]) -> None:
        """Refuse files of a shard, layer after layer, that are not those that were committed."""
        if _joined(digests) != self.progress.shards[number].sha256:
            raise TraceError(
                f"{self}: shard {number} is whole but not the manifest's", COLLECT_AGAIN
            )

    def _mapped(self, name: str, file: Path, layout: ShardLayout) -> LayerRows:
        """Map a shard file; where rows' importance begins is left open.

        One that stays where it is is read and compared with its checksum once.

        Raises:
            TraceError: it differs.
        """
        if name not in self._vouched:
            vouch_shard(file, layout)
        if isinstance(self.place, Directory):
            self._vouched.add(name)
        return LayerRows(
            importance_bits=self.header.importance_bits,
            starts=torch.zeros(0, dtype=torch.int64),
            file=self.place.at(name),
            **read_shard(file, layout),
        )

    def activation_sparsity(self) -> dict[int, float]:
        """Return every recorded layer's activation sparsity over all rows, from stored counts."""
        decisions = self.rows * self.header.d_ff
        sparsity = {}
        with self._one_collection():
            for layer in self.header.layers:
                counts = stated_counts(self.place, self._shards_of(layer))
                active = sum(int(each.sum()) for each in counts)
                sparsity[layer] = 1 - active / decisions
        return sparsity

    def check(self) -> None:
        """Verify every committed file: sizes, counts, checksums.

        Raises:
            TraceError: naming the first file that is wrong.
        """
        counted = len(self.progress.weights)
        for layer in self.header.layers[:counted]:
            self.weights(layer)
        if self.progress.shards and counted != len(self.header.layers):
            raise TraceError(f"{self}/manifest.json: weights of layers are missing", COLLECT_AGAIN)
        for number, shard in enumerate(self.progress.shards):
            layout = self._layout(shard.rows)
            digests = []
            for layer in self.header.layers:
                with self.place.reading(shard_name(layer, number)) as [file]:
                    digests.append(check_shard(file, layout))
            self._require_counted(number, digests)

    def holdout(self, share: float, seed: int) -> torch.Tensor:
        """Choose whole documents for the holdout.

        Args:
            share: share of rows to hold out, at least, unless all documents but one fall short.
            seed: seed of the choice.

        Returns:
            (rows,) bool, true where the row belongs to a held-out document.

        Raises:
            TraceError: fewer than two documents.
        """
        if self.documents < 2:
            raise TraceError(
                f"{self}: holds {self.documents} document, a holdout by document needs at least 2",
                "collect from more documents or more --tokens",
            )
        return hold_out(self.segments, share, seed)


def shard_layout(header: TraceHeader, rows: int) -> ShardLayout:
    """Return the sizes of a store's shard of so many rows."""
    return ShardLayout(
        rows=rows,
        d_model=header.d_model,
        d_ff=header.d_ff,
        input_dtype=header.input_dtype,
        importance_bits=header.importance_bits,
    )


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
