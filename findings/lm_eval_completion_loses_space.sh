#!/usr/bin/env bash
# A body that a Llama model writes with four spaces comes out of lm-eval with three, so a right program is a wrong one.
#
# Expected: lm-eval's generate_until gives the text that the model wrote, so that prompt + text is what model and prompt make
# together. It decodes the new tokens alone, and a Llama tokenizer takes one space from the front of whatever it decodes, the
# counterpart of the one that it puts before a text. Tasks of the kind of HumanEval join prompt and text and run them: here
# they end in an IndentationError although every token is right. A completion that begins with a word loses its blank too.
#
# The model is made by hand: after each token of the body it knows the next one only, so it writes exactly `    return 1`.
#
# Seen with: lm-eval 0.4.13, transformers 5.24.0, tokenizers 0.23.3, sentencepiece 0.2.3, torch 2.13.0, Python 3.11.
# Holds with transformers 4.57.6 too. Fails with: KEEP_SPACE=1, which takes that rule out of the tokenizer, the cause.
set -euo pipefail
TRANSFORMERS=${TRANSFORMERS:-5.24.0} LM_EVAL=0.4.13 TORCH=2.13.0 SENTENCEPIECE=0.2.3 PROTOBUF=7.36.2 DATASETS=5.0.1

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
from itertools import pairwise
from pathlib import Path

import sentencepiece
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT, BODY = 'def one():\n    """Return 1."""\n', "    return 1"
END = 2


def write_tokenizer(directory):
    """Write a vocabulary with normalisation and white space as in Llama's tokenizer.model."""
    with Path(directory, "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["def one():    return 1    Return 1."] * 50),
            model_writer=file,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    facts = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    facts |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    Path(directory, "tokenizer_config.json").write_text(json.dumps(facts))
    return sentencepiece.SentencePieceProcessor(model_file=str(Path(directory, "tokenizer.model")))


def write_model(directory, n_tokens, ids):
    """Write a model that continues each id with the next one: its one layer adds nothing, its head is a table."""
    size = n_tokens + n_tokens % 2
    sizes = {"hidden_size": size, "intermediate_size": 2, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "head_dim": 2, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, bos_token_id=1, eos_token_id=END, **sizes, **heads))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(float("norm" in name))
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for now, following in pairwise(ids):
            model.lm_head.weight[following, now] = 1.0
    model.save_pretrained(directory)


def outcome(program):
    try:
        compile(program, "program", "exec")
    except IndentationError as error:
        return f"IndentationError: {error.msg}"
    return "compiles"


directory = sys.argv[1]
vocabulary = write_tokenizer(directory)
prompt, whole = vocabulary.encode(PROMPT), vocabulary.encode(PROMPT + BODY)
ids = whole[len(prompt) - 1 :] + [END]  # the prompt's last, the body, the end
assert whole[: len(prompt)] == prompt
assert len(set(ids)) == len(ids)
write_model(directory, vocabulary.vocab_size(), ids)
lm = HFLM(pretrained=directory, device="cpu", batch_size=1)
if os.environ.get("KEEP_SPACE"):
    rules = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    rules["decoder"]["decoders"] = [each for each in rules["decoder"]["decoders"] if each["type"] != "Strip"]
    lm.tokenizer.backend_tokenizer.decoder = type(lm.tokenizer.backend_tokenizer).from_str(json.dumps(rules)).decoder
new = []
generate = lm.model.generate
lm.model.generate = lambda *args, **more: new.append(generate(*args, **more)) or new[-1]
how = {"until": ["\ndef"], "max_gen_toks": 16, "do_sample": False}
(text,) = lm.generate_until([Instance("generate_until", {}, (PROMPT, how), 0)])
written = new[0][0].tolist()
print(*(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "sentencepiece")))
print("written:   ", *(repr(vocabulary.id_to_piece(token)) for token in ids[1:]))
assert written[-len(ids) + 1 :] == ids[1:], "the model wrote something else"
together = lm.tokenizer.decode(written, skip_special_tokens=True)
print("all tokens:", repr(together), "→", outcome(together))
print("lm-eval:   ", repr(text), "→", outcome(PROMPT + text))
kept = (together, outcome(together), text) == (PROMPT + BODY, "compiles", BODY[1:])
sys.exit(not (kept and outcome(PROMPT + text).startswith("IndentationError")))
PYTHON
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/show.py" "$work" 2> "$work/err" || { tail -3 "$work/err"; echo "it does not hold any more"; exit 1; }
echo "it holds"
