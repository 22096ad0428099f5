"""Which windows a run trains on and which are held out, packed beside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import load_tokenizer
from common.documents import read_documents
from prosparse.checkpoints import newest_checkpoint
from prosparse.data import Windows, WindowSet, cut_stream, need_windows, open_windows, pack
from prosparse.settings import SettingsError, SparsifyConfig

_SPREAD = 4
"""Windows are drawn from so many times as many as training takes: a text begins with few of its
documents, and a model trained on those alone knows the others less well."""


def check_texts(config: SparsifyConfig, checkpoint: Checkpoint, processes: int) -> None:
    """Refuse what cannot be trained on before anything is written.

    Only as much text is read as one step takes.

    Raises:
        PspError: the context is too long for the model, or a text is unreadable or too short.
    """
    if config.context > checkpoint.shape.context_length:
        raise SettingsError(
            f"context is {config.context}, the model has {checkpoint.shape.context_length} "
            "positions",
            "lower --context",
        )
    step, windows = config.step_windows(processes), _windows_of(config, checkpoint)
    for name, source in _sources(config).items():
        most = {"train": step + config.eval_windows, "sft": step, "eval": 1}[name]
        found = sum(1 for _ in islice(windows(source), most))
        need_windows(found, _least(config, name, found, step), config.context, source)


def pack_texts(config: SparsifyConfig, checkpoint: Checkpoint, processes: int) -> None:
    """Write the windows of every text; once there is a checkpoint they stay as they are.

    Raises:
        PspError: a text is unreadable.
    """
    begun = newest_checkpoint(config.training) is not None
    trained = _SPREAD * config.schedule.steps * config.step_windows(processes)
    held = 0 if config.eval_data else config.eval_windows
    most = {"train": trained + held, "sft": trained, "eval": config.eval_windows}
    windows = _windows_of(config, checkpoint)
    for name, source in _sources(config).items():
        path = _packed(config, name)
        if not (begun and path.exists()):
            pack(windows(source), path, config.context, most[name])


def window_sets(config: SparsifyConfig, processes: int) -> tuple[WindowSet, WindowSet, float]:
    """Return the windows to train on, those held out, and how often the text is gone through.

    Raises:
        DataError: a text gives fewer windows than one step takes, or than are held out.
    """
    step = config.step_windows(processes)
    packed: dict[str, Windows] = {}
    for name, source in _sources(config).items():
        packed[name] = open_windows(_packed(config, name), config.context)
        found = len(packed[name])
        need_windows(found, _least(config, name, found, step), config.context, source)
    train = packed["train"]
    held = packed["eval"] if config.eval_data else train[: _held_back(config, len(train))]
    train = train if config.eval_data else train[len(held) :]
    first = config.schedule.start_of("sft") if config.sft_data else config.schedule.steps
    parts = [(train, first * step)]
    if config.sft_data:
        parts.append((packed["sft"], (config.schedule.steps - first) * step))
    passes = first * step / len(train)
    return WindowSet(parts, config.seed), WindowSet([(held, len(held))], None), passes


def _sources(config: SparsifyConfig) -> dict[str, str]:
    """Return name to source of every text of its own."""
    sources = {"train": config.data, "sft": config.sft_data, "eval": config.eval_data}
    return {name: source for name, source in sources.items() if source is not None}


def _windows_of(
    config: SparsifyConfig, checkpoint: Checkpoint
) -> Callable[[str], Iterator[list[int]]]:
    """Return what cuts a source into windows."""
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.shape.vocab_size, checkpoint.config)
    return lambda source: cut_stream(
        read_documents(source, config.field), tokenizer, config.context
    )


def _packed(config: SparsifyConfig, name: str) -> Path:
    return config.training / f"{name}.windows"


def _held_back(config: SparsifyConfig, found: int) -> int:
    """Return how many of the first windows of the text to train on are held out."""
    return 0 if config.eval_data else max(1, min(config.eval_windows, found // 10))


def _least(config: SparsifyConfig, name: str, found: int, step: int) -> int:
    """Return how many windows a text must give, of which `found` are known."""
    return {"train": step + _held_back(config, found), "sft": step, "eval": 1}[name]
