"""The manifest of a trace store: what was asked for and what is committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import COLLECT_AGAIN, TraceError
from common.files import read_json, write_json
from common.version import tool_version
from predictor.traces.packing import BITS
from predictor.traces.shard_file import INPUT_DTYPES

SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
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
        data: the text source as the user named it.
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
    ffn_matrices: int
    n_layers: int
    layers: list[int]
    d_model: int
    d_ff: int
    input_dtype: str
    importance_bits: int
    compute_dtype: str
    data: str
    field: str
    chat_template: str
    tokens: int
    context: int
    batch: int
    shard_rows: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A committed shard.

    Attributes:
        segments: document number and rows of each run of rows of one document, in order.
        text_sha256: SHA-256 of the token ids.
        sha256: SHA-256 over the files' checksums, layer after layer.
    """

    segments: list[list[int]]
    text_sha256: str
    sha256: str

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(rows for _, rows in self.segments)


@dataclass
class Progress:
    """What is committed.

    Attributes:
        shards: in order.
        weights: XXH3 checksum of each recorded layer's weights file.
        complete: nothing is missing.
    """

    shards: list[Shard] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    complete: bool = False


def read_manifest(path: Path) -> tuple[TraceHeader, Progress]:
    """Read the manifest of a store directory.

    Raises:
        TraceError: no store there, a damaged manifest or another schema version.
    """
    remedy = "pass a directory made by 'psp collect'"
    manifest = read_json(path / "manifest.json", TraceError, remedy)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise TraceError(
            f"{path}: trace schema version is {version!r}, this psp reads {SCHEMA_VERSION}",
            f"{COLLECT_AGAIN}",
        )
    try:
        header, progress = TraceHeader(**manifest["header"]), manifest["progress"]
        _check_header(header)
        shards = [_shard(entry) for entry in _list(progress["shards"])]
        weights = [_text(digest) for digest in _list(progress["weights"])]
        return header, Progress(shards, weights, progress["complete"] is True)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}/manifest.json: damaged ({error})", COLLECT_AGAIN) from error


_MOST = 1 << 40
_COUNTS = ("ffn_matrices", "n_layers", "d_model", "d_ff", "tokens", "context", "batch")
_TEXTS = ("model", "model_fingerprint", "architecture", "activation", "compute_dtype")
_SOURCES = ("data", "field", "chat_template")


def _check_header(header: TraceHeader) -> None:
    values = vars(header)
    for name in (*_COUNTS, "shard_rows"):
        _count(values[name], 1)
    for name in (*_TEXTS, *_SOURCES):
        _text(values[name])
    _count(header.seed, 0)
    threshold = header.activation_threshold
    layers = [_count(layer, 0) for layer in _list(header.layers)]
    known = header.input_dtype in list(INPUT_DTYPES) and header.importance_bits in BITS
    if not known or type(header.importance_bits) is not int or type(threshold) is not float:
        raise ValueError("a setting has an impossible value")
    if not layers or layers != sorted(set(layers)) or layers[-1] >= header.n_layers:
        raise ValueError("layers are impossible")


def _shard(entry: Mapping[str, Any]) -> Shard:
    shard = Shard(**entry)
    _text(shard.text_sha256), _text(shard.sha256)
    for segment in _list(shard.segments):
        document, rows = _list(segment)
        _count(document, 0), _count(rows, 1)
    if not shard.segments:
        raise ValueError("a shard has no rows")
    return shard


def _count(value: object, least: int) -> int:
    if type(value) is not int or not least <= value <= _MOST:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.40} is no list")
    return value


def write_manifest(path: Path, header: TraceHeader, progress: Progress) -> None:
    """Write the manifest, whole or not at all."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": tool_version(),
        "header": asdict(header),
        "progress": asdict(progress),
    }
    write_json(path / "manifest.json", document)
