"""The predictor artifact: what `train-predictor` writes and `export-gguf` reads.

Layout of a directory::

    predictors.json             schema, model, recipe, threshold, one entry a finished layer, how
                                its training went, the operating points that were tried, which
                                layers are dense, and the checksums of the files
    layer-00.safetensors        fc1 (rank, d_model), fc2 (d_ff, rank), both float16 or rows of Q4_0
                                blocks (uint8); activation_counts (d_ff,) int64; thresholds (d_ff,)
                                float32 if each neuron has its own. Also of a dense layer, which
                                another bound may do with a predictor again
    curves-00.safetensors       what was measured at other thresholds, to choose others later
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from common.decisions import mean_metrics
from common.element_types import ELEMENT_TYPES, F16
from common.errors import TRAIN_AGAIN, PredictorError
from common.files import put_in_place
from common.hashing import HashedFile
from common.lock import refuse_written
from common.outputs import changed_whole
from common.sealed import read_sealed, write_sealed
from common.typed_json import parse, plain
from common.version import tool_version
from predictor.dense_layer import least_predictor, least_size
from predictor.index import ArtifactIndex
from predictor.index import Epoch as Epoch
from predictor.index import PredictorHeader as PredictorHeader
from predictor.size import Size
from predictor.stored import LayerPredictor
from predictor.tensor_files import StoredTensors, load_tensors, save_tensors
from results.predictors import SearchPoint

SCHEMA_VERSION = 6
_READABLE = (4, 5, SCHEMA_VERSION)
"""Version 4 knew float16 only, version 5 no dense layers."""
INDEX = "predictors.json"

BYTES_WITH_PREDICTOR = "bytes_with_predictor"
"""What a dense layer's FFN bytes ratio with its predictor is called."""


@dataclass
class PredictorArtifact:
    """A predictor directory, opened for reading or for appending layers.

    Attributes:
        path: the directory.
        header: what it was made for and from.
        layers: layer number to metrics, of the finished layers.
        ranks: layer number to rank, where ranks were chosen for each layer.
        types: layer number to type, where types were.
        search: operating points that were tried.
        epochs: layer number to its epochs; none of layers that an older psp trained.
        files: name to checksum (XXH3); none of what an older psp wrote.
        model_files: weights of the model whose traces were used; none if an older psp made them.
        dense: number of a dense layer to the FFN bytes ratio that it has with its predictor; see
            `predictor.dense_layer`.
        tokens: of the traces; 0 if an older psp made them, which had no dense layers.
    """

    path: Path
    header: PredictorHeader
    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    search: list[SearchPoint] = field(default_factory=list)
    epochs: dict[int, tuple[Epoch, ...]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    model_files: tuple[HashedFile, ...] = ()
    types: dict[int, str] = field(default_factory=dict)
    dense: dict[int, float] = field(default_factory=dict)
    tokens: int = 0

    @classmethod
    def open(cls, path: Path) -> PredictorArtifact:
        """Open a directory.

        Raises:
            PredictorError: none there, damaged, or another schema version.
        """
        remedy = "pass a directory made by 'psp train-predictor'"
        document = read_sealed(path / INDEX, PredictorError, remedy)
        version = document.get("schema_version")
        if version not in _READABLE:
            raise PredictorError(
                f"{path}: predictor schema version is {version!r}, this psp reads "
                f"{', '.join(map(str, _READABLE))}",
                TRAIN_AGAIN,
            )
        try:
            index = parse(ArtifactIndex, document)
            return cls(
                path,
                index.header,
                layers={int(entry.pop("layer")): entry for entry in index.layers},
                ranks={int(layer): rank for layer, rank in index.ranks.items()},
                search=list(index.search),
                epochs={int(layer): told for layer, told in index.epochs.items()},
                files=index.files,
                model_files=index.model_files,
                types={int(layer): _known_type(kind) for layer, kind in index.types.items()},
                dense={int(layer): ratio for layer, ratio in index.dense.items()},
                tokens=index.tokens,
            )
        except (KeyError, ValueError) as error:
            raise PredictorError(
                f"{path}/predictors.json: damaged ({error})", TRAIN_AGAIN
            ) from error

    @property
    def complete(self) -> bool:
        """Whether every layer is finished."""
        return not self.missing

    @property
    def missing(self) -> list[int]:
        """Numbers of the layers that are not finished."""
        return [layer for layer in range(self.header.n_layers) if layer not in self.layers]

    def require_complete(self) -> None:
        """Refuse an artifact with layers missing.

        Raises:
            PredictorError: with the command that goes on.
        """
        if missing := self.missing:
            refuse_written(self.path, PredictorError)
            raise PredictorError(
                f"{self.path}: {len(missing)} of {self.header.n_layers} layers are missing, the "
                f"first is {missing[0]}",
                "finish with 'psp train-predictor ... --resume'",
            )
        if self.header.own_thresholds and not self.search:
            refuse_written(self.path, PredictorError)
            raise PredictorError(
                f"{self.path}: thresholds have not been chosen",
                "finish with 'psp train-predictor ... --resume' and a bound that can be kept",
            )

    def _file(self, layer: int) -> Path:
        return self.path / f"layer-{layer:02d}.safetensors"

    def _curves_file(self, layer: int) -> Path:
        return self.path / f"curves-{layer:02d}.safetensors"

    def write_header(self) -> None:
        """Write `predictors.json`, with the means over layers once all are finished."""
        write_sealed(
            self.path / INDEX,
            {
                "schema_version": SCHEMA_VERSION,
                "tool_version": tool_version(),
                "header": asdict(self.header),
                "ranks": {str(layer): self.ranks[layer] for layer in sorted(self.ranks)},
                "types": {str(layer): self.types[layer] for layer in sorted(self.types)},
                "dense": {str(layer): self.dense[layer] for layer in sorted(self.dense)},
                "tokens": self.tokens,
                "search": plain(self.search),
                "layers": [{"layer": n, **self.layers[n]} for n in sorted(self.layers)],
                "epochs": {
                    str(layer): [asdict(epoch) for epoch in self.epochs[layer]]
                    for layer in sorted(self.epochs)
                },
                "mean": mean_metrics(list(self.layers.values())) if self.complete else None,
                "files": {name: self.files[name] for name in sorted(self.files)},
                "model_files": plain(self.model_files),
            },
        )

    def rows(self) -> list[dict[str, float]]:
        """Return the metrics of the finished layers in order, each with its number.

        A dense layer's has the FFN bytes ratio that it has with its predictor, too.
        """
        beside = {layer: {BYTES_WITH_PREDICTOR: ratio} for layer, ratio in self.dense.items()}
        return [
            {"layer": layer, **self.layers[layer], **beside.get(layer, {})}
            for layer in sorted(self.layers)
        ]

    @property
    def ffn_bytes(self) -> dict[int, float]:
        """Layer number to FFN bytes ratio, of the finished layers."""
        return {layer: self.layers[layer]["ffn_bytes_ratio"] for layer in sorted(self.layers)}

    def add(
        self,
        layer: int,
        predictor: LayerPredictor,
        metrics: dict[str, float],
        epochs: Sequence[Epoch] = (),
    ) -> None:
        """Commit a layer: first its file, then the index that counts it."""
        self._save(self._file(layer), vars(predictor))
        self._count(layer, metrics, epochs)

    def adopt(
        self,
        layer: int,
        predictor: StoredTensors,
        curves: StoredTensors | None,
        metrics: dict[str, float],
        epochs: Sequence[Epoch],
    ) -> None:
        """Commit a layer that another process stored, as `add_curves` and `add` do.

        Raises:
            OutputError: the system refused.
        """
        for file, stored in ((self._curves_file(layer), curves), (self._file(layer), predictor)):
            if stored is not None:
                put_in_place(stored.file, file)
                self.files[file.name] = stored.digest
        self._count(layer, metrics, epochs)

    def _count(self, layer: int, metrics: dict[str, float], epochs: Sequence[Epoch]) -> None:
        self.layers[layer] = metrics
        self.epochs[layer] = tuple(epochs)
        self.write_header()

    def add_curves(self, layer: int, curves: Mapping[str, torch.Tensor]) -> None:
        """Keep what was measured at a layer's thresholds, before the layer itself is committed."""
        self._save(self._curves_file(layer), curves)

    def curves(self, layer: int) -> dict[str, torch.Tensor]:
        """Read what `add_curves` kept.

        Raises:
            PredictorError: missing or damaged.
        """
        return self._load(self._curves_file(layer))

    def set_thresholds(
        self, thresholds: Mapping[int, torch.Tensor], sign: int, dense: Mapping[int, float]
    ) -> None:
        """Give layers' neurons their own thresholds, (d_ff,) float32 each, and name dense layers.

        Thresholds are of one sign. All at once: a process that is killed leaves the old ones or the
        new ones.
        """
        with changed_whole(self.path) as path:
            changed = replace(self, path=path, files=dict(self.files))
            changed.header = replace(self.header, threshold=float(sign))
            changed.dense = dict(dense)
            for layer, values in thresholds.items():
                file = changed._file(layer)
                changed._save(file, changed._load(file) | {"thresholds": values})
            changed.write_header()
        self.header, self.files, self.dense = changed.header, changed.files, changed.dense

    def layer(self, layer: int, *, folded: bool = True) -> LayerPredictor:
        """Read one layer.

        Args:
            layer: its number.
            folded: as it is exported: fc2's rows divided by the neurons' thresholds, if they have
                some, so that `header.threshold` holds for all; the least predictor of a dense one.

        Raises:
            PredictorError: missing or damaged file, or shapes that do not fit the header.
        """
        if folded and layer in self.dense:
            sizes = self.header.d_model, self.header.d_ff
            return least_predictor(self.dense_size, *sizes, self.tokens)
        file = self._file(layer)
        tensors = self._load(file)
        header, rank = self.header, self.rank(layer)
        element = ELEMENT_TYPES[self.kind(layer)]
        dtype = torch.float16 if element.block == 1 else torch.uint8
        expected = {
            "fc1": ((rank, element.row_items(header.d_model)), dtype),
            "fc2": ((header.d_ff, element.row_items(rank)), dtype),
            "activation_counts": ((header.d_ff,), torch.int64),
        }
        if header.own_thresholds and folded:
            expected["thresholds"] = ((header.d_ff,), torch.float32)
        for name, wanted in expected.items():
            tensor = tensors.get(name)
            found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            if found != wanted:
                raise PredictorError(
                    f"{file}: {name} is {_described(found)}, predictors.json implies "
                    f"{_described(wanted)}",
                    TRAIN_AGAIN,
                )
        predictor = LayerPredictor(*(tensors[n] for n in ("fc1", "fc2", "activation_counts")))
        if "thresholds" not in expected:
            return predictor
        thresholds = tensors["thresholds"]
        if not bool((thresholds * header.threshold > 0).all()):
            raise PredictorError(
                f"{file}: thresholds do not all have the sign of {header.threshold:g}",
                "choose them again with 'psp train-predictor ... --resume'",
            )
        return predictor.folded(thresholds)

    def kind(self, layer: int) -> str:
        """Return the type of a layer, `f16` or `q4_0`.

        Raises:
            PredictorError: none was chosen for it.
        """
        kind = self.types.get(layer, self.header.predictor_type)
        if kind not in ELEMENT_TYPES:
            raise PredictorError(
                f"{self.path}/predictors.json: no type of layer {layer}", TRAIN_AGAIN
            )
        return kind

    def rank(self, layer: int) -> int:
        """Return the rank of a layer.

        Raises:
            PredictorError: none was chosen for it.
        """
        rank = self.ranks.get(layer, self.header.rank)
        if not isinstance(rank, int):
            raise PredictorError(
                f"{self.path}/predictors.json: no rank of layer {layer}", TRAIN_AGAIN
            )
        return rank

    def trained_size(self, layer: int) -> Size:
        """Return the size of the predictor that a layer was trained for, see `rank` and `kind`."""
        return Size(self.kind(layer), self.rank(layer))

    @property
    def dense_size(self) -> Size:
        """The size of a dense layer's predictor."""
        asked = self.header.predictor_type
        if asked in ELEMENT_TYPES:
            return least_size([asked])
        # Without a bound an export is free to choose the type of all predictors.
        allowed = ELEMENT_TYPES if self.header.own_thresholds else [F16]
        fitting = (k for k in allowed if self.header.d_model % ELEMENT_TYPES[k].row_multiple == 0)
        return least_size(fitting)

    def exported_size(self, layer: int) -> Size:
        """Return the size of the predictor that a layer is exported with."""
        return self.dense_size if layer in self.dense else self.trained_size(layer)

    def predictor_share(self, size: Size, ffn_matrices: int) -> float:
        """Return the bytes of a predictor relative to its FFN, of that many matrices."""
        header = self.header
        return ELEMENT_TYPES[size.kind].relative(
            size.rank,
            d_model=header.d_model,
            d_ff=header.d_ff,
            ffn_matrices=ffn_matrices,
            ffn=ELEMENT_TYPES[header.outtype],
        )

    def _save(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.files[file.name] = save_tensors(file, tensors)

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        return load_tensors(file, self.files.get(file.name), PredictorError, TRAIN_AGAIN)


def _known_type(kind: str) -> str:
    if kind not in ELEMENT_TYPES:
        raise ValueError(f"type {kind!r} of a layer")
    return kind


def _described(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if found is None else f"{found[0]} {str(found[1]).removeprefix('torch.')}"
