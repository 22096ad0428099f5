#!/usr/bin/env bash
# With one Llama vocabulary lm-eval's `hf` model puts none, one or two BOS before a text, by the kind of request and by the
# files beside the tokenizer.model; none of its settings gives one BOS to all kinds.
#
# Expected: one BOS, always. Llama was trained with it, and both libraries know the vocabulary to be one that has it. But
# lm-eval leaves it to the tokenizer before a context and a prompt to generate from, and puts it itself before texts without
# a context and rolling ones, without looking whether the tokenizer has. transformers 5 in turn takes its own default from
# the files: without a tokenizer_config.json, or with one that is silent about `add_bos_token`, a Llama tokenizer adds none.
# So rolling perplexities are right where accuracies are not, and the other way round.
#
# Seen with: lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0, Python 3.11.
# Fails with: transformers 4.57.6, where every directory gets one BOS, and two in rolling requests.
set -euo pipefail
TRANSFORMERS=${TRANSFORMERS:-5.24.0} LM_EVAL=0.4.13 TORCH=2.13.0 SENTENCEPIECE=0.2.3 PROTOBUF=7.36.2 DATASETS=5.0.1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "lm-eval[hf]==$LM_EVAL" "transformers==$TRANSFORMERS" \
    "torch==$TORCH" "sentencepiece==$SENTENCEPIECE" "protobuf==$PROTOBUF" "datasets==$DATASETS"

cat > "$work/show.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 1
GENERATION = {"until": ["x"], "max_gen_toks": 1, "do_sample": False}
REQUESTS = {
    "context and continuation": ("loglikelihood", ("the", " cat")),
    "continuation alone": ("loglikelihood", ("", "the cat")),
    "generate": ("generate_until", ("the", GENERATION)),
    "rolling": ("loglikelihood_rolling", ("the cat the dog",)),
}
FACTS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LAYOUTS = {
    "tokenizer.model alone": None,
    "a silent tokenizer_config.json": FACTS,
    "Llama 2's tokenizer_config.json": FACTS | {"add_bos_token": True, "add_eos_token": False},
}
NONE, TWO = [0, 1, 0, 1], [1, 1, 1, 2]  # BOS by request, in their order
SEEN = {  # by the model's argument add_bos_token: not given, true, false
    "tokenizer.model alone": [NONE, TWO, NONE],
    "a silent tokenizer_config.json": [NONE, TWO, NONE],
    "Llama 2's tokenizer_config.json": [TWO, TWO, NONE],
}


def write(directory, facts):
    """Write a random model, and a vocabulary with normalisation and white space as in Llama's tokenizer.model."""
    directory.mkdir()
    with (directory / "tokenizer.model").open("wb") as file:
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
    own = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert own.bos_id() == BOS
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=own.vocab_size(), bos_token_id=BOS, eos_token_id=2, **sizes))
    model.save_pretrained(directory)
    if facts is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(facts))


def counted(directory, **arguments):
    """Return the BOS of the ids that reach the model, for each kind of request."""
    lm = HFLM(pretrained=str(directory), device="cpu", batch_size=1, **arguments)
    read = []
    lm.model.register_forward_pre_hook(
        lambda _, given, named: read.append(named["input_ids"] if "input_ids" in named else given[0]), with_kwargs=True
    )
    counts = []
    for kind, what in REQUESTS.values():
        read.clear()
        getattr(lm, kind)([Instance(kind, {}, what, 0)])
        counts.append(read[0][0].tolist().count(BOS))
    return counts


print(*(f"{name} {version(name)}" for name in ("lm_eval", "transformers")))
print("BOS before:", "; ".join(REQUESTS))
changed = False
for number, (name, facts) in enumerate(LAYOUTS.items()):
    directory = Path(sys.argv[1], f"model{number}")
    write(directory, facts)
    found = [counted(directory), *(counted(directory, add_bos_token=given) for given in (True, False))]
    print(f"{name:32} {found[0]}; add_bos_token=True {found[1]}, =False {found[2]}")
    if found != SEEN[name]:
        changed = True
        print(f"  changed; seen before: {SEEN[name]}")
sys.exit(changed)
PYTHON
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/show.py" "$work" 2> "$work/err" || { tail -3 "$work/err"; echo "it does not hold any more"; exit 1; }
echo "it holds"
