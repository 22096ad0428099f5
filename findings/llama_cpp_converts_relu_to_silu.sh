#!/usr/bin/env bash
# llama.cpp's own converter makes a SiLU model of a ReLU LLaMA, without a word, and llama.cpp runs it.
#
# Expected: the converter refuses a `hidden_act` that the graph does not have, as it does for Granite and
# Falcon-H1, or writes it down, as it does for ModernBERT. For LlamaForCausalLM it does neither: the file says
# nothing of the activation, and llama.cpp's logits are to four digits those of the same weights with SiLU.
# Who converts a ProSparse, TurboSparse or otherwise ReLU-fied LLaMA gets fluent nonsense and no warning.
#
# Seen with: llama-cpp-python 0.3.36 (its source holds llama.cpp 0c1e570 and the converter), transformers
# 5.24.0, torch 2.13.0, sentencepiece 0.2.3, Python 3.11. Builds llama.cpp, which takes some minutes.
# Fails with: ACT=silu, where both are the same model.
set -euo pipefail
LLAMA_CPP=0.3.36 TRANSFORMERS=5.24.0 TORCH=2.13.0 SENTENCEPIECE=0.2.3 ACT=${ACT:-relu}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" download --no-deps --no-binary :all: -d "$work" "llama-cpp-python==$LLAMA_CPP"
"${pip[@]}" install "transformers==$TRANSFORMERS" "torch==$TORCH" "sentencepiece==$SENTENCEPIECE" protobuf pyyaml requests
"${pip[@]}" install "$work"/llama_cpp_python-*.tar.gz
tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
source=$(echo "$work"/llama_cpp_python-*/vendor/llama.cpp)

cat > "$work/make.py" <<'PYTHON'
import sys
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

directory, activation = Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, hidden_act=activation, initializer_range=0.2,
)
LlamaForCausalLM(config).save_pretrained(directory)
text = directory / "text.txt"
text.write_text("".join(f"line {n} of a text that trains a tokenizer\n" for n in range(200)))
sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(directory / "tokenizer"), model_type="bpe", vocab_size=300,
    byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
)
PYTHON
mkdir "$work/model"
"$work/venv/bin/python" "$work/make.py" "$work/model" "$ACT" 2>/dev/null
"$work/venv/bin/python" "$source/convert_hf_to_gguf.py" "$work/model" --outtype f32 --outfile "$work/model.gguf" \
    > "$work/converted.txt" 2>&1

cat > "$work/show.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from transformers import LlamaForCausalLM

work = Path(sys.argv[1])
said = (work / "converted.txt").read_text().lower()
ids = [1, 40, 270, 280, 33, 290, 262, 275]
llama = llama_cpp.Llama(str(work / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
llama.eval(ids)
theirs = torch.tensor(np.array(llama.scores[: len(ids)])).double().log_softmax(-1)
apart = {}
for activation in ("relu", "silu"):
    model = LlamaForCausalLM.from_pretrained(work / "model", hidden_act=activation)
    ours = model(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
    apart[activation] = float((ours - theirs).abs().max())
own = LlamaForCausalLM.from_pretrained(work / "model").config.hidden_act
print(f"llama-cpp-python {version('llama-cpp-python')}, transformers {version('transformers')}")
print(f"config.json says {own}; the converter mentions it: {'relu' in said or 'hidden_act' in said}")
for activation, value in apart.items():
    print(f"llama.cpp against transformers with {activation}: log-probabilities up to {value:.4f} nats apart")
holds = own == "relu" and "relu" not in said and apart["silu"] < 0.05 and apart["relu"] > 0.5
print("holds" if holds else "does not hold any more")
sys.exit(not holds)
PYTHON
"$work/venv/bin/python" "$work/show.py" "$work" 2>/dev/null
