"""The `psp` command line: parse, build a config, call, print."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from common.errors import PspError

Command = TypeVar("Command", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)


class _Fraction(click.FloatRange):
    """A range that holds no NaN, which compares false with both ends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{number} is not a number.", param, ctx)
        return number


class _Layers(click.ParamType[tuple[int, ...]]):
    """Layer numbers such as `0-7,12`, as an ascending tuple."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        layers: set[int] = set()
        for part in value.split(","):
            first, dash, last = part.strip().partition("-")
            ends = (first, last if dash else first)
            if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends):
                self.fail(f"{part!r} is neither a layer nor a range; write 0-7 or 0,5,9-11.")
            if int(ends[0]) > int(ends[1]):
                self.fail(f"{part!r} ends before it begins.", param, ctx)
            layers.update(range(int(ends[0]), int(ends[1]) + 1))
        return tuple(sorted(layers))


class _Group(click.Group):
    """Turns the one family of user errors into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PspError as error:
            raise click.ClickException(str(error)) from error


def _model(command: Command) -> Command:
    return click.option(
        "--model", required=True, metavar="DIR|HUB_ID", help="Hugging Face checkpoint."
    )(command)


def _out(metavar: str, help_text: str) -> Callable[[Command], Command]:
    return click.option("--out", required=True, type=_PATH, metavar=metavar, help=help_text)


def _data(*, required: bool, help_text: str) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        command = click.option(
            "--field",
            default="text",
            show_default=True,
            help="Key of the text in every kind but .txt.",
        )(command)
        return click.option(
            "--data",
            required=required,
            metavar="FILE|hf:NAME[:CONFIG][:SPLIT]",
            help=f"{help_text}  FILE: .txt, .jsonl, .json or .parquet.",
        )(command)

    return decorate


def _seed(command: Command) -> Command:
    return click.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        show_default=True,
        help="Makes a run repeatable.",
    )(command)


def _threads(command: Command) -> Command:
    def apply(ctx: click.Context, parameter: click.Parameter, value: int | None) -> int:
        import torch

        if value is not None:
            torch.set_num_threads(value)
        return torch.get_num_threads()

    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        callback=apply,
        help="CPU threads.  [default: all cores]",
    )(command)


def _force(command: Command) -> Command:
    return click.option("--force", is_flag=True, help="Replace existing outputs.")(command)


def _resume(command: Command) -> Command:
    return click.option("--resume", is_flag=True, help="Go on with an interrupted run.")(command)


def _as_json(command: Command) -> Command:
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of a table."
    )(command)


def _powerinfer_bin(command: Command) -> Command:
    return click.option(
        "--powerinfer-bin",
        type=_PATH,
        metavar="DIR",
        envvar="PSP_POWERINFER_BIN",
        show_envvar=True,
        help="Directory of PowerInfer's programs; without it the embedded engine runs.",
    )(command)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="psp")
def main() -> None:
    """Activation predictors for PowerInfer, from checkpoint to benchmark."""


@main.command(short_help="Run the whole pipeline on a small model.")
@click.option(
    "--out",
    type=_PATH,
    metavar="DIR",
    default=Path("quickstart-out"),
    show_default=True,
    help="Directory for everything that is made.",
)
@click.option(
    "--size",
    type=click.Choice(["tiny", "small"]),
    default="small",
    show_default=True,
    help="tiny: seconds, for trying. small: minutes.",
)
@_seed
@_threads
@_powerinfer_bin
@_as_json
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
        _print_json({**result, "files": files})
        return
    click.echo(bench_table(result))
    click.echo("\nFiles")
    for name, path in paths.all().items():
        click.echo(f"  {name:<22} {path}")


@main.command(short_help="Record activation traces of a model.")
@_model
@_data(required=True, help_text="Text to run the model on.")
@_out("TRACES", "Directory for the traces.")
@click.option(
    "--tokens", required=True, type=click.IntRange(min=1), help="Tokens to record, in all."
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Longest window, tokens.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Windows run at once."
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16"]),
    default="float16",
    show_default=True,
    help="How predictor inputs are stored.",
)
@click.option(
    "--importance-bits",
    type=click.Choice(["0", "2", "4", "8"]),
    default="2",
    show_default=True,
    callback=lambda ctx, parameter, value: int(value),
    help="Bits an active neuron's importance takes; 8 can rank neurons, 0 stores none.",
)
@click.option(
    "--layers",
    type=_Layers(),
    metavar="0-7,12",
    help="Record these layers only, to go through the model in passes.  [default: all]",
)
@click.option(
    "--chat-template",
    type=click.Choice(["auto", "none", "minicpm"]),
    default="auto",
    show_default=True,
    help="Put text in a chat model's format; auto: the model's own if psp knows it.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "resident", "streamed"]),
    default="auto",
    show_default=True,
    help="Keep the model on the device, or read it block by block; auto: as it fits.",
)
@click.option("--device", default="cpu", show_default=True, help="Torch device of the model.")
@_seed
@_threads
@_resume
@_force
@_as_json
def collect(as_json: bool, threads: int, **options: Any) -> None:
    """Record, for every layer and token, the predictor's input and the active neurons."""
    from common.table import layer_table
    from predictor.collect import CollectConfig
    from predictor.collect import collect as run
    from predictor.summary import trace_summary

    store = run(CollectConfig(**options), lambda line: click.echo(line, err=True))
    summary = trace_summary(store)
    if as_json:
        _print_json(summary)
        return
    if store.rows < store.header.tokens:
        click.echo(f"note: the data ended after {store.rows} tokens", err=True)
    click.echo(layer_table(summary["layers"], None))
    click.echo(f"\n{store.rows} tokens of {store.documents} documents in {store.path}")


@main.group(short_help="Look into collected traces.")
def traces() -> None:
    """Print or verify a directory of traces."""


@traces.command("info", short_help="Print what a store holds.")
@click.argument("traces", type=_PATH, metavar="TRACES")
@_as_json
def traces_info(traces: Path, as_json: bool) -> None:
    """Print what traces were made from, how far they are, and every layer's sparsity."""
    from common.table import fact_table, layer_table
    from predictor.summary import trace_summary
    from predictor.traces import TraceStore

    summary = trace_summary(TraceStore.open(traces))
    if as_json:
        _print_json(summary)
        return
    layers = summary.pop("layers")
    click.echo(fact_table(summary))
    if layers:
        click.echo("\n" + layer_table(layers, None))


@traces.command("check", short_help="Verify every file of a store.")
@click.argument("traces", type=_PATH, metavar="TRACES")
@_as_json
def traces_check(traces: Path, as_json: bool) -> None:
    """Verify checksums, shapes and counts; exit code 1 at the first file that is wrong."""
    from predictor.summary import check_traces
    from predictor.traces import TraceStore

    result = check_traces(TraceStore.open(traces))
    if as_json:
        _print_json(result)
        return
    state = "complete" if result["complete"] else "interrupted, go on with 'psp collect --resume'"
    click.echo(f"{traces}: {result['files']} files of {result['tokens']} tokens are whole; {state}")


@main.command("train-predictor", short_help="Train a predictor for every layer.")
@click.option(
    "--traces", required=True, type=_PATH, metavar="TRACES", help="Directory from psp collect."
)
@_out("PREDICTORS", "Directory for the predictors.")
@click.option(
    "--rank", required=True, type=click.IntRange(min=1), help="Hidden units, a multiple of 32."
)
@click.option(
    "--recipe",
    type=click.Choice(["psp", "dejavu"]),
    default="psp",
    show_default=True,
    help="psp: ours. dejavu: the published method.",
)
@click.option(
    "--holdout",
    type=_Fraction(0, 0.9, min_open=True),
    default=0.1,
    show_default=True,
    help="Share of rows held out, by document.",
)
@click.option(
    "--label-top-fraction",
    type=_Fraction(0, 1, min_open=True),
    help="Train on each token's largest activations only (0.15 is the published clipping).",
)
@_seed
@_threads
@_resume
@_force
@_as_json
def train_predictor(as_json: bool, threads: int, **options: Any) -> None:
    """Train, and measure on documents that training never saw."""
    from common.decisions import mean_metrics
    from common.table import layer_table
    from predictor.training import TrainConfig, train_predictors

    artifact = train_predictors(TrainConfig(**options))
    layers = artifact.rows()
    mean = mean_metrics(list(artifact.layers.values()))
    if as_json:
        recipe = artifact.header.recipe["name"]
        _print_json({"predictors": str(artifact.path), "recipe": recipe, **mean, "layers": layers})
        return
    click.echo(layer_table(layers, mean))
    if missing := artifact.missing:
        click.echo(
            f"note: {len(missing)} layers are still missing, the first is {missing[0]}; collect "
            "them with --layers, then train with --resume",
            err=True,
        )


@main.command("export-gguf", short_help="Write files that PowerInfer runs.")
@_model
@click.option(
    "--predictors",
    required=True,
    type=_PATH,
    metavar="PREDICTORS",
    help="Directory from psp train-predictor.",
)
@_out("NAME.powerinfer.gguf", "Model file; the rest of the bundle is written beside it.")
@_force
@_as_json
def export_gguf(as_json: bool, **options: Any) -> None:
    """Write the model with its predictors, PowerInfer's predictor directory and statistics."""
    from gguf_export.bundle import ExportConfig, export

    bundle = export(ExportConfig(**options))
    paths = {key: str(path) for key, path in vars(bundle).items()}
    if as_json:
        _print_json(paths)
        return
    for key, path in paths.items():
        click.echo(f"{key.replace('_', ' '):<22} {path}")


@main.command("bench-powerinfer", short_help="Measure an exported file.")
@click.argument("file", type=_PATH, metavar="NAME.powerinfer.gguf")
@_powerinfer_bin
@_data(required=False, help_text="Held-out text.  [default: prose shipped with Python]")
@click.option(
    "--ctx",
    "context",
    type=click.IntRange(min=8),
    default=512,
    show_default=True,
    help="Perplexity window, tokens; at most the model's context.",
)
@click.option(
    "--chunks",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Perplexity windows, at most.",
)
@click.option("--prompt", default="The ", show_default=True, help="Text to continue.")
@click.option(
    "-n",
    "generate",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Tokens to generate.",
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each kind."
)
@_threads
@_as_json
def bench_powerinfer(as_json: bool, **options: Any) -> None:
    """Measure speed, sparsity and perplexity with predictors against all neurons."""
    from common.table import bench_table
    from powerinfer_bridge.benchmark import BenchConfig, bench

    result = bench(BenchConfig(**options))
    if as_json:
        _print_json(result)
        return
    click.echo(bench_table(result))


def _print_json(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, indent=1, ensure_ascii=False))
