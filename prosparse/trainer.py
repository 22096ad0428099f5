"""transformers' Trainer, with the L1 term in its loss and λ from the schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from common.errors import PspError
from prosparse.regulariser import L1Regulariser
from prosparse.saving import MARK, newest_checkpoint
from prosparse.schedule import Schedule

_SUMS = 3
"""Loss, next-token loss and L1 term stand before the layers' shares in what is pooled."""


class SparsifyError(PspError):
    """Training that cannot go on."""


class SparsityTrainer(Trainer):  # type: ignore[misc]
    """Adds λ·(L1 term) to the next-token loss while training, and logs both.

    Evaluation measures the next-token loss alone, and the share of active neurons.
    """

    def __init__(self, *, schedule: Schedule, regulariser: L1Regulariser, **options: Any) -> None:
        """Take over what `transformers.Trainer` takes."""
        super().__init__(**options)
        _keep_outputs(getattr(self.accelerator.state, "fsdp_plugin", None))
        self.schedule = schedule
        self.regulariser = regulariser
        # The loss comes back normalised over the whole accumulated batch, see `compute_loss`.
        self.loss_is_scaled_for_ga = True
        self._seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return next-token loss + λ·term in training, the next-token loss alone otherwise.

        The model's own loss counts the tokens of all accumulated batches and all processes; the
        term is a mean over this batch's tokens, so it is divided by the number of batches.
        Processes are averaged by whoever averages their gradients.

        Raises:
            SparsifyError: the loss is not finite; the line names the stage.
        """
        training = model.training
        with self.regulariser.watching() as watch:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        shares = watch.shares().to(loss.device)
        if not training:
            self._seen[False].append(torch.cat([loss.detach().float().expand(_SUMS), shares]))
            return (loss, outputs) if return_outputs else loss
        step = self.state.global_step + 1
        batches = self.current_gradient_accumulation_steps
        term = watch.term().to(loss.device) / batches
        total = loss + self.schedule.factor(step) * term
        if not torch.isfinite(total):
            raise self.stopped(f"the loss is {total.item()}", step)
        sums = torch.stack([total.detach(), loss.detach(), term.detach()]).float()
        self._seen[True].append(torch.cat([batches * sums, shares]))
        return (total, outputs) if return_outputs else total

    def stopped(self, reason: str, step: int) -> SparsifyError:
        """Say where training stopped and what is left of it."""
        number = self.schedule.stage_at(step)
        kept = newest_checkpoint(Path(self.args.output_dir))
        left = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return SparsifyError(
            f"{reason} at step {step}, in stage {number} ({self.schedule.stages[number].kind}, "
            f"lambda {self.schedule.factor(step):g}); {left}",
            "lower the learning rate or lambda",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was seen since the last call: λ, losses, sparsity, perplexity."""
        step = max(self.state.global_step, 1)
        number = self.schedule.stage_at(step)
        logs |= {"stage": number, "lambda": self.schedule.factor(step)}
        if "eval_loss" in logs:
            logs["ppl"] = math.exp(min(logs["eval_loss"], 700))
            self._pool(logs, training=False)
        elif "loss" in logs:
            self._pool(logs, training=True)
        super().log(logs, start_time)

    def _pool(self, logs: dict[str, float], *, training: bool) -> None:
        seen, self._seen[training] = self._seen[training], []
        if not seen:
            return
        means = self.accelerator.reduce(torch.stack(seen).mean(dim=0), "mean").tolist()
        if training:
            logs["loss"], logs["lm_loss"], logs["l1"] = means[:_SUMS]
        sparsity = [1 - share for share in means[_SUMS:]]
        logs["sparsity"] = sum(sparsity) / len(sparsity)
        logs |= {f"sparsity_layer_{layer}": value for layer, value in enumerate(sparsity)}


def _keep_outputs(plugin: Any) -> None:
    """Let FSDP2 return what the model computes; accelerate has it round even losses to bfloat16."""
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if hasattr(policy, "output_dtype"):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


class KeepGood(TrainerCallback):  # type: ignore[misc]
    """Refuses to save weights that are not finite, and marks checkpoints that are whole."""

    def __init__(self, trainer: SparsityTrainer) -> None:
        """Take the trainer, which says what is left when it stops."""
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at all weights before they are saved."""
        if control.should_save and not all(
            bool(torch.isfinite(weight).all()) for weight in kwargs["model"].parameters()
        ):
            raise self.trainer.stopped("weights are no longer finite", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark a checkpoint that is complete: a killed process leaves its last one unmarked."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK).touch()
