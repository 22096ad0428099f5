"""The command line: help, exit codes, one-line errors, and the four commands end to end."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import TEXT
from readied import Readied

from cli import main
from gguf_export.bundle import Bundle

Psp = Callable[..., Result]
Steps = dict[str, tuple[object, ...]]
Pipeline = tuple[Steps, dict[str, str]]
COMMANDS = dict(main.commands)
FFN_METRICS = {
    "activation_sparsity",
    "activation_recall",
    "precision",
    "predicted_sparsity",
    "ffn_bytes_ratio",
}
SMALL_BENCH = ("--ctx", 64, "--chunks", 2, "-n", 4, "--repeats", 1, "--threads", 1)


@pytest.fixture(autouse=True)
def _no_powerinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PSP_POWERINFER_BIN", raising=False)


def strict_json(text: str) -> dict[str, Any]:
    """Parse exactly one JSON document, without the NaN and Infinity that JSON does not have."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return document


def said(result: Result) -> list[str]:
    """Return the lines on stderr but for what collect says it needs and reads tokens with."""
    told = ("disk: needs ", "tokens: ")
    return [line for line in result.stderr.splitlines() if not line.startswith(told)]


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    assert said(result) == [], "nothing to say when all went well"
    return result.stdout


def refused(result: Result) -> str:
    """Check that a user error took one line on stderr and nothing on stdout; return the line."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = said(result)
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    problem, _, remedy = lines[0].rpartition("; ")
    assert problem, f"no remedy in {lines[0]!r}"
    assert remedy
    return lines[0]


def in_a_row(text: str) -> str:
    return " ".join(text.split())


def test_help_lists_every_command(psp: Psp) -> None:
    output = in_a_row(succeeded(psp("--help")))
    four = {"collect", "train-predictor", "export-gguf", "bench-powerinfer"}
    files = {"gpu-split", "inspect", "quickstart", "traces", "verify"}
    others = {"bench-operators", "doctor", "estimate", "evaluate", "generate"}
    others |= {"report", "run", "serve-check"}
    sparse = {"sparsify", "sparsity"}
    assert set(COMMANDS) == four | files | others | sparse
    for name, command in COMMANDS.items():
        assert command.short_help
        assert f"{name} {command.short_help}" in output
    assert succeeded(psp("-h")) == succeeded(psp("--help"))
    assert "version" in succeeded(psp("--version"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_help_lists_every_option_with_its_default(psp: Psp, name: str) -> None:
    output = in_a_row(succeeded(psp(name, "--help")))
    assert succeeded(psp(name, "-h")) == succeeded(psp(name, "--help"))
    for parameter in COMMANDS[name].params:
        if not isinstance(parameter, click.Option):
            continue
        for spelling in parameter.opts:
            assert f" {spelling} " in output or f" {spelling}, -" in output
        assert parameter.help, f"{parameter.name} says nothing"
        assert in_a_row(parameter.help) in output
        default = parameter.default
        if isinstance(default, str | int | float | Path) and not isinstance(default, bool):
            assert in_a_row(f"[default: {default}") in output, parameter.name


def test_help_describes_defaults_that_are_not_plain_values(psp: Psp) -> None:
    output = in_a_row(succeeded(psp("bench-powerinfer", "--help")))
    assert "[env var: PSP_POWERINFER_BIN]" in output
    assert "[default: prose shipped with Python]" in output
    assert "[default: all cores]" in output


def fresh(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)])
def test_help_stays_light(arguments: tuple[str, ...]) -> None:
    done = fresh(
        "import sys\nfrom cli import main\n"
        "assert not main(sys.argv[1:], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'gguf', 'numpy'} & {*sys.modules}))",
        *arguments,
        "--help",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_list_of_commands_imports_none_of_them() -> None:
    code = "import sys\nfrom cli import main\nmain(['--help'], standalone_mode=False)\n"
    done = fresh(
        f"{code}print(sorted(name for name in sys.modules if name.startswith('commands.')))"
    )
    assert done.stdout.splitlines()[-1] == "['commands.group', 'commands.streams']"


USAGE_ERRORS = [
    (["no-such-command"], "No such command 'no-such-command'"),
    (["collect", "--no-such-option"], "No such option"),
    (["collect"], "Missing option '--model'"),
    (["collect", "--model", "m", "--data", "d", "--out", "o"], "Missing option '--tokens'"),
    (["collect", "--tokens", "0"], "'--tokens': 0 is not in the range x>=1"),
    (["collect", "--tokens", "many"], "'--tokens': 'many' is not a valid integer"),
    (["collect", "--context", "1"], "'--context': 1 is not in the range x>=2"),
    (["collect", "--dtype", "int8"], "'--dtype': 'int8' is not one of"),
    (["train-predictor", "--seed", "-1"], "'--seed': -1 is not in the range"),
    (["collect", "--seed", str(2**70)], "'--seed': 1180591620717411303424 is not in the range"),
    (["train-predictor", "--rank", "all"], "'--rank': 'all' is no rank; write auto, 32, or one"),
    (["train-predictor", "--rank", "32,"], "'--rank': '32,' is no rank"),
    (["train-predictor", "--max-ppl-gap", "x%"], "'--max-ppl-gap': 'x%' is not a number"),
    (["train-predictor", "--ffn-bytes", "150%"], "'--ffn-bytes': 1.5 is not in the range"),
    (
        ["train-predictor", "--traces", "t", "--out", "o", "--rank", "32", "--hardware", "h200"],
        "--hardware goes with --rank auto",
    ),
    (["train-predictor", "--recipe", "best"], "'--recipe': 'best' is not one of 'psp', 'svd', "),
    (["train-predictor", "--holdout", "1"], "'--holdout': 1.0 is not in the range"),
    (["train-predictor", "--holdout", "nan"], "'--holdout': nan is not"),
    (["train-predictor", "--label-top-fraction", "nan"], "'--label-top-fraction': nan is not"),
    (
        ["export-gguf", "--model", "m", "--out", "o.powerinfer.gguf"],
        "Missing option '--predictors'",
    ),
    (["bench-powerinfer"], "Missing argument 'NAME.powerinfer.gguf'"),
    (["bench-powerinfer", "f", "-n", "1"], "'-n': 1 is not in the range x>=2"),
    (["bench-powerinfer", "f", "--threads", "0"], "'--threads': 0 is not in the range x>=1"),
    (["quickstart", "--size", "huge"], "'--size': 'huge' is not one of 'tiny', 'small'"),
]


@pytest.mark.parametrize(("arguments", "problem"), USAGE_ERRORS)
def test_wrong_usage_exits_2_and_says_what_is_wrong(
    psp: Psp, arguments: list[str], problem: str
) -> None:
    result = psp(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: ")
    assert problem in result.stderr.splitlines()[-1]


LONG = "x" * 300
USER_ERRORS: dict[str, tuple[str, str]] = {
    "no model": ("collect --model nowhere --data DATA --out O --tokens 9", "nowhere: no such dir"),
    "no data": ("collect --model MODEL --data no.txt --out O --tokens 9", "no.txt: no such file"),
    "no kind": ("collect --model MODEL --data a.md --out O --tokens 9", "a.md: unknown kind"),
    "no field": ("collect --model MODEL --data DATA --field x --out O --tokens 9", "'x'"),
    "no device": ("collect --model MODEL --data DATA --device x --out O --tokens 9", "--device"),
    "collected": ("collect --model MODEL --data DATA --out TAKEN --tokens 9", "--resume"),
    "below a file": ("collect --model MODEL --data DATA --out FILE/o --tokens 9", "FILE/o"),
    "long model": (f"collect --model {LONG} --data DATA --out O --tokens 9", LONG),
    "long data": (f"collect --model MODEL --data {LONG}.txt --out O --tokens 9", LONG),
    "long out": (f"collect --model MODEL --data DATA --out {LONG} --tokens 9", LONG),
    "no traces": ("train-predictor --traces nowhere --out O --rank 32", "nowhere/manifest.json"),
    "odd rank": ("train-predictor --traces MODEL --out O --rank 33", "rank 33"),
    "no predictors": (
        "export-gguf --model MODEL --predictors MODEL --out O.powerinfer.gguf",
        "MODEL: a checkpoint without predictors",
    ),
    "exported": ("export-gguf --model MODEL --predictors EXACT --out FILE", "FILE exists"),
    "no file": ("bench-powerinfer nowhere.gguf", "nowhere.gguf: No such file"),
    "not a file of ours": ("bench-powerinfer DATA", "DATA: magic is"),
    "no PowerInfer": ("bench-powerinfer FILE --powerinfer-bin nowhere", "nowhere/main"),
    "no text": ("bench-powerinfer FILE --data no.txt", "no.txt: no such file"),
    "no prompt": ("bench-powerinfer FILE --prompt ''", "the prompt is empty"),
    "little text": ("bench-powerinfer FILE --data SHORT --ctx 64 -n 4", "needs 128"),
    "no quickstart": ("quickstart --out TAKEN", "TAKEN: exists and is no quickstart"),
    "quickstart in a file": ("quickstart --out FILE", "FILE"),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_a_user_s_error_exits_1_with_one_line(
    psp: Psp,
    model_dir: Path,
    data_file: Path,
    exact_dir: Path,
    exact_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("precious")
    places = {
        "MODEL": model_dir,
        "DATA": data_file,
        "EXACT": exact_dir,
        "FILE": exact_bundle.model_file,
        "SHORT": tmp_path / "short.txt",
        "TAKEN": tmp_path / "taken",
    }
    line, thing = USER_ERRORS[name]
    for word, place in places.items():
        line, thing = line.replace(word, str(place)), thing.replace(word, str(place))
    assert thing in refused(psp(*shlex.split(line)))
    assert (tmp_path / "taken" / "precious").read_text() == "precious"


def test_half_a_character_in_the_data_is_refused_or_read(
    psp: Psp, model_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    data = tmp_path / "half.jsonl"
    data.write_text(json.dumps({"text": f"half \ud83d a character\n{TEXT}"}) + "\n")
    collect = ("collect", "--model", model_dir, "--out", tmp_path / "t", "--tokens", 99)
    bench = ("bench-powerinfer", exact_bundle.model_file, *SMALL_BENCH)
    for command in (collect, bench):
        result = psp(*command, "--data", data)
        assert result.exit_code == 0 or str(data) in refused(result)


def test_a_user_s_error_shows_no_traceback_in_a_terminal(new_python: Readied) -> None:
    done = new_python("from cli import main; main()", "inspect", "nowhere.gguf")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "Error: nowhere.gguf: No such file or directory; pass a file made by 'psp export-gguf'"
    ]


def test_a_bug_keeps_its_traceback(psp: Psp, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("gguf_export.bundle.export", broken)
    options = ("--model", "m", "--predictors", "p", "--out", "o.powerinfer.gguf")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        psp("export-gguf", *options)


@pytest.mark.parametrize("file", ["shared/part", None])
def test_a_disk_that_is_gone_costs_one_line_wherever_it_is_met(
    psp: Psp, monkeypatch: pytest.MonkeyPatch, file: str | None
) -> None:
    def gone(*arguments: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", file)

    monkeypatch.setattr("gguf_export.bundle.export", gone)
    options = ("--model", "m", "--predictors", "p", "--out", "o.powerinfer.gguf")
    result = psp("export-gguf", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: {file or 'a file'}: Stale file handle; look at its disk, then start again, with "
        "--resume where the command has that"
    ]


def steps(model: Path, data: Path, text: Path, out: Path) -> Steps:
    """Return the four commands, each working on what the one before made."""
    traces, predictors, file = out / "traces", out / "predictors", out / "m.powerinfer.gguf"
    collect = ("collect", "--model", model, "--data", data, "--out", traces)
    train = ("train-predictor", "--traces", traces, "--out", predictors, "--rank", 32)
    return {
        "collect": (*collect, "--tokens", 900, "--context", 64, "--importance-bits", 8),
        "train": (*train, "--recipe", "dejavu", "--label-top-fraction", 0.5),
        "export": ("export-gguf", "--model", model, "--predictors", predictors, "--out", file),
        "bench": ("bench-powerinfer", file, "--data", text, *SMALL_BENCH),
    }


@pytest.fixture(scope="session")
def pipeline(
    model_dir: Path, data_file: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pipeline:
    """Run all four commands with --json; returns them and their output."""
    made = steps(model_dir, data_file, text_file, tmp_path_factory.mktemp("the pipeline"))
    outputs = {}
    for name, command in made.items():
        arguments = [*map(str, command), "--json"]
        runner = CliRunner(env={"PSP_POWERINFER_BIN": None})
        outputs[name] = succeeded(runner.invoke(main, arguments, catch_exceptions=False))
    return made, outputs


def test_json_of_the_pipeline_speaks_the_glossary(pipeline: Pipeline) -> None:
    found = {name: strict_json(output) for name, output in pipeline[1].items()}
    collected, trained, bench = found["collect"], found["train"], found["bench"]
    named = {"traces", "tokens", "documents", "activation_sparsity", "layers"}
    assert set(collected) >= named | {"bytes", "d_model", "d_ff", "chat_template"}
    assert (collected["tokens"], collected["documents"]) == (900, 5)
    assert set(trained) == FFN_METRICS | {
        "predictors",
        "recipe",
        "ranks",
        "types",
        "dense",
        "search",
        "layers",
    }
    assert trained["recipe"] == "dejavu"
    outputs = {"model_file", "predictor_directory", "activation_directory", "manifest"}
    assert set(found["export"]) == outputs | {"verified", "warnings"}
    assert all(Path(found["export"][name]).exists() for name in outputs)
    speeds = {"tokens_per_second", "tokens_per_second_dense", "speedup"}
    assert set(bench) >= FFN_METRICS | {"ppl_dense", "ppl_sparse", "ppl_gap", "layers"} | speeds
    assert bench["ppl_gap"] == pytest.approx(bench["ppl_sparse"] / bench["ppl_dense"] - 1)
    assert bench["engine"] == "embedded engine"
    for document in (collected, trained, bench):
        assert len(document["layers"]) == 2
        for key in FFN_METRICS & set(document):
            values = [layer[key] for layer in document["layers"]]
            assert 0 < sum(values) / 2 == pytest.approx(document[key])


def test_tables_of_the_pipeline_show_the_same_figures(
    psp: Psp, pipeline: Pipeline, model_dir: Path, data_file: Path, text_file: Path, tmp_path: Path
) -> None:
    found = {name: strict_json(output) for name, output in pipeline[1].items()}
    made = steps(model_dir, data_file, text_file, tmp_path / "t")
    # The finished training prints its table again.
    train = pipeline[0]["train"]
    made["train"] = (*train, "--resume")
    trained = Path(str(train[train.index("--out") + 1]))
    shutil.copytree(trained, tmp_path / "t" / "predictors")
    output = {name: succeeded(psp(*command)) for name, command in made.items()}
    assert f"900 tokens of 5 documents in {tmp_path / 't' / 'traces'}" in output["collect"]
    assert output["train"].splitlines()[-1].split()[0] == "mean"
    assert f"{100 * found['train']['activation_recall']:.2f}" in output["train"]
    for path in ("m.powerinfer.gguf", "m.predictors", "activation"):
        assert str(tmp_path / "t" / path) in output["export"]
    assert f"{found['bench']['ppl_sparse']:.4f}" in output["bench"]
    assert "engine: embedded engine; its tokens/s are not PowerInfer's" in output["bench"]
    assert f"text: {text_file}" in output["bench"]


def test_the_pipeline_s_outputs_are_kept_without_force(psp: Psp, pipeline: Pipeline) -> None:
    made, outputs = pipeline
    for name in ("collect", "train", "export"):
        command = made[name]
        line = refused(psp(*command))
        assert f"{command[command.index('--out') + 1]} exists; pass " in line
        assert "--force to replace it" in line
    for name in ("collect", "train"):
        again = succeeded(psp(*made[name], "--resume", "--json"))
        assert again == outputs[name], "a finished run has nothing to go on with"


def test_force_replaces_what_is_there(
    psp: Psp, model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    out.write_text("old")
    command = ("export-gguf", "--model", model_dir, "--predictors", exact_dir, "--out", out)
    succeeded(psp(*command, "--force"))
    assert out.read_bytes()[:4] == b"PWRI"
