"""PowerInfer with neurons on a card and on the CPU: the same text, the planned bytes, the speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from benchmarks.gpu.hybrid_fixtures import DENSITY, fixture, fixture_q4_0, trained
from benchmarks.gpu.hybrid_programs import (
    PROMPT,
    Programs,
    Run,
    median,
    open_programs,
    speed_figure,
)
from benchmarks.gpu.hybrid_splits import (
    choose,
    choose_upstream,
    counts_of,
    place,
    scatter,
    write,
)
from benchmarks.gpu.hybrid_vram import (
    CONTEXT,
    as_planned,
    budgets,
    dense_layers,
    elsewhere,
    expected,
    neuron_budgets,
    placed_percent,
    plan_of,
)
from benchmarks.gpu.kit import Figure, Kit, Step
from gguf_export.bundle import Bundle
from gguf_export.gpu_split import captured_share, split_bytes
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.estimate.file import EstimatedFile
from powerinfer_bridge.programs.sample import RunSample

_CHUNKS, _DRY_CHUNKS = 4, 2
_MOST_GAP = {"f16": 0.5, "q4_0": 1.0}
"""Per cent that perplexity may be from the embedded engine's, which sums in another order: cuBLAS
multiplies a prompt's halves in float16, and Q4_0 becomes float16 there, where a CPU rounds what
meets it to eight bits."""

_LEAST_SAME = {"f16": 0.5, "q4_0": None}
"""Share of the greedy text. Where two tokens are as likely, it may go on otherwise."""

_ROUNDS, _AIMED, _LEAST_SPEEDUP = 2, 0.5, 2.0
"""Of the budget that is aimed at; at the others one round shows enough."""

_HOT, _SCATTERED, _DENSE = "hot neurons", "scattered neurons", "dense"


def testbed(kit: Kit) -> Iterator[Figure]:
    """Perplexity and text of a trained model: on the card, split, and in the embedded engine."""
    programs = open_programs(kit)
    text = kit.eval_data.read_text(encoding="utf-8", errors="surrogateescape")
    for kind, bundle in trained(kit).items():
        yield from _same_text(kit, programs, kind, bundle.model_file, text)
    programs.tell_failures()


def _same_text(kit: Kit, programs: Programs, kind: str, file: Path, text: str) -> Iterator[Figure]:
    """Hold one file's perplexity and greedy text against the embedded engine's."""
    engine, chunks = Engine(file), _DRY_CHUNKS if kit.dry else _CHUNKS
    reference = engine_perplexity(engine, text, CONTEXT, chunks, kind)
    words = generate(engine, PROMPT, programs.tokens).text
    for share, budget in neuron_budgets(file, (1.0, 0.5)).items():
        place(file, budget)
        where = f"{kind}, {share:.0%} of the neurons in VRAM" if programs.cuda else f"{kind}, CPU"
        found = programs.perplexity(file, text, chunks, budget)
        if found is not None:
            yield Figure(
                name=f"perplexity off the embedded engine's, {where}",
                value=100 * abs(found / reference - 1),
                unit="%",
                most=_MOST_GAP[kind],
                details={"powerinfer": found, "embedded_engine": reference, **programs.skipped},
            )
            yield from _threads(programs, where, file, text, chunks, budget, found)
        exact = partial(programs.sparse, file, budget, programs.exact_threads)
        run = programs.attempt(exact)
        if run is not None:
            yield _text_figure(where, run, words, _LEAST_SAME[kind])
        if not programs.cuda:
            return


def _threads(
    programs: Programs, where: str, file: Path, text: str, chunks: int, budget: int, exact: float
) -> Iterator[Figure]:
    """Yield what threads that overwrite each other's sums make of the perplexity."""
    if programs.threads <= programs.exact_threads:
        return
    found = programs.perplexity(file, text, chunks, budget, programs.threads)
    if found is not None:
        yield Figure(
            name=f"perplexity with {programs.threads} threads over exact sums', {where}",
            value=found / exact,
            unit="×",
            details={"perplexity": found, "exact": exact},
        )


def _text_figure(where: str, run: RunSample, words: str, least: float | None) -> Figure:
    """Return how far the text of single tokens, which other kernels decode, is the same."""
    text = run.text or ""
    longest = max(len(text), len(words))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(text, words, strict=False))
    return Figure(
        name=f"greedy text that is the embedded engine's, {where}",
        value=len(list(same)) / longest if longest else 1.0,
        least=least,
        details={"powerinfer": text, "embedded_engine": words, "notes": list(run.notes)},
    )


def placement(kit: Kit) -> Iterator[Figure]:
    """What PowerInfer puts into VRAM, from nothing to all, and whether it takes psp's index."""
    programs = open_programs(kit)
    for name in ("deep", "odd", "wide"):
        file = fixture(kit, name).model_file
        for share, budget in budgets(file).items():
            where = placed_percent(share) if programs.cuda else "CPU"
            yield from _placed(programs, f"{name}, {where}", file, budget)
            if not programs.cuda:
                break
    if programs.cuda:
        yield from _to_the_byte(programs, fixture(kit, "deep").model_file)
    programs.tell_failures()


def _placed(programs: Programs, title: str, file: Path, budget: int) -> Iterator[Figure]:
    captured, plan = place(file, budget), expected(file, budget)
    run = programs.attempt(partial(programs.sparse, file, budget))
    if run is None:
        return
    details = {"said": dict(run.device), "planned": dict(plan.sizes), "notes": list(run.notes)}
    if programs.cuda:
        yield Figure(
            name=f"GPU index taken as planned, {title}",
            value=float(as_planned(run.notes, index=plan.index)),
            least=1.0,
            details={"expected_to_be_read": plan.index, **details},
        )
        yield Figure(
            name=f"bytes elsewhere than planned, {title}",
            value=elsewhere(run.device, plan.sizes),
            unit="bytes",
            most=0,
            details=details,
        )
    yield speed_figure(title, [run], captured=captured, **programs.skipped)


def _to_the_byte(programs: Programs, file: Path) -> Iterator[Figure]:
    """Find out what PowerInfer has left for neurons: it refuses an index that needs a byte more."""
    budget = budgets(file)[_AIMED]
    left = plan_of(file, budget).ffn_budget
    chosen = choose(file, budget, counts_of(file))
    for more, fate in ((0, "taken"), (1, "refused")):
        write(file, chosen, left + more)
        run = programs.attempt(partial(programs.sparse, file, budget))
        if run is None:
            continue
        refused = "GPU index refused" in run.notes
        met = refused if more else as_planned(run.notes, index=True)
        yield Figure(
            name=f"index for the bytes left and {more} more is {fate}",
            value=float(met),
            least=1.0,
            details={"bytes_left": left, "notes": list(run.notes)},
        )
    place(file, budget)  # PowerInfer's solver may have written over it


def speed(kit: Kit) -> Iterator[Figure]:
    """Tokens per second against whole layers of the dense model in as much VRAM."""
    programs = open_programs(kit)
    shares = (_AIMED, 0.75, 0.25, 1.0, 0.0)
    yield from _against_dense(programs, fixture(kit, "wide"), shares)
    programs.tell_failures()


def q4_0(kit: Kit) -> Iterator[Figure]:
    """The same with matrices in Q4_0."""
    programs = open_programs(kit)
    yield from _against_dense(programs, fixture_q4_0(kit), (_AIMED, 1.0))
    programs.tell_failures()


def _against_dense(programs: Programs, bundle: Bundle, shares: Sequence[float]) -> Iterator[Figure]:
    every = budgets(bundle.model_file)
    for share in shares if programs.cuda else (0.0,):
        aimed = share == _AIMED
        captured: dict[str, float] = {}
        arms = _arms(programs, bundle, every[share], captured, scattered=aimed)
        runs = programs.rounds(arms, _ROUNDS if aimed else 1)
        where = placed_percent(share) if programs.cuda else "CPU"
        for title, found in runs.items():
            told: dict[str, object] = {"file": str(bundle.model_file), "budget": every[share]}
            told |= {"arm": _arm(title), "vram_share": share}
            if title in captured:
                told["captured"] = captured[title]
            yield speed_figure(f"{title}, {where}", found, **told, **programs.skipped)
        yield from _ratios(runs, where, captured, aimed=aimed)


def _arms(
    programs: Programs,
    bundle: Bundle,
    budget: int,
    captured: dict[str, float],
    *,
    scattered: bool,
) -> dict[str, Run]:
    """Return what is timed at a budget, by title.

    Args:
        programs: that run.
        bundle: the sparse and the dense file.
        budget: VRAM, bytes.
        captured: receives the share of activations on the card, by title.
        scattered: also time an index that does not know which neurons are hot.
    """
    file, dense = bundle.model_file, bundle.dense_file
    layers = dense_layers(EstimatedFile(file).bytes, budget)

    def hot() -> RunSample:
        captured[_HOT] = place(file, budget)
        return programs.sparse(file, budget)

    def cold() -> RunSample:
        captured[_SCATTERED] = scatter(file, budget)
        return programs.sparse(file, budget)

    arms: dict[str, Run] = {_HOT: hot, **({_SCATTERED: cold} if scattered else {})}
    arms[f"{_DENSE} in PowerInfer, -ngl {layers}"] = partial(programs.dense, dense, layers)
    if programs.llama_cpp is not None:
        run = partial(programs.llama_cpp_dense, dense, layers)
        arms[f"{_DENSE} in llama.cpp, -ngl {layers}"] = run
    return arms


def _arm(title: str) -> str:
    """Return the arm of a title, which also says how many layers are offloaded."""
    return title.partition(", ")[0]


def _ratios(
    runs: Mapping[str, Sequence[RunSample]],
    where: str,
    captured: Mapping[str, float],
    *,
    aimed: bool,
) -> Iterator[Figure]:
    """Yield how much faster than the faster dense engine, if one ran."""
    dense = {title: median(found) for title, found in runs.items() if title.startswith(_DENSE)}
    if not dense:
        return
    fastest = max(dense, key=lambda title: dense[title])
    for title in (title for title in (_HOT, _SCATTERED) if title in runs):
        yield Figure(
            name=f"{title} over the faster dense engine, {where}",
            value=median(runs[title]) / dense[fastest],
            unit="×",
            least=_LEAST_SPEEDUP if aimed and title == _HOT else None,
            details={"over": fastest, "density": DENSITY, "captured": captured[title], **dense},
        )


def upstream_split(kit: Kit) -> Iterator[Figure]:
    """Activations that fall on the neurons in VRAM, by the statistics: psp's over upstream's."""
    programs = open_programs(kit)
    files = {
        "trained": trained(kit)["f16"].model_file,
        **{name: fixture(kit, name).model_file for name in ("deep", "wide")},
    }
    for name, file in files.items():
        for share, budget in neuron_budgets(file, (0.1, 0.25, 0.5, 0.75)).items():
            yield from _captured(f"{name}, room for {share:.0%} of the neurons", file, budget)
    if programs.cuda:
        yield from _upstream_speed(programs, "deep", files["deep"])
    programs.tell_failures()


def _captured(title: str, file: Path, budget: int) -> Iterator[Figure]:
    plan, counts = plan_of(file, budget), counts_of(file)
    choices = {"psp": choose(file, budget, counts), "upstream": choose_upstream(file, budget)}
    shares = {name: captured_share(counts, chosen) for name, chosen in choices.items()}
    if not shares["upstream"]:
        return
    taken = {name: split_bytes(each, plan.bytes_per_neuron) for name, each in choices.items()}
    yield Figure(
        name=f"captured activations, psp over upstream, {title}",
        value=shares["psp"] / shares["upstream"],
        unit="×",
        least=1.0,
        details={"captured": shares, "bytes_left": plan.ffn_budget, "bytes_taken": taken},
    )


def _upstream_speed(programs: Programs, name: str, file: Path) -> Iterator[Figure]:
    """Time both splits of one file, whatever either captures."""
    share = 0.25
    budget = neuron_budgets(file, (share,))[share]
    theirs, left = choose_upstream(file, budget), plan_of(file, budget).ffn_budget

    def ours() -> RunSample:
        place(file, budget)
        return programs.sparse(file, budget)

    def upstream() -> RunSample:
        # It writes what is left as what the index needs (export_split.py).
        write(file, theirs, left)
        return programs.sparse(file, budget)

    runs = programs.rounds({"psp's split": ours, "upstream's split": upstream}, 2)
    for title, found in runs.items():
        yield speed_figure(f"{title}, {name}, room for {share:.0%} of the neurons", found)


STEPS = (
    Step(name="testbed", seconds=24, run=testbed),
    Step(name="placement", seconds=48, run=placement),
    Step(name="speed", seconds=42, run=speed),
    Step(name="upstream-split", seconds=8, run=upstream_split),
    Step(name="q4_0", seconds=22, run=q4_0),
)
"""Of this stage, in order of worth."""
