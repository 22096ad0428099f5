"""Every warning of a benchmark: when it comes, when it does not, and what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from powerinfer_bridge.benchmark.machine import Gpu, Machine, parse_gpus
from powerinfer_bridge.benchmark.warnings import Circumstances, find_warnings

GIB = 1 << 30
CARD = Gpu(name="card", memory_bytes=24 * GIB, free_bytes=23 * GIB)
IDLE = Machine(cpu="cpu", cpus=8, memory_bytes=64 * GIB)
HYBRID = replace(IDLE, gpus=(CARD,))


def arm(name: str, title: str, **changes: Any) -> dict[str, Any]:
    engine = {"dense_llama_cpp": "llama.cpp"}.get(name, "PowerInfer")
    facts = {"element_type": "F16", "threads": 8, "n_gpu_layers": None, "notes": []}
    return {"name": name, "title": title, "engine": engine, **facts, **changes}


def predicted(**changes: Any) -> dict[str, Any]:
    return arm("predicted", "predicted neurons", **changes)


def everything(**changes: Any) -> dict[str, Any]:
    return arm("all_neurons", "all neurons", **changes)


def llama_cpp(**changes: Any) -> dict[str, Any]:
    return arm("dense_llama_cpp", "dense llama.cpp", **({"n_gpu_layers": 0} | changes))


def document(*arms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return as much of a benchmark as the warnings look at; nothing is wrong with it."""
    chosen = arms or (everything(), predicted())
    return {
        "engine": chosen[0]["engine"],
        "settings": {"vram_budget": None, "repeats": 5},
        "arms": list(chosen),
        "speedups": [{"arm": "predicted", "over": "all_neurons", "quartiles": [1.9, 2.1]}],
        "ppl_gap": 0.001,
        "ppl_dense": 10.0,
        "ppl_transformers": None,
        "greedy_text_same": True,
        "continuations": {"sparse": " text", "dense": " text"},
        **changes,
    }


def around(machine: Machine = IDLE, **changes: Any) -> Circumstances:
    return Circumstances(machine=machine, n_layers=32, model_bytes=50 * GIB, **changes)


def budget(size: str | None = "8GiB", repeats: int = 5) -> dict[str, Any]:
    return {"vram_budget": size, "repeats": repeats}


def spread(low: float, high: float) -> list[dict[str, Any]]:
    return [{"arm": "predicted", "over": "all_neurons", "quartiles": [low, high]}]


EMBEDDED = "embedded engine"
GOOD = (document(), around())
CASES: dict[str, tuple[dict[str, Any], Circumstances, str]] = {
    "embedded-engine": (
        document(everything(engine=EMBEDDED), predicted(engine=EMBEDDED)),
        around(),
        "not PowerInfer's (pass --powerinfer-bin)",
    ),
    "no-cuda": (
        document(settings=budget()),
        around(cuda=False),
        "built without CUDA and ignores --vram-budget",
    ),
    "gpu-index-unusable": (
        document(settings=budget()),
        around(vram_budget=8 * GIB, index_problem="m.gpuidx: is damaged; make it again"),
        "m.gpuidx: is damaged",
    ),
    "gpu-index-rebuilt": (
        document(everything(), predicted(notes=["GPU index rebuilt"])),
        around(),
        "predicted neurons: GPU index rebuilt",
    ),
    "gpu-index-refused": (
        document(everything(notes=["GPU index refused"]), predicted()),
        around(),
        "'psp gpu-split'",
    ),
    "engine-note": (
        document(everything(), predicted(notes=["3 tokens decoded, 127 expected"])),
        around(),
        "predicted neurons: 3 tokens decoded, 127 expected",
    ),
    "cpu-dense-against-hybrid": (
        document(everything(), predicted(), llama_cpp()),
        around(vram_budget=8 * GIB),
        "dense llama.cpp ran on the CPU alone, PowerInfer with a GPU",
    ),
    "fits-in-vram": (
        document(),
        replace(around(HYBRID), model_bytes=13 * GIB),
        "(13.0 GiB) fits into the GPU (24.0 GiB)",
    ),
    "different-types": (
        document(everything(), predicted(), llama_cpp(element_type="Q4_0")),
        around(),
        "all neurons: F16, predicted neurons: F16, dense llama.cpp: Q4_0",
    ),
    "different-threads": (
        document(everything(), predicted(), llama_cpp(threads=4)),
        around(),
        "dense llama.cpp: 4",
    ),
    "dense-silu": (
        document(everything(), predicted(), llama_cpp()),
        around(dense_architectures={"dense_llama_cpp": "llama"}),
        "computes SiLU, not this model's ReLU",
    ),
    "fatrelu": (document(), around(activation_threshold=0.01), "FATReLU at 0.01, PowerInfer"),
    "ppl-gap": (document(ppl_gap=0.011), around(), "by +1.10%"),
    "ppl-transformers": (document(ppl_transformers=10.2), around(), "in transformers 10.2000"),
    "texts-differ": (document(greedy_text_same=False), around(), "texts"),
    "blank-text": (document(continuations={"sparse": " \n", "dense": " \n"}), around(), "--prompt"),
    "no-estimate": (document(), around(estimate_problem="a: b; do c"), "no estimate: a: b; do c"),
    "spread": (document(speedups=spread(0.9, 1.2)), around(), "are 0.900 and 1.200"),
    "few-rounds": (document(settings=budget(None, 4)), around(), "rounds: 4;"),
    "more-threads-than-cores": (
        document(),
        around(replace(IDLE, cpus=4)),
        "8 threads on 4 cores",
    ),
    "busy-machine": (document(), around(replace(IDLE, load=1.25)), "load 1.25"),
}


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    assert find_warnings(*GOOD) == []


@pytest.mark.parametrize("code", CASES)
def test_each_warning_comes_alone_and_says_why(code: str) -> None:
    found, circumstances, part = CASES[code]
    warnings = find_warnings(found, circumstances)
    assert [warning["code"] for warning in warnings] == [code]
    assert part in warnings[0]["text"]
    assert len(warnings[0]["text"].splitlines()) == 1


OFFLOADED = document(everything(), predicted(), llama_cpp(n_gpu_layers=99))
QUIET: dict[str, tuple[dict[str, Any], Circumstances]] = {
    "a dense baseline on the GPU": (OFFLOADED, around(HYBRID, vram_budget=8 * GIB)),
    "a small model beside a fully offloaded one": (
        OFFLOADED,
        replace(around(HYBRID, vram_budget=8 * GIB), model_bytes=GIB),
    ),
    "a model larger than the card": (document(), around(HYBRID)),
    "a baseline of another arch": (
        document(everything(), predicted(), llama_cpp()),
        around(dense_architectures={"dense_llama_cpp": "opt"}),
    ),
    "an applied index": (document(everything(notes=["GPU index applied"]), predicted()), around()),
    "a damaged index that no GPU would use": (document(), around(index_problem="damaged")),
    "an effect that is negative": (document(speedups=spread(0.7, 0.9)), around()),
    "an idle machine's load": (document(), around(replace(IDLE, load=0.4))),
    "a gap of half a per cent": (document(ppl_gap=-0.005), around()),
    "an effect on the right side": (document(speedups=spread(1.01, 1.2)), around()),
    "transformers agreeing": (document(ppl_transformers=10.01), around()),
}


@pytest.mark.parametrize("name", QUIET)
def test_a_warning_stays_away_where_it_does_not_apply(name: str) -> None:
    assert find_warnings(*QUIET[name]) == []


def test_a_baseline_is_on_the_cpu_if_its_build_knows_no_gpu() -> None:
    found = find_warnings(OFFLOADED, around(vram_budget=8 * GIB, llama_cpp_cuda=False))
    assert [warning["code"] for warning in found] == ["cpu-dense-against-hybrid"]


def test_layers_for_a_powerinfer_without_cuda_stay_on_the_cpu() -> None:
    dense = arm("dense_powerinfer", "dense PowerInfer", n_gpu_layers=99)
    found = document(everything(), predicted(), dense)
    assert find_warnings(found, around(cuda=True)) == []
    warnings = find_warnings(found, replace(around(HYBRID, cuda=False), model_bytes=GIB))
    assert [warning["code"] for warning in warnings] == ["no-cuda", "fits-in-vram"]
    assert "dense PowerInfer: built without CUDA, -ngl ignored" in warnings[0]["text"]


def test_transformers_differ_from_a_fatrelu_file_on_purpose() -> None:
    found = find_warnings(document(ppl_transformers=20.0), around(activation_threshold=0.1))
    assert [warning["code"] for warning in found] == ["fatrelu"]


def test_noise_of_the_embedded_engine_is_not_worth_a_warning() -> None:
    arms = (everything(engine=EMBEDDED), predicted(engine=EMBEDDED))
    found = document(*arms, speedups=spread(0.9, 1.2), settings=budget(None, 1))
    codes = [warning["code"] for warning in find_warnings(found, around(replace(IDLE, load=9.0)))]
    assert codes == ["embedded-engine"]


def test_gpus_are_read_from_nvidia_smi() -> None:
    output = "NVIDIA A100, 80GB, 81920, 81000\n\nno devices\nGPU X, 100, [N/A]\n"
    mib = 1 << 20
    expected = Gpu(name="NVIDIA A100, 80GB", memory_bytes=81920 * mib, free_bytes=81000 * mib)
    assert parse_gpus(output) == [expected]
