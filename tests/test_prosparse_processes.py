"""Training over two CPU processes ends at the weights of one process: DDP and FSDP.

`accelerate launch` gives FSDP to GPUs alone: on CPUs its AcceleratorState leaves the FSDP plugin
out and it trains with DDP, without a word. torch's FSDP1, too, cannot gather its weights there:
`FlatParamHandle.to_cpu` frees the storage that it has just "copied" to the CPU, and the process
dies. `WORKER` mends both outside the code under test, which so runs over gloo as it would over
NCCL. FSDP1 is not resumed: on CPUs torch's `_optim_utils` gathers all of AdamW's moments in the one
buffer that it saves, so that both come out as the second. DDP is started by torchrun: for CPUs
`accelerate launch` wants MPI.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from safetensors.torch import load_file

from architectures.checkpoint import Checkpoint
from prosparse.training_log import read_log

ROOT = Path(__file__).parents[1]
STAGES = """stages:
- {kind: substitution, lambda: 0, until_step: 4}
- {kind: warmup, lambda: 0.5, until_step: 8}
- {kind: progressive, lambda: 50, until_step: 24}
"""
WORKER = """
import os, signal
from contextlib import nullcontext
import torch
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle

made = state.AcceleratorState.__init__

def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
    made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)

state.AcceleratorState.__init__ = with_plugin
wrapped = FullyShardedDataParallel.__init__
def on_cpu(self, *args, **kwargs):
    wrapped(self, *args, **kwargs | {"device_id": torch.device("cpu")})
FullyShardedDataParallel.__init__ = on_cpu
FlatParamHandle.to_cpu = lambda self: nullcontext()

import prosparse.training
from prosparse.trainer import KeepGood

saved = KeepGood.on_save

def killed(self, args, state, control, **kwargs):
    saved(self, args, state, control, **kwargs)
    if state.is_world_process_zero and str(state.global_step) == os.environ.get("KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)

KeepGood.on_save = killed
save = prosparse.training.save_model

def told(trainer, *args):
    sharded = trainer.model_wrapped
    shown = [type(sharded).__name__, type(next(sharded.parameters())).__name__]
    share = sum(getattr(w, "to_local", lambda w=w: w)().numel() for w in sharded.parameters())
    os.write(2, " ".join(["wrapped", *shown, str(share), os.linesep]).encode())
    save(trainer, *args)

prosparse.training.save_model = told

from cli import main
main()
"""
COMMON = """
compute_environment: LOCAL_MACHINE
use_cpu: true
num_machines: 1
num_processes: 2
mixed_precision: 'no'
"""
FSDP = """distributed_type: FSDP
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: {state}
"""
FSDP_1 = """  fsdp_version: 1
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_use_orig_params: true
  fsdp_sync_module_states: false
  fsdp_cpu_ram_efficient_loading: false
"""
FSDP_2 = """  fsdp_version: 2
  fsdp_reshard_after_forward: true
"""
CONFIGS = {
    "FSDP1": FSDP.format(state="FULL_STATE_DICT") + FSDP_1,
    "FSDP2": FSDP.format(state="FULL_STATE_DICT") + FSDP_2,
    "FSDP2-sharded": FSDP.format(state="SHARDED_STATE_DICT") + FSDP_2,
}
KINDS = {
    "DDP": "DistributedDataParallel Parameter",
    "FSDP1": "FullyShardedDataParallel Parameter",
    "FSDP2": "FSDPLlamaForCausalLM DTensor",
    "FSDP2-sharded": "FSDPLlamaForCausalLM DTensor",
}

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def options(
    make_model: ModelMaker, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[object]:
    """Everything but batch and output."""
    path = tmp_path_factory.mktemp("processes")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 96, "initializer_range": 0.05}
    model = make_model(path / "silu", hidden_act="silu", **sizes)
    (path / "stages.yaml").write_text(STAGES)
    chosen: list[object] = ["--model", model, "--data", data_file]
    chosen += ["--schedule", path / "stages.yaml", "--context", 32, "--learning-rate", 5e-3]
    chosen += ["--log-every", 4, "--eval-every", 12, "--eval-windows", 4, "--device", "cpu"]
    return [*chosen, "--threads", 1]


@pytest.fixture
def start(options: list[object], tmp_path: Path) -> Start:
    """Run `psp sparsify` in two processes."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker, config = tmp_path / "worker.py", tmp_path / "accelerate.yaml"
    worker.write_text(WORKER)

    def run(kind: str, *more: object, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        if kind in CONFIGS:
            config.write_text(COMMON + CONFIGS[kind])
            launch = ["accelerate.commands.accelerate_cli", "launch"]
            launch += ["--config_file", str(config), "--main_process_port", "0"]
        command = [*launch, worker, "sparsify", *options, *more]
        return subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            env=os.environ | environment | {"KILL_AT": str(kill_at)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="module")
def alone(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the same windows a step."""
    from click.testing import CliRunner

    from cli import main

    out = tmp_path_factory.mktemp("alone") / "sparse"
    more = ["--batch", 4, "--out", out]
    result = CliRunner().invoke(main, ["sparsify", *map(str, [*options, *more])])
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind: str, start: Start, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    more = ("--batch", 2, "--out", out, "--save-every", 6)
    if kind != "FSDP1":
        killed = start(kind, *more, kill_at=12)
        assert killed.returncode
        assert (out / "training" / "checkpoint-12" / "complete").exists(), killed.stderr[-3000:]
        assert not (out / "config.json").exists()
    finished = start(kind, *more, "--resume", "--json")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stderr.count("going on from") == (kind != "FSDP1")
    assert json.loads(finished.stdout)["model"] == str(out)  # printed once
    # Each process has held its half alone, unless it is DDP.
    lines = [line for line in finished.stderr.splitlines() if line.startswith("wrapped")]
    whole = sum(tensor.numel() for tensor in load_file(alone / "model.safetensors").values())
    assert len(lines) == 2
    for line in lines:
        assert KINDS[kind] in line
        share = int(line.split()[-1])
        assert share == whole if kind == "DDP" else 0.4 * whole < share < 0.6 * whole

    assert_same_training(alone, out)
    assert_same_files(alone, out)


def assert_same_training(alone: Path, together: Path) -> None:
    """λ, losses, L1, its gradient (by the norm), sparsity and perplexity of every line agree."""
    one, two = (read_log(path / "training" / "log.jsonl") for path in (alone, together))
    assert len(one) == len(two)
    for single, double in zip(one, two, strict=True):
        assert single.keys() == double.keys()
        assert single.pop("kind") == double.pop("kind")
        for key, value in single.items():
            assert double[key] == pytest.approx(value, rel=2e-4, abs=1e-6), (key, single["step"])


def assert_same_files(alone: Path, together: Path) -> None:
    first, second = (load_file(path / "model.safetensors") for path in (alone, together))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert second[name].dtype == weight.dtype == torch.float16
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-3)
    assert (together / "config.json").read_text() == (alone / "config.json").read_text()
    assert Checkpoint.open(together).shape.activation == "relu"
    assert not list((together / "training").glob("checkpoint-*"))


@pytest.mark.slow
def test_bfloat16_rounds_no_loss(start: Start, tmp_path: Path) -> None:
    """Left to itself FSDP2 returns the loss in bfloat16, and the perplexity is 1 % off."""
    out = tmp_path / "sparse"
    more = ("--batch", 2, "--out", out, "--precision", "bfloat16")
    result = start("FSDP2", *more)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [line["lm_loss"] for line in read_log(out / "training" / "log.jsonl")]
    assert [loss for loss in losses if torch.tensor(loss).bfloat16().item() == loss] == []


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_them_all(start: Start, tmp_path: Path) -> None:
    result = start("DDP", "--batch", 1000, "--out", tmp_path / "sparse")
    assert result.returncode
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 2
    assert all("windows of 32 tokens" in line for line in errors)
    assert not (tmp_path / "sparse").exists()
