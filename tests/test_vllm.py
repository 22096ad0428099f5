"""The plugin in real vLLM: every layout against its published formula, every switch, every refusal.

Logits would be too weak a word: what is compared are log-probabilities of all ids, prompt included,
since greedy text is often right with a wrong activation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BY_NAME, VARIANTS, Variant, Written, write
from safetensors.torch import save_file

from gguf_export.pwri.statistics import read_statistics

pytestmark = pytest.mark.vllm

RUNS = Path(__file__).with_name("vllm_runs.py")
PREFIX = "vllm_runs:"
CLASS = "vllm_plugin.model.PspForCausalLM"
GATED = [variant for variant in VARIANTS if variant.family not in ("opt", "falcon")]
MADE = 8
CLOSE = 1e-3
"""Of log-probabilities in float32, as the project promises; 1e-5 is seen."""

SIZES = {"hidden_size": 128, "intermediate_size": 232, "torch_dtype": "float32"}
"""vLLM's attention on a CPU takes heads of 32 and more."""

SHORT = [1, 5, 9, 33, 200, 17]
PROMPTS = [SHORT, [1, 7, 7, 8, 100, 101, 102, 55, 23, 2, 90], [1, 4]]
SPARSE = {"PSP_VLLM_SPARSE": "1"}

Answer = dict[str, Any]


@dataclass(frozen=True)
class Ran:
    """What vLLM answered to jobs, by their names, and what it logged."""

    answers: Mapping[str, Answer]
    log: str


def run_in_vllm(
    python: Path, directory: Path, jobs: Mapping[str, Answer], **environment: str
) -> Ran:
    """Run jobs in one process."""
    file = directory / "jobs.json"
    file.write_text(json.dumps(list(jobs.values())))
    home = {"VLLM_CACHE_ROOT": str(directory / "cache"), "PYTHONPATH": ""}
    ended = subprocess.run(
        [python, RUNS, file],
        capture_output=True,
        text=True,
        env=os.environ | home | environment,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [line for line in ended.stdout.splitlines() if line.startswith(PREFIX)]
    answers = [json.loads(line.removeprefix(PREFIX)) for line in lines]
    return Ran(dict(zip(jobs, answers, strict=True)), ended.stdout + ended.stderr)


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_bytes: bytes
) -> Callable[..., Written]:
    """Write a layout in sizes that vLLM takes, once for each change of it."""
    made: dict[str, Written] = {}

    def checkpoint(name: str, *, seed: int = 0, **changes: Any) -> Written:
        key = f"{name} {seed} {changes}"
        if key not in made:
            variant = BY_NAME[name].changed(**(SIZES | changes))
            path = tmp_path_factory.mktemp("models") / "model"
            made[key] = write(variant, path, tokenizer_bytes, seed=seed)
        return made[key]

    return checkpoint


def job(written: Written, **more: Any) -> Answer:
    return {"model": str(written.path), "prompts": PROMPTS, "max_tokens": MADE, **more}


def with_activation(written: Written, name: str, threshold: float) -> Written:
    """Return the same tensors as another activation reads them."""
    changes = {"hidden_act": name, "hidden_act_param": threshold or None}
    return Written(written.variant.changed(**changes), written.path, written.tensors)


def check(answer: Answer, written: Written, dtype_error: float = CLOSE) -> None:
    """Compare log-probabilities of all ids, and the choice of those that were made."""
    assert answer.get("class") == CLASS, answer
    for made, prompt in zip(answer["made"], PROMPTS, strict=True):
        ids = made["ids"]
        assert ids[: len(prompt)] == prompt
        assert len(ids) == len(prompt) + MADE
        told = torch.tensor(made["logprobs"], dtype=torch.float64)
        at = probabilities(written, ids)
        assert (told - at).abs().max() < dtype_error
        logits = written.reference(ids).logits.log_softmax(-1)
        best = logits[len(prompt) - 1 : -1].max(-1).values
        assert (best - at[len(prompt) - 1 :]).max() < dtype_error


def probabilities(written: Written, ids: list[int]) -> torch.Tensor:
    """Return the formula's log-probability of each id but the first."""
    logits = written.reference(ids).logits.log_softmax(-1)
    return logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


# --- one process, eager -------------------------------------------------------------------------

THRESHOLDS = (0.01, 0.1)
INFOS = {
    "fatrelu model as relu": ("prosparse", "relu", ("relu", 0.0)),
    "relu model as fatrelu": ("llama-tied", "fatrelu_0.3", ("fatrelu", 0.3)),
    "minicpm as relu": ("minicpm-s", "relu", ("relu", 0.0)),
}
LONG = [1, *range(3, 83)]
"""More than the sliding window of `relu-mistral`, 48."""


@pytest.fixture(scope="module")
def eager(
    vllm_python: Path, checkpoints: Callable[..., Written], tmp_path_factory: pytest.TempPathFactory
) -> Ran:
    """Run everything that needs no compiled code in one process."""
    jobs = {variant.name: job(checkpoints(variant.name)) for variant in GATED}
    for threshold in THRESHOLDS:
        written = checkpoints("prosparse", hidden_act_param=threshold)
        jobs[f"threshold {threshold}"] = job(written)
    for name, (variant, info, _) in INFOS.items():
        jobs[name] = job(checkpoints(variant), environment={"ACT_INFO": info})
    jobs["one by one"] = job(checkpoints("prosparse"), one_by_one=True)
    jobs["prefix"] = job(
        checkpoints("prosparse"),
        prompts=[LONG] * 2,
        one_by_one=True,
        prompt_logprobs=None,
        options={"block_size": 32},
    )
    jobs["window"] = job(checkpoints("relu-mistral"), prompts=[LONG])
    counts = tmp_path_factory.mktemp("counts")
    for name in ("relu-llama", "prosparse", "bamboo"):
        switches = SPARSE | {"PSP_VLLM_STATS": str(counts / name)}
        written = checkpoints(name)
        jobs[f"sparse {name}"] = job(written, environment=switches, one_by_one=True, limit=1.0)
    jobs["dense counted"] = job(
        checkpoints("prosparse"), environment={"PSP_VLLM_STATS": str(counts / "dense")}
    )
    for dtype in ("bfloat16", "float16"):
        options = {"dtype": dtype}
        jobs[dtype] = job(checkpoints("prosparse"), options=options)
        jobs[f"sparse {dtype}"] = job(
            checkpoints("prosparse"),
            options=options,
            environment=SPARSE,
            one_by_one=True,
            limit=1.0,
        )
    silu = {"hidden_act": "silu"}
    jobs["silu"] = job(checkpoints("llama-tied", **silu))
    jobs["silu minicpm"] = job(checkpoints("minicpm-s", **silu, hidden_act_param=None))
    jobs["silu as relu"] = job(checkpoints("llama-tied", **silu), environment={"ACT_INFO": "relu"})
    for name, (variant, changes, environment, _) in REFUSED.items():
        jobs[name] = job(checkpoints(variant, **changes), environment=environment)
    forced: Answer = {"environment": SPARSE, "one_by_one": True, "limit": 1.0}
    jobs["reloaded"] = job(
        checkpoints("prosparse"), reload=str(checkpoints("prosparse", seed=1).path), **forced
    )
    for how, more in (("dense", {}), ("sparse", forced)):
        jobs[f"biased {how}"] = job(biased(checkpoints("prosparse"), counts / how), **more)
    for name in NAMES:
        jobs[name] = job(renamed(checkpoints("llama-tied"), name, counts / f"names-{len(jobs)}"))
    jobs["lacking"] = job(lacking(checkpoints("llama-tied"), counts / "lacking"))
    return run_in_vllm(vllm_python, counts, jobs)


NAMES: dict[str, Callable[[str], str]] = {
    "compiled names": lambda name: f"_orig_mod.{name}",
    "bare names": lambda name: name.removeprefix("model."),
}


def copied(written: Written, path: Path, tensors: dict[str, torch.Tensor]) -> Written:
    """Return a copy with other tensors, in one file."""
    shutil.copytree(written.path, path, ignore=shutil.ignore_patterns("model*"))
    apart = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(apart, path / "model.safetensors", metadata={"format": "pt"})
    return Written(written.variant, path, written.tensors)


def renamed(written: Written, names: str, path: Path) -> Written:
    """Return a copy whose tensors are called otherwise."""
    return copied(written, path, {NAMES[names](n): t for n, t in written.tensors.items()})


def biased(written: Written, path: Path) -> Written:
    """Return a copy whose FFNs have biases, which the formula does not know."""
    tensors, noise = dict(written.tensors), torch.Generator().manual_seed(0)
    for name, tensor in written.tensors.items():
        if ".mlp." in name:
            bias = 0.3 * torch.randn(len(tensor), generator=noise)
            tensors[name.replace(".weight", ".bias")] = bias
    made = copied(written, path, tensors)
    config = written.variant.config | {"mlp_bias": True}
    (path / "config.json").write_text(json.dumps(config))
    return made


LACKED = "model.layers.1.mlp.up_proj.weight"


def lacking(written: Written, path: Path) -> Written:
    """Return a copy without one half of a fused pair, which vLLM by itself would serve."""
    return copied(written, path, {n: t for n, t in written.tensors.items() if n != LACKED})


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, str], tuple[str, ...]]] = {
    "no threshold": ("prosparse", {"hidden_act_param": None}, {}, ("hidden_act_param is None",)),
    "quantised": (
        "llama-tied",
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {},
        ("quantization_config is 'awq'",),
    ),
    "ACT_INFO": ("llama-tied", {}, {"ACT_INFO": "gelu"}, ("ACT_INFO is 'gelu'", "fatrelu_0.01")),
    "PSP_VLLM_SPARSE": ("llama-tied", {}, {"PSP_VLLM_SPARSE": "on"}, ("'on', expected 0 or 1",)),
}


@pytest.mark.parametrize("variant", GATED, ids=lambda variant: variant.name)
def test_every_layout_gives_its_formulas_probabilities(
    eager: Ran, checkpoints: Callable[..., Written], variant: Variant
) -> None:
    check(eager.answers[variant.name], checkpoints(variant.name))


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_fatrelu_takes_the_configs_threshold(
    eager: Ran, checkpoints: Callable[..., Written], threshold: float
) -> None:
    written = checkpoints("prosparse", hidden_act_param=threshold)
    check(eager.answers[f"threshold {threshold}"], written)


@pytest.mark.parametrize("name", INFOS)
def test_act_info_wins(eager: Ran, checkpoints: Callable[..., Written], name: str) -> None:
    variant, _, activation = INFOS[name]
    check(eager.answers[name], with_activation(checkpoints(variant), *activation))
    assert "ACT_INFO wins: " in eager.log


def test_one_by_one_is_the_batch(eager: Ran, checkpoints: Callable[..., Written]) -> None:
    check(eager.answers["one by one"], checkpoints("prosparse"))


def test_a_cached_prefix_changes_nothing(eager: Ran) -> None:
    first, second = eager.answers["prefix"]["made"]
    assert (first["cached"] or 0, second["cached"]) == (0, 64)
    assert first["ids"] == second["ids"]
    assert first["logprobs"] == pytest.approx(second["logprobs"], abs=1e-5)


def test_a_sliding_window_is_kept(eager: Ran, checkpoints: Callable[..., Written]) -> None:
    (made,) = eager.answers["window"]["made"]
    written = checkpoints("relu-mistral")
    wide = Written(written.variant.changed(sliding_window=None), written.path, written.tensors)
    told = torch.tensor(made["logprobs"], dtype=torch.float64)
    assert (told - probabilities(written, made["ids"])).abs().max() < CLOSE
    assert (told - probabilities(wide, made["ids"])).abs().max() > 10 * CLOSE


@pytest.mark.parametrize("name", ["relu-llama", "prosparse", "bamboo"])
def test_the_operators_change_nothing(
    eager: Ran, checkpoints: Callable[..., Written], name: str
) -> None:
    answer = eager.answers[f"sparse {name}"]
    check(answer, checkpoints(name))
    layers = checkpoints(name).variant.config["num_hidden_layers"]
    # Each made id but the last runs alone, and so do prompts of 8 ids and less.
    assert answer["taken"]["sparse"] == layers * (3 * (MADE - 1) + 2)
    assert answer["taken"]["dense"] > 0


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.3), ("float16", 0.04)])
def test_half_types_are_right_within_their_rounding(
    eager: Ran, checkpoints: Callable[..., Written], dtype: str, error: float
) -> None:
    written = checkpoints("prosparse")
    check(eager.answers[dtype], written, error)
    check(eager.answers[f"sparse {dtype}"], written, error)
    assert eager.answers[f"sparse {dtype}"]["taken"]["sparse"] > 0


@pytest.mark.parametrize(
    ("job_name", "variant"),
    [
        ("sparse relu-llama", "relu-llama"),
        ("sparse prosparse", "prosparse"),
        ("sparse bamboo", "bamboo"),
        ("dense counted", "prosparse"),
    ],
)
def test_counts_are_the_formulas_of_all_tokens_that_ran(
    eager: Ran,
    checkpoints: Callable[..., Written],
    tmp_path_factory: pytest.TempPathFactory,
    job_name: str,
    variant: str,
) -> None:
    written = checkpoints(variant)
    directory = Path(eager.answers[job_name]["statistics"])
    config = written.variant.config
    layers, d_ff = config["num_hidden_layers"], config["intermediate_size"]
    expected = torch.zeros(layers, d_ff, dtype=torch.int64)
    tokens = 0
    for made in eager.answers[job_name]["made"]:
        ids = made["ids"][:-1]  # the last one was never fed
        tokens += len(ids)
        for number, layer in enumerate(written.reference(ids).layers):
            expected[number] += layer.active.sum(0)
    assert json.loads((directory / "statistics.json").read_text())["tokens"] == tokens
    found = torch.stack(read_statistics(directory, layers, d_ff))
    # A score within float32's rounding of the threshold may fall on either side.
    assert (found - expected).abs().sum() <= 2
    assert found.sum() > 0


def test_silu_models_are_vllms_own(eager: Ran) -> None:
    assert eager.answers["silu"]["class"] == "vllm.model_executor.models.llama.LlamaForCausalLM"
    own = "vllm.model_executor.models.minicpm.MiniCPMForCausalLM"
    assert eager.answers["silu minicpm"]["class"] == own


def test_act_info_makes_relu_of_a_silu_model_and_says_so(
    eager: Ran, checkpoints: Callable[..., Written]
) -> None:
    written = checkpoints("llama-tied", hidden_act="silu")
    check(eager.answers["silu as relu"], with_activation(written, "relu", 0.0))
    assert "ACT_INFO wins: relu instead of config.json's silu" in eager.log


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_one_line(eager: Ran, name: str) -> None:
    line = next(
        line
        for line in eager.answers[name]["error"].splitlines()
        if line.strip().startswith("Value")
    )
    assert "psp: " in line
    assert all(part in line for part in REFUSED[name][3])


def test_weights_loaded_anew_reach_the_operators(
    eager: Ran, checkpoints: Callable[..., Written]
) -> None:
    check(eager.answers["reloaded"], checkpoints("prosparse", seed=1))
    assert eager.answers["reloaded"]["taken"]["sparse"] > 0


def test_biases_keep_an_ffn_dense(eager: Ran, checkpoints: Callable[..., Written]) -> None:
    dense, sparse = (eager.answers[f"biased {how}"] for how in ("dense", "sparse"))
    assert sparse["taken"] == {}
    for one, other, plain in zip(
        dense["made"], sparse["made"], eager.answers["prosparse"]["made"], strict=True
    ):
        assert one["ids"] == other["ids"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
        assert one["logprobs"] != pytest.approx(plain["logprobs"], abs=0.05)
    assert "PSP_VLLM_SPARSE is passed over" in eager.log


@pytest.mark.parametrize("name", NAMES)
def test_names_that_psp_reads_are_served(
    eager: Ran, checkpoints: Callable[..., Written], name: str
) -> None:
    check(eager.answers[name], checkpoints("llama-tied"))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(eager: Ran) -> None:
    assert (
        f"psp: the checkpoint lacks {LACKED}; fetch it again" in eager.answers["lacking"]["error"]
    )


# --- compiled -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(
    vllm_python: Path, checkpoints: Callable[..., Written], tmp_path_factory: pytest.TempPathFactory
) -> Ran:
    """Run with vLLM's default compilation, all in one cache of compiled graphs."""
    counts = tmp_path_factory.mktemp("compiled")
    compiling = {"options": {"enforce_eager": False}, "one_by_one": True, "limit": 1.0}
    written = checkpoints("prosparse")
    switches = SPARSE | {"PSP_VLLM_STATS": str(counts / "counts")}
    jobs = {
        "dense": job(written, **compiling),
        "relu": job(written, environment={"ACT_INFO": "relu"}, **compiling),
        "fatrelu": job(written, environment={"ACT_INFO": "fatrelu_0.4"}, **compiling),
        "sparse": job(written, environment=switches, **compiling),
        "again": job(written, **compiling),
    }
    return run_in_vllm(vllm_python, counts, jobs)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("dense", ("fatrelu", 0.2)),
        ("relu", ("relu", 0.0)),
        ("fatrelu", ("fatrelu", 0.4)),
        ("sparse", ("fatrelu", 0.2)),
        ("again", ("fatrelu", 0.2)),
    ],
)
def test_compiled_graphs_are_not_taken_for_each_other(
    compiled: Ran, checkpoints: Callable[..., Written], name: str, activation: tuple[str, float]
) -> None:
    check(compiled.answers[name], with_activation(checkpoints("prosparse"), *activation))


def test_compiled_code_uses_the_operators_for_few_tokens(compiled: Ran) -> None:
    taken = compiled.answers["sparse"]["taken"]
    assert taken["sparse"] == 2 * (3 * (MADE - 1) + 2)
    assert taken["dense"] > 0
