"""F16 and Q4_0 files: bytes, refusals, arithmetic, and PowerInfer's own programs on them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import TEXT, refused, write_predictors
from exact_sums import ExactSums
from families import BY_NAME, Written, write
from gguf import GGMLQuantizationType as Kind

from architectures.tokenizer import load_tokenizer
from common.errors import ExportError
from common.rounding import to_q8_0
from gguf_export.bundle import Bundle, export
from gguf_export.gpu_split import SplitResult, split
from gguf_export.pwri.element_types import FileTypes, encode, runnable
from gguf_export.pwri.gpu_index import GROUPS, index_path, read_gpu_index
from gguf_export.pwri.memory_plan import MemorySettings, plan_memory
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_export.settings import ExportConfig, SplitConfig
from gguf_files.elements import decode
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.arithmetic import rounded, to_q8_k
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify

CONTEXT = 32


def block_of(values: list[float]) -> np.ndarray:
    return np.array(values + [0.0] * (32 - len(values)), np.float32)


def test_a_block_of_q4_0_is_the_bytes_worked_out_by_hand() -> None:
    """-8 stands for the value of largest magnitude, here 4.0: the scale is 4 / -8 = -0.5."""
    data = encode(block_of([4.0, 1.0, -3.5, 0.2]).reshape(1, 32), Kind.Q4_0)
    # 0 for 4.0, then 1 / -0.5 = -2 as 6, 7 as 15, -0.4 as 8; zeros are 8 in both nibbles.
    low = bytes([0x80, 0x86, 0x8F, 0x88]) + b"\x88" * 12
    assert data.tobytes() == np.float16(-0.5).tobytes() + low
    back = decode(np.frombuffer(data.tobytes(), np.uint8), (1, 32), Kind.Q4_0)
    np.testing.assert_array_equal(back[0, :4], [4.0, 1.0, -3.5, 0.0])
    assert back.dtype == np.float32


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16])
def test_plain_types_come_back_as_they_went(kind: Kind) -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float16)
    data = encode(numbers, kind)
    assert data.dtype == {Kind.F32: np.float32, Kind.F16: np.float16}[kind]
    back = decode(data.reshape(-1).view(np.uint8), (3, 32), kind)
    np.testing.assert_array_equal(back, numbers)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.ffn_norm.weight", (64,), Kind.F32),
        ("blk.0.ffn_up.bias", (1024,), Kind.F32),
        ("blk.0.ffn_gate.weight", (1024, 64), Kind.Q4_0),
        ("blk.1.ffn_down_t.weight", (1024, 64), Kind.Q4_0),
        ("blk.1.attn_q.weight", (64, 64), Kind.Q4_0),
        ("token_embd.weight", (320, 64), Kind.Q4_0),
        ("output.weight", (320, 64), Kind.F16),
        ("position_embd.weight", (2050, 64), Kind.F16),
        ("blk.0.fc1.weight", (32, 64), Kind.F16),
        ("blk.0.fc2.weight", (1024, 32), Kind.F16),
    ],
)
def test_every_tensor_has_its_type(name: str, shape: tuple[int, ...], expected: Kind) -> None:
    types = FileTypes(weights="q4_0")
    assert types.of(name, shape) is expected
    assert expected in runnable(name, shape)
    everything = FileTypes(weights="f16", predictors="q4_0").of(name, shape)
    assert (everything is Kind.Q4_0) == (".fc" in name)


def test_the_embedding_stays_f16_where_it_is_the_head() -> None:
    types = FileTypes(weights="q4_0")
    assert types.of("token_embd.weight", (320, 64), head="token_embd.weight") is Kind.F16


@pytest.mark.parametrize("option", ["outtype", "predictor_type"])
@pytest.mark.parametrize("value", ["q8_0", "f32", "bf16", ""])
def test_other_types_are_refused_with_the_reason(option: str, value: str) -> None:
    settings: Any = ExportConfig(model="m", predictors=Path("p"), out=Path("m.powerinfer.gguf"))
    named = f"--{option.replace('_', '-')} {value}"
    with refused(ExportError, named, "F16 or Q4_0 whatever the file says", "choose f16 or q4_0"):
        replace(settings, **{option: value})


def test_vectors_are_rounded_as_ggml_rounds_them() -> None:
    x = torch.zeros(2, 64)
    x[0, :4] = torch.tensor([127.0, 63.5, -0.5, 1.5])  # scale 1, ties to even
    x[1, 40] = -2.0
    expected = x.clone()
    expected[0, 1:4] = torch.tensor([64.0, 0.0, 2.0])
    scale = float(torch.tensor(2 / 127).half())
    expected[1, 40] = -127 * scale
    torch.testing.assert_close(to_q8_0(x), expected, rtol=0, atol=0)
    wide = torch.zeros(1, 256)
    wide[0, :3] = torch.tensor([64.0, -31.9, -64.0])  # the first of largest magnitude becomes -128
    found = to_q8_k(wide)[0, :3]
    torch.testing.assert_close(found, torch.tensor([64.0, -32.0, -63.5]))
    assert rounded(x, Kind.F16)[0, 1] == 63.5
    assert rounded(torch.zeros(1, 256), Kind.Q6_K).abs().max() == 0
    full = float(torch.tensor(2.0) / 127)  # Q8_1's scale is a float32
    assert float(rounded(x, Kind.Q5_1)[1, 40]) == pytest.approx(-127 * full, rel=1e-7)
    assert float(expected[1, 40]) != pytest.approx(-127 * full, rel=1e-7)
    assert rounded(x, Kind.F32) is x


@dataclass(frozen=True)
class Exported:
    written: Written
    bundle: Bundle


@pytest.fixture(scope="module")
def quantised(
    tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Exported]:
    made: dict[tuple[str, str], Exported] = {}
    variant = BY_NAME["relu-llama"].changed(intermediate_size=1024)

    def make(outtype: str, predictor_type: str) -> Exported:
        key = outtype, predictor_type
        if key not in made:
            path = tmp_path_factory.mktemp("types")
            written = write(variant, path / "model", tokenizer_bytes)
            write_predictors(written.path, path / "predictors", three_quarters)
            config = ExportConfig(
                model=str(written.path),
                predictors=path / "predictors",
                out=path / "out" / "m.powerinfer.gguf",
                outtype=outtype,
                predictor_type=predictor_type,
                dense=True,
            )
            made[key] = Exported(written, export(config))
        return made[key]

    return make


def three_quarters(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an exact predictor of rank 96: of 48 directions only, as fit blocks of 32, not 64."""
    u, s, v = torch.linalg.svd(gate, full_matrices=False)
    v, u = v[:48], u[:, :48] * s[:48]
    return torch.cat([v, -v]), torch.cat([u, -u], dim=1)


def test_the_file_says_and_holds_what_was_asked(quantised: Callable[..., Exported]) -> None:
    bundle = quantised("q4_0", "q4_0").bundle
    for path in (bundle.model_file, bundle.dense_file):
        file = GGUFFile(path)
        assert file.values["general.file_type"].data == 2
        assert file.values["general.quantization_version"].data == 2
        kinds = {name: info.kind for name, info in file.tensors.items()}
        assert kinds["output.weight"] is Kind.F16
        apart = ("norm", "gate_inp", "output.weight")
        matrices = [k for n, k in kinds.items() if not any(part in n for part in apart)]
        assert set(matrices) == {Kind.Q4_0}
    plain = GGUFFile(quantised("f16", "q4_0").bundle.model_file)
    assert plain.values["general.file_type"].data == 1
    assert "general.quantization_version" not in plain.values
    assert plain.tensors["blk.0.ffn_up.weight"].kind is Kind.F16


def test_a_rank_is_padded_to_whole_pairs_of_blocks(quantised: Callable[..., Exported]) -> None:
    file = GGUFFile(quantised("f16", "q4_0").bundle.model_file)
    assert file.tensors["blk.1.fc1.weight"].shape == (128, 64)
    assert file.tensors["blk.1.fc2.weight"].shape == (1024, 128)
    assert np.abs(file.tensor("blk.1.fc1.weight")[96:]).max() == 0
    assert np.abs(file.tensor("blk.1.fc2.weight")[:, 96:]).max() == 0
    whole = GGUFFile(quantised("f16", "f16").bundle.model_file)
    assert whole.tensors["blk.1.fc1.weight"].shape == (96, 64)


def tokens_for(made: Exported) -> list[int]:
    return [1, *load_tokenizer(made.written.path, 320).encode(TEXT)][:CONTEXT]


@pytest.mark.parametrize("threshold", [None, DENSE_THRESHOLD])
def test_tokens_apart_have_the_logits_of_all_at_once(
    quantised: Callable[..., Exported], threshold: float | None
) -> None:
    """Also where one token at a time gathers predicted neurons only."""
    made = quantised("q4_0", "q4_0")
    tokens, cache = tokens_for(made), KVCache(2)
    engine = Engine(made.bundle.model_file, threshold=threshold)
    with ExactSums():
        together = engine.forward(tokens, KVCache(2))
        apart = torch.cat([engine.forward([token], cache) for token in tokens])
    assert torch.equal(apart, together)


def test_the_engine_computes_the_rounded_model(quantised: Callable[..., Exported]) -> None:
    """Against the published formula on the file's own weights; vectors in 8 bits are all else."""
    made, tolerance = quantised("q4_0", "q4_0"), 0.03
    tokens = tokens_for(made)
    engine = Engine(made.bundle.model_file, threshold=DENSE_THRESHOLD)
    together = engine.forward(tokens, KVCache(2))
    spread = float(together.std())
    names = {"embed_tokens": "token_embd", "lm_head": "output", "gate_proj": "ffn_gate"}
    names |= {"up_proj": "ffn_up", "v_proj": "attn_v", "o_proj": "attn_output"}
    file, tensors = GGUFFile(made.bundle.model_file), dict(made.written.tensors)
    for name in tensors:
        part = names.get(name.split(".")[-2])
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if part is not None:
            tensors[name] = torch.from_numpy(file.tensor(f"{block}{part}.weight").astype("f4"))
        if "down_proj" in name:
            tensors[name] = torch.from_numpy(file.tensor(f"{block}ffn_down_t.weight").T)
        if ".q_proj" in name or ".k_proj" in name:
            target = f"{block}attn_{name.split('.')[-2][0]}.weight"
            rows = torch.from_numpy(file.tensor(target)).reshape(-1, 8, 2, 64)
            tensors[name] = rows.swapaxes(1, 2).reshape(-1, 64)
    model = replace(made.written, tensors=tensors).reference(tokens).logits.float()
    torch.testing.assert_close(together, model, atol=tolerance * spread * 5, rtol=0)
    assert float((together - model).std()) < tolerance * spread


def test_verify_holds_and_finds_a_changed_block(
    quantised: Callable[..., Exported], tmp_path: Path
) -> None:
    made = quantised("q4_0", "f16")
    document = verify(made.bundle.model_file, str(made.written.path)).document()
    failed = {check["name"] for check in document["checks"] if not check["ok"]}
    # Four bits move a random model's logits by more than the bound for F16; nothing else fails.
    assert failed <= {"dense logits"}
    damaged = tmp_path / "damaged.powerinfer.gguf"
    data = bytearray(made.bundle.model_file.read_bytes())
    start = GGUFFile(made.bundle.model_file).tensors["blk.0.ffn_up.weight"].start
    data[start + 5] ^= 1
    damaged.write_bytes(data)
    document = verify(damaged, str(made.written.path)).document()
    broken = {check["name"]: check["detail"] for check in document["checks"] if not check["ok"]}
    assert "blk.0.ffn_up.weight differs" in broken["model tensors"]


def test_a_scale_that_is_no_number_is_found(
    quantised: Callable[..., Exported], tmp_path: Path
) -> None:
    damaged = tmp_path / "nan.powerinfer.gguf"
    file = quantised("q4_0", "q4_0").bundle.model_file
    data = bytearray(file.read_bytes())
    for name in ("blk.1.ffn_gate.weight", "blk.0.fc2.weight"):
        start = GGUFFile(file).tensors[name].start
        data[start : start + 2] = np.float16(np.nan).tobytes()
    damaged.write_bytes(data)
    checks = {check["name"]: check for check in verify(damaged).document()["checks"]}
    assert "blk.1.ffn_gate.weight holds NaN" in checks["weights finite"]["detail"]
    assert "blk.0.fc2.weight holds NaN" in checks["predictors finite"]["detail"]
    assert checks["norms finite"]["ok"]


def split_for(file: Path, ffn_bytes: int) -> SplitResult:
    """Split with so long a context that this much VRAM remains for neurons."""
    budget, a_token = 5 << 18, 2 * 2 * 32 * 2  # both halves of two layers' keys of 32 float16
    settings = MemorySettings(budget=budget, n_layers=2, kv_width=32, n_ctx=1)
    left = plan_memory(GGUFFile(file).tensors.values(), settings).left
    context = 1 + (left - ffn_bytes) // a_token
    return split(SplitConfig(file=file, vram_budget=f"{budget}B", context=context, force=True))


def test_q4_0_neurons_go_to_the_gpu_in_groups_of_256(quantised: Callable[..., Exported]) -> None:
    file = quantised("q4_0", "q4_0").bundle.model_file
    made = split_for(file, 140_000)
    chosen, _ = read_gpu_index(index_path(file), 2, 1024, GROUPS["q4_0"])
    numbers = [int(layer.sum()) for layer in chosen]
    # Three rows of 64 in 36 bytes each, and four bytes in the bucket.
    assert sum(numbers) == 140_000 // (3 * 36 + 4) // 256 * 256
    assert made.neuron_share_on_gpu == sum(numbers) / 2048
    assert verify(file).document()["ok"]
    plain = quantised("f16", "f16").bundle.model_file
    split_for(plain, 140_000)
    chosen, _ = read_gpu_index(index_path(plain), 2, 1024)
    assert sum(int(layer.sum()) for layer in chosen) == 140_000 // 388 // 32 * 32
    shutil.copy(index_path(plain), index_path(file))
    failed = [check for check in verify(file).document()["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == ["gpu index"]
    assert "multiple of 256" in failed[0]["detail"]


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [({"intermediate_size": 1056}, "d_ff 1056 is no"), ({"hidden_size": 96}, "d_model 96 is no")],
)
def test_sizes_that_fill_no_pair_of_blocks_are_refused(
    tokenizer_bytes: bytes, tmp_path: Path, sizes: dict[str, int], problem: str
) -> None:
    variant = BY_NAME["relu-llama"].changed(**({"intermediate_size": 1024} | sizes))
    model = write(variant, tmp_path / "model", tokenizer_bytes).path
    write_predictors(model, tmp_path / "predictors")
    config = ExportConfig(
        model=str(model), predictors=tmp_path / "predictors", out=tmp_path / "m.powerinfer.gguf"
    )
    with refused(ExportError, problem, "multiple of 64", "choose f16"):
        export(replace(config, outtype="q4_0"))
    export(config)


def test_the_command_line_writes_them(
    quantised: Callable[..., Exported], psp: Callable[..., Result], tmp_path: Path
) -> None:
    made = quantised("q4_0", "f16")
    predictors = made.written.path.parent / "predictors"
    options = ("--model", made.written.path, "--predictors", predictors, "--no-verify")
    out = tmp_path / "m.powerinfer.gguf"
    result = psp("export-gguf", *options, "--out", out, "--outtype", "q4_0")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == made.bundle.model_file.read_bytes()
    result = psp(
        "export-gguf", *options, "--out", tmp_path / "n.powerinfer.gguf", "--outtype", "q5"
    )
    assert result.exit_code == 1
    assert "--outtype q5: PowerInfer's sparse operators read" in result.stderr


def fused(numbers: np.ndarray) -> np.ndarray:
    """Quantise to Q4_0 and back with one rounding where the source code has two."""
    blocks = numbers.astype(np.float32).reshape(-1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = extreme / np.float32(-8)
    inverse = np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale)).astype(np.float32)
    steps = np.float32(blocks.astype(np.float64) * inverse + 8.5).astype(np.uint8).clip(0, 15)
    back = scale.astype(np.float16).astype(np.float32) * (steps.astype(np.float32) - 8)
    return back.reshape(numbers.shape)


@pytest.mark.powerinfer
def test_blocks_are_those_of_powerinfer_s_own_quantize(
    powerinfer_bin: Path, quantised: Callable[..., Exported], tmp_path: Path
) -> None:
    program = powerinfer_bin / "quantize"
    if not program.is_file():
        pytest.skip(f"{program} is not there")
    plain, ours = quantised("f16", "f16").bundle, quantised("q4_0", "q4_0").bundle
    for leave in (["--leave-output-tensor"], []):
        target = tmp_path / f"theirs{len(leave)}.powerinfer.gguf"
        command = [program, *leave, plain.model_file, target, "q4_0", "1"]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
        theirs, mine = GGUFFile(target), GGUFFile(ours.model_file)
        assert list(theirs.tensors) == list(mine.tensors)
        for name, info in theirs.tensors.items():
            if name == "output.weight" and not leave:
                assert info.kind is Kind.Q8_0  # Q6_K where d_model is a multiple of 256
                continue
            assert info.kind is mine.tensors[name].kind
            found, own = theirs.tensor(name), mine.tensor(name)
            if ".fc" in name:  # theirs keeps the rank of 96
                own = own[: info.shape[0], : info.shape[1]]
            # A compiler may fuse the product and the sum before a number is cut to 4 bits.
            exact = found == (
                own
                if info.kind is not Kind.Q4_0
                else fused(GGUFFile(plain.model_file).tensor(name))
            )
            assert ((found == own) | exact).all(), name
            assert (found == own).mean() > 0.9999, name
    failed = [check["name"] for check in verify(target).document()["checks"] if not check["ok"]]
    assert failed == ["predictor types"]


@pytest.mark.powerinfer
@pytest.mark.parametrize("types", [("q4_0", "q4_0"), ("q4_0", "f16"), ("f16", "q4_0")])
@pytest.mark.parametrize("threshold", [None, DENSE_THRESHOLD], ids=["predicted", "dense"])
def test_the_real_perplexity_is_the_embedded_engine_s(
    powerinfer_bin: Path,
    quantised: Callable[..., Exported],
    types: tuple[str, str],
    threshold: float | None,
) -> None:
    file, text = quantised(*types).bundle.model_file, TEXT * 6
    real = PowerInfer(powerinfer_bin).perplexity(
        file, text, CONTEXT, None, threads=1, threshold=threshold
    )
    ours = engine_perplexity(Engine(file, threshold=threshold), text, CONTEXT, None, "engine")
    assert ours == pytest.approx(real, rel=0.005)
