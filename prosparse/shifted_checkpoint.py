"""A checkpoint whose activation is FATReLU: the same weights, another config.

The published modelling code and psp read one threshold, `hidden_act_param`. Thresholds that differ
between layers are carried by the weights: for s > 0, g·u = (s·g)·(u/s), and s·g ≥ T where g ≥ T/s.
So with the gate's rows of a layer times s = T/T_layer and the up projection's divided by it, the
one T stands for every T_layer; ReLU, and so PowerInfer, computes what it did before.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from architectures.checkpoint import Checkpoint
from architectures.old_keys import with_old_keys
from architectures.tensor_files import TensorFiles
from architectures.weight_files import INDEX, SINGLE
from common.errors import OutputError
from common.files import atomic_directory, refuse_existing, write_json
from common.version import tool_version
from prosparse.activation import with_activation
from prosparse.tokenizer_output import write_tokenizer

MARKER = "threshold_shift.json"
"""Says where a checkpoint came from, and marks the directory as one of ours."""

_COMPANIONS = ("*.json", "tokenizer.model", "merges.txt", "*.jinja", "*.py")
_UP = "mlp.up_proj.weight"
_SHARD_BYTES = 1 << 31


def check_out(out: Path, checkpoint: Checkpoint, force: bool) -> None:
    """Make sure that a checkpoint may be written.

    Raises:
        OutputError: it exists and may not be replaced, or is the model itself.
    """
    if out.resolve() == checkpoint.path.resolve():
        raise OutputError(
            f"{out} is the model itself, which stays as it is", "choose another --out"
        )
    refuse_existing(out, force=force, marker=MARKER)


def write_shifted(
    checkpoint: Checkpoint, thresholds: Sequence[float], out: Path, facts: Mapping[str, object]
) -> float:
    """Write a checkpoint with FATReLU, whole or not at all.

    Args:
        checkpoint: where weights and tokenizer come from; it stays as it is.
        thresholds: of each layer, above 0.
        out: directory, replaced if it exists.
        facts: kept beside it in `threshold_shift.json`.

    Returns:
        The one threshold of its config.

    Raises:
        OutputError: the operating system refused.
    """
    threshold, scales = common_threshold(thresholds)
    with atomic_directory(out) as part:
        for file in _companions(checkpoint):
            shutil.copyfile(file, part / file.name)
        if checkpoint.path.is_dir():
            _write_weights(checkpoint, part, scales)
        else:
            _write_anew(checkpoint, part, scales)
        config = _config(checkpoint, threshold)
        write_tokenizer(checkpoint.directory, checkpoint.tokenizer(), config, part)
        write_json(part / "config.json", config)
        origin = {"model": str(checkpoint.path), "tool_version": tool_version()}
        write_json(part / MARKER, origin | dict(facts))
    return threshold


def common_threshold(thresholds: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Return one threshold for all layers, and what each layer's gate is to be multiplied by."""
    if len(set(thresholds)) == 1:
        return thresholds[0], (1.0,) * len(thresholds)
    mean = math.exp(sum(map(math.log, thresholds)) / len(thresholds))
    threshold = float(f"{mean:.4g}")
    return threshold, tuple(threshold / own for own in thresholds)


def _config(checkpoint: Checkpoint, threshold: float) -> dict[str, Any]:
    """Return the model's own config with the threshold, true of the weights as they are written."""
    tied = checkpoint.shape.tied_embeddings
    config = {**checkpoint.origin.config, "tie_word_embeddings": tied}
    config.pop("transformers_weights", None)
    return with_old_keys(with_activation(config, "fatrelu", threshold))


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """Return the files beside the weights, no index and no adapter among them."""
    files = {file for pattern in _COMPANIONS for file in checkpoint.directory.glob(pattern)}
    left = ("adapter_config.json", INDEX)
    return sorted(f for f in files if f.is_file() and not f.name.endswith(left))


def _write_weights(checkpoint: Checkpoint, part: Path, scales: Sequence[float]) -> None:
    """Write the files of weights and, where there are several, their index."""
    shards = sorted(set(checkpoint.files.shards.values()))
    single = SINGLE[0] if shards[0].suffix == ".safetensors" else SINGLE[1]
    if len(shards) == 1:
        return _write_shard(checkpoint, shards[0], part / single, scales)
    for shard in shards:
        _write_shard(checkpoint, shard, part / shard.name, scales)
    files = checkpoint.files
    index = {
        "metadata": {"total_size": sum(files.read(name).nbytes for name in files.shards)},
        "weight_map": {name: shard.name for name, shard in files.shards.items()},
    }
    return write_json(part / f"{single}{INDEX}", index)


def _names_in(checkpoint: Checkpoint, shard: Path) -> list[str]:
    return [name for name, file in checkpoint.files.shards.items() if file == shard]


def _write_shard(
    checkpoint: Checkpoint, shard: Path, target: Path, scales: Sequence[float]
) -> None:
    """Copy one file of weights, with gates and up projections scaled."""
    factors, names = _factors(checkpoint, scales), _names_in(checkpoint, shard)
    assert isinstance(checkpoint.files, TensorFiles)
    if not checkpoint.files.prefix and factors.keys().isdisjoint(names):
        shutil.copyfile(shard, target)
        return
    tensors = {name: checkpoint.files.read(name) for name in names}
    for name in factors.keys() & tensors.keys():
        stored = tensors[name]
        tensors[name] = (stored.double() * factors[name]).to(stored.dtype)
    if shard.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, target, metadata={"format": "pt"})
    else:
        torch.save(tensors, target)


def _write_anew(checkpoint: Checkpoint, part: Path, scales: Sequence[float]) -> None:
    """Write the weights of a GGUF file as safetensors, in the type that the model is run in."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    factors = _factors(checkpoint, scales)
    empty = {name: _empty(checkpoint, name) for name in checkpoint.files.shards}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=_SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = checkpoint.files.read(name)
            tensor = tensor.double() * factors[name] if name in factors else tensor
            tensors[name] = tensor.to(empty[name].dtype).contiguous()
        save_file(tensors, part / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(part / "model.safetensors.index.json", index)


def _empty(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    shape, dtype = checkpoint.files.describe(name)
    assert isinstance(dtype, torch.dtype)  # `check_tensors` refuses others
    return torch.empty(shape, dtype=dtype, device="meta")


def _factors(checkpoint: Checkpoint, scales: Sequence[float]) -> dict[str, float]:
    """Return stored name to factor of every tensor that changes."""
    gate, up = (checkpoint.architecture.rule(n) for n in (checkpoint.architecture.gate, _UP))
    factors = {}
    for layer, scale in enumerate(scales):
        if scale != 1:
            factors[checkpoint.source(gate, layer)] = scale
            factors[checkpoint.source(up, layer)] = 1 / scale
    return factors
