"""The runnable torch model of a checkpoint, on transformers' own classes.

The model is built empty and filled tensor by tensor from the family's rules, so constants are
folded, every file format is read by one path and no code from the checkpoint is run. Blocks that do
not fit the device are streamed: read when their turn comes and dropped right after. A model may
also be a range of its blocks, which takes the residual from the blocks before and gives it on.
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


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        causal_lm: transformers' model; without `head` its output head is empty.
        blocks: its blocks in order, those that were asked for.
        layers: their numbers.
        n_layers: blocks of the whole model.
        dtype: what it computes in.
        streamed: whether blocks are read anew at every use.
        device: where it runs.
    """

    causal_lm: nn.Module
    blocks: list[nn.Module]
    layers: range
    n_layers: int
    dtype: torch.dtype
    streamed: bool
    device: str

    def block(self, layer: int) -> nn.Module:
        """Return the block of that number."""
        return self.blocks[self.layers.index(layer)]

    @torch.inference_mode()
    def through(self, entering: torch.Tensor) -> torch.Tensor:
        """Run the blocks, one batch from its first token on.

        Ranges one after the other compute what the whole model does, on a CPU with as many threads
        bit for bit.

        Args:
            entering: where block 0 is among the blocks (batch, length) int64 token ids, else the
                residual before the first of them, (batch, length, d_model) in the model's dtype.

        Returns:
            The residual behind the last of the blocks, (batch, length, d_model) in the model's
            dtype, on its device.
        """
        left: list[Any] = []
        hook = self.blocks[-1].register_forward_hook(lambda block, args, out: left.append(out))
        try:
            self._run_base(entering)
        finally:
            hook.remove()
        (output,) = left
        residual: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return residual

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, vocab_size) logits of (batch, length) int64 token ids.

        The model must be whole.
        """
        assert self.layers == range(self.n_layers)
        with enough_memory(self.device):
            output = self.causal_lm(input_ids=tokens.to(self.device), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    @torch.inference_mode()
    def hidden(self, entering: torch.Tensor) -> torch.Tensor:
        """Return what the head reads, (batch, length, width), of what `through` takes.

        The last block must be among the model's. Ids to the right of a row's own change nothing
        before them.
        """
        assert self.layers.stop == self.n_layers
        hidden: torch.Tensor = self._run_base(entering).last_hidden_state
        return hidden

    def _run_base(self, entering: torch.Tensor) -> Any:
        """Run all but the head on what `through` takes."""
        first = self.layers.start == 0
        assert entering.dtype == (torch.int64 if first else self.dtype)
        base: Any = self.causal_lm.base_model
        with enough_memory(self.device):
            given = {"input_ids" if first else "inputs_embeds": entering.to(self.device)}
            return base(**given, use_cache=False)

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
    layers: range | None = None,
    weights: str = "auto",
    weight_budget: int | None = None,
    head: bool = True,
) -> LoadedModel:
    """Build the model and load its weights.

    Of a range of blocks nothing else is read or held: embeddings with block 0 alone, the last norm
    and the head with the last block alone.

    Args:
        checkpoint: the opened checkpoint.
        dtype: floating type to run in.
        device: torch device, or `auto`.
        layers: numbers of the blocks to load, one after the other; None loads all.
        weights: `resident` keeps every block on the device, `streamed` reads blocks when they run,
            `auto` streams if they would not fit.
        weight_budget: bytes of blocks that fit; by default what `common.machine` says.
        head: load the output head too, where the last block is loaded.

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
        layers = _checked(range(shape.n_layers) if layers is None else layers, shape.n_layers)
        del stack[layers.stop :]
        del stack[: layers.start]
        blocks = list(stack)
        if weights == "auto":
            size = len(blocks) * block_bytes(checkpoint, dtype)
            budget = machine.weight_budget(device) if weight_budget is None else weight_budget
            weights = "streamed" if size > budget else "resident"
        _fill_rest(model, checkpoint, layers, dtype, device, head)
        for layer, block in zip(layers, blocks, strict=True):
            read = partial(_block_state, checkpoint, layer, dtype, device)
            if weights == "streamed":
                _stream(block, read)
            else:
                block.load_state_dict(read(), assign=True)
    return LoadedModel(
        causal_lm=model,
        blocks=blocks,
        layers=layers,
        n_layers=shape.n_layers,
        dtype=dtype,
        streamed=weights == "streamed",
        device=device,
    )


def _checked(layers: range, n_layers: int) -> range:
    assert layers.step == 1
    assert 0 <= layers.start < layers.stop <= n_layers
    return layers


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


class _NoEmbedding(nn.Module):
    """In the place of an embedding before blocks that are given the residual."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what added to a residual changes no bit of it: 0 would turn -0 into 0."""
        return torch.tensor(-0.0)


def _fill_rest(
    model: nn.Module,
    checkpoint: Checkpoint,
    layers: range,
    dtype: torch.dtype,
    device: str,
    head: bool,
) -> None:
    """Load what the blocks need outside them, and compute the rotary frequencies anew."""
    architecture = checkpoint.architecture
    first, last = layers.start == 0, layers.stop == checkpoint.shape.n_layers
    for rule in architecture.tensors:
        embeds = rule.source.rpartition(".")[0] in architecture.embeddings
        wanted = first if embeds else last and (head or rule.tied_to is None)
        if wanted and not rule.per_layer:
            tensor = checkpoint.read(rule).to(device, dtype)
            model.load_state_dict({rule.source: tensor}, assign=True, strict=False)
    if not first:
        for embedding in architecture.embeddings:
            model.set_submodule(embedding, _NoEmbedding())
    if not last:
        model.set_submodule(architecture.output_norm, nn.Identity())
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
