"""`psp serve-check` on a model's files: config.json, weights, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from directories import configure
from safetensors.torch import load_file, save_file
from serving import Make, findings, maker, one, problems, quiet, write_site
from test_doctor_environment import told

from architectures.checkpoint import Checkpoint
from prosparse.tokenizer_output import write_tokenizer
from vllm_plugin.check import examination, installed
from vllm_plugin.settings import ServeCheckConfig


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


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, part in {
        "nowhere": "no such directory",
        "file.gguf": "is a file",
        "empty": "is empty",
        "broken": "config.json",
    }.items():
        status, text, remedy = one(tmp_path / name, "model")
        assert (status, part in text, bool(remedy)) == ("problem", True, True), text


@pytest.mark.parametrize("names", ["LlamaForCausalLM", [1], {"a": 1}, 3])
def test_architectures_that_are_no_list_of_names(make: Make, names: object) -> None:
    path = make("llama-tied")
    configure(path, architectures=names)
    assert "architectures is" in one(path, "model")[1]


@pytest.mark.parametrize(("name", "kind"), [("llama-tied", "llama"), ("relu-mistral", "mistral")])
def test_a_config_without_model_type(make: Make, name: str, kind: str) -> None:
    path = make(name, model_type=None)
    found = findings(path)
    assert problems(found) == ["config"]
    assert told(found, "config")[2] == f'add "model_type": "{kind}" to config.json'
    configure(path, architectures=["Unknown"])
    assert one(path, "config")[2] == "add the model's model_type to config.json"


@pytest.mark.parametrize("name", ["minicpm", "bamboo"])
def test_the_plugins_own_classes_need_no_model_type(make: Make, name: str) -> None:
    status, text, _ = one(make(name, model_type=None), "config")
    assert (status, text) == ("ok", f"no model_type; the plugin says that it is {name}")


def test_own_code_of_a_class_that_is_not_psp_s(make: Make) -> None:
    path = make("llama-tied", architectures=["XForCausalLM"], auto_map={"AutoConfig": "x.X"})
    assert "only with --trust-remote-code" in one(path, "own code")[1]


def edit_tensors(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: edit_tensors(path, lambda found: found.pop(UP)), UP),
    "shape": (
        lambda path: edit_tensors(path, lambda found: found.update({UP: found[UP][:-1].clone()})),
        "has shape",
    ),
    "int8": (
        lambda path: edit_tensors(path, lambda found: found.update({UP: found[UP].char()})),
        "quantised",
    ),
    "cut": (
        lambda path: (path / "model.safetensors").write_bytes(
            (path / "model.safetensors").read_bytes()[:-999]
        ),
        "model.safetensors",
    ),
    "none": (lambda path: (path / "model.safetensors").unlink(), "holds no weights"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_weights_that_are_not_whole(make: Make, kind: str) -> None:
    path = make("llama-linear")
    damage, part = DAMAGES[kind]
    damage(path)
    found = findings(path)
    assert problems(found) == ["weights"]
    (text,) = [
        f"{each.found} {each.remedy}"
        for each in found
        if each.check == "weights" and each.status.value == "problem"
    ]
    assert part in text


def test_a_missing_shard(make: Make) -> None:
    path = make("prosparse")
    next(path.glob("model-00002*")).unlink()
    status, text, _ = one(path, "weights")
    assert (status, "shard is missing" in text) == ("problem", True)


def test_what_powerinfer_cannot_run_is_no_problem_of_vllm_s(make: Make) -> None:
    found = findings(make("llama-tied", attention_bias=True))
    assert problems(found) == []
    assert "not checked one by one: config.json: attention_bias" in told(found, "weights")[1]


def test_notes_on_the_files_are_told(make: Make) -> None:
    path = make("llama-linear")
    configure(path, tie_word_embeddings=True)
    notes = [each.found for each in findings(path) if each.check == "weights"]
    assert any("a head that differs is stored" in text for text in notes)


def test_a_checkpoint_s_own_predictors_count_for_nothing(make: Make) -> None:
    assert one(make("turbosparse"), "memory")[1] == one(make("bamboo"), "memory")[1]


def test_the_element_type_of_files(make: Make) -> None:
    assert one(make("llama-linear", torch_dtype="float16"), "dtype")[1].startswith("float16")
    path = make("llama-linear")
    configure(path, torch_dtype=None)
    assert one(path, "dtype")[1] == "float16, as the model has it", "safetensors are looked up"
    path = make("relu-llama")
    configure(path, torch_dtype=None)
    assert one(path, "dtype")[1].startswith("bfloat16: vLLM computes in it, the model is float32")


def mend(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    write_tokenizer(path, checkpoint.tokenizer(), checkpoint.config, path)


@pytest.mark.parametrize("name", ["llama-tied", "prosparse", "minicpm", "bamboo"])
def test_a_bare_tokenizer_model_is_misread_and_a_mended_one_is_not(make: Make, name: str) -> None:
    path = make(name)
    status, text, _ = one(path, "tokenizer")
    assert status == "note"
    # transformers 5.24 gives the right ids, earlier ones do not.
    assert "does not begin texts as the model wants (BOS)" in text
    assert "takes psp's reading" in text
    mend(path)
    assert one(path, "tokenizer")[0] == "ok"
    command = examination.check_serving(ServeCheckConfig(model=path), {}).command
    assert command == f"{installed.SERVER} --model {path}"


def test_bos_alone_and_what_cannot_be_read(make: Make) -> None:
    path = make("llama-tied")
    mend(path)
    file = path / "tokenizer.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "post_processor": None}))
    settings = path / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}')
    text = one(path, "tokenizer")[1]
    assert text.startswith("transformers does not begin texts as the model wants (BOS); ")
    configure(path, hidden_act="silu")
    status, text, remedy = one(path, "tokenizer")
    assert (status, remedy) == ("warning", "pass --tokenizer-mode psp")
    assert text == "transformers does not begin texts as the model wants (BOS)"
    command = examination.check_serving(ServeCheckConfig(model=path), {}).command
    assert command == f"{installed.SERVER} --model {path} --tokenizer-mode psp"
    configure(path, hidden_act="relu")
    settings.write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    file.write_text("[]")
    status, text, _ = one(path, "tokenizer")
    assert (status, "psp" in text) == ("note", True), text
    file.unlink()
    (path / "tokenizer.model").unlink()
    status, text, remedy = one(path, "tokenizer")
    assert (status, "not compared with psp's reading" in text) == ("note", True)
    assert remedy


def test_a_tokenizer_that_transformers_fails_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("no such class\nmore")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    status, text, _ = one(make("llama-tied"), "tokenizer")
    assert status == "note"
    assert text.startswith("transformers cannot read it: no such class; ")


def test_a_transformers_that_cannot_be_imported(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ImportError("torchvision::nms")

    monkeypatch.setattr("vllm_plugin.configs.register_configs", fail)
    status, text, _ = one(make("llama-tied"), "tokenizer")
    assert (status, "transformers fails (torchvision::nms)" in text) == ("note", True)


def test_the_chat_template(make: Make) -> None:
    path = make("llama-tied")
    status, text, remedy = one(path, "chat template")
    assert (status, text.startswith("none")) == ("note", True)
    assert "--chat-template" in remedy
    (path / "chat_template.jinja").write_text("{{ messages }}")
    assert one(path, "chat template")[1].startswith("there is one")
    (path / "chat_template.jinja").write_bytes(b"\xff")
    assert one(path, "chat template")[0] == "warning"
