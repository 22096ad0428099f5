"""Collection from a random LLaMA of 7B widths: what recording adds to the bare model.

Weights are drawn on the device. A constant in all embeddings, against which gates are set, keeps
about 88 % of the neurons closed, as in the models that psp is for; always the same ones, which
changes no cost.
"""

from __future__ import annotations

import shutil
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, load_model
from benchmarks.collection import padded
from benchmarks.gpu.kit import Figure, Kit, Step
from benchmarks.gpu.profiling import Kernels, watch
from benchmarks.gpu.training import MEMORY, place, timed, wait
from benchmarks.shared import reglu_settings
from common.documents import read_documents
from predictor.collection.collect import record, record_rows, save_weights, trace_header
from predictor.collection.recorder import Recorder, measure_active, passes
from predictor.collection.row_maker import Arriving, Layer, RowMaker
from predictor.collection.settings import CollectConfig
from predictor.collection.windows import cut_batches, cut_shards, cut_windows, order_windows
from predictor.traces.manifest import TraceHeader
from predictor.traces.packing import codes_at, pack_active, unpack_active
from predictor.traces.store import TraceStore

_CONSTANT = 30.0
_CLOSED = 1.175
"""Standard deviations of the gates that they are set below zero: 88 % of a normal distribution."""

_ROUNDS = 3
_COMPARED_ROWS = 512


@dataclass(frozen=True)
class _Sizes:
    model: dict[str, Any]
    tokens: int
    few: int
    context: int
    compared: int

    @classmethod
    def of(cls, kit: Kit) -> _Sizes:
        if kit.dry:
            small = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
            return cls({"num_hidden_layers": 2, **small}, 4096, 1024, 128, 256)
        return cls({"num_hidden_layers": 4}, 131_072, 32_768, 512, 256)

    @property
    def bytes(self) -> int:
        """More than one store and the model take."""
        settings = reglu_settings(**self.model)
        layers, width = int(settings.num_hidden_layers), int(settings.hidden_size)
        weights = 2 * layers * width * (4 * width + 3 * int(settings.intermediate_size))
        row = 2 * width + int(settings.intermediate_size) // 4
        return self.tokens * row * layers + weights + 4 * int(settings.vocab_size) * width


def write_model(kit: Kit, path: Path, sizes: _Sizes) -> Path:
    """Write the model, made on the device."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    settings = reglu_settings(**sizes.model, dtype=torch.float16)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16 if kit.device == "cuda" else default)
    try:
        with torch.device(kit.device):
            model = LlamaForCausalLM(settings)
    finally:
        torch.set_default_dtype(default)
    deviation = settings.initializer_range * settings.hidden_size**0.5
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(_CONSTANT)
        for block in model.model.layers:
            block.mlp.gate_proj.weight.sub_(_CLOSED * deviation / settings.hidden_size)
    model.half().save_pretrained(path)
    shutil.copy(kit.tokenizer, path / "tokenizer.model")
    return path


def recording(kit: Kit) -> Iterator[Figure]:
    """What `psp collect` takes once the model is loaded, against the model alone."""
    sizes = _Sizes.of(kit)
    with place(kit, "collect", sizes.bytes) as fast:
        config = CollectConfig(
            model=str(write_model(kit, fast / "model", sizes)),
            data=str(kit.data),
            out=fast / "traces",
            tokens=sizes.tokens,
            context=sizes.context,
            device=kit.device,
        )
        checkpoint = Checkpoint.open(config.model)
        model = _loaded(kit, checkpoint)
        batches, cutting = timed(kit, lambda: _batches(config, checkpoint))
        rows = sum(len(window.tokens) for batch in batches for window in batch)
        tokens = [padded(batch) for batch in batches]
        _bare(model, tokens[:2])
        alone = [timed(kit, lambda: _bare(model, tokens))[1] for _ in range(_ROUNDS)]
        bare = statistics.median(alone)
        store = TraceStore.create(config.out, _header(config, checkpoint))
        norms, saving = timed(
            kit, lambda: save_weights(store, checkpoint, ahead=kit.device == "cuda")
        )
        yield Figure(
            name="weights of a layer read and stored",
            value=saving / len(norms),
            unit="s",
            details={"layers": len(norms)},
        )
        yield Figure(
            name="bare model, tokens and layers",
            value=rows * len(norms) / bare,
            unit="tokens/s",
            details={"seconds": alone, "tokens": rows, "layers": len(norms)},
        )
        _made_only(config, model, checkpoint, norms, batches)  # takes the memory copies go by
        made, making = timed(kit, lambda: _made_only(config, model, checkpoint, norms, batches))
        yield Figure(
            name="rows made and brought to the CPU, against the bare model",
            value=making / bare,
            unit="×",
            most=1.15,
            details={"seconds": making, "layers_of_batches": made},
        )
        yield from _beside(kit, config, model, checkpoint, norms, batches)
        found = [_recorded(kit, config, model, checkpoint, norms) for _ in range(_ROUNDS)]
        took = statistics.median(seconds for seconds, _, _ in found)
        where = "memory" if fast.parent == MEMORY else "the disk"
        yield Figure(
            name=f"recorded into {where}, against the bare model",
            value=took / bare,
            unit="×",
            most=1.15 if where == "memory" else None,
            details={
                "seconds": [seconds for seconds, _, _ in found],
                "seconds_cutting_text": cutting,
                "activation_sparsity": found[-1][2],
                "bytes": found[-1][1],
                "gigabytes_per_second": found[-1][1] / took / 1e9,
            },
        )
        disk = replace(config, tokens=sizes.few, out=kit.work / "traces-disk")
        slow, size, _ = _recorded(kit, disk, model, checkpoint, norms)
        yield Figure(
            name="recorded onto the disk, sync included",
            value=size / slow / 1e9,
            unit="GB/s",
            details={
                "seconds": slow,
                "bytes": size,
                "against_the_bare_model": slow / (bare * disk.tokens / rows),
            },
        )
        yield from _labels(kit, config, checkpoint, sizes)


def _loaded(kit: Kit, checkpoint: Checkpoint, device: str | None = None) -> LoadedModel:
    device = device or kit.device
    dtype = torch.float32 if device == "cpu" else checkpoint.dtype
    return load_model(checkpoint, dtype=dtype, device=device, head=False, weights="resident")


def _header(config: CollectConfig, checkpoint: Checkpoint) -> TraceHeader:
    return trace_header(config, checkpoint, "none")


def _batches(config: CollectConfig, checkpoint: Checkpoint) -> list[Any]:
    header, tokenizer = _header(config, checkpoint), checkpoint.tokenizer()
    windows = cut_windows(read_documents(config.data), tokenizer, header.context)
    return [
        batch
        for shard in cut_shards(windows, header.shard_rows, header.tokens)
        for batch in cut_batches(order_windows(shard), header.batch * header.context)
    ]


def _bare(model: LoadedModel, batches: list[torch.Tensor]) -> None:
    for tokens in batches:
        model.through(tokens)


def _recorded(
    kit: Kit,
    config: CollectConfig,
    model: LoadedModel,
    checkpoint: Checkpoint,
    norms: dict[int, torch.Tensor],
) -> tuple[float, int, float]:
    """Record a store and remove it; return seconds, bytes of its shards, sparsity."""
    shutil.rmtree(config.out, ignore_errors=True)
    store = TraceStore.create(config.out, _header(config, checkpoint))
    tokenizer = checkpoint.tokenizer()
    _, seconds = timed(kit, lambda: record_rows(model, checkpoint, norms, tokenizer, store))
    size = sum(file.stat().st_size for file in config.directory.rglob("shard-*"))
    sparsity = store.activation_sparsity()
    shutil.rmtree(config.out)
    return seconds, size, sum(sparsity.values()) / len(sparsity)


def _made_only(
    config: CollectConfig,
    model: LoadedModel,
    checkpoint: Checkpoint,
    norms: dict[int, torch.Tensor],
    batches: list[Any],
) -> int:
    """Record and drop every layer's rows once they are on the CPU; return how many there were."""
    waiting: deque[Arriving] = deque()
    made = 0

    def sink(layer: int, rows: Arriving) -> None:
        nonlocal made
        made += 1
        waiting.append(rows)
        if len(waiting) > 2 * len(norms):
            waiting.popleft()()

    bits = _header(config, checkpoint).importance_bits
    with Recorder(model, checkpoint, norms, dtype=torch.float16, importance_bits=bits) as recorder:
        for batch in batches:
            recorder.run(batch, sink)
        recorder.flush()
    while waiting:
        waiting.popleft()()
    return made


def _beside(
    kit: Kit,
    config: CollectConfig,
    model: LoadedModel,
    checkpoint: Checkpoint,
    norms: dict[int, torch.Tensor],
    batches: list[Any],
) -> Iterator[Figure]:
    """What a card does for rows besides the model, kernel by kernel."""
    if kit.device != "cuda":
        return

    def work() -> None:
        _made_only(config, model, checkpoint, norms, batches)
        wait(kit)

    def bare() -> None:
        _bare(model, [padded(batch) for batch in batches])
        wait(kit)

    both, alone = watch(work), watch(bare)
    own = {name: seconds - alone.seconds.get(name, 0.0) for name, seconds in both.seconds.items()}
    yield Figure(
        name="kernels for rows, seconds over the bare model's",
        value=(both.total - alone.total) / alone.total,
        unit="×",
        details={"seconds": both.total, "seconds_bare": alone.total, "most": Kernels(own).most},
    )


def _labels(
    kit: Kit, config: CollectConfig, checkpoint: Checkpoint, sizes: _Sizes
) -> Iterator[Figure]:
    """The same tokens on the CPU in float32."""
    stores: list[TraceStore] = []
    for device in (kit.device, "cpu"):
        run = replace(
            config,
            tokens=sizes.compared,
            device=device,
            out=config.directory.with_name(f"compared-{len(stores)}"),
        )
        store = TraceStore.create(run.out, _header(run, checkpoint))
        record(_loaded(kit, checkpoint, device), checkpoint, checkpoint.tokenizer(), store)
        stores.append(store)
    index, shares, far = torch.arange(stores[1].rows), [], []
    for layer in stores[1].header.layers:
        rows = [store.layer(layer) for store in stores]
        ours, theirs = (
            unpack_active(each.active_at(index), checkpoint.shape.d_ff) for each in rows
        )
        shares.append(float((ours != theirs).float().mean()))
        inputs = [each.inputs_at(index) for each in rows]
        far.append(float((inputs[0] - inputs[1]).norm() / inputs[1].norm()))
    yield Figure(
        name="labels that differ from the CPU's",
        value=sum(shares) / len(shares),
        most=0.005,
        details={"by_layer": shares, "inputs_relative_distance": far, "tokens": len(index)},
    )


def coding(kit: Kit) -> Iterator[Figure]:
    """The same activations through both ways of making rows: bits, counts, scale and codes."""
    d_model, d_ff, bits = (128, 512, 8) if kit.dry else (4096, 11008, 8)
    device = torch.device(kit.device)
    torch.manual_seed(0)
    gate = torch.randn(_COMPARED_ROWS, d_ff).sub_(_CLOSED).relu_().half()
    product = gate * torch.randn(_COMPARED_ROWS, d_ff).half()
    residual, norms = torch.randn(_COMPARED_ROWS, d_model).half(), torch.rand(d_ff) + 0.5
    maker = RowMaker(device, lambda values: passes(values, 0.0), dtype=torch.float16, bits=bits)
    tensors = [tensor.to(device) for tensor in (residual, gate, product, norms)]
    begun = maker.begin(
        Layer(
            residual=tensors[0],
            taps=[tensors[1]],
            product=tensors[2],
            norms=tensors[3],
            chosen=None,
        )
    )
    begun.ready.wait()
    rows = maker.finish(begun)()
    packed = pack_active(gate > 0)
    counts, scale, codes = measure_active(packed, product, norms, bits)
    same = {
        "inputs": torch.equal(rows.inputs, residual),
        "active": torch.equal(rows.active, packed),
        "counts": torch.equal(rows.counts, counts),
    }
    yield Figure(
        name="parts of a row that must be equal and are",
        value=sum(same.values()),
        least=3,
        details=same,
    )
    ours = codes_at(rows.codes, torch.arange(len(codes)), bits)
    yield Figure(
        name="importance codes that differ, same activations",
        value=float((ours != codes).float().mean()),
        most=1e-4,
        details={
            "furthest": int((ours.int() - codes.int()).abs().max()),
            "scale_relative": float(((rows.scale - scale) / scale).abs().max()),
            "codes": len(codes),
        },
    )


STEPS = (
    Step(name="coding", seconds=3, run=coding),
    Step(name="recording", seconds=40, run=recording),
)
"""Of this stage."""
