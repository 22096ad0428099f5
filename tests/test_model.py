"""Loading a model: what is read and where it goes, and every config that is refused."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from families import BY_NAME, DTYPES, Written, write
from torch import nn

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, block_bytes, load_model
from architectures.spec import TensorRule
from common.errors import CheckpointError
from common.machine import weight_budget

NAMES = ("prosparse", "minicpm", "opt-6.7b", "falcon-7b", "falcon-40b")
TOKENS = torch.arange(12, 72).reshape(2, 30)

refused = partial(conftest.refused, CheckpointError)
load = partial(load_model, dtype=torch.float32, device="cpu")


@pytest.fixture(params=NAMES)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    return write(BY_NAME[request.param], tmp_path / "model", b"")


def is_empty(module: nn.Module) -> bool:
    """Whether a module's weights are all on meta, or none; half of each would be a bug."""
    (empty,) = {weight.is_meta for weight in module.parameters()}
    return empty


def test_a_streamed_model_holds_a_block_only_while_it_runs(written: Written) -> None:
    checkpoint = Checkpoint.open(written.path)
    resident, streamed = load(checkpoint, weights="resident"), load(checkpoint, weights="streamed")
    assert (resident.streamed, streamed.streamed) == (False, True)
    assert not any(is_empty(block) for block in resident.blocks)
    seen: list[list[bool]] = []
    for block in streamed.blocks:
        inner = next(block.children())
        inner.register_forward_hook(
            lambda *_: seen.append([is_empty(block) for block in streamed.blocks])
        )
    for _ in range(2):
        seen.clear()
        assert all(is_empty(block) for block in streamed.blocks)
        assert torch.equal(streamed.logits(TOKENS), resident.logits(TOKENS))
        count = len(streamed.blocks)
        assert seen == [[other != number for other in range(count)] for number in range(count)]
    assert not is_empty(streamed.causal_lm.get_submodule("lm_head"))


def test_without_head_only_the_blocks_run(written: Written) -> None:
    model = load(Checkpoint.open(written.path), head=False)
    whole = load(Checkpoint.open(written.path))
    assert model.causal_lm.get_parameter("lm_head.weight").is_meta
    assert not any(parameter.is_meta for parameter in whole.causal_lm.parameters())
    outputs: list[torch.Tensor] = []
    for loaded in (model, whole):
        loaded.blocks[-1].register_forward_hook(lambda *args: outputs.append(first(args[2])))
        loaded.through(TOKENS)
    assert torch.equal(*outputs)


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_of_later_blocks_nothing_is_read(
    written: Written, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    checkpoint, read, layers = Checkpoint.open(written.path), Checkpoint.read, set()

    def recorded(
        self: Checkpoint, rule: TensorRule, layer: int = 0, expert: int = 0
    ) -> torch.Tensor:
        layers.add(layer if rule.per_layer else None)
        return read(self, rule, layer, expert)

    monkeypatch.setattr(Checkpoint, "read", recorded)
    model = load(checkpoint, layers=range(1), weights=weights, head=False)
    output: list[torch.Tensor] = []
    model.blocks[0].register_forward_hook(lambda *args: output.append(first(args[2])))
    model.through(TOKENS)
    assert len(model.blocks) == 1
    assert layers == {None, 0}
    whole = load(checkpoint)
    whole.blocks[0].register_forward_hook(lambda *args: output.append(first(args[2])))
    whole.through(TOKENS)
    assert len(whole.blocks) == written.variant.config["num_hidden_layers"]
    assert torch.equal(*output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_streams_what_exceeds_the_budget(written: Written, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(written.path)
    stored = sum(
        tensor.numel() * dtype.itemsize
        for name, tensor in written.tensors.items()
        if ".1." in name and "rotary" not in name
    )
    assert block_bytes(checkpoint, dtype) == stored
    for n_blocks in (1, checkpoint.shape.n_layers):
        for spare in (0, -1):
            budget = n_blocks * stored + spare
            model = load_model(
                checkpoint, dtype=dtype, device="cpu", layers=range(n_blocks), weight_budget=budget
            )
            assert model.streamed is (spare < 0)


GROUPS = {
    "version 2": ("0::/box", "sys/fs/cgroup/box/memory.max"),
    "version 2, a group above": ("0::/box/inner", "sys/fs/cgroup/box/memory.max"),
    "version 1": ("4:memory:/box", "sys/fs/cgroup/memory/box/memory.limit_in_bytes"),
    "version 1, the container's root": (
        "4:memory:/x",
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
    ),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_a_containers_limit_decides_what_is_streamed(tmp_path: Path, groups: str) -> None:
    """Blocks are streamed if they exceed 60 % of the limit; without one they are resident."""
    checkpoint = Checkpoint.open(write(BY_NAME["minicpm"], tmp_path / "model", b"").path)
    needed = checkpoint.shape.n_layers * block_bytes(checkpoint, torch.float32)
    own, file = GROUPS[groups]
    limits = {"max": False, str(2 * needed): False, str(needed): True, "1000\n": True}
    for number, (limit, streamed) in enumerate(limits.items()):
        root = tmp_path / str(number)
        for name, text in (("proc/self/cgroup", own), (file, limit)):
            (root / name).parent.mkdir(parents=True)
            (root / name).write_text(text)
        assert load(checkpoint, weight_budget=weight_budget("cpu", root)).streamed is streamed


@pytest.mark.parametrize(("limit", "expected"), [("1000\n", 600), ("max\n", None), (None, None)])
def test_the_budget_is_a_share_of_the_machine_or_of_the_containers_limit(
    tmp_path: Path, limit: str | None, expected: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    if limit is not None:
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit)
    total = 1024 * int(Path("/proc/meminfo").read_text().split()[1])
    assert weight_budget("cpu", tmp_path) == (expected or pytest.approx(0.6 * total, rel=0.01))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_one_line(tmp_path: Path, device: str) -> None:
    checkpoint = Checkpoint.open(write(BY_NAME["minicpm"], tmp_path / "model", b"").path)
    with refused(f"cannot run on device {device!r}", "check --device"):
        load_model(checkpoint, dtype=torch.float32, device=device)


@pytest.mark.parametrize("call", [LoadedModel.through, LoadedModel.logits])
def test_running_out_of_memory_is_one_line(tmp_path: Path, call: Any) -> None:
    model = load(Checkpoint.open(write(BY_NAME["minicpm"], tmp_path / "model", b"").path))

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB\nof 1 GiB")

    model.blocks[1].register_forward_pre_hook(full)
    with refused("cpu: out of memory", "lower --batch or --context", "--weights streamed"):
        call(model, TOKENS)


@pytest.mark.parametrize("stored", DTYPES)
def test_every_stored_dtype_loads_and_runs(written: Written, tmp_path: Path, stored: str) -> None:
    """In float32 to the last digits, in the stored dtype to its precision."""
    variant = written.variant.changed(torch_dtype=stored)
    other = write(variant, tmp_path / stored, b"")
    checkpoint, dtype = Checkpoint.open(other.path), DTYPES[stored]
    assert checkpoint.dtype == dtype
    expected = torch.stack([other.reference(row.tolist()).logits for row in TOKENS])
    exact = load(checkpoint).logits(TOKENS).double()
    torch.testing.assert_close(exact, expected, atol=5e-5, rtol=0)
    model = load_model(checkpoint, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.causal_lm.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.causal_lm.buffers()} <= {torch.float32}
    rough = model.logits(TOKENS)
    assert rough.dtype == dtype
    error = (rough.double() - expected).std() / expected.std()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["bamboo", "minicpm", "prosparse", "falcon-40b"])
def test_a_checkpoints_own_code_is_never_run(tmp_path: Path, name: str) -> None:
    written, marker = write(BY_NAME[name], tmp_path / "model", b""), tmp_path / "owned"
    modules = {text.split(".")[0] for text in written.variant.config["auto_map"].values()}
    assert len(modules) == 2
    for module in modules:
        (written.path / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')")
    load(Checkpoint.open(written.path)).logits(TOKENS)
    assert not marker.exists()
    assert not any(module.startswith("transformers_modules") for module in sys.modules)


@pytest.mark.parametrize(
    ("name", "hidden_act"),
    [
        ("relu-mistral", "relu"),
        ("relu-mistral", "fatrelu"),
        ("relu-mistral", "drelu"),
        ("bamboo", "relu"),
        ("relu-llama", "relu"),
        ("relu-llama", "fatrelu"),
        ("relu-llama", "drelu"),
    ],
)
def test_a_sliding_window_limits_the_context_of_what_has_one(
    tmp_path: Path, name: str, hidden_act: str
) -> None:
    variant = BY_NAME[name].changed(hidden_act=hidden_act, hidden_act_param=0.2)
    path, contexts = write(variant, tmp_path / "model", b"").path, []
    windows: list[dict[str, Any]] = [{"sliding_window": size} for size in (8, 9000, None)]
    for window in ({}, *windows):
        config = variant.config | {"max_position_embeddings": 8192}
        config.pop("sliding_window", None)
        (path / "config.json").write_text(json.dumps(config | window))
        contexts.append(Checkpoint.open(path).shape.context_length)
    # Mistral's default is 4096, and null is none.
    assert contexts == ([8192] * 4 if name == "relu-llama" else [4096, 8, 8192, 8192])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("relu-llama", "rope_theta"),
        ("relu-llama", "num_key_value_heads"),
        ("minicpm", "tie_word_embeddings"),
        ("falcon-40b", "num_ln_in_parallel_attn"),
        ("opt-6.7b", "_remove_final_layer_norm"),
    ],
)
def test_null_means_absent(tmp_path: Path, name: str, key: str) -> None:
    variant = BY_NAME[name].changed(**{key: None})
    path = write(variant, tmp_path / "model", b"").path
    absent = Checkpoint.open(path).shape
    (path / "config.json").write_text(json.dumps(variant.config | {key: None}))
    assert Checkpoint.open(path).shape == absent


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("relu-llama", {"hidden_act": "silu"}, ["hidden_act is 'silu'", "ReLU-fication"]),
        ("relu-mistral", {"hidden_act": "silu"}, ["hidden_act is 'silu'", "ReLU-fication"]),
        ("minicpm", {"hidden_act": "silu"}, ["hidden_act is 'silu'", "ReLU-fication"]),
        ("bamboo", {"hidden_act": "silu"}, ["hidden_act is 'silu'", "ReLU-fication"]),
        ("bamboo", {"hidden_act": None}, ["hidden_act is None", "ReLU-fication"]),
        ("prosparse", {"hidden_act": "shiftrelu"}, ["hidden_act is 'shiftrelu'", "'fatrelu'"]),
        ("prosparse", {"hidden_act_param": None}, ["hidden_act_param is None", "above 0", "mend"]),
        ("minicpm-s", {"hidden_act_param": -1}, ["hidden_act_param is -1", "above 0", "mend"]),
        ("minicpm", {"scale_depth": 0}, ["scale_depth is 0", "above 0", "mend"]),
        ("opt-6.7b", {"activation_function": "gelu"}, ["activation_function is 'gelu'", "'relu'"]),
        ("opt-6.7b", {"do_layer_norm_before": False}, ["do_layer_norm_before is False", "true"]),
        ("opt-6.7b", {"word_embed_proj_dim": 32}, ["word_embed_proj_dim is 32", "64"]),
        ("opt-6.7b", {"enable_bias": False}, ["enable_bias is False", "true"]),
        ("falcon-40b", {"activation": None}, ["activation is None", "'relu'", "ReLU-fication"]),
        ("falcon-40b", {"activation": "gelu"}, ["activation is 'gelu'", "'relu'"]),
        ("falcon-7b", {"alibi": True}, ["alibi is True", "false"]),
        ("falcon-7b", {"bias": True}, ["bias is True", "false"]),
        ("falcon-7b", {"parallel_attn": False}, ["parallel_attn is False", "true"]),
        ("falcon-40b", {"num_kv_heads": 3}, ["num_kv_heads is 3", "a divisor of 4"]),
        ("relu-mistral", {"attention_bias": True}, ["attention_bias is True", "false"]),
        ("minicpm", {"attention_bias": True}, ["attention_bias is True", "false"]),
        (
            "relu-llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["'dynamic'", "scales positions"],
        ),
        (
            "falcon-7b",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            ["rope_type is 'yarn'", "'default'", "twice"],
        ),
        ("minicpm", {"num_key_value_heads": 3}, ["num_key_value_heads is 3", "a divisor of 4"]),
        (
            "relu-mistral",
            {"quantization_config": {"bits": 4}},
            ["quantization_config", "bits", "original"],
        ),
        ("opt-6.7b", {"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "supported: "]),
        ("falcon-7b", {"architectures": ["RWForCausalLM"]}, ["RWForCausalLM", "supported: "]),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_by_key_and_value(
    name: str, changes: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    good = write(BY_NAME[name], tmp_path / "model", b"")
    Checkpoint.open(good.path)
    (good.path / "config.json").write_text(json.dumps(good.variant.changed(**changes).config))
    with refused("config.json", *parts):
        Checkpoint.open(good.path)
