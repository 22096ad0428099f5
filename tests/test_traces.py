"""Traces: what is recorded, against plain PyTorch; windows; holdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import TEXT, TRACE_CONTEXT, TRACE_TOKENS, ModelMaker, refused
from safetensors.torch import load_file, save_file

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import load_tokenizer
from common.errors import PspError, TraceError
from predictor.collect import CollectConfig, collect
from predictor.magnitude import decode_magnitude
from predictor.traces import (
    Progress,
    TraceHeader,
    TraceStore,
    pack_active,
    unpack_active,
)
from predictor.windows import Window, cut_shards, cut_windows

TOKENS, CONTEXT = TRACE_TOKENS, TRACE_CONTEXT
# One step of the code is an eighth of an octave, so rounding is off by 2 ** (1 / 16) at most.
MAGNITUDE_ERROR = 0.045


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close shards after 1,024 rows, the least there is; a tiny model would fill none."""
    monkeypatch.setattr("predictor.collect._SHARD_BYTES", 1)


Settings = Callable[..., CollectConfig]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def reference_windows(model: Path, data: Path) -> list[list[int]]:
    """Cut the documents into windows, written down anew: BOS and up to CONTEXT - 1 tokens."""
    tokenizer, windows = load_tokenizer(model, 10**6), []
    for line in data.read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["body"])
        while ids:
            windows.append([1, *ids[: CONTEXT - 1]])
            ids = ids[CONTEXT - 1 :]
    return windows


@torch.inference_mode()
def reference_rows(model: Path, windows: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Recompute residual, gate and up of every layer in plain PyTorch on transformers' states."""
    from transformers import LlamaForCausalLM

    hf = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {k: v.float() for k, v in load_file(model / "model.safetensors").items()}
    parts: list[dict[str, list[torch.Tensor]]] = [{}, {}]
    for window in windows:
        states = hf(torch.tensor([window]), output_hidden_states=True).hidden_states
        for layer, rows in enumerate(parts):
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
            for key, value in (("residual", residual), ("gate", gate), ("up", up)):
                rows.setdefault(key, []).append(value)
    return [{key: torch.cat(value)[:TOKENS] for key, value in rows.items()} for rows in parts]


def test_traces_equal_plain_pytorch(traces: TraceStore, model_dir: Path, long_data: Path) -> None:
    """Same windows, same residual, same active neurons, same magnitudes."""
    reference = reference_rows(model_dir, reference_windows(model_dir, long_data))
    for layer, expected in enumerate(reference):
        rows = traces.layer(layer)
        torch.testing.assert_close(rows.inputs.float(), expected["residual"], atol=1e-3, rtol=2e-3)
        active = unpack_active(rows.active, 1012)
        # A gate within float32 noise of zero may fall on either side.
        clear = expected["gate"].abs() > 1e-4
        assert clear.float().mean() > 0.999
        assert torch.equal(active[clear], (expected["gate"] > 0)[clear])
        assert 0.2 < active.float().mean() < 0.8
        assert torch.equal(rows.counts, active.sum(0))
        magnitude = decode_magnitude(rows.magnitude)
        product = (expected["gate"].relu() * expected["up"]).abs()[active]
        sound = product > 1e-4
        assert sound.float().mean() > 0.99
        # Half a step of the code, and float32 noise of gate and up.
        allowed = MAGNITUDE_ERROR * product + 1e-5
        assert bool(((magnitude - product).abs() < allowed)[sound].all())


def test_sparsity_is_the_share_of_neurons_that_are_not_active(traces: TraceStore) -> None:
    for layer, sparsity in enumerate(traces.activation_sparsity()):
        active = unpack_active(traces.layer(layer).active, 1012)
        assert sparsity == pytest.approx(1 - float(active.double().mean()))


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


def test_documents_are_counted_and_the_last_is_cut_to_the_exact_number(
    traces: TraceStore, model_dir: Path, long_data: Path
) -> None:
    tokenizer = load_tokenizer(model_dir, 320)
    expected = []
    for line in long_data.read_text().splitlines():
        ids = len(tokenizer.encode(json.loads(line)["body"]))
        expected.append(ids + -(-ids // (CONTEXT - 1)))
    rows = traces.progress.document_rows
    assert traces.rows == sum(rows) == sum(traces.progress.shards) == TOKENS
    assert rows[:-1] == expected[: len(rows) - 1]
    assert 0 < rows[-1] < expected[len(rows) - 1]


@pytest.mark.parametrize("tokens", [1, CONTEXT, 1024, 1025])
def test_exactly_as_many_tokens_as_asked_for(
    settings: Settings, tmp_path: Path, tokens: int
) -> None:
    store = collect(settings(tmp_path / "out", tokens=tokens))
    assert store.rows == sum(store.progress.document_rows) == tokens
    for layer in range(2):
        assert len(store.layer(layer).inputs) == tokens


def test_data_that_ends_early_gives_a_complete_store_and_a_note(
    psp: Callable[..., Result], model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    out, tokens = tmp_path / "out", ("--tokens", 10**6, "--json")
    done = psp("collect", "--model", model_dir, "--data", data_file, "--out", out, *tokens)
    assert done.exit_code == 0
    store = TraceStore.open(out)
    store.require_complete()
    assert 100 < store.rows < 10**6
    assert json.loads(done.stdout)["tokens"] == store.rows
    again = psp(
        "collect", "--model", model_dir, "--data", data_file, "--out", out, *tokens[:2], "--resume"
    )
    assert f"the data ended after {store.rows} tokens" in again.stderr


def test_windows_begin_with_bos_and_hold_one_document(model_dir: Path) -> None:
    tokenizer, documents = load_tokenizer(model_dir, 320), [TEXT * 3, "a", TEXT]
    windows = list(cut_windows(documents, tokenizer, 50))
    joined: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for window in windows:
        assert window.tokens[0] == 1
        assert 2 <= len(window.tokens) <= 50
        joined[window.document] += window.tokens[1:]
    assert joined == {n: tokenizer.encode(text) for n, text in enumerate(documents)}
    assert [window.document for window in windows] == sorted(w.document for w in windows)


@pytest.mark.parametrize("rows", [30, 36])
@pytest.mark.parametrize("tokens", [1, 10, 35, 36, 37, 95, 96, 200])
def test_shards_are_whole_windows_of_at_least_the_rows_asked_for(tokens: int, rows: int) -> None:
    windows = [Window(number, list(range(12))) for number in range(8)]
    shards = list(cut_shards(windows, rows, tokens))
    sizes = [sum(len(window.tokens) for window in shard) for shard in shards]
    assert sum(sizes) == min(tokens, 96)
    assert all(rows <= size < rows + 12 for size in sizes[:-1])
    flat = [window for shard in shards for window in shard]
    assert flat[:-1] == windows[: len(flat) - 1]


def test_two_runs_give_the_same_bytes(
    traces: TraceStore, settings: Settings, tmp_path: Path
) -> None:
    collect(settings(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(traces.path)


@pytest.fixture
def hot_model(make_model: ModelMaker, tmp_path: Path) -> Path:
    """Return a model whose residual leaves float16's range."""
    model = make_model(tmp_path / "hot")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float() * 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_residual_beyond_float16_asks_for_bfloat16_which_works(
    hot_model: Path, settings: Settings, tmp_path: Path
) -> None:
    run = {"model": str(hot_model), "tokens": 200}
    with refused(TraceError, "layer 0", "does not fit torch.float16", "--dtype bfloat16"):
        collect(settings(tmp_path / "half", **run))
    store = collect(settings(tmp_path / "brain", dtype="bfloat16", **run))
    inputs = store.layer(0).inputs
    assert inputs.dtype == torch.bfloat16
    assert torch.isfinite(inputs).all()
    assert inputs.float().abs().max() > 65504


def test_a_tokenizer_larger_than_the_model_is_refused(
    make_model: ModelMaker, settings: Settings, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "small", vocab_size=100)
    with refused(PspError, str(model), "tokenizer.model", "100"):
        collect(settings(tmp_path / "out", model=str(model)))


def store_of(document_rows: list[int]) -> TraceStore:
    header = TraceHeader(
        model="",
        model_fingerprint="",
        architecture="llama",
        activation="relu",
        n_layers=1,
        d_model=1,
        d_ff=1,
        norm_eps=1e-5,
        input_dtype="float16",
        data="",
        field="",
        tokens=sum(document_rows),
        context=1,
        batch=1,
        shard_rows=1,
        seed=0,
    )
    return TraceStore(Path("traces"), header, Progress([sum(document_rows)], document_rows, True))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.7])
def test_the_holdout_is_whole_documents_of_at_least_the_share(share: float) -> None:
    documents = [30, 0, 7, 50, 1, 12, 25, 0, 40, 33, 18, 9]
    chosen = set()
    for seed in range(20):
        held = store_of(documents).holdout(share, seed)
        assert held.dtype == torch.bool
        parts = torch.split(held, documents)
        assert all(part.all() or not part.any() for part in parts)
        # At least the share, and no document more than that takes; something is left to train on.
        assert share * sum(documents) <= int(held.sum()) < share * sum(documents) + max(documents)
        assert not held.all()
        assert torch.equal(held, store_of(documents).holdout(share, seed))
        chosen.add(tuple(held.tolist()))
    assert len(chosen) > 5


def test_the_holdout_never_takes_everything_nor_nothing() -> None:
    for seed in range(10):
        held = store_of([10, 10]).holdout(0.9, seed)
        assert int(held.sum()) == 10


@pytest.mark.parametrize("documents", [[], [100], [0, 100, 0]])
def test_a_holdout_needs_two_documents(documents: list[int]) -> None:
    with refused(TraceError, "traces", "document", "at least 2", "--tokens"):
        store_of(documents).holdout(0.1, 0)


@pytest.mark.parametrize("d_ff", [1, 7, 8, 9, 112, 113])
def test_packing_keeps_every_bit(d_ff: int) -> None:
    active = torch.rand(17, d_ff, generator=torch.Generator().manual_seed(d_ff)) < 0.5
    packed = pack_active(active)
    assert packed.dtype == torch.uint8
    assert packed.shape == (17, -(-d_ff // 8))
    assert torch.equal(unpack_active(packed, d_ff), active)


def test_the_least_significant_bit_comes_first() -> None:
    active = torch.tensor([[True, False, False, False, False, False, False, True, True]])
    assert pack_active(active).tolist() == [[0b10000001, 1]]


def test_a_d_ff_that_fills_no_byte_is_recorded_as_well(
    make_model: ModelMaker, settings: Settings, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "odd", intermediate_size=109)
    store = collect(settings(tmp_path / "out", model=str(model), tokens=200))
    rows = store.layer(1)
    active = unpack_active(rows.active, 109)
    assert Checkpoint.open(model).shape.d_ff == active.shape[1] == 109
    assert torch.equal(active.sum(0), rows.counts)
    assert len(rows.magnitude) == int(active.sum())
