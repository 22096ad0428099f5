"""What PowerInfer's and llama.cpp's programs print, read.

Formats: PowerInfer@d3ebd7c llama.cpp:llama_print_timings, llm_load_sparse_model_tensors,
llm_load_tensors, llm_load_gpu_split, llm_load_gpu_split_with_budget, llama_gpu_split_loader,
llama_kv_cache_init, ggml-cuda.cu:ggml_init_cublas, examples/perplexity/perplexity.cpp,
powerinfer-py/powerinfer;
llama.cpp@0c1e570 tools/llama-bench/llama-bench.cpp:json_printer, test::get_fields;
common/sampling.cpp:common_perf_print and, in older versions, llama_perf_context_print;
tools/cli/cli.cpp for rates without counts; common/common.cpp:common_params_print_info.
"""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import Any

from common.errors import EXPORT_AGAIN, EngineError
from common.units import MIB
from powerinfer_bridge.programs.sample import Measured, Phase

_NUMBER = r"-?(?:[\d.]+|nan|inf)"
_PRINT = r"(?:common_perf_print|llama_perf_context_print|llama_print_timings):\s+"
_LOAD = re.compile(rf"{_PRINT}load time =\s+({_NUMBER}) ms")
_PHASE = re.compile(
    rf"{_PRINT}(?P<phase>prompt eval|eval) time =\s+(?P<ms>{_NUMBER}) ms /"
    r"\s+(?P<count>\d+) (?:runs|tokens)"
)
_CHUNKS = re.compile(r"calculating perplexity over (\d+) chunks")
_RUNNING = re.compile(r"\[\d+\]([\d.]+|-?nan|-?inf),")
_PERPLEXITY = re.compile(r"Final estimate: PPL = ([\d.]+|-?nan|-?inf)")
_WINDOW = re.compile(r"\[(\d+)\]([\d.]+),")
_DEVICES = re.compile(r"ggml_init_cublas: found (\d+) \S+ devices:")
_DEVICE = re.compile(r"^  Device \d+: (.+), compute capability [\d.]+$", re.MULTILINE)
_VRAM = re.compile(r"VRAM used: ([\d.]+) MB")
_KV = re.compile(r"VRAM kv self = ([\d.]+) MB")
_LAYERS = re.compile(r"offloaded layers from VRAM budget\((-?\d+) bytes\): (\d+/\d+)")
_DENSE_LAYERS = re.compile(r"llm_load_tensors: offloaded (\d+/\d+) layers to GPU")
_FFN = re.compile(r"offloaded ([\d.]+) MiB of FFN weights to GPU")
_SIZES = {"vram_used_bytes": _VRAM, "kv_vram_bytes": _KV, "ffn_offloaded_bytes": _FFN}

_CHATTER = re.compile(
    r"^(?:loaded gpu_idx, vram_required: |solver args: |solved: |ILP Status: "
    r"|Total Activation Units: |blk\.\d+\.gpu_\w+ => |exported GPU index to |Exported to ).*\n",
    re.MULTILINE,
)
"""Lines of a GPU index on stdout, the engine's and its Python module's, before the text."""

_NOTES: tuple[tuple[str, str], ...] = (
    ("applying gpu_idx adapter from", "GPU index applied"),
    ("failed to apply previously generated gpu split", "GPU index refused"),
    ("invoking powerinfer Python module to generate gpu split", "GPU index rebuilt"),
    ("error: activation files under", "no activation statistics beside the file"),
    ("an empty one will be used", "no GPU index: no neurons on the GPU"),
    ("PowerInfer was compiled without cuBLAS", "built without CUDA: VRAM budget ignored"),
    ("model was trained on only", "context longer than the model was trained on"),
)

_RATES = re.compile(r"\[ Prompt: ([\d.]+) t/s \| Generation: ([\d.]+) t/s \]")
_VERSION = re.compile(r"^version: (.*)$", re.MULTILINE)
_CUDA = re.compile(r"^\s*CUDA\d+: |ggml_cuda_init: ", re.MULTILINE)
NO_GPU = "no GPU in this build or machine: -ngl ignored"
NO_PROMPT = "prompt not found in the output"
NO_COUNTS = "llama-cli tells rates but no token counts; build llama-bench for the prompt's speed"


def _phases(output: str) -> dict[str, re.Match[str]]:
    return {match["phase"]: match for match in _PHASE.finditer(output)}


def _phase(match: re.Match[str] | None) -> Phase | None:
    """Return a phase; None if it was not printed, or took no token, no time or no number."""
    if match is None:
        return None
    seconds, tokens = float(match["ms"]) / 1000, int(match["count"])
    return Phase(seconds=seconds, tokens=tokens) if 0 < seconds < math.inf and tokens else None


def _timings(output: str, device: dict[str, object], notes: tuple[str, ...]) -> Measured | None:
    """Return the times of `llama_print_timings` and its successors; None if nothing was decoded."""
    phases, load = _phases(output), _LOAD.search(output)
    decode, seconds = _phase(phases.get("eval")), float(load[1]) / 1000 if load else math.nan
    if decode is None:
        return None
    return Measured(
        load_seconds=seconds if 0 <= seconds < math.inf else None,
        prompt=_phase(phases.get("prompt eval")),
        decode=decode,
        notes=notes,
        device=device,
    )


def parse_main(stderr: str) -> Measured:
    """Return what a run of PowerInfer's `main` told, but for its text.

    With nothing decoded PowerInfer prints one token in 0.00 ms.

    Raises:
        EngineError: no decoding line, or one with no token, no time or no number.
    """
    measured = _timings(stderr, parse_device(stderr), parse_notes(stderr))
    if measured is None:
        said, problem = _phases(stderr).get("eval"), "PowerInfer printed no decoding time"
        if said:
            problem = f"PowerInfer decoded nothing ({said['ms']} ms for {said['count']} tokens)"
        raise EngineError(problem, "run its main by hand to see why")
    return measured


def parse_perplexity(output: str) -> float:
    """Return the final estimate of a `perplexity` run of PowerInfer's.

    Raises:
        EngineError: none was printed, or it is not a number.
    """
    match = _PERPLEXITY.search(output)
    if match is None:
        raise EngineError("PowerInfer's perplexity printed no final estimate", "give it more text")
    return _number(match[1], "PowerInfer")


def parse_llama_perplexity(output: str, errors: str, program: str = "llama.cpp") -> float | None:
    """Return the estimate of all windows of a `llama-perplexity` run; None if its end is lost.

    Args:
        output: what it printed after each window.
        errors: what it printed besides: over how many windows it goes.
        program: whose it is, for messages.

    Raises:
        EngineError: it is not a number.
    """
    planned, told = _CHUNKS.search(errors), _RUNNING.findall(output)
    if planned is None or len(told) < int(planned[1]):
        return None
    return _number(told[-1], program)


def _number(text: str, program: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise EngineError(f"{program}'s perplexity is {text}: it computed wrongly", EXPORT_AGAIN)
    return value


def parse_windows(output: str) -> tuple[float, ...]:
    """Return the mean negative log-likelihood of each window of a `perplexity` run, nats.

    It prints the perplexity of all windows so far, `[2]12.5000,`, to four decimals.

    Returns:
        Nothing where a window's is missing or no number above 0.
    """
    told = [(int(number), float(value)) for number, value in _WINDOW.findall(output)]
    if [number for number, _ in told] != list(range(1, len(told) + 1)):
        return ()
    if not all(0 < value < math.inf for _, value in told):
        return ()
    totals = [0.0, *(number * math.log(value) for number, value in told)]
    return tuple(after - before for before, after in pairwise(totals))


def parse_device(output: str) -> dict[str, Any]:
    """Return what the program said about devices; a key is missing if it said nothing.

    Returns:
        `cuda`: whether it found a CUDA device; `gpus`: their names; `vram_used_bytes`;
        `vram_budget_bytes`, what it made of the option; `layers_offloaded`: `done/all` (PowerInfer
        counts the output as one more, so `33/32` is everything); `kv_vram_bytes`: the KV cache, and
        `ffn_offloaded_bytes`: hot neurons, neither of them in `vram_used_bytes`. All but the budget
        are told in hundredths of a MiB.
    """
    found: dict[str, Any] = {"cuda": False}
    devices = _DEVICES.search(output)
    if devices is not None and int(devices[1]):
        found = {"cuda": True, "gpus": _DEVICE.findall(output)}
    sparse, dense = _LAYERS.search(output), _DENSE_LAYERS.search(output)
    if sparse is not None:
        found |= {"vram_budget_bytes": int(sparse[1]), "layers_offloaded": sparse[2]}
    elif dense is not None:
        found["layers_offloaded"] = dense[1]
    for key, pattern in _SIZES.items():
        size = pattern.search(output)
        if size is not None:
            found[key] = round(float(size[1]) * MIB)
    return found


def parse_notes(output: str) -> tuple[str, ...]:
    """Return what a reader of the figures must know, in plain words."""
    return tuple(note for line, note in _NOTES if line in output)


def continuation(stdout: str, prompt: str) -> tuple[str, tuple[str, ...]]:
    """Return what follows the prompt on stdout, and notes if it is odd.

    `main` prints the prompt and goes on; before it come the line of a GPU index that was loaded and
    what the Python module says that makes one. A prompt that its tokens do not spell exactly (with
    special tokens, for instance) is not found: then all is returned.
    """
    text = _CHATTER.sub("", stdout)
    start = text.find(prompt)
    notes = [NO_PROMPT] if start < 0 else []
    text = text if start < 0 else text[start + len(prompt) :]
    # The last token may hold a part of a character.
    if "\ufffd" in text.rstrip("\ufffd"):
        notes.append("output is not UTF-8")
    return text, tuple(notes)


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
    return (NO_GPU,) if n_gpu_layers else ()


def parse_generation(output: str, count: int) -> Measured:
    """Return the timings that llama-completion or llama-cli print after a generation.

    Args:
        output: all that it printed.
        count: tokens that it was asked for.

    Raises:
        EngineError: no decoding time, or a decoding of nothing.
    """
    device: dict[str, object] = {"cuda": has_cuda(output)}
    measured = _timings(output, device, ())
    if measured is not None:
        return measured
    rates = _RATES.search(output)
    if rates is None or float(rates[2]) <= 0:
        raise EngineError("llama.cpp printed no decoding time", "run it by hand to see why")
    decode = Phase(seconds=count / float(rates[2]), tokens=count)
    return Measured(
        load_seconds=None, prompt=None, decode=decode, device=device, notes=(NO_COUNTS,)
    )


def parse_version(output: str) -> str | None:
    """Return what `--version` says; None if it says nothing."""
    match = _VERSION.search(output)
    return match[1].strip() if match else None


def has_cuda(output: str) -> bool:
    """Return whether `--list-devices` shows a build with CUDA, even one that finds no GPU."""
    return bool(_CUDA.search(output))
