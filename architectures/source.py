"""Where a checkpoint comes from: what every kind of it gives, a directory or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from architectures.config_json import Config
from architectures.spec import Architecture, ModelShape
from architectures.tensor_files import TensorFiles
from common.errors import FETCH_AGAIN, CheckpointError

if TYPE_CHECKING:
    import torch


class Tensors(Protocol):
    """Lazy access to stored tensors by their Hugging Face names."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user may not expect of the choice of files, in lines."""
        ...

    @property
    def shards(self) -> Mapping[str, Path]:
        """Tensor name to the file that holds it."""
        ...

    def where(self, name: str) -> str:
        """Return the file that holds a tensor and what it is called there, for messages."""
        ...

    def missing(self, name: str, *, head: bool, bare: bool) -> tuple[str, str]:
        """Return problem and remedy for a tensor that is not there.

        Args:
            name: its Hugging Face name.
            head: it is the output head, and no other tensor stands in for it.
            bare: the names are those of a model without a head, such as `LlamaModel`.
        """
        ...

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Return a tensor's shape and dtype, as text where psp cannot use it."""
        ...

    def read(self, name: str, count: int | None = None) -> torch.Tensor:
        """Read a tensor, or its first `count` rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Words:
    """What messages call the parts of a kind of source.

    Attributes:
        fetch: what to do where it is damaged.
        sizes: what says how large tensors are.
        activation: what says which activation it has.
    """

    fetch: str
    sizes: str
    activation: str


class Source(Protocol):
    """A model as its owner holds it."""

    @property
    def path(self) -> Path:
        """The directory or file."""
        ...

    @property
    def config(self) -> Config:
        """Its config.json, or one that says the same."""
        ...

    @property
    def config_name(self) -> str:
        """What to call that config in messages."""
        ...

    @property
    def words(self) -> Words:
        """What to call its parts in messages."""
        ...

    @property
    def directory(self) -> Path:
        """A directory with that config.json and the tokenizer's files."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the checkpoint that it says it was made from."""
        ...

    def tensors(self, architecture: Architecture, shape: ModelShape) -> Tensors:
        """Return its tensors; what a family's rules do not name need not be among them."""
        ...

    def refusal(self, error: CheckpointError) -> CheckpointError:
        """Return an error about its config, in words that fit this kind of source."""
        ...


@dataclass(frozen=True)
class Directory:
    """A Hugging Face directory.

    Attributes:
        path: where it is.
        config: config.json.
    """

    path: Path
    config: Config
    fingerprint: None = None
    words = Words(fetch=FETCH_AGAIN, sizes="config.json implies", activation="hidden_act")

    @property
    def config_name(self) -> str:
        """The file's name."""
        return str(self.path / "config.json")

    @property
    def directory(self) -> Path:
        """The directory itself."""
        return self.path

    def tensors(self, architecture: Architecture, shape: ModelShape) -> TensorFiles:
        """Return the stored tensors."""
        return TensorFiles(self.path, self.config.get("transformers_weights"))

    def refusal(self, error: CheckpointError) -> CheckpointError:
        """Return the error as it is: it names config.json."""
        return error
