"""Whatever a step of a run would refuse, refused before any of them begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from architectures.checkpoint import Checkpoint
from architectures.model import check_device
from common.errors import CheckpointError, OutputError
from gguf_export.requirements import check_model, check_types
from gguf_export.tokens.vocabulary import Vocabulary
from pipeline.advice import advice
from pipeline.settings import RunConfig
from pipeline.state import check_out
from pipeline.steps import StepSettings
from pipeline.text import TextPlan, check_held_out, plan_text
from powerinfer_bridge.benchmark.inputs import read_prompts, room_for
from powerinfer_bridge.benchmark.setup import check_threads
from powerinfer_bridge.programs.powerinfer import PowerInfer
from predictor.collection.collect import choose_template
from predictor.training.run import check_ranks
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
        notes: what does not fit and which option to set, a line each.
    """

    checkpoint: Checkpoint
    settings: StepSettings
    text: TextPlan
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
    check_types(checkpoint, asked.export.types, dense=config.dense)
    notes: list[str] = []
    template = choose_template(checkpoint, config.chat_template, notes.append)
    vocabulary = check_held_out(config, checkpoint)
    _check_prompt(config, asked, checkpoint, vocabulary)
    text = plan_text(config, checkpoint, template)
    settings = StepSettings.of(config, text.tokens, context)
    shape, rows = checkpoint.shape, int((1 - settings.train.holdout) * text.tokens)
    check_ranks(settings.train, shape.n_layers, shape.d_model, rows, config.data)
    notes += [*vocabulary.warnings, *advice(config, checkpoint, text)]
    return Checked(checkpoint=checkpoint, settings=settings, text=text, notes=tuple(notes))


def _check_places(config: RunConfig) -> None:
    """Refuse an output that may not be written, and machines and programs that are not there."""
    check_out(config.out, resume=config.resume, force=config.force)
    for source in _inside(config) if config.force else ():
        raise OutputError(f"--force would remove {source}", "choose another --out")
    check_device(config.device)
    if config.powerinfer_bin is not None:
        check_threads(PowerInfer(config.powerinfer_bin).check(), config.threads)


def _inside(config: RunConfig) -> Iterator[str]:
    """Yield what the run is made of and lies in its output."""
    for source in (config.model, config.data, config.eval_data):
        if source is not None and Path(source).resolve().is_relative_to(config.out.resolve()):
            yield source


def _open(config: RunConfig) -> Checkpoint:
    """Open the model with ReLU; refuse one of another activation unless it is made sparse first."""
    opened = open_any(config.model)
    if opened.own.activation not in _ZERO and not config.sparsify:
        raise CheckpointError(
            f"{config.model}: its activation is {opened.own.activation}, which is never exactly "
            "zero",
            "pass --sparsify with --eval-data, and --schedule for its length, or a sparse model",
        )
    return opened.checkpoint


def _check_prompt(
    config: RunConfig, settings: StepSettings, checkpoint: Checkpoint, vocabulary: Vocabulary
) -> None:
    """Refuse a prompt that the benchmark would refuse."""
    longest = checkpoint.shape.context_length
    room_for(read_prompts(settings.bench), vocabulary, config.generate, longest)
