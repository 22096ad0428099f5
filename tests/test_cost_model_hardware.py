"""Descriptions of hardware: presets, files of one's own, hostile ones, and `this`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cost_model.hardware import THREAD_SECONDS, HardwareError, load_hardware, save_hardware
from cost_model.measure import ROW_BYTES, cpu_bandwidths, measure_this

DEVICE: dict[str, Any] = {
    "bandwidth_gb_per_s": 10,
    "memory_gib": 2,
    "efficiency": {"matrix": 0.5, "rows": 0.4, "columns": 0.3},
    "layer_microseconds": 20,
}
LINK: dict[str, Any] = {"bandwidth_gb_per_s": 30, "efficiency": 0.5, "copy_microseconds": 5}


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def test_presets_are_what_their_datasheets_say() -> None:
    presets = yaml.safe_load(files("cost_model").joinpath("hardware.yaml").read_text())
    assert {"a100-80g+ddr4-8ch", "rtx4090+ddr5", "h200"} <= set(presets)
    for name in presets:
        hardware = load_hardware(name)
        assert hardware.name == name
        assert hardware.gpu is not None
        assert hardware.link is not None
        for part in (hardware.cpu, hardware.gpu, hardware.link):
            assert part.source
        assert hardware.cpu.bandwidth < hardware.gpu.bandwidth
        assert hardware.token_seconds == pytest.approx(800e-6, rel=0.01)
        shares = hardware.cpu.efficiency, hardware.gpu.efficiency
        assert all(max(each.matrix, each.rows, each.columns) < 1 for each in shares)
    # Channels · transfers · 8 bytes, and bits · Gbit/s / 8.
    assert load_hardware("a100-80g+ddr4-8ch").cpu.bandwidth == pytest.approx(8 * 3.2e9 * 8)
    rtx = load_hardware("rtx4090+ddr5")
    assert rtx.cpu.bandwidth == pytest.approx(2 * 5.6e9 * 8)
    assert rtx.gpu is not None
    assert rtx.gpu.bandwidth == pytest.approx(384 * 21e9 / 8)
    assert rtx.gpu.memory == 24 << 30


def test_a_file_is_read_and_written(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", {"cpu": DEVICE, "gpu": DEVICE, "link": LINK, "threads": 4})
    found = load_hardware(str(path))
    assert found.name == "mine"
    assert found.threads == 4
    assert found.cpu.bandwidth == 10e9
    assert found.cpu.memory == 2 << 30
    assert found.cpu.seconds(matrix=5e9, rows=4e9, columns=3e9) == pytest.approx(3.0)
    assert found.link is not None
    assert found.link.seconds(15e9, 2) == pytest.approx(1 + 10e-6)
    save_hardware(tmp_path / "saved" / "mine.yaml", found)
    again = load_hardware(str(tmp_path / "saved" / "mine.yaml"))
    assert again.cpu.seconds(matrix=1e9) == pytest.approx(found.cpu.seconds(matrix=1e9))
    assert again.threads == 4
    assert again.link is not None
    assert again.link.copy_seconds == pytest.approx(5e-6)


def test_overheads_that_a_file_does_not_tell(tmp_path: Path) -> None:
    """Files older than the keys are valid."""
    silent = {"cpu": DEVICE, "gpu": DEVICE, "link": LINK}
    told = silent | {
        "gpu": DEVICE | {"dense_layer_microseconds": 7},
        "thread_microseconds": 5,
        "threads": 3,
    }
    for name, document, token, dense in (
        ("silent", silent, 7 * THREAD_SECONDS, None),
        ("single", silent | {"threads": 1}, 0.0, None),
        ("told", told, 10e-6, 7e-6),
    ):
        found = load_hardware(str(write(tmp_path / f"{name}.yaml", document)))
        saved = tmp_path / f"saved-{name}.yaml"
        save_hardware(saved, found)
        assert "null" not in saved.read_text()
        for each in (found, load_hardware(str(saved))):
            assert each.token_seconds == pytest.approx(token)
            assert each.cpu.dense_layer_seconds is None
            assert each.gpu is not None
            assert each.gpu.dense_layer_seconds == (dense and pytest.approx(dense))


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in DEVICE.items() if name != key}


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ("", ["expected an object, found None"]),
        ("[1, 2]", ["expected an object, found [1, 2]"]),
        ("cpu: [", ["not valid YAML", "mend the file"]),
        ("cpu: !!python/object/apply:os.system [id]", ["not valid YAML"]),
        ("a: &a [*a]\ncpu: *a", ["a value holds itself"]),
        ("cpu: &a [*a]", ["a value holds itself"]),
        ("cpu: 2026-99-99", ["not valid YAML"]),
        ({"cpu": "fast"}, ["'cpu': expected an object, found 'fast'"]),
        ({"gpu": DEVICE}, ["no 'cpu'"]),
        ({"cpu": DEVICE, "gpu": DEVICE}, ["expected both gpu and link"]),
        ({"cpu": DEVICE, "link": LINK}, ["expected both gpu and link"]),
        ({"cpu": DEVICE | {"cores": 8}}, ["'cpu.cores' is unknown, expected name, bandwidth"]),
        ({"cpu": without("memory_gib")}, ["no 'cpu.memory_gib'"]),
        (
            {"cpu": DEVICE | {"bandwidth_gb_per_s": 0}},
            ["'cpu.bandwidth_gb_per_s': expected a number above 0, found 0"],
        ),
        ({"cpu": DEVICE | {"bandwidth_gb_per_s": -1}}, ["expected a number above 0, found -1"]),
        ({"cpu": DEVICE | {"bandwidth_gb_per_s": True}}, ["found True"]),
        ({"cpu": DEVICE | {"bandwidth_gb_per_s": "1e3"}}, ["expected a number, found '1e3'"]),
        ({"cpu": DEVICE | {"bandwidth_gb_per_s": float("nan")}}, ["found nan"]),
        ({"cpu": DEVICE | {"memory_gib": float("inf")}}, ["'cpu.memory_gib'", "found inf"]),
        ({"cpu": DEVICE | {"memory_gib": 10**400}}, ["'cpu.memory_gib'", "found 1000"]),
        ("cpu: {memory_gib: 1, bandwidth_gb_per_s: 0x" + "f" * 9000 + "}", ["a huge int"]),
        (
            {"cpu": DEVICE | {"layer_microseconds": -5}},
            ["expected a number of at least 0, found -5"],
        ),
        (
            {"cpu": DEVICE | {"efficiency": 0.5}},
            ["'cpu.efficiency': expected an object, found 0.5"],
        ),
        (
            {"cpu": DEVICE | {"efficiency": {"matrix": 0.5, "rows": 0, "columns": 1}}},
            ["'cpu.efficiency.rows': expected a number above 0, found 0"],
        ),
        ({"cpu": DEVICE | {"name": 5}}, ["'cpu.name': expected a text, found 5"]),
        ({"cpu": DEVICE, "threads": 1.5}, ["'threads': expected a whole number, found 1.5"]),
        ({"cpu": DEVICE, "threads": 0}, ["'threads': expected a whole number", "found 0"]),
        ({"cpu": DEVICE, "notes": "one"}, ["'notes': expected an array, found 'one'"]),
        ("x" * (1 << 20), ["more than 512 KiB"]),
    ],
)
def test_hostile_files_are_refused(document: Any, parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", document)
    with refused(HardwareError, str(path), *parts):
        load_hardware(str(path))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with refused(HardwareError, "'rtx9090'", "this, a100-80g+ddr4-8ch"):
        load_hardware("rtx9090")
    with refused(HardwareError, "No such file", "check --hardware"):
        load_hardware(str(tmp_path / "none.yaml"))
    with refused(HardwareError, "null byte", "check --hardware"):
        load_hardware(str(tmp_path / "odd\0name.yaml"))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=200,
    deadline=None,  # a machine may be busy
)
@given(st.binary(max_size=80))
def test_no_bytes_are_a_bug(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    with refused(HardwareError, str(path)):
        load_hardware(str(path))


def test_this_is_measured_with_the_threads_asked_for() -> None:
    streamed, gathered = cpu_bandwidths(2, 4 * ROW_BYTES)
    assert streamed > 0
    assert gathered > 0
    hardware = measure_this(1, 64 * ROW_BYTES)
    assert hardware.threads == 1
    assert hardware.cpu.bandwidth > 1e6
    assert hardware.cpu.memory > 1 << 28
    assert "measured" in hardware.cpu.source
    assert any("calibrate" in note for note in hardware.notes)


def test_too_little_memory_is_said() -> None:
    with refused(HardwareError, "--hardware this", "needs four times as much memory"):
        measure_this(1, 1 << 60)
