"""Exporting a GGUF model: what is stored as PowerInfer runs it is copied, the rest converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXT, ModelMaker, refused, write_predictors
from gguf import GGMLQuantizationType as Kind
from rewriting import Tensor, recast, rewritten, stored, tensors_of

from common.errors import CheckpointError, FormatError, PredictorError
from gguf_export.bundle import Bundle, export
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import ExportCheck, verify

FOREIGN = (
    "general.name",
    "psp.version",
    "psp.model_fingerprint",
    "psp.activation",
    "psp.activation_threshold",
    "psp.recipe",
    "psp.predictor_type",
    "llama.rope.freq_base",
    "llama.rope.dimension_count",
)
"""Keys that files of PowerInfer's own converters lack, or may."""

FFN = ("ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose rows and columns fill blocks of Q4_0."""
    return make_model(tmp_path_factory.mktemp("gguf") / "model", intermediate_size=1024)


@pytest.fixture(scope="module")
def predictors(model: Path) -> Path:
    path = model.with_name("predictors")
    write_predictors(model, path)
    return path


@pytest.fixture(scope="module")
def plain(model: Path, predictors: Path) -> Bundle:
    """Return an export in F16, with its dense file."""
    return exported(model, predictors, model.with_name("plain"), dense=True, dense_arch="llama")


@pytest.fixture(scope="module")
def quantised(model: Path, predictors: Path) -> Bundle:
    """Return an export in Q4_0, predictors too."""
    types = {"outtype": "q4_0", "predictor_type": "q4_0"}
    return exported(model, predictors, model.with_name("quantised"), **types)


def exported(model: Path, predictors: Path, out: Path, **settings: Any) -> Bundle:
    file = out / "m.powerinfer.gguf"
    return export(ExportConfig(model=str(model), predictors=predictors, out=file, **settings))


def model_tensors(path: Path) -> dict[str, Tensor]:
    return {name: each for name, each in tensors_of(path).items() if ".fc" not in name}


@pytest.mark.parametrize("kind", ["plain", "quantised"])
def test_a_file_exported_again_is_the_same_to_the_byte(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    file: Path = request.getfixturevalue(kind).model_file
    again = exported(file, file, tmp_path)
    assert not again.warnings
    assert again.model_file.read_bytes() == file.read_bytes()
    assert (tmp_path / "activation" / "activation_1.pt").is_file()


def test_a_file_of_another_maker_keeps_tensors_and_keys(
    quantised: Bundle, predictors: Path, tmp_path: Path
) -> None:
    left = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.unknown_token_id")  # PowerInfer: 2, 0
    keys: dict[str, Any] = dict.fromkeys((*FOREIGN, *left)) | {"general.file_type": 1}
    file = rewritten(quantised.model_file, tmp_path / "theirs.gguf", keys=keys, alignment=64)
    kept = exported(file, file, tmp_path / "kept")
    assert tensors_of(kept.model_file) == tensors_of(file)
    theirs, ours = GGUFFile(file).values, GGUFFile(kept.model_file).values
    for name in theirs.keys() - {"general.alignment"}:
        assert np.array_equal(ours[name].data, theirs[name].data), name
    assert "psp.predictor_type" not in ours
    assert verify(kept.model_file, str(file)).ok


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "number"), [("output_norm", float("inf")), ("blk.0.ffn_up", float("nan"))]
)
def test_weights_that_are_no_numbers_are_named(
    quantised: Bundle, predictors: Path, tmp_path: Path, name: str, number: float
) -> None:
    """In quantised matrices it is a block's scale, of which 32 numbers are made."""
    shape, kind, content = tensors_of(quantised.model_file)[f"{name}.weight"]
    first = np.float32(number) if kind is Kind.F32 else np.float16(number)
    spoilt = shape, kind, first.tobytes() + content[first.nbytes :]
    file = tmp_path / "spoilt.gguf"
    rewritten(quantised.model_file, file, tensors={f"{name}.weight": spoilt})
    out = tmp_path / "new" / "m.powerinfer.gguf"
    config = ExportConfig(model=str(file), predictors=predictors, out=out)
    told = f"{file}: tensor {name}.weight is damaged: "
    with refused(CheckpointError, told, "fetch the file again, or pass"):
        export(config, ExportCheck(str(file), out))
    assert not out.parent.exists()


def test_predictors_are_replaced_and_nothing_else(
    quantised: Bundle, model: Path, tmp_path: Path
) -> None:
    other = write_predictors(model, tmp_path / "other", lambda gate: (gate[:32], gate[:, :32]))
    made = exported(quantised.model_file, other.path, tmp_path / "new")
    assert model_tensors(made.model_file) == model_tensors(quantised.model_file)
    file = GGUFFile(made.model_file)
    assert file.tensors["blk.1.fc2.weight"].kind is Kind.F16
    assert file.tensor("blk.1.fc1.weight").tobytes() == other.layer(1).fc1.numpy().tobytes()
    assert file.values["psp.predictor_type"].data == b"f16"
    assert verify(made.model_file, str(model)).checks["model fingerprint"].ok


def test_a_chosen_type_rounds_plain_numbers_only(
    plain: Bundle, quantised: Bundle, tmp_path: Path
) -> None:
    settings = {"outtype": "q4_0", "predictor_type": "q4_0"}
    made = exported(plain.model_file, plain.model_file, tmp_path / "a", **settings)
    assert tensors_of(made.model_file) == tensors_of(quantised.model_file)
    back = exported(made.model_file, made.model_file, tmp_path / "b", outtype="f16")
    assert tensors_of(back.model_file) == tensors_of(quantised.model_file)


def test_a_dense_file_becomes_the_sparse_one(
    plain: Bundle, predictors: Path, tmp_path: Path
) -> None:
    made = exported(plain.dense_file, predictors, tmp_path)
    assert tensors_of(made.model_file) == tensors_of(plain.model_file)
    assert GGUFFile(made.model_file).values.keys() == GGUFFile(plain.model_file).values.keys()
    assert not [line for line in made.warnings if "converted" in line]


def test_what_powerinfer_cannot_run_is_converted_and_told(
    plain: Bundle, predictors: Path, tmp_path: Path
) -> None:
    dense = plain.dense_file
    changes = {
        **recast(dense, Kind.Q4_1, *FFN),
        **recast(dense, Kind.Q5_0, "attn_q", "attn_output"),
        **recast(dense, Kind.Q8_0, "token_embd"),
        **recast(dense, Kind.BF16, "attn_v"),
        **recast(dense, Kind.F32, "attn_k"),
    }
    file = rewritten(dense, tmp_path / "dense.gguf", tensors=changes)
    made = exported(file, predictors, tmp_path / "f16")
    found, theirs = model_tensors(made.model_file), tensors_of(file)
    for name, tensor in found.items():
        converted = any(part in name for part in (*FFN, "attn_v")) and "norm" not in name
        assert converted or tensor == theirs[name], name
    up, down = "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"
    numbers = GGUFFile(file)
    assert found[up] == stored(numbers.tensor(up), Kind.F16)
    assert found[f"{down[:14]}_t.weight"] == stored(numbers.tensor(down).T, Kind.F16)
    (told,) = [line for line in made.warnings if line.startswith("converted")]
    assert "attn_v from BF16 to F16; ffn_gate, ffn_up, ffn_down_t from Q4_1 to F16" in told
    assert f"the other {len(theirs) - 8} tensors are copied" in told
    assert verify(made.model_file, str(file)).checks["model tensors"].ok
    small = exported(file, predictors, tmp_path / "q4", outtype="q4_0")
    kinds = {name: kind.name for name, (_, kind, _) in model_tensors(small.model_file).items()}
    assert {kinds[name] for name in kinds if "ffn_" in name and "norm" not in name} == {"Q4_0"}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_k.weight"]) == ("Q5_0", "Q4_0")


def test_a_tied_head_is_copied_twice(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    write_predictors(model, tmp_path / "predictors")
    dense = exported(model, tmp_path / "predictors", tmp_path / "a", dense=True).dense_file
    file = rewritten(dense, tmp_path / "d.gguf", tensors={"output.weight": None})
    made = tensors_of(exported(file, tmp_path / "predictors", tmp_path / "b").model_file)
    assert (
        made["output.weight"] == made["token_embd.weight"] == tensors_of(file)["token_embd.weight"]
    )


def test_predictors_of_other_weights_are_refused(
    plain: Bundle, make_model: ModelMaker, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=7, intermediate_size=1024)
    for model in (other, exported(other, Path("none"), tmp_path / "out").model_file):
        with refused(PredictorError, str(plain.model_file), "trained for model", str(model)):
            exported(model, plain.model_file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_spoilt_predictors_are_refused(plain: Bundle, tmp_path: Path) -> None:
    tensors = recast(plain.model_file, Kind.Q4_0, "fc1", "fc2")
    file = rewritten(plain.model_file, tmp_path / "spoilt.gguf", tensors=tensors)
    with refused(FormatError, "fc1.weight is Q4_0, the predictors were exported as F16"):
        exported(file, file, tmp_path / "new")


@pytest.mark.powerinfer
def test_perplexity_stays_in_powerinfer(
    powerinfer_bin: Path, plain: Bundle, quantised: Bundle, predictors: Path, tmp_path: Path
) -> None:
    def perplexity(file: Path) -> float:
        return PowerInfer(powerinfer_bin).perplexity(file, TEXT * 4, 64, None, threads=1)

    keys: dict[str, Any] = dict.fromkeys(FOREIGN)
    theirs = rewritten(quantised.model_file, tmp_path / "theirs.gguf", keys=keys)
    kept = exported(theirs, theirs, tmp_path / "kept")
    assert perplexity(kept.model_file) == perplexity(quantised.model_file)
    made = exported(plain.dense_file, predictors, tmp_path / "dense")
    assert perplexity(made.model_file) == perplexity(plain.model_file)
