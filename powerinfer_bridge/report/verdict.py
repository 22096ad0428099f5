"""The answer in a sentence: is it faster, than what, by how much, and at what quality."""

from __future__ import annotations

from dataclasses import dataclass

from powerinfer_bridge.report.formats import per_cent, ratio, speed
from powerinfer_bridge.report.results import Bench, Ratio

ARM_TITLES = {
    "predicted": "predicted neurons",
    "all_neurons": "all neurons, same engine",
    "dense_powerinfer": "dense, in PowerInfer",
    "dense_llama_cpp": "dense, in llama.cpp",
}
_AGAINST = {
    "all_neurons": "computing all neurons in the same engine",
    "dense_powerinfer": "the dense model in PowerInfer",
    "dense_llama_cpp": "the dense model in llama.cpp",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a benchmark shows.

    Attributes:
        outcome: `faster`, `slower` or `even`.
        ratio: times as fast, as text.
        against: what it is compared with.
        sentence: all of it.
    """

    outcome: str
    ratio: str
    against: str
    sentence: str


def baseline(bench: Bench) -> str | None:
    """Return the fastest dense arm, or else that with all neurons."""
    arms = [arm for arm in bench.arms if arm.name != "predicted"]
    dense = [arm for arm in arms if arm.name.startswith("dense")]
    best = max(dense or arms, key=lambda arm: arm.decode.median, default=None)
    return None if best is None else best.name


def verdict(bench: Bench) -> Verdict | None:
    """Judge a benchmark; None if it compares nothing."""
    over, predicted = baseline(bench), bench.arm("predicted")
    faster = None if over is None else bench.speedup(over)
    if over is None or predicted is None or faster is None:
        return None
    outcome = _outcome(faster, predicted.decode.rounds)
    words = [
        f"{_where(bench)} {speed(predicted.decode.median)} tokens/s, "
        f"{_compared(faster, outcome, predicted.decode.rounds)}"
    ]
    if over != "all_neurons" and (second := bench.speedup("all_neurons")) is not None:
        words.append(f", and {ratio(second.ratio)} times as fast as {_AGAINST['all_neurons']}")
    words.append(f"; {_quality(bench)}.")
    if over == "all_neurons":
        words.append(" No dense baseline was measured.")
    if bench.warnings:
        words.append(" Mind the warnings.")
    return Verdict(
        outcome=outcome,
        ratio=ratio(faster.ratio),
        against=_AGAINST[over],
        sentence="".join(words),
    )


def _outcome(faster: Ratio, rounds: int) -> str:
    """Call a difference one only if the middle half of the rounds agrees on it."""
    low, high = faster.quartiles if rounds > 1 else (faster.ratio, faster.ratio)
    return "faster" if low > 1 else "slower" if high < 1 else "even"


def _where(bench: Bench) -> str:
    if bench.engine == "PowerInfer":
        return "With predictors, PowerInfer decodes"
    return "With predictors, the embedded engine (whose speed is not PowerInfer's) decodes"


def _compared(faster: Ratio, outcome: str, rounds: int) -> str:
    against = _AGAINST[faster.over]
    low, high = (ratio(end) for end in faster.quartiles)
    # The ratio is that of the medians; rounds have ratios of their own.
    spread = f"round by round {low} to {high} in the middle half of {rounds}"
    if rounds == 1:
        spread = "one round, spread unknown"
    if outcome == "even":
        return f"neither faster nor slower than {against} ({ratio(faster.ratio)} times; {spread})"
    slower = "slower: " if outcome == "slower" else ""
    return f"{slower}{ratio(faster.ratio)} times as fast as {against} ({spread})"


def _quality(bench: Bench) -> str:
    """Say what the predictors cost in perplexity."""
    shown = per_cent(abs(bench.gap))
    if shown == "0.00":
        return "its perplexity is that of all neurons"
    side = "above" if bench.gap > 0 else "below"
    sparse, dense = (bench.perplexity[name] for name in ("predicted", "all_neurons"))
    figures = f"{sparse:.4f} against {dense:.4f}"
    return f"its perplexity is {shown}\xa0% {side} that of all neurons ({figures})"
