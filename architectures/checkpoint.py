"""A checkpoint on disk, a Hugging Face directory or a GGUF file, read lazily."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from architectures.config_json import Config
from architectures.directory import ORIGINAL, other_kind, other_repository, text_in
from architectures.gguf_model.source import open_file
from architectures.registry import resolve, with_class
from architectures.source import Directory, Source, Tensors
from architectures.spec import Architecture, ModelShape, TensorRule
from architectures.tokenizer import OwnTokenizer, load_tokenizer
from architectures.weight_files import has_weights
from common.errors import CheckpointError
from common.files import read_json, refuse_pointer
from common.hub import fetched, listed

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FETCHED = ["*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
"""Patterns of the names that are wanted of a repository of the hub."""
_PASS = "pass a checkpoint's directory, a GGUF file or OWNER/NAME on the hub"
_FINGERPRINT_ROWS = 8
_TEXTS = ("config.json", "tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")
"""Files beside the weights that must be there themselves if they are there at all."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def locate(model: str) -> Path:
    """Return the directory of a model given as a directory or a hub id.

    Args:
        model: directory, or `OWNER/NAME` on the Hugging Face hub. From the hub only config,
            weight and tokenizer files are fetched, never code.

    Raises:
        CheckpointError: neither a directory nor a repository that can be fetched, or one of
            another kind.
    """
    if not model:
        raise CheckpointError("the model's name is empty", _PASS)
    path = Path(model)
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise CheckpointError(f"{model}: is a file", f"pass its directory: --model {path.parent}")
    if os.path.exists(path):
        raise CheckpointError(f"{model}: is neither a directory nor a plain file", _PASS)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such directory", "pass a checkpoint's directory")
    path = _fetched(model, _FETCHED)
    named = text_in(path / "config.json", "transformers_weights")
    if named or not any(path.glob("model*.safetensors")):
        more = "*.safetensors" if named else "pytorch_model*.bin"
        path = _fetched(model, [*_FETCHED, more])
    if not named and not has_weights(path):
        _refuse_kind(model, path)
    return path


def _fetched(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return fetched(model, "directory", snapshot_download, model, allow_patterns=patterns)


def _refuse_kind(model: str, path: Path) -> None:
    """Refuse a repository without weights if the names of its files tell what else it is."""
    if (found := other_repository(model, listed(model))) is not None:
        raise CheckpointError(*found)
    if not os.path.isdir(path):  # none of its files was to be fetched
        raise CheckpointError(f"{model}: holds no model", "pass a Hugging Face checkpoint")


def read_config(path: Path) -> Config:
    """Return the config.json of a model directory, its class filled in (`registry.with_class`).

    Raises:
        CheckpointError: missing or damaged, or the directory is of another kind.
    """
    file = path / "config.json"
    if not file.exists() and not has_weights(path) and (found := other_kind(path)) is not None:
        raise CheckpointError(*found)
    for name in _TEXTS:
        refuse_pointer(path / name, CheckpointError)
    return with_class(read_json(file, CheckpointError, "pass a Hugging Face model directory"))


def open_source(model: str | Path) -> Source:
    """Find a model and read its config.

    Args:
        model: directory or hub id, see `locate`; or a GGUF file, see `gguf_model.source.open_file`.

    Raises:
        CheckpointError: not found, no config, or a file of no model that psp supports.
    """
    file = open_file(str(model))
    if file is not None:
        return file
    path = locate(str(model))
    return Directory(path, read_config(path))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config, family, tensor names and tensor shapes have been checked.

    Attributes:
        origin: the directory or file.
        config: config.json, or what stands for it.
        architecture: the family that it belongs to.
        shape: its sizes.
    """

    origin: Source
    config: Config
    architecture: Architecture
    shape: ModelShape

    @classmethod
    def open(cls, model: str | Path, *, experts: bool = False) -> Checkpoint:
        """Open and check a checkpoint; no tensor data is read.

        Args:
            model: see `open_source`.
            experts: mixtures of experts are taken too, see `registry.resolve`.

        Raises:
            CheckpointError: unsupported family or activation, a missing or truncated shard, a
                missing tensor or one of the wrong shape.
        """
        origin = open_source(model)
        return cls.of(origin, origin.config, experts=experts)

    @classmethod
    def of(cls, origin: Source, config: Config, *, experts: bool = False) -> Checkpoint:
        """Open a source with its own or a changed config; see `open`.

        A stored output head counts where it is not the embedding, whatever the config says.
        """
        try:
            architecture = resolve(config, experts=experts)
            checkpoint = cls(origin, config, architecture, architecture.read_shape(config))
        except CheckpointError as error:
            raise origin.refusal(error) from error
        if checkpoint.shape.tied_embeddings and checkpoint._has_own_head():
            checkpoint = replace(checkpoint, shape=replace(checkpoint.shape, tied_embeddings=False))
        checkpoint.check_tensors()
        return checkpoint

    @property
    def path(self) -> Path:
        """The directory or file."""
        return self.origin.path

    @property
    def directory(self) -> Path:
        """Where config.json and the tokenizer's files are: a file has them unpacked.

        Raises:
            CheckpointError: a file without a vocabulary that psp can use.
        """
        return self.origin.directory

    @cached_property
    def files(self) -> Tensors:
        """The stored tensors by name."""
        return self.origin.tensors(self.architecture, self.shape)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user may not expect of the files, in lines."""
        lines = [*self.files.notes]
        declared = self.architecture.read_shape(self.config).tied_embeddings
        if declared and not self.shape.tied_embeddings:
            lines.append(
                f"{self.path}: config.json ties the output head to the embedding "
                "(tie_word_embeddings, or its default), but a head that differs is stored; that "
                "one is used, as transformers 5 does (4 ties)"
            )
        if (self.path / "adapter_config.json").exists():
            lines.append(f"{self.path}: the LoRA adapter beside the model is passed over")
        return tuple(lines)

    def source(self, rule: TensorRule, layer: int = 0, expert: int = 0) -> str:
        """Return the stored name of the tensor that a rule stands for.

        Raises:
            CheckpointError: neither it nor its tied stand-in is stored.
        """
        names = [name.format(layer=layer, expert=expert) for name in self._names(rule)]
        for stored in map(self._stored, names):
            if stored is not None:
                return stored
        head = rule.tied_to is not None
        raise CheckpointError(*self.files.missing(names[0], head=head, bare=self._bare))

    def _names(self, rule: TensorRule) -> tuple[str, ...]:
        """Return the names under which a rule's tensor may be stored, the preferred one first.

        Of tied embeddings either may be left out: transformers ties to the one that is there.
        """
        if not self.shape.tied_embeddings:
            return (rule.source,)
        if rule.tied_to is not None:
            return rule.tied_to, rule.source
        heads = (r.source for r in self.architecture.tensors if r.tied_to == rule.source)
        return rule.source, *heads

    def _stored(self, name: str) -> str | None:
        """Return a tensor's stored name; those saved from the bare model lack the first part."""
        names = (name, name.removeprefix(self._base))
        return next((stored for stored in names if stored in self.files.shards), None)

    @property
    def _base(self) -> str:
        return self.architecture.layers.partition(".")[0] + "."

    @property
    def _bare(self) -> bool:
        """Whether the weights are those of the model without its head."""
        return not any(name.startswith(self._base) for name in self.files.shards)

    def _has_own_head(self) -> bool:
        """Whether the stored head is another tensor than the embedding; both are mapped, not read.

        As transformers decides (transformers@5.23.0 modeling_utils.py:_tied_params_are_equal).
        """
        for rule in self.architecture.tensors:
            if rule.tied_to is not None:
                head, embedding = self._stored(rule.source), self._stored(rule.tied_to)
                if head is not None and embedding is not None:
                    return not _equal(self.files.read(head), self.files.read(embedding))
        return False

    def check_tensors(self) -> None:
        """Refuse files that do not hold every tensor of the family, in its shape and a float type.

        Raises:
            CheckpointError: naming the tensor.
        """
        for rule, name in self._tensors():
            found, dtype = self.files.describe(name)
            if dtype == torch.float64:
                remedy = "save the model in float32 (model.float().save_pretrained)"
                raise CheckpointError(f"{self.files.where(name)} is float64", remedy)
            if dtype not in _DTYPES:
                raise CheckpointError(
                    f"{self.files.where(name)} has dtype {dtype}",
                    f"quantised checkpoints cannot be used, {ORIGINAL}",
                )
            if found != (wanted := rule.shape(self.shape)):
                words = self.origin.words
                raise CheckpointError(
                    f"{self.files.where(name)} has shape {found}, {words.sizes} {wanted}",
                    words.fetch,
                )

    def check_numbers(self) -> None:
        """Refuse weights that are NaN or infinite: why something else failed, or not.

        All of them are read, which is for where a result tells already that something is wrong.

        Raises:
            CheckpointError: naming file and tensor.
        """
        for _, name in self._tensors():
            weight = self.files.read(name)
            if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
                nan, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
                raise CheckpointError(
                    f"{self.files.where(name)} is damaged: {nan} NaN and {infinite} infinite among "
                    f"{weight.numel()} numbers",
                    self.origin.words.fetch,
                )

    def _tensors(self) -> Iterator[tuple[TensorRule, str]]:
        """Yield every tensor's rule and stored name."""
        for rule in self.architecture.tensors:
            for layer, expert in rule.places(self.shape):
                yield rule, self.source(rule, layer, expert)

    def read(self, rule: TensorRule, layer: int = 0, expert: int = 0) -> torch.Tensor:
        """Read the tensor that a rule stands for, its factor folded in.

        Returns:
            The tensor in its stored dtype, or in float32 where there is a factor other than 1.
        """
        tensor = self.files.read(self.source(rule, layer, expert))
        factor = rule.factor(self.shape)
        return tensor if factor == 1 else tensor.float() * factor

    def layer_tensor(self, layer: int, name: str) -> torch.Tensor:
        """Read one tensor of a block, such as `mlp.gate_proj.weight`, its factor folded in."""
        return self.read(self.architecture.rule(name), layer)

    def tokenizer(self) -> OwnTokenizer:
        """Load the model's own tokenizer.

        Raises:
            CheckpointError: as `load_tokenizer`.
        """
        return load_tokenizer(self.directory, self.shape.vocab_size, self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights, told by the first layer's gate."""
        name = self.source(self.architecture.rule(self.architecture.gate))
        dtype = self.files.describe(name)[1]
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sizes and a sample of every FFN: tells two models apart cheaply.

        A fine-tune with the same config differs in the sampled weights. Not a checksum of the
        whole checkpoint. A file that psp made has the one of the checkpoint that it was made from.
        """
        if self.origin.fingerprint is not None:
            return self.origin.fingerprint
        digest = hashlib.sha256()
        facts = {"architecture": self.architecture.name, **self.shape.facts()}
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for layer in range(self.shape.n_layers):
            for part in (self.architecture.gate, self.architecture.ffn_down):
                name = self.source(self.architecture.rule(part), layer)
                rows = self.files.read(name, _FINGERPRINT_ROWS).float().contiguous()
                digest.update(rows.numpy().tobytes())
        return digest.hexdigest()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    return one.shape == other.shape and torch.equal(one.float(), other.float())
