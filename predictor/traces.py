"""The trace store: what a model's FFNs did on each token, on disk.

Layout of a store directory::

    manifest.json                     written last at every commit; the truth about what is valid
    layer-00/weights.safetensors      gate      (d_ff, d_model) float16, gate matrix times norm
                                      down_norms (d_ff,) float32, norms of the down columns
    layer-00/shard-00000.safetensors  inputs    (rows, d_model) float16 or bfloat16
                                      active    (rows, ceil(d_ff / 8)) uint8, bit-packed, LSB first
                                      counts    (d_ff,) int64, tokens on which a neuron was active
                                      magnitude (sum of counts,) uint8 codes, row by row

A shard is committed by writing its file for every layer and then the manifest that counts it. A
killed run leaves at most files that no manifest counts; the next run overwrites them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from common.errors import TraceError
from common.files import read_json, sha256, write_bytes, write_json
from common.version import tool_version

SCHEMA_VERSION = 1
_AGAIN = "collect the traces again"


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """What a store was made from; two stores with equal headers and data are interchangeable.

    Attributes:
        model: the model as the user named it.
        model_fingerprint: `Checkpoint.fingerprint`.
        architecture: name of the family.
        activation: activation of the FFN.
        n_layers: blocks.
        d_model: hidden size.
        d_ff: neurons in a layer.
        norm_eps: epsilon of the FFN norm.
        input_dtype: `float16` or `bfloat16`.
        data: the text source as the user named it.
        field: key of the text in the source.
        tokens: tokens asked for.
        context: longest window, tokens.
        batch: windows run at once.
        shard_rows: rows after which a shard is closed.
        seed: seed of the run.
    """

    model: str
    model_fingerprint: str
    architecture: str
    activation: str
    n_layers: int
    d_model: int
    d_ff: int
    norm_eps: float
    input_dtype: str
    data: str
    field: str
    tokens: int
    context: int
    batch: int
    shard_rows: int
    seed: int


@dataclass(frozen=True)
class LayerRows:
    """Trace rows of one layer.

    Attributes:
        inputs: (rows, d_model) float16 or bfloat16, the predictor's input.
        active: (rows, ceil(d_ff / 8)) uint8, bit-packed, least significant bit first.
        counts: (d_ff,) int64.
        magnitude: (number of set bits,) uint8 codes in row order, see `predictor.magnitude`.
    """

    inputs: torch.Tensor
    active: torch.Tensor
    counts: torch.Tensor
    magnitude: torch.Tensor


@dataclass(frozen=True)
class LayerWeights:
    """What training needs of a layer's weights.

    Attributes:
        gate: (d_ff, d_model) float32, gate matrix times the FFN norm's weight.
        down_norms: (d_ff,) float32, norm of each column of the down projection.
    """

    gate: torch.Tensor
    down_norms: torch.Tensor


@dataclass
class Progress:
    """What is committed: rows of each shard, and rows of each document in order."""

    shards: list[int] = field(default_factory=list)
    document_rows: list[int] = field(default_factory=list)
    complete: bool = False


def pack_active(active: torch.Tensor) -> torch.Tensor:
    """Pack (rows, d_ff) bool into (rows, ceil(d_ff / 8)) uint8."""
    return torch.from_numpy(np.packbits(active.cpu().numpy(), axis=1, bitorder="little"))


def unpack_active(packed: torch.Tensor, d_ff: int) -> torch.Tensor:
    """Unpack (rows, ceil(d_ff / 8)) uint8 into (rows, d_ff) bool."""
    bits = np.unpackbits(packed.numpy(), axis=1, count=d_ff, bitorder="little")
    return torch.from_numpy(bits.view(bool))


class TraceStore:
    """A store directory, opened for reading or for appending shards."""

    def __init__(self, path: Path, header: TraceHeader, progress: Progress) -> None:
        """Wrap a directory whose manifest holds `header` and `progress`."""
        self.path, self.header, self.progress = path, header, progress

    @classmethod
    def create(cls, path: Path, header: TraceHeader) -> TraceStore:
        """Start an empty store."""
        store = cls(path, header, Progress())
        store._write_manifest()
        return store

    @classmethod
    def open(cls, path: Path) -> TraceStore:
        """Open a store.

        Raises:
            TraceError: no store there, damaged manifest or another schema version.
        """
        manifest = read_json(
            path / "manifest.json", TraceError, "pass a directory made by 'psp collect'"
        )
        version = manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise TraceError(
                f"{path}: trace schema version is {version!r}, this psp reads {SCHEMA_VERSION}; "
                f"{_AGAIN}"
            )
        try:
            header = TraceHeader(**manifest["header"])
            progress = Progress(**manifest["progress"])
        except (KeyError, TypeError) as error:
            raise TraceError(f"{path}/manifest.json: damaged ({error}); {_AGAIN}") from error
        return cls(path, header, progress)

    def require_complete(self) -> None:
        """Refuse a store whose collection was interrupted.

        Raises:
            TraceError: with the command that goes on.
        """
        if not self.progress.complete:
            raise TraceError(
                f"{self.path}: collection was interrupted after {self.rows} rows; "
                "finish it with 'psp collect ... --resume'"
            )

    @property
    def rows(self) -> int:
        """Tokens recorded."""
        return sum(self.progress.shards)

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest: names the store in what is made from it."""
        return sha256((self.path / "manifest.json").read_bytes())

    def _write_manifest(self) -> None:
        write_json(
            self.path / "manifest.json",
            {
                "schema_version": SCHEMA_VERSION,
                "tool_version": tool_version(),
                "header": asdict(self.header),
                "progress": asdict(self.progress),
            },
        )

    def _layer_file(self, layer: int, name: str) -> Path:
        return self.path / f"layer-{layer:02d}" / f"{name}.safetensors"

    def commit(self, layers: Sequence[LayerRows], document_rows: Sequence[int]) -> None:
        """Append one shard.

        Args:
            layers: rows of every layer, equally many.
            document_rows: for every document so far, how many rows are recorded, this shard's
                included.
        """
        number = len(self.progress.shards)
        for layer, rows in enumerate(layers):
            self._save(self._layer_file(layer, f"shard-{number:05d}"), vars(rows))
        self.progress.shards.append(len(layers[0].inputs))
        self.progress.document_rows = list(document_rows)
        self._write_manifest()

    def finish(self) -> None:
        """Mark the store complete."""
        self.progress.complete = True
        self._write_manifest()

    def save_weights(self, layer: int, weights: LayerWeights) -> None:
        """Store a layer's weights, the gate as float16."""
        tensors = {"gate": weights.gate.half(), "down_norms": weights.down_norms}
        self._save(self._layer_file(layer, "weights"), tensors)

    def weights(self, layer: int) -> LayerWeights:
        """Read what `save_weights` stored."""
        d_ff, d_model = self.header.d_ff, self.header.d_model
        tensors = self._load(self._layer_file(layer, "weights"))
        self._expect(layer, "weights", tensors, "gate", (d_ff, d_model))
        self._expect(layer, "weights", tensors, "down_norms", (d_ff,))
        return LayerWeights(tensors["gate"].float(), tensors["down_norms"])

    @staticmethod
    def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        write_bytes(path, save({name: t.contiguous() for name, t in tensors.items()}))

    @staticmethod
    def _load(path: Path) -> dict[str, torch.Tensor]:
        try:
            tensors: dict[str, torch.Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise TraceError(f"{path}: missing or damaged ({error}); {_AGAIN}") from error
        return tensors

    def _expect(
        self,
        layer: int,
        file: str,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        shape: tuple[int, ...],
    ) -> None:
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise TraceError(
                f"{self._layer_file(layer, file)}: {name} has shape {found}, the manifest implies "
                f"{shape}; {_AGAIN}"
            )

    def layer(self, layer: int) -> LayerRows:
        """Read all rows of one layer.

        Raises:
            TraceError: a shard is missing, damaged or does not fit the manifest.
        """
        packed = -(-self.header.d_ff // 8)
        parts: list[dict[str, torch.Tensor]] = []
        for number, rows in enumerate(self.progress.shards):
            name = f"shard-{number:05d}"
            tensors = self._load(self._layer_file(layer, name))
            self._expect(layer, name, tensors, "inputs", (rows, self.header.d_model))
            self._expect(layer, name, tensors, "active", (rows, packed))
            self._expect(layer, name, tensors, "counts", (self.header.d_ff,))
            self._expect(layer, name, tensors, "magnitude", (int(tensors["counts"].sum()),))
            parts.append(tensors)
        joined: dict[str, Any] = {
            name: torch.cat([part[name] for part in parts])
            for name in ("inputs", "active", "magnitude")
        }
        counts = torch.stack([part["counts"] for part in parts]).sum(0)
        return LayerRows(counts=counts, **joined)

    def activation_sparsity(self) -> list[float]:
        """Return every layer's activation sparsity over all rows, from the stored counts."""
        decisions = self.rows * self.header.d_ff
        sparsity = []
        for layer in range(self.header.n_layers):
            active = 0
            for number in range(len(self.progress.shards)):
                shard = self._load(self._layer_file(layer, f"shard-{number:05d}"))
                active += int(shard["counts"].sum())
            sparsity.append(1 - active / decisions)
        return sparsity

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
        documents = [rows for rows in self.progress.document_rows if rows]
        if len(documents) < 2:
            raise TraceError(
                f"{self.path}: holds {len(documents)} document, a holdout by document needs at "
                "least 2; collect from more documents or more --tokens"
            )
        order = np.random.default_rng(seed).permutation(len(documents))
        held: set[int] = set()
        for document in order[:-1]:
            if sum(documents[i] for i in held) >= share * self.rows:
                break
            held.add(int(document))
        lengths = torch.tensor(documents)
        chosen = torch.tensor([i in held for i in range(len(documents))])
        return torch.repeat_interleave(chosen, lengths)
