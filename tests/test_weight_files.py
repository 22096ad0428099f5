"""Which weights of a directory are read: those that transformers loads, or none.

The right values come from transformers' own loader: which file it takes, which head, what it would
fill with random numbers.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from directories import agree, bare_llama, clear, configure, tensors_of, theirs
from families import BY_NAME, random_tensors, save_tensors, write

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError, PspError
from gguf_export.predictor_kinds import open_predictors
from gguf_export.pwri.statistics import read_saved
from gguf_files.reader import GGUFFile

HEAD = "lm_head.weight"
AGAIN = "fetch the checkpoint again"

refused = partial(conftest.refused, CheckpointError)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Return an untied LLaMA without its weights' file."""
    return bare_llama(tmp_path / "model")


KINDS = ("safetensors", "sharded safetensors", "bin", "sharded bin")
CHOSEN = {
    "safetensors": "model.safetensors",
    "sharded safetensors": "model.safetensors.index.json",
    "bin": "pytorch_model.bin",
    "sharded bin": "pytorch_model.bin.index.json",
}
MIXES = [mix for size in range(1, 5) for mix in itertools.combinations(KINDS, size)]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: " + ".join(mix))
def test_of_several_sets_of_weights_the_one_that_transformers_loads_is_read(
    llama: Path, mix: tuple[str, ...]
) -> None:
    for kind in mix:
        save_tensors(tensors_of(llama, KINDS.index(kind)), llama, kind)
    model, invented = theirs(llama)
    assert not invented
    checkpoint = Checkpoint.open(llama)
    state = model.state_dict()
    for rule in checkpoint.architecture.tensors:
        name = rule.source.format(layer=1)
        assert torch.equal(checkpoint.read(rule, 1), state[name])
    notes = "\n".join(checkpoint.notes)
    for kind in mix[1:]:
        assert CHOSEN[kind] in notes
    assert (CHOSEN[mix[0]] in notes) == (len(mix) > 1)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_whose_shards_are_gone_does_no_harm_beside_a_whole_file(
    llama: Path, kind: str
) -> None:
    save_tensors(tensors_of(llama, 1), llama, f"sharded {kind}")
    for shard in llama.glob("*-of-*"):
        shard.unlink()
    with refused("shard is missing", AGAIN):
        Checkpoint.open(llama)
    save_tensors(tensors_of(llama, 2), llama, kind)
    assert f"{CHOSEN[f'sharded {kind}']} beside it" in "\n".join(agree(llama).notes)


@pytest.mark.parametrize("kind", ["safetensors", "sharded safetensors"])
def test_the_weights_that_the_config_names_come_first(llama: Path, kind: str) -> None:
    save_tensors(tensors_of(llama, 1), llama, kind)
    name = CHOSEN[kind].replace("model", "other")
    (llama / CHOSEN[kind]).rename(llama / name)
    save_tensors(tensors_of(llama, 2), llama, "safetensors")
    configure(llama, transformers_weights=name)
    notes = agree(llama).notes
    assert any(name in line and "model.safetensors beside it" in line for line in notes)


@pytest.mark.parametrize(
    "name",
    [
        "x.bin",
        "../x.safetensors",
        "a/x.safetensors",
        3,
        "x.safetensors",
        f"{4000 * 'x'}.safetensors",
    ],
)
def test_named_weights_that_transformers_would_refuse_are_refused(
    llama: Path, name: object
) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    shutil.copy(llama / "model.safetensors", llama.parent / "x.safetensors")
    configure(llama, transformers_weights=name)
    with refused("transformers_weights"):
        Checkpoint.open(llama)


TIES = [True, False, None]
STORED = ["embedding", "head", "both alike", "both"]
_ACTIVATION: dict[str, dict[str, Any]] = {"falcon-7b": {"activation": "relu", "hidden_act": None}}
TIED_FAMILIES = ["relu-llama", "relu-mistral", "opt-125m", "falcon-7b"]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("name", TIED_FAMILIES)
def test_the_output_head_is_the_one_that_transformers_uses(
    tmp_path: Path, name: str, tie: bool | None, stored: str
) -> None:
    """Where transformers would invent one of both, there is a refusal."""
    # FalconConfig knows no hidden_act, which ReluFalcon's own code reads.
    variant = BY_NAME[name].changed(
        tie_word_embeddings=tie, sliding_window=None, **_ACTIVATION.get(name, {})
    )
    path = write(variant, tmp_path / "model", b"").path
    clear(path)
    tensors = random_tensors(variant.shapes(variant.config), torch.float32, 1)
    embedding = next(iter(tensors))
    tensors[HEAD] = torch.randn_like(tensors[embedding]) / 8
    if stored == "both alike":
        tensors[HEAD] = tensors[embedding]
    if stored in ("embedding", "head"):
        del tensors[HEAD if stored == "embedding" else embedding]
    save_tensors(tensors, path, "bin" if stored == "both alike" else "safetensors")
    tied = variant.family in ("opt", "falcon") if tie is None else tie
    if stored in ("embedding", "head") and not tied:
        _, invented = theirs(path)
        assert invented == {HEAD if stored == "embedding" else embedding}
        with refused(f"tensor {HEAD if stored == 'embedding' else embedding} is missing"):
            Checkpoint.open(path)
        return
    checkpoint = agree(path)
    assert checkpoint.shape.tied_embeddings == (tied and stored != "both")
    told = any("tie_word_embeddings" in line for line in checkpoint.notes)
    assert told == (tied and stored == "both")


def test_one_number_makes_a_head_another_tensor(tmp_path: Path) -> None:
    written = write(BY_NAME["llama-tied"], tmp_path / "model", b"")
    tensors = dict(written.tensors)
    tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
    save_tensors(tensors, written.path, "safetensors")
    assert Checkpoint.open(written.path).shape.tied_embeddings
    tensors[HEAD][-1, -1] += 1
    save_tensors(tensors, written.path, "safetensors")
    assert not Checkpoint.open(written.path).shape.tied_embeddings


@pytest.mark.parametrize("declared", [None, [], ["LlamaModel"]])
@pytest.mark.parametrize("tie", [True, False])
def test_model_type_tells_the_class_where_architectures_does_not(
    tmp_path: Path, declared: list[str] | None, tie: bool
) -> None:
    written = write(BY_NAME["llama-tied"].changed(tie_word_embeddings=tie), tmp_path / "model", b"")
    clear(written.path)
    configure(written.path, architectures=declared)
    bare = {name.removeprefix("model."): t for name, t in written.tensors.items() if name != HEAD}
    save_tensors(bare, written.path, "safetensors")
    if tie:
        assert agree(written.path).architecture.name == "llama"
        return
    assert theirs(written.path)[1] == {HEAD}
    with refused(f"tensor {HEAD} is missing", "without its output head", "causal language model"):
        Checkpoint.open(written.path)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "base_model.model."]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_wrapper_puts_before_every_name_is_left_out_with_a_note(
    llama: Path, kind: str, prefix: str
) -> None:
    tensors = tensors_of(llama, 3)
    save_tensors({prefix + name: tensor for name, tensor in tensors.items()}, llama, kind)
    checkpoint = Checkpoint.open(llama)
    assert any(repr(prefix) in line for line in checkpoint.notes)
    for rule in checkpoint.architecture.tensors:
        assert torch.equal(checkpoint.read(rule, 1), tensors[rule.source.format(layer=1)])


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pointer_of_git_lfs_in_the_place_of_weights_is_called_one(llama: Path, kind: str) -> None:
    save_tensors(tensors_of(llama, 1), llama, kind)
    file = sorted(f for f in llama.iterdir() if f.suffix in (".safetensors", ".bin"))[-1]
    file.write_text(POINTER)
    with refused(str(file), "Git LFS pointer", "git lfs pull"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("read", [Checkpoint.open, GGUFFile, open_predictors, read_saved])
def test_a_pointer_of_git_lfs_in_the_place_of_a_file_is_called_one(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    file = tmp_path / "m.gguf"
    file.write_text(POINTER)
    with pytest.raises(PspError) as caught:
        read(file)
    line = f"{file}: is a Git LFS pointer, the file itself was not fetched; install git-lfs and run"
    assert str(caught.value) == f"{line} 'git lfs pull' in that directory"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_in_the_place_of_a_text_is_called_one(llama: Path, name: str) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    (llama / name).write_text(POINTER)
    with refused(str(llama / name), "Git LFS pointer", "git lfs pull"):
        Checkpoint.open(llama)


def test_a_pointer_that_is_passed_over_does_no_harm(llama: Path) -> None:
    save_tensors(tensors_of(llama, 1), llama, "safetensors")
    (llama / "pytorch_model.bin").write_text(POINTER)
    agree(llama)
