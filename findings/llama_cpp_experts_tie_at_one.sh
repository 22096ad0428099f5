#!/usr/bin/env bash
# llama.cpp gives a token of a SmallThinker model another expert than the model's own code does, once two router
# logits are above about 17: it compares their sigmoids, and in float32 all of those are 1.
#
# Expected: the sigmoid rises with the logit, so it does not matter which of them is compared, and of a model with one
# expert a token it does not matter by what positive number its router is multiplied: the best stays the best and weighs
# 1. PowerInfer's modeling_smallthinker.py chooses by the logits. llama.cpp takes the sigmoid first: the logits 20 and 40
# are then equal, and the first in its order wins. The router reads the residual stream without a norm, whose numbers are
# large, and nothing keeps its logits small. With softmax gating it is as expected.
#
# Seen with: llama-cpp-python 0.3.36 (its source holds llama.cpp 0c1e570), gguf 0.19.0, Python 3.11. Builds llama.cpp,
# which takes some minutes.
# Fails with: SCALE=2, where the router's logits stay below 17.
set -euo pipefail
LLAMA_CPP=0.3.36 GGUF=0.19.0 SCALE=${SCALE:-64}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "llama-cpp-python==$LLAMA_CPP" "gguf==$GGUF"

cat > "$work/show.py" <<'PYTHON'
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import ExpertGatingFuncType, GGUFWriter, TokenType

work, scale = Path(sys.argv[1]), float(sys.argv[2])
D_MODEL, D_FF, EXPERTS, HEADS, VOCABULARY = 64, 32, 4, 4, 300
IDS = list(range(3, VOCABULARY, 5))


def write(path, gating, factor):
    """Write a model of one layer; only the gating and the router's factor differ."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "smallthinker")
    for add, value in (
        (writer.add_context_length, 128), (writer.add_embedding_length, D_MODEL), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, D_FF), (writer.add_expert_feed_forward_length, D_FF),
        (writer.add_head_count, HEADS), (writer.add_head_count_kv, HEADS), (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_expert_count, EXPERTS), (writer.add_expert_used_count, 1), (writer.add_expert_gating_func, gating),
    ):
        add(value)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"piece{number}" for number in range(len(pieces), VOCABULARY)]
    kinds = [TokenType.UNKNOWN] + 2 * [TokenType.CONTROL] + 256 * [TokenType.BYTE]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * (VOCABULARY - len(kinds))])

    def matrix(*shape):
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    ones = np.ones(D_MODEL, np.float32)
    tensors = {
        "token_embd": matrix(VOCABULARY, D_MODEL) * 8, "output_norm": ones, "output": matrix(VOCABULARY, D_MODEL),
        "blk.0.attn_norm": ones, "blk.0.ffn_norm": ones,
        **{f"blk.0.attn_{part}": matrix(D_MODEL, D_MODEL) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate_inp": matrix(EXPERTS, D_MODEL) * np.float32(factor),
        "blk.0.ffn_gate_exps": matrix(EXPERTS, D_FF, D_MODEL), "blk.0.ffn_up_exps": matrix(EXPERTS, D_FF, D_MODEL),
        "blk.0.ffn_down_exps": matrix(EXPERTS, D_MODEL, D_FF) * 4,
    }
    for name, numbers in tensors.items():
        writer.add_tensor(f"{name}.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["token_embd"][IDS] @ tensors["blk.0.ffn_gate_inp"].T


def logits(gating, factor):
    """Return llama.cpp's logits, and the largest and the second largest of each token's router."""
    path = work / f"{gating.name}-{factor}.gguf"
    routed = np.sort(write(path, gating, factor), axis=1)
    llama = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    llama.eval(IDS)
    return np.array(llama.scores[: len(IDS)]), routed[:, -2]


changed, saturated = {}, {}
for gating in (ExpertGatingFuncType.SIGMOID, ExpertGatingFuncType.SOFTMAX):
    (one, _), (other, second) = logits(gating, 1.0), logits(gating, scale)
    changed[gating.name] = int((np.abs(one - other).max(axis=1) > 0.01).sum())
    saturated[gating.name] = int((second > 17).sum())
    print(f"{gating.name}: router times {scale:g} changes the logits of {changed[gating.name]} of {len(IDS)} tokens; "
          f"the second best logit is above 17 for {saturated[gating.name]}")
holds = changed["SIGMOID"] > 0 and changed["SOFTMAX"] == 0
print("holds: experts tie at one" if holds else "does not hold")
sys.stdout.flush()
import os
os._exit(not holds)
PYTHON
"$work/venv/bin/python" "$work/show.py" "$work" "$SCALE" 2>/dev/null
