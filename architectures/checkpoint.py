"""A checkpoint on disk, a Hugging Face directory or a GGUF file, read lazily."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from architectures.config_json import Config
from architectures.gguf_model.source import open_file
from architectures.registry import resolve
from architectures.source import Directory, Source, Tensors
from architectures.spec import Architecture, ModelShape, TensorRule
from architectures.tokenizer import Tokenizer, load_tokenizer
from common.errors import FETCH_AGAIN, CheckpointError, reason
from common.files import read_json

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FINGERPRINT_ROWS = 8
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def locate(model: str) -> Path:
    """Return the directory of a model given as a directory or a hub id.

    Args:
        model: directory, or `OWNER/NAME` on the Hugging Face hub. From the hub only config,
            weight and tokenizer files are fetched, never code.

    Raises:
        CheckpointError: neither a directory nor a repository that can be fetched.
    """
    path = Path(model)
    if os.path.isdir(path):
        return path
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such directory", "pass a checkpoint's directory")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
        path = Path(snapshot_download(model, allow_patterns=patterns))
        if not any(path.glob("model*.safetensors")):
            path = Path(snapshot_download(model, allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return path
    except Exception as error:
        # The client raises many kinds: no network, unknown repository, gated repository.
        raise CheckpointError(
            f"{model}: neither a directory nor fetched from the hub ({reason(error)})",
            "check the name, the network and your access",
        ) from error


def read_config(path: Path) -> Config:
    """Return the config.json of a model directory.

    Raises:
        CheckpointError: missing or damaged.
    """
    return read_json(path / "config.json", CheckpointError, "pass a Hugging Face model directory")


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
    def open(cls, model: str | Path) -> Checkpoint:
        """Open and check a checkpoint; no tensor data is read.

        Args:
            model: see `open_source`.

        Raises:
            CheckpointError: unsupported family or activation, a missing or truncated shard, a
                missing tensor or one of the wrong shape.
        """
        origin = open_source(model)
        return cls.of(origin, origin.config)

    @classmethod
    def of(cls, origin: Source, config: Config) -> Checkpoint:
        """Open a source with its own or a changed config; see `open`."""
        try:
            architecture = resolve(config)
            checkpoint = cls(origin, config, architecture, architecture.read_shape(config))
        except CheckpointError as error:
            raise origin.refusal(error) from error
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

    def source(self, rule: TensorRule, layer: int = 0) -> str:
        """Return the stored name of the tensor that a rule stands for.

        Raises:
            CheckpointError: neither it nor its tied stand-in is stored.
        """
        name = rule.source.format(layer=layer)
        if rule.tied_to is not None and self.shape.tied_embeddings:
            name = rule.tied_to
        # Checkpoints saved from the bare model lack the first part of every name.
        base = self.architecture.layers.partition(".")[0]
        for stored in (name, name.removeprefix(f"{base}.")):
            if stored in self.files.shards:
                return stored
        raise CheckpointError(f"{self.path}: tensor {name} is missing", FETCH_AGAIN)

    def check_tensors(self) -> None:
        """Refuse files that do not hold every tensor of the family, in its shape and a float type.

        Raises:
            CheckpointError: naming the tensor.
        """
        for rule in self.architecture.tensors:
            for layer in range(self.shape.n_layers if rule.per_layer else 1):
                name = self.source(rule, layer)
                found, dtype = self.files.describe(name)
                where = f"{self.files.shards[name]}: tensor {name}"
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{where} has dtype {dtype}",
                        "quantised checkpoints cannot be used, pass "
                        "the float16, bfloat16 or float32 original",
                    )
                if found != rule.shape(self.shape):
                    raise CheckpointError(
                        f"{where} has shape {found}, config.json implies {rule.shape(self.shape)}",
                        FETCH_AGAIN,
                    )

    def read(self, rule: TensorRule, layer: int = 0) -> torch.Tensor:
        """Read the tensor that a rule stands for, its factor folded in.

        Returns:
            The tensor in its stored dtype, or in float32 where there is a factor other than 1.
        """
        tensor = self.files.read(self.source(rule, layer))
        factor = rule.factor(self.shape)
        return tensor if factor == 1 else tensor.float() * factor

    def layer_tensor(self, layer: int, name: str) -> torch.Tensor:
        """Read one tensor of a block, such as `mlp.gate_proj.weight`, its factor folded in."""
        return self.read(self.architecture.rule(name), layer)

    def tokenizer(self) -> Tokenizer:
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
