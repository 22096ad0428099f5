"""The hybrid split: PowerInfer's placement by hand, and the choice of neurons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from conftest import refused
from gguf import GGMLQuantizationType

from benchmarks.upstream_split import upstream_choice, upstream_order
from common.errors import ExportError
from gguf_export.bundle import Bundle
from gguf_export.gpu_split import captured_share, choose_neurons, split_bytes
from gguf_export.pwri.gpu_index import GROUPS, Groups
from gguf_export.pwri.memory_plan import MemoryPlan, MemorySettings, plan_memory
from gguf_files.reader import GGUFFile, TensorInfo

GIB = 1024**3


def f16(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, shape, GGMLQuantizationType.F16, 0, 2 * math.prod(shape))


def f32(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, shape, GGMLQuantizationType.F32, 0, 4 * math.prod(shape))


def llama(n_layers: int, d_model: int, d_ff: int, kv: int, rank: int) -> Iterator[TensorInfo]:
    """Tensors of a LLaMA of 32,000 tokens in F16, in no order that PowerInfer knows."""
    yield f16("token_embd.weight", 32000, d_model)
    yield f16("output.weight", 32000, d_model)
    yield f32("output_norm.weight", d_model)
    for n in reversed(range(n_layers)):
        yield f16(f"blk.{n}.fc2.weight", d_ff, rank)
        yield f16(f"blk.{n}.fc1.weight", rank, d_model)
        yield f16(f"blk.{n}.ffn_gate.weight", d_ff, d_model)
        yield f16(f"blk.{n}.ffn_up.weight", d_ff, d_model)
        yield f16(f"blk.{n}.ffn_down_t.weight", d_ff, d_model)
        yield f32(f"blk.{n}.ffn_norm.weight", d_model)
        yield f16(f"blk.{n}.attn_output.weight", d_model, d_model)
        yield f16(f"blk.{n}.attn_v.weight", kv, d_model)
        yield f16(f"blk.{n}.attn_k.weight", kv, d_model)
        yield f16(f"blk.{n}.attn_q.weight", d_model, d_model)
        yield f32(f"blk.{n}.attn_norm.weight", d_model)


SEVEN_B = list(llama(32, 4096, 11008, 4096, 1024))
SEVENTY_B = list(llama(80, 8192, 28672, 1024, 2048))

# LLaMA-7B, bytes. A layer's attention: 4 · 4096 + 4 · 4096 · 4096 · 2 = 134,234,112; predictor:
# (1024 · 4096 + 11008 · 1024) · 2 = 30,932,992; FFN norm: 4 · 4096 = 16,384; output:
# 16,384 + 32000 · 4096 · 2 = 262,160,384. 32 · (134,234,112 + 30,932,992 + 16,384) + 262,160,384:
SEVEN_B_PLACED = 5_548_032_000
# Half of its KV cache at 512 tokens in F16: 32 · 512 · 4096 · 2.
SEVEN_B_KV = 134_217_728
# LLaMA-70B. Attention: 4 · 8192 + (2 · 8192 · 8192 + 2 · 1024 · 8192) · 2 = 302,022,656;
# predictor: (2048 · 8192 + 28672 · 2048) · 2 = 150,994,944; FFN norm: 32,768; output:
# 32,768 + 32000 · 8192 · 2 = 524,320,768. 80 · (302,022,656 + 150,994,944 + 32,768) + 524,320,768:
SEVENTY_B_PLACED = 36_768_350_208
# Half of its KV cache at 4096 tokens: 80 · 4096 · 1024 · 2 in F16.
SEVENTY_B_KV = 671_088_640


def plan_7b(budget: int, n_ctx: int = 512) -> MemoryPlan:
    settings = MemorySettings(budget=budget, n_layers=32, kv_width=4096, n_ctx=n_ctx)
    return plan_memory(SEVEN_B, settings)


def plan_70b(budget: int, **changes: object) -> MemoryPlan:
    settings = {"budget": budget, "n_layers": 80, "kv_width": 1024, "n_ctx": 4096} | changes
    return plan_memory(SEVENTY_B, MemorySettings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "tensors", "complete", "kv_halves", "left"),
    [
        # 8 GiB = 8,589,934,592
        (plan_7b(8 * GIB), 258, True, 2, 2_773_467_136),
        (plan_7b(8 * GIB, n_ctx=2048), 258, True, 2, 1_968_160_768),
        (plan_7b(SEVEN_B_PLACED), 258, True, 0, 0),
        (plan_7b(SEVEN_B_PLACED + SEVEN_B_KV - 1), 258, True, 0, 134_217_727),
        (plan_7b(SEVEN_B_PLACED + SEVEN_B_KV), 258, True, 1, 0),
        (plan_7b(SEVEN_B_PLACED + 2 * SEVEN_B_KV - 1), 258, True, 1, 134_217_727),
        (plan_7b(SEVEN_B_PLACED + 2 * SEVEN_B_KV), 258, True, 2, 0),
        # 4 GiB = 31 layers of attention (4,161,257,472), then norm, q, k and v of the last
        # (100,679,680); 33,030,144 bytes are left, and its output matrix wants 33,554,432.
        (plan_7b(4 * GIB), 159, False, 0, 33_030_144),
        # Another half MiB: that matrix, which leaves nothing for the predictors.
        (plan_7b(4 * GIB + 524_288), 160, False, 0, 0),
        (plan_7b(16_383), 0, False, 0, 16_383),
        (plan_7b(0), 0, False, 0, 0),
        # 80 GiB = 85,899,345,920
        (plan_70b(80 * GIB), 642, True, 2, 47_788_818_432),
        (plan_70b(80 * GIB, kv_type="f32"), 642, True, 2, 46_446_641_152),
        (plan_70b(SEVENTY_B_PLACED + SEVENTY_B_KV), 642, True, 1, 0),
        # 24 GiB = 25,769,803,776: attention 24,161,812,480; ten predictors 1,509,949,440; fc1 of
        # the eleventh 33,554,432; its fc2 wants 117,440,512.
        (plan_70b(24 * GIB), 421, False, 0, 64_487_424),
    ],
    ids=range(15),
)
def test_placement_is_that_worked_out_by_hand(
    plan: MemoryPlan, tensors: int, complete: bool, kv_halves: int, left: int
) -> None:
    assert (len(plan.offloaded), plan.complete) == (tensors, complete)
    assert (plan.kv_halves, plan.left) == (kv_halves, left)
    assert plan.ffn_budget == (left if complete else 0)


def test_a_neuron_is_three_rows_and_its_number() -> None:
    assert set(plan_7b(0).bytes_per_neuron) == {3 * 4096 * 2 + 4}
    assert set(plan_70b(0).bytes_per_neuron) == {3 * 8192 * 2 + 4}
    assert len(plan_70b(0).bytes_per_neuron) == 80
    ungated = [tensor for tensor in SEVEN_B if "ffn_gate" not in tensor.name]
    plan = plan_memory(ungated, MemorySettings(budget=0, n_layers=32, kv_width=4096))
    assert set(plan.bytes_per_neuron) == {2 * 4096 * 2 + 4}


def test_order_is_by_kind_then_layer() -> None:
    order = plan_7b(8 * GIB).offloaded
    assert order[:7] == (
        "blk.0.attn_norm.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.attn_v.weight",
        "blk.0.attn_output.weight",
        "blk.1.attn_norm.weight",
        "blk.1.attn_q.weight",
    )
    assert order[159:163] == (
        "blk.31.attn_output.weight",
        "blk.0.fc1.weight",
        "blk.0.fc2.weight",
        "blk.1.fc1.weight",
    )
    assert order[223:226] == ("blk.31.fc2.weight", "blk.0.ffn_norm.weight", "blk.1.ffn_norm.weight")
    assert order[-2:] == ("output_norm.weight", "output.weight")


def test_biases_follow_their_weights() -> None:
    """OPT's tensors, as llama.cpp:llm_load_sparse_model_tensors makes them."""
    order = [
        *(f"blk.0.attn_{stem}" for stem in ("norm.weight", "norm.bias", "q.weight", "q.bias")),
        *(f"blk.0.attn_{stem}" for stem in ("output.weight", "output.bias")),
        *("blk.0.fc1.weight", "blk.0.fc2.weight", "blk.0.ffn_norm.weight", "blk.0.ffn_norm.bias"),
        *("output_norm.weight", "output_norm.bias"),
    ]
    tensors = [f16("blk.0.ffn_up.weight", 16, 8), f16("blk.0.ffn_down_t.weight", 16, 8)]
    on_cpu = ("token_embd.weight", "position_embd.weight", "blk.0.ffn_up.bias")
    tensors += [f32(name, 8) for name in (*reversed(order), *on_cpu)]
    plan = plan_memory(tensors, MemorySettings(budget=10**6, n_layers=1, kv_width=8))
    assert list(plan.offloaded) == order
    assert plan.bytes_per_neuron == (2 * 8 * 2 + 4,)


def test_nothing_passes_the_first_tensor_that_does_not_fit() -> None:
    """Layer 0's queries do not fit; its smaller neighbours would."""
    tensors = list(llama(2, 64, 1012, 32, 32))
    plan = plan_memory(tensors, MemorySettings(budget=256 + 8191, n_layers=2, kv_width=32))
    assert plan.offloaded == ("blk.0.attn_norm.weight",)
    assert plan.left == 8191


def test_output_norm_alone_brings_the_cache_but_no_neurons() -> None:
    """flush calls all layers offloaded before the output matrix has its place."""
    placed = SEVEN_B_PLACED - 262_144_000
    plan = plan_7b(placed + SEVEN_B_KV + 100)
    assert plan.offloaded[-1] == "output_norm.weight"
    assert (plan.complete, plan.kv_halves, plan.left, plan.ffn_budget) == (False, 1, 100, 0)
    assert plan_7b(placed - 1).kv_halves == 0


def test_exported_file_is_planned_as_worked_out(exact_bundle: Bundle) -> None:
    file = GGUFFile(exact_bundle.model_file)
    settings = MemorySettings(budget=GIB, n_layers=2, kv_width=32)
    after = plan_memory(file.tensors.values(), settings)
    planned = [(f32, f16)[t.kind](t.name, *t.shape) for t in file.tensors.values()]
    assert plan_memory(planned, settings) == after
    attention = 256 + (2 * 64 * 64 + 2 * 32 * 64) * 2
    layer = attention + (128 * 64 + 1012 * 128) * 2 + 256
    placed = 2 * layer + 256 + 320 * 64 * 2 + 2 * (2 * 512 * 32 * 2)
    assert after.left == GIB - placed
    assert after.bytes_per_neuron == (388, 388)


def test_tensors_without_a_place_are_refused() -> None:
    settings = MemorySettings(budget=0, n_layers=32, kv_width=4096)
    for name in ("blk.0.ffn_down.weight", "rope_freqs.weight", "blk.1.output.weight", "odd"):
        with refused(ExportError, name):
            plan_memory([*SEVEN_B, f32(name, 1)], settings)
    with refused(ExportError, "layer 31"):
        plan_memory([t for t in SEVEN_B if t.name != "blk.31.ffn_up.weight"], settings)


def test_settings_out_of_range_are_refused() -> None:
    with refused(ExportError, "-1"):
        MemorySettings(budget=-1, n_layers=1, kv_width=1)
    with refused(ExportError, "context 0"):
        MemorySettings(budget=0, n_layers=1, kv_width=1, n_ctx=0)


def statistics(n_layers: int, d_ff: int) -> list[torch.Tensor]:
    """Counts with few hot neurons, in other places and of other weight in each layer."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, d_ff + 1, dtype=torch.float64)
    return [
        (1e6 * ranks ** -(0.6 + 0.05 * layer))[torch.randperm(d_ff, generator=generator)].long()
        for layer in range(n_layers)
    ]


def total(layers: Sequence[torch.Tensor]) -> int:
    return sum(int(layer.sum()) for layer in layers)


def test_single_neurons_are_the_exact_top_of_all_layers() -> None:
    counts = [torch.randint(0, 400, (1012,)) for _ in range(12)]
    for number in (0, 1, 31, 5000, 12 * 1012 - 1, 12 * 1012):
        chosen = choose_neurons(counts, [388] * 12, number * 388 + 387, groups=Groups(1))
        assert total(chosen) == number
        ranking = sorted(
            (
                (-int(c), layer, n)
                for layer, column in enumerate(counts)
                for n, c in enumerate(column)
            )
        )
        expected = {(layer, n) for _, layer, n in ranking[:number]}
        found = {(layer, int(n)) for layer, mask in enumerate(chosen) for n in mask.nonzero()}
        assert found == expected


@pytest.mark.parametrize("block", [1, 2, 3])
def test_no_other_choice_of_blocks_has_more_activations(block: int) -> None:
    generator = torch.Generator().manual_seed(block)
    counts = [torch.randint(0, 9, (6,), generator=generator) for _ in range(3)]
    tops = [torch.sort(layer, descending=True).values.tolist() for layer in counts]
    for budget in range(19):
        best = max(
            sum(sum(top[:number]) for top, number in zip(tops, numbers, strict=True))
            for numbers in itertools.product(range(0, 7, block), repeat=3)
            if sum(numbers) <= budget
        )
        chosen = choose_neurons(counts, [10] * 3, 10 * budget, groups=Groups(block))
        assert split_bytes(chosen, [10] * 3) <= 10 * budget
        assert sum(int(c[mask].sum()) for c, mask in zip(counts, chosen, strict=True)) == best


@pytest.mark.parametrize("d_ff", [1012, 11008])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999, 1.0, 1.5])
def test_layers_get_whole_blocks_or_all(d_ff: int, share: float) -> None:
    counts = statistics(13, d_ff)
    budget = int(share * 13 * d_ff * 388)
    chosen = choose_neurons(counts, [388] * 13, budget)
    numbers = [int(mask.sum()) for mask in chosen]
    assert all(number % 32 == 0 or number == d_ff for number in numbers)
    spent = split_bytes(chosen, [388] * 13)
    assert spent == sum(numbers) * 388 <= budget
    assert spent > budget - 32 * 388 or sum(numbers) == 13 * d_ff
    for layer, mask in zip(counts, chosen, strict=True):
        if mask.any() and not mask.all():
            assert layer[mask].min() >= layer[~mask].max()


def test_one_neuron_less_than_everything_costs_one_block() -> None:
    counts = statistics(11, 1012)
    everything = 11 * 1012 * 388
    assert all(mask.all() for mask in choose_neurons(counts, [388] * 11, everything))
    chosen = choose_neurons(counts, [388] * 11, everything - 388)
    # 1012 = 31 · 32 + 20: the smallest block to leave out is a layer's last.
    assert 11 * 1012 - total(chosen) in (20, 32)
    single = choose_neurons(counts, [388] * 11, everything - 388, groups=Groups(1))
    assert total(single) == 11 * 1012 - 1


def test_ties_go_to_the_lower_layer_and_index() -> None:
    counts = [torch.full((1012,), 5) for _ in range(12)]
    chosen = choose_neurons(counts, [388] * 12, (1012 + 64) * 388)
    assert chosen[0].all()
    assert chosen[1].nonzero().flatten().tolist() == list(range(64))
    assert total(chosen[2:]) == 0
    within = choose_neurons([torch.tensor([3, 7, 7, 3])] * 2, [1] * 2, 5, groups=Groups(1))
    assert [mask.tolist() for mask in within] == [
        [True, True, True, False],
        [False] + [True] * 2 + [False],
    ]


def test_cheap_layers_go_first_and_a_full_purse_is_spent() -> None:
    """Per byte, layer 1 (8 bytes) is worth more; the last byte-hungry neuron is passed over."""
    counts = [torch.tensor([12, 11, 2, 1]), torch.tensor([9, 8, 7, 6])]
    chosen = choose_neurons(counts, [100, 8], 100, groups=Groups(1))
    assert [mask.tolist() for mask in chosen] == [[False] * 4, [True] * 4]
    chosen = choose_neurons(counts, [100, 8], 32 + 100, groups=Groups(1))
    assert [mask.tolist() for mask in chosen] == [[True, False, False, False], [True] * 4]
    chosen = choose_neurons(
        [torch.tensor([90, 80]), torch.tensor([3, 2])], [20, 1], 22, groups=Groups(1)
    )
    assert [mask.tolist() for mask in chosen] == [[True, False], [True, True]]


def test_seventy_billion_parameters_take_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 × 28672 neurons: sorted once, cut once, whatever the budget."""
    counts = [torch.randint(0, 10**6, (28672,)) for _ in range(80)]
    plan = plan_70b(80 * GIB)
    rounds: list[int] = []
    search = torch.searchsorted

    def count(values: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        rounds.append(len(values))
        return search(values, *rest, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "searchsorted", count)
    chosen = choose_neurons(counts, plan.bytes_per_neuron, plan.ffn_budget)
    assert rounds == [80 * 896]
    assert total(chosen) == plan.ffn_budget // (32 * 49156) * 32
    chosen = choose_neurons(counts, plan.bytes_per_neuron, plan.ffn_budget, groups=Groups(1))
    assert rounds == [80 * 896, 80 * 28672]
    assert total(chosen) == plan.ffn_budget // 49156


def test_upstream_mixes_layers_from_the_eleventh_on() -> None:
    assert upstream_order(10) == list(range(10))
    assert upstream_order(12) == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_captured_share_is_at_least_that_of_other_splits(share: float) -> None:
    counts = statistics(12, 11008)
    budget = int(share * 12 * 11008 * 24580)
    mine = captured_share(counts, choose_neurons(counts, [24580] * 12, budget))
    mended = captured_share(counts, upstream_choice(counts, budget, range(12)))
    mixed = captured_share(counts, upstream_choice(counts, budget, upstream_order(12)))
    each = budget // 24580 // 12
    proportional = captured_share(counts, [layer >= layer.sort().values[-each] for layer in counts])
    assert mine >= mended > mixed + 0.02
    assert mine > proportional
    exact = captured_share(counts, choose_neurons(counts, [24580] * 12, budget, groups=Groups(1)))
    assert exact - 1e-3 < mine <= exact


def test_upstream_leaves_vram_unused_in_a_70b() -> None:
    """It takes a neuron for 2.25 · d_ff bytes: 64,512 where one has 49,156."""
    counts = statistics(12, 28672)
    budget = 12 * 10_000 * 49156
    mine = choose_neurons(counts, [49156] * 12, budget, groups=GROUPS["q4_0"])
    theirs = upstream_choice(counts, budget, range(12))
    assert total(theirs) == budget // 64512 // 256 * 256
    assert total(mine) == 10_000 * 12 // 256 * 256
    assert captured_share(counts, mine) > captured_share(counts, theirs)


def test_share_of_nothing_is_none() -> None:
    silent = [torch.zeros(32, dtype=torch.int64)]
    assert captured_share(silent, [torch.ones(32, dtype=torch.bool)]) == 0.0
    counts = [torch.tensor([3, 1]), torch.tensor([0, 4])]
    assert (
        captured_share(counts, [torch.tensor([True, False]), torch.tensor([True, True])]) == 0.875
    )
