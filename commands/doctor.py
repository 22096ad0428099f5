"""`psp doctor`."""

from __future__ import annotations

from typing import Any

import click

from commands.options import PATH, json_option, powerinfer_bin_option
from commands.printing import echo, print_json


@click.command(short_help="Check machine, programs and a file; say what to mend.")
@click.argument("file", type=PATH, metavar="[NAME.powerinfer.gguf]", required=False)
@powerinfer_bin_option
@click.option(
    "--llama-cpp-bin",
    type=PATH,
    metavar="DIR",
    envvar="PSP_LLAMA_CPP_BIN",
    show_envvar=True,
    help="Directory of llama.cpp's programs.",
)
@click.option("--model", type=PATH, metavar="DIR", help="Hugging Face checkpoint to look at too.")
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Where outputs will go.  [default: beside the file, or here]",
)
@json_option
def doctor(as_json: bool, **options: Any) -> None:
    """Check that this machine can do the work; exit code 0 only if there is no problem."""
    from powerinfer_bridge.doctor.examination import DoctorConfig, examine
    from powerinfer_bridge.doctor.table import doctor_table

    document = examine(DoctorConfig(**options))
    if as_json:
        print_json(document)
    else:
        echo(doctor_table(document))
    if not document["healthy"]:
        raise click.exceptions.Exit(1)
