#!/usr/bin/env bash
# A text that begins with spaces gets other tokens from transformers' LlamaTokenizer than from the
# tokenizer.model that it reads: one space less.
#
# Expected: the ids of sentencepiece, with which Llama was trained. Its tokenizer.model asks for a
# space in front of every text (add_dummy_prefix), so " the" begins with two. LlamaTokenizer puts it
# only before texts that do not begin with a space: "the" and " the" become the same ids, and the
# space is lost. It matters where texts are cut before they are tokenized, and where ids are compared
# with an engine's that follows the model file.
#
# Seen with: transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3, Python 3.11.
# Fails with: transformers 4.57.1, whose LlamaTokenizer gives sentencepiece's ids.
set -euo pipefail
TRANSFORMERS=5.23.0 TOKENIZERS=0.23.3 SENTENCEPIECE=0.2.3 PROTOBUF=7.36.2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "transformers==$TRANSFORMERS" "tokenizers==$TOKENIZERS" "sentencepiece==$SENTENCEPIECE" "protobuf==$PROTOBUF"

cat > "$work/show.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer

SEEN = {  # text: pieces of sentencepiece, pieces of LlamaTokenizer
    "the": (["▁the"], ["▁the"]),
    " the": (["▁", "▁the"], ["▁the"]),
    "  the": (["▁▁", "▁the"], ["▁", "▁the"]),
    "a  the": (["▁a", "▁", "▁the"], ["▁a", "▁", "▁the"]),
}

model = Path(sys.argv[1], "tokenizer.model")
with model.open("wb") as file:
    # Normalisation and white space as in Llama's tokenizer.model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat  the dog  the end a the"] * 50),
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
own = sentencepiece.SentencePieceProcessor(model_file=str(model))
theirs = LlamaTokenizer.from_pretrained(model.parent)
print(*(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "sentencepiece")))
changed = False
for text, seen in SEEN.items():
    ids = own.encode(text), theirs.encode(text, add_special_tokens=False)
    found = own.id_to_piece(ids[0]), theirs.convert_ids_to_tokens(ids[1])
    print(f"{text!r:9} sentencepiece {found[0]}, LlamaTokenizer {found[1]}")
    if found != seen:
        changed = True
        print(f"{'':9} changed; seen before: {seen[0]}, {seen[1]}")
print("no longer holds" if changed else "holds: a leading space is lost")
sys.exit(changed)
PYTHON
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/show.py" "$work"
