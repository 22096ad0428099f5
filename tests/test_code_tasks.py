"""Programs that a model wrote are judged rightly, and lm-eval's code tasks by them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from local_tasks import made_up_model
from processes import all_dead, started, wait_for

from common.errors import DataError, EngineError
from evaluation.tasks.code_tasks import Judged, _examples, own_config
from evaluation.tasks.files import built_in
from evaluation.tasks.judge import Limits, judge
from evaluation.tasks.loading import answer_of, load_tasks, primary_metric
from evaluation.tasks.quiet import quiet

ADD = "def add(a, b):\n    return a {} b\n"
TEST = "assert add(2, 3) == 5\n"
SOON = Limits(seconds=1, memory=1 << 28)


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        (ADD.format("+") + TEST, "passed"),
        (ADD.format("*") + TEST, "failed"),
        ("def add(a, b):\n", "failed"),
        ("import sys\nsys.exit(0)\n" + TEST, "failed"),
        ("import os\nos._exit(0)\n" + TEST, "failed"),
        ("print('x' * 10 ** 6)\n" + ADD.format("+") + TEST, "passed"),
        ("print = None\n" + ADD.format("+") + TEST, "passed"),
        ("import sys\nsys.stdout = None\n" + ADD.format("+") + TEST, "passed"),
        ("import atexit, os\natexit.register(os._exit, 3)\n", "failed"),
        ("input()\n", "failed"),
        ("import os\nassert 'HOME' not in os.environ and 'PATH' not in os.environ\n", "passed"),
        ("import os\nassert os.listdir() == ['program.py']\n", "passed"),
        ("x = bytearray(1 << 29)\n", "failed"),
        ("open('big', 'wb').write(bytes(1 << 25))\n", "failed"),
        ("x = '\ud800'\n", "failed"),
        ("x = 1\0\n", "failed"),
        ("'''", "failed"),
        ("", "passed"),
    ],
)
def test_a_program_passes_if_its_last_line_is_reached(program: str, verdict: str) -> None:
    assert judge([program], limits=Limits(seconds=20, memory=1 << 28)) == [verdict]


@pytest.mark.parametrize("program", ["while True: pass\n", "import time\ntime.sleep(60)\n"])
def test_a_program_without_end_is_out_of_time(program: str) -> None:
    begin = time.monotonic()
    assert judge([program], limits=SOON) == ["out of time"]
    assert time.monotonic() - begin < 20


def test_verdicts_are_in_order_and_more_than_there_are_workers() -> None:
    programs = [TEST if number % 3 else ADD.format("+") + TEST for number in range(7)]
    assert judge(programs, workers=2) == [
        "failed" if number % 3 else "passed" for number in range(7)
    ]


def test_nothing_that_a_program_started_stays(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    program = f"""
import os, time
try:
    child = os.fork()
except OSError:  # the limit on processes, which root has not
    child = os.getpid()
if not child:
    time.sleep(600)
with open({str(file) + ".new"!r}, "w") as stream:
    stream.write(f"{{os.getpid()}} {{child}}")
os.rename({str(file) + ".new"!r}, {str(file)!r})
"""
    assert judge([program], limits=Limits(seconds=20)) == ["passed"]
    wait_for(all_dead(started(file)))


HUMANEVAL = [
    {
        "task_id": f"T/{number}",
        "prompt": f"def {name}(a, b):\n",
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(2, 3) == {value}\n",
    }
    for number, (name, value) in enumerate([("add", 5), ("times", 6), ("less", -1)])
]


def _local(directory: Path, file: str, rows: list[dict[str, Any]]) -> Path:
    """Write a task file that is lm-eval's own but for its data."""
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = directory / "local.yaml"
    path.write_text(
        f"include: {built_in() / file}\ntask: local\ndataset_path: json\n"
        "dataset_name: null\ndataset_kwargs:\n  data_files:\n    test: rows.jsonl\n"
    )
    return path


def _asked(path: Path, answers: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    from lm_eval.evaluator import evaluate

    loaded = load_tasks([str(path)], allow_code=True)
    said = iter(answers)
    with quiet():
        results = evaluate(
            made_up_model(lambda *arguments: next(said)),
            loaded.task_dict,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
        )
    return results["results"]["local"], results["samples"]["local"], loaded.tasks["local"]


def test_humaneval_is_lm_evals_with_pass_at_1_of_ours(tmp_path: Path) -> None:
    path = _local(tmp_path, "humaneval/humaneval.yaml", HUMANEVAL)
    answers = ["    return a + b", "    return a + b", "    import sys\n    sys.exit(0)"]
    scores, samples, task = _asked(path, answers)
    assert scores["pass@1,create_test"] == pytest.approx(1 / 3)
    assert [sample["pass@1"] for sample in samples] == [1, 0, 0]
    assert samples[0]["arguments"][0][0] == HUMANEVAL[0]["prompt"]
    assert primary_metric(task) == ("pass@1", "create_test", True)
    assert answer_of(task, samples[0]["doc"], samples[0]) == ("def add(a, b):\n    return a + b",)


def test_mbpp_is_lm_evals_with_pass_at_1_of_ours(tmp_path: Path) -> None:
    rows = [
        {
            "task_id": n,
            "text": "Add.",
            "code": "",
            "test_list": [f"assert add({n}, 1) == {n + 1}"] * 3,
        }
        for n in range(2)
    ]
    path = _local(tmp_path, "mbpp/mbpp.yaml", rows)
    scores, samples, task = _asked(path, ["add = lambda a, b: a + b", "add = lambda a, b: 9"])
    assert scores["pass_at_1,none"] == 0.5
    assert primary_metric(task) == ("pass_at_1", "none", True)
    prompt = samples[0]["arguments"][0][0]
    assert prompt.count("[BEGIN]") == 4  # lm-eval's three examples and the question
    assert prompt.count("[DONE]") == 3


def test_programs_are_refused_without_leave(tmp_path: Path) -> None:
    path = _local(tmp_path, "humaneval/humaneval.yaml", HUMANEVAL)
    with pytest.raises(
        DataError, match=r"task local: runs the programs that a model writes;.*--allow-code"
    ):
        load_tasks([str(path)])


def test_other_files_are_left_as_they_are() -> None:
    assert own_config(built_in() / "gsm8k/gsm8k.yaml") is None
    assert own_config(built_in() / "humaneval/humaneval_instruct.yaml") is None


def test_examples_that_lm_eval_no_longer_has_are_told(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("x = 1\n")
    with pytest.raises(EngineError, match="no list_fewshot_samples"):
        _examples(tmp_path / "utils.py", "list_fewshot_samples")


def test_a_mean_is_over_a_questions_programs() -> None:
    judged = Judged("{{test}}", with_prompt=False)
    [programs] = judged([["a = 1", "a = 2"]], [{"test": "assert a == 1"}])
    assert [program.verdict for program in programs] == ["passed", "failed"]
