"""Which models the vLLM plugin serves, and as what."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import refused
from families import BY_NAME, VARIANTS

from common.errors import CheckpointError, SettingsError
from vllm_plugin.act_info import read_act_info
from vllm_plugin.served import factors, plain_name, served, told
from vllm_plugin.switches import read_switches

GATED = [variant for variant in VARIANTS if variant.family not in ("opt", "falcon")]
LLAMA, MINICPM, BAMBOO = (BY_NAME[name].config for name in ("relu-llama", "minicpm-s", "bamboo"))


@pytest.mark.parametrize("variant", GATED, ids=lambda variant: variant.name)
def test_every_published_layout_is_served_with_its_activation(variant: Any) -> None:
    found = served(variant.config, {})
    assert found is not None
    assert found.family.name == variant.family
    arithmetic = found.arithmetic
    assert (arithmetic.activation, arithmetic.activation_threshold) == variant.activation
    assert found.notes == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "silu"},
        {"hidden_act": None},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["OPTForCausalLM"]},
        {"architectures": None, "model_type": "qwen2"},
    ],
)
def test_what_vllm_runs_by_itself_is_left_to_it(changes: dict[str, Any]) -> None:
    assert served(LLAMA | changes, {}) is None


def test_experts_are_left_to_vllm() -> None:
    assert served(MINICPM | {"num_experts": 8}, {}) is None


def test_a_config_without_class_is_known_by_its_type() -> None:
    found = served(LLAMA | {"architectures": None}, {})
    assert found is not None
    assert found.family.name == "llama"


def test_what_powerinfer_does_not_know_is_served_all_the_same() -> None:
    other = {"attention_bias": True, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert served(LLAMA | other, {}) is not None


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_act": "fatrelu"}, ("hidden_act_param", "None")),
        ({"hidden_act": "fatrelu", "hidden_act_param": -0.1}, ("hidden_act_param", "-0.1")),
        ({"quantization_config": {"quant_method": "awq"}}, ("quantization_config", "awq")),
        ({"architectures": ["SparseLlamaForCausalLM"], "hidden_act": "silu"}, ("hidden_act",)),
        ({"architectures": ["BambooForCausalLM"], "hidden_act": "silu"}, ("hidden_act",)),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with refused(CheckpointError, *parts):
        served(LLAMA | changes, {})


def test_minicpm_has_its_constants_in_three_places_and_two_matrices() -> None:
    found = served(MINICPM, {})
    assert found is not None
    assert found.unties
    layers, by = MINICPM["num_hidden_layers"], dict(factors(found))
    assert by.pop("model.embed_tokens.weight") == 12
    assert by.pop("lm_head.weight") == 16 / MINICPM["hidden_size"]
    assert set(by) == {
        "model.layers.{layer}.self_attn.o_proj.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
    }
    assert set(by.values()) == {1.4 / layers**0.5}


def test_a_llama_has_no_factors_and_keeps_its_head() -> None:
    found = served(LLAMA, {})
    assert found is not None
    assert not found.unties
    assert not factors(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("relu", ("relu", 0.0)),
        ("fatrelu_0.01", ("fatrelu", 0.01)),
        (" FATReLU_1e-2 ", ("fatrelu", 0.01)),
        ("", None),
        ("  ", None),
    ],
)
def test_act_info_is_read_as_the_card_writes_it(text: str, expected: object) -> None:
    assert read_act_info({"ACT_INFO": text}) == expected
    assert read_act_info({}) is None


@pytest.mark.parametrize(
    "text",
    [
        *("gelu", "relu_", "relu_0.1", "_0.1", "silu_0.1", "fatrelu", "fatrelu_", "fatrelu_x"),
        *("fatrelu_0", "fatrelu_-1", "fatrelu_nan", "fatrelu_inf"),
    ],
)
def test_other_act_info_is_refused(text: str) -> None:
    with refused(SettingsError, "ACT_INFO", repr(text), "fatrelu_0.01"):
        served(LLAMA, {"ACT_INFO": text})


@pytest.mark.parametrize(
    ("config", "text", "expected", "said"),
    [
        (
            LLAMA,
            "fatrelu_0.25",
            ("fatrelu", 0.25),
            "fatrelu from 0.25 instead of config.json's relu",
        ),
        (
            LLAMA | {"hidden_act": "silu"},
            "relu",
            ("relu", 0.0),
            "relu instead of config.json's silu",
        ),
        (BY_NAME["prosparse"].config, "relu", ("relu", 0.0), "relu instead of"),
        (BY_NAME["prosparse"].config, "fatrelu_0.3", ("fatrelu", 0.3), "fatrelu from 0.2"),
        (MINICPM, "fatrelu_0.3", ("fatrelu", 0.3), "fatrelu from 0.2"),
    ],
)
def test_act_info_wins_and_says_so(
    config: dict[str, Any], text: str, expected: tuple[str, float], said: str
) -> None:
    found = served(config, {"ACT_INFO": text})
    assert found is not None
    assert (found.arithmetic.activation, found.arithmetic.activation_threshold) == expected
    (line,) = found.notes
    assert line.startswith("ACT_INFO wins: ")
    assert said in line


def test_act_info_that_agrees_says_nothing() -> None:
    for config, text in ((LLAMA, "relu"), (MINICPM, "fatrelu_0.2")):
        found = served(config, {"ACT_INFO": text})
        assert found is not None
        assert found.notes == ()


def test_act_info_is_not_for_drelu_nor_for_other_models() -> None:
    found = served(BAMBOO, {"ACT_INFO": "relu"})
    assert found is not None
    assert found.arithmetic.activation == "drelu"
    assert "dReLU" in found.notes[0]
    assert served({"architectures": ["Qwen2ForCausalLM"]}, {"ACT_INFO": "nonsense"}) is None


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "_orig_mod.model.layers.0.mlp.up_proj.weight",
        "module._orig_mod.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.weight",
    ],
)
def test_names_become_those_of_the_language_model(name: str) -> None:
    assert plain_name(name) == "model.layers.0.mlp.up_proj.weight"


def test_a_heads_name_is_kept() -> None:
    assert plain_name("lm_head.weight") == plain_name("module.lm_head.weight") == "lm_head.weight"


def test_switches_are_in_what_the_model_class_is_told() -> None:
    found = served(LLAMA, {})
    assert found is not None
    plain = told(found, {})
    assert (plain["sparse"], plain["counted"]) == (False, False)
    both = told(found, {"PSP_VLLM_SPARSE": "1", "PSP_VLLM_STATS": "counts"})
    assert (both["sparse"], both["counted"]) == (True, True)


def test_switches_that_say_something_else_are_refused(tmp_path: Any) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for name, value in (("PSP_VLLM_SPARSE", "yes"), ("PSP_VLLM_STATS", str(file))):
        with refused(SettingsError, name, value):
            read_switches({name: value})
    assert not read_switches({"PSP_VLLM_SPARSE": "0"}).sparse
