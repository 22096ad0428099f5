"""The trace store: what a model's FFNs did on each token, on disk.

Layout of a store directory::

    manifest.json                     written last at every commit; the truth about what is valid
    layer-00/weights.safetensors      gate (d_ff, d_model) float16 and down_norms (d_ff,) float32,
                                      see `LayerWeights`
    layer-00/shard-00000.safetensors  rows, see `shard_file`

A shard is committed by renaming its file of every layer and then writing the manifest that counts
it. A killed run leaves at most files that no manifest counts; the next run overwrites them.
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
import xxhash

from common.errors import COLLECT_AGAIN, TraceError
from common.files import atomic_path, put_in_place, sha256
from common.hashing import HashedFile
from common.lock import refuse_written
from predictor.traces.device_rows import rows_for
from predictor.traces.holdout import hold_out
from predictor.traces.manifest import Progress, Shard, TraceHeader, read_manifest, write_manifest
from predictor.traces.packing import count_active
from predictor.traces.rows import LayerRows, LayerWeights, ShardedRows, check_counts
from predictor.traces.shard_file import (
    ShardLayout,
    ShardWriter,
    check_shard,
    read_shard,
    read_tensors,
    shard_counts,
    stated_digest,
    vouch_shard,
)
from predictor.traces.staging import StagedFile, write_weights

_CPU = torch.device("cpu")


class TraceStore:
    """A store directory, opened for reading or for appending shards."""

    def __init__(self, path: Path, header: TraceHeader, progress: Progress) -> None:
        """Wrap a directory whose manifest holds `header` and `progress`."""
        self.path, self.header, self.progress = path, header, progress
        self._vouched: set[tuple[int, int]] = set()

    @classmethod
    def create(cls, path: Path, header: TraceHeader) -> TraceStore:
        """Start an empty store."""
        store = cls(path, header, Progress(shards=(), weights=(), complete=False))
        store._commit()
        return store

    @classmethod
    def open(cls, path: Path) -> TraceStore:
        """Open a store.

        Raises:
            TraceError: no store there, damaged manifest or another schema version.
        """
        header, progress = read_manifest(path)
        return cls(path, header, progress)

    def require_complete(self) -> None:
        """Refuse a store whose collection was interrupted, or whose files are not those committed.

        Of the files only the checksums are read that they state; see `layer`.

        Raises:
            TraceError: with the command that goes on, or a file is another one.
        """
        if not self.progress.complete:
            refuse_written(self.path, TraceError)
            raise TraceError(
                f"{self.path}: collection was interrupted after {self.rows} rows",
                "finish it with 'psp collect ... --resume'",
            )
        for number in range(len(self.progress.shards)):
            files = (self._shard_file(layer, number) for layer in self.header.layers)
            self._require_counted(number, map(stated_digest, files))

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
        write_manifest(self.path, self.header, self.progress)

    def _layer_file(self, layer: int, name: str) -> Path:
        return self.path / f"layer-{layer:02d}" / f"{name}.safetensors"

    def _shard_file(self, layer: int, number: int) -> Path:
        return self._layer_file(layer, f"shard-{number:05d}")

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
        rows = sum(rows for _, rows in segments)
        with ExitStack() as stack:
            writers = {}
            for layer in self.header.layers:
                file = self._shard_file(layer, number)
                part = stack.enter_context(atomic_path(file))
                writers[layer] = stack.enter_context(ShardWriter(part, self._layout(rows), file))
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
        """Append a shard that other processes wrote on the store's disk, see `staging`.

        Args:
            segments: as for `shard`.
            text_sha256: likewise.
            files: of every recorded layer.

        Raises:
            OutputError: the system refused.
        """
        number = len(self.progress.shards)
        for layer in self.header.layers:
            _adopt(files[layer], self._shard_file(layer, number))
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
        for layer in self.header.layers:
            wanted = {self._shard_file(layer, n).name for n in range(len(self.progress.shards))}
            for file in self._layer_file(layer, "weights").parent.iterdir():
                if _is_ours(file) and file.name not in wanted:
                    file.unlink()
        self._commit(complete=True, skipped_rows=skipped_rows, model_files=model_files)

    def save_weights(self, layers: Iterable[tuple[int, LayerWeights]]) -> None:
        """Store the weights of every recorded layer, in order, gates as float16."""
        digests = [
            write_weights(self._layer_file(layer, "weights"), weights) for layer, weights in layers
        ]
        self._commit(weights=tuple(digests))

    def adopt_weights(self, files: Sequence[StagedFile]) -> None:
        """Do the same with what other processes wrote on the store's disk, see `staging`.

        Raises:
            OutputError: the system refused.
        """
        for layer, file in zip(self.header.layers, files, strict=True):
            _adopt(file, self._layer_file(layer, "weights"))
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
            same = read_manifest(self.path) == (self.header, self.progress)
        except TraceError:
            same = False
        if not same:
            raise TraceError(f"{self.path}: was replaced while it was read", "start again")

    def weights(self, layer: int) -> LayerWeights:
        """Read what `save_weights` stored.

        Raises:
            TraceError: missing, damaged, of other sizes than the manifest says, or replaced since
                the store was opened.
        """
        with self._one_collection():
            return self._read_weights(layer)

    def _read_weights(self, layer: int) -> LayerWeights:
        file = self._layer_file(layer, "weights")
        tensors = read_tensors(file)
        stated = dict(zip(self.header.layers, self.progress.weights, strict=False)).get(layer)
        if stated is not None and xxhash.xxh3_128_hexdigest(file.read_bytes()) != stated:
            raise TraceError(f"{file}: checksum differs from the manifest's", COLLECT_AGAIN)
        d_ff, d_model = self.header.d_ff, self.header.d_model
        for name, shape in (("gate", (d_ff, d_model)), ("down_norms", (d_ff,))):
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise TraceError(
                    f"{file}: {name} has shape {found}, the manifest implies {shape}", COLLECT_AGAIN
                )
        return LayerWeights(tensors["gate"].float(), tensors["down_norms"])

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
            raise TraceError(f"{self.path}: layer {layer} was not collected", "see --layers")
        if not self.progress.shards:
            raise TraceError(f"{self.path}: holds no rows yet", "go on with 'psp collect --resume'")
        with self._one_collection():
            self._vouch(layer)
            pieces = [
                self._mapped(layer, n, shard.rows) for n, shard in enumerate(self.progress.shards)
            ]
        if device.type == "cuda":
            return rows_for(device, pieces, lambda: list(map(_counted, pieces)))
        return ShardedRows(*map(_counted, pieces))

    def _vouch(self, layer: int) -> None:
        """Read a layer's shards, once, and compare their checksums with those that they state.

        Raises:
            TraceError: one differs.
        """
        for number, shard in enumerate(self.progress.shards):
            if (layer, number) not in self._vouched:
                vouch_shard(self._shard_file(layer, number), self._layout(shard.rows))
                self._vouched.add((layer, number))

    def _require_counted(self, number: int, digests: Iterable[str]) -> None:
        """Refuse files of a shard, layer after layer, that are not those that were committed."""
        if _joined(digests) != self.progress.shards[number].sha256:
            raise TraceError(
                f"{self.path}: shard {number} is whole but not the manifest's", COLLECT_AGAIN
            )

    def _mapped(self, layer: int, number: int, rows: int) -> LayerRows:
        """Map a shard file; where rows' importance begins is left open."""
        file, starts = self._shard_file(layer, number), torch.zeros(0, dtype=torch.int64)
        parts = read_shard(file, self._layout(rows))
        return LayerRows(
            importance_bits=self.header.importance_bits, starts=starts, file=file, **parts
        )

    def activation_sparsity(self) -> dict[int, float]:
        """Return every recorded layer's activation sparsity over all rows, from stored counts."""
        decisions = self.rows * self.header.d_ff
        sparsity = {}
        with self._one_collection():
            for layer in self.header.layers:
                files = (self._shard_file(layer, n) for n in range(len(self.progress.shards)))
                active = sum(int(shard_counts(file).sum()) for file in files)
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
            raise TraceError(
                f"{self.path}/manifest.json: weights of layers are missing", COLLECT_AGAIN
            )
        for number, shard in enumerate(self.progress.shards):
            layout = self._layout(shard.rows)
            files = (self._shard_file(each, number) for each in self.header.layers)
            self._require_counted(number, [check_shard(file, layout) for file in files])

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
                f"{self.path}: holds {self.documents} document, a holdout by document needs at "
                "least 2",
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


def _adopt(staged: StagedFile, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    put_in_place(staged.file, file)


def _counted(piece: LayerRows) -> LayerRows:
    """Find where each row's importance begins."""
    if not piece.importance_bits:
        return piece
    per_row = count_active(piece.active)
    check_counts(piece.file, per_row, piece.counts)
    return replace(piece, starts=torch.cumsum(per_row, 0) - per_row)


def _is_ours(file: Path) -> bool:
    """Whether a file is a shard's, or one that was not finished."""
    return file.match("shard-*.safetensors") or file.match(".*.safetensors.part")


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
