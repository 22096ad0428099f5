"""Names and outputs of an export: what is refused, what is replaced, what is never touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_export as run

from common.errors import ExportError, OutputError
from gguf_export.bundle import Bundle


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


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
