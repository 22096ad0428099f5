"""Sparsification of a tiny SiLU model: what it writes, logs, refuses, and survives."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, refused
from processes import forked, killed_at
from safetensors.torch import load_file

import prosparse.training
from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from common.errors import CheckpointError, DataError, OutputError, PspError, SparsityError
from common.lock import locked
from common.outputs import kept_beside
from common.sealed import write_sealed
from prosparse.saving import MARK, drop_unfinished, newest_checkpoint
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from prosparse.texts import WindowSet, window_sets
from prosparse.trainer import SparsifyError
from prosparse.training import sparsify
from prosparse.training_log import last_evaluation, read_log

pytestmark = pytest.mark.usefixtures("trainer_is_imported")
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 96, "initializer_range": 0.05}


PROGRESSIVE = Schedule.of(("substitution", 0, 4), ("warmup", 0.5, 8), ("progressive", 50, 24))


@pytest.fixture(scope="module")
def silu_dir(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("silu") / "model", hidden_act="silu", **SMALL)


@pytest.fixture(scope="module")
def settings(silu_dir: Path, data_file: Path) -> dict[str, Any]:
    return {
        "model": str(silu_dir),
        "data": str(data_file),
        "schedule": PROGRESSIVE,
        "context": 32,
        "batch": 4,
        "eval_windows": 4,
        "learning_rate": 5e-3,
        "log_every": 4,
        "eval_every": 12,
        "device": "cpu",
    }


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> SparsifyConfig:
    return SparsifyConfig(out=tmp_path / "sparse", **settings)


@dataclass(frozen=True)
class Trained:
    """A finished run, which tests leave as it is."""

    config: SparsifyConfig
    result: dict[str, Any]


@pytest.fixture(scope="module")
def trained(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = SparsifyConfig(out=tmp_path_factory.mktemp("trained") / "sparse", **settings)
    return Trained(config, sparsify(config))


def weights(config: SparsifyConfig) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(config.out / "model.safetensors")
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_result_is_a_sparse_checkpoint(trained: Trained, tmp_path: Path) -> None:
    config, result = trained.config, trained.result
    checkpoint = Checkpoint.open(config.out)
    assert checkpoint.shape.activation == "relu"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.config["eos_token_id"] == 2
    assert checkpoint.dtype == torch.float16  # the original's
    assert checkpoint.config["dtype"] == checkpoint.config["torch_dtype"] == "float16"
    assert checkpoint.config["rope_theta"] == 10000.0
    assert checkpoint.config["rope_scaling"] is None
    assert (config.out / "tokenizer.model").is_file()
    assert result["steps"] == 24
    assert not list(config.training.glob("checkpoint-*"))
    # What is written computes what was measured.
    held = WindowSet([(pack_of(config)[:4], 4)], None)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    tokens = torch.stack([held[row]["input_ids"] for row in range(4)])
    loss = torch.nn.functional.cross_entropy(
        model.logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert math.exp(loss) == pytest.approx(result["ppl"], rel=1e-3)
    plain = sparsify(
        replace(config, out=tmp_path / "plain", schedule=Schedule.of(("substitution", 0, 24)))
    )
    assert result["activation_sparsity"] > plain["activation_sparsity"] + 0.2


def pack_of(config: SparsifyConfig) -> Any:
    from prosparse.texts import open_windows

    return open_windows(config.training / "train.windows", config.context)


def test_the_log_has_lambda_losses_sparsity_and_perplexity(trained: Trained) -> None:
    config = trained.config
    log = read_log(config.log)
    steps = [line for line in log if "loss" in line]
    measured = [line for line in log if "ppl" in line]
    assert [line["step"] for line in steps] == [4, 8, 12, 16, 20, 24]
    assert [line["step"] for line in measured] == [0, 12, 24]
    assert [line["kind"] for line in steps] == ["substitution", "warmup"] + ["progressive"] * 4
    for line in log[1:]:
        assert line["lambda"] == config.schedule.factor(line["step"])
        assert len(line["sparsity"]) == 2
    first, *_, last = steps
    assert first["loss"] == pytest.approx(first["lm_loss"])
    assert last["loss"] > last["lm_loss"]
    assert last["l1"] < steps[1]["l1"]
    assert last["lm_loss"] < first["lm_loss"]
    assert list((config.training / "runs").glob("*/events.out.tfevents.*"))


def test_accumulated_batches_train_as_one(trained: Trained, tmp_path: Path) -> None:
    config = trained.config
    halves = replace(config, out=tmp_path / "halves", batch=2, accumulate=2)
    sparsify(halves)
    for name, weight in weights(config).items():
        torch.testing.assert_close(weights(halves)[name], weight, rtol=0, atol=2e-3)
    for whole, half in zip(read_log(config.log), read_log(halves.log), strict=True):
        for key in {"loss", "lm_loss", "l1", "ppl"} & whole.keys():
            assert half[key] == pytest.approx(whole[key], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "tolerance"), [({"checkpointing": True}, 1e-5), ({"precision": "bfloat16"}, 0.05)]
)
def test_ways_to_save_memory_regularise_alike(
    trained: Trained, tmp_path: Path, changes: dict[str, Any], tolerance: float
) -> None:
    plain = trained.result
    saving = sparsify(replace(trained.config, out=tmp_path / "saving", **changes))
    assert saving["ppl"] == pytest.approx(plain["ppl"], rel=tolerance)
    assert saving["activation_sparsity"] == pytest.approx(
        plain["activation_sparsity"], abs=tolerance
    )


def test_keep_trains_the_activation_that_is_there(config: SparsifyConfig) -> None:
    kept = replace(config, activation="keep", schedule=Schedule.of(("substitution", 0, 4)))
    result = sparsify(kept)
    assert json.loads((config.out / "config.json").read_text())["hidden_act"] == "silu"
    assert result["activation_sparsity"] < 0.01


def window_bytes(file: bytes) -> list[bytes]:
    rows = torch.frombuffer(bytearray(file), dtype=torch.int32).reshape(-1, 32).long()
    return [bytes(row.numpy()) for row in rows]


def test_sft_has_its_own_text(config: SparsifyConfig, tmp_path: Path) -> None:
    other = tmp_path / "sft.txt"
    other.write_text("question? answer.\n" * 200)
    schedule = Schedule.of(("progressive", 1, 6), ("sft", 0.5, 12))
    tuned = replace(config, schedule=schedule, sft_data=str(other))
    sparsify(tuned)
    train, _, passes = window_sets(tuned, processes=1)
    seen = [bytes(train[index]["input_ids"].numpy()) for index in range(12 * 4)]
    files = [(config.training / f"{name}.windows").read_bytes() for name in ("train", "sft")]
    texts = [set(window_bytes(file)) for file in files]
    assert len(train) == 12 * 4
    assert set(seen[:24]) <= texts[0]
    assert set(seen[24:]) <= texts[1]
    assert not texts[0] & texts[1]
    assert passes == 24 / (len(files[0]) // 128 - config.eval_windows)
    with refused(SparsityError, "sft stage"):
        replace(config, sft_data=str(other))


def test_kill_and_resume_end_at_the_same_weights(config: SparsifyConfig) -> None:
    whole = replace(config, save_every=3, schedule=PROGRESSIVE.scaled(2))
    sparsify(whole)
    broken = replace(whole, out=config.out.parent / "broken")
    # Killed inside the run, wherever it is once the second checkpoint is whole.
    mark = broken.training / "checkpoint-6" / "complete"
    child = forked(lambda: sparsify(broken))
    assert killed_at(child, mark.exists) == -signal.SIGKILL
    assert not (broken.out / "config.json").exists()
    # As a kill in the middle of writing would leave it:
    torn = broken.training / "checkpoint-47"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    with refused(OutputError, "--resume"):
        sparsify(broken)
    sparsify(replace(broken, resume=True))
    assert same(weights(whole), weights(broken))
    fresh, resumed = read_log(whole.log), read_log(broken.log)
    assert [line["step"] for line in fresh] == [line["step"] for line in resumed]
    assert last_evaluation(fresh) == last_evaluation(resumed)


def test_what_force_replaces_is_kept_until_the_new_one_is_complete(
    trained: Trained, config: SparsifyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.config.out, config.out)
    before, kept = weights(config), replace(config, out=kept_beside(config.out))
    forced = replace(config, force=True, seed=1)

    def fail(*given: object) -> None:
        raise KeyboardInterrupt

    with locked(config.out), refused(OutputError, "being written by pid"):
        sparsify(forced)
    with monkeypatch.context() as patched:
        patched.setattr(prosparse.training, "_train", fail)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                sparsify(forced)
            assert same(weights(kept), before)
    sparsify(replace(config, resume=True, seed=1))
    assert not kept.out.exists()
    assert not same(weights(config), before)


def test_other_settings_do_not_resume(trained: Trained, config: SparsifyConfig) -> None:
    shutil.copytree(trained.config.out, config.out)
    before = weights(config)
    assert sparsify(replace(config, resume=True))["steps"] == 24  # finished: nothing to do
    assert same(before, weights(config))
    with refused(OutputError, "other settings", "--force"):
        sparsify(replace(config, resume=True, seed=1))
    marker = config.training / "sparsify.json"
    begun = marker.read_text()
    marker.write_text(begun.replace('"processes": 1', '"processes": 2'))
    with refused(OutputError, "sparsify.json: damaged", "--force"):
        sparsify(replace(config, resume=True))
    document = json.loads(begun)
    document["settings"]["processes"] = 2
    del document["xxh3_128"]
    write_sealed(marker, document)
    with refused(OutputError, "another number of processes than 1"):
        sparsify(replace(config, resume=True))
    marker.write_text(begun)
    with refused(OutputError, "--force"):
        sparsify(config)
    sparsify(replace(config, force=True, seed=1))
    assert not same(before, weights(config))


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(config: SparsifyConfig) -> None:
    # In the last stage λ outgrows float32: loss inf.
    schedule = Schedule.of(("warmup", 0.1, 8), ("decay", 1e39, 12))
    with refused(SparsifyError, "the loss is inf at step 9", "stage 1 (decay", "checkpoint-8"):
        sparsify(replace(config, schedule=schedule, save_every=4))
    kept = config.training / "checkpoint-8"
    assert all(torch.isfinite(w).all() for w in load_file(kept / "model.safetensors").values())
    assert not (config.out / "config.json").exists()


def test_weights_that_are_not_finite_are_never_saved(
    config: SparsifyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.optim import AdamW

    step, calls = AdamW.step, []

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 8:
            self.param_groups[0]["params"][0].data.fill_(math.nan)
        return result

    monkeypatch.setattr(AdamW, "step", poisoned)
    with refused(SparsifyError, "no longer finite at step 8", "stage 1 (warmup", "checkpoint-4"):
        sparsify(replace(config, save_every=4))
    assert not (config.training / "checkpoint-8").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "parts"),
    [
        ({"data": "short.txt"}, DataError, ("short.txt", "gives 1 windows of 8 tokens", "are 5")),
        ({"eval_data": "empty.txt"}, DataError, ("empty.txt", "holds no text")),
        ({"sft_data": "short.txt"}, DataError, ("short.txt", "windows of 8", "needed are 4")),
        ({"batch": 10_000}, DataError, ("text.jsonl", "needed are 10004", "--batch")),
        ({"context": 256}, SparsityError, ("context is 256", "128", "--context")),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_what_cannot_be_trained_on_costs_no_output(
    config: SparsifyConfig,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[PspError],
    parts: tuple[str, ...],
    there: bool,
) -> None:
    schedule = Schedule.of(("progressive", 1, 6), ("sft", 0.5, 12))
    config = replace(config, schedule=schedule, context=8, force=there)
    (tmp_path / "short.txt").write_text("A word.")
    (tmp_path / "empty.txt").write_text(" \n")
    texts = {key: str(tmp_path / text) for key, text in changes.items() if key.endswith("data")}
    before: dict[str, bytes] = {}
    if there:
        config.training.mkdir(parents=True)
        for name in ("config.json", "training/sparsify.json", "training/log.jsonl"):
            (config.out / name).write_text(name)
        before = contents(config.out)
    with refused(kind, *parts):
        sparsify(replace(config, **changes | texts))
    assert config.out.exists() == there
    assert contents(config.out) == before


def contents(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_act": "drelu"}, ("drelu", "silu")),
        ({"hidden_act": "tanh"}, ("hidden_act is 'tanh'", "silu")),
        ({"architectures": ["BambooForCausalLM"]}, ("bamboo", "hidden_act")),
        ({"architectures": ["OPTForCausalLM"]}, ("opt", "no gated FFN")),
        ({"architectures": ["FalconForCausalLM"], "activation": "relu"}, ("no gated FFN",)),
        ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "supported:")),
    ],
)
def test_models_that_cannot_be_made_sparse(
    config: SparsifyConfig, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    found = json.loads((Path(config.model) / "config.json").read_text())
    model = tmp_path / "other"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(found | changes))
    with refused(CheckpointError, *parts):
        sparsify(replace(config, model=str(model)))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"norm": "l2"}, "--norm is 'l2'"),
        ({"batch": 0}, "batch is 0"),
        ({"learning_rate": math.nan}, "--learning-rate is nan"),
        ({"rate": "decay"}, "decay stage"),
    ],
)
def test_impossible_settings(config: SparsifyConfig, changes: dict[str, Any], part: str) -> None:
    with refused(SparsityError, part):
        replace(config, **changes)


def test_only_marked_checkpoints_count(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 12):
        (tmp_path / f"checkpoint-{step}" / MARK).touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    drop_unfinished(tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["checkpoint-12", "checkpoint-9"]
