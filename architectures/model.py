"""The runnable torch model of a checkpoint, on transformers' own classes.

The model is built empty and filled tensor by tensor from the family's rules, so constants are
folded, every file format is read by one path and no code from the checkpoint is run. Blocks that do
not fit the device are streamed: read when their turn comes and dropped right after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from architectures.checkpoint import Checkpoint
from architectures.spec import TensorRule
from common import machine
from common.errors import CheckpointError, reason

_REFUSED = "DefaultCPUAllocator"
"""In the text of the RuntimeError by which torch says that main memory ran out."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        causal_lm: transformers' model; without `head` its output head is empty.
        blocks: its blocks in order, the first ones if not all were asked for.
        streamed: whether blocks are read anew at every use.
        device: where it runs.
    """

    causal_lm: nn.Module
    blocks: list[nn.Module]
    streamed: bool
    device: str

    @torch.inference_mode()
    def run(self, tokens: torch.Tensor) -> None:
        """Run the blocks on (batch, length) int64 token ids for the sake of their hooks."""
        base: Any = self.causal_lm.base_model
        with enough_memory(self.device):
            base(input_ids=tokens.to(self.device), use_cache=False)

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, vocab_size) logits of (batch, length) int64 token ids."""
        with enough_memory(self.device):
            output = self.causal_lm(input_ids=tokens.to(self.device), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    @torch.inference_mode()
    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the head reads, (batch, length, width), of (batch, length) int64 ids.

        Ids to the right of a row's own change nothing before them.
        """
        base: Any = self.causal_lm.base_model
        with enough_memory(self.device):
            output = base(input_ids=tokens.to(self.device), use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @torch.inference_mode()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (rows, vocab_size) logits of (rows, width) of what `hidden` gave."""
        causal_lm: Any = self.causal_lm
        with enough_memory(self.device):
            logits: torch.Tensor = causal_lm.get_output_embeddings()(hidden)
        return logits


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    n_blocks: int | None = None,
    weights: str = "auto",
    weight_budget: int | None = None,
    head: bool = True,
) -> LoadedModel:
    """Build the model and load its weights.

    Args:
        checkpoint: the opened checkpoint.
        dtype: floating type to run in.
        device: torch device, or `auto`.
        n_blocks: load the first blocks only; None loads all.
        weights: `resident` keeps every block on the device, `streamed` reads blocks when they run,
            `auto` streams if they would not fit.
        weight_budget: bytes of blocks that fit; by default what `common.machine` says.
        head: load the output head too.

    Raises:
        CheckpointError: the device is not there or too small.
    """
    architecture, shape = checkpoint.architecture, checkpoint.shape
    device = choose_device(device)
    with enough_memory(device):
        with torch.device("meta"):
            model = architecture.make_model(shape, checkpoint.config)
        model.requires_grad_(False).eval()
        stack = model.get_submodule(architecture.layers)
        assert isinstance(stack, nn.ModuleList)
        del stack[shape.n_layers if n_blocks is None else n_blocks :]
        blocks = list(stack)
        if weights == "auto":
            size = len(blocks) * block_bytes(checkpoint, dtype)
            budget = machine.weight_budget(device) if weight_budget is None else weight_budget
            weights = "streamed" if size > budget else "resident"
        _fill_rest(model, checkpoint, dtype, device, head)
        for layer, block in enumerate(blocks):
            read = partial(_block_state, checkpoint, layer, dtype, device)
            if weights == "streamed":
                _stream(block, read)
            else:
                block.load_state_dict(read(), assign=True)
    return LoadedModel(model, blocks, weights == "streamed", device)


def block_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Return the size of one block's weights in `dtype`, its experts' in the stored type."""
    return sum(
        torch.Size(rule.shape(checkpoint.shape)).numel()
        * (checkpoint.dtype if rule.per_expert else dtype).itemsize
        for rule, _ in _block_tensors(checkpoint)
    )


def _block_tensors(checkpoint: Checkpoint) -> Iterator[tuple[TensorRule, int]]:
    """Yield rule and expert of a block's tensors."""
    for rule in checkpoint.architecture.tensors:
        if rule.per_layer:
            yield from ((rule, e) for layer, e in rule.places(checkpoint.shape) if layer == 0)


def _fill_rest(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: str, head: bool
) -> None:
    """Load what lies outside the blocks, and compute the rotary frequencies anew."""
    for rule in checkpoint.architecture.tensors:
        if not rule.per_layer and (head or rule.tied_to is None):
            tensor = checkpoint.read(rule).to(device, dtype)
            model.load_state_dict({rule.source: tensor}, assign=True, strict=False)
    base: Any = model.base_model
    if hasattr(base, "rotary_emb"):
        base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)


def _block_state(
    checkpoint: Checkpoint, layer: int, dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """Read a block's weights; those of experts stay in their stored type, mapped on the CPU."""
    prefix, state = f"{checkpoint.architecture.layers}.{{layer}}.", {}
    for rule, expert in _block_tensors(checkpoint):
        tensor = checkpoint.read(rule, layer, expert)
        name = rule.source.removeprefix(prefix).format(expert=expert)
        state[name] = tensor.to(device, tensor.dtype if rule.per_expert else dtype)
    return state


def _stream(block: nn.Module, read: Any) -> None:
    def fetch(module: nn.Module, args: Any) -> None:
        module.load_state_dict(read(), assign=True)

    def drop(module: nn.Module, args: Any, output: Any) -> None:
        module.to_empty(device="meta")

    block.register_forward_pre_hook(fetch)
    block.register_forward_hook(drop)


def choose_device(name: str) -> str:
    """Return the device to use, see `common.machine.device_named`.

    Raises:
        CheckpointError: in one line.
    """
    device = machine.device_named(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise CheckpointError(
            f"cannot run on device {device!r} ({reason(error)})", "check --device"
        ) from error
    return device


class OutOfMemory(CheckpointError):
    """A model or a batch of it does not fit the device."""


@contextmanager
def enough_memory(device: str) -> Iterator[None]:
    """Say in one line that memory ran out within the block.

    Raises:
        OutOfMemory: it did.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and _REFUSED not in str(error):
            raise
        raise OutOfMemory(
            f"{device}: out of memory", "lower --batch or --context, or pass --weights streamed"
        ) from error
