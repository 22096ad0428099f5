"""The command line of the benchmark: where it finds PowerInfer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from stand_ins import TIMINGS_FORMAT, build

from gguf_export.bundle import Bundle

SMALL_BENCH = ("--ctx", 64, "--chunks", 2, "-n", 4, "--repeats", 1, "--threads", 1)
FAKE_MAIN = """
import os, sys
if '--help' in sys.argv:
    sys.exit(print('--vram-budget'))
ms = 600 if 'LLAMA_SPARSE_PRED_THRESHOLD' in os.environ else 300
print('The text')
sys.stderr.write(TIMINGS.format(load_ms=50, prompt_ms=20, ms=ms, count=15))
""".replace("TIMINGS", repr(TIMINGS_FORMAT))
FAKE_PERPLEXITY = """
import os, sys
if '--help' in sys.argv:
    sys.exit(print('--vram-budget'))
print('Final estimate: PPL =', 12 if 'LLAMA_SPARSE_PRED_THRESHOLD' in os.environ else 12.6)
"""


@pytest.fixture
def powerinfer(tmp_path: Path) -> Path:
    """A build whose programs answer at once."""
    return build(tmp_path / "power infer", FAKE_MAIN, FAKE_PERPLEXITY)


@pytest.mark.parametrize("by", ["option", "variable"])
def test_bench_runs_powerinfer_where_one_is_named(
    psp: Callable[..., Result],
    exact_bundle: Bundle,
    powerinfer: Path,
    text_file: Path,
    by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["bench-powerinfer", exact_bundle.model_file, "--data", text_file, *SMALL_BENCH]
    if by == "option":
        command += ["--powerinfer-bin", powerinfer]
    else:
        monkeypatch.setenv("PSP_POWERINFER_BIN", str(powerinfer))
    found = json.loads(psp(*command, "--json").stdout)
    assert found["engine"] == "PowerInfer"
    speeds = {arm["name"]: arm["decode"]["tokens_per_second"] for arm in found["arms"]}
    assert speeds == {"all_neurons": 25.0, "predicted": 50.0}
    assert (found["tokens_per_second"], found["speedup"]) == (50.0, 2.0)
    assert (found["ppl_sparse"], found["ppl_dense"]) == (12.6, 12.0)
    assert found["ppl_gap"] == pytest.approx(0.05)
    table = psp(*command).stdout
    assert "engine: PowerInfer; sparsity and recall by the embedded engine" in table
    assert "perplexity gap +5.000 %" in table
