"""Ranges of a model's blocks, one after the other: what the whole model computes, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS, Variant, write
from mixtures import MIXTURES
from torch import nn

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, load_model
from architectures.spec import TensorRule
from predictor.collection.recorder import Recorder, read_layer_weights
from predictor.collection.row_maker import Arriving
from predictor.collection.windows import Window

ENDS = {3: (0, 2, 3), 4: (0, 1, 3, 4), 6: (0, 1, 4, 6)}
"""Blocks of a model to the ends of its ranges, which are of uneven length."""

IDS = torch.randint(12, 320, (4, 40), generator=torch.Generator().manual_seed(0))
LENGTHS = (40, 33, 17, 2)
WINDOWS = [
    Window(number, row[:length].tolist())
    for number, (row, length) in enumerate(zip(IDS, LENGTHS, strict=True))
]
BY_NAME = {variant.name: variant for variant in (*VARIANTS, *MIXTURES)}
DEEP = tuple(variant.changed(num_hidden_layers=4) for variant in VARIANTS)
LAYOUTS = (*DEEP, MIXTURES[0], MIXTURES[-1])

load = partial(load_model, dtype=torch.float32, device="cpu")
Rows = dict[int, list[bytes]]


@dataclass(frozen=True)
class Cut:
    """A model, ranges of its blocks, and the names of the tensors that were read for each."""

    checkpoint: Checkpoint
    whole: LoadedModel
    parts: list[LoadedModel]
    read: list[list[str]]


def made(variant: Variant, path: Path) -> Cut:
    checkpoint, names = Checkpoint.open(write(variant, path, b"").path, experts=True), [[""]]
    read = Checkpoint.read

    def told(self: Checkpoint, rule: TensorRule, layer: int = 0, expert: int = 0) -> torch.Tensor:
        names[-1].append(rule.source.format(layer=layer, expert=expert))
        return read(self, rule, layer, expert)

    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", told)
        for ends in pairwise(ENDS[checkpoint.shape.n_layers]):
            names.append([])
            parts.append(load(checkpoint, layers=range(*ends)))
    return Cut(checkpoint, load(checkpoint), parts, names[1:])


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda variant: variant.name)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return made(request.param, tmp_path_factory.mktemp("ranges") / "model")


def outputs_of(model: LoadedModel) -> list[torch.Tensor]:
    """Return what each block gives, as hooks on it see it."""
    found: list[torch.Tensor] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    model.logits(IDS)
    for hook in hooks:
        hook.remove()
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are equal, the sign of zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def needed(checkpoint: Checkpoint, layers: range) -> dict[str, TensorRule]:
    """Return the names of the tensors that a range needs, told by what they are called."""
    found, shape = {}, checkpoint.shape
    for rule in checkpoint.architecture.tensors:
        embeds = "embed" in rule.source and not rule.per_layer
        ends = layers.start == 0 if embeds else layers.stop == shape.n_layers
        for layer, expert in rule.places(shape):
            if layer in layers if rule.per_layer else ends:
                found[rule.source.format(layer=layer, expert=expert)] = rule
    return found


def test_a_range_reads_and_holds_what_it_needs(cut: Cut) -> None:
    for model, read in zip(cut.parts, cut.read, strict=True):
        rules = needed(cut.checkpoint, model.layers)
        assert sorted(read) == sorted(rules)
        held = [weight for weight in model.causal_lm.parameters() if not weight.is_meta]
        sizes = (torch.Size(rule.shape(cut.checkpoint.shape)).numel() for rule in rules.values())
        assert sum(weight.numel() for weight in held) == sum(sizes)
        assert not any(weight.is_meta for block in model.blocks for weight in block.parameters())
        assert sum(buffer.numel() for buffer in model.causal_lm.buffers()) < 64  # frequencies
    ends = ENDS[cut.checkpoint.shape.n_layers]
    assert [model.layers for model in cut.parts] == [range(*pair) for pair in pairwise(ends)]


def test_ranges_pass_on_what_the_whole_model_computes(cut: Cut) -> None:
    outputs, entering = outputs_of(cut.whole), IDS
    assert same_bits(cut.whole.through(IDS), outputs[-1])
    for part in cut.parts:
        before = entering
        entering = part.through(before)
        assert same_bits(entering, outputs[part.layers.stop - 1])
    hidden = cut.parts[-1].hidden(before)
    assert same_bits(hidden, cut.whole.hidden(IDS))
    assert same_bits(cut.parts[-1].head(hidden), cut.whole.logits(IDS))


def test_the_first_block_gets_the_residual_as_it_is(cut: Cut) -> None:
    part = cut.parts[-1]
    residual = torch.randn(2, 3, cut.checkpoint.shape.d_model)
    residual[0, 0, :2] = torch.tensor([0.0, -0.0])
    seen: list[torch.Tensor] = []
    hook = part.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    part.through(residual)
    hook.remove()
    assert same_bits(seen[0], residual)


@pytest.mark.parametrize("name", ["llama-tied", "opt-6.7b", "falcon-11b", "smallthinker-4b"])
def test_a_streamed_range_without_head_computes_the_same(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(BY_NAME[name], tmp_path / "model", b"").path, experts=True)
    last = partial(load, checkpoint, layers=range(1, checkpoint.shape.n_layers))
    kept, streamed = last(), last(weights="streamed", head=False)
    residual = torch.randn(2, 30, checkpoint.shape.d_model)
    assert same_bits(streamed.through(residual), kept.through(residual))
    assert same_bits(streamed.hidden(residual), kept.hidden(residual))
    held = [name for name, weight in streamed.causal_lm.named_parameters() if not weight.is_meta]
    assert {name.rpartition(".")[0] for name in held} == {checkpoint.architecture.output_norm}


def recorded(checkpoint: Checkpoint, models: list[LoadedModel]) -> tuple[Rows, torch.Tensor]:
    """Return the bytes of every layer's rows, recorded range after range, and what is left."""
    found: Rows = {}
    residual: torch.Tensor | None = None

    def sink(layer: int, arriving: Arriving) -> None:
        found[layer] = [part.numpy().tobytes() for part in vars(arriving()).values()]

    for model in models:
        norms = {layer: read_layer_weights(checkpoint, layer).down_norms for layer in model.layers}
        with Recorder(model, checkpoint, norms, dtype=torch.float16, importance_bits=8) as recorder:
            residual = recorder.run(WINDOWS, sink, residual)
            recorder.flush()
    assert residual is not None
    return found, residual


def check_rows(cut: Cut) -> None:
    expected, left = recorded(cut.checkpoint, [cut.whole])
    rows, residual = recorded(cut.checkpoint, cut.parts)
    assert list(rows) == list(range(cut.checkpoint.shape.n_layers))
    assert rows == expected
    assert same_bits(residual, left)
    assert len(rows[0][0]) == 2 * sum(LENGTHS) * cut.checkpoint.shape.d_model


def test_ranges_record_the_same_rows(cut: Cut) -> None:
    """Of mixtures of experts nothing is recorded."""
    if cut.checkpoint.shape.experts is None:
        check_rows(cut)


@pytest.mark.parametrize("name", ["minicpm-s", "opt-125m", "falcon-40b"])
def test_so_they_do_beside_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with everything on the CPU."""
    monkeypatch.setattr("predictor.collection.recorder.made_at_once", lambda device: False)
    check_rows(made(BY_NAME[name].changed(num_hidden_layers=4), tmp_path / "model"))
