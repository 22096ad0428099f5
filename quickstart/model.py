"""Training of a small ReGLU LLaMA from scratch, sparse by an L1 term, deterministic by seed."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece
import torch
from torch import nn
from tqdm import tqdm

from architectures.tokenizer import load_tokenizer
from common.errors import DataError
from common.files import write_bytes
from quickstart.corpus import Corpus, texts_of
from quickstart.sizes import Size

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_WARMUP_SHARE = 0.1


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


class _L1Term:
    """Sums the mean magnitude of every FFN's intermediate output during a forward pass."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.terms: list[torch.Tensor] = []
        self.active: list[torch.Tensor] = []
        for block in model.model.layers:
            block.mlp.down_proj.register_forward_pre_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.terms.append(args[0].abs().mean())
        self.active.append((args[0] != 0).float().mean().detach())

    def take(self) -> tuple[torch.Tensor, float]:
        """Return the mean over layers and the share of active neurons since the last call."""
        term = torch.stack(self.terms).mean()
        share = float(torch.stack(self.active).mean())
        self.terms, self.active = [], []
        return term, share


def build_model(size: Size) -> LlamaForCausalLM:
    """Return a randomly initialised ReGLU LLaMA."""
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
        hidden_act="relu",
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def train_model(corpus: Corpus, directory: Path, size: Size, seed: int) -> None:
    """Train and save an ordinary Hugging Face directory (float16 safetensors).

    The loss is the next-token loss plus `l1(step)` times the mean magnitude of the FFN's sparse
    intermediate output, whose weight rises along a half-sine from zero, as in ProSparse's stages
    (arXiv 2402.13516 §3.2), so that the model can follow.
    """
    torch.manual_seed(seed)
    train_tokenizer(corpus, directory / "tokenizer.model", size.vocab_size)
    batches = _batches(corpus, directory, size, seed)
    model = build_model(size)
    penalty = _L1Term(model)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    with tqdm(total=size.steps, unit="step", desc="train model", disable=None) as bar:
        for step in range(size.steps):
            optimiser.param_groups[0]["lr"] = size.learning_rate * _rate(step / size.steps)
            tokens = next(batches)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            term, share = penalty.take()
            (loss + size.l1 * _ramp(step / size.steps) * term).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{loss.item():.3f}", sparsity=f"{1 - share:.1%}")
            bar.update()
    model.half().save_pretrained(directory)


def _rate(progress: float) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if progress < _WARMUP_SHARE:
        return progress / _WARMUP_SHARE
    cosine = math.cos(math.pi * (progress - _WARMUP_SHARE) / (1 - _WARMUP_SHARE))
    return 0.1 + 0.45 * (1 + cosine)


def _ramp(progress: float) -> float:
    """Half-sine from 0 to 1 over the first 60 %, then constant."""
    return 0.5 * (1 - math.cos(math.pi * min(progress / 0.6, 1.0)))


def _batches(corpus: Corpus, directory: Path, size: Size, seed: int) -> Iterator[torch.Tensor]:
    tokenizer = load_tokenizer(directory, size.vocab_size)
    bos = tokenizer.bos_id()
    length = size.context - 1
    windows: list[list[int]] = []
    for text in texts_of(corpus):
        tokens = tokenizer.encode(text)
        windows += [
            [bos, *tokens[at : at + length]] for at in range(0, len(tokens) - length, length)
        ]
    if len(windows) < size.batch:
        raise DataError(f"{corpus.train}: gives {len(windows)} windows, need {size.batch}")
    generator = torch.Generator().manual_seed(seed)
    data = torch.tensor(windows)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for index in torch.split(order, size.batch):
            if len(index) == size.batch:
                yield data[index]
