"""The manifest of a trace store: what was asked for and what is committed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from common.errors import COLLECT_AGAIN, TraceError
from common.files import json_bytes
from common.hashing import HashedFile
from common.sealed import read_sealed, sealed
from common.typed_json import Closed, Count, JsonError, Misfit, Range, parse
from common.version import tool_version
from predictor.traces.packing import BITS
from predictor.traces.place import Place
from predictor.traces.shard_file import INPUT_DTYPES

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
_MOST = 1 << 40
Size = Annotated[int, Range(1, _MOST)]


@dataclass(frozen=True, kw_only=True)
class TraceHeader(Closed):
    """What a store was made from; two stores with equal headers and data are interchangeable.

    Attributes:
        model: the model as the user named it.
        model_fingerprint: `Checkpoint.fingerprint`.
        architecture: name of the family.
        activation: activation of the FFN.
        activation_threshold: FATReLU's, else 0.
        ffn_matrices: matrices of an FFN, 3 if gated, else 2.
        n_layers: blocks of the model.
        layers: numbers of the blocks that are recorded, ascending.
        d_model: hidden size.
        d_ff: neurons in a layer.
        input_dtype: `float16` or `bfloat16`.
        importance_bits: bits that an active neuron's importance takes; 0 stores none.
        compute_dtype: floating type that the model ran in.
        data: the text source as the user named it, or several in order.
        field: key of the text in the source.
        chat_template: `none` or the name of the template that the text was put in.
        tokens: tokens asked for.
        context: longest window, tokens.
        batch: full windows run at once.
        shard_rows: rows after which a shard is closed.
        seed: seed of the run.
    """

    model: str
    model_fingerprint: str
    architecture: str
    activation: str
    activation_threshold: float
    ffn_matrices: Size
    n_layers: Size
    layers: tuple[Count, ...]
    d_model: Size
    d_ff: Size
    input_dtype: str
    importance_bits: int
    compute_dtype: str
    data: str | tuple[str, ...]
    field: str
    chat_template: str
    tokens: Size
    context: Size
    batch: Size
    shard_rows: Size
    seed: Count

    def __post_init__(self) -> None:
        """Hold what no single type says."""
        if self.input_dtype not in INPUT_DTYPES:
            raise Misfit("input_dtype", f"one of {', '.join(INPUT_DTYPES)}")
        if self.importance_bits not in BITS:
            raise Misfit("importance_bits", f"one of {', '.join(map(str, BITS))}")
        ascending = tuple(sorted(set(self.layers)))
        if not self.layers or self.layers != ascending or self.layers[-1] >= self.n_layers:
            raise Misfit("layers", "numbers of layers, ascending")


@dataclass(frozen=True, kw_only=True)
class Shard(Closed):
    """A committed shard.

    Attributes:
        segments: document number and rows of each run of rows of one document, in order.
        text_sha256: SHA-256 of the token ids.
        sha256: SHA-256 over the files' checksums, layer after layer.
    """

    segments: tuple[tuple[Count, Size], ...]
    text_sha256: str
    sha256: str

    def __post_init__(self) -> None:
        """Refuse a shard without rows."""
        if not self.segments:
            raise Misfit("segments", "at least one")

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(rows for _, rows in self.segments)


@dataclass(frozen=True, kw_only=True)
class Progress(Closed):
    """What is committed.

    Attributes:
        shards: committed shards, in order.
        weights: XXH3 of the weight file of each recorded layer, in order; empty before they are
            written.
        complete: whether the collection reached its end.
        skipped_rows: rows of the source without text, among those that were read.
        model_files: the model's weights as they were; none of a store that is not complete, or that
            an older psp made.
    """

    shards: tuple[Shard, ...]
    weights: tuple[str, ...]
    complete: bool
    skipped_rows: Count = 0
    model_files: tuple[HashedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    header: TraceHeader
    progress: Progress


def read_manifest(place: Place) -> tuple[TraceHeader, Progress]:
    """Read the manifest of a store.

    Raises:
        TraceError: no store there, a damaged manifest or another schema version.
    """
    remedy = "pass a directory made by 'psp collect'"
    with place.document(MANIFEST) as file:
        manifest = read_sealed(file, TraceError, remedy)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise TraceError(
            f"{place}: trace schema version is {version!r}, this psp reads {SCHEMA_VERSION}",
            f"{COLLECT_AGAIN}",
        )
    try:
        found = parse(_Manifest, manifest)
    except JsonError as error:
        raise TraceError(f"{place}/{MANIFEST}: damaged ({error})", COLLECT_AGAIN) from error
    return found.header, found.progress


def write_manifest(
    place: Place, header: TraceHeader, progress: Progress, *, new: bool = False
) -> None:
    """Write the manifest, whole or not at all; see `Place.writing`."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": tool_version(),
        "header": asdict(header),
        "progress": asdict(progress),
    }
    with place.writing(MANIFEST, new=new) as [part]:
        part.write_bytes(json_bytes(sealed(document)))
