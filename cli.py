"""The `psp` command line: parse, build a config, call, print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from common.options import (
    PATH,
    Fraction,
    Group,
    Layers,
    bound_options,
    choice_option,
    count_option,
    data_option,
    force_option,
    json_option,
    model_option,
    out_option,
    powerinfer_bin_option,
    predictors_option,
    resume_option,
    seed_option,
    threads_option,
    types_options,
    vram_options,
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="psp")
def main() -> None:
    """Activation predictors for PowerInfer, from checkpoint to benchmark."""


@main.command(short_help="Run the whole pipeline on a small model.")
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    default=Path("quickstart-out"),
    show_default=True,
    help="Directory for everything that is made.",
)
@choice_option(
    "--size", ["tiny", "small"], "tiny: seconds, for trying. small: minutes.", default="small"
)
@seed_option
@threads_option
@powerinfer_bin_option
@json_option
def quickstart(
    out: Path, size: str, seed: int, threads: int, powerinfer_bin: Path | None, as_json: bool
) -> None:
    """Train a small ReGLU LLaMA and take it through all four commands.

    Text: the source of the Python standard library. A second run reuses finished steps.
    """
    from common.table import bench_table
    from quickstart.pipeline import QuickstartConfig
    from quickstart.pipeline import quickstart as run

    config = QuickstartConfig(
        out=out, size=size, seed=seed, threads=threads, powerinfer_bin=powerinfer_bin
    )
    result, paths = run(config)
    if as_json:
        files = {name: str(path) for name, path in paths.all().items()}
        return _print_json({**result, "files": files})
    _echo(bench_table(result))
    _echo("\nFiles")
    for name, path in paths.all().items():
        _echo(f"  {name:<22} {path}")


@main.command(short_help="Record activation traces of a model.")
@model_option
@data_option(required=True, help_text="Text to run the model on.")
@out_option("TRACES", "Directory for the traces.")
@count_option("--tokens", required=True, least=1, help_text="Tokens to record, in all.")
@count_option("--context", default=512, least=2, help_text="Longest window, tokens.")
@count_option("--batch", default=8, least=1, help_text="Windows run at once.")
@choice_option("--dtype", ["float16", "bfloat16"], "How predictor inputs are stored.")
@choice_option(
    "--importance-bits",
    ["0", "2", "4", "8"],
    "Bits an active neuron's importance takes; 8 can rank neurons, 0 stores none.",
    default="2",
    callback=lambda ctx, parameter, value: int(value),
)
@click.option(
    "--layers",
    type=Layers(),
    metavar="0-7,12",
    help="Record these layers only, to go through the model in passes.  [default: all]",
)
@choice_option(
    "--chat-template",
    ["auto", "none", "minicpm"],
    "Put text in a chat model's format; auto: the model's own if psp knows it.",
)
@choice_option(
    "--weights",
    ["auto", "resident", "streamed"],
    "Keep the model on the device, or read it block by block; auto: as it fits.",
)
@click.option("--device", default="cpu", show_default=True, help="Torch device of the model.")
@seed_option
@threads_option
@resume_option
@force_option
@json_option
def collect(as_json: bool, threads: int, **options: Any) -> None:
    """Record, for every layer and token, the predictor's input and the active neurons."""
    from common.table import layer_table
    from predictor.collect import CollectConfig
    from predictor.collect import collect as run
    from predictor.summary import trace_summary

    store = run(CollectConfig(**options), lambda line: click.echo(line, err=True))
    summary = trace_summary(store)
    if as_json:
        return _print_json(summary)
    if store.rows < store.header.tokens:
        click.echo(f"note: the data ended after {store.rows} tokens", err=True)
    _echo(layer_table(summary["layers"], None))
    _echo(f"\n{store.rows} tokens of {store.documents} documents in {store.path}")


@main.group(short_help="Look into collected traces.")
def traces() -> None:
    """Print or verify a directory of traces."""


@traces.command("info", short_help="Print what a store holds.")
@click.argument("traces", type=PATH, metavar="TRACES")
@json_option
def traces_info(traces: Path, as_json: bool) -> None:
    """Print what traces were made from, how far they are, and every layer's sparsity."""
    from common.table import fact_table, layer_table
    from predictor.summary import trace_summary
    from predictor.traces import TraceStore

    summary = trace_summary(TraceStore.open(traces))
    if as_json:
        return _print_json(summary)
    layers = summary.pop("layers")
    _echo(fact_table(summary))
    if layers:
        _echo("\n" + layer_table(layers, None))


@traces.command("check", short_help="Verify every file of a store.")
@click.argument("traces", type=PATH, metavar="TRACES")
@json_option
def traces_check(traces: Path, as_json: bool) -> None:
    """Verify checksums, shapes and counts; exit code 1 at the first file that is wrong."""
    from predictor.summary import check_traces
    from predictor.traces import TraceStore

    result = check_traces(TraceStore.open(traces))
    if as_json:
        return _print_json(result)
    state = "complete" if result["complete"] else "interrupted, go on with 'psp collect --resume'"
    _echo(f"{traces}: {result['files']} files of {result['tokens']} tokens are whole; {state}")


@main.command("train-predictor", short_help="Train a predictor for every layer.")
@click.option(
    "--traces", required=True, type=PATH, metavar="TRACES", help="Directory from psp collect."
)
@out_option("PREDICTORS", "Directory for the predictors.")
@choice_option(
    "--recipe",
    ["psp", "svd", "dejavu"],
    "psp: ours. svd: without training. dejavu: the published method.",
)
@bound_options
@click.option(
    "--report", type=PATH, metavar="DIR", help="Also write metrics, curves and plots to DIR."
)
@click.option(
    "--holdout",
    type=Fraction(0, 0.9, min_open=True),
    default=0.1,
    show_default=True,
    help="Share of rows held out, by document.",
)
@click.option(
    "--label-top-fraction",
    type=Fraction(0, 1, min_open=True),
    help="Train on each token's largest activations only (0.15 is the published clipping).",
)
@seed_option
@threads_option
@resume_option
@force_option
@json_option
def train_predictor(as_json: bool, threads: int, report: Path | None, **options: Any) -> None:
    """Train, and measure on documents that training never saw."""
    from common.decisions import mean_metrics
    from common.table import layer_table
    from predictor.report import report_predictors
    from predictor.traces import TraceStore
    from predictor.training import TrainConfig, train_predictors

    config = TrainConfig(**options)
    artifact = train_predictors(config, _note)
    if report is not None:
        traces = TraceStore.open(config.traces)
        kind, force = config.predictor_type, config.force
        report_predictors(report, traces, artifact, predictor_type=kind, force=force)
    layers = artifact.rows()
    mean = mean_metrics(list(artifact.layers.values()))
    if as_json:
        recipe = artifact.header.recipe["name"]
        search = {"ranks": artifact.ranks, "search": artifact.search}
        names = {"predictors": str(artifact.path), "recipe": recipe}
        document = {**names, **mean, **search, "layers": layers}
        return _print_json(document)
    _echo(layer_table(layers, mean))
    if missing := artifact.missing:
        click.echo(
            f"note: {len(missing)} layers are still missing, the first is {missing[0]}; collect "
            "them with --layers, then train with --resume",
            err=True,
        )


@main.command("export-gguf", short_help="Write files that PowerInfer runs.")
@model_option
@predictors_option
@out_option("NAME.powerinfer.gguf", "Model file; the rest of the bundle is written beside it.")
@types_options
@click.option(
    "--dense",
    is_flag=True,
    help="Also write NAME.dense.gguf, to time against; for arch llama its text is wrong.",
)
@vram_options(required=False)
@click.option("--no-verify", is_flag=True, help="Skip the check of the written file.")
@force_option
@json_option
def export_gguf(
    as_json: bool,
    no_verify: bool,
    vram_budget: str | None,
    context: int,
    kv_type: str,
    **options: Any,
) -> None:
    """Write the model with its predictors, PowerInfer's predictor directory and statistics.

    The file is verified before it gets its name; one that fails is not kept.
    """
    from common.table import export_table
    from gguf_export.bundle import ExportConfig, export
    from gguf_export.split_file import SplitConfig, split
    from powerinfer_bridge.verification import ExportCheck

    config, split_config = ExportConfig(**options, split=vram_budget is not None), None
    if vram_budget is not None:
        split_config = SplitConfig(
            file=config.out, vram_budget=vram_budget, context=context, kv_type=kv_type
        )
    check = None if no_verify else ExportCheck(config.model, config.out)
    bundle = export(config, check)
    _warn(bundle.warnings)
    if check is not None and check.hint:
        click.echo(f"note: {check.hint}", err=True)
    document = {
        **bundle.document(),
        "verified": check and check.document,
        **({} if split_config is None else split(split_config)),
    }
    if as_json:
        return _print_json(document)
    _echo(export_table(document))


@main.command("gpu-split", short_help="Choose which neurons live in VRAM.")
@click.argument("file", type=PATH, metavar="NAME.powerinfer.gguf")
@vram_options(required=True)
@force_option
@json_option
def gpu_split(as_json: bool, **options: Any) -> None:
    """Write FILE.generated.gpuidx for a VRAM budget, from the statistics beside the file.

    PowerInfer loads it instead of running its own solver.
    """
    from common.table import split_table
    from gguf_export.split_file import SplitConfig, split

    document = split(SplitConfig(**options))
    if as_json:
        return _print_json(document)
    _echo(split_table(document))


@main.command(short_help="Check that PowerInfer will run a file correctly.")
@click.argument("file", type=PATH, metavar="NAME.powerinfer.gguf")
@click.option(
    "--model", metavar="DIR|HUB_ID", help="Compare tensors, tokens and logits with this checkpoint."
)
@click.option(
    "--max-ppl-gap",
    type=Fraction(0, min_open=True),
    help="With --model: largest perplexity gap that passes, a fraction.",
)
@json_option
def verify(as_json: bool, file: Path, **options: Any) -> None:
    """Check a file against PowerInfer's contract; exit code 0 only if everything holds."""
    from powerinfer_bridge.verification import verification_table
    from powerinfer_bridge.verification import verify as run

    document = run(file, **options)
    if as_json:
        _print_json(document)
    else:
        _echo(verification_table(document))
    if not document["ok"]:
        raise click.exceptions.Exit(1)


@main.command(short_help="Print what a GGUF file holds.")
@click.argument("file", type=PATH, metavar="FILE.gguf")
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Print keys, tensors, types, predictor ranks and bytes by kind."""
    from powerinfer_bridge.inspection import inspect_file, inspection_table

    document = inspect_file(file)
    if as_json:
        return _print_json(document)
    _echo(inspection_table(document))


@main.command("bench-powerinfer", short_help="Measure an exported file.")
@click.argument("file", type=PATH, metavar="NAME.powerinfer.gguf")
@powerinfer_bin_option
@data_option(required=False, help_text="Held-out text.  [default: prose shipped with Python]")
@count_option(
    "--ctx",
    "context",
    default=512,
    least=8,
    help_text="Perplexity window, tokens; at most the model's context.",
)
@count_option("--chunks", default=16, least=1, help_text="Perplexity windows, at most.")
@click.option("--prompt", default="The ", show_default=True, help="Text to continue.")
@count_option("-n", "generate", default=64, least=2, help_text="Tokens to generate.")
@count_option("--repeats", default=3, least=1, help_text="Runs of each kind.")
@threads_option
@json_option
def bench_powerinfer(as_json: bool, **options: Any) -> None:
    """Measure speed, sparsity and perplexity with predictors against all neurons."""
    from common.table import bench_table
    from powerinfer_bridge.benchmark import BenchConfig, bench

    result = bench(BenchConfig(**options))
    if as_json:
        return _print_json(result)
    _echo(bench_table(result))


def _note(line: str) -> None:
    click.echo(f"note: {line}", err=True)


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


def _print_json(document: Mapping[str, Any]) -> None:
    _echo(json.dumps(document, indent=1, ensure_ascii=False))


def _echo(text: str) -> None:
    """Print text; a file name's bytes that are no characters come escaped, as JSON has them."""
    click.echo(text.encode("utf-8", "backslashreplace").decode())
