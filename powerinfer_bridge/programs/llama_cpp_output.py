"""What llama.cpp's programs print, read.

Formats: llama.cpp@0c1e570 tools/llama-bench/llama-bench.cpp:json_printer, test::get_fields;
common/sampling.cpp:common_perf_print and, in older versions, llama_perf_context_print;
tools/cli/cli.cpp for rates without counts; common/common.cpp:common_params_print_info.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from common.errors import EngineError
from powerinfer_bridge.programs.sample import Phase

_NUMBER = r"-?(?:[\d.]+|nan|inf)"
_PRINT = r"(?:common_perf_print|llama_perf_context_print|llama_print_timings):\s+"
_LOAD = re.compile(rf"{_PRINT}load time =\s+({_NUMBER}) ms")
_PHASE = re.compile(
    rf"{_PRINT}(?P<phase>prompt eval|eval) time =\s+(?P<ms>{_NUMBER}) ms /"
    r"\s+(?P<count>\d+) (?:runs|tokens)"
)
_RATES = re.compile(r"\[ Prompt: ([\d.]+) t/s \| Generation: ([\d.]+) t/s \]")
_VERSION = re.compile(r"^version: (.*)$", re.MULTILINE)
_CUDA = re.compile(r"^\s*CUDA\d+: |ggml_cuda_init: ", re.MULTILINE)
NO_COUNTS = "llama-cli tells rates but no token counts; build llama-bench for the prompt's speed"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run told.

    Attributes:
        load_seconds: reading the file; None if not told.
        prompt: processing the prompt; None if not measured.
        decode: decoding.
        device: what it said about devices and itself.
        notes: what a reader of the figures must know.
    """

    load_seconds: float | None
    prompt: Phase | None
    decode: Phase
    device: dict[str, Any]
    notes: tuple[str, ...] = ()


def parse_bench(stdout: str, n_gpu_layers: int) -> Measured:
    """Return what `llama-bench -o json -r 1` measured.

    Args:
        stdout: a JSON array of one object for the prompt and one for decoding.
        n_gpu_layers: layers that were asked for on the GPU.

    Raises:
        EngineError: no such array, or no decoding in it.
    """
    try:
        entries = json.loads(stdout)
        prompts = [entry for entry in entries if entry["n_prompt"] and not entry["n_gen"]]
        decodes = [entry for entry in entries if entry["n_gen"] and not entry["n_prompt"]]
        prompt = _bench_phase(prompts[0], "n_prompt") if prompts else None
        decode = _bench_phase(decodes[0], "n_gen")
        device = _bench_device(decodes[0])
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise EngineError(
            f"llama-bench printed no JSON of a decoding run ({type(error).__name__}); expected "
            "llama.cpp's own since 2023",
            "run it by hand with -o json to see what it prints",
        ) from error
    return Measured(
        load_seconds=None,
        prompt=prompt,
        decode=decode,
        device=device,
        notes=_bench_notes(device, n_gpu_layers),
    )


def _bench_phase(entry: dict[str, Any], count: str) -> Phase:
    nanoseconds = [int(sample) for sample in entry["samples_ns"]]
    if not nanoseconds or min(nanoseconds) <= 0:
        raise ValueError("no time")
    tokens = int(entry[count]) * len(nanoseconds)
    return Phase(seconds=sum(nanoseconds) / 1e9, tokens=tokens)


def _bench_device(entry: dict[str, Any]) -> dict[str, Any]:
    backends = str(entry.get("backends", ""))
    gpus = [name.strip() for name in str(entry.get("gpu_info", "")).split(",")]
    kept = ("build_commit", "build_number", "model_type", "n_gpu_layers", "cpu_info", "backends")
    return {
        "cuda": "CUDA" in backends or bool(entry.get("cuda")),
        "gpus": [name for name in gpus if name],
    } | {key: entry[key] for key in kept if key in entry}


def _bench_notes(device: dict[str, Any], n_gpu_layers: int) -> tuple[str, ...]:
    if device["gpus"]:
        # ggml-backend.cpp copies large batches to the GPU whatever -ngl says (--no-op-offload).
        return () if n_gpu_layers else ("long prompts may use the GPU though no layer is on it",)
    return ("no GPU in this build or machine: -ngl ignored",) if n_gpu_layers else ()


def parse_timings(output: str, count: int) -> Measured:
    """Return the timings that llama-completion or llama-cli print after a generation.

    Args:
        output: all that it printed.
        count: tokens that it was asked for.

    Raises:
        EngineError: no decoding time, or a decoding of nothing.
    """
    phases = {match["phase"]: _phase(match) for match in _PHASE.finditer(output)}
    decode = phases.get("eval")
    rates = _RATES.search(output)
    device = {"cuda": has_cuda(output)}
    if decode is not None:
        load = _LOAD.search(output)
        return Measured(
            load_seconds=float(load[1]) / 1000 if load else None,
            prompt=phases.get("prompt eval"),
            decode=decode,
            device=device,
        )
    if rates is None or float(rates[2]) <= 0:
        raise EngineError("llama.cpp printed no decoding time", "run it by hand to see why")
    decode = Phase(seconds=count / float(rates[2]), tokens=count)
    return Measured(
        load_seconds=None, prompt=None, decode=decode, device=device, notes=(NO_COUNTS,)
    )


def _phase(match: re.Match[str]) -> Phase | None:
    seconds, tokens = float(match["ms"]) / 1000, int(match["count"])
    return Phase(seconds=seconds, tokens=tokens) if 0 < seconds < float("inf") and tokens else None


def parse_version(output: str) -> str | None:
    """Return what `--version` says; None if it says nothing."""
    match = _VERSION.search(output)
    return match[1].strip() if match else None


def has_cuda(output: str) -> bool:
    """Return whether `--list-devices` shows a build with CUDA, even one that finds no GPU."""
    return bool(_CUDA.search(output))
