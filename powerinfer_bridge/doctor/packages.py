"""Python and the installed packages against what psp declares."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from powerinfer_bridge.doctor.finding import Finding, note, ok, problem

OPTIONAL = {
    "triton": "the CUDA operators of 'psp bench-operators' need it",
    "llama-cpp-python": "one way to time a dense llama.cpp in 'psp bench-powerinfer'",
}
"""Packages that psp uses where they are there, and for what."""

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9][0-9.]*))?")
_NUMBERS = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_INSTALL = "python -m pip install --upgrade"


@dataclass(frozen=True, kw_only=True)
class PackageFacts:
    """Python and its packages.

    Attributes:
        python: its version.
        least_python: the least that psp declares, as numbers joined by dots.
        required: minimum version by package, empty if any will do.
        installed: version by package, those that are there.
    """

    python: str
    least_python: str
    required: Mapping[str, str]
    installed: Mapping[str, str]


def read_packages() -> PackageFacts:
    """Ask the interpreter; nothing is imported."""
    required = parse_requirements(metadata.requires("psp") or [])
    found = {name: _version(name) for name in (*required, *OPTIONAL)}
    return PackageFacts(
        python=platform.python_version(),
        least_python=metadata.metadata("psp")["Requires-Python"].lstrip(">= "),
        required=required,
        installed={name: version for name, version in found.items() if version is not None},
    )


def parse_requirements(lines: Iterable[str]) -> dict[str, str]:
    """Return minimum versions by package, those of extras left out."""
    found = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        match = _REQUIREMENT.match(requirement.strip())
        if match is not None and "extra" not in marker:
            found[match[1]] = match[2] or ""
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _older(version: str, least: str) -> bool:
    """Compare release numbers; what follows them (`+cpu`, `rc1`) does not count."""
    match = _NUMBERS.match(version)
    numbers = [list(map(int, text.split("."))) for text in (match[0] if match else "0", least)]
    length = max(map(len, numbers))
    have, want = (each + [0] * (length - len(each)) for each in numbers)
    return have < want


def package_findings(facts: PackageFacts) -> Iterator[Finding]:
    """Judge versions."""
    yield _python(facts)
    bad = [finding for name in facts.required if (finding := _required(facts, name))]
    yield from bad
    if not bad:
        yield ok("packages", f"all {len(facts.required)} that psp declares, none too old")
    for name, use in OPTIONAL.items():
        if name not in facts.installed:
            yield note(name, f"not installed; {use}", f"to use it: {_INSTALL} {name}")
        else:
            yield ok(name, f"{facts.installed[name]}")


def _python(facts: PackageFacts) -> Finding:
    if facts.least_python and _older(facts.python, facts.least_python):
        found = f"{facts.python} is too old"
        return problem("Python", found, f"make an environment with {facts.least_python} or later")
    return ok("Python", facts.python)


def _required(facts: PackageFacts, name: str) -> Finding | None:
    least, version = facts.required[name], facts.installed.get(name)
    wanted = f"'{name}>={least}'" if least else name
    if version is None:
        return problem(name, "not installed", f"{_INSTALL} {wanted}")
    if least and _older(version, least):
        return problem(name, f"{version} is older than {least}", f"{_INSTALL} {wanted}")
    return None
