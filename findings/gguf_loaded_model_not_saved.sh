#!/usr/bin/env bash
# A model that transformers loaded from a GGUF file cannot be saved, not even one that was never quantised.
#
# Expected: `from_pretrained(..., gguf_file=...)` gives an ordinary float model, whose own pages on GGUF
# go on with `save_pretrained` as the way back to other programs. Here every number of the file is F32.
# The model is float32 too, but it carries the mark of a quantised one, and saving refuses it. Who turns a
# published GGUF file into a Hugging Face directory meets it at the last step; the mark
# (`config.quantization_config` and `hf_quantizer`) has to be taken off first.
#
# Seen with: transformers 5.24.0, gguf 0.19.0, torch 2.13.0, Python 3.11.
# Fails with: transformers 4.57.6, which saves it.
set -euo pipefail
TRANSFORMERS=${TRANSFORMERS:-5.24.0} GGUF=0.19.0 TORCH=2.13.0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "transformers==$TRANSFORMERS" "gguf==$GGUF" "torch==$TORCH" accelerate

cat > "$work/show.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

D_MODEL, D_FF, TOKENS = 32, 64, 8
BLOCK = {
    **dict.fromkeys(("attn_norm", "ffn_norm"), (D_MODEL,)),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (D_MODEL, D_MODEL)),
    **dict.fromkeys(("ffn_gate", "ffn_up"), (D_FF, D_MODEL)),
    "ffn_down": (D_MODEL, D_FF),
}
directory = Path(sys.argv[1])
writer = gguf.GGUFWriter(directory / "tiny.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(D_MODEL)
writer.add_block_count(1)
writer.add_feed_forward_length(D_FF)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(1e4)
writer.add_vocab_size(TOKENS)
shapes = {f"blk.0.{name}": shape for name, shape in BLOCK.items()}
shapes |= {"token_embd": (TOKENS, D_MODEL), "output": (TOKENS, D_MODEL), "output_norm": (D_MODEL,)}
numbers = np.random.default_rng(0)
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", numbers.standard_normal(shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="tiny.gguf", dtype=torch.float32)
kinds = {parameter.dtype for parameter in model.parameters()}
print(*(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch")))
print("parameters:", *kinds)
assert kinds == {torch.float32}
try:
    model.save_pretrained(directory / "saved")
    outcome = "saved"
except ValueError as error:
    outcome = f"ValueError: {error}"
print("save_pretrained:", outcome)
sys.exit("not serializable" not in outcome)
PYTHON
"$work/venv/bin/python" "$work/show.py" "$work" 2> "$work/err" || { tail -3 "$work/err"; echo "it does not hold any more"; exit 1; }
echo "it holds"
