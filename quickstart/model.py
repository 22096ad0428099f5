"""A corpus that every machine has, and a small ReGLU LLaMA trained sparse on it, by seed."""

from __future__ import annotations

import io
import json
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece
import torch

from architectures.old_keys import with_old_keys
from common.errors import DataError, OutputError
from common.files import read_json, write_bytes, write_json
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from prosparse.training import sparsify
from quickstart.settings import Size

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_SMALLEST, _LARGEST = 2_000, 100_000
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}
_WARMUP_SHARE = 0.1
_RISE = 0.6
_SAVE_EVERY = 100


@dataclass(frozen=True)
class Corpus:
    """Text split by document.

    Attributes:
        directory: of both splits.
    """

    directory: Path

    @property
    def train(self) -> Path:
        """JSON lines with `text`, for training and traces."""
        return self.directory / "train.jsonl"

    @property
    def valid(self) -> Path:
        """Plain text of documents that are in no other split, for perplexity."""
        return self.directory / "valid.txt"


def library_files() -> list[Path]:
    """Return the library's source files in a fixed order, tests and installed packages excepted.

    Raises:
        DataError: this Python ships no source.
    """
    root, sources = Path(sysconfig.get_paths()["stdlib"]), list[Path]()
    for directory, inner, names in os.walk(root):
        inner[:] = set(inner) - _SKIPPED  # of installed packages there may be 100,000 files
        sources += (Path(directory, name) for name in names if name.endswith(".py"))
    files = [path for path in sorted(sources) if _SMALLEST <= path.stat().st_size <= _LARGEST]
    if len(files) < 50:
        raise DataError(
            f"{root}: only {len(files)} source files", "install Python with its library"
        )
    return files


def write_corpus(directory: Path, *, characters: int, seed: int) -> Corpus:
    """Write a corpus of about `characters` characters, a tenth of it for validation.

    Args:
        directory: receives both splits.
        characters: size of both splits together.
        seed: chooses the documents and the split.
    """
    files = library_files()
    order = np.random.default_rng(seed).permutation(len(files))
    valid: list[str] = []
    train: list[str] = []
    for number in order:
        text = files[number].read_text(encoding="utf-8", errors="replace")
        split = valid if sum(map(len, valid)) < characters // 10 else train
        split.append(text)
        if sum(map(len, train)) >= characters - characters // 10:
            break
    corpus = Corpus(directory)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in train)
    write_bytes(corpus.train, "".join(lines).encode())
    write_bytes(corpus.valid, "\n".join(valid).encode())
    return corpus


def train_tokenizer(corpus: Corpus, path: Path, vocab_size: int) -> None:
    """Write a SentencePiece BPE `tokenizer.model` with byte fallback, as LLaMA's is."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            line
            for document in corpus.train.read_text(encoding="utf-8").splitlines()
            for line in json.loads(document)["text"].splitlines()
            if line.strip()
        ),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    write_bytes(path, buffer.getvalue())


def build_model(size: Size, activation: str = "relu") -> LlamaForCausalLM:
    """Return a randomly initialised gated LLaMA, by default a ReGLU one."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.disable_progress_bar()

    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_kv_heads,
        max_position_embeddings=2 * size.context,
        hidden_act=activation,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def write_untrained(corpus: Corpus, directory: Path, size: Size, seed: int) -> None:
    """Write the random model and its tokenizer as a Hugging Face directory, config.json last."""
    torch.manual_seed(seed)
    model = build_model(size).half()
    train_tokenizer(corpus, directory / "tokenizer.model", size.vocab_size)
    model.save_pretrained(directory)
    config = read_json(directory / "config.json", OutputError, "start again")
    write_json(directory / "config.json", with_old_keys(config))


def train_model(corpus: Corpus, untrained: Path, out: Path, size: Size, seed: int) -> None:
    """Train the model sparse from the start, an ordinary Hugging Face directory (float16).

    λ rises along a half-sine from zero, as in ProSparse's stages (arXiv 2402.13516 §3.2), so that
    the model can follow. An interrupted training goes on.
    """
    risen = round(_RISE * size.steps)
    sparsify(
        SparsifyConfig(
            model=str(untrained),
            data=str(corpus.train),
            eval_data=str(corpus.valid),
            out=out,
            schedule=Schedule.of(("progressive", size.l1, risen), ("decay", size.l1, size.steps)),
            context=size.context,
            batch=size.batch,
            learning_rate=size.learning_rate,
            warmup=_WARMUP_SHARE,
            save_every=_SAVE_EVERY,
            eval_every=size.steps,
            device="cpu",
            seed=seed,
            resume=True,
        )
    )
