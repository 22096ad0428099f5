"""A small ReGLU LLaMA, trained sparse from scratch, deterministic by seed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece
import torch

from common.files import write_bytes
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from prosparse.training import sparsify
from quickstart.corpus import Corpus, texts_of
from quickstart.settings import Size

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_WARMUP_SHARE = 0.1
_RISE = 0.6
_SAVE_EVERY = 100


def train_tokenizer(corpus: Corpus, path: Path, vocab_size: int) -> None:
    """Write a SentencePiece BPE `tokenizer.model` with byte fallback, as LLaMA's is."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            line for text in texts_of(corpus) for line in text.splitlines() if line.strip()
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
