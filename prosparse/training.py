"""`psp sparsify`: substitution and progressive L1 on transformers' Trainer.

The output directory is an ordinary Hugging Face checkpoint, written last. Beside it `training/`
holds the packed windows, checkpoints to resume from, TensorBoard's files (`runs/`) and `log.jsonl`,
whose lines `prosparse.training_log` describes. Several GPUs, FSDP and DeepSpeed are accelerate's
business: start the command with `accelerate launch`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, load_model
from common.errors import OutputError, PspError, SparsityError
from common.files import refuse_existing, refused_writes
from common.lock import locked
from common.machine import bfloat16_note
from common.outputs import drop_kept, set_aside
from common.sealed import read_sealed, write_sealed
from common.text_sources.names import names_of, need_repeatable
from prosparse.activation import open_with_relu, set_activation
from prosparse.regulariser import L1Regulariser
from prosparse.saving import drop_unfinished, newest_checkpoint, remove_checkpoints, save_model
from prosparse.settings import SparsifyConfig
from prosparse.sparsity import layer_rows
from prosparse.texts import WindowSet, check_texts, pack_texts, window_sets

if TYPE_CHECKING:
    from prosparse.trainer import SparsityTrainer

Report = Callable[[str], None]
Foresee = Callable[[Checkpoint], Iterable[str]]
MARKER = "training/sparsify.json"
_KEPT = 2
"""Checkpoints kept: the newest may be the one that a kill left unfinished."""
_PATIENCE = 86_400
"""Seconds that processes wait for the first one, which may pack text for hours."""


def sparsify(
    config: SparsifyConfig,
    report: Report = lambda line: None,
    foresee: Foresee = lambda checkpoint: (),
    *,
    told: bool = False,
) -> dict[str, Any]:
    """Train a gated model sparse and write it.

    Args:
        config: settings.
        report: receives lines about what is going to happen.
        foresee: what later steps will say of the model, a line each.
        told: whether the user knows what there is to say of model and text beforehand.

    Returns:
        The result, ready for JSON: `model`, `steps`, `activation_sparsity`, `layers`, `ppl`, `log`.

    Raises:
        PspError: an unsupported or damaged checkpoint, unreadable or too little text, existing
            output, other settings under `resume`, or a loss that is not finite.
    """
    import transformers

    checkpoint = open_with_relu(config.model)
    arguments = training_arguments(config)
    if arguments.n_gpu > 1:
        raise SparsityError(
            f"{arguments.n_gpu} GPUs are visible to one process",
            "start with accelerate launch, or set CUDA_VISIBLE_DEVICES to one",
        )
    transformers.utils.logging.disable_progress_bar()

    def prepare() -> None:
        tokenizer = checkpoint.tokenizer()
        _begin(config, checkpoint, arguments.world_size)
        about: Report = (lambda line: None) if told else report
        lines = (*checkpoint.notes, f"tokens: {tokenizer.source}", *tokenizer.notes)
        slow = bfloat16_note(arguments.device.type) if arguments.bf16 else None
        for line in (*lines, *foresee(checkpoint), *([slow] if slow else [])):
            about(line)
        if not config.finished:
            pack_texts(config, checkpoint, arguments.world_size, about)

    first = arguments.process_index == 0
    with locked(config.out) if first else nullcontext():
        _first_process(arguments, prepare)
        if not config.finished:
            with refused_writes(config.out):  # checkpoints and TensorBoard's files are not psp's
                _train(config, checkpoint, arguments, report)
        if first:
            drop_kept(config.out)
    return _result(config)


def _first_process(arguments: Any, work: Callable[[], None]) -> None:
    """Let the first process work while the others wait; what it refuses they all refuse.

    Otherwise the others would go on without the files that it did not write.
    """
    refusal: list[PspError | None] = [None]
    if arguments.process_index == 0:
        try:
            work()
        except PspError as error:
            refusal[0] = error
    if arguments.world_size > 1:
        torch.distributed.broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise refusal[0]


def is_main_process() -> bool:
    """Whether this process speaks for all that `accelerate launch` or torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def training_arguments(config: SparsifyConfig) -> Any:
    """Return transformers' TrainingArguments for a run.

    Raises:
        SparsityError: bfloat16 on a GPU that has none.
    """
    import transformers

    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    bfloat16 = config.precision == "bfloat16"
    if bfloat16 and not on_cpu and not transformers.utils.is_torch_bf16_gpu_available():
        raise SparsityError(
            "--precision bfloat16: this GPU does not compute in bfloat16",
            "pass --precision float32, or --device cpu",
        )
    decayed = config.schedule.steps - config.schedule.start_of("decay")
    name, options = {
        "constant": ("constant_with_warmup", {}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        "decay": (
            "warmup_stable_decay",
            {"num_decay_steps": decayed, "min_lr_ratio": 0.1, "decay_type": "linear"},
        ),
    }[config.rate]
    return transformers.TrainingArguments(
        output_dir=str(config.training),
        max_steps=config.schedule.steps,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=options,
        warmup_steps=round(config.warmup * config.schedule.steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        bf16=bfloat16,
        **_checkpointing(config),
        train_sampling_strategy="sequential",  # `WindowSet` has the order
        dataloader_pin_memory=not on_cpu and torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        prediction_loss_only=True,
        save_steps=config.save_every,
        save_total_limit=_KEPT,
        report_to=["tensorboard"],
        disable_tqdm=True,
        use_cpu=on_cpu,
        ddp_timeout=_PATIENCE,
        seed=config.seed,
    )


def _checkpointing(config: SparsifyConfig) -> dict[str, object]:
    """Return what new transformers call activation, old ones (5.17) gradient checkpointing.

    With reentry the L1 term would get no gradients.
    """
    from transformers import TrainingArguments

    known = signature(TrainingArguments).parameters
    name = "activation" if "activation_checkpointing" in known else "gradient"
    return {
        f"{name}_checkpointing": config.checkpointing,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }


def _begin(config: SparsifyConfig, checkpoint: Checkpoint, processes: int) -> None:
    """Start the output, or make sure that it was started with the same settings."""
    marker = config.out / MARKER
    if config.resume:
        sources = [name for text in config.texts for name in names_of(text)]
        need_repeatable(sources, "--resume", "train anew, or from a file")
    if config.resume and marker.exists():
        found = read_sealed(marker, OutputError, "use --force to start over")
        if found.get("settings") != config.document(processes)["settings"]:
            raise OutputError(
                f"{marker}: the run was begun with other settings or another number of processes "
                f"than {processes}",
                "repeat those, or use --force to start over",
            )
    else:
        refuse_existing(config.out, force=config.force, marker=MARKER, resumable=True)
        # Nothing that cannot run costs an existing output.
        check_texts(config, checkpoint, processes)
        set_aside(config.out)
        write_sealed(marker, config.document(processes))


def _train(config: SparsifyConfig, checkpoint: Checkpoint, arguments: Any, report: Report) -> None:
    train, held, passes = window_sets(config, arguments.world_size)
    if passes > 1.5 and arguments.process_index == 0:
        report(f"the text is short: training goes through it {passes:.1f} times")
    torch.manual_seed(config.seed)
    loaded = load_trainable(checkpoint, config.activation)
    trainer = make_trainer(config, checkpoint, loaded, arguments, train, held)
    if arguments.process_index == 0:
        drop_unfinished(config.training)
    begun = newest_checkpoint(config.training)
    if begun is None:
        arguments.eval_on_start = True
    elif arguments.process_index == 0:
        report(f"going on from {begun}")
    trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    # The log is no judge: the first process may still be writing it, and all must decide alike.
    evaluated = {line["step"] for line in trainer.state.log_history if "eval_loss" in line}
    if config.schedule.steps not in evaluated:
        trainer.evaluate()
    save_model(trainer, checkpoint, config.out, report)
    if arguments.process_index == 0:
        remove_checkpoints(config.training)
    trainer.accelerator.wait_for_everyone()


def load_trainable(checkpoint: Checkpoint, activation: str) -> LoadedModel:
    """Return the model in float32, every weight its own memory and open to training.

    Args:
        checkpoint: opened by `open_with_relu`.
        activation: `relu`, or `keep` for the one in its config.json.
    """
    loaded = load_model(checkpoint, dtype=torch.float32, device="cpu", weights="resident")
    model = loaded.causal_lm
    for weight in model.parameters():
        weight.data = weight.data.clone()  # else it may be the checkpoint's own file, mapped
    model.requires_grad_(True).train()
    if activation == "keep":
        found = checkpoint.origin.config
        set_activation(model, found["hidden_act"], float(found.get("hidden_act_param", 0)))
    config: Any = model.config
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, checkpoint.config.get(key))
    return loaded


def make_trainer(
    config: SparsifyConfig,
    checkpoint: Checkpoint,
    loaded: LoadedModel,
    arguments: Any,
    train: WindowSet,
    held: WindowSet,
) -> SparsityTrainer:
    """Return the Trainer with the L1 term, ready to run."""
    from transformers import PrinterCallback, default_data_collator

    from prosparse.trainer import KeepGood, SparsityTrainer
    from prosparse.training_log import Journal

    model: nn.Module = loaded.causal_lm
    trainer = SparsityTrainer(
        schedule=config.schedule,
        regulariser=L1Regulariser(loaded.blocks, checkpoint.architecture.ffn_output, config.norm),
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held,
        data_collator=default_data_collator,
        callbacks=[Journal(config.log, config.schedule)],
    )
    trainer.add_callback(KeepGood(trainer))
    trainer.remove_callback(PrinterCallback)  # it prints to standard output
    return trainer


def _result(config: SparsifyConfig) -> dict[str, Any]:
    from prosparse.training_log import last_evaluation, read_log

    last = last_evaluation(read_log(config.log))
    layers = last["sparsity"]
    return {
        "model": str(config.out),
        "steps": config.schedule.steps,
        "activation_sparsity": sum(layers) / len(layers),
        "layers": layer_rows(layers),
        "ppl": last["ppl"],
        "log": str(config.log),
    }
