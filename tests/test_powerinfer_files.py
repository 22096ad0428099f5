"""Which files PowerInfer runs, told by the real thing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT
from rewriting import rewritten

from gguf_export.bundle import Bundle
from gguf_files.reader import GGUFFile
from powerinfer_bridge.programs.build import THRESHOLD_VARIABLE, threshold_read
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify

pytestmark = pytest.mark.powerinfer


def perplexity(programs: Path, file: Path) -> float:
    return PowerInfer(programs).perplexity(file, TEXT * 4, 64, None, threads=1)


@pytest.mark.parametrize(
    "change", [{"alignment": 8}, {"alignment": 16}, {"alignment": 64}, {"version": 2}], ids=str
)
def test_alignments_and_version_2_run_and_pass(
    powerinfer_bin: Path, exact_bundle: Bundle, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = rewritten(exact_bundle.model_file, tmp_path / "changed.powerinfer.gguf", **change)
    assert verify(file).ok
    assert perplexity(powerinfer_bin, file) == perplexity(powerinfer_bin, exact_bundle.model_file)


def test_keys_may_be_missing_that_have_defaults(
    powerinfer_bin: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    names = ("general.name", "llama.rope.freq_base", "powerinfer.sparse_threshold")
    file = tmp_path / "changed.powerinfer.gguf"
    rewritten(exact_bundle.model_file, file, keys=dict.fromkeys(names))
    assert not set(names) & set(GGUFFile(file).values)
    assert verify(file).ok
    assert perplexity(powerinfer_bin, file) == perplexity(powerinfer_bin, exact_bundle.model_file)


@pytest.mark.parametrize(
    "text", ["", "0,5", "1,5", "1e", "1_0", "high", " 2", ".5.", "0x1p3", "inf"]
)
def test_a_threshold_in_the_environment_is_read_as_psp_says(
    powerinfer_bin: Path, exact_bundle: Bundle, tmp_path: Path, text: str
) -> None:
    run = subprocess.run(
        [powerinfer_bin / "perplexity", "-m", exact_bundle.model_file, "-f", os.devnull],
        env={THRESHOLD_VARIABLE: text},
        cwd=tmp_path,  # it leaves a log
        capture_output=True,
        text=True,
        check=False,
    )
    (found,) = re.findall(r"sparse_pred_threshold = (\S+)", run.stderr)
    assert found == f"{threshold_read(text):.2f}"


def test_a_run_in_a_german_locale_is_timed(
    powerinfer_bin: Path,
    exact_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maker = shutil.which("localedef")
    command = [str(maker), "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")]
    if maker is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs localedef and the source of de_DE to make a locale of")
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    run = PowerInfer(powerinfer_bin).generate(exact_bundle.model_file, "The", 4, threads=1)
    assert run.decode.tokens == 3
