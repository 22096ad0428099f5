"""What a file's metadata says of its model, and every way in which a file is refused as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from gguf import GGMLQuantizationType
from gguf_models import D_FF, D_MODEL, HEADS, llama_keys, llama_tensors, write_gguf

from architectures.checkpoint import Checkpoint
from architectures.rope import RopeScaling
from common.errors import CheckpointError
from prosparse.activation import open_any, open_with_relu

F32 = GGMLQuantizationType.F32
ONES = np.ones(D_MODEL // HEADS // 2, dtype=np.float32)
Keys = dict[str, Any]
Tensors = dict[str, Any]
Edit = Callable[[Keys, Tensors], object]


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of the small LLaMA with some keys changed; None removes one."""

    def make(
        edit: Edit = lambda keys, tensors: None, *, sparse: bool = True, **changes: Any
    ) -> Path:
        named = {key.replace("__", "."): value for key, value in changes.items()}
        keys, tensors = llama_keys() | named, llama_tensors()
        edit(keys, tensors)
        kept = {key: value for key, value in keys.items() if value is not None}
        return write_gguf(tmp_path / "model.gguf", kept, tensors, sparse=sparse)

    return make


Make = Callable[..., Path]


def test_a_powerinfer_file_has_relu_and_a_dense_one_what_llama_cpp_computes(file: Make) -> None:
    assert Checkpoint.open(file()).shape.activation == "relu"
    dense = file(sparse=False)
    with refused(
        CheckpointError,
        f"{dense}: its activation is 'silu', which programs compute where a file names none",
        f"say so: --model {dense}:relu",
    ):
        Checkpoint.open(dense)
    assert Checkpoint.open(f"{dense}:relu").shape.activation == "relu"
    opened = open_any(str(dense))
    assert (opened.own.activation, opened.checkpoint.shape.activation) == ("silu", "relu")
    assert open_with_relu(str(dense)).origin.config["hidden_act"] == "silu"
    assert open_any(f"{dense}:gelu").own.activation == "gelu"


def test_a_threshold_comes_after_a_second_colon(file: Make) -> None:
    shape = Checkpoint.open(f"{file()}:fatrelu:0.25").shape
    assert (shape.activation, shape.activation_threshold) == ("fatrelu", 0.25)
    odd = ("fatrelu", "fatrelu:0", "fatrelu:x", "fatrelu:nan", "relu:1", "", "fatrelu:", "ReLU")
    for name in (*odd, "none", "relu:1:2"):
        with refused(CheckpointError, f"activation {name!r} after", "or fatrelu:0.01", "drelu"):
            Checkpoint.open(f"{file()}:{name}")
    with refused(CheckpointError, "as ':gelu' says, is 'gelu', expected 'relu'", "psp sparsify"):
        Checkpoint.open(f"{file(sparse=False)}:gelu")


@pytest.mark.parametrize(
    ("said", "named"), [("relu", "fatrelu:0.1"), ("relu", "silu"), ("drelu", "relu")]
)
def test_what_the_file_says_counts(file: Make, said: str, named: str) -> None:
    path = file(psp__activation=said)
    with refused(CheckpointError, f"has {said}, not {named}", f"leave ':{named}' out"):
        Checkpoint.open(f"{path}:{named}")
    assert Checkpoint.open(f"{path}:{said}").config["hidden_act"] == said
    with refused(CheckpointError, "its model has relu, not silu"):
        Checkpoint.open(f"{file()}:silu")


def test_bamboo_applies_relu_to_both_halves(file: Make) -> None:
    def bamboo(keys: Keys, tensors: Tensors) -> None:
        for key in [key for key in keys if key.startswith("llama.")]:
            keys[key.replace("llama.", "bamboo.")] = keys.pop(key)
        keys["general.architecture"] = "bamboo"

    checkpoint = Checkpoint.open(file(bamboo))
    assert (checkpoint.architecture.name, checkpoint.shape.activation) == ("bamboo", "drelu")


@pytest.mark.parametrize("new", [True, False])
def test_minicpm_s_constants_have_keys_or_are_those_of_its_first_files(
    file: Make, new: bool
) -> None:
    """Values by hand: 9, 0.7 / sqrt(1 layer), and 256 / 128."""

    def minicpm(keys: Keys, tensors: Tensors) -> None:
        for key in [key for key in keys if key.startswith("llama.")]:
            keys[key.replace("llama.", "minicpm.")] = keys.pop(key)
        keys["general.architecture"] = "minicpm"
        if new:
            keys |= {"minicpm.embedding_scale": 9.0, "minicpm.residual_scale": 0.7}
            keys |= {"minicpm.logit_scale": 2.0}

    shape = Checkpoint.open(f"{file(minicpm, sparse=False)}:relu").shape
    found = shape.embedding_scale, shape.residual_scale, shape.output_scale
    assert found == pytest.approx((9, 0.7, 0.5) if new else (12, 1.4, 1.0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (10000.0, None)),
        ({"freq_base": 500000.0}, (500000.0, None)),
        ({"scale_linear": 4.0}, (10000.0, RopeScaling(kind="linear", factor=4.0))),
        ({"scaling.factor": 2.0}, (10000.0, RopeScaling(kind="linear", factor=2.0))),
        ({"scaling.type": "none", "scaling.factor": 2.0}, (10000.0, None)),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16},
            (10000.0, RopeScaling(kind="yarn", factor=4.0, original_context=16)),
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0},
            (10000.0, RopeScaling(kind="yarn", factor=4.0, original_context=64)),
        ),
    ],
    ids=str,
)
def test_rotary_keys_of_old_and_new_files(
    file: Make, changes: Keys, expected: tuple[float, RopeScaling | None]
) -> None:
    named = {f"llama.rope.{key}": value for key, value in changes.items()}
    shape = Checkpoint.open(file(lambda keys, tensors: keys.update(named))).shape
    assert (shape.rope_theta, shape.rope_scaling) == expected


def test_sizes_may_be_given_for_each_layer_and_a_head_left_out(file: Make) -> None:
    def tied(keys: Keys, tensors: Tensors) -> None:
        keys["llama.attention.head_count_kv"] = [2]
        keys["llama.feed_forward_length"] = [D_FF]
        keys["llama.attention.sliding_window"] = 0  # none
        del tensors["output.weight"]
        tensors["rope_freqs.weight"] = ONES, F32  # no scaling: files of before November 2023

    shape = Checkpoint.open(file(tied)).shape
    assert (shape.n_kv_heads, shape.d_ff, shape.tied_embeddings) == (2, D_FF, True)
    assert shape.context_length == 64


def set_key(key: str, value: object) -> Edit:
    return lambda keys, tensors: keys.update({key: value})


def heads(count: int) -> Edit:
    changed = {"llama.attention.head_count": count, "llama.rope.dimension_count": None}
    return lambda keys, tensors: keys.update(changed)


def add(name: str, numbers: Any) -> Edit:
    return lambda keys, tensors: tensors.update({name: (numbers, F32)})


def drop(name: str) -> Edit:
    return lambda keys, tensors: tensors.pop(name)


REFUSED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "another architecture": (
        set_key("general.architecture", "bert"),
        ("architecture 'bert'", "supported: llama, bamboo, minicpm, falcon, opt"),
    ),
    "adapter": (set_key("general.type", "adapter"), ("is an adapter", "merge it")),
    "experts": (set_key("llama.expert_count", 8), ("llama.expert_count is 8",)),
    "layers that are not there": (
        set_key("llama.block_count", 2),
        ("tensor blk.1.attn_norm.weight is missing",),
    ),
    "a count that lies": (set_key("llama.block_count", 2**31), ("more than there are tensors",)),
    "no count": (set_key("llama.block_count", None), ("llama.block_count is missing",)),
    "a count that is a text": (set_key("llama.block_count", "one"), ("expected an integer",)),
    "no heads": (
        heads(0),
        ("key llama.attention.head_count is 0, expected an integer", "fetch the file"),
    ),
    "heads that do not fit": (
        heads(7),
        ("key llama.attention.head_count is 7, expected a divisor of llama.embedding_length",),
    ),
    "layers of two kinds": (
        set_key("llama.attention.head_count_kv", [2, 4]),
        ("differs between layers",),
    ),
    "epsilon that is no number": (
        set_key("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("finite",),
    ),
    "a constant of MiniCPM's that divides by 0": (
        lambda keys, tensors: keys.update(
            {key.replace("llama.", "minicpm."): value for key, value in keys.items()}
            | {"general.architecture": "minicpm", "minicpm.logit_scale": 0.0}
        ),
        ("key minicpm.logit_scale is 0, expected a number above 0",),
    ),
    "a factor that its default name scales by": (
        set_key("llama.rope.scale_linear", -2.0),
        ("key llama.rope.scale_linear is -2.0, expected a number above 0",),
    ),
    "no FATReLU's threshold": (
        set_key("psp.activation", "fatrelu"),
        ("key psp.activation_threshold is missing", ":fatrelu:0.01"),
    ),
    "an impossible threshold": (
        lambda keys, tensors: keys.update(
            {"psp.activation": "fatrelu", "psp.activation_threshold": 0.0}
        ),
        ("key psp.activation_threshold is 0.0, expected a number above 0",),
    ),
    "another activation": (
        set_key("psp.activation", "silu"),
        ("key psp.activation is 'silu', expected 'relu'", "psp sparsify"),
    ),
    "part of a head turned": (
        set_key("llama.rope.dimension_count", 32),
        ("rope.dimension_count is 32", "whole heads"),
    ),
    "Llama 3's positions": (
        add("rope_freqs.weight", 2 * ONES),
        ("tensor rope_freqs.weight holds factors other than 1", "no such scaling"),
    ),
    "another scaling": (
        lambda keys, tensors: keys.update(
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}
        ),
        ("key llama.rope.scaling.type is 'longrope', expected 'none', 'linear'",),
    ),
    "a constant of scaling": (
        set_key("llama.rope.scaling.attn_factor", 1.5),
        ("llama.rope.scaling.attn_factor",),
    ),
    "a bias": (
        add("blk.0.attn_q.bias", np.ones(D_MODEL, dtype=np.float32)),
        ("tensor blk.0.attn_q.bias belongs to no llama model",),
    ),
    "no down matrix": (
        drop("blk.0.ffn_down_t.weight"),
        ("tensor blk.0.ffn_down_t.weight is missing",),
    ),
    "no embedding": (drop("token_embd.weight"), ("token_embd.weight is missing",)),
    "a wrong shape": (
        add("blk.0.ffn_up.weight", np.ones((D_FF, 2 * D_MODEL), dtype=np.float32)),
        ("tensor blk.0.ffn_up.weight has shape", "its keys imply (512, 256)"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_of_psp_s_is_refused_in_one_line(file: Make, name: str) -> None:
    edit, parts = REFUSED[name]
    path = file(edit)
    with refused(CheckpointError, str(path), *parts):
        Checkpoint.open(path)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.999])
def test_a_file_that_was_cut_is_refused(file: Make, share: float) -> None:
    path = file()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with refused(CheckpointError, str(path), "fetch the file again"):
        Checkpoint.open(path)


def test_other_files_and_names_of_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("no model")
    with refused(CheckpointError, "notes.gguf", "magic"):
        Checkpoint.open(tmp_path / "notes.gguf")
    (tmp_path / "notes.txt").write_text("no model")
    with refused(CheckpointError, "notes.txt", "directory"):
        Checkpoint.open(tmp_path / "notes.txt")
    for name, problem in (("", "name is empty"), ("/dev/null", "/dev/null: is neither")):
        with refused(CheckpointError, problem, "a checkpoint's directory, a GGUF file"):
            Checkpoint.open(name)
    for name in ("none.gguf", "none.gguf:relu", "none.gguf:"):
        with refused(CheckpointError, "none.gguf: no such file", "GGUF file or directory"):
            Checkpoint.open(str(tmp_path / name))


def test_a_file_may_have_another_name(file: Make, tmp_path: Path) -> None:
    path = file().rename(tmp_path / "model.bin")
    assert Checkpoint.open(path).shape.activation == "relu"


@pytest.mark.usefixtures("hub_answers")
def test_a_file_on_the_hub_is_fetched_alone(file: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path, asked = file(sparse=False), []

    def download(*names: str) -> str:
        asked.append(names)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    checkpoint = Checkpoint.open("owner/name-GGUF:part/name.Q8_0.gguf:relu")
    assert (checkpoint.path, asked) == (path, [("owner/name-GGUF", "part/name.Q8_0.gguf")])

    def fail(*names: str) -> str:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with refused(CheckpointError, "owner/name:x.gguf", "no route to host", "check the name"):
        Checkpoint.open("owner/name:x.gguf")


def test_collect_writes_nothing_for_a_file_that_it_refuses(
    file: Make, psp: Callable[..., Any], tmp_path: Path, data_file: Path
) -> None:
    path, out = file(sparse=False), tmp_path / "traces"
    result = psp("collect", "--model", path, "--data", data_file, "--out", out, "--tokens", 60)
    assert result.exit_code == 1
    assert f"--model {path}:relu" in result.output
    assert not out.exists()


def test_a_store_remembers_the_activation_in_the_model_s_name(
    file: Make, psp: Callable[..., Any], tmp_path: Path, data_file: Path
) -> None:
    from predictor.traces.store import TraceStore

    model, out = f"{file(sparse=False)}:relu", tmp_path / "traces"
    arguments = ("--data", data_file, "--out", out, "--tokens", 60)
    assert psp("collect", "--model", model, *arguments).exit_code == 0
    header = TraceStore.open(out).header
    assert (header.model, header.activation) == (model, "relu")
    assert Checkpoint.open(header.model).fingerprint == header.model_fingerprint
