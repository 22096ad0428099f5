"""`psp report`: one HTML page of one or several runs, whole in itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from common.errors import ResultError
from common.files import refuse_existing, write_bytes
from common.lock import locked
from common.typed_json import plain
from common.units import size
from common.version import tool_version
from report import answer_tables, pictures
from report.answers import drawn_note, headlines
from report.figures.evaluation import ARM_COLOURS
from report.figures.speed import PARTS
from report.runs import Run, load_runs
from report.settings import ReportConfig
from report.words import (
    ARM_TITLES,
    NOTHING,
    arms_in_order,
    baseline,
    comparison,
    per_cent,
    quantity,
    ratio,
    signed_per_cent,
    tokens_per_second,
    verdict,
    visible,
    warnings,
)
from results.bench import BENCH, Arm, Bench
from results.card import CARD, Card, CardFigure
from results.density import DENSITY
from results.estimate import ESTIMATE
from results.evaluation import EVALUATION, Evaluation
from results.parts import METRICS
from results.predictors import PREDICTORS, PredictorReport

Row = list[str]
Facts = list[tuple[str, str]]

REMEDIES = {
    "summary": ("speed and quality", BENCH.maker),
    "speed": ("speed", BENCH.maker),
    "answers": ("answers", EVALUATION.maker),
    "layers": ("layers", BENCH.maker),
    "search": ("quality against bytes", PREDICTORS.maker),
    "hot": ("hot neurons", PREDICTORS.maker),
    "memory": ("memory", BENCH.maker),
    "density": ("speed by density", DENSITY.maker),
    "estimates": ("estimate", ESTIMATE.maker),
    "card": ("what a GPU does", CARD.maker),
}
"""Name of each section, and what to run to fill it."""

_COLUMNS = {
    "summary": (
        "sparsity %",
        "recall %",
        "predicted sparsity %",
        "FFN bytes",
        "perplexity",
        "prompt tokens/s",
        "tokens/s",
        "vs dense",
    ),
    "quality": ("with predictors", "all neurons", "gap", "transformers", "greedy text"),
    "estimate": ("measured", "estimate", "estimate / measured"),
    "card": ("value", "aim", ""),
    "answers": (
        "sparsity %",
        "score %",
        "difference, points",
        "",
        "changed %",
        "became right",
        "became wrong",
        "questions",
    ),
    "other_answers": ("value", "difference", "", "questions"),
    "asked": ("task", "version", "kind", "shots", "questions", "metric, filter", "requests"),
}

_MACHINE = ("engine", "hardware", "versions", "created")
_SETTINGS = ("file", "settings", "context", "text", "prompts")
_ARM = (
    "engine",
    "file",
    "element_type",
    "threads",
    "n_gpu_layers",
    "vram_budget_bytes",
    "threshold",
    "load_seconds",
    "environment",
    "device",
)
_EVALUATION = (
    "created",
    "machine",
    "versions",
    "suite",
    "seed",
    "limit",
    "bos",
    "chat_template",
    "arms",
)
_TABLES = ("mean", "layers", "search", "curves", "hot_neurons")


def write_page(config: ReportConfig) -> list[Run]:
    """Write the page; the same results give the same bytes.

    Returns:
        What the page shows.

    Raises:
        PspError: a directory without results, a damaged result, or an output that exists.
    """
    if not config.directories:
        raise ResultError("no directory", f"name one that '{BENCH.maker}' made")
    refuse_existing(config.out, force=config.force)
    runs = load_runs(config.directories)
    with locked(config.out):
        write_bytes(config.out, render(runs).encode())
    return runs


def render(runs: Sequence[Run]) -> str:
    """Return the page of at least one run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    return environment.get_template("page.html.j2").render(contents(runs))


def _seen(value: object) -> object:
    """Make every text of a result visible; pictures are markup and stay."""
    return visible(value) if type(value) is str else value


def contents(runs: Sequence[Run]) -> dict[str, object]:
    """Return everything that the template names."""
    with pictures.page_style():
        ends = pictures.scales(runs)
        views = [_view(run, f"r{number}", ends) for number, run in enumerate(runs)]
    return {
        "title": _title(runs),
        "views": views,
        "compared": comparison(runs),
        "warnings": warnings(runs),
        "columns": _COLUMNS,
        "parts": [(pictures.COLOURS[colour][0], title) for title, colour in PARTS.values()],
        "colours": list(pictures.COLOURS.values()),
        "remedies": REMEDIES,
        "subject": ARM_TITLES["predicted"],
        "per_cent": per_cent,
        "missing": [key for key in REMEDIES if not any(view[key] for view in views)],
        "version": tool_version(),
    }


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    run = runs[0]
    measured = run.bench or run.predictors or (run.evaluation and run.evaluation.arms[0])
    return measured.model if measured else run.name


def _view(run: Run, name: str, ends: pictures.Scales) -> dict[str, object]:
    bench = run.bench
    base = None if bench is None else baseline(bench)
    return {
        "id": name,
        "run": run,
        "verdict": verdict(bench) if bench else None,
        "summary": _summary_rows(bench) if bench else [],
        "baseline": ARM_TITLES[base.name] if base else "",
        "has_dense": base is not None and base.dense,
        "quality": _quality_row(bench) if bench else [],
        "speed": pictures.speed_pictures(run, name, ends),
        "answers": _answers(run.evaluation, name) if run.evaluation else {},
        "headlines": headlines(run.evaluation) if run.evaluation else [],
        "layers": pictures.layer_pictures(run, name, ends),
        "search": pictures.search_pictures(run, name),
        "hot": pictures.hot_pictures(run, name),
        "memory": pictures.memory_pictures(run, name, ends),
        "memory_rows": _memory_rows(bench) if bench else [],
        "density": pictures.density_pictures(run, name),
        "estimates": _estimates(run),
        "card": _card_stages(run.card) if run.card else [],
        "aims": _aims(run.card) if run.card else "",
        "budgets": pictures.budget_pictures(run, name),
        "details": _details(run),
        "layer_rows": _layer_rows(run),
    }


def _answers(evaluation: Evaluation, name: str) -> dict[str, object]:
    colours = [pictures.COLOURS[colour][0] for colour in ARM_COLOURS]
    named = [arm.name for arm in evaluation.arms]
    return {
        "key": [(colours[number % len(colours)], arm) for number, arm in enumerate(named)],
        "drawn": drawn_note(evaluation),
        "pictures": pictures.answer_pictures(evaluation, name),
        "judged": answer_tables.judgements(evaluation),
        "notes": evaluation.notes,
        "suite": answer_tables.suite_table(evaluation),
        "shares": answer_tables.share_tables(evaluation),
        "others": answer_tables.other_tables(evaluation),
        "asked": answer_tables.asked_rows(evaluation),
    }


def _summary_rows(bench: Bench) -> list[Row]:
    """Return a row for each arm: its title, then the columns."""
    base = baseline(bench)
    perplexities = {"predicted": bench.ppl_sparse, "all_neurons": bench.ppl_dense}
    return [
        [
            ARM_TITLES[arm.name],
            *_decisions(bench, arm.name),
            _perplexity(perplexities.get(arm.name)),
            NOTHING if arm.prompt is None else tokens_per_second(arm.prompt.tokens_per_second),
            tokens_per_second(arm.decode.tokens_per_second),
            _against(bench, arm, base),
        ]
        for arm in arms_in_order(bench)
    ]


def _decisions(bench: Bench, arm: str) -> Row:
    sparsity = per_cent(bench.activation_sparsity)
    if arm == "all_neurons":
        return [sparsity, NOTHING, NOTHING, NOTHING]
    if arm != "predicted":
        return [NOTHING] * 4
    shares = (bench.activation_recall, bench.predicted_sparsity)
    return [sparsity, *map(per_cent, shares), f"{bench.ffn_bytes_ratio:.3f}"]


def _perplexity(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _against(bench: Bench, arm: Arm, base: Arm | None) -> str:
    if base is None:
        return NOTHING
    measured = bench.over(base.name) if arm.name == "predicted" else None
    own = arm.decode.tokens_per_second / base.decode.tokens_per_second
    return ratio(measured.ratio if measured else own)


def _quality_row(bench: Bench) -> Row:
    return [
        _perplexity(bench.ppl_sparse),
        _perplexity(bench.ppl_dense),
        signed_per_cent(bench.ppl_gap),
        _perplexity(bench.ppl_transformers),
        {True: "the same", False: "differs", None: NOTHING}[bench.greedy_text_same],
    ]


def _estimates(run: Run) -> list[tuple[str, list[Row]]]:
    """Return for what hardware the cost model expects what, by arm, beside what was measured."""
    expected = [run.bench.estimate if run.bench else None, run.estimate]
    known = [(each.hardware, each.tokens_per_second) for each in expected if each is not None]
    kept = [each for number, each in enumerate(known) if each not in known[:number]]
    return [(hardware, _estimate_rows(speeds, run.bench)) for hardware, speeds in kept]


def _estimate_rows(speeds: Mapping[str, float | None], bench: Bench | None) -> list[Row]:
    rows = []
    for name, value in speeds.items():
        arm = None if bench is None else _measured(name, bench)
        title = arm.name if arm is not None else name
        measured = None if arm is None else arm.decode.tokens_per_second
        if value is not None:
            rows.append(
                [
                    ARM_TITLES.get(title, title.replace("_", " ")),
                    NOTHING if measured is None else tokens_per_second(measured),
                    tokens_per_second(value),
                    NOTHING if measured is None else ratio(value / measured),
                ]
            )
    return rows


def _card_stages(card: Card) -> list[tuple[str, list[Row], list[str]]]:
    """Return each stage with a row for each figure, and a line for each step that did not end."""
    named = [*(each.stage for each in card.figures), *(each.stage for each in card.steps)]
    return [
        (
            stage,
            [_figure_row(each) for each in card.figures if each.stage == stage],
            [
                f"{each.step}: {each.end}; {each.line}"
                for each in card.steps
                if each.stage == stage and each.end != "done"
            ],
        )
        for stage in dict.fromkeys(named)
    ]


def _aims(card: Card) -> str:
    """Return how many of a card's aims are met, a sentence; nothing of a dry run."""
    met = [each.met for each in card.figures if each.met is not None]
    return "" if card.dry or not met else f"{sum(met)} of {len(met)} aims are met."


def _figure_row(figure: CardFigure) -> Row:
    outcome = {None: "", True: "met", False: "missed"}[figure.met]
    return [figure.name, quantity(figure.value, figure.unit), figure.aim or NOTHING, outcome]


def _measured(name: str, bench: Bench) -> Arm | None:
    """Return the arm that an estimate is about; the faster one of two dense."""
    return bench.fastest_dense() if name == "dense" else bench.arm(name)


def _memory_rows(bench: Bench) -> list[Row]:
    """Return a row for each part: its bytes on every device; the last row is their sum."""
    columns = [device.bytes for device in bench.placement.devices] if bench.placement else []
    rows = [[size(column.get(part, 0)) for column in columns] for part in PARTS]
    return [*rows, [size(sum(column.values())) for column in columns]]


def _layer_rows(run: Run) -> list[Row]:
    """Return a row for each layer: number, rank and the metrics in their order."""
    return [
        [str(each.layer), str(each.rank), *(per_cent(getattr(each, key)) for key in METRICS)]
        for each in run.layers
    ]


def _details(run: Run) -> dict[str, object]:
    bench = run.bench
    found = {} if bench is None else plain(bench)
    card = run.card.machine if run.card else {}
    return {
        "machine": _facts(found, _MACHINE) or _facts({"card": card}, ["card"]),
        "settings": _facts(found, _SETTINGS),
        "predictors": _predictor_facts(run.predictors) if run.predictors else [],
        "evaluation": _facts(plain(run.evaluation), _EVALUATION) if run.evaluation else [],
        "inputs": [
            [each.role, each.path, size(each.bytes), each.xxh3_128]
            for each in (bench.inputs if bench else ())
        ],
        "arms": [
            (ARM_TITLES[arm.name], shlex.join(arm.command), _facts(plain(arm), _ARM))
            for arm in (arms_in_order(bench) if bench else ())
        ],
        "texts": _facts(found, ("continuations",)),
    }


def _predictor_facts(report: PredictorReport) -> Facts:
    found = plain(report)
    return _facts(found, [key for key in found if key not in _TABLES])


def _facts(values: Mapping[str, object], keys: Sequence[str]) -> Facts:
    """Return some of a result's keys as lines of name and value, nested ones under dotted names."""
    kept = (key for key in keys if values.get(key) not in (None, [], {}))
    return [line for key in kept for line in _lines(key, values[key])]


def _lines(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if inner is not None:
                yield from _lines(f"{name}.{key}", inner)
    elif isinstance(value, str):
        yield name, value
    else:
        yield name, json.dumps(value, ensure_ascii=False)
