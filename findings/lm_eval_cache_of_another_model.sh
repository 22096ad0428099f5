#!/usr/bin/env bash
# With lm-eval's --use_cache another model gets the scores of the one before, under its own name, and is not run at all.
#
# Expected: answers of (model, task) pairs, as lm-eval's own page says of the option. Kept are answers of requests: the key is the
# kind and the text of a request, and nothing of the model, its weights, element type or adapter. Who compares a model with its
# quantised or sparse self, with one cache to save time, finds no loss whatever was done to it. The maintainers know of it:
# EleutherAI/lm-evaluation-harness issues 2715 and 4063, open when this was seen.
#
# Seen with: lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0, Python 3.11. Fails with: CACHES=2, a cache for each model.
set -euo pipefail
TRANSFORMERS=${TRANSFORMERS:-5.24.0} LM_EVAL=0.4.13 TORCH=2.13.0 TOKENIZERS=0.23.3 DATASETS=5.0.1
export CACHES=${CACHES:-1}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "lm-eval[hf]==$LM_EVAL" "transformers==$TRANSFORMERS" \
    "torch==$TORCH" "tokenizers==$TOKENIZERS" "datasets==$DATASETS"

cat > "$work/make.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", "the", "cat", "dog", "sat", "ran"]
directory = Path(sys.argv[1])
words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
for seed, name in enumerate(("first", "second")):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(WORDS), initializer_range=1.0, bos_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory / name)
    tokenizer.save_pretrained(directory / name)
(directory / "tasks").mkdir()
questions = [{"text": f"the {who}", "right": number % 2} for number, who in enumerate(WORDS[3:])]
data = directory / "tasks" / "questions.jsonl"
data.write_text("".join(json.dumps(question) + "\n" for question in questions))
task = {
    "task": "what_next",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_target": "right",
    "doc_to_choice": ["sat", "ran"],
}
(directory / "tasks" / "what_next.yaml").write_text(json.dumps(task))
PYTHON
cat > "$work/show.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

directory = Path(sys.argv[1])


def answers(run):
    """Return the log-likelihoods that a run reports, and the model that it names."""
    (samples,) = directory.glob(f"{run}/**/samples_*.jsonl")
    (results,) = directory.glob(f"{run}/**/results_*.json")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    found = [(line["doc_id"], line["filtered_resps"]) for line in lines]
    return sorted(found), json.loads(results.read_text())["config"]["model_args"]["pretrained"]


first, alone, cached = (answers(run) for run in ("run-first", "run-second-alone", "run-second"))
print(*(f"{name} {version(name)}" for name in ("lm_eval", "transformers")))
for title, (found, model) in {"first": first, "second": cached, "second, no cache": alone}.items():
    print(f"{title:16} reported as {Path(model).name}: {found[0][1]}")
assert Path(cached[1]).name == Path(alone[1]).name == "second"
assert alone[0] != first[0], "the models do not differ"
sys.exit(cached[0] != first[0])
PYTHON
export HF_HOME="$work/home" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
evaluate() { # MODEL RUN [OPTION...]
    "$work/venv/bin/lm_eval" run --model hf --model_args "pretrained=$work/$1" --tasks what_next --include_path "$work/tasks" \
        --device cpu --batch_size 1 --log_samples --output_path "$work/$2" "${@:3}" >> "$work/log" 2>&1
}
"$work/venv/bin/python" "$work/make.py" "$work" > "$work/log" 2>&1 \
    && evaluate first run-first --use_cache "$work/cache" \
    && evaluate second run-second --use_cache "$work/cache$([ "$CACHES" = 1 ] || echo 2)" \
    && evaluate second run-second-alone \
    || { tail -5 "$work/log"; echo "could not be tried"; exit 1; }
"$work/venv/bin/python" "$work/show.py" "$work" 2> "$work/err" || { tail -3 "$work/err"; echo "it does not hold any more"; exit 1; }
echo "it holds"
