"""How the plugin takes hold of vLLM, on a stand-in for the few names of vLLM that it uses."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from families import BY_NAME
from transformers import LlamaConfig

from vllm_plugin import hooks, register, versions
from vllm_plugin.hooks import adapt
from vllm_plugin.served import MODEL_CLASS

ROOT = Path(register.__file__).parents[1]
LAYERS = """
class LlamaDecoderLayer:
    def __init__(self, vllm_config, prefix="", config=None, attn_layer_type=None): ...

class LlamaForCausalLM:
    def __init__(self, *, vllm_config, prefix="", layer_type=None): ...
"""


class Registry(dict[str, tuple[str, ...]]):
    """Of any kind: what was registered, by name."""

    def register(self, name: str, *what: str) -> None:
        assert name not in self
        self[name] = what

    register_model = register


class StandIn:
    """A vLLM of a few names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
        self.models, self.tokenizers, self.renderers = Registry(), Registry(), Registry()
        self.types: dict[str, str] = {}
        self.calls: list[str] = []
        calls = self.calls

        class ModelConfig:
            model_impl, tokenizer_mode, tokenizer, model = "auto", "auto", "other", "model"

            def __init__(self, hf_config: Any) -> None:
                self.hf_config = hf_config

            def get_model_arch_config(self) -> Any:
                """Say which class will run it."""
                calls.append("arch")
                return self.hf_config.architectures

            def verify_with_parallel_config(self, parallel_config: Any) -> None:
                calls.append("verify")

        self.ModelConfig: Any = ModelConfig
        self.file = site / "llama.py"
        self.file.write_text(LAYERS)
        names: dict[str, dict[str, Any]] = {
            "vllm": {},
            "vllm.config": {"ModelConfig": ModelConfig},
            "vllm.model_executor": {},
            "vllm.model_executor.models": {"ModelRegistry": self.models},
            "vllm.model_executor.models.llama": {},
            "vllm.renderers": {},
            "vllm.renderers.registry": {"RENDERER_REGISTRY": self.renderers},
            "vllm.tokenizers": {},
            "vllm.tokenizers.registry": {"TokenizerRegistry": self.tokenizers},
            "vllm.transformers_utils": {},
            "vllm.transformers_utils.config": {"_ARCHITECTURE_TO_MODEL_TYPE": self.types},
        }
        for name, values in names.items():
            module = ModuleType(name)
            module.__path__ = []
            module.__spec__ = ModuleSpec(name, None, origin=str(self.file))
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    for name in ("ACT_INFO", "PSP_VLLM_SPARSE", "PSP_VLLM_STATS"):
        monkeypatch.delenv(name, raising=False)
    return StandIn(monkeypatch, tmp_path)


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(BY_NAME["relu-llama"].config | changes))


def test_registering_takes_hold_once(vllm: StandIn) -> None:
    register.register()
    held = vllm.ModelConfig.get_model_arch_config
    register.register()
    assert vllm.ModelConfig.get_model_arch_config is held
    assert vllm.models == {MODEL_CLASS: (f"vllm_plugin.model:{MODEL_CLASS}",)}
    assert vllm.tokenizers == {"psp": ("vllm_plugin.tokenizer", "PspTokenizer")}
    assert vllm.renderers == {"psp": ("vllm.renderers.hf", "HfRenderer")}
    assert vllm.types["MiniCPMForCausalLM"] == "minicpm"


def test_a_relu_model_gets_the_plugins_class_before_vllm_looks(vllm: StandIn) -> None:
    register.register()
    config = vllm.ModelConfig(llama())
    assert config.get_model_arch_config() == [MODEL_CLASS]
    assert config.hf_config.psp["activation"] == "relu"
    assert json.loads(config.hf_config.to_json_string())["psp"] == config.hf_config.psp
    before = dict(config.hf_config.psp)
    assert config.get_model_arch_config() == [MODEL_CLASS]
    assert config.hf_config.psp == before
    assert vllm.calls == ["arch", "arch"]


@pytest.mark.parametrize(
    ("changes", "implementation"),
    [({"hidden_act": "silu"}, "auto"), ({"architectures": ["X"]}, "auto"), ({}, "transformers")],
)
def test_other_models_are_as_they_were(
    vllm: StandIn, changes: dict[str, Any], implementation: str
) -> None:
    register.register()
    config = vllm.ModelConfig(llama(**changes))
    config.model_impl = implementation
    before = config.hf_config.to_dict()
    assert config.get_model_arch_config() == before["architectures"]
    assert config.hf_config.to_dict() == before


def test_parts_must_divide_the_ffn(vllm: StandIn) -> None:
    register.register()
    config = vllm.ModelConfig(llama())
    config.verify_with_parallel_config(SimpleNamespace(tensor_parallel_size=3))  # not ours yet
    config.get_model_arch_config()
    config.verify_with_parallel_config(SimpleNamespace(tensor_parallel_size=2))
    with pytest.raises(ValueError, match="intermediate_size 116 does not divide into 3 parts"):
        config.verify_with_parallel_config(SimpleNamespace(tensor_parallel_size=3))
    assert vllm.calls == ["verify", "arch", "verify"]


def test_what_the_graph_hangs_on_is_in_the_config(
    vllm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for variable, value in (
        ("PATH", os.environ["PATH"]),
        ("ACT_INFO", "fatrelu_0.5"),
        ("PSP_VLLM_SPARSE", "1"),
        ("PSP_VLLM_STATS", "counts"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            config = llama()
            assert adapt(config)
            told.append(json.dumps(config.psp, sort_keys=True))
    assert len(set(told)) == len(told)


def test_minicpms_tied_head_becomes_two_matrices(vllm: StandIn) -> None:
    variant = BY_NAME["minicpm-s"].config
    for tied in (True, False):
        config = LlamaConfig(**(variant | {"tie_word_embeddings": tied}))
        assert adapt(config)
        assert (config.psp["unties"], config.tie_word_embeddings) == (tied, False)
    kept = llama(tie_word_embeddings=True)
    assert adapt(kept)
    assert (kept.psp["unties"], kept.tie_word_embeddings) == (False, True)


@pytest.mark.parametrize(
    ("changes", "environment", "part"),
    [
        ({"hidden_act": "fatrelu"}, {}, "psp: config.json: hidden_act_param is None"),
        ({}, {"ACT_INFO": "gelu"}, "psp: ACT_INFO is 'gelu'"),
        ({}, {"PSP_VLLM_SPARSE": "on"}, "psp: PSP_VLLM_SPARSE is 'on'"),
    ],
)
def test_mistakes_are_one_line(
    vllm: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    environment: dict[str, str],
    part: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = llama(**changes)
    with pytest.raises(ValueError, match=part) as caught:
        adapt(config)
    assert "\n" not in str(caught.value)
    assert config.architectures == ["LlamaForCausalLM"]


def lack_method(patch: pytest.MonkeyPatch, vllm: StandIn) -> None:
    patch.delattr(vllm.ModelConfig, "verify_with_parallel_config")


def lack_registry(patch: pytest.MonkeyPatch, vllm: StandIn) -> None:
    patch.delattr(sys.modules["vllm.tokenizers"], "registry")
    patch.setitem(sys.modules, "vllm.tokenizers.registry", None)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lack_method, "ModelConfig has no verify_with_parallel_config"),
        (lack_registry, "vllm.tokenizers.registry"),
    ],
)
def test_a_vllm_that_has_changed_turns_the_plugin_off_with_a_line(
    vllm: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[pytest.MonkeyPatch, StandIn], None],
    part: str,
) -> None:
    change(monkeypatch, vllm)
    with caplog.at_level(logging.WARNING, register.LOGGER):
        register.register()
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("psp's plugin is off: ")
    assert part in line
    assert "\n" not in line
    assert (vllm.models, vllm.tokenizers, vllm.renderers, vllm.types) == ({}, {}, {}, {})
    config = vllm.ModelConfig(llama())
    assert config.get_model_arch_config() == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (LAYERS.replace("LlamaForCausalLM", "Llama"), "has no LlamaForCausalLM"),
        (LAYERS.replace(", layer_type=None", ""), "LlamaForCausalLM takes no layer_type"),
        (LAYERS.replace("config=None, ", ""), "LlamaDecoderLayer takes no config"),
        ("class LlamaDecoderLayer: ...", "LlamaDecoderLayer takes no vllm_config"),
    ],
)
def test_layers_that_have_changed_are_told_of_served_models_only(
    vllm: StandIn, text: str, part: str
) -> None:
    vllm.file.write_text(text)
    with pytest.raises(ValueError, match=part) as caught:
        adapt(llama())
    assert f"run with {versions.TESTED[0]}" in str(caught.value)
    assert not adapt(llama(hidden_act="silu"))


def test_without_vllm_nothing_is_imported() -> None:
    code = (
        "import sys; from vllm_plugin.register import register; register(); "
        "print([name for name in ('torch', 'transformers', 'numpy', 'click') "
        "if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_the_entry_point_is_declared() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="vllm.general_plugins", name="psp")
    assert found.load() is register.register


class Tokens:
    """A ModelConfig as far as the choice of a tokenizer goes."""

    tokenizer_mode, tokenizer, model = "auto", "model", "model"
    tokenizer_revision = hf_token = None


@pytest.mark.parametrize(
    ("changes", "otherwise", "mode"),
    [
        ({}, object(), "psp"),
        ({}, None, "auto"),
        ({"tokenizer_mode": "hf"}, object(), "hf"),
        ({"tokenizer": "another"}, object(), "auto"),
    ],
)
def test_the_tokenizer_mode_is_chosen_where_nobody_did(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, str],
    otherwise: object,
    mode: str,
) -> None:
    stub = ModuleType("vllm_plugin.tokenizer")
    stub.read_otherwise = lambda *arguments: otherwise  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm_plugin.tokenizer", stub)
    config = Tokens()
    vars(config).update(changes)
    hooks._choose_tokenizer(config)
    assert config.tokenizer_mode == mode
    assert ("--tokenizer-mode hf keeps" in caplog.text) is (mode == "psp")
