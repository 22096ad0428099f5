"""Descriptions of hardware as YAML: the presets, and files of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from common.files import write_bytes
from cost_model.devices import (
    BYTES_OF_GB,
    BYTES_OF_GIB,
    Device,
    Efficiency,
    Hardware,
    HardwareError,
    Link,
)

THIS = "this"
__all__ = ["Hardware", "HardwareError", "load_hardware", "preset_names", "save_hardware"]
_LARGEST_FILE = 1 << 20
_SHOWN = 60
_DEVICE = ("bandwidth_gb_per_s", "memory_gib", "efficiency", "layer_microseconds")
_LINK = ("bandwidth_gb_per_s", "efficiency", "copy_microseconds")


def preset_names() -> list[str]:
    """Return the names that `load_hardware` knows besides `this`."""
    return sorted(_presets())


def load_hardware(name_or_path: str, threads: int = 1) -> Hardware:
    """Return the hardware of a name.

    Args:
        name_or_path: a preset, `this` (measured now), or a YAML file.
        threads: CPU threads that `this` is measured with.

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
    return _hardware(_read(path), path.stem, str(path))


def save_hardware(path: Path, hardware: Hardware) -> None:
    """Write hardware as a YAML file that `load_hardware` reads."""
    import yaml

    document: dict[str, Any] = {"cpu": _device_entry(hardware.cpu)}
    if hardware.gpu and hardware.link:
        document["gpu"] = _device_entry(hardware.gpu)
        document["link"] = {
            "bandwidth_gb_per_s": hardware.link.bandwidth / BYTES_OF_GB,
            "efficiency": hardware.link.efficiency,
            "copy_microseconds": hardware.link.copy_seconds * 1e6,
            "source": hardware.link.source,
        }
    if hardware.threads is not None:
        document["threads"] = hardware.threads
    document["notes"] = list(hardware.notes)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    write_bytes(path, text.encode())


def _device_entry(device: Device) -> dict[str, Any]:
    share = device.efficiency
    return {
        "name": device.name,
        "bandwidth_gb_per_s": device.bandwidth / BYTES_OF_GB,
        "memory_gib": device.memory / BYTES_OF_GIB,
        "efficiency": {"matrix": share.matrix, "rows": share.rows, "columns": share.columns},
        "layer_microseconds": device.layer_seconds * 1e6,
        "source": device.source,
    }


def _presets() -> dict[str, Any]:
    import yaml

    text = files("cost_model").joinpath("hardware.yaml").read_text(encoding="utf-8")
    presets: dict[str, Any] = yaml.safe_load(text)
    return presets


def _read(path: Path) -> Any:
    import yaml

    try:
        if not path.is_file():
            raise HardwareError(f"{path}: no such file", "check --hardware")
        if path.stat().st_size > _LARGEST_FILE:
            raise HardwareError(f"{path}: more than 1 MiB, expected a short YAML file")
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise HardwareError(f"{path}: {error.strerror or error}", "check --hardware") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Besides its own errors the parser lets through those of impossible dates and encodings.
        reason = " ".join(str(error).split())[:200]
        raise HardwareError(f"{path}: not valid YAML ({reason})", "mend the file") from error


def _hardware(entry: Any, name: str, where: str) -> Hardware:
    entry = _mapping(entry, where, "cpu", ("gpu", "link", "threads", "notes"))
    threads, notes = entry.get("threads"), entry.get("notes", [])
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise HardwareError(f"{where}: threads is {_show(threads)}, expected a whole number")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise HardwareError(f"{where}: notes is {_show(notes)}, expected a list of texts")
    try:
        return Hardware(
            name=name,
            cpu=_device(entry["cpu"], f"{where}: cpu"),
            gpu=_device(entry["gpu"], f"{where}: gpu") if "gpu" in entry else None,
            link=_link(entry["link"], f"{where}: link") if "link" in entry else None,
            threads=threads,
            notes=tuple(notes),
        )
    except HardwareError as error:
        known = str(error).startswith(where)
        raise (
            error if known else HardwareError(f"{where}: {error.problem}", error.remedy)
        ) from error


def _device(entry: Any, where: str) -> Device:
    entry = _mapping(entry, where, *_DEVICE, ("name", "source"))
    shares = f"{where}.efficiency"
    efficiency = _mapping(entry["efficiency"], shares, "matrix", "rows", "columns", ())
    values = {key: _number(efficiency, key, shares) for key in ("matrix", "rows", "columns")}
    return Device(
        name=_text(entry, "name", where),
        bandwidth=_number(entry, "bandwidth_gb_per_s", where) * BYTES_OF_GB,
        memory=int(_number(entry, "memory_gib", where) * BYTES_OF_GIB),
        efficiency=Efficiency(**values),
        layer_seconds=_number(entry, "layer_microseconds", where, least=0.0) / 1e6,
        source=_text(entry, "source", where),
    )


def _link(entry: Any, where: str) -> Link:
    entry = _mapping(entry, where, *_LINK, ("source",))
    return Link(
        bandwidth=_number(entry, "bandwidth_gb_per_s", where) * BYTES_OF_GB,
        efficiency=_number(entry, "efficiency", where),
        copy_seconds=_number(entry, "copy_microseconds", where, least=0.0) / 1e6,
        source=_text(entry, "source", where),
    )


def _mapping(entry: Any, where: str, *keys: str | tuple[str, ...]) -> Mapping[str, Any]:
    """Return a mapping that has the keys, and beyond them at most those of the tuple at the end."""
    required = [key for key in keys if isinstance(key, str)]
    optional = [name for key in keys if isinstance(key, tuple) for name in key]
    if not isinstance(entry, dict):
        raise HardwareError(f"{where}: is {_show(entry)}, expected keys {', '.join(required)}")
    for key in entry:
        if key not in (*required, *optional):
            known = ", ".join([*required, *optional])
            raise HardwareError(f"{where}: key {_show(key)} is unknown, expected {known}")
    for key in required:
        if key not in entry:
            raise HardwareError(f"{where}: key {key} is missing", "add it")
    return entry


def _number(entry: Mapping[str, Any], key: str, where: str, *, least: float | None = None) -> float:
    value = entry[key]
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    # Above 1e15 no figure here means anything, and whole numbers may not even fit a float.
    if plain and (0 < value <= 1e15 or (least is not None and value == least)):
        return float(value)
    expected = "a number above 0" if least is None else "a number of at least 0"
    raise HardwareError(f"{where}.{key} is {_show(value)}, expected {expected}")


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key, "")
    if not isinstance(value, str):
        raise HardwareError(f"{where}.{key} is {_show(value)}, expected text")
    return value


def _show(value: Any) -> str:
    """Return a short text of any value; a huge number or an alias to itself has none."""
    if isinstance(value, dict | list | set | tuple):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
