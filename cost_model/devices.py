"""What decides how fast weights are read: devices, their memories and the link between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from common.errors import PspError

BYTES_OF_GB = 1e9
BYTES_OF_GIB = 1 << 30


class HardwareError(PspError):
    """A description of hardware that is damaged, incomplete or impossible."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What share of a memory's bandwidth each kind of read reaches.

    The kinds are those of PowerInfer's kernels: a dense matrix times a vector
    (ggml.c:ggml_compute_forward_mul_mat), rows of gate and up that the predictor lets through
    (ggml_compute_forward_mul_mat_sparse), and rows of the transposed down matrix
    (ggml_compute_forward_mul_mat_axpy). All PowerInfer@d3ebd7c.

    Attributes:
        matrix: share of a dense product.
        rows: share of chosen rows of gate and up.
        columns: share of chosen columns of down.
    """

    matrix: float
    rows: float
    columns: float

    def __post_init__(self) -> None:
        """Refuse shares that are none; a share above 1 says that caches helped."""
        for field in fields(self):
            _positive(f"efficiency.{field.name}", getattr(self, field.name))


@dataclass(frozen=True, kw_only=True)
class Device:
    """A CPU or a GPU with its memory.

    Attributes:
        name: of the device.
        bandwidth: bytes per second; the theoretical peak of a datasheet, or a measured streaming
            read.
        memory: bytes.
        efficiency: shares of `bandwidth` that are reached.
        layer_seconds: what a layer costs beside its reads: starting kernels, threads waiting for
            each other, activations and norms.
        source: where the figures come from.
    """

    name: str
    bandwidth: float
    memory: int
    efficiency: Efficiency
    layer_seconds: float
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse impossible figures."""
        _positive("bandwidth", self.bandwidth)
        _positive("memory", self.memory)
        _not_negative("layer_seconds", self.layer_seconds)

    def seconds(self, *, matrix: float = 0.0, rows: float = 0.0, columns: float = 0.0) -> float:
        """Return Σ bytes / (bandwidth · efficiency) over the kinds of reads.

        Args:
            matrix: bytes of dense products.
            rows: bytes of chosen rows.
            columns: bytes of chosen columns.
        """
        share = self.efficiency
        read = matrix / share.matrix + rows / share.rows + columns / share.columns
        return read / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects both memories.

    Attributes:
        bandwidth: bytes per second in one direction.
        efficiency: share of it that copies reach.
        copy_seconds: what each copy costs, however small.
        source: where the figures come from.
    """

    bandwidth: float
    efficiency: float
    copy_seconds: float
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse impossible figures."""
        _positive("bandwidth", self.bandwidth)
        _positive("efficiency", self.efficiency)
        _not_negative("copy_seconds", self.copy_seconds)

    def seconds(self, size: float, copies: float) -> float:
        """Return size / (bandwidth · efficiency) + copies · copy_seconds."""
        return size / (self.bandwidth * self.efficiency) + copies * self.copy_seconds


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine.

    Attributes:
        name: preset, file or `this`.
        cpu: the CPU and its memory.
        gpu: the GPU, or None.
        link: between them; there if and only if a GPU is.
        threads: CPU threads that measured figures are for; None for datasheets' figures.
        notes: what a reader of its estimates must know.
    """

    name: str
    cpu: Device
    gpu: Device | None = None
    link: Link | None = None
    threads: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a GPU without a link and the reverse."""
        if (self.gpu is None) != (self.link is None):
            raise HardwareError("expected both gpu and link, or neither", "add the missing one")
        if self.threads is not None and self.threads < 1:
            raise HardwareError(f"threads is {self.threads}, expected at least 1")

    def byte_seconds(self) -> dict[str, float]:
        """Return what one byte of an FFN neuron costs on either device, seconds.

        Of a gated neuron two bytes in three are rows (gate and up), one is a column (down). A
        choice of neurons, ranks or thresholds may weigh bytes by it.
        """
        devices = {"cpu": self.cpu} | ({"gpu": self.gpu} if self.gpu else {})
        return {name: device.seconds(rows=2 / 3, columns=1 / 3) for name, device in devices.items()}

    @property
    def predictor_weight(self) -> float:
        """What a predictor's byte costs relative to one of a neuron, for models beyond the VRAM.

        PowerInfer puts predictors into VRAM before any neuron, and it is the neurons left to the
        CPU that a token waits for (`cost_model.roofline`). Without a GPU the CPU reads both.
        """
        place = self.gpu or self.cpu
        return place.seconds(matrix=1.0) / self.byte_seconds()["cpu"]


def _positive(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise HardwareError(f"{key} is {value:g}, expected a number above 0")


def _not_negative(key: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise HardwareError(f"{key} is {value:g}, expected a number of at least 0")
