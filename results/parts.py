"""What documents of results share: their files, and measures that several of them hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from common.errors import ResultError
from common.sealed import write_sealed
from common.typed_json import (
    Count,
    Misfit,
    Positive,
    Range,
    Share,
    plain,
    read_document,
)

Document = TypeVar("Document")


@dataclass(frozen=True, kw_only=True)
class ResultFile(Generic[Document]):
    """One kind of file.

    Attributes:
        name: of the file in its directory.
        maker: the command that writes it, for remedies.
        content: dataclass of the document. A file must have its defaults of `kind`, if there is
            one, and of `schema_version`.
    """

    name: str
    maker: str
    content: type[Document]

    def path(self, place: Path) -> Path:
        """Return where the file is: in a directory, or the place itself."""
        return place / self.name if place.is_dir() else place

    def read(self, place: Path, remedy: str | None = None) -> Document:
        """Read a file.

        Args:
            place: the file, or the directory that holds it.
            remedy: the end of every error; to make it anew by default.

        Raises:
            ResultError: missing, damaged, of another kind or version, or the first key that is
                missing or holds something else.
        """
        content: Any = self.content
        kind = {"kind": content.kind} if hasattr(content, "kind") else {}
        return read_document(
            self.path(place),
            self.content,
            error=ResultError,
            remedy=remedy or f"make it anew with '{self.maker}'",
            expected=kind | {"schema_version": content.schema_version},
        )

    def write(self, directory: Path, document: Document) -> None:
        """Write a document into a directory with its checksum, whole or not at all.

        Raises:
            OutputError: the system refused it.
        """
        write_sealed(directory / self.name, plain(document))


Amount = Annotated[float, Range(0)]


@dataclass(frozen=True)
class _Ascending:
    """Limits of two numbers, the second not below the first."""

    def __contains__(self, pair: tuple[float, float]) -> bool:
        return pair[0] <= pair[1]

    def __str__(self) -> str:
        return "two numbers, ascending"


Quartiles = Annotated[tuple[Amount, Amount], _Ascending()]
Speeds = dict[str, Positive | None]
"""Tokens per second by `dense`, `all_neurons` and `predicted`; None where there is no such arm."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a predictor decides, as fractions; see `common.decisions`."""

    activation_sparsity: Share
    activation_recall: Share
    precision: Share
    predicted_sparsity: Share
    ffn_bytes_ratio: Amount


METRICS = tuple(Metrics.__dataclass_fields__)
"""Their names."""


@dataclass(frozen=True, kw_only=True)
class LayerName:
    """Which layer, and how many hidden units its predictor has."""

    layer: Count
    rank: Count


@dataclass(frozen=True, kw_only=True)
class Layer(Metrics, LayerName):
    """One layer's metrics."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second: the median of some rounds and the quartiles about it."""

    tokens_per_second: Positive
    quartiles: Quartiles

    def __post_init__(self) -> None:
        """Refuse quartiles that are beside the median."""
        low, high = self.quartiles
        if not low <= self.tokens_per_second <= high:
            raise Misfit("quartiles", f"quartiles about the median {self.tokens_per_second:g}")


@dataclass(frozen=True, kw_only=True)
class RatioOver:
    """How many times as fast something decodes as an arm.

    Attributes:
        over: the arm.
        ratio: that of the medians.
        quartiles: of the ratios within each round.
    """

    over: str
    ratio: Positive
    quartiles: Quartiles


@dataclass(frozen=True, kw_only=True)
class _OfArm:
    arm: str


@dataclass(frozen=True, kw_only=True)
class Ratio(RatioOver, _OfArm):
    """How many times as fast one arm decodes as another."""


@dataclass(frozen=True, kw_only=True)
class HotNeurons:
    """Shares of all activations that the most often active neurons make.

    Attributes:
        neuron_share: shares of neurons, ascending.
        activation_share: what they make, as many.
        gpu_neuron_share: share of neurons on the GPU, None without a GPU split.
        gpu_activation_share: what those make.
    """

    neuron_share: tuple[Share, ...]
    activation_share: tuple[Share, ...]
    gpu_neuron_share: Share | None = None
    gpu_activation_share: Share | None = None

    def __post_init__(self) -> None:
        """Refuse axes of unequal length."""
        count = len(self.neuron_share)
        if len(self.activation_share) != count:
            raise Misfit("activation_share", f"{count} shares, one a neuron share")


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """A GPU of the machine that measured."""

    name: str
    memory_bytes: Count


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """The machine that measured.

    Attributes:
        cpu: its name.
        cpus: logical cores that the benchmark might use.
        memory_bytes: main memory.
        gpus: as their driver lists them.
    """

    cpu: str
    cpus: Count
    memory_bytes: Count
    gpus: tuple[GpuFacts, ...]
