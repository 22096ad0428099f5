"""Sparsification of a 135M model in bfloat16: speed and memory, against bare training."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.commands import psp
from benchmarks.gpu.kit import Figure, Kit, Step
from benchmarks.gpu.training import wait
from benchmarks.shared import reglu_settings

_SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's."""

_DRY_SIZES = _SIZES | {"num_hidden_layers": 2, "vocab_size": 8192}
_STEPS, _WARM = 40, 10
_CONTEXT, _BATCH = 1024, 8


def speed(kit: Kit) -> Iterator[Figure]:
    """The command's steps, from one to the next; then the same model in a loop without psp."""
    steps, warm = (4, 1) if kit.dry else (_STEPS, _WARM)
    context, batch = (64, 2) if kit.dry else (_CONTEXT, _BATCH)
    model, out = _made(kit), kit.work / "sparsified"
    schedule = kit.work / "speed.yaml"
    schedule.write_text(
        f"stages:\n- {{kind: substitution, lambda: 0, until_step: {warm}}}\n"
        f"- {{kind: progressive, lambda: 1.0e-3, until_step: {steps}}}\n"
    )
    shutil.rmtree(out, ignore_errors=True)
    _forget_peak(kit)
    with _Stamps() as stamps:
        psp(
            *("sparsify", "--model", model, "--data", kit.data, "--out", out),
            *("--schedule", schedule, "--context", context, "--batch", batch),
            *("--precision", "bfloat16", "--log-every", warm, "--eval-windows", 2),
            *("--eval-every", 10 * steps, "--device", "cpu" if kit.dry else "auto"),
        )
    timed = steps - 1 - warm
    ours = timed * batch * context / (stamps.at[steps - 1] - stamps.at[warm])
    details = {"steps": timed, "batch": batch, "context": context}
    yield Figure(name="sparsify, 135M, bfloat16", value=ours, unit="tokens/s", details=details)
    if kit.device == "cuda":
        yield Figure(
            name="sparsify, peak of the card's memory",
            value=torch.cuda.max_memory_allocated(),
            unit="bytes",
        )
    _forget_peak(kit)
    bare = _bare(kit, model, steps, warm, context, batch)
    yield Figure(name="bare training, 135M, bfloat16", value=bare, unit="tokens/s")
    if kit.device == "cuda":
        yield Figure(
            name="bare training, peak of the card's memory",
            value=torch.cuda.max_memory_allocated(),
            unit="bytes",
        )
    yield Figure(name="sparsify's speed over bare training's", value=ours / bare, unit="×")


def _made(kit: Kit) -> Path:
    """Return a random ReGLU LLaMA of SmolLM2-135M's sizes."""
    from transformers import LlamaForCausalLM

    path = kit.work / "reglu-135m"
    if not path.exists():
        torch.manual_seed(0)
        settings = reglu_settings(**(_DRY_SIZES if kit.dry else _SIZES), dtype=torch.bfloat16)
        with torch.device(kit.device):
            LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(path)
        shutil.copy(kit.tokenizer, path)
    return path


class _Stamps:
    """When the device had done as many steps of the command's trainer."""

    def __init__(self) -> None:
        self.at: dict[int, float] = {}

    def __enter__(self) -> _Stamps:
        from transformers import Trainer

        self._kept, stamps = Trainer.training_step, self
        kept = self._kept

        def training_step(trainer: Any, *args: Any, **options: Any) -> Any:
            # Before step n+1 begins, n steps are done.
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            stamps.at[trainer.state.global_step] = time.perf_counter()
            return kept(trainer, *args, **options)

        Trainer.training_step = training_step
        return self

    def __exit__(self, *_: object) -> None:
        from transformers import Trainer

        Trainer.training_step = self._kept


def _bare(kit: Kit, model: Path, steps: int, warm: int, context: int, batch: int) -> float:
    """Return tokens/s of forward, backward and AdamW in a plain loop, the same types and sizes."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(kit.device)
    made.train()
    optimiser = torch.optim.AdamW(made.parameters(), lr=3e-5, fused=kit.device == "cuda")
    generator = torch.Generator().manual_seed(0)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    start = 0.0
    for step in range(steps):
        if step == warm:
            wait(kit)
            start = time.perf_counter()
        tokens = torch.randint(vocabulary, (batch, context), generator=generator).to(kit.device)
        with torch.autocast(kit.device, torch.bfloat16):
            loss = made(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    wait(kit)
    return (steps - warm) * batch * context / (time.perf_counter() - start)


def _forget_peak(kit: Kit) -> None:
    if kit.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


STEPS = (Step(name="speed", seconds=45, run=speed),)
"""Of this stage."""
