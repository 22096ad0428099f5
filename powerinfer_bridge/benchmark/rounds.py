"""Rounds of runs: every arm on every prompt, in an order that favours none."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from powerinfer_bridge.benchmark.arms import Arm
from powerinfer_bridge.benchmark.journal import Journal
from powerinfer_bridge.benchmark.sample import Sample
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.subject import Heartbeat


def arm_order(count: int, step: int) -> list[int]:
    """Return the order of `count` arms at a step.

    What ran before warms or cools the next run: caches, clocks, heat. Rotation alone would leave
    an arm after the same neighbour in nearly all rounds, and reversal the middle one in the middle.
    Over `count` steps, twice that if odd, every arm stands in every place and follows every other
    equally often (E. J. Williams, Experimental designs balanced for the estimation of residual
    effects of treatments, Aust. J. Sci. Res. A 2, 1949).
    """
    # 0, 1, n-1, 2, n-2, ...: the differences of neighbours are all different.
    base = [(place + 1) // 2 if place % 2 else count - place // 2 for place in range(count)]
    shift, backwards = divmod(step, 2) if count % 2 else (step, 0)
    order = [(number + shift) % count for number in base]
    return order[::-1] if backwards else order


def run_rounds(
    arms: Sequence[Arm],
    prompts: Sequence[str],
    config: BenchConfig,
    journal: Journal,
    heartbeat: Heartbeat,
) -> list[Sample]:
    """Return the samples of all rounds; those that the journal has are not run again.

    Rounds up to 0 warm up and are not kept. After an interruption they are run again, because the
    machine may have cooled; where nothing is left to measure they are not.
    """
    kept = {(sample.round, sample.prompt, sample.arm) for sample in journal.samples}
    planned = [
        (number, prompt, arms[index])
        for number in range(1 - config.warm_up, config.repeats + 1)
        for prompt in range(len(prompts))
        for index in arm_order(len(arms), number - 1 + config.warm_up + prompt)
    ]
    left = [step for step in planned if step[0] < 1 or (step[0], step[1], step[2].name) not in kept]
    if all(number < 1 for number, _, _ in left):
        return journal.samples
    for number, prompt, arm in (bar := tqdm(left, unit="run", disable=None)):
        heartbeat.bar = bar
        bar.set_description(f"{arm.name}, {f'round {number}' if number > 0 else 'warm-up'}")
        run = arm.run(prompts[prompt])
        bar.set_postfix_str(f"{run.decode.tokens_per_second:.2f} tokens/s")
        if number > 0:
            journal.add(Sample(arm=arm.name, round=number, prompt=prompt, run=run))
    return journal.samples
