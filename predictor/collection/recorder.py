"""Hooks that turn a forward pass of the real model into trace rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import and_
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel
from common.errors import TraceError
from predictor.collection.row_maker import Arriving, Begun, Layer, RowMaker, relative_codes
from predictor.collection.windows import Window
from predictor.traces.packing import active_places, pack_active, pack_codes
from predictor.traces.rows import LayerWeights
from predictor.traces.shard_file import BatchRows
from predictor.traces.transfer import sent

_BLOCK = 1 << 19
Sink = Callable[[int, Arriving], None]


class Recorder:
    """Runs batches of windows and hands the rows of every layer to a sink, layer by layer.

    On a device the last layer stays open until the next one, or `flush`: see `row_maker`.

    Attributes:
        at_once: rows are there when they are handed over.
    """

    def __init__(
        self,
        model: LoadedModel,
        checkpoint: Checkpoint,
        down_norms: Mapping[int, torch.Tensor],
        *,
        dtype: torch.dtype,
        importance_bits: int,
    ) -> None:
        """Register the hooks.

        Args:
            model: the running model, or the range of its blocks that holds the layers to record.
            checkpoint: names its family and activation.
            down_norms: layer number to (d_ff,) float32; its keys are the layers to record.
            dtype: stored type of the inputs.
            importance_bits: bits of an active neuron's importance, 0 for none.
        """
        self._model, self._dtype, self._bits = model, dtype, importance_bits
        self._checkpoint, self._device = checkpoint, torch.device(model.device)
        self._threshold = checkpoint.shape.activation_threshold
        self._sink: Sink = lambda layer, rows: None
        self._rows: torch.Tensor | None = None
        self._inputs = torch.empty(0)
        self._taps: list[torch.Tensor] = []
        self._maker = RowMaker(
            self._device,
            partial(passes, threshold=self._threshold),
            dtype=dtype,
            bits=importance_bits,
        )
        self._open: tuple[int, Begun, Sink] | None = None
        self._handed: Callable[[], object] = lambda: None
        self._hooks: list[RemovableHandle] = []
        self.at_once = made_at_once(self._device)
        architecture = checkpoint.architecture
        for layer, norms in down_norms.items():
            block = model.block(layer)
            taps = [block.get_submodule(tap) for tap in architecture.activation_taps]
            output = block.get_submodule(architecture.ffn_output)
            self._hooks += [
                self._hook_input(block.get_submodule(architecture.predictor_input), layer),
                *(tap.register_forward_hook(self._tap) for tap in taps),
                self._hook_output(output, layer, norms.to(self._device)),
            ]

    def __enter__(self) -> Recorder:
        """Give it out."""
        return self

    def __exit__(self, *error: object) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def run(
        self, windows: Sequence[Window], sink: Sink, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one batch and record its rows, window after window.

        Args:
            windows: the batch.
            sink: receives the rows.
            residual: of a range of blocks without the first, what the range before it returned for
                the same windows, (windows, longest window, d_model).

        Returns:
            The residual behind the last block, of that shape; see `LoadedModel.through`.

        Raises:
            TraceError: residuals or activations do not fit their type; on a device it may come
                with a later layer, or out of the rows that were handed over.
        """
        lengths = [len(window.tokens) for window in windows]
        longest = max(lengths)
        tokens = torch.zeros(len(windows), longest, dtype=torch.long)
        for row, window in enumerate(windows):
            tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
        # Right padding under causal attention changes no earlier position, so no mask is needed;
        # its rows are left out.
        valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
        everything = bool(valid.all())
        chosen = valid.flatten().nonzero()[:, 0]
        self._rows = None if everything else sent(chosen, self._device)
        self._sink = sink
        assert residual is None or residual.shape[:2] == tokens.shape
        return self._model.through(tokens if residual is None else residual)

    @torch.inference_mode()
    def flush(self) -> None:
        """Hand over what is still open.

        Raises:
            TraceError: as `run`.
        """
        if self._open is None:
            return
        (layer, begun, sink), self._open = self._open, None
        begun.ready.wait()
        if not begun.told[1]:
            self._handed()  # an overflow in the layer before is the cause
            self._refuse_inputs(layer, begun.layer.select(begun.layer.residual), begun.stored)
        made = self._maker.finish(begun)
        rows = partial(self._arrived, layer, begun.product.dtype, made)
        self._handed = rows
        sink(layer, rows)

    def _select(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of (batch, length, n) or (batch · length, n) that are not padding."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self._rows is None else flat[self._rows]

    def _hook_input(self, module: nn.Module, layer: int) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._inputs, self._taps = args[0], []
            if self.at_once:
                inputs = self._select(args[0])
                self._inputs = inputs.to(self._dtype)
                # What does not fit has become infinite, NaN stays; both show in the extremes.
                if not torch.isfinite(torch.stack(torch.aminmax(self._inputs))).all():
                    self._refuse_inputs(layer, inputs, self._inputs)

        return module.register_forward_pre_hook(hook)

    def _refuse_inputs(self, layer: int, inputs: torch.Tensor, stored: torch.Tensor) -> None:
        self._checkpoint.check_numbers()  # the cause, if it is there
        bad = int((~torch.isfinite(stored)).sum())
        raise TraceError(
            f"layer {layer}: {bad} of {stored.numel()} residual values of a batch do not "
            f"fit {self._dtype} (largest {float(inputs.abs().max()):g})",
            "use --dtype bfloat16, or check the model if that is in use already",
        )

    def _tap(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.at_once:
            output = passes(self._select(output), self._threshold)
        self._taps.append(output)

    def _hook_output(self, module: nn.Module, layer: int, norms: torch.Tensor) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if self.at_once:
                self._record(layer, self._select(args[0]), norms)
                return
            self.flush()
            found = Layer(
                residual=self._inputs,
                taps=self._taps,
                product=args[0],
                norms=norms,
                chosen=self._rows,
            )
            self._open = (layer, self._maker.begin(found), self._sink)

        return module.register_forward_pre_hook(hook)

    def _record(self, layer: int, product: torch.Tensor, norms: torch.Tensor) -> None:
        packed = pack_active(reduce(and_, self._taps))
        counts, scale, codes = measure_active(packed, product, norms, self._bits)
        if self._bits:
            codes = torch.from_numpy(pack_codes(codes.numpy(), self._bits))
        rows = BatchRows(self._inputs, packed, counts, scale, codes)
        self._sink(layer, partial(self._arrived, layer, product.dtype, lambda: rows))

    def _arrived(self, layer: int, dtype: torch.dtype, arriving: Arriving) -> BatchRows:
        rows = arriving()
        if not torch.isfinite(rows.scale).all():
            self._checkpoint.check_numbers()
            raise TraceError(
                f"layer {layer}: the FFN's activations overflow {dtype}",
                "check the model, or run it on --device cpu, which computes in float32",
            )
        return rows


def made_at_once(device: torch.device) -> bool:
    """Whether rows are best made as the model goes, which runs on the same processor."""
    return device.type == "cpu"


def passes(values: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return where an activation lets values through: above 0, or from FATReLU's threshold on."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        # Four times as fast as torch's comparison, which does not use vector instructions.
        array = values.numpy()
        return torch.from_numpy(array >= threshold if threshold else array > 0)
    return values >= threshold if threshold else values > 0


def measure_active(
    packed: torch.Tensor, product: torch.Tensor, norms: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count every neuron's active rows and code the importance of the active neurons.

    Args:
        packed: (rows, ceil(d_ff / 8)) uint8, active neurons, on the CPU as all else.
        product: (rows, d_ff), the FFN's intermediate act(g)·u.
        norms: (d_ff,) float32, norms of the down columns.
        bits: bits of a code; 0 codes nothing.

    Returns:
        Counts (d_ff,) int64, mean importance (rows,) float32, codes (active neurons,) uint8; the
        latter two empty without bits.
    """
    d_ff = len(norms)
    counts = torch.zeros(d_ff, dtype=torch.int64)
    scales, codes = [torch.empty(0)], [torch.empty(0, dtype=torch.uint8)]
    # In blocks of rows that stay in the processor's cache: at once it would be ten times slower.
    step = max(1, _BLOCK // d_ff)
    for start in range(0, len(packed), step):
        block, values = packed[start : start + step], product[start : start + step]
        row, neuron = active_places(block)
        counts += torch.bincount(neuron, minlength=d_ff)
        if bits:
            places = row * d_ff + neuron
            importance = values.flatten()[places].abs().float() * norms[neuron]
            scale, code = row_importance(importance, row, len(block), bits)
            scales.append(scale)
            codes.append(code)
    return counts, torch.cat(scales), torch.cat(codes)


def row_importance(
    values: torch.Tensor, row: torch.Tensor, rows: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's mean importance and the codes of its active neurons.

    Args:
        values: (active neurons,) float32, importance, row by row.
        row: (active neurons,) int64, ascending.
        rows: rows in all, also those without an active neuron.
        bits: bits of a code.

    Returns:
        (rows,) float32 and (active neurons,) uint8.
    """
    return relative_codes(values, row, torch.bincount(row, minlength=rows), bits)


def read_down_norms(checkpoint: Checkpoint, layer: int) -> torch.Tensor:
    """Return (d_ff,) float32 norms of a layer's down columns."""
    down = checkpoint.layer_tensor(layer, checkpoint.architecture.ffn_down).float()
    norms: torch.Tensor = torch.linalg.vector_norm(down, dim=0)
    return norms


def read_layer_weights(checkpoint: Checkpoint, layer: int) -> LayerWeights:
    """Read one layer.

    RMSNorm scales its input x by γ/rms(x), so the gate is W·diag(γ)·x up to a positive factor.
    LayerNorm also subtracts the mean: W·diag(γ)·(I − 11ᵀ/d)·x, which takes each row's mean off.

    Raises:
        CheckpointError: weights that are NaN or infinite: no residual need show that the last
            layer's are.
    """
    architecture = checkpoint.architecture
    gate = checkpoint.layer_tensor(layer, architecture.gate).float()
    gate = gate * checkpoint.layer_tensor(layer, architecture.ffn_norm).float()
    if architecture.centred:
        gate = gate - gate.mean(1, keepdim=True)
    norms = read_down_norms(checkpoint, layer)
    if not torch.isfinite(torch.stack([*torch.aminmax(gate), norms.max()])).all():
        checkpoint.check_numbers()
    return LayerWeights(gate, norms)
