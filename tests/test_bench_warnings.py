"""Every warning of a benchmark: when it comes, when it does not, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import made_up_results
import pytest

from common.typed_json import parse
from common.units import GIB
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_files.reader import GGUFFile
from powerinfer_bridge.benchmark.beside import DenseFile
from powerinfer_bridge.benchmark.placement import NeuronFacts
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.setup import Machine, Programs, Setup
from powerinfer_bridge.benchmark.warnings import find_warnings
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.programs.sample import ProgramFacts
from results.bench import (
    DENSE_LLAMA_CPP,
    DENSE_POWERINFER,
    EMBEDDED,
    Arm,
    ArmName,
    Bench,
    Continuations,
    Warned,
)
from results.parts import GpuFacts, MachineFacts, Ratio

MADE = parse(Bench, made_up_results.bench())
CARD = GpuFacts(name="card", memory_bytes=24 * GIB)
IDLE = MachineFacts(cpu="cpu", cpus=8, memory_bytes=64 * GIB, gpus=())
HYBRID = replace(IDLE, gpus=(CARD,))
MODEL = replace(MADE.inputs[0], role="model", bytes=50 * GIB)


def arm(name: ArmName, title: str, **changes: Any) -> Arm:
    engine = "llama.cpp" if name == DENSE_LLAMA_CPP else "PowerInfer"
    facts = {"element_type": "F16", "threads": 8, "n_gpu_layers": None, "notes": ()}
    own = {"name": name, "title": title, "engine": engine, **facts, **changes}
    return replace(MADE.arms[0], **own)


def predicted(**changes: Any) -> Arm:
    return arm("predicted", "predicted neurons", **changes)


def everything(**changes: Any) -> Arm:
    return arm("all_neurons", "all neurons", **changes)


def llama_cpp(**changes: Any) -> Arm:
    return arm("dense_llama_cpp", "dense llama.cpp", **({"n_gpu_layers": 0} | changes))


def document(*arms: Arm, **changes: Any) -> Bench:
    """Return a benchmark with which nothing is wrong."""
    chosen = arms or (everything(), predicted())
    good: dict[str, Any] = {
        "engine": chosen[0].engine,
        "hardware": IDLE,
        "inputs": (MODEL,),
        "arms": chosen,
        "speedups": spread(1.9, 2.1),
        "ppl_gap": 0.001,
        "ppl_dense": 10.0,
        "ppl_transformers": None,
        "greedy_text_same": True,
        "continuations": Continuations(sparse=" text", dense=" text"),
    }
    return replace(MADE, **(good | changes))


def spread(low: float, high: float) -> tuple[Ratio, ...]:
    return (Ratio(arm="predicted", over="all_neurons", ratio=2.0, quartiles=(low, high)),)


@dataclass(frozen=True, kw_only=True)
class Around:
    """What a benchmark was made with, as far as warnings look at it."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    load: float = 0.0
    threshold: str | None = None
    file_threshold: float = -1.0
    cuda: bool | None = None
    llama_cpp_cuda: bool | None = None
    index_problem: str | None = None
    architectures: Mapping[str, str] = field(default_factory=dict)
    same_model: bool = True
    activation_threshold: float = 0.0
    estimate_problem: str | None = None

    def setup(self) -> Setup:
        """Return it with neither files nor programs behind it."""
        hyper = SimpleNamespace(
            activation_threshold=self.activation_threshold,
            threshold=self.file_threshold,
            skips_neurons=self.file_threshold > DENSE_THRESHOLD,
        )
        dense = {
            name: DenseFile(
                path=Path("d"),
                element_type="F16",
                architecture=architecture,
                same_model=self.same_model,
            )
            for name, architecture in self.architectures.items()
        }
        return Setup(
            config=BenchConfig(file=Path("m"), powerinfer_bin=Path("bin"), **self.settings),
            machine=Machine(facts=IDLE, load=self.load, threshold=self.threshold),
            file=cast(GGUFFile, None),
            engine=cast(Engine, SimpleNamespace(hyper=hyper)),
            programs=Programs(
                powerinfer_facts=program("powerinfer", self.cuda),
                llama_cpp_facts=program("llama.cpp", self.llama_cpp_cuda),
                powerinfer_dense=dense.get(DENSE_POWERINFER),
                llama_cpp_dense=dense.get(DENSE_LLAMA_CPP),
                unused_dense=dense.get("unused"),
            ),
            neurons=NeuronFacts(problem=self.index_problem),
            text="",
            prompts=(),
            room=0,
            inputs=(),
        )


def program(kind: Any, cuda: bool | None) -> ProgramFacts:
    return ProgramFacts(path=Path("main"), kind=kind, version=None, cuda=cuda)


def warnings_of(found: Bench, around: Around) -> list[Warned]:
    return list(find_warnings(found, around.setup(), around.estimate_problem))


BUDGET = {"vram_budget": "8GiB"}
BLANK = Continuations(sparse=" \n", dense=" \n")
GOOD = (document(), Around())
CASES: dict[str, tuple[Bench, Around, str]] = {
    "embedded-engine": (
        document(everything(engine=EMBEDDED), predicted(engine=EMBEDDED)),
        Around(),
        "not PowerInfer's (pass --powerinfer-bin)",
    ),
    "no-cuda": (
        document(),
        Around(settings=BUDGET, cuda=False),
        "built without CUDA and ignores --vram-budget",
    ),
    "gpu-index-unusable": (
        document(),
        Around(settings=BUDGET, index_problem="m.gpuidx: is damaged; make it again"),
        "m.gpuidx: is damaged",
    ),
    "gpu-index-rebuilt": (
        document(everything(), predicted(notes=("GPU index rebuilt",))),
        Around(),
        "predicted neurons: GPU index rebuilt",
    ),
    "gpu-index-refused": (
        document(everything(notes=("GPU index refused",)), predicted()),
        Around(),
        "'psp gpu-split'",
    ),
    "engine-note": (
        document(everything(), predicted(notes=("3 tokens decoded, 127 expected",))),
        Around(),
        "predicted neurons: 3 tokens decoded, 127 expected",
    ),
    "cpu-dense-against-hybrid": (
        document(everything(), predicted(), llama_cpp()),
        Around(settings=BUDGET),
        "dense llama.cpp ran on the CPU alone, PowerInfer with a GPU",
    ),
    "fits-in-vram": (
        document(hardware=HYBRID, inputs=(replace(MODEL, bytes=13 * GIB),)),
        Around(),
        "(13.0 GiB) fits into the GPU (24.0 GiB)",
    ),
    "different-types": (
        document(everything(), predicted(), llama_cpp(element_type="Q4_0")),
        Around(),
        "all neurons: F16, predicted neurons: F16, dense llama.cpp: Q4_0",
    ),
    "different-threads": (
        document(everything(), predicted(), llama_cpp(threads=4)),
        Around(),
        "dense llama.cpp: 4",
    ),
    "dense-silu": (
        document(everything(), predicted(), llama_cpp()),
        Around(architectures={"dense_llama_cpp": "llama"}),
        "computes SiLU, not this model's ReLU",
    ),
    "unknown-model": (
        document(everything(), predicted(), llama_cpp()),
        Around(architectures={"dense_llama_cpp": "opt"}, same_model=False),
        "d: it or the sparse file does not say which model it was made from",
    ),
    "experts-cost": (
        document(everything(), predicted(), llama_cpp()),
        Around(architectures={"dense_llama_cpp": "smallthinker"}),
        "is not measured here (pass a file of --dense-arch llama as --dense-gguf too)",
    ),
    "dense-arch": (
        document(),
        Around(architectures={"unused": "smallthinker"}),
        "for which PowerInfer's dense mode has no graph",
    ),
    "fatrelu": (document(), Around(activation_threshold=0.01), "FATReLU at 0.01, PowerInfer"),
    "threshold-variable": (
        document(),
        Around(threshold="0,5"),
        "is '0,5', which is no number and read as 0: it was left out here, where the file's -1",
    ),
    "no-predictors": (document(), Around(file_threshold=-1e30), "skips no neuron"),
    "ppl-gap": (document(ppl_gap=0.011), Around(), "by +1.10%: the speedup is not at equal"),
    "threads": (
        document(ppl_sparse=10.0, ppl_threads=10.2),
        Around(settings={"threads": 8}),
        "with the 8 threads that were timed perplexity is 10.2000, +2.00%",
    ),
    "ppl-transformers": (document(ppl_transformers=10.2), Around(), "in transformers 10.2000"),
    "texts-differ": (document(greedy_text_same=False), Around(), "texts"),
    "blank-text": (document(continuations=BLANK), Around(), "--prompt"),
    "no-estimate": (document(), Around(estimate_problem="a: b; do c"), "no estimate: a: b; do c"),
    "spread": (document(speedups=spread(0.9, 1.2)), Around(), "are 0.900 and 1.200"),
    "few-rounds": (document(), Around(settings={"repeats": 4}), "rounds: 4;"),
    "more-threads-than-cores": (
        document(hardware=replace(IDLE, cpus=4)),
        Around(),
        "8 threads on 4 cores",
    ),
    "busy-machine": (document(), Around(load=1.25), "load 1.25"),
}


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    assert warnings_of(*GOOD) == []


@pytest.mark.parametrize("code", CASES)
def test_each_warning_comes_alone_and_says_why(code: str) -> None:
    found, around, part = CASES[code]
    warnings = warnings_of(found, around)
    assert [warning.code for warning in warnings] == [code]
    assert part in warnings[0].text
    assert len(warnings[0].text.splitlines()) == 1


OFFLOADED = document(everything(), predicted(), llama_cpp(n_gpu_layers=99))
QUIET: dict[str, tuple[Bench, Around]] = {
    "a dense baseline on the GPU": (replace(OFFLOADED, hardware=HYBRID), Around(settings=BUDGET)),
    "a small model beside a fully offloaded one": (
        replace(OFFLOADED, hardware=HYBRID, inputs=(replace(MODEL, bytes=GIB),)),
        Around(settings=BUDGET),
    ),
    "a model larger than the card": (document(hardware=HYBRID), Around()),
    "a baseline of another arch": (
        document(everything(), predicted(), llama_cpp()),
        Around(architectures={"dense_llama_cpp": "opt"}),
    ),
    "an applied index": (document(everything(notes=("GPU index applied",)), predicted()), Around()),
    "a damaged index that no GPU would use": (
        document(),
        Around(index_problem="damaged", cuda=False),
    ),
    "an effect that is negative": (document(speedups=spread(0.7, 0.9)), Around()),
    "an idle machine's load": (document(), Around(load=0.4)),
    "a gap of half a per cent": (document(ppl_gap=-0.005), Around()),
    "an effect on the right side": (document(speedups=spread(1.01, 1.2)), Around()),
    "transformers agreeing": (document(ppl_transformers=10.01), Around()),
}


@pytest.mark.parametrize("name", QUIET)
def test_a_warning_stays_away_where_it_does_not_apply(name: str) -> None:
    assert warnings_of(*QUIET[name]) == []


def test_a_baseline_is_on_the_cpu_if_its_build_knows_no_gpu() -> None:
    found = warnings_of(OFFLOADED, Around(settings=BUDGET, llama_cpp_cuda=False))
    assert [warning.code for warning in found] == ["cpu-dense-against-hybrid"]


def test_layers_for_a_powerinfer_without_cuda_stay_on_the_cpu() -> None:
    dense = arm("dense_powerinfer", "dense PowerInfer", n_gpu_layers=99)
    found = document(everything(), predicted(), dense)
    assert warnings_of(found, Around(cuda=True)) == []
    small = replace(found, hardware=HYBRID, inputs=(replace(MODEL, bytes=GIB),))
    warnings = warnings_of(small, Around(cuda=False))
    assert [warning.code for warning in warnings] == ["no-cuda", "fits-in-vram"]
    assert "dense PowerInfer: built without CUDA, -ngl ignored" in warnings[0].text


def test_transformers_differ_from_a_fatrelu_file_on_purpose() -> None:
    found = warnings_of(document(ppl_transformers=20.0), Around(activation_threshold=0.1))
    assert [warning.code for warning in found] == ["fatrelu"]


@pytest.mark.parametrize(("error", "scatter"), [(None, False), (0.05, False), (0.06, True)])
def test_a_gap_within_two_standard_errors_is_called_scatter(
    error: float | None, scatter: bool
) -> None:
    result = document(ppl_gap=0.11, ppl_gap_error=error)
    (told,) = [warning.text for warning in warnings_of(result, Around())]
    assert ("no more than windows differ by; raise --chunks" in told) == scatter
    assert ("not at equal quality" in told) != scatter


def test_noise_of_the_embedded_engine_is_not_worth_a_warning() -> None:
    arms = (everything(engine=EMBEDDED), predicted(engine=EMBEDDED))
    found = document(*arms, speedups=spread(0.9, 1.2))
    warnings = warnings_of(found, Around(load=9.0, settings={"repeats": 1}))
    codes = [warning.code for warning in warnings]
    assert codes == ["embedded-engine"]
