"""Every family: its published layout loads, runs, is collected and trained as its own code says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from families import BY_NAME, VARIANTS, YARN, Variant, Written, save_tensors, write
from published import Layer, is_tied

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from architectures.tokenizer import load_tokenizer
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.packing import unpack_active
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

TOKENS, CONTEXT, SHARD_ROWS = 320, 40, 110
TOLERANCE = 5e-5
"""Float32 noise of logits of standard deviation 0.3 to 1.4."""

Write = Callable[..., Written]


@pytest.fixture
def make(tmp_path: Path, tokenizer_bytes: bytes) -> Write:
    """Write a variant, by name, with changes of its config."""

    def written(name: str, **changes: Any) -> Written:
        number = len(list(tmp_path.iterdir()))
        return write(BY_NAME[name].changed(**changes), tmp_path / str(number), tokenizer_bytes)

    return written


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def written(
    request: pytest.FixtureRequest,
    tokenizer_bytes: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Written:
    variant: Variant = request.param
    return write(variant, tmp_path_factory.mktemp("family") / variant.name, tokenizer_bytes)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of uneven length: windows of a full context, of its half and of few tokens."""
    path = tmp_path_factory.mktemp("data") / "uneven.jsonl"
    lengths = (90, 5, 60, 41, 12, 100, 70, 33)
    texts = [TEXT[number * 7 :][: lengths[number % 8]] for number in range(24)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def settings(written: Written, documents: Path, out: Path, **changes: Any) -> CollectConfig:
    chosen: dict[str, Any] = {
        "model": str(written.path),
        "data": str(documents),
        "tokens": TOKENS,
        "context": CONTEXT,
        "batch": 3,
        "importance_bits": 8,
        "shard_rows": SHARD_ROWS,
    }
    return CollectConfig(out=out, **(chosen | changes))


@pytest.fixture(scope="module")
def store(
    written: Written, documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    out = tmp_path_factory.mktemp("store") / written.variant.name
    return collect(settings(written, documents, out))


def some_tokens(length: int = 30) -> torch.Tensor:
    return torch.randint(12, 320, (2, length), generator=torch.Generator().manual_seed(0))


def logits_of(written: Written, tokens: torch.Tensor) -> torch.Tensor:
    checkpoint = Checkpoint.open(written.path)
    return load_model(checkpoint, dtype=torch.float32, device="cpu").logits(tokens).double()


def formula_logits(written: Written, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([written.reference(row.tolist()).logits for row in tokens])


def test_a_published_layout_is_taken_for_its_family(written: Written) -> None:
    checkpoint, variant = Checkpoint.open(written.path), written.variant
    assert checkpoint.architecture.name == variant.family
    assert (checkpoint.shape.activation, checkpoint.shape.activation_threshold) == (
        variant.activation
    )
    assert checkpoint.shape.tied_embeddings is is_tied(variant.config)
    eps = variant.config.get("layer_norm_epsilon", 1e-5)  # OPT's config has none
    assert checkpoint.shape.norm_eps == variant.config.get("rms_norm_eps", eps)
    assert (
        load_tokenizer(written.path, 320, variant.config).bos_id()
        == (variant.config["bos_token_id"])
    )


def test_logits_equal_the_published_formula(written: Written) -> None:
    tokens = some_tokens()
    expected = formula_logits(written, tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits_of(written, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("relu-llama", {"rope_theta": 100.0}),
        ("relu-llama", {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}),
        ("relu-mistral", {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}}),
        ("relu-llama", {"rms_norm_eps": 0.1}),
        ("relu-llama", {"hidden_act": "drelu"}),
        ("relu-mistral", {"hidden_act": "fatrelu", "hidden_act_param": 0.2}),
        ("relu-mistral", {"num_attention_heads": 8, "num_key_value_heads": 4}),
        ("prosparse", {"hidden_act_param": 0.01}),
        ("prosparse", {"hidden_act": "relu"}),
        ("minicpm-s-llama-format", {"hidden_act": "relu"}),
        ("minicpm-s", {"hidden_act": "relu"}),
        ("minicpm", {"scale_emb": 6}),
        ("minicpm", {"scale_depth": 1.0}),
        ("minicpm", {"dim_model_base": 32}),
        ("minicpm", {"rope_theta": 100.0}),
        ("drelu-mistral", {"hidden_act": "relu"}),
        ("bamboo", {"architectures": ["MistralForCausalLM"]}),
        ("bamboo", {"rope_theta": 1e6}),
        ("llama-linear", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama-linear", {"rope_scaling": None}),
        ("llama-yarn", {"rope_scaling": None}),
        ("llama-yarn", {"rope_theta": 100.0}),
        ("llama-yarn", {"rope_scaling": YARN | {"original_max_position_embeddings": 128}}),
        ("llama-yarn", {"rope_scaling": YARN | {"factor": 3.0}}),
        ("bamboo-yarn", {"rope_parameters": None}),
        ("falcon-40b", {"rope_theta": 100.0}),
        ("falcon-40b", {"layer_norm_epsilon": 0.01}),
        ("falcon-7b", {"rope_parameters": {"rope_theta": 100.0}}),
    ],
    ids=str,
)
def test_every_value_of_the_config_counts(name: str, changes: dict[str, Any], make: Write) -> None:
    """The same weights under another config: both sides change, by far more than the tolerance."""
    tokens = some_tokens()
    first, other = make(name), make(name, **changes)
    assert all(torch.equal(tensor, other.tensors[n]) for n, tensor in first.tensors.items())
    expected = formula_logits(other, tokens)
    assert (expected - formula_logits(first, tokens)).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(logits_of(other, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("relu-llama", "model.layers.1.self_attn.k_proj.weight"),
        ("opt-6.7b", "decoder.layers.2.fc1.bias"),
        ("opt-6.7b", "decoder.layers.0.final_layer_norm.bias"),
        ("opt-6.7b", "decoder.embed_positions.weight"),
        ("opt-125m", "model.decoder.layers.1.self_attn.v_proj.bias"),
        ("falcon-7b", "transformer.h.1.input_layernorm.bias"),
        ("falcon-40b", "transformer.h.1.ln_attn.bias"),
        ("falcon-40b", "transformer.h.0.ln_mlp.weight"),
        ("falcon-11b", "lm_head.weight"),
    ],
)
def test_a_shuffled_tensor_shows_in_the_logits(name: str, tensor: str, make: Write) -> None:
    """The comparison with the formula would notice rows in another order."""
    tokens, written = some_tokens(), make(name)
    right = formula_logits(written, tokens)
    written.tensors[tensor] = written.tensors[tensor].roll(1, dims=0)
    assert (formula_logits(written, tokens) - right).abs().max() > 100 * TOLERANCE


@dataclass(frozen=True)
class Facts:
    """What the store must hold of all layers, and how many rows its shards have."""

    layers: list[Layer]
    shards: list[int]


@pytest.fixture(scope="module")
def facts(written: Written, documents: Path) -> Facts:
    """Cut the documents into windows, anew, and run the formula on each by itself.

    Every second window of a byte-level vocabulary begins without BOS.
    """
    config = written.variant.config
    tokenizer = load_tokenizer(written.path, 320, config)
    context = min(CONTEXT, config.get("sliding_window", CONTEXT))
    bare = cycle([False, written.variant.tokenizer != "tokenizer.model"])
    shards: list[list[list[int]]] = [[]]
    left = TOKENS
    for line in documents.read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"])
        while ids:
            begun = [] if next(bare) else [config["bos_token_id"]]
            taken, ids = ids[: context - len(begun)], ids[context - len(begun) :]
            if left and sum(map(len, shards[-1])) >= SHARD_ROWS:
                shards.append([])
            window = [*begun, *taken][:left]
            shards[-1] += [window] if left else []
            left -= len(window)
    ordered = [sorted(shard, key=len, reverse=True) for shard in shards]
    assert left == 0
    return Facts(
        rows_of(written, [window for shard in ordered for window in shard]),
        [sum(map(len, s)) for s in ordered],
    )


def rows_of(written: Written, windows: list[list[int]]) -> list[Layer]:
    """Return the rows of all layers, window after window; windows differ in length."""
    assert len({len(window) for window in windows}) > 4
    runs = [written.reference(window).layers for window in windows]
    joined = []
    for parts in zip(*runs, strict=True):
        values: dict[str, Any] = {}
        for name, first in vars(parts[0]).items():
            rows = [getattr(part, name) for part in parts]
            values[name] = None if first is None else torch.cat(rows)
        joined.append(Layer(**values))
    return joined


def clear(layer: Layer, threshold: float) -> torch.Tensor:
    """Tell the neurons whose activity float32 noise cannot change."""
    sure = (layer.gate - threshold).abs() > 1e-4
    return sure if layer.up is None else sure & (layer.up.abs() > 1e-4)


def test_headers_say_what_was_collected(store: TraceStore, written: Written) -> None:
    header, (activation, threshold) = store.header, written.variant.activation
    gated = written.variant.family not in ("opt", "falcon")
    assert store.progress.complete
    assert header.architecture == written.variant.family
    assert (header.activation, header.activation_threshold) == (activation, threshold)
    assert header.ffn_matrices == (3 if gated else 2)
    assert header.context == min(CONTEXT, written.variant.config.get("sliding_window", CONTEXT))
    assert header.layers == tuple(range(written.variant.config["num_hidden_layers"]))
    store.check()


def test_collected_rows_equal_recomputed_ones(
    store: TraceStore, written: Written, facts: Facts
) -> None:
    assert [shard.rows for shard in store.progress.shards] == facts.shards
    assert len(facts.shards) == 3
    activation, threshold = written.variant.activation
    for number, layer in enumerate(facts.layers):
        rows = store.layer(number)
        # Half a step of float16, and float32 noise.
        every = torch.arange(len(rows))
        inputs = rows.inputs_at(every).double()
        torch.testing.assert_close(inputs, layer.residual, rtol=2**-10.9, atol=1e-5)
        active = unpack_active(rows.active_at(every), layer.gate.shape[1])
        sure = clear(layer, threshold)
        assert sure.double().mean() > 0.999
        assert torch.equal(active[sure], layer.active[sure])
        assert 0.1 < active.double().mean() < 0.7
        assert torch.equal(rows.counts, active.sum(0))
        if activation != "relu":
            # Labels of plain ReLU would be others.
            assert ((layer.gate > 0) != layer.active).double().mean() > 0.03


def test_collected_importance_equals_recomputed_one_within_a_step(
    store: TraceStore, written: Written, facts: Facts
) -> None:
    for number, layer in enumerate(facts.layers):
        rows = store.layer(number)
        every = torch.arange(len(rows))
        active = unpack_active(rows.active_at(every), layer.gate.shape[1])
        expected = (layer.intermediate.abs() * down_norms(written, number)) * active
        scale = expected.sum(1) / active.sum(1)
        torch.testing.assert_close(rows.scale_at(every).double(), scale, rtol=1e-4, atol=0)
        assert sum(len(piece.importance) for piece in rows.pieces) == active.sum()
        found = torch.zeros_like(expected)
        codes = rows.codes_at(every, active.sum(1))
        found[active] = torch.exp2((codes.double() + 0.5) / 8 - 20)
        found *= scale[:, None]
        # A step is an eighth of an octave, so its middle is off by a 16th at most.
        allowed = (2 ** (1 / 16) - 1 + 1e-3) * expected + 2e-5 * scale[:, None]
        assert bool(((found - expected).abs() <= allowed).all())
        assert expected[active].std() > scale.mean() / 2


def down_norms(written: Written, layer: int) -> torch.Tensor:
    """Return the norm of what each neuron adds to the residual stream at an intermediate of 1."""
    config = written.variant.config
    (down,) = (
        tensor.double()
        for name, tensor in written.tensors.items()
        if f".{layer}." in name
        and name.endswith(("down_proj.weight", "fc2.weight", "dense_4h_to_h.weight"))
        and "predictor" not in name
    )
    minicpm = written.variant.family == "minicpm"
    branch = config["scale_depth"] / config["num_hidden_layers"] ** 0.5 if minicpm else 1.0
    return branch * down.square().sum(0).sqrt()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama-tied", ["mlp.gate_proj.weight"]),
        ("bamboo", ["mlp.gate_proj.weight"]),
        ("bamboo", ["mlp.up_proj.weight"]),
        ("opt-125m", ["fc1.weight", "fc1.bias"]),
        ("falcon-40b", ["mlp.dense_h_to_4h.weight"]),
    ],
)
def test_a_neuron_at_exactly_zero_is_not_active(
    make: Write, documents: Path, tmp_path: Path, name: str, parts: list[str]
) -> None:
    written = make(name)
    for stored, tensor in written.tensors.items():
        if any(stored.endswith(f".0.{part}") for part in parts):
            tensor[5:9] = 0
    save_tensors(written.tensors, written.path, written.variant.files)
    counts = collect(settings(written, documents, tmp_path / "zero")).layer(0).counts
    assert counts[5:9].tolist() == [0] * 4
    assert (counts > 0).double().mean() > 0.9


def contents(directory: Path, pattern: str = "**/*") -> dict[str, bytes]:
    found = (path for path in directory.glob(pattern) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_streamed_weights_give_the_same_bytes(
    store: TraceStore, written: Written, documents: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    collect(settings(written, documents, tmp_path / "s", weights="streamed"), lines.append)
    assert any("streamed" in line for line in lines)
    assert contents(tmp_path / "s") == contents(store.path)


def test_one_layer_gives_the_same_bytes_as_among_all(
    store: TraceStore, written: Written, documents: Path, tmp_path: Path
) -> None:
    layer = VARIANTS.index(written.variant) % 2  # both in every graph
    alone = collect(settings(written, documents, tmp_path / "one", layers=(layer,)))
    files = contents(alone.path, f"layer-{layer:02d}/*")
    assert len(files) == 4
    assert files == contents(store.path, f"layer-{layer:02d}/*")
    assert len(contents(alone.path)) == len(files) + 1
    assert alone.identity == store.identity


def test_stored_gate_is_linear_in_what_the_predictor_reads(
    store: TraceStore, written: Written, facts: Facts
) -> None:
    """Over the input's length it gives the gate, but for a constant of biases."""
    centred = written.variant.family in ("opt", "falcon")
    for number, layer in enumerate(facts.layers):
        x = layer.residual
        length = (x - x.mean(1, keepdim=True) * centred).square().mean(1, keepdim=True).sqrt()
        rest = layer.gate - x @ store.weights(number).gate.double().T / length
        assert rest.std(0).max() < 0.01 < 0.3 < layer.gate.std(0).min()
        assert centred or rest.abs().max() < 0.01


def test_predictors_are_trained_and_find_what_is_active(
    store: TraceStore, written: Written, facts: Facts, tmp_path: Path
) -> None:
    artifact = train_predictors(TrainConfig(traces=store.path, out=tmp_path / "p", rank=32))
    assert tuple(artifact.layers) == store.header.layers
    held = store.holdout(0.1, 0)
    assert 0.1 <= held.double().mean() < 0.4
    for number, metrics in artifact.layers.items():
        assert all(map(math.isfinite, metrics.values()))
        predictor, layer = artifact.layer(number), facts.layers[number]
        assert predictor.activation_counts is not None
        assert torch.equal(predictor.activation_counts, store.layer(number).counts)
        # A random predictor's recall is the share of neurons that it predicts.
        assert metrics["activation_recall"] > 0.75
        assert metrics["activation_recall"] > 1.2 - metrics["predicted_sparsity"]
        hidden = (layer.residual[held] @ predictor.fc1.double().T).clamp(min=0)
        predicted, active = hidden @ predictor.fc2.double().T >= 0, layer.active[held]
        recall = float((predicted & active).sum() / active.sum())
        assert metrics["activation_recall"] == pytest.approx(recall, abs=3e-3)
        sparsity = 1 - float(active.double().mean())
        assert metrics["activation_sparsity"] == pytest.approx(sparsity, abs=1e-3)
