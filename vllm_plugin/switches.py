"""The plugin's own variables of the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import SettingsError

SPARSE, STATISTICS = "PSP_VLLM_SPARSE", "PSP_VLLM_STATS"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What they say.

    Attributes:
        sparse: `PSP_VLLM_SPARSE`: run steps of few tokens with the sparse operators.
        statistics: `PSP_VLLM_STATS`: directory for activation counts; None for none.
    """

    sparse: bool
    statistics: Path | None


def read_switches(environment: Mapping[str, str]) -> Switches:
    """Return them.

    Raises:
        SettingsError: `PSP_VLLM_SPARSE` is neither 0 nor 1, or the directory's place is a file.
    """
    sparse = environment.get(SPARSE, "").strip()
    if sparse not in ("", "0", "1"):
        raise SettingsError(f"{SPARSE} is {sparse!r}, expected 0 or 1", f"set {SPARSE}=1")
    text = environment.get(STATISTICS, "").strip()
    directory = Path(text) if text else None
    if directory is not None and directory.exists() and not directory.is_dir():
        raise SettingsError(f"{STATISTICS} is {text}, which is a file", "name a directory")
    return Switches(sparse=sparse == "1", statistics=directory)
