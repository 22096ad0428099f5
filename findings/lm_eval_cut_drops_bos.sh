#!/usr/bin/env bash
# A prompt that is longer than the model's context loses its BOS in lm-eval; the tokenizer, told to cut at the left, keeps it.
#
# Expected: BOS stays whatever is cut, as in transformers, whose truncation makes room for special tokens first: what falls
# away is the oldest text. lm-eval encodes, BOS included, and then keeps the last ids, so BOS is the first to go. Of a few-shot
# task whose prompts are about as long as the context, the longer ones are then read without BOS and the shorter ones with it.
# The warnings speak of lost content only.
#
# Seen with: lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0, Python 3.11. Holds with transformers 4.57.6 too.
# Fails with: BLOCKS=5, whose prompt fits.
set -euo pipefail
TRANSFORMERS=${TRANSFORMERS:-5.24.0} LM_EVAL=0.4.13 TORCH=2.13.0 SENTENCEPIECE=0.2.3 PROTOBUF=7.36.2 DATASETS=5.0.1
export BLOCKS=${BLOCKS:-60}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "lm-eval[hf]==$LM_EVAL" "transformers==$TRANSFORMERS" \
    "torch==$TORCH" "sentencepiece==$SENTENCEPIECE" "protobuf==$PROTOBUF" "datasets==$DATASETS"

cat > "$work/show.py" <<'PYTHON'
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

BOS, CONTEXT, NEW = 1, 64, 8
PROMPT = "the cat the dog " * int(os.environ["BLOCKS"]) + "the"
directory = Path(sys.argv[1])
with (directory / "tokenizer.model").open("wb") as file:
    # Normalisation and white space as in Llama's tokenizer.model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat the dog the end a the"] * 50),
        model_writer=file,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
facts = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
(directory / "tokenizer_config.json").write_text(json.dumps(facts | {"unk_token": "<unk>"}))
size = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size()
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
ends = {"max_position_embeddings": CONTEXT, "bos_token_id": BOS, "eos_token_id": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=size, **ends, **sizes)).save_pretrained(directory)

lm = HFLM(pretrained=str(directory), device="cpu", batch_size=1)
read = []
lm.model.register_forward_pre_hook(
    lambda _, given, named: read.append(named["input_ids"] if "input_ids" in named else given[0]), with_kwargs=True
)


def first_ids(kind, *what):
    """Return what the model reads of a request."""
    read.clear()
    getattr(lm, kind)([Instance(kind, {}, what, 0)])
    return read[0][0].tolist()


how = {"until": ["x"], "max_gen_toks": NEW, "do_sample": False}
found = {
    "generate_until": first_ids("generate_until", PROMPT, how),
    "loglikelihood": first_ids("loglikelihood", PROMPT, " cat"),
}
lm.tokenizer.truncation_side = "left"
own = lm.tokenizer(PROMPT, truncation=True, max_length=CONTEXT - NEW)["input_ids"]
print(*(f"{name} {version(name)}" for name in ("lm_eval", "transformers")), f"context {CONTEXT}")
for name, ids in (found | {"the tokenizer itself, cut at the left": own}).items():
    print(f"{name}: {len(ids)} ids, {'BOS and' if ids[0] == BOS else 'no BOS,'} {ids[-2:]} at the end")
sys.exit(own[0] != BOS or any(BOS in ids for ids in found.values()))
PYTHON
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/show.py" "$work" 2> "$work/err" || { tail -3 "$work/err"; echo "it does not hold any more"; exit 1; }
echo "it holds"
