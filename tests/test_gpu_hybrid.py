"""The stage of the GPU kit that runs PowerInfer: budgets, what was placed, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cuda_lines as cuda
import pytest
import torch
from conftest import refused
from stand_ins import TIMINGS, build

from benchmarks.gpu import hybrid
from benchmarks.gpu.hybrid_fixtures import fixture, fixture_q4_0
from benchmarks.gpu.hybrid_programs import Programs, open_programs
from benchmarks.gpu.hybrid_splits import choose, counts_of, place, scatter
from benchmarks.gpu.hybrid_vram import (
    ALL,
    CONTEXT,
    SHARES,
    as_planned,
    budgets,
    dense_layers,
    elsewhere,
    expected,
    neuron_budgets,
    plan_of,
)
from benchmarks.gpu.kit import Absent, Figure, Kit
from common.errors import EngineError
from common.units import GIB, MIB
from cost_model.model_bytes import LayerBytes, ModelBytes
from gguf_export.gpu_split import split_bytes
from gguf_export.pwri.gpu_index import index_path, read_gpu_index
from gguf_files.reader import GGUFFile
from powerinfer_bridge.programs.output import parse_device, parse_notes
from powerinfer_bridge.programs.sample import Phase, RunSample

SAID = cuda.DEVICES + cuda.SPARSE + cuda.APPLIED + cuda.OFFLOADED + cuda.KV_CACHE
SIZES = {
    "vram_budget_bytes": 8 * GIB,
    "vram_used_bytes": 5120 * MIB + MIB // 2,
    "kv_vram_bytes": 256 * MIB,
    "ffn_offloaded_bytes": 2 * GIB + MIB // 4,
}


def powerinfer(directory: Path, said: str = SAID, *, cuda: bool = True) -> Path:
    """A build that answers every run alike."""
    options = f"print('--vram-budget{' --n-gpu-layers' if cuda else ''}')"
    body = (
        f"if '--help' in sys.argv:\n    {options}\nelse:\n    sys.stderr.write({said + TIMINGS!r})"
    )
    return build(directory, f"import sys\n{body}", options)


@pytest.fixture(scope="module")
def kit(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    place = tmp_path_factory.mktemp("kit")
    (place / "tokenizer.model").write_bytes(tokenizer_bytes)
    nothing = place / "none"
    return Kit(out=place, device="cpu", dry=True, model=place, data=nothing, eval_data=nothing)


@pytest.fixture(scope="module")
def deep(kit: Kit) -> Path:
    return fixture(kit, "deep").model_file


@pytest.fixture(scope="module")
def odd(kit: Kit) -> Path:
    return fixture(kit, "odd").model_file


def run(seconds: float) -> RunSample:
    decode = Phase(seconds=seconds, tokens=10)
    return RunSample(load_seconds=None, prompt=None, decode=decode, wall_seconds=seconds)


def test_what_powerinfer_prints_of_the_plan_is_where_it_was_planned() -> None:
    assert elsewhere(parse_device(SAID), SIZES) == 0
    # 0.004 MiB more is printed as the same hundredth of a MiB, 0.016 MiB more is not.
    hidden = SIZES | {"vram_used_bytes": SIZES["vram_used_bytes"] + 4096}
    assert elsewhere(parse_device(SAID), hidden) == 0
    moved = SIZES | {"vram_used_bytes": SIZES["vram_used_bytes"] + 16384}
    assert elsewhere(parse_device(SAID), moved) == 16384


def test_the_budget_counts_to_the_byte_and_a_cache_elsewhere_whole() -> None:
    assert elsewhere(parse_device(SAID), SIZES | {"vram_budget_bytes": 8 * GIB - 1}) == 1
    silent = parse_device(SAID.replace(cuda.KV_CACHE, ""))
    assert elsewhere(silent, SIZES) == 256 * MIB
    assert elsewhere(silent, SIZES | {"kv_vram_bytes": 0}) == 0


@pytest.mark.parametrize(
    ("lines", "index", "planned"),
    [
        (cuda.APPLIED, True, True),
        (cuda.APPLIED, False, False),
        ("", False, True),
        ("", True, False),
        (cuda.INVOKING + cuda.APPLIED, True, False),
        (cuda.REFUSED + cuda.NO_STATISTICS + cuda.EMPTY, True, False),
    ],
)
def test_the_index_is_taken_where_everything_else_fits(
    lines: str, index: bool, planned: bool
) -> None:
    assert as_planned(parse_notes(lines), index=index) is planned


def test_budgets_go_from_nothing_to_all_of_it(odd: Path) -> None:
    found = budgets(odd)
    assert list(found) == list(SHARES)
    assert list(found.values()) == sorted(found.values())
    # token_embd, 320 × 64 numbers of two bytes, stays; the cache has 3 layers, the index numbers.
    rest = sum(info.size for info in GGUFFile(odd).tensors.values()) - 2 * 320 * 64
    cache, numbers = 2 * 3 * CONTEXT * 64 * 2, 3 * 1056 * 4
    assert found[1.0] == rest + cache + numbers + MIB
    assert found[0.5] == (rest + cache + numbers) // 2
    for share, neurons in ((0.0, 0), (1.0, 3 * 1056)):
        place(odd, found[share])
        chosen, _ = read_gpu_index(index_path(odd), 3, 1056)
        assert sum(int(mask.sum()) for mask in chosen) == neurons


def test_the_plan_is_told_in_powerinfer_s_words(odd: Path) -> None:
    budget = budgets(odd)[1.0]
    place(odd, budget)
    found = expected(odd, budget)
    assert found.index
    ffn = 3 * 3 * 1056 * 64 * 2
    assert found.sizes["ffn_offloaded_bytes"] == ffn
    assert found.sizes["kv_vram_bytes"] == 2 * 3 * CONTEXT * 64 * 2
    embedding = 2 * 320 * 64
    total = sum(info.size for info in GGUFFile(odd).tensors.values())
    assert found.sizes["vram_used_bytes"] == total - ffn - embedding
    place(odd, 0)
    nothing = expected(odd, 0)
    assert not nothing.index
    assert set(nothing.sizes.values()) == {0}


def test_room_for_a_share_of_the_neurons_is_filled(deep: Path) -> None:
    budget = neuron_budgets(deep, (0.5,))[0.5]
    plan = plan_of(deep, budget)
    assert plan.complete
    assert plan.kv_halves == 2
    half = 12 * 1024 * plan.bytes_per_neuron[0] // 2
    assert half < plan.ffn_budget <= half + MIB + 1
    used = split_bytes(choose(deep, budget, counts_of(deep)), plan.bytes_per_neuron)
    assert plan.ffn_budget - 12 * 32 * plan.bytes_per_neuron[0] < used <= plan.ffn_budget


def test_scattered_neurons_are_as_many_and_know_nothing(deep: Path) -> None:
    budget = neuron_budgets(deep, (0.3,))[0.3]
    hot = place(deep, budget)
    before, needed = read_gpu_index(index_path(deep), 12, 1024)
    cold = scatter(deep, budget)
    after, still = read_gpu_index(index_path(deep), 12, 1024)
    share = sum(int(mask.sum()) for mask in after) / (12 * 1024)
    assert hot == 1.0  # no more than a fifth are ever active
    assert abs(needed - still) <= 12 * 32 * plan_of(deep, budget).bytes_per_neuron[0]
    assert cold == pytest.approx(share, abs=0.03)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("budget", "layers"),
    [(0, 0), (999, 0), (1000, 1), (2999, 2), (3000, 3), (3199, 3), (3200, ALL)],
)
def test_as_many_dense_layers_as_fit(budget: int, layers: int) -> None:
    layer = LayerBytes(
        attention=400, fc1=77, fc2=77, neuron_rows=20, neuron_column=10, d_ff=20, gated=True
    )
    model = ModelBytes(d_model=1, n_vocab=1, layers=(layer,) * 3, head=200, kv_token=0)
    assert dense_layers(model, budget) == layers


def test_ratios_are_over_the_faster_dense_engine() -> None:
    runs = {
        "hot neurons": [run(1), run(2), run(9)],
        "scattered neurons": [run(4)],
        "dense in PowerInfer, -ngl 2": [run(5)],
        "dense in llama.cpp, -ngl 2": [run(4)],
    }
    captured = {"hot neurons": 1.0, "scattered neurons": 0.2}
    hot, scattered = hybrid._ratios(runs, "50% in VRAM", captured, aimed=True)
    assert (hot.value, hot.least, hot.met) == (2.0, 2.0, True)
    assert hot.details["over"] == "dense in llama.cpp, -ngl 2"
    assert (scattered.value, scattered.least) == (1.0, None)
    assert not list(hybrid._ratios({"hot neurons": [run(1)]}, "", captured, aimed=True))


def test_text_is_the_same_as_far_as_it_begins_the_same() -> None:
    def share(text: str | None, words: str) -> float:
        return hybrid._text_figure("f16", replace(run(1), text=text), words, 0.5).value

    assert share("abcd", "abcd") == 1
    assert share("abxd", "abcd") == 0.5
    assert share("ab", "abcd") == 0.5
    assert share(None, "abcd") == 0
    assert share("", "") == 1


@pytest.fixture
def programs(kit: Kit, tmp_path: Path) -> Programs:
    return open_programs(replace(kit, powerinfer=powerinfer(tmp_path)))


def test_one_arm_s_failure_is_told_once_the_others_are_done(programs: Programs) -> None:
    ran: list[str] = []

    def arm(name: str, *, fails: bool = False) -> Callable[[], RunSample]:
        def once() -> RunSample:
            ran.append(name)
            if fails:
                raise EngineError(f"{name}: out of memory", "lower it")
            return run(1)

        return once

    arms = {"a": arm("a"), "b": arm("b", fails=True), "c": arm("c")}
    found = programs.rounds(arms, 3)
    assert {name: len(runs) for name, runs in found.items()} == {"a": 3, "c": 3}
    assert ran.count("b") == 1
    with refused(EngineError, "b: out of memory; lower it"):
        programs.tell_failures()


def test_a_step_whose_runs_all_fail_is_given_up(programs: Programs) -> None:
    def fail() -> RunSample:
        raise EngineError("main: no end after 30 s", "run it by hand")

    arms = dict.fromkeys("abcdef", fail)
    with refused(EngineError, "no end after 30 s"):
        programs.rounds(arms, 1)
    assert len(programs.failures) == 3


def test_without_programs_or_cuda_a_card_is_not_measured(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(Absent, match="pass --powerinfer-bin"):
        next(hybrid.placement(replace(kit, dry=False)))
    cpu = powerinfer(tmp_path, "", cuda=False)
    with pytest.raises(Absent, match="without CUDA"):
        open_programs(replace(kit, dry=False, powerinfer=cpu))
    assert open_programs(replace(kit, powerinfer=cpu)).skipped


def figures(steps: Iterator[Figure]) -> dict[str, Figure]:
    found = list(steps)
    by_name = {figure.name: figure for figure in found}
    assert len(by_name) == len(found)
    return by_name


def test_a_placement_that_is_not_the_plan_s_misses_its_aims(kit: Kit, tmp_path: Path) -> None:
    given = replace(kit, powerinfer=powerinfer(tmp_path))
    found = figures(hybrid.placement(given))
    for name in ("deep", "odd", "wide"):
        # The stand-in takes every index and 8 GiB, whatever it is told.
        assert found[f"GPU index taken as planned, {name}, no VRAM"].met is False
        assert found[f"GPU index taken as planned, {name}, all in VRAM"].met is True
        assert found[f"bytes elsewhere than planned, {name}, all in VRAM"].met is False
        assert found[f"speed, {name}, 50% in VRAM"].value == 50
    assert found["index for the bytes left and 0 more is taken"].met is True
    assert found["index for the bytes left and 1 more is refused"].met is False


def test_a_build_without_cuda_runs_each_fixture_once(kit: Kit, tmp_path: Path) -> None:
    given = replace(kit, powerinfer=powerinfer(tmp_path, "", cuda=False))
    found = figures(hybrid.placement(given))
    assert list(found) == [f"speed, {name}, CPU" for name in ("deep", "odd", "wide")]
    assert all("without CUDA" in str(each.details["vram_budgets"]) for each in found.values())
    speeds = figures(hybrid.q4_0(given))
    assert speeds["hot neurons over the faster dense engine, CPU"].value == 1


def test_fixtures_are_made_once_and_leftovers_go(kit: Kit, deep: Path) -> None:
    before = deep.stat().st_mtime_ns
    assert fixture(kit, "deep").model_file.stat().st_mtime_ns == before
    bundle = fixture_q4_0(kit)
    assert bundle.dense_file.exists()
    bundle.model_file.unlink()
    leftover = bundle.model_file.with_name("leftover")
    leftover.touch()
    assert fixture_q4_0(kit).model_file.exists()
    assert not leftover.exists()


def test_steps_fit_into_the_stage_and_have_their_own_names() -> None:
    names = [step.name for step in hybrid.STEPS]
    assert len(set(names)) == len(names)
    assert sum(step.seconds for step in hybrid.STEPS) <= 150
