"""`psp serve-check` as a user meets it, and who it says will serve a model, and how.

The vLLM beside it is one of files that cannot be imported: whoever tries fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from families import VARIANTS, Variant, write
from readied import Readied
from serving import Make, findings, maker, one, problems, quiet, wide, write_site
from test_doctor_environment import told
from test_doctor_installation import PACKAGES

from powerinfer_bridge.doctor import installation
from vllm_plugin.check import examination, installed
from vllm_plugin.settings import ServeCheckConfig
from vllm_plugin.versions import TESTED

Psp = Callable[..., Result]
GATED = [each for each in VARIANTS if each.family not in ("opt", "falcon")]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site"
    write_site(path)
    return path


@pytest.fixture(autouse=True)
def _quiet(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with quiet(site, monkeypatch):
        yield


@pytest.fixture
def make(tmp_path: Path, tokenizer_bytes: bytes) -> Make:
    return maker(tmp_path / "models", tokenizer_bytes)


@pytest.mark.parametrize("variant", GATED, ids=lambda variant: variant.name)
def test_every_gated_family_is_served(
    variant: Variant, tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    variant = wide(variant)
    path = write(variant, tmp_path / "model", tokenizer_bytes).path
    found = findings(path)
    assert problems(found) == []
    status, text, _ = told(found, "activation")
    name, threshold = variant.activation
    assert status == "ok"
    assert text.startswith(f"{name} from {threshold:g}," if threshold else f"{name},")
    assert f"psp's plugin as {variant.family}" in text
    assert ("constants folded" in text) is (variant.family == "minicpm")
    assert any(each.check == "own code" for each in found) is ("auto_map" in variant.config)
    assert any(each.found.startswith("complete: ") for each in found if each.check == "weights")


def test_the_table_ends_with_the_command(psp: Psp, make: Make) -> None:
    path = make("llama-tied")
    result = psp("serve-check", path, "--tensor-parallel-size", 2)
    assert result.exit_code == 0, result.output
    *_, verdict, last = result.stdout.splitlines()
    assert verdict.startswith("healthy: ")
    assert last == f"start it with: {installed.SERVER} --model {path} --tensor-parallel-size 2"


def test_a_problem_is_exit_code_1_and_the_json_document(psp: Psp, make: Make) -> None:
    path = make("prosparse", hidden_act_param=None)
    result = psp("serve-check", path, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert list(document) == [
        *("kind", "schema_version", "tool_version", "healthy", "counts", "findings", "command"),
    ]
    assert (document["kind"], document["schema_version"]) == ("psp.serve-check", 1)
    assert document["healthy"] is False
    assert document["command"].startswith(f"{installed.SERVER} --model ")
    for finding in document["findings"]:
        assert list(finding) == ["check", "status", "found", "remedy"]
        assert "\n" not in finding["found"]
        assert finding["remedy"] or finding["status"] in ("ok", "note")
    text = psp("serve-check", path).stdout
    assert f"when that is mended, start it with: {installed.SERVER} --model" in text


def test_of_parts_that_do_not_divide_the_command_says_nothing(make: Make) -> None:
    config = ServeCheckConfig(model=make("llama-tied"), tensor_parallel_size=3)
    assert "--tensor-parallel-size" not in examination.check_serving(config, {}).command


def test_without_vllm(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    found = findings(make("llama-tied"))
    assert problems(found) == ["vLLM"]
    status, text, remedy = told(found, "vLLM")
    assert (status, text) == ("problem", "not installed in psp's environment")
    assert f"vllm=={TESTED[-1]}" in remedy
    assert not any(each.check == "plugin" for each in found)


def test_a_model_that_vllm_runs_by_itself_needs_no_plugin(make: Make) -> None:
    assert one(make("llama-tied", hidden_act="silu"), "plugin", VLLM_PLUGINS="")[0] == "note"
    # But transformers knows its config by the plugin only.
    own = make("minicpm", hidden_act="silu")
    assert one(own, "plugin", VLLM_PLUGINS="")[0] == "problem"


def test_what_psp_itself_lacks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = replace(PACKAGES, installed={"torch": "2.1"})
    monkeypatch.setattr(installation, "read_packages", lambda: facts)
    assert problems(findings(make("llama-tied"))) == ["torch", "click"]


def test_what_the_plan_tells_is_told(make: Make) -> None:
    path = make("llama-tied", num_attention_heads=16, num_key_value_heads=16)
    assert problems(findings(path)) == ["heads"]
    assert problems(findings(make("llama-tied"), parts=4)) == ["tensor parallel"]


def test_nothing_heavy_is_imported_before_it_is_needed_and_vllm_never(
    site: Path, make: Make, tmp_path: Path, new_python: Readied
) -> None:
    root, heavy = Path(__file__).parents[1], "{'torch', 'transformers', 'vllm'} & {*sys.modules}"
    first = f"import sys; sys.path[:0] = [{str(root)!r}, {str(site)!r}];"
    code = f"{first} import vllm_plugin.check.examination; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    check = (
        f"{first} from pathlib import Path; from vllm_plugin.check import examination as e;"
        "e.check_serving(e.ServeCheckConfig(model=Path(sys.argv[1])), {});"
        f"print(sorted({heavy}))"
    )
    for model, found in (
        (tmp_path / "no", ["torch"]),
        (make("llama-tied"), ["torch", "transformers"]),
    ):
        done = new_python(check, model)
        assert (done.returncode, done.stdout) == (0, f"{found}\n"), done.stderr


def test_a_silu_model_is_left_to_vllm(make: Make) -> None:
    found = findings(make("llama-tied", hidden_act="silu"))
    assert problems(found) == []
    status, text, _ = told(found, "activation")
    assert status == "note"
    assert text == "left to vLLM: no ReLU-family activation (hidden_act 'silu')"
    assert told(found, "weights")[0] == "ok"


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("prosparse", {"hidden_act_param": None}, "hidden_act_param is None"),
        ("prosparse", {"hidden_act_param": "x"}, "hidden_act_param is 'x'"),
        ("llama-tied", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ("minicpm", {"scale_emb": "big"}, "scale_emb is 'big'"),
    ],
)
def test_what_the_plugin_refuses(make: Make, name: str, changes: dict[str, Any], part: str) -> None:
    status, text, remedy = one(make(name, **changes), "activation")
    assert (status, part in text, bool(remedy)) == ("problem", True, True)


def test_quantised_weights_that_are_vllm_s(make: Make) -> None:
    quantised = {"quantization_config": {"quant_method": "gptq"}}
    found = findings(make("llama-tied", hidden_act="silu", **quantised))
    assert problems(found) == []
    assert "quantised" in told(found, "weights")[1]
    assert "in its quantised form" in told(found, "memory")[1]


def test_classes_that_are_not_the_plugin_s(make: Make) -> None:
    status, text, _ = one(make("opt-125m"), "model class")
    assert (status, "which has the class" in text) == ("note", True)
    text = one(make("llama-tied", architectures=["XForCausalLM"]), "model class")[1]
    assert "whose list does not have it either" in text


def test_a_relu_falcon_would_be_computed_with_gelu(make: Make) -> None:
    status, text, _ = one(make("falcon-7b"), "activation")
    assert (status, "GELU" in text) == ("problem", True)
    assert one(make("falcon-40b"), "activation")[0] == "problem"
    assert problems(findings(make("falcon-7b", hidden_act="gelu"))) == []


@pytest.mark.parametrize(
    ("name", "value", "status", "part"),
    [
        ("llama-tied", "nonsense", "problem", "'nonsense', expected relu or fatrelu_T"),
        ("llama-tied", "fatrelu_-1", "problem", "expected relu or fatrelu_T"),
        ("llama-tied", "fatrelu_0.01", "note", "wins: fatrelu from 0.01"),
        ("llama-tied", "relu", "ok", "agrees with config.json"),
        ("prosparse", "fatrelu_0.2", "ok", "agrees"),
        ("bamboo", "relu", "note", "passed over"),
        ("opt-125m", "relu", "note", "not read"),
        ("opt-125m", "nonsense", "note", "not read"),
    ],
)
def test_act_info(make: Make, name: str, value: str, status: str, part: str) -> None:
    found = one(make(name), "ACT_INFO", ACT_INFO=value)
    assert (found[0], part in found[1]) == (status, True), found


def test_act_info_serves_a_silu_model_and_a_bad_one_hides_nothing(make: Make) -> None:
    path = make("llama-tied", hidden_act="silu")
    assert one(path, "activation", ACT_INFO="relu")[0] == "ok"
    found = findings(make("prosparse", hidden_act_param=None), ACT_INFO="x")
    assert problems(found) == ["activation", "ACT_INFO"]
    assert not any(each.check == "ACT_INFO" for each in findings(path, ACT_INFO=" "))


@pytest.mark.parametrize(
    ("value", "status", "part"),
    [
        ("1", "ok", "leave out neurons"),
        ("0", "ok", "every neuron"),
        ("yes", "problem", "'yes', expected 0 or 1"),
    ],
)
def test_the_sparse_variable(make: Make, value: str, status: str, part: str) -> None:
    found = one(make("llama-tied"), "PSP_VLLM_SPARSE", PSP_VLLM_SPARSE=value)
    assert (found[0], part in found[1]) == (status, True)


def test_the_statistics_variable(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, path = "PSP_VLLM_STATS", make("llama-tied")
    out = tmp_path / "out"

    def judged(value: object, parts: int = 1) -> tuple[str, str, str]:
        return one(path, name, parts, **{name: str(value)})

    assert judged(out)[:2] == ("ok", f"counts of active neurons go to {out}")
    assert judged(out / "deeper")[0] == "ok"
    out.mkdir()
    assert judged(out)[0] == "ok"
    assert judged(out, parts=2)[0] == "problem"
    assert judged(path / "config.json")[:2] == ("problem", f"{path / 'config.json'} is a file")
    assert judged(path / "config.json" / "x")[0] == "problem"
    empty = findings(path, PSP_VLLM_STATS="", PSP_VLLM_SPARSE=" ")
    assert not {name, "PSP_VLLM_SPARSE"} & {each.check for each in empty}
    monkeypatch.setattr("os.access", lambda *arguments: False)
    assert "may not be written to" in judged(out)[1]


def test_variables_of_a_model_that_the_plugin_does_not_serve(make: Make) -> None:
    path = make("llama-tied", hidden_act="silu")
    assert one(path, "PSP_VLLM_SPARSE", PSP_VLLM_SPARSE="x")[0] == "note"
    names = {each.check for each in findings(path)}
    assert not names & {"PSP_VLLM_SPARSE", "PSP_VLLM_STATS", "ACT_INFO"}
