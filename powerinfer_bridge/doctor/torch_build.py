"""torch: what it was built for, and whether that and the graphics card agree."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from powerinfer_bridge.doctor.finding import Finding, note, ok, problem, size, warning
from powerinfer_bridge.doctor.gpu import Gpu

_PAGE = "see pytorch.org/get-started"


@dataclass(frozen=True, kw_only=True)
class TorchDevice:
    """A card as torch sees it.

    Attributes:
        name: its model.
        capability: compute capability, major and minor.
        memory: bytes.
        bf16: whether it computes bfloat16 itself.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    bf16: bool


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
    devices = [_device(number) for number in range(torch.cuda.device_count() if available else 0)]
    return TorchFacts(
        version=torch.__version__,
        cuda=torch.version.cuda,
        available=available,
        said=" ".join(str(said[0].message).split()) if said else "",
        built_for=tuple(torch.cuda.get_arch_list()) if available else (),
        devices=tuple(devices),
    )


def _device(number: int) -> TorchDevice:
    import torch

    properties = torch.cuda.get_device_properties(number)
    capability = (properties.major, properties.minor)
    return TorchDevice(
        name=properties.name,
        capability=capability,
        memory=properties.total_memory,
        bf16=capability >= (8, 0),
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
    if not device.bf16:
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
