"""Hardware: what decides how fast weights are read, and its descriptions as YAML.

Devices, their memories and the link between them come from presets (`hardware.yaml`), from files of
one's own, or are measured (`cost_model.measure`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from common.errors import PspError
from common.files import write_bytes
from common.typed_json import LEFT_OUT, Closed, Count, JsonError, Positive, Range, parse, plain
from common.units import GIB
from common.yaml_text import parse_yaml, read_yaml_text

THIS = "this"

THREAD_SECONDS = 115e-6
"""What a token costs PowerInfer beside its layers, for each thread that it starts, where a
description does not say.

PowerInfer d3ebd7c starts its threads but one anew for every token (ggml.c:ggml_graph_compute). A
token of 8 threads cost an H100's host 0.8 ms beside its layers (docs/estimate.md), one of a single
thread less than 0.02 ms on another CPU. That it grows evenly between is assumed.
"""

ASSUMED_THREADS = 8
"""CPU threads where a description names no number."""

_GB = 1e9

# Above 1e15 no figure here means anything.
_Figure = Annotated[float, Range(0, 1e15, open=True)]
_Delay = Annotated[float, Range(0)]


class HardwareError(PspError):
    """A description of hardware that is damaged, incomplete or impossible."""


@dataclass(frozen=True, kw_only=True)
class Efficiency(Closed):
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

    matrix: _Figure
    rows: _Figure
    columns: _Figure


@dataclass(frozen=True, kw_only=True)
class Device:
    """A CPU or a GPU with its memory.

    Attributes:
        name: of the device.
        bandwidth: bytes per second; the theoretical peak of a datasheet, or a measured streaming
            read.
        memory: bytes.
        efficiency: shares of `bandwidth` that are reached.
        layer_seconds: what a layer of PowerInfer's sparse graph costs beside its reads: starting
            kernels, threads waiting for each other, activations and norms.
        dense_layer_seconds: the same in a dense engine; None where it was not told apart.
        compute: operations per second at most in products of matrices, of 16-bit numbers on a GPU
            and of float32 on a CPU; None where nobody said. Decoding a token is not bound by it.
        compute_efficiency: share of `compute` that a model's layers reach.
        source: where the figures come from.
    """

    name: str
    bandwidth: Positive
    memory: Count
    efficiency: Efficiency
    layer_seconds: _Delay
    dense_layer_seconds: _Delay | None = None
    compute: Positive | None = None
    compute_efficiency: Positive = 1.0
    source: str = ""

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

    bandwidth: Positive
    efficiency: Positive
    copy_seconds: _Delay
    source: str = ""

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
        thread_seconds: what a token costs PowerInfer beside its layers, for each thread that it
            starts. 0 in documents older than this.
        notes: what a reader of its estimates must know.
    """

    name: str
    cpu: Device
    gpu: Device | None = None
    link: Link | None = None
    threads: Count | None = None
    thread_seconds: _Delay = 0.0
    notes: tuple[str, ...] = ()

    @property
    def token_seconds(self) -> float:
        """What a token costs PowerInfer beside its layers; all threads but one are started."""
        return self.thread_seconds * ((self.threads or ASSUMED_THREADS) - 1)

    def neuron_byte_seconds(self) -> dict[str, float]:
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
        return place.seconds(matrix=1.0) / self.neuron_byte_seconds()["cpu"]


def load_hardware(name_or_path: str, threads: int = 1, option: str = "--hardware") -> Hardware:
    """Return the hardware of a name.

    Args:
        name_or_path: a preset, `this` (measured now), or a YAML file.
        threads: CPU threads that `this` is measured with.
        option: that named it.

    Raises:
        HardwareError: no such name, or a file that is damaged.
    """
    if name_or_path == THIS:
        from cost_model.measure import measure_this

        return measure_this(threads)
    presets = _presets()
    if name_or_path in presets:
        return _hardware(presets[name_or_path], name_or_path, name_or_path)
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = ", ".join([THIS, *sorted(presets)])
        raise HardwareError(f"hardware {name_or_path!r}: expected FILE.yaml or one of {known}")
    return _hardware(read_yaml(path, option), path.stem, str(path))


def save_hardware(path: Path, hardware: Hardware) -> None:
    """Write hardware as a YAML file that `load_hardware` reads."""
    import yaml

    entry = _HardwareEntry(
        cpu=_device_entry(hardware.cpu),
        gpu=_device_entry(hardware.gpu) if hardware.gpu else None,
        link=_link_entry(hardware.link) if hardware.link else None,
        threads=hardware.threads,
        thread_microseconds=hardware.thread_seconds * 1e6,
        notes=hardware.notes,
    )
    document = {key: value for key, value in plain(entry).items() if value is not None}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    write_bytes(path, text.encode())


def read_yaml(path: Path, option: str) -> object:
    """Return what a YAML file holds that an option names.

    Raises:
        HardwareError: missing, or no YAML.
    """
    import yaml

    data = read_yaml_text(path, HardwareError, f"check {option}")
    try:
        return parse_yaml(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Besides its own errors the parser lets through those of impossible dates and encodings.
        reason = " ".join(str(error).split())[:200]
        raise HardwareError(f"{path}: not valid YAML ({reason})", "mend the file") from error


@dataclass(frozen=True, kw_only=True)
class _DeviceEntry(Closed):
    name: str = ""
    bandwidth_gb_per_s: _Figure
    memory_gib: _Figure
    efficiency: Efficiency
    layer_microseconds: _Delay
    dense_layer_microseconds: _Delay | None = field(default=None, metadata=LEFT_OUT)
    compute_tflop_per_s: _Figure | None = field(default=None, metadata=LEFT_OUT)
    compute_efficiency: _Figure = 1.0
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class _LinkEntry(Closed):
    bandwidth_gb_per_s: _Figure
    efficiency: _Figure
    copy_microseconds: _Delay
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class _HardwareEntry(Closed):
    cpu: _DeviceEntry
    gpu: _DeviceEntry | None = None
    link: _LinkEntry | None = None
    threads: Annotated[int, Range(1)] | None = None
    thread_microseconds: _Delay = THREAD_SECONDS * 1e6
    notes: tuple[str, ...] = ()


def _hardware(value: Any, name: str, where: str) -> Hardware:
    try:
        entry = parse(_HardwareEntry, value)
    except JsonError as error:
        raise HardwareError(f"{where}: {error}", "mend the file") from error
    if (entry.gpu is None) != (entry.link is None):
        problem = f"{where}: expected both gpu and link, or neither"
        raise HardwareError(problem, "add the missing one")
    return Hardware(
        name=name,
        cpu=_device(entry.cpu),
        gpu=_device(entry.gpu) if entry.gpu else None,
        link=_link(entry.link) if entry.link else None,
        threads=entry.threads,
        thread_seconds=entry.thread_microseconds / 1e6,
        notes=entry.notes,
    )


def _device(entry: _DeviceEntry) -> Device:
    return Device(
        name=entry.name,
        bandwidth=entry.bandwidth_gb_per_s * _GB,
        memory=int(entry.memory_gib * GIB),
        efficiency=entry.efficiency,
        layer_seconds=entry.layer_microseconds / 1e6,
        dense_layer_seconds=_scaled(entry.dense_layer_microseconds, 1e-6),
        compute=_scaled(entry.compute_tflop_per_s, 1e12),
        compute_efficiency=entry.compute_efficiency,
        source=entry.source,
    )


def _device_entry(device: Device) -> _DeviceEntry:
    return _DeviceEntry(
        name=device.name,
        bandwidth_gb_per_s=device.bandwidth / _GB,
        memory_gib=device.memory / GIB,
        efficiency=device.efficiency,
        layer_microseconds=device.layer_seconds * 1e6,
        dense_layer_microseconds=_scaled(device.dense_layer_seconds, 1e6),
        compute_tflop_per_s=_scaled(device.compute, 1e-12),
        compute_efficiency=device.compute_efficiency,
        source=device.source,
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _link(entry: _LinkEntry) -> Link:
    return Link(
        bandwidth=entry.bandwidth_gb_per_s * _GB,
        efficiency=entry.efficiency,
        copy_seconds=entry.copy_microseconds / 1e6,
        source=entry.source,
    )


def _link_entry(link: Link) -> _LinkEntry:
    return _LinkEntry(
        bandwidth_gb_per_s=link.bandwidth / _GB,
        efficiency=link.efficiency,
        copy_microseconds=link.copy_seconds * 1e6,
        source=link.source,
    )


def _presets() -> dict[str, object]:
    import yaml

    text = files("cost_model").joinpath("hardware.yaml").read_text(encoding="utf-8")
    presets: dict[str, object] = yaml.safe_load(text)
    return presets
