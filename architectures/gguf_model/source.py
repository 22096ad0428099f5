"""A GGUF file as the source of a checkpoint."""

from __future__ import annotations

import json
import os
import re
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from architectures.config_json import ConfigError
from architectures.gguf_model.config import config_of, has_experts, in_keys
from architectures.gguf_model.keys import FETCH_FILE, text_of
from architectures.gguf_model.tensors import GGUFTensors
from architectures.gguf_model.tokenizer_files import write_tokenizer_files
from architectures.source import Words
from architectures.spec import Architecture, ModelShape
from common.errors import CheckpointError, FormatError
from common.hub import fetched
from common.scratch import Scratch
from gguf_files.names import FINGERPRINT_KEY
from gguf_files.reader import DENSE_MAGIC, SPARSE_MAGIC
from gguf_files.split_set import open_gguf

_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+(?:/[\w.-]+)*\.gguf)")
_WITH_ACTIVATION = re.compile(r"(.+\.gguf):([^/]*)(?<!\.gguf)")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def open_file(model: str) -> GGUFSource | None:
    """Open a model that is one file, None if the name is that of no file.

    Args:
        model: `FILE.gguf` or another file that begins as one does, or `OWNER/NAME:FILE.gguf` on the
            Hugging Face hub, of which that file alone is fetched; after it `:ACTIVATION` (`:relu`,
            `:fatrelu:0.01`), which counts where the file does not say.

    Raises:
        CheckpointError: no such file, one that cannot be fetched, is damaged, or of no model that
            psp supports.
    """
    name, activation = _parts(model)
    if os.path.isdir(name) or not (name.endswith(".gguf") or _has_magic(name)):
        return None
    return GGUFSource(_located(name), activation)


def _has_magic(name: str) -> bool:
    if not os.path.isfile(name):  # opening a pipe would wait for a writer
        return False
    try:
        with open(name, "rb") as file:
            return file.read(len(DENSE_MAGIC)) in (DENSE_MAGIC, SPARSE_MAGIC)
    except OSError:
        return False


def local_path(model: str) -> Path:
    """Return the path that a model's name has on this disk, whether there is one or not."""
    return Path(_parts(model)[0])


def _parts(model: str) -> tuple[str, str | None]:
    """Return a model's name without its activation, and that."""
    named = None if os.path.exists(model) else _WITH_ACTIVATION.fullmatch(model)
    return (model, None) if named is None else (named[1], named[2])


def _located(name: str) -> Path:
    if os.path.exists(name):
        return Path(name)
    hub = _HUB_FILE.fullmatch(name)
    if hub is None:
        raise CheckpointError(f"{name}: no such file", "pass a model's GGUF file or directory")
    from huggingface_hub import hf_hub_download

    return fetched(name, "file", hf_hub_download, hub[1], hub[2])


class GGUFSource:
    """A file seen as a directory; see `architectures.source.Source`."""

    def __init__(self, path: Path, activation: str | None = None) -> None:
        """Read the header.

        Args:
            path: of the file.
            activation: of its model where the file names none, `fatrelu:T` with its threshold.

        Raises:
            CheckpointError: no such file, damaged, or of no model that psp supports.
        """
        self.path, self._chosen = path, activation
        try:
            self.file = open_gguf(path, FETCH_FILE)
            self.config: dict[str, Any] = config_of(self.file, activation)
        except FormatError as error:
            raise CheckpointError(error.problem, error.remedy) from error

    @property
    def config_name(self) -> str:
        """The file itself."""
        return str(self.path)

    words = Words(fetch=FETCH_FILE, sizes="its keys imply", activation="its activation")

    @cached_property
    def directory(self) -> Path:
        """A temporary directory with config.json and tokenizer files, gone when this object is.

        Raises:
            CheckpointError: the file's vocabulary is missing, damaged or of an unknown kind.
        """
        scratch = Scratch()
        weakref.finalize(self, scratch.close)
        directory = scratch.path / self.path.name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        try:
            write_tokenizer_files(self.file, directory)
        except FormatError as error:
            raise CheckpointError(error.problem, error.remedy) from error
        return directory

    @cached_property
    def fingerprint(self) -> str | None:
        """What psp wrote: rounding and quantising do not make another model."""
        value = self.file.values.get(FINGERPRINT_KEY)
        if value is None or value.kind is not GGUFValueType.STRING:
            return None
        text = text_of(value.data)
        return text if _FINGERPRINT.fullmatch(text) else None

    def tensors(self, architecture: Architecture, shape: ModelShape) -> GGUFTensors:
        """Return its tensors in Hugging Face's layout."""
        return GGUFTensors(self.file, architecture, shape, experts=has_experts(self.file))

    def refusal(self, error: CheckpointError) -> CheckpointError:
        """Name the file and its keys instead of the config.json that it does not have."""
        if not isinstance(error, ConfigError):
            return error
        return in_keys(self.file, self._chosen, error)
