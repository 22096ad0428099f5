"""Whatever a step of a run would refuse, refused before any of them begins."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.source import local_path
from architectures.model import choose_device
from common.errors import CheckpointError, OutputError
from common.text_sources.names import names_of, shown
from gguf_export.dense import dense_types
from gguf_export.requirements import check_model, check_types, vocabulary_notes
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.tokens.vocabulary import Vocabulary
from pipeline.advice import advice
from pipeline.layout import Layout
from pipeline.settings import RunConfig
from pipeline.state import check_out
from pipeline.steps import StepSettings
from pipeline.text import TextPlan, check_held_out, plan_text, text_files
from powerinfer_bridge.benchmark.inputs import read_prompts, room_for
from powerinfer_bridge.benchmark.setup import check_threads
from powerinfer_bridge.programs.powerinfer import PowerInfer
from predictor.collection.collect import choose_template
from predictor.training.checks import check_ranks
from prosparse.activation import open_any

_ZERO = ("relu", "fatrelu", "drelu")
"""Activations that are exactly zero for most neurons."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run of which nothing is known to be wrong.

    Attributes:
        checkpoint: the model, opened with ReLU where it is made sparse first.
        settings: of the commands.
        text: how the text is used.
        tokenizer: which of the model's files counts.
        notes: what does not fit and which option to set, a line each.
    """

    checkpoint: Checkpoint
    settings: StepSettings
    text: TextPlan
    tokenizer: str
    notes: tuple[str, ...]


def check(config: RunConfig) -> Checked:
    """Check settings, model, text and programs.

    Raises:
        PspError: what any of the steps would refuse, or an output that exists.
    """
    _check_places(config)
    checkpoint = _open(config)
    context = min(config.context, checkpoint.shape.context_length)
    asked = StepSettings.of(config, config.tokens, context)  # refuses what the commands refuse
    check_model(checkpoint)
    check_types(checkpoint, asked.export.types, dense=False)
    if config.dense:
        dense_types(asked.export, checkpoint)
    notes, tokenizer = [*checkpoint.notes], checkpoint.tokenizer()
    rows = checkpoint.shape.vocab_size
    vocabulary = read_vocabulary(checkpoint.directory, rows, checkpoint.config)
    notes += [*tokenizer.notes, *vocabulary_notes(vocabulary, tokenizer.notes)]
    template = choose_template(checkpoint, config.chat_template, notes.append)
    _check_prompt(config, asked, checkpoint, vocabulary)
    text = plan_text(config, checkpoint, template, notes.append)
    check_held_out(config, text, context, vocabulary, notes.append)
    settings = StepSettings.of(config, text.tokens, context)
    shape, rows = checkpoint.shape, int((1 - settings.train.holdout) * text.tokens)
    check_ranks(settings.train, shape.n_layers, shape.d_model, rows, shown(config.data))
    notes += advice(config, checkpoint, text)
    return Checked(
        checkpoint=checkpoint,
        settings=settings,
        text=text,
        tokenizer=tokenizer.source,
        notes=tuple(notes),
    )


def _check_places(config: RunConfig) -> None:
    """Refuse an output that may not be written, and machines and programs that are not there."""
    check_out(config.out, resume=config.resume, force=config.force)
    _check_sources(config)
    choose_device(config.device)
    if config.powerinfer_bin is not None:
        check_threads(PowerInfer(config.powerinfer_bin).check(), config.threads)


def _check_sources(config: RunConfig) -> None:
    """Refuse what the run is made of where its output would remove it, or become part of it."""
    layout, texts = Layout.of(config), (*names_of(config.data), *names_of(config.eval_data))
    for name in texts:
        if os.path.isdir(name) and layout.out.resolve().is_relative_to(Path(name).resolve()):
            raise OutputError(
                f"--out {config.out} lies in the folder of text {name}", "choose another --out"
            )
    files = [*text_files(config.data, layout), *text_files(config.eval_data, layout)]
    for path in (local_path(config.model), *files) if config.force else ():
        if path.resolve().is_relative_to(layout.out.resolve()):
            raise OutputError(f"--force would remove {path}", "choose another --out")


def _open(config: RunConfig) -> Checkpoint:
    """Open the model with ReLU; refuse one of another activation unless it is made sparse first."""
    opened = open_any(config.model)
    if opened.own.activation not in _ZERO and not config.sparsify:
        path = opened.checkpoint.path
        trained = f", or --model {path}:relu if it was trained with ReLU" if path.is_file() else ""
        raise CheckpointError(
            f"{config.model}: its activation is {opened.own.activation}, which is never exactly "
            "zero",
            "pass --sparsify with --eval-data, and --schedule for its length, or a sparse model"
            + trained,
        )
    return opened.checkpoint


def _check_prompt(
    config: RunConfig, settings: StepSettings, checkpoint: Checkpoint, vocabulary: Vocabulary
) -> None:
    """Refuse a prompt that the benchmark would refuse."""
    longest = checkpoint.shape.context_length
    room_for(read_prompts(settings.bench), vocabulary, config.generate, longest)
