"""What the page says in words: numbers, the answer in a sentence, and warnings.

The answer: is it faster, than what, by how much, at what quality. Bytes are `common.units.size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from report.runs import Run
from results.bench import DAMAGE, Arm, Bench
from results.parts import Ratio

NOTHING = "–"
_LONGEST = 4000

ARM_TITLES = {
    "predicted": "predicted neurons",
    "all_neurons": "all neurons, same engine",
    "second_engine": "exact sparsity, in PowerInfer's second engine",
    "dense_powerinfer": "dense, in PowerInfer",
    "dense_llama_cpp": "dense, in llama.cpp",
    "dense_llama_cpp_silu": "dense, in llama.cpp as arch llama (SiLU)",
}
_AGAINST = {
    "all_neurons": "computing all neurons in the same engine",
    "second_engine": "exact sparsity in PowerInfer's second engine",
    "dense_powerinfer": "the dense model in PowerInfer",
    "dense_llama_cpp": "the dense model in llama.cpp",
    "dense_llama_cpp_silu": "the dense model in llama.cpp as arch llama (SiLU)",
}

_ALIKE = {
    "model": "are of different models: their speeds and perplexities do not compare",
    "hardware": "were made on different machines: their speeds do not compare",
    "engine": "ran in different engines: their speeds do not compare",
    "context": "took other perplexity windows: their perplexities do not compare",
    "text": "took other texts: their perplexities and sparsities do not compare",
}


def per_cent(share: float) -> str:
    """Return a share in per cent, without the sign, as model cards have it."""
    return f"{100 * share:.2f}"


def signed_per_cent(share: float) -> str:
    """Return a change in per cent, with sign."""
    text = f"{100 * share:+.2f}\xa0%".replace("-", "−")
    return text[1:] if text[1:].startswith("0.00") else text


def tokens_per_second(value: float) -> str:
    """Return tokens per second, three digits or more."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def quantity(value: float, unit: str) -> str:
    """Return a number of four digits with its unit."""
    shown = f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return f"{shown} {unit}" if unit else shown


def ratio(value: float) -> str:
    """Return how many times as much."""
    return f"{value:.2f}"


def visible(text: str) -> str:
    """Escape what cannot be seen: control characters, turns of writing direction, half surrogates.

    Otherwise a hostile name could show another text than it holds.
    """
    kept = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return "".join(c if c.isprintable() or c in "\n\t\xa0" else ascii(c)[1:-1] for c in kept)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a benchmark shows.

    Attributes:
        outcome: `faster`, `slower` or `even`.
        ratio: times as fast, as text.
        sentence: all of it.
    """

    outcome: str
    ratio: str
    sentence: str


def arms_in_order(bench: Bench) -> list[Arm]:
    """Return the arms in the order of `ARM_TITLES`."""
    return sorted(bench.arms, key=lambda arm: list(ARM_TITLES).index(arm.name))


def baseline(bench: Bench) -> Arm | None:
    """Return the fastest dense arm, or else that with all neurons."""
    return bench.fastest_dense() or bench.arm("all_neurons")


def verdict(bench: Bench) -> Verdict | None:
    """Judge a benchmark; None if it compares nothing."""
    over, predicted = baseline(bench), bench.arm("predicted")
    faster = None if over is None else bench.over(over.name)
    if over is None or predicted is None or faster is None:
        return None
    outcome = _outcome(faster, predicted.decode.rounds)
    words = [
        f"{_where(bench)} {tokens_per_second(predicted.decode.tokens_per_second)} tokens/s, "
        f"{_compared(faster, outcome, predicted.decode.rounds)}"
    ]
    if over.dense and (second := bench.over("all_neurons")) is not None:
        words.append(f", and {ratio(second.ratio)} times as fast as {_AGAINST['all_neurons']}")
    words.append(f"; {_quality(bench)}.")
    if not over.dense:
        words.append(" No dense baseline was measured.")
    if bench.warnings:
        words.append(" Mind the warnings.")
    return Verdict(
        outcome=outcome,
        ratio=ratio(faster.ratio),
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
    return f"{_gap(bench)}{_damage(bench)}"


def _damage(bench: Bench) -> str:
    """Say what the threads that were timed make of it, where that is another text."""
    if bench.damage is None or abs(bench.damage) <= DAMAGE:
        return ""
    return (
        f", but {bench.ppl_threads:.4f} with the threads that were timed, which overwrite each "
        "other's sums: at this speed the text is wrong"
    )


def _gap(bench: Bench) -> str:
    shown = per_cent(abs(bench.ppl_gap))
    if shown == "0.00":
        return "its perplexity is that of all neurons"
    side = "above" if bench.ppl_gap > 0 else "below"
    figures = f"{bench.ppl_sparse:.4f} against {bench.ppl_dense:.4f}"
    return f"its perplexity is {shown}\xa0% {side} that of all neurons ({figures})"


def comparison(runs: Sequence[Run]) -> str | None:
    """Say which of several runs decodes fastest with predictors; None if they do not compare."""
    measured = [run.bench for run in runs if run.bench is not None]
    if any(_unlike(measured, key) for key in ("model", "hardware", "engine")):
        return None
    speeds = [
        (arm.decode.tokens_per_second, run.name)
        for run in runs
        if run.bench is not None and (arm := run.bench.arm("predicted")) is not None
    ]
    if len(speeds) < 2:
        return None
    (first, best), (second, next_best) = sorted(speeds, key=lambda each: -each[0])[:2]
    return (
        f"Fastest of {len(speeds)} with predictors: {best}, {tokens_per_second(first)} tokens/s, "
        f"{ratio(first / second)} times as fast as {next_best}, the next."
    )


def warnings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return every run's warnings, and those about comparing the runs: whose, and the line."""
    measured = [run.bench for run in runs if run.bench is not None]
    own = [(run.name, line) for run in runs if run.bench for line in _of_run(run.bench)]
    own += [(run.name, line) for run in runs for line in _unfinished(run)]
    differing = [line for key, line in _ALIKE.items() if _unlike(measured, key)]
    differing += _other_questions(runs)
    return [("all runs", f"The runs {line}.") for line in differing] + own


def _of_run(bench: Bench) -> list[str]:
    """Return a benchmark's warnings, and what its programs said that a reader must know."""
    notes = ((arm.name, note) for arm in arms_in_order(bench) for note in arm.notes)
    own = [warned.text for warned in bench.warnings]
    return [*own, *(f"{ARM_TITLES[name]}: {note}" for name, note in notes)]


def _unfinished(run: Run) -> list[str]:
    """Return what an evaluation left open."""
    left = run.evaluation.unfinished if run.evaluation else ()
    return [f"not finished: {line}" for line in left]


def _other_questions(runs: Sequence[Run]) -> list[str]:
    """Return a line if a task of one name put other requests in several runs."""
    asked: dict[str, set[str]] = {}
    for run in runs:
        for task in run.evaluation.tasks if run.evaluation else ():
            asked.setdefault(task.name, set()).add(task.requests_hash)
    others = [name for name, hashes in asked.items() if len(hashes) > 1]
    if not others:
        return []
    more = f" and {len(others) - 1} more tasks" if len(others) > 1 else ""
    return [f"answered other requests of {others[0]}{more}: their scores do not compare"]


def _unlike(measured: Sequence[Bench], key: str) -> bool:
    return any(getattr(bench, key) != getattr(measured[0], key) for bench in measured[1:])
