"""A small OPT, trained sparse on text of one's own: another family for `benchmarks/recipes.py`.

OPT differs from the gated LLaMA of most measurements in all that matters to a predictor: its FFN
has no gate, biases shift every neuron, and inputs come from a LayerNorm. Prints one JSON line.

    python benchmarks/opt_model.py --text FILE.jsonl --out DIR
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import tokenizers
import torch
from tqdm import tqdm

from benchmarks.shared import print_line
from common.documents import read_documents
from common.machine import bfloat16_note

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

BOS = 2
POSITIONS = 2048
"""All that PowerInfer's OPT can have."""

VOCAB, D_MODEL, D_FF, LAYERS = 4096, 384, 1536, 4
BATCH, CONTEXT, PEAK_RATE, WARMUP, DECAY = 8, 256, 2e-3, 0.05, 0.1


@click.command()
@click.option("--text", required=True, help="Documents to train on, .jsonl or .txt.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--steps", default=1100, show_default=True)
@click.option("--l1", default=0.2, show_default=True, help="Weight of FFN activations' mean.")
@click.option("--seed", default=0, show_default=True)
def main(text: str, out: Path, steps: int, l1: float, seed: int) -> None:
    """Train a tokenizer and a model."""
    documents = list(read_documents(text))
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(documents)
    model = build_model(tokenizer.get_vocab_size())
    encoded = tokenizer.encode_batch(documents)
    ids = torch.tensor([token for document in encoded for token in [BOS, *document.ids]])
    start = time.perf_counter()
    last = train(model, ids, steps, l1)
    model.half().save_pretrained(out)
    write_tokenizer(tokenizer, out)
    print_line(
        {
            "tokens": len(ids),
            "seen": steps * BATCH * CONTEXT,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            **last,
            "seconds": time.perf_counter() - start,
            "threads": torch.get_num_threads(),
        }
    )


def train_tokenizer(documents: list[str]) -> tokenizers.Tokenizer:
    """Return a byte-level BPE with OPT's special tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return bpe


def write_tokenizer(tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """Write `vocab.json` and `merges.txt`, the files that OPT has."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (out / "vocab.json").write_text(json.dumps(model["vocab"]))
    (out / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    settings = {"add_bos_token": True, "bos_token": "</s>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


def build_model(vocab: int) -> OPTForCausalLM:
    """Return a random OPT with ReLU and norms before attention and FFN."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=vocab,
        hidden_size=D_MODEL,
        ffn_dim=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=D_MODEL // 64,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=D_MODEL,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=1,
    )
    return OPTForCausalLM(config)


def train(model: OPTForCausalLM, ids: torch.Tensor, steps: int, l1: float) -> dict[str, float]:
    """Train in place; return the last hundred steps' mean loss and share of active neurons."""
    activations: list[torch.Tensor] = []
    for layer in model.model.decoder.layers:
        layer.activation_fn.register_forward_hook(
            lambda module, args, output: activations.append(output)
        )
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
    )
    history: list[tuple[float, float]] = []
    # Without instructions for it a product in bfloat16 takes many times as long.
    fast = bfloat16_note("cpu") is None
    for step, window in enumerate(tqdm(windows(ids, steps), total=steps)):
        progress = step / steps
        risen = min(1.0, progress / WARMUP)
        fallen = 0.55 + 0.45 * math.cos(math.pi * progress)
        optimiser.param_groups[0]["lr"] = PEAK_RATE * risen * fallen
        activations.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss: Any = model(input_ids=window, labels=window).loss
        sparse = torch.stack([values.float().mean() for values in activations]).mean()
        (loss + l1 * min(1.0, 2 * progress) * sparse).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        active = torch.stack([(values > 0).float().mean() for values in activations]).mean()
        history.append((float(loss), float(active)))
    losses, shares = zip(*history[-100:], strict=True)
    return {"loss": sum(losses) / len(losses), "density": sum(shares) / len(shares)}


def windows(ids: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield random windows that start with BOS, (BATCH, CONTEXT) int64."""
    for _ in range(steps):
        firsts = torch.randint(len(ids) - CONTEXT, (BATCH,))
        window = torch.stack([ids[first : first + CONTEXT] for first in firsts.tolist()])
        window[:, 0] = BOS
        yield window


if __name__ == "__main__":
    main()
