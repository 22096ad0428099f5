#!/usr/bin/env bash
# lm-eval's bbh_fewshot_* give a model that always answers rightly 0 or 1, by the way its tokenizer decodes a first space.
#
# Expected: 1, whatever the tokenizer. The prompts end in "A:", the shots in them go on with a space, so a right answer begins
# with one. These tasks compare the text that comes back with "False", and neither they nor lm-eval take a space away. With a
# byte-level tokenizer, such as those of GPT-2, Llama 3 and SmolLM2, the text is " False": 0. A Llama SentencePiece tokenizer
# drops one space from the front of whatever it decodes, so the same answer is "False": 1. One of the 27 tasks is run here;
# the files of all have this prompt and no filter. Not so everywhere in lm-eval: mmlu_*_generative and tydiqa_goldp_en, whose
# prompts end in the same way, strip the answer, and give 1 with both.
#
# Known in parts: the zeros in EleutherAI/lm-evaluation-harness pull request 2502, open when this was seen; the tokenizer as
# the cause, for bigbench_*_generate_until, in OpenEuroLLM/oellm-eval pull request 112.
#
# The tasks are lm-eval's own; their data are rows of the same form, made here. The models are made by hand: after each token
# they know the next one only, so after the prompt's colon they write the answer, a space before it, and the end.
#
# Seen with: lm-eval 0.4.13, transformers 5.24.0, tokenizers 0.23.3, sentencepiece 0.2.3, datasets 5.0.1, torch 2.13.0,
# Python 3.11. Fails with: STRIP=1, which adds a filter that strips to each task.
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
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["Q: not True is\nA: False", "Question: what sat?\nA. cat\nB. dog\nAnswer: A", "Answer: cat"] * 50
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
END = 2
MANAGER = TaskManager()
BBH = [{"input": f"not {'not not ' * n}True is", "target": "False"} for n in range(3)]
MMLU = [{"question": f"what sat {n}?", "choices": ["cat", "dog", "a", "b"], "answer": 0} for n in range(3)]
TYDIQA = [
    {"id": f"english-{n}", "title": "sat", "context": "the cat sat", "question": "what sat?"}
    | {"answers": {"text": ["cat"], "answer_start": [4]}}
    for n in range(3)
]
TASKS = {  # dataset, its config, its splits, rows, the end of a prompt, the answer to all rows
    "bbh_fewshot_boolean_expressions": ("SaylorTwift/bbh", "boolean_expressions", ["test"], BBH, "is\nA:", "False"),
    "mmlu_abstract_algebra_generative": ("cais/mmlu", "abstract_algebra", ["test", "dev"], MMLU, "b\nAnswer:", "A"),
    "tydiqa_goldp_en": (
        *("google-research-datasets/tydiqa", "secondary_task", ["train", "validation"]),
        *(TYDIQA, "sat?\n\nAnswer:", "cat"),
    ),
}
SEEN = {  # exact match and the text of an answer, by tokenizer and task, in their order
    "byte-level": [(0.0, " False"), (1.0, " A"), (1.0, " cat")],
    "Llama": [(1.0, "False"), (1.0, "A"), (1.0, "cat")],
}


def write_byte_level(directory):
    """Write a byte-level BPE: GPT-2's way with white space."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": list(SPECIAL.values()), "initial_alphabet": alphabet, "show_progress": False}
    words.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, **how))
    PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL).save_pretrained(directory)


def write_llama(directory):
    """Write a vocabulary with normalisation and white space as in Llama's tokenizer.model."""
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.replace("\n", " ") for text in TEXTS),
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
    (directory / "tokenizer_config.json").write_text(json.dumps(facts | SPECIAL))


def write_model(directory, prompt, answer):
    """Write a model that continues each id with the next one: its one layer adds nothing, its head is a table."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    before, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, f"{prompt} {answer}"))
    ids = whole[len(before) - 1 :] + [END]  # the prompt's last, the answer, the end
    assert whole[: len(before)] == before
    assert len(set(ids)) == len(ids)
    assert tokenizer.eos_token_id == END
    size = len(tokenizer) + len(tokenizer) % 2
    sizes = {"hidden_size": size, "intermediate_size": 2, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "head_dim": 2, "max_position_embeddings": 1024}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, bos_token_id=1, eos_token_id=END, **sizes, **heads))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(float("norm" in name))
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for now, following in pairwise(ids):
            model.lm_head.weight[following, now] = 1.0
    model.save_pretrained(directory)


def write_data(dataset, config, splits, rows):
    """Write rows where `datasets` looks before the hub: in a directory named as the dataset."""
    directory = Path(dataset)
    directory.mkdir(parents=True)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [{"split": split, "path": "rows.jsonl"} for split in splits]
    facts = {"configs": [{"config_name": config, "data_files": files}]}
    (directory / "README.md").write_text(f"---\n{json.dumps(facts)}\n---\n")


def scored(directory, task):
    """Return the exact match that lm-eval reports, and the text that came back for all rows."""
    what = task
    if os.environ.get("STRIP"):
        strip = {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        what = str(Path(f"{task}.yaml").resolve())
        Path(what).write_text(json.dumps({"include": str(MANAGER.task_index[task].yaml_path), "filter_list": [strip]}))
    how = {"model_args": {"pretrained": str(directory)}, "device": "cpu", "batch_size": 1}
    found = simple_evaluate(model="hf", tasks=[what], task_manager=MANAGER, **how)
    (score,) = (value for name, value in found["results"][task].items() if name.startswith("exact_match,"))
    (text,) = {sample["resps"][0][0] for sample in found["samples"][task]}
    return float(score), text


work = Path(sys.argv[1])
os.chdir(work)
for dataset, config, splits, rows, _, _ in TASKS.values():
    write_data(dataset, config, splits, rows)
print(*(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "tokenizers", "sentencepiece")))
changed = False
for number, (kind, write) in enumerate({"byte-level": write_byte_level, "Llama": write_llama}.items()):
    directory = work / f"model{number}"
    directory.mkdir()
    write(directory)
    found = []
    for task, (*_, prompt, answer) in TASKS.items():
        write_model(directory, prompt, answer)
        found.append(scored(directory, task))
        print(f"{kind:10} {task:33} {found[-1][1]!r:8} scores {found[-1][0]}")
    if found != SEEN[kind]:
        changed = True
        print(f"  changed; seen before: {SEEN[kind]}")
sys.exit(changed)
PYTHON
export HF_HOME="$work/home" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
"$work/venv/bin/python" "$work/show.py" "$work" 2> "$work/err" || { tail -3 "$work/err"; echo "it does not hold any more"; exit 1; }
echo "it holds"
