"""Names and outputs of an export: what is refused, what is replaced, what is never touched."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import make_export as run
from conftest import refused

from common.errors import ExportError, OutputError
from gguf_export.bundle import Bundle, export
from gguf_export.gpu_split import split
from gguf_export.manifest import MANIFEST, check_outputs
from gguf_export.settings import ExportConfig, SplitConfig


def files(root: Path) -> set[str]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in found if not path.name.endswith(MANIFEST)}


@pytest.mark.parametrize("name", ["model.gguf", "m.powerinfer.gguf.bak", ".powerinfer.gguf", ""])
def test_a_name_without_the_suffix_is_refused(
    model_dir: Path, exact_dir: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ExportError) as caught:
        run(model_dir, exact_dir, tmp_path / "out" / name)
    found = f"--out {tmp_path / 'out' / name}: expected a name that ends in .powerinfer.gguf"
    assert str(caught.value) == found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [235, 300])
def test_a_name_too_long_for_the_disk_is_refused(
    model_dir: Path, exact_dir: Path, tmp_path: Path, length: int
) -> None:
    with pytest.raises(OutputError) as caught:
        run(model_dir, exact_dir, tmp_path / "out" / f"{'x' * length}.powerinfer.gguf")
    assert len(str(caught.value).splitlines()) == 1
    assert "name too long" in str(caught.value)


@pytest.mark.parametrize(
    ("taken", "marker"),
    [
        ("m.powerinfer.gguf", None),
        ("m.predictors", "config.json"),
        ("activation", "activation_0.pt"),
    ],
)
def test_an_existing_output_is_kept_without_force_and_replaced_with_it(
    model_dir: Path,
    exact_dir: Path,
    exact_bundle: Bundle,
    tmp_path: Path,
    taken: str,
    marker: str | None,
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    old = tmp_path / taken / "activation_7.pt" if marker else tmp_path / taken
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"precious")
    if marker:
        (old.parent / marker).write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError) as caught:
        run(model_dir, exact_dir, out)
    expected = f"{tmp_path / taken} exists; pass --force to replace it or another --out"
    assert str(caught.value) == expected
    assert sorted(tmp_path.rglob("*")) == before
    assert old.read_bytes() == b"precious"

    run(model_dir, exact_dir, out, force=True)
    assert out.read_bytes() == exact_bundle.model_file.read_bytes()
    assert len(files(tmp_path)) == 6


@pytest.mark.parametrize("taken", ["m.predictors", "activation"])
def test_force_never_replaces_what_this_command_did_not_make(
    model_dir: Path, exact_dir: Path, tmp_path: Path, taken: str
) -> None:
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "mine.txt").write_bytes(b"precious")
    with pytest.raises(OutputError, match="was not made by this command; choose another --out"):
        run(model_dir, exact_dir, tmp_path / "m.powerinfer.gguf", force=True)
    assert files(tmp_path) == {f"{taken}/mine.txt"}


def test_two_models_never_share_a_directory(
    model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    """PowerInfer fixes the name of the statistics: a second model would replace the first's."""
    run(model_dir, exact_dir, tmp_path / "first.powerinfer.gguf")
    with pytest.raises(ExportError, match=r"belongs to first.*a directory of its own"):
        run(model_dir, exact_dir, tmp_path / "second.powerinfer.gguf", force=True)
    assert not (tmp_path / "second.powerinfer.gguf").exists()


@pytest.mark.parametrize("other", ["made without predictors", "of more layers", "its own"])
def test_statistics_that_no_other_file_can_have_are_replaced_with_force(
    model_dir: Path, exact_dir: Path, exact_bundle: Bundle, tmp_path: Path, other: str
) -> None:
    out, first = tmp_path / "m.powerinfer.gguf", tmp_path / "first.powerinfer.gguf"
    if other == "made without predictors":
        run(model_dir, Path("none"), first)
    elif other == "of more layers":
        shutil.copy(exact_bundle.model_file, first)
    statistics = tmp_path / "activation"
    shutil.copytree(exact_bundle.activation_directory, statistics)
    if other == "of more layers":
        shutil.copy(statistics / "activation_1.pt", statistics / "activation_2.pt")
    with refused(OutputError, f"{statistics} exists", "--force"):
        run(model_dir, exact_dir, out)
    bundle = run(model_dir, exact_dir, out, force=True)
    assert bundle.outputs["activation_directory"] == str(statistics)
    assert files(statistics) == {"activation_0.pt", "activation_1.pt"}


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("other", ["whole", "damaged"])
def test_statistics_that_another_file_may_have_stay(
    model_dir: Path,
    exact_dir: Path,
    exact_bundle: Bundle,
    tmp_path: Path,
    other: str,
    mine: bool,
) -> None:
    """Of both a file with statistics and one without, where this model has one there already."""
    here, out = tmp_path / "export", tmp_path / "export" / "m.powerinfer.gguf"
    shutil.copytree(exact_bundle.model_file.parent, here)
    if mine:
        shutil.copy(exact_bundle.model_file, out)
    if other == "damaged":
        (here / "exact.powerinfer.gguf").write_bytes(b"PWRI")
    before = files(here)
    belongs = "may belong" if mine else "belongs"
    told = f"{here / 'activation'}: {belongs} to exact.powerinfer.gguf, as far as the files tell"
    with refused(ExportError, told, "give every model a directory of its own"):
        run(model_dir, exact_dir, out, force=True)
    assert files(here) == before
    bundle = run(model_dir, Path("none"), out, force=mine)
    assert files(here) == before | {out.name}
    assert list(bundle.outputs) == ["model_file", "manifest"]
    assert any(told in line for line in bundle.warnings)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let writes past a size fail half way, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_by_the_dense_file_leaves_nothing(
    model_dir: Path, exact_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    config = ExportConfig(model=str(model_dir), predictors=exact_dir, out=out, dense=True)
    limits = files_up_to(100_000)
    try:
        with refused(OutputError, f"cannot write {tmp_path / 'm.dense.gguf'}", "File too large"):
            export(config, lambda path: limits.__enter__())
    finally:
        limits.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_file_leaves_no_directory_that_was_made_for_it(
    model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    def refuse(path: Path) -> None:
        raise ExportError(f"{path.name}: is wrong")

    out = tmp_path / "new" / "deep" / "m.powerinfer.gguf"
    config = ExportConfig(model=str(model_dir), predictors=exact_dir, out=out)
    with refused(ExportError, "is wrong"):
        export(config, refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_by_the_index_keeps_the_old_one(
    model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    out = run(model_dir, exact_dir, tmp_path / "m.powerinfer.gguf").model_file
    config = SplitConfig(file=out, vram_budget="1MiB", force=True)
    index = split(config).gpu_index
    before, content = files(tmp_path), index.read_bytes()
    assert len(content) > 8192
    with files_up_to(8192), refused(OutputError, f"cannot write {index}", "File too large"):
        split(config)
    assert files(tmp_path) == before
    assert index.read_bytes() == content


def test_a_dense_file_of_an_earlier_model_does_not_stay(
    model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "m.powerinfer.gguf", tmp_path / "m.dense.gguf"
    dense.write_bytes(b"of another model")
    with refused(OutputError, f"{dense} exists", "--force"):
        run(model_dir, exact_dir, out)
    assert files(tmp_path) == {dense.name}
    run(model_dir, exact_dir, out, force=True)
    assert not dense.exists()


def test_outputs_are_written_through_links(
    model_dir: Path, exact_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    here, disk = tmp_path / "here", tmp_path / "large disk"
    here.mkdir()
    (disk / "statistics").mkdir(parents=True)
    (disk / "statistics" / "activation_0.pt").write_bytes(b"old")
    (disk / "model").write_bytes(b"old")
    out = here / "exact.powerinfer.gguf"
    out.symlink_to(disk / "model")
    (here / "activation").symlink_to(disk / "statistics")
    (here / "exact.predictors").symlink_to("../large disk/predictors")
    with refused(OutputError, f"{out} exists", "--force"):
        run(model_dir, exact_dir, out)
    assert (disk / "model").read_bytes() == b"old"
    run(model_dir, exact_dir, out, force=True)
    assert (disk / "model").read_bytes() == exact_bundle.model_file.read_bytes()
    assert os.readlink(here / "exact.predictors") == "../large disk/predictors"
    assert all(path.is_symlink() or path.name.endswith(MANIFEST) for path in here.iterdir())
    assert check_outputs(out, Bundle.beside(out).written) == "6 files hold what was exported"
    assert files(disk) == {
        "model",
        *(f"statistics/activation_{layer}.pt" for layer in (0, 1)),
        *(f"predictors/{name}" for name in ("config.json", "model_0.pt", "model_1.pt")),
    }
