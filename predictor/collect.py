"""Recording of activation traces with hooks on the real model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import layers_of, load_model
from architectures.tokenizer import load_tokenizer
from common.documents import read_documents
from common.errors import TraceError
from common.files import refuse_existing, remove_output
from predictor.magnitude import encode_magnitude
from predictor.traces import LayerRows, LayerWeights, TraceHeader, TraceStore, pack_active
from predictor.windows import Window, cut_shards, cut_windows

_SHARD_BYTES = 1 << 28
_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Settings of a collection.

    Attributes:
        model: checkpoint directory or hub id.
        data: text source, see `common.documents`.
        out: store directory.
        tokens: rows to record.
        field: key of the text in structured sources.
        context: longest window in tokens.
        batch: windows run at once.
        dtype: how inputs are stored, `float16` or `bfloat16`.
        device: torch device of the model.
        seed: recorded, and seeds torch.
        force: replace an existing store.
        resume: go on with an interrupted store.
    """

    model: str
    data: str
    out: Path
    tokens: int
    field: str = "text"
    context: int = 512
    batch: int = 8
    dtype: str = "float16"
    device: str = "cpu"
    seed: int = 0
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that record nothing."""
        if self.tokens < 1 or self.context < 2 or self.batch < 1:
            raise TraceError("nothing to record: need 1 token, a context of 2 and a batch of 1")
        if self.dtype not in _STORED:
            raise TraceError(f"dtype {self.dtype!r} is unknown; choose from {', '.join(_STORED)}")


class Recorder:
    """Hooks that turn one forward pass into trace rows of every layer."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Register the hooks.

        Args:
            model: the running model.
            checkpoint: names its family.
            dtype: stored type of the inputs.
        """
        self._dtype = dtype
        self._mask = torch.empty(0, dtype=torch.bool)
        self._seen: list[dict[str, torch.Tensor]] = []
        self.rows: list[list[LayerRows]] = []
        architecture = checkpoint.architecture
        for number, block in enumerate(layers_of(model, checkpoint)):
            self._seen.append({})
            self.rows.append([])
            self._hook_input(block.get_submodule(architecture.predictor_input), number)
            for tap in architecture.activation_taps:
                self._hook_tap(block.get_submodule(tap), number)
            self._hook_output(block.get_submodule(architecture.ffn_output), number)

    def _hook_input(self, module: nn.Module, layer: int) -> None:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._seen[layer] = {"inputs": args[0][self._mask]}

        module.register_forward_pre_hook(hook)

    def _hook_tap(self, module: nn.Module, layer: int) -> None:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            positive = output[self._mask] > 0
            seen = self._seen[layer]
            seen["active"] = seen["active"] & positive if "active" in seen else positive

        module.register_forward_hook(hook)

    def _hook_output(self, module: nn.Module, layer: int) -> None:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen = self._seen[layer]
            inputs = seen["inputs"].to(self._dtype)
            if not torch.isfinite(inputs).all():
                raise TraceError(
                    f"layer {layer}: the residual does not fit {self._dtype}; "
                    "use --dtype bfloat16, or check the model if that is in use already"
                )
            active = seen["active"]
            magnitude = args[0][self._mask][active].abs()
            self.rows[layer].append(
                LayerRows(
                    inputs=inputs.cpu(),
                    active=pack_active(active),
                    counts=active.sum(0).cpu(),
                    magnitude=encode_magnitude(magnitude).cpu(),
                )
            )

        module.register_forward_pre_hook(hook)

    def run(self, model: nn.Module, windows: Sequence[Window], device: str) -> None:
        """Run one batch of windows and record its rows, window after window."""
        length = max(len(window.tokens) for window in windows)
        tokens = torch.zeros(len(windows), length, dtype=torch.long)
        mask = torch.zeros(len(windows), length, dtype=torch.bool)
        for row, window in enumerate(windows):
            tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
            mask[row, : len(window.tokens)] = True
        self._mask = mask.to(device)
        # Right padding under causal attention changes no earlier position, so no mask is needed;
        # one logit is enough, since only the blocks matter.
        model(input_ids=tokens.to(device), use_cache=False, logits_to_keep=1)

    def take(self) -> list[LayerRows]:
        """Return the rows recorded since the last call, one entry a layer."""
        taken = [
            LayerRows(
                inputs=torch.cat([part.inputs for part in parts]),
                active=torch.cat([part.active for part in parts]),
                counts=torch.stack([part.counts for part in parts]).sum(0),
                magnitude=torch.cat([part.magnitude for part in parts]),
            )
            for parts in self.rows
        ]
        self.rows = [[] for _ in self.rows]
        return taken


def collect(config: CollectConfig) -> TraceStore:
    """Record traces into a store.

    Returns:
        The complete store; it holds fewer rows than asked for if the data ended first.

    Raises:
        PspError: unreadable data, unsupported checkpoint, existing output, a store of another
            model or other settings under `resume`, or a residual that overflows the stored type.
    """
    checkpoint = Checkpoint.open(config.model)
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.shape.vocab_size)
    header = _header(config, checkpoint)
    store = _begun_store(config, header)
    if store is not None and store.progress.complete:
        return store
    next(read_documents(config.data, config.field))  # unreadable text costs no existing store
    torch.manual_seed(config.seed)
    compute = torch.float32 if config.device == "cpu" else _checkpoint_dtype(checkpoint)
    model = load_model(checkpoint, dtype=compute, device=config.device)
    if store is None:
        remove_output(config.out)
        store = TraceStore.create(config.out, header)
    _save_weights(store, checkpoint)
    recorder = Recorder(model, checkpoint, _STORED[config.dtype])
    windows = cut_windows(read_documents(config.data, config.field), tokenizer, header.context)
    shards = cut_shards(windows, header.shard_rows, header.tokens)
    with tqdm(total=config.tokens, unit="tok", desc="collect", disable=None) as bar:
        for number, shard in enumerate(shards):
            if number >= len(store.progress.shards):
                for batch in _batches(shard, config.batch):
                    with torch.inference_mode():
                        recorder.run(model, batch, config.device)
                    bar.update(sum(len(window.tokens) for window in batch))
                store.commit(recorder.take(), _count_documents(store, shard))
            else:
                bar.update(store.progress.shards[number])
    store.finish()
    return store


def _header(config: CollectConfig, checkpoint: Checkpoint) -> TraceHeader:
    shape = checkpoint.shape
    rows = _SHARD_BYTES // (2 * shape.d_model * shape.n_layers)
    return TraceHeader(
        model=config.model,
        model_fingerprint=checkpoint.fingerprint,
        architecture=checkpoint.architecture.name,
        activation=checkpoint.architecture.activation,
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        norm_eps=shape.norm_eps,
        input_dtype=config.dtype,
        data=config.data,
        field=config.field,
        tokens=config.tokens,
        context=min(config.context, shape.context_length),
        batch=config.batch,
        shard_rows=max(1024, min(16384, rows)),
        seed=config.seed,
    )


def _begun_store(config: CollectConfig, header: TraceHeader) -> TraceStore | None:
    """Return the store to go on with, or None where one is to be made."""
    if config.resume and (config.out / "manifest.json").exists():
        store = TraceStore.open(config.out)
        for key, value in vars(header).items():
            if getattr(store.header, key) != value:
                raise TraceError(
                    f"{config.out}: was collected with {key} {getattr(store.header, key)!r}, not "
                    f"{value!r}; use the same settings, or --force to start over"
                )
        return store
    refuse_existing(config.out, force=config.force, marker="manifest.json", resumable=True)
    return None


def _checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    stored = checkpoint.layer_tensor(0, checkpoint.architecture.ffn_norm).dtype
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float32


def _save_weights(store: TraceStore, checkpoint: Checkpoint) -> None:
    architecture = checkpoint.architecture
    for layer in range(checkpoint.shape.n_layers):
        gate = checkpoint.layer_tensor(layer, architecture.gate).float()
        norm = checkpoint.layer_tensor(layer, architecture.ffn_norm).float()
        down = checkpoint.layer_tensor(layer, architecture.ffn_down).float()
        store.save_weights(layer, LayerWeights(gate * norm, torch.linalg.vector_norm(down, dim=0)))


def _batches(shard: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    for start in range(0, len(shard), size):
        yield shard[start : start + size]


def _count_documents(store: TraceStore, shard: Sequence[Window]) -> list[int]:
    rows = list(store.progress.document_rows)
    for window in shard:
        rows.extend([0] * (window.document + 1 - len(rows)))
        rows[window.document] += len(window.tokens)
    return rows
