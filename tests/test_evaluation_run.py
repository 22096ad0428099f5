"""Whole evaluations on tasks of this disk: arms, figures, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asked_tasks import own_task, settings_maker, write_tasks
from click.testing import Result
from conftest import ModelMaker, refused
from safetensors.torch import load_file, save_file

from architectures.model import OutOfMemory
from common.errors import EngineError, PspError, SettingsError
from evaluation.backends.transformers_model import TransformersBackend
from evaluation.document import requests_hash
from evaluation.run import evaluate
from evaluation.scoring import Questions
from evaluation.settings import EvaluateConfig
from evaluation.suites.suite import Suite, SuiteColumn
from evaluation.table import evaluation_table
from gguf_export.bundle import Bundle
from results.evaluation import EVALUATION, SPARSITY, Evaluation, PublishedRow

NAMES = ("choose", "cloze", "continue", "pages")


def out_of_memory(backend: TransformersBackend, *args: Any) -> Any:
    raise OutOfMemory("cpu: out of memory", "pass less")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard errors without a formula are lm-eval's own, and slow."""
    monkeypatch.setattr("evaluation.scoring.BOOTSTRAP", 20)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def settings(model_dir: Path, tasks: Path) -> Callable[..., EvaluateConfig]:
    return settings_maker(model_dir, tasks)


@pytest.fixture(scope="module")
def whole(
    settings: Callable[..., EvaluateConfig],
    exact_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Evaluation, Path]:
    out = tmp_path_factory.mktemp("whole") / "out"
    config = settings(predictors=(exact_dir,), thresholds=(0.5,), output_path=out, log_samples=True)
    return evaluate(config), out


def test_every_arm_answers_every_task_and_is_compared(whole: tuple[Evaluation, Path]) -> None:
    result, out = whole
    assert [arm.name for arm in result.arms] == ["dense", "fatrelu_0.5", "predictors"]
    assert {task.name for task in result.tasks} == set(NAMES)
    for task in result.tasks:
        assert task.questions == task.of_questions == 12
        for arm in result.arms:
            score = result.score(task, arm.name)
            assert score is not None
            assert score.questions == 12
        exact = result.difference(task.name, "predictors")
        other = result.difference(task.name, "fatrelu_0.5")
        assert exact is not None
        assert other is not None
        assert result.difference(task.name, "dense") is None
        assert abs(exact.difference) <= 0.01
        assert (exact.changed is None) == (task.name == "pages")
    changed = [each for each in result.differences if each.arm == "fatrelu_0.5" and each.changed]
    assert changed
    sparsity = {arm.name: arm.sparsity for arm in result.arms}
    assert sparsity["dense"] is not None
    assert sparsity["fatrelu_0.5"] is not None
    assert sparsity["fatrelu_0.5"] > sparsity["dense"] > 0.3
    assert sparsity["predictors"] == pytest.approx(sparsity["dense"], abs=0.01)
    assert result.bos == ("<s>", 1)
    assert EVALUATION.read(out) == result
    assert len({task.requests_hash for task in result.tasks}) == 4
    choose = next(task for task in result.tasks if task.name == "choose")
    assert choose.shots == 1
    assert choose.chance == pytest.approx(sum(1 / (2 + n % 3) for n in range(12)) / 12)
    assert choose.first_prompt.count("number 0") == 1
    table = evaluation_table(result)
    assert "one '<s>' (id 1)" in table
    for name in NAMES:
        assert name in table


def test_scores_are_lm_evals_own(
    whole: tuple[Evaluation, Path], tasks: Path, model_dir: Path
) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import evaluation.language_model  # noqa: F401

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = simple_evaluate(
        model="psp",
        model_args=f"pretrained={model_dir}",
        device="cuda:0",  # what lm-eval's command line passes where nobody names one
        tasks=list(NAMES),
        task_manager=manager,
        bootstrap_iters=0,
        batch_size=3,
        fewshot_random_seed=0,
    )
    result, _ = whole
    for score in result.scores:
        if score.arm == "dense":
            found = theirs["results"][score.task][f"{score.metric},{score.filter}"]
            assert score.value == pytest.approx(found, rel=1e-4)


def test_samples_are_written_as_lm_eval_logs_them(whole: tuple[Evaluation, Path]) -> None:
    _, out = whole
    lines = (out / "samples" / "dense_choose.jsonl").read_bytes().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 12
    assert first["doc"]["text"] in first["arguments"][0][0]
    assert {"acc", "acc_norm", "filtered_resps", "target"} <= set(first)


def test_two_checkpoints_are_compared(
    settings: Callable[..., EvaluateConfig], make_model: ModelMaker, model_dir: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "second", seed=5)
    result = evaluate(settings(model=(str(model_dir), str(other)), limit=6))
    assert [arm.name for arm in result.arms] == ["dense", "second"]
    assert result.arms[0].model_hash != result.arms[1].model_hash
    assert any(each.changed for each in result.differences)


@pytest.mark.parametrize(
    ("kind", "metric", "relative"),
    [
        ("loglikelihood", "perplexity", True),
        ("loglikelihood_rolling", "bits_per_byte", True),
        ("loglikelihood_rolling", "byte_perplexity", True),
        ("multiple_choice", "mcc", False),
        ("multiple_choice", "f1", False),
        ("multiple_choice", "brier_score", False),
        ("generate_until", "bleu", False),
    ],
)
def test_a_difference_is_that_of_the_scores_whatever_the_metric(
    kind: str,
    metric: str,
    relative: bool,
    settings: Callable[..., EvaluateConfig],
    tmp_path: Path,
) -> None:
    tasks = own_task(tmp_path / "own", "mine", metric, output_type=kind)
    result = evaluate(settings(tasks=(tasks,), thresholds=(0.5,)))
    (task,) = result.tasks
    before, after = (result.score(task, arm.name) for arm in result.arms)
    assert before is not None
    assert after is not None
    (found,) = result.differences
    expected = after.value / before.value - 1 if relative else after.value - before.value
    assert found.difference == pytest.approx(expected, rel=1e-6)
    assert (found.standard_error is None) == (not relative)
    assert (found.changed is None) == (kind == "loglikelihood_rolling")
    assert f"{100 * expected:+.2f}"[:5] in evaluation_table(result) or not relative


def test_a_plain_metric_s_difference_is_told_in_its_own_unit(
    whole: tuple[Evaluation, Path],
) -> None:
    result, _ = whole
    task = replace(result.tasks[0], name="mine", metric="bleu")
    scores = [
        replace(result.scores[0], task="mine", arm=arm.name, metric="bleu", filter=task.filter)
        for arm in result.arms
    ]
    grown = replace(
        result.differences[0], task="mine", arm="predictors", difference=-0.3, standard_error=None
    )
    shown = replace(result, tasks=(task,), scores=tuple(scores), differences=(grown,))
    table = evaluation_table(shown)
    assert "-0.3000" in table
    assert "%" not in table.split("arm  ")[1].splitlines()[4]


def test_numbers_that_are_none_are_told(
    model_dir: Path, settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    own_task(tmp_path / "own", "write", "exact_match", output_type="generate_until")
    tasks = own_task(tmp_path / "own", "choose", "acc", output_type="multiple_choice")
    notes: list[str] = []
    with refused(EngineError, "answered no task"):
        evaluate(settings(model=(str(broken),), tasks=(tasks,)), notes.append)
    assert any("choose: a log-likelihood is no finite number; look at" in line for line in notes)
    assert any("write: the model's logits are no numbers; look at" in line for line in notes)


def test_a_task_without_figures_leaves_the_others_theirs(
    settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    tasks = own_task(tmp_path / "own", "mine", "f1", output_type="multiple_choice", choices=3)
    own_task(tmp_path / "own", "good", "acc", output_type="multiple_choice")
    own_task(tmp_path / "own", "odd", "likelihood", output_type="multiple_choice")
    notes: list[str] = []
    result = evaluate(settings(tasks=(tasks,), thresholds=(0.5,)), notes.append)
    assert {score.task for score in result.scores} >= {"good"}
    assert "odd" not in {score.task for score in result.scores}
    assert {"dense: odd", "fatrelu_0.5: odd"} <= set(result.unfinished)
    assert any(line.startswith("dense: odd: no figures can be made of its ans") for line in notes)


def test_programs_that_are_not_there_are_told_before_anything_is_loaded(
    settings: Callable[..., EvaluateConfig],
    exact_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("evaluation.arms.TransformersModel")
    (tmp_path / "bin").mkdir()
    with refused(EngineError, str(tmp_path / "bin"), "--powerinfer-bin"):
        evaluate(settings(gguf=(exact_bundle.model_file,), powerinfer_bin=tmp_path / "bin"))


def test_one_task_that_fails_leaves_the_others(
    settings: Callable[..., EvaluateConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersBackend, "generate", out_of_memory)
    notes: list[str] = []
    out = tmp_path / "out"
    result = evaluate(settings(output_path=out), notes.append)
    assert result.unfinished == ("dense: continue",)
    told = next(line for line in notes if line.startswith("dense: continue"))
    assert told.startswith("dense: continue: cpu: out of memory for one request; leave out the ta")
    assert {score.task for score in result.scores} == set(NAMES) - {"continue"}
    assert EVALUATION.read(out) == result
    assert "unfinished: dense: continue" in evaluation_table(result)
    monkeypatch.setattr(TransformersBackend, "score", out_of_memory)
    with refused(PspError, "arm dense answered no task"):
        evaluate(settings())


def test_a_text_beyond_the_context_is_told(
    make_model: ModelMaker, settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    short = make_model(tmp_path / "short", max_position_embeddings=24)
    notes: list[str] = []
    evaluate(settings(model=(str(short),)), notes.append)
    assert [line for line in notes if "lost their left end, BOS kept" in line]


def test_the_command_prints_tables_documents_and_failures(
    psp: Callable[..., Result],
    model_dir: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = ["evaluate", "--model", model_dir, "--tasks", tasks, "--limit", 3, "--device", "cpu"]
    out = tmp_path / "out"
    plain = psp(*common, "--output-path", out)
    assert plain.exit_code == 0
    assert "choose" in plain.stdout
    assert f"results: {out / 'evaluation.json'}" in plain.stdout
    document = json.loads(psp(*common, "--json").stdout)
    assert document["kind"] == "psp.evaluation"
    assert document["limit"] == 3

    monkeypatch.setattr(TransformersBackend, "generate", out_of_memory)
    failed = psp(*common)
    assert failed.exit_code == 1
    assert "unfinished: dense: continue" in failed.stdout


def test_a_suite_s_table_has_columns_their_average_and_published_rows(
    settings: Callable[..., EvaluateConfig],
    tasks: Path,
    exact_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose, cloze, words = (str(tasks / f"{name}.yaml") for name in ("choose", "cloze", "continue"))
    suite = Suite(
        names=(choose, cloze, words),
        shots={choose: 0, cloze: 0, words: 2},
        columns=(SuiteColumn("Reading", (choose, cloze)), SuiteColumn("Words", (words,))),
        published=(PublishedRow(name="Paper-7B", percent={SPARSITY: 89.32, "Reading": 63.5}),),
    )
    monkeypatch.setattr("evaluation.run.open_suite", lambda config: suite)
    config = settings(tasks=(), suite="card", reference=True, predictors=(exact_dir,))
    result = evaluate(config)
    shots = {task.name: task.shots for task in result.tasks}
    assert shots == {"choose": 0, "cloze": 0, "continue": 2}
    cells = {(each.column, each.arm): each for each in result.columns}
    values = {(s.task, s.arm): s for s in result.scores if s.metric in ("acc", "exact_match")}
    for arm in ("dense", "predictors"):
        pair = [values[task, arm] for task in ("choose", "cloze")]
        reading = cells["Reading", arm]
        assert reading.percent == pytest.approx(50 * sum(each.value for each in pair))
        errors = [each.standard_error or 0.0 for each in pair]
        assert reading.standard_error == pytest.approx(50 * sum(e * e for e in errors) ** 0.5)
        parts = [cells[title, arm].percent or 0.0 for title in ("Reading", "Words")]
        assert cells["Average", arm].percent == pytest.approx(sum(parts) / 2)
    assert cells["Reading", "dense"].difference is None
    both = [result.difference(task, "predictors") for task in ("choose", "cloze")]
    expected = 50 * sum(each.difference for each in both if each is not None)
    assert cells["Reading", "predictors"].difference == pytest.approx(expected)
    table = evaluation_table(result)
    row = next(line for line in table.splitlines() if line.startswith("Paper-7B (card)"))
    assert row.split()[2:] == ["89.32", "63.50", "–", "–"]
    monkeypatch.setattr(TransformersBackend, "generate", out_of_memory)
    rest = evaluate(replace(config, reference=False))
    assert not rest.published
    missing = {each.column: each.percent is None for each in rest.columns if each.arm == "dense"}
    assert missing == {"Reading": False, "Words": True, "Average": True}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tasks": ()}, ("expected either --tasks or --suite",)),
        ({"suite": "tiny"}, ("expected either --tasks or --suite",)),
        ({"thresholds": (-1.0,)}, ("-1 is no threshold of FATReLU",)),
        ({"limit": 2.5}, ("--limit 2.5 is neither a count nor a share",)),
        ({"batch_size": 0}, ("--batch-size is 0",)),
        ({"powerinfer_bin": Path("x")}, ("--powerinfer-bin has nothing to run", "--gguf")),
        ({"log_samples": True}, ("--log-samples has nowhere to write", "--output-path")),
        ({"reference": True}, ("--reference is of the card's table",)),
        ({"data": Path("x")}, ("--data is of the suite tiny",)),
        ({"thresholds": (0.1, 0.1)}, ("--thresholds: the same is given twice",)),
    ],
)
def test_settings_that_ask_nothing_are_refused(
    changes: dict[str, Any], parts: Sequence[str], settings: Callable[..., EvaluateConfig]
) -> None:
    with refused(SettingsError, *parts):
        settings(**changes)


def test_predictors_of_another_model_are_refused_before_anything_is_loaded(
    settings: Callable[..., EvaluateConfig],
    exact_dir: Path,
    make_model: ModelMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("evaluation.arms.TransformersModel")
    other = make_model(tmp_path / "other", seed=5)
    with refused(PspError, "are predictors of", f"not of {other}", "traces of this model"):
        evaluate(settings(model=(str(other),), predictors=(exact_dir,)))
    with refused(SettingsError, "has no chat template", "leave out --apply-chat-template"):
        evaluate(settings(apply_chat_template=True))


def test_an_exported_file_answers_as_its_checkpoint(
    settings: Callable[..., EvaluateConfig], exact_bundle: Bundle
) -> None:
    result = evaluate(settings(gguf=(exact_bundle.model_file,), limit=4))
    assert [arm.name for arm in result.arms] == ["dense", "engine"]
    assert result.arms[1].sparsity is None
    for task in result.tasks:
        found = result.difference(task.name, "engine")
        assert found is not None
        assert abs(found.difference) < 0.01


def test_without_lm_eval_the_remedy_is_named(
    settings: Callable[..., EvaluateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.run.package_version", lambda name: None)
    with refused(SettingsError, "not installed", "pip install '.[eval]'"):
        evaluate(settings())


def test_a_task_s_hash_is_over_all_kinds_of_its_requests() -> None:
    first = Questions(task="t", kind="loglikelihood", arguments=(("a", "b"),))
    others = [
        Questions(task="t", kind="generate_until", arguments=((text, {}),)) for text in ("x", "y")
    ]
    assert requests_hash([first]) == first.digest
    hashes = {requests_hash([first]), *(requests_hash([first, other]) for other in others)}
    assert len(hashes) == 3
