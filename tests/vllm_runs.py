"""Runs models in vLLM, one after the other in one process, and prints what came out as JSON.

Run by the Python of an environment that has vLLM and psp: `python vllm_runs.py JOBS.json`. Jobs are
`{"model", "options", "environment", "prompts", "max_tokens", "one_by_one", "limit", "reload"}`; an
answer is a line of `PREFIX` and JSON. It imports nothing of the tests, which have another
environment.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
from typing import Any

PREFIX = "vllm_runs:"
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 96, "seed": 0}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job; an error of vLLM's is an answer too."""
    from vllm import LLM

    if "limit" in job:
        pretend_limit(job["limit"])
    with environment(job.get("environment", {})):
        try:
            engine = LLM(job["model"], **(OPTIONS | job.get("options", {})))
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}
        if "reload" in job:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
        answer: dict[str, Any] = {
            "made": generate(engine, job),
            "class": model_class(engine),
            "taken": taken(),
        }
        answer["statistics"] = os.environ.get("PSP_VLLM_STATS")
        del engine
        gc.collect()
    return answer


def pretend_limit(limit: float) -> None:
    """Let the operators be faster up to a share of active neurons, whatever was measured."""
    from vllm_plugin import crossover, operators

    operators.CROSSOVER = crossover.Crossover()
    crossover.measured_limit = lambda layers, tokens: limit


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Any:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def generate(engine: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams, TokensPrompt

    plan = SamplingParams(
        temperature=0,
        max_tokens=job.get("max_tokens", 8),
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=job.get("prompt_logprobs", 0),
        detokenize=False,
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    groups = [[prompt] for prompt in prompts] if job.get("one_by_one") else [prompts]
    outputs = [output for group in groups for output in engine.generate(group, plan)]
    return [told(output) for output in outputs]


def told(output: Any) -> dict[str, Any]:
    """Return ids, and the log-probability of each but the first."""
    made = output.outputs[0]
    ids = [*output.prompt_token_ids, *made.token_ids]
    tables = [*(output.prompt_logprobs or [])[1:], *made.logprobs]
    pairs = zip(tables, ids[-len(tables) :], strict=True)
    logprobs = [table[token].logprob for table, token in pairs]
    return {"ids": ids, "logprobs": logprobs, "cached": output.num_cached_tokens}


def model_class(engine: Any) -> str:
    names = engine.apply_model(_name)
    return str(names[0])


def _name(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"


def taken() -> dict[str, int]:
    """Return how often FFNs went either way since the last call."""
    from vllm_plugin import operators

    counts = dict(operators.CROSSOVER.taken)
    operators.CROSSOVER.taken.clear()
    return counts


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for each in jobs:
        print(PREFIX + json.dumps(run(each)), flush=True)
