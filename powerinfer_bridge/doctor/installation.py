"""Python, the installed packages against what psp declares, and torch against the cards."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from common.finding import Finding, note, ok, problem, warning
from common.machine import Gpu
from common.units import size
from common.version import package_version

OPTIONAL = {
    "triton": "the CUDA operators of 'psp bench-operators' need it",
    "llama-cpp-python": "one way to time a dense llama.cpp in 'psp bench-powerinfer'",
}
"""Packages that psp uses where they are there, and for what."""

_INSTALL = "python -m pip install --upgrade"
_BF16 = (8, 0)
"""The least compute capability that computes bfloat16 itself."""

_PAGE = "see pytorch.org/get-started"


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
    found = {name: package_version(name) for name in (*required, *OPTIONAL)}
    return PackageFacts(
        python=platform.python_version().rstrip("+"),  # a build of a branch
        least_python=_least(SpecifierSet(metadata.metadata("psp")["Requires-Python"] or "")),
        required=required,
        installed={name: version for name, version in found.items() if version is not None},
    )


def parse_requirements(lines: Iterable[str]) -> dict[str, str]:
    """Return minimum versions by package, those of extras and of other systems left out."""
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = _least(requirement.specifier)
    return found


def _least(versions: SpecifierSet) -> str:
    """Return the version that others must reach; empty if any will do."""
    return next((each.version for each in versions if each.operator == ">="), "")


def _older(version: str, least: str) -> bool:
    """Compare releases; what follows their numbers (`+cpu`, `rc1`) does not count."""
    try:
        return Version(Version(version).base_version) < Version(least)
    except InvalidVersion:
        return True


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


@dataclass(frozen=True, kw_only=True)
class TorchDevice:
    """A card as torch sees it.

    Attributes:
        name: its model.
        capability: compute capability, major and minor.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """What torch says of itself.

    Attributes:
        version: its version.
        cuda: version of CUDA that it was built for; None for a CPU build.
        available: whether it can use CUDA here.
        said: its warning when asked; empty if none.
        built_for: architectures with code in the build, such as `sm_90`.
        devices: cards that it can use.
    """

    version: str
    cuda: str | None
    available: bool
    said: str
    built_for: tuple[str, ...]
    devices: tuple[TorchDevice, ...]


def read_torch() -> TorchFacts:
    """Import torch and ask it."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    cards = range(torch.cuda.device_count() if available else 0)
    return TorchFacts(
        version=torch.__version__,
        cuda=torch.version.cuda,
        available=available,
        said=" ".join(str(said[0].message).split()) if said else "",
        built_for=tuple(torch.cuda.get_arch_list()) if available else (),
        devices=tuple(
            TorchDevice(
                name=card.name, capability=(card.major, card.minor), memory=card.total_memory
            )
            for card in map(torch.cuda.get_device_properties, cards)
        ),
    )


def torch_findings(facts: TorchFacts, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Judge the build against the cards in the machine."""
    yield _build(facts, gpus)
    for device in facts.devices:
        yield _device_finding(facts, device)


def _build(facts: TorchFacts, gpus: Sequence[Gpu]) -> Finding:
    name = gpus[0].name if gpus else ""
    if facts.cuda is None:
        found = f"{facts.version}, built without CUDA"
        if gpus:
            remedy = f"to use the {name}, install a CUDA build of torch; {_PAGE}"
            return warning("torch", found, remedy)
        return ok("torch", f"{found}; there is no NVIDIA GPU to use")
    found = f"{facts.version}, built for CUDA {facts.cuda}"
    if facts.available:
        return ok("torch", found)
    if not gpus:
        return note("torch", f"{found}; no NVIDIA GPU is visible, everything runs on the CPU")
    said = f" ({facts.said})" if facts.said else ""
    remedy = (
        f"update the driver (now {gpus[0].driver or 'unknown'}) to one for CUDA {facts.cuda}, or "
        f"install torch for an older CUDA; {_PAGE}"
    )
    return problem("torch", f"{found}, but cannot use the {name}{said}", remedy)


def _device_finding(facts: TorchFacts, device: TorchDevice) -> Finding:
    major, minor = device.capability
    found = f"{device.name}, {size(device.memory)}, compute capability {major}.{minor}"
    if facts.built_for and not _runs_on(device.capability, facts.built_for):
        remedy = f"install a build of torch with code for sm_{major}{minor}; {_PAGE}"
        return problem("GPU for torch", f"{found}: this torch has no code for it", remedy)
    if device.capability < _BF16:
        return note("GPU for torch", f"{found}, no bfloat16", "use --dtype float16 or float32")
    return ok("GPU for torch", f"{found}, bfloat16")


def _runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Binary code runs on later minors of its major; `compute_NN` compiles for later cards."""
    for name in built_for:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and (major, minor) <= capability:
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return False
