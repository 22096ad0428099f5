"""`psp inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import TRACES, json_option
from commands.printing import echo, print_json, show
from common.urls import Url


@click.command()
@click.argument("paths", type=TRACES, metavar="ARTIFACT [ARTIFACT]", nargs=-1, required=True)
@json_option
def inspect(paths: tuple[Path | Url, ...], as_json: bool) -> None:
    """Print what an artifact is, and what it was made with; of two, how they differ.

    Of an exported file: keys, tensors, types, predictor ranks and bytes by kind. Of a directory
    with traces, predictors, a head's predictor, a sparsified model or results: what it says of
    itself.
    """
    from gguf_export.pwri.inspection import inspect_file, inspection_table
    from pipeline.artifacts import (
        compare,
        comparison_table,
        describe,
        described_table,
        made_table,
    )
    from predictor.head.artifact import HeadArtifact
    from predictor.head.table import head_table

    if len(paths) > 2:
        raise click.UsageError("one artifact is shown, two are compared; these are more.")
    if len(paths) == 2:
        if any(isinstance(path, Url) for path in paths):
            raise click.UsageError("traces in an object store are shown, not compared: copy them.")
        one, other = map(describe, paths)
        return show(compare(one, other), comparison_table, as_json=as_json)
    [path] = paths
    if isinstance(path, Url):
        return show(describe(path), described_table, as_json=as_json)
    if (path / "head.json").is_file():
        head = HeadArtifact.open(path)
        return print_json(head) if as_json else echo(f"{head_table(head)}\n\n{made_table(path)}")
    if path.is_dir():
        return show(describe(path), described_table, as_json=as_json)
    document = inspect_file(path)
    if as_json:
        return print_json(document)
    echo(inspection_table(document))
    echo("\n" + made_table(path))
