"""Every element type that gguf dequantises, tensor by tensor, against gguf's own reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from gguf import GGMLQuantizationType, GGUFReader, quants
from gguf_models import D_MODEL, HEADS, KV_HEADS, llama_keys, llama_tensors, write_gguf

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError

_NAMES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS"
_NAMES += " IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS"
KINDS = [GGMLQuantizationType[name] for name in _NAMES.split()]
BLOCK = "model.layers.0."


def wanted(file: Path) -> dict[str, torch.Tensor]:
    """Return a sparse file's numbers as gguf reads them, which does not know the magic."""
    renamed = file.with_suffix(".renamed")
    renamed.write_bytes(b"GGUF" + file.read_bytes()[4:])
    return {
        tensor.name: torch.from_numpy(
            quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        )
        for tensor in GGUFReader(renamed).tensors
    }


def pairs_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Take the even rows of a head first, then the odd ones."""
    size = len(rows) // heads
    order = [*range(0, size, 2), *range(1, size, 2)]
    return torch.cat([rows[head * size :][order] for head in range(heads)])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_numbers_of_every_type_are_gguf_s(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """Of random bytes, some of them scales that are infinite or no number."""
    file = write_gguf(tmp_path / "model.gguf", llama_keys(), llama_tensors(kind))
    expected, checkpoint = wanted(file), Checkpoint.open(file)

    def same(name: str, theirs: torch.Tensor) -> None:
        found = checkpoint.files.read(f"{name}.weight")
        torch.testing.assert_close(found.float(), theirs, atol=0, rtol=0, equal_nan=True)
        # A few rows only: what fingerprints read.
        some = checkpoint.files.read(f"{name}.weight", 5).float()
        torch.testing.assert_close(some, theirs[:5], atol=0, rtol=0, equal_nan=True)

    same("model.embed_tokens", expected["token_embd.weight"])
    same(f"{BLOCK}self_attn.v_proj", expected["blk.0.attn_v.weight"])
    query, key = expected["blk.0.attn_q.weight"], expected["blk.0.attn_k.weight"]
    same(f"{BLOCK}self_attn.q_proj", pairs_to_halves(query, HEADS))
    same(f"{BLOCK}self_attn.k_proj", pairs_to_halves(key, KV_HEADS))
    same(f"{BLOCK}mlp.down_proj", expected["blk.0.ffn_down_t.weight"].T)
    same(f"{BLOCK}input_layernorm", expected["blk.0.attn_norm.weight"])
    plain = {"F32": torch.float32, "BF16": torch.bfloat16}
    assert checkpoint.dtype == plain.get(kind.name, torch.float16)


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tensors = llama_tensors()
    numbers = np.zeros((512, D_MODEL), dtype=np.int8)
    tensors["blk.0.ffn_up.weight"] = numbers, GGMLQuantizationType.I8
    file = write_gguf(tmp_path / "model.gguf", llama_keys(), tensors)
    with refused(CheckpointError, str(file), "blk.0.ffn_up.weight", "I8", "such as F16"):
        Checkpoint.open(file)


def test_what_is_read_is_the_readers_own(tmp_path: Path) -> None:
    """A model may be trained in place: the file stays as it is."""
    file = write_gguf(tmp_path / "model.gguf", llama_keys(), llama_tensors())
    before, checkpoint = file.read_bytes(), Checkpoint.open(file)
    tensor = checkpoint.files.read(f"{BLOCK}mlp.gate_proj.weight")
    tensor.zero_()
    assert file.read_bytes() == before
    assert checkpoint.files.read(f"{BLOCK}mlp.gate_proj.weight").any()
