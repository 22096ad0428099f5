"""What is recorded, against plain PyTorch; layers in passes; overflow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SHARD_ROWS, TRACE_CONTEXT, TRACE_TOKENS, ModelMaker, refused
from safetensors.torch import load_file, save_file

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import load_tokenizer
from common.errors import CheckpointError, PspError, TraceError
from predictor.collection.collect import collect
from predictor.collection.recorder import passes
from predictor.collection.settings import CollectConfig
from predictor.traces.packing import unpack_active
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

TOKENS, CONTEXT = TRACE_TOKENS, TRACE_CONTEXT
D_FF = 1012
# Octaves a step, and where the first code begins, written down anew.
STEP_AND_LOW = {2: (2.0, -4.0), 4: (1.0, -11.0), 8: (0.125, -20.0)}
Settings = Callable[..., CollectConfig]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Reference:
    """Windows with their documents, and every layer's values on each of them."""

    windows: list[tuple[int, list[int]]]
    layers: list[list[dict[str, torch.Tensor]]]

    def order(self, tokens: int) -> list[tuple[int, int]]:
        """Return number and rows of every window as stored: shards, each longest window first."""
        shards: list[list[tuple[int, int]]] = [[]]
        for number, (_, window) in enumerate(self.windows):
            if sum(rows for _, rows in shards[-1]) >= SHARD_ROWS:
                shards.append([])
            rows = min(len(window), tokens)
            tokens -= rows
            if rows:
                shards[-1].append((number, rows))
        return [
            window
            for shard in shards
            for window in sorted(shard, key=lambda window: window[1], reverse=True)
        ]

    def rows(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        order, windows = self.order(tokens), self.layers[layer]
        return {
            key: torch.cat([windows[number][key][:rows] for number, rows in order])
            for key in windows[0]
        }

    def documents(self, tokens: int) -> list[int]:
        """Return the document of every row."""
        return [self.windows[number][0] for number, rows in self.order(tokens) for _ in range(rows)]


def reference_windows(model: Path, data: Path) -> list[tuple[int, list[int]]]:
    """Cut the documents into windows, written down anew: BOS and up to CONTEXT - 1 tokens."""
    tokenizer, windows = load_tokenizer(model, 10**6), []
    for document, line in enumerate(data.read_text().splitlines()):
        ids = tokenizer.encode(json.loads(line)["body"])
        while ids:
            windows.append((document, [1, *ids[: CONTEXT - 1]]))
            ids = ids[CONTEXT - 1 :]
    return windows


@torch.inference_mode()
def reference_layers(
    model: Path, windows: list[tuple[int, list[int]]]
) -> list[list[dict[str, torch.Tensor]]]:
    """Recompute residual, gate and up of every layer in plain PyTorch on transformers' states."""
    from transformers import LlamaForCausalLM

    hf = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {k: v.float() for k, v in load_file(model / "model.safetensors").items()}
    layers: list[list[dict[str, torch.Tensor]]] = [[], []]
    for _, window in windows:
        states = hf(torch.tensor([window]), output_hidden_states=True).hidden_states
        for layer, rows in enumerate(layers):
            block = hf.model.layers[layer]
            rotary = hf.model.rotary_emb(states[layer], torch.arange(len(window))[None])
            normed = block.input_layernorm(states[layer])
            mixed = block.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
            residual = (states[layer] + mixed)[0]
            name = f"model.layers.{layer}."
            scale = torch.rsqrt(residual.square().mean(1, keepdim=True) + 1e-5)
            x = residual * scale * weights[name + "post_attention_layernorm.weight"]
            gate = x @ weights[name + "mlp.gate_proj.weight"].T
            up = x @ weights[name + "mlp.up_proj.weight"].T
            if layer == 0:
                # The reference itself is right: it gives the next layer's input.
                out = (gate.relu() * up) @ weights[name + "mlp.down_proj.weight"].T
                torch.testing.assert_close(residual + out, states[1][0], atol=1e-4, rtol=1e-4)
            rows.append({"residual": residual, "gate": gate, "up": up})
    return layers


@pytest.fixture(scope="module")
def reference(model_dir: Path, long_data: Path) -> Reference:
    windows = reference_windows(model_dir, long_data)
    return Reference(windows, reference_layers(model_dir, windows))


# --- rows ----------------------------------------------------------------------------------------


def test_traces_equal_plain_pytorch(traces: TraceStore, reference: Reference) -> None:
    """Same windows in the stored order, same residual, same active neurons."""
    for layer in range(2):
        expected, rows = reference.rows(layer, TOKENS), traces.layer(layer)
        every = torch.arange(TOKENS)
        inputs = rows.inputs_at(every)
        torch.testing.assert_close(inputs, expected["residual"], atol=1e-3, rtol=2e-3)
        active = unpack_active(rows.active_at(every), D_FF)
        # A gate within float32 noise of zero may fall on either side.
        clear = expected["gate"].abs() > 1e-4
        assert clear.float().mean() > 0.999
        assert torch.equal(active[clear], (expected["gate"] > 0)[clear])
        assert 0.2 < active.float().mean() < 0.8
        assert torch.equal(rows.counts, active.sum(0))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_importance_is_that_of_plain_pytorch(
    settings: Settings, reference: Reference, model_dir: Path, tmp_path: Path, bits: int
) -> None:
    """|act(g)·u|·‖down‖ over the row's mean, on the code that holds its logarithm."""
    store = collect(settings(tmp_path / "out", tokens=1500, importance_bits=bits))
    assert len(store.progress.shards) == 2
    step, low = STEP_AND_LOW[bits]
    for layer in range(2):
        expected, rows, weights = (
            reference.rows(layer, 1500),
            store.layer(layer),
            store.weights(layer),
        )
        every = torch.arange(1500)
        active = unpack_active(rows.active_at(every), D_FF)
        product = (expected["gate"].relu() * expected["up"]).abs()
        importance = product * weights.down_norms
        mean = torch.where(active, importance, 0).sum(1) / active.sum(1)
        torch.testing.assert_close(rows.scale_at(every), mean, atol=1e-6, rtol=1e-4)
        codes = rows.codes_at(every, active.sum(1)).long()
        # Float32 noise of gate and up.
        noise, relative = 1e-5 * weights.down_norms / mean[:, None], importance / mean[:, None]
        bounds = [
            ((at.clamp_min(1e-30).log2() - low) / step).floor().clamp(0, 2**bits - 1)[active]
            for at in ((relative - noise) * (1 - 1e-4), (relative + noise) * (1 + 1e-4))
        ]
        assert ((bounds[0] <= codes) & (codes <= bounds[1])).all()
        assert (bounds[0] == bounds[1]).float().mean() > 0.98, "the bounds leave no choice"
        assert len(set(codes.tolist())) >= min(2**bits, 80)
        decoded = LabelledRows(rows, weights, normalise=False).importance(every)
        near = active & (relative > 2.0 ** (low + 1)) & (relative < 2.0 ** (low + step * 2**bits))
        off = (decoded / importance).log2().abs()
        assert off[near & (product > 1e-3)].max() < step / 2 + 0.02
        assert (decoded[~active] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.25])
def test_values_pass_above_zero_or_from_the_threshold_on(
    dtype: torch.dtype, threshold: float
) -> None:
    edge = torch.tensor(threshold, dtype=dtype)
    up, down = (torch.nextafter(edge, torch.tensor(x, dtype=dtype)) for x in (1.0, -1.0))
    values = torch.stack([up, edge, down, -edge, edge * 0 - 1, edge + 1, edge * 0, edge / 0 * 0])
    expected = [True, threshold > 0, False, False, False, True, False, False]
    assert passes(values, threshold).tolist() == expected


def test_without_importance_the_rest_is_the_same(
    traces: TraceStore, settings: Settings, tmp_path: Path
) -> None:
    store = collect(settings(tmp_path / "out", importance_bits=0))
    for layer in range(2):
        bare, whole = store.layer(layer), traces.layer(layer)
        assert torch.equal(bare.counts, whole.counts)
        assert bare.importance_bits == 0
        for found, expected in zip(bare.pieces, whole.pieces, strict=True):
            assert torch.equal(found.inputs, expected.inputs)
            assert torch.equal(found.active, expected.active)
            assert len(found.scale) == len(found.starts) == len(found.importance) == 0
    store.check()


def test_sparsity_is_the_share_of_neurons_that_are_not_active(traces: TraceStore) -> None:
    sparsity = traces.activation_sparsity()
    assert list(sparsity) == [0, 1]
    for layer, value in sparsity.items():
        rows = traces.layer(layer).active_at(torch.arange(TOKENS))
        active = unpack_active(rows, D_FF)
        assert value == pytest.approx(1 - float(active.double().mean()))


def test_stored_weights_are_gate_times_norm_and_the_norms_of_down_columns(
    traces: TraceStore, model_dir: Path
) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}."
        norm = tensors[name + "post_attention_layernorm.weight"].float()
        gate = tensors[name + "mlp.gate_proj.weight"].float() * norm
        down = tensors[name + "mlp.down_proj.weight"].float().square().sum(0).sqrt()
        weights = traces.weights(layer)
        torch.testing.assert_close(weights.gate, gate, atol=2**-25, rtol=2**-11)
        torch.testing.assert_close(weights.down_norms, down)


# --- tokens and documents ------------------------------------------------------------------------


def test_documents_are_counted_and_the_last_is_cut_to_the_exact_number(
    traces: TraceStore, model_dir: Path, long_data: Path, reference: Reference
) -> None:
    tokenizer = load_tokenizer(model_dir, 320)
    expected = []
    for line in long_data.read_text().splitlines():
        ids = len(tokenizer.encode(json.loads(line)["body"]))
        expected.append(ids + -(-ids // (CONTEXT - 1)))
    segments = [segment for shard in traces.progress.shards for segment in shard.segments]
    stored = [document for document, rows in segments for _ in range(rows)]
    assert stored == reference.documents(TOKENS)
    counts = [stored.count(document) for document in range(traces.documents)]
    assert traces.rows == sum(counts) == len(stored) == TOKENS
    assert counts[:-1] == expected[: len(counts) - 1]
    assert 0 < counts[-1] < expected[len(counts) - 1]
    assert all(shard.rows >= SHARD_ROWS for shard in traces.progress.shards[:-1])


@pytest.mark.parametrize("tokens", [1, CONTEXT, 1024, 1025])
def test_exactly_as_many_tokens_as_asked_for(
    settings: Settings, tmp_path: Path, tokens: int
) -> None:
    store = collect(settings(tmp_path / "out", tokens=tokens))
    assert store.rows == sum(shard.rows for shard in store.progress.shards) == tokens
    for layer in range(2):
        assert len(store.layer(layer)) == tokens


@pytest.mark.parametrize(
    "changes", [{}, {"weights": "streamed"}, {"layers": (0, 1)}], ids=["again", "streamed", "named"]
)
def test_two_runs_give_the_same_bytes(
    traces: TraceStore, settings: Settings, tmp_path: Path, changes: dict[str, object]
) -> None:
    collect(settings(tmp_path / "again", **changes))
    assert contents(tmp_path / "again") == contents(traces.path)


def test_a_tokenizer_larger_than_the_model_is_refused(
    make_model: ModelMaker, settings: Settings, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "small", vocab_size=100)
    with refused(PspError, str(model), "tokenizer.model", "100"):
        collect(settings(tmp_path / "out", model=str(model)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [0, 2, 4, 8])
def test_a_d_ff_that_fills_no_byte_is_recorded_as_well(
    make_model: ModelMaker, settings: Settings, tmp_path: Path, bits: int
) -> None:
    model = make_model(tmp_path / "odd", intermediate_size=109)
    run = settings(tmp_path / "out", model=str(model), tokens=200, importance_bits=bits)
    store = collect(run)
    store.check()
    (rows,) = store.layer(1).pieces
    active = unpack_active(rows.active, 109)
    assert Checkpoint.open(model).shape.d_ff == active.shape[1] == 109
    assert torch.equal(active.sum(0), rows.counts)
    assert len(rows.importance) == -(-int(active.sum()) * bits // 8)


# --- layers in passes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep") / "model"
    return make_model(path, num_hidden_layers=3, intermediate_size=96)


def test_layers_collected_in_passes_are_those_of_one_pass(
    deep_model: Path, settings: Settings, tmp_path: Path
) -> None:
    """The same bytes, one identity, and one artifact from both passes under resume."""
    run = {"model": str(deep_model), "tokens": 1300}
    whole = collect(settings(tmp_path / "whole", **run))
    passes = [collect(settings(tmp_path / f"{at}", layers=at, **run)) for at in ((0, 2), (1,))]
    together: dict[str, bytes] = {}
    for store in passes:
        store.check()
        files = contents(store.path)
        assert len(files) == 1 + len(store.header.layers) * 3
        together |= files
        assert store.identity == whole.identity
        assert tuple(store.activation_sparsity()) == store.header.layers
    expected = contents(whole.path)
    assert together | {"manifest.json": b""} == expected | {"manifest.json": b""}
    with refused(TraceError, str(passes[0].path), "layer 1 was not collected", "--layers"):
        passes[0].layer(1)

    def train(store: TraceStore, out: Path, resume: bool) -> None:
        config = TrainConfig(traces=store.path, out=out, rank=32, holdout=0.2, resume=resume)
        train_predictors(config)

    train(whole, tmp_path / "one", False)
    for store in reversed(passes):
        train(store, tmp_path / "other", True)
    assert contents(tmp_path / "other") == contents(tmp_path / "one")


# --- overflow ------------------------------------------------------------------------------------


def heated(model: Path, name: str, factor: float) -> Path:
    """Multiply one tensor of a model, so that its residual leaves float16's range."""
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name].float() * factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("layer", "name", "factor"),
    [
        (0, "model.embed_tokens.weight", 1e6),
        (1, "model.layers.0.mlp.down_proj.weight", 3e4),
    ],
)
def test_a_residual_beyond_float16_is_counted_and_asks_for_bfloat16_which_works(
    make_model: ModelMaker,
    settings: Settings,
    tmp_path: Path,
    layer: int,
    name: str,
    factor: float,
) -> None:
    model = heated(make_model(tmp_path / "hot"), name, factor)
    run = {"model": str(model), "tokens": 200}
    store = collect(settings(tmp_path / "brain", dtype="bfloat16", **run))
    (inputs,) = (piece.inputs for piece in store.layer(layer).pieces)
    assert inputs.dtype == torch.bfloat16
    assert torch.isfinite(inputs).all()
    assert inputs.float().abs().max() > 65504
    half = settings(tmp_path / "half", **run)
    with pytest.raises(TraceError) as error:
        collect(half)
    told = re.fullmatch(
        rf"layer {layer}: (\d+) of {200 * 64} residual values of a batch do not fit torch.float16 "
        r"\(largest ([\d.e+]+)\); use --dtype bfloat16, .*",
        str(error.value),
    )
    assert told, str(error.value)
    # The windows of 200 tokens make one batch, so the stored rows tell count and size.
    assert int(told[1]) == pytest.approx(int((inputs.float().abs() > 65504).sum()), rel=0.01)
    assert float(told[2]) == pytest.approx(float(inputs.float().abs().max()), rel=0.01)
    assert TraceStore.open(half.out).rows == 0, "nothing infinite was stored"
    assert not list(half.directory.rglob(".*")), "nothing was left half-written"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_residual_that_is_no_number_is_refused_in_either_dtype(
    make_model: ModelMaker, settings: Settings, tmp_path: Path, dtype: str
) -> None:
    """The weights are finite here: what they are multiplied with is not any more."""
    name = "model.layers.0.self_attn.o_proj.weight"
    model = heated(make_model(tmp_path / "broken"), name, 3e38)
    run = settings(tmp_path / "out", model=str(model), tokens=200, dtype=dtype)
    with refused(TraceError, "layer 0", f"of {200 * 64} residual", dtype, "check the model"):
        collect(run)


@pytest.mark.parametrize(
    ("name", "factor", "found"),
    [
        (
            "model.embed_tokens.weight",
            "nan",
            f"{320 * 64} NaN and 0 infinite among {320 * 64} numbers",
        ),
        ("model.layers.1.mlp.gate_proj.weight", "inf", "0 NaN and 64768 infinite among 64768"),
        ("model.layers.1.mlp.up_proj.weight", "nan", "64768 NaN and 0"),
    ],
)
def test_weights_that_are_no_numbers_are_named(
    make_model: ModelMaker, settings: Settings, tmp_path: Path, name: str, factor: str, found: str
) -> None:
    """Those of the last layer too, behind which no residual is recorded."""
    model = heated(make_model(tmp_path / "broken"), name, float(factor))
    told = f"{model / 'model.safetensors'}: tensor {name} is damaged: "
    with refused(CheckpointError, told, found, "fetch the checkpoint again"):
        collect(settings(tmp_path / "out", model=str(model), tokens=200))
