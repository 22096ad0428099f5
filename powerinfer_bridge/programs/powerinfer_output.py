"""What PowerInfer's programs print, read.

Formats: PowerInfer@d3ebd7c llama.cpp:llama_print_timings, llm_load_sparse_model_tensors,
llm_load_tensors, llm_load_gpu_split, llm_load_gpu_split_with_budget, llama_gpu_split_loader,
ggml-cuda.cu:ggml_init_cublas, examples/perplexity/perplexity.cpp, powerinfer-py/powerinfer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from common.errors import EXPORT_AGAIN, EngineError
from powerinfer_bridge.programs.sample import Phase

_NUMBER = r"-?(?:[\d.]+|nan|inf)"
_LOAD = re.compile(rf"llama_print_timings:\s+load time =\s+({_NUMBER}) ms")
_PHASE = re.compile(
    rf"llama_print_timings:\s+(?P<phase>prompt eval|eval) time =\s+(?P<ms>{_NUMBER}) ms /"
    r"\s+(?P<count>\d+) (?:runs|tokens)"
)
_PERPLEXITY = re.compile(r"Final estimate: PPL = ([\d.]+|-?nan|-?inf)")
_DEVICES = re.compile(r"ggml_init_cublas: found (\d+) \S+ devices:")
_DEVICE = re.compile(r"^  Device \d+: (.+), compute capability [\d.]+$", re.MULTILINE)
_VRAM = re.compile(r"VRAM used: ([\d.]+) MB")
_LAYERS = re.compile(r"offloaded layers from VRAM budget\(-?\d+ bytes\): (\d+/\d+)")
_DENSE_LAYERS = re.compile(r"llm_load_tensors: offloaded (\d+/\d+) layers to GPU")
_FFN = re.compile(r"offloaded ([\d.]+) MiB of FFN weights to GPU")
_MIB = 1024 * 1024

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


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The lines of `llama_print_timings`.

    Attributes:
        load_seconds: reading the file; None if it was not printed or is no number.
        prompt: processing the prompt; likewise.
        decode: decoding.
    """

    load_seconds: float | None
    prompt: Phase | None
    decode: Phase


def parse_timings(output: str) -> Timings:
    """Return the timings of a run of `main`.

    With nothing decoded PowerInfer prints one token in 0.00 ms.

    Raises:
        EngineError: no decoding line, or one with no token, no time or no number.
    """
    found = {match["phase"]: match for match in _PHASE.finditer(output)}
    if "eval" not in found:
        raise EngineError("PowerInfer printed no decoding time", "run its main by hand to see why")
    decode = _phase(found["eval"])
    if decode is None:
        raise EngineError(
            f"PowerInfer decoded nothing ({found['eval']['ms']} ms for {found['eval']['count']} "
            "tokens)",
            "run its main by hand to see why",
        )
    load = _LOAD.search(output)
    seconds = float(load[1]) / 1000 if load else -1.0
    return Timings(
        load_seconds=seconds if 0 <= seconds < float("inf") else None,
        prompt=_phase(found["prompt eval"]) if "prompt eval" in found else None,
        decode=decode,
    )


def _phase(match: re.Match[str]) -> Phase | None:
    seconds, tokens = float(match["ms"]) / 1000, int(match["count"])
    if not 0 < seconds < float("inf") or not tokens:
        return None
    return Phase(seconds=seconds, tokens=tokens)


def parse_perplexity(output: str) -> float:
    """Return the final estimate of a `perplexity` run.

    Raises:
        EngineError: none was printed, or it is not a number.
    """
    match = _PERPLEXITY.search(output)
    if match is None:
        raise EngineError("PowerInfer's perplexity printed no final estimate", "give it more text")
    value = float(match[1])
    if not 0 < value < float("inf"):
        raise EngineError(
            f"PowerInfer's perplexity is {match[1]}: it computed wrongly", EXPORT_AGAIN
        )
    return value


def parse_device(output: str) -> dict[str, Any]:
    """Return what the program said about devices; a key is missing if it said nothing.

    Returns:
        `cuda`: whether it found a CUDA device; `gpus`: their names; `vram_used_bytes`;
        `layers_offloaded`: `done/all` (PowerInfer counts the output as one more, so `33/32` is
        everything); `ffn_offloaded_bytes`: hot neurons, not in `vram_used_bytes`.
    """
    found: dict[str, Any] = {"cuda": False}
    devices = _DEVICES.search(output)
    if devices is not None and int(devices[1]):
        found = {"cuda": True, "gpus": _DEVICE.findall(output)}
    layers = _LAYERS.search(output) or _DENSE_LAYERS.search(output)
    if layers is not None:
        found["layers_offloaded"] = layers[1]
    for key, pattern in (("vram_used_bytes", _VRAM), ("ffn_offloaded_bytes", _FFN)):
        size = pattern.search(output)
        if size is not None:
            found[key] = round(float(size[1]) * _MIB)
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
    notes = ["prompt not found in the output"] if start < 0 else []
    text = text if start < 0 else text[start + len(prompt) :]
    # The last token may hold a part of a character.
    if "\ufffd" in text.rstrip("\ufffd"):
        notes.append("output is not UTF-8")
    return text, tuple(notes)
