"""Weight files: every layout gives the same tensors, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from damages import compress
from families import BY_NAME, save_tensors, write
from safetensors.torch import save_file

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from architectures.tensor_files import TensorFiles
from common.errors import CheckpointError

KINDS = ("safetensors", "bin", "legacy")
LAYOUTS = (*KINDS, *(f"sharded {kind}" for kind in KINDS))
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
AGAIN = "fetch the checkpoint again"

refused = partial(conftest.refused, CheckpointError)


def some_tensors(factor: float = 1.0) -> dict[str, torch.Tensor]:
    wide = torch.arange(60, dtype=torch.float32).reshape(12, 5) * factor
    return {
        "a.weight": wide.half(),
        "b.weight": wide.bfloat16(),
        "c.weight": wide,
        "d.bias": wide[0].double(),
    }


def save_bin(path: Path, content: object, kind: str = "bin") -> Path:
    file = path / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=kind == "bin")
    return file


def test_a_file_that_is_gone_since_it_was_found_costs_one_line(tmp_path: Path) -> None:
    save_tensors(some_tensors(), tmp_path, "safetensors")
    files = TensorFiles(tmp_path)
    [file] = set(files.shards.values())
    file.unlink()
    for use in (files.read, files.describe):
        with refused(str(file), "cannot be read", "No such file", "look at the file and its disk"):
            use("a.weight")


def test_a_file_that_is_there_is_not_said_to_be_missing(tmp_path: Path) -> None:
    save_tensors(some_tensors(), tmp_path, "safetensors")
    files, held = TensorFiles(tmp_path), list[int]()
    assert files.shards
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        with suppress(OSError):
            while True:
                held.append(os.dup(0))
        with refused("cannot be read (Too many open files)"):
            files.read("a.weight")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for each in held:
            os.close(each)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_tensors_as_stored(tmp_path: Path, layout: str) -> None:
    tensors = some_tensors()
    save_tensors(tensors, tmp_path, layout)
    files = TensorFiles(tmp_path)
    assert files.shards.keys() == tensors.keys()
    assert len(set(files.shards.values())) == (3 if layout.startswith("sharded") else 1)
    for name, tensor in tensors.items():
        assert files.describe(name) == (tuple(tensor.shape), tensor.dtype)
        assert files.read(name).dtype == tensor.dtype
        assert torch.equal(files.read(name), tensor)
        assert torch.equal(files.read(name, 3), tensor[:3])
        assert torch.equal(files.read(name, 99), tensor)


@pytest.mark.parametrize("layout", ["bin", "legacy"])
def test_tensors_that_share_memory_or_are_transposed_are_read_right(
    tmp_path: Path, layout: str
) -> None:
    wide = torch.arange(60.0).reshape(12, 5)
    save_bin(tmp_path, {"tied": wide, "head": wide, "turned": wide.T, "part": wide[3:7]}, layout)
    files = TensorFiles(tmp_path)
    assert torch.equal(files.read("head"), wide)
    assert torch.equal(files.read("turned"), wide.T)
    assert torch.equal(files.read("turned", 2), wide.T[:2])
    assert torch.equal(files.read("part", 2), wide[3:5])


@pytest.mark.parametrize("other", ["bin", "sharded bin"])
@pytest.mark.parametrize("preferred", ["safetensors", "sharded safetensors"])
def test_safetensors_are_preferred_where_both_are(
    tmp_path: Path, preferred: str, other: str
) -> None:
    save_tensors(some_tensors(2), tmp_path, other)
    assert torch.equal(TensorFiles(tmp_path).read("c.weight"), some_tensors(2)["c.weight"])
    save_tensors(some_tensors(1), tmp_path, preferred)
    assert torch.equal(TensorFiles(tmp_path).read("c.weight"), some_tensors(1)["c.weight"])


def test_a_zip_is_mapped_not_read(tmp_path: Path) -> None:
    """A model of many gigabytes must not be read into memory for its names."""
    file = save_bin(tmp_path, {"big": torch.zeros(8 << 20)})
    before = _anonymous_bytes()
    files = TensorFiles(tmp_path)
    assert files.describe("big") == ((8 << 20,), torch.float32)
    assert file.stat().st_size > 32 << 20 > 2 * (_anonymous_bytes() - before)


def _anonymous_bytes() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return 1024 * int(line.split()[1])


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def evil_file(path: Path, kind: str, marker: Path) -> Path:
    content = {"model.norm.weight": torch.zeros(3), "evil": Evil(marker)}
    if kind != "pickle":
        return save_bin(path, content, kind)
    file = path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"evil": Evil(marker)}))
    return file


@pytest.mark.parametrize("kind", ["bin", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "owned"
    file = evil_file(tmp_path, kind, marker)
    with refused(str(file), "damaged", AGAIN):
        _ = TensorFiles(tmp_path).shards
    assert not marker.exists()
    # It would have worked.
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.is_dir()


def test_a_malicious_shard_of_an_index_is_refused_and_not_run(tmp_path: Path) -> None:
    save_tensors(some_tensors(), tmp_path, "sharded bin")
    shard = tmp_path / "pytorch_model-00002-of-00003.bin"
    evil_file(tmp_path, "bin", tmp_path / "owned").rename(shard)
    with refused(str(shard), "damaged", AGAIN):
        _ = TensorFiles(tmp_path).shards
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], torch.zeros(2), {"model": {"a": torch.zeros(2)}}, {1: torch.zeros(2)}, 7],
    ids=["list", "tensor", "nested", "numbered", "number"],
)
def test_a_bin_that_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    file = save_bin(tmp_path, content)
    with refused(str(file), "not a mapping of names to tensors", AGAIN):
        _ = TensorFiles(tmp_path).shards


ODD_TENSORS = {
    "terabytes of one number": torch.zeros(1, 1).expand(2**20, 2**20),
    "no numbers": torch.zeros(2, 2, device="meta"),
    "sparse": torch.eye(4).to_sparse(),
}


@pytest.mark.parametrize("tensor", ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_a_tensor_without_all_its_numbers_is_refused_when_read(
    tmp_path: Path, tensor: torch.Tensor
) -> None:
    file = save_bin(tmp_path, {"good": torch.zeros(2), "odd": tensor})
    files = TensorFiles(tmp_path)
    assert len(files.read("good")) == 2
    with refused(str(file), "tensor odd", AGAIN):
        files.read("odd")
    with refused(str(file), "tensor odd", AGAIN):
        files.read("odd", 1)


def test_a_compressed_bin_is_refused(tmp_path: Path) -> None:
    file = save_bin(tmp_path, {"a": torch.zeros(5000)})
    compress(file)
    with refused(str(file), "compressed", AGAIN):
        _ = TensorFiles(tmp_path).shards


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_refused(tmp_path: Path, layout: str, share: float) -> None:
    save_tensors({"a": torch.randn(500), "b": torch.randn(500)}, tmp_path, layout)
    file = min(path for path in tmp_path.iterdir() if path.suffix != ".json")
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data)) if share >= 0 else -1])
    with refused(str(file), "truncated or damaged", AGAIN):
        _ = TensorFiles(tmp_path).shards


@pytest.mark.parametrize("layout", ["sharded safetensors", "sharded bin"])
def test_a_missing_shard_is_refused(tmp_path: Path, layout: str) -> None:
    save_tensors(some_tensors(), tmp_path, layout)
    lost = next(path for path in tmp_path.iterdir() if "00002" in path.name)
    lost.unlink()
    with refused(str(lost), "shard is missing", AGAIN):
        _ = TensorFiles(tmp_path).shards


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"")
    with refused(str(tmp_path), "no weights", "model.safetensors", "pytorch_model.bin", AGAIN):
        _ = TensorFiles(tmp_path).shards


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("shard", ["../x.bin", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_cannot_lead_out_of_the_directory(tmp_path: Path, index: str, shard: str) -> None:
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": shard}}))
    with refused(str(tmp_path), shard, AGAIN):
        _ = TensorFiles(tmp_path).shards


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', "{", "[]"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: str, content: str) -> None:
    (tmp_path / index).write_text(content)
    with refused(str(tmp_path / index), AGAIN):
        _ = TensorFiles(tmp_path).shards


FC1 = "decoder.layers.1.fc1.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(FC1), ["tensor model.decoder.layers.1.fc1.weight is missing", AGAIN]),
        (
            lambda t: t.update({FC1: t[FC1].T.contiguous()}),
            [f"tensor {FC1} has shape (64, 132)", "(132, 64)", AGAIN],
        ),
        (
            lambda t: t.update({FC1: t[FC1].to(torch.int8)}),
            [f"tensor {FC1} has dtype", "8", "quantised", "original"],
        ),
        (
            lambda t: t.update({FC1: t[FC1].to(torch.float8_e4m3fn)}),
            [f"tensor {FC1} has dtype", "8", "quantised", "original"],
        ),
    ],
    ids=["missing", "transposed", "int8", "float8"],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, layout: str, change: Change, parts: list[str]
) -> None:
    written = write(BY_NAME["opt-6.7b"], tmp_path / "model", b"")
    Checkpoint.open(written.path)
    for file in written.path.glob("pytorch_model*"):
        file.unlink()
    change(written.tensors)
    save_tensors(written.tensors, written.path, layout)
    with refused(str(written.path), *parts):
        Checkpoint.open(written.path)


@pytest.mark.parametrize("name", ["minicpm", "opt-6.7b", "falcon-40b"])
def test_a_model_runs_alike_from_every_layout(tmp_path: Path, name: str) -> None:
    tokens = torch.arange(12, 40)[None]
    results, prints = [], set()
    for number, layout in enumerate(LAYOUTS):
        path = tmp_path / str(number)
        written = write(BY_NAME[name], path, b"")
        for file in (*path.glob("*.safetensors*"), *path.glob("*.bin*")):
            file.unlink()
        save_tensors(written.tensors, path, layout)
        checkpoint = Checkpoint.open(path)
        prints.add(checkpoint.fingerprint)
        results.append(load_model(checkpoint, dtype=torch.float32, device="cpu").logits(tokens))
    assert len(prints) == 1
    assert results[0].std() > 0.3
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_integer_of_safetensors_is_described_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert TensorFiles(tmp_path).describe("a") == ((3,), "I8")
