"""A Hugging Face checkpoint on disk: config and safetensors shards, read lazily."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch

from architectures.registry import resolve
from architectures.spec import Architecture, ModelShape
from common.errors import CheckpointError
from common.files import read_json

_FETCH_AGAIN = "fetch the checkpoint again"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FINGERPRINT_ROWS = 8


def locate(model: str) -> Path:
    """Return the directory of a model given as a directory or a hub id.

    Args:
        model: directory, or `OWNER/NAME` on the Hugging Face hub. From the hub only config,
            safetensors and tokenizer files are fetched, never code.

    Raises:
        CheckpointError: neither a directory nor a repository that can be fetched.
    """
    path = Path(model)
    if os.path.isdir(path):
        return path
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such directory; pass a checkpoint's directory")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer.model"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        # The client raises many kinds: no network, unknown repository, gated repository.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{model}: neither a directory nor fetched from the hub ({reason}); "
            "check the name, the network and your access"
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config, family, tensor names and tensor shapes have been checked.

    Attributes:
        path: its directory.
        config: config.json.
        architecture: the family that it belongs to.
        shape: its sizes.
    """

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shape: ModelShape

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open and check a checkpoint; no tensor data is read.

        Raises:
            CheckpointError: unsupported family or activation, a missing or truncated shard, a
                missing tensor or one of the wrong shape.
        """
        path = locate(str(model))
        remedy = "pass a Hugging Face model directory"
        config = read_json(path / "config.json", CheckpointError, remedy)
        architecture = resolve(config)
        checkpoint = cls(path, config, architecture, architecture.read_shape(config))
        checkpoint._check_tensors()
        return checkpoint

    @cached_property
    def _shards(self) -> dict[str, Path]:
        """Tensor name to shard file."""
        index = self.path / _INDEX
        if not index.exists():
            return self._names(self.path / "model.safetensors")
        weight_map = read_json(index, CheckpointError, _FETCH_AGAIN).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no 'weight_map'; {_FETCH_AGAIN}")
        present: dict[str, Path] = {}
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{index}: shard {shard!r} is no plain file name; {_FETCH_AGAIN}"
                )
            present |= self._names(self.path / shard)
        return present

    def _names(self, shard: Path) -> dict[str, Path]:
        if not shard.is_file():
            raise CheckpointError(f"{shard}: shard is missing; {_FETCH_AGAIN}")
        try:
            with safetensors.safe_open(shard, framework="pt") as file:
                return dict.fromkeys(file.keys(), shard)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{shard}: shard is truncated or damaged ({error}); {_FETCH_AGAIN}"
            ) from error

    def source(self, name: str, tied_to: str | None = None) -> str:
        """Return the stored name that holds tensor `name`.

        Raises:
            CheckpointError: neither it nor its tied stand-in is stored.
        """
        if tied_to is not None and self.shape.tied_embeddings:
            name = tied_to
        if name not in self._shards:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; {_FETCH_AGAIN}")
        return name

    def _check_tensors(self) -> None:
        for rule in self.architecture.tensors:
            for layer in range(self.shape.n_layers if rule.per_layer else 1):
                name = self.source(rule.source.format(layer=layer), rule.tied_to)
                with safetensors.safe_open(self._shards[name], framework="pt") as file:
                    found = tuple(file.get_slice(name).get_shape())
                if found != rule.shape(self.shape):
                    raise CheckpointError(
                        f"{self._shards[name]}: tensor {name} has shape {found}, config.json "
                        f"implies {rule.shape(self.shape)}; {_FETCH_AGAIN}"
                    )

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in its stored dtype."""
        with safetensors.safe_open(self._shards[self.source(name)], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def layer_tensor(self, layer: int, name: str) -> torch.Tensor:
        """Read one tensor of a block, such as `mlp.gate_proj.weight`."""
        return self.tensor(f"{self.architecture.layers}.{layer}.{name}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sizes and a sample of every FFN: tells two models apart cheaply.

        A fine-tune with the same config differs in the sampled weights. Not a checksum of the
        whole checkpoint.
        """
        digest = hashlib.sha256()
        facts = {"architecture": self.architecture.name, **vars(self.shape)}
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for layer in range(self.shape.n_layers):
            for part in (self.architecture.gate, self.architecture.ffn_down):
                name = f"{self.architecture.layers}.{layer}.{part}"
                with safetensors.safe_open(self._shards[name], framework="pt") as file:
                    rows = file.get_slice(name)[:_FINGERPRINT_ROWS].float().contiguous()
                digest.update(rows.numpy().tobytes())
        return digest.hexdigest()
