"""Which windows a run trains on and which are held out, packed beside the model."""

from __future__ import annotations

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import load_tokenizer
from common.documents import read_documents
from prosparse.checkpoints import newest_checkpoint
from prosparse.data import Windows, WindowSet, cut_stream, need_windows, open_windows, pack
from prosparse.settings import SettingsError, SparsifyConfig

_SPREAD = 4
"""Windows are drawn from so many times as many as training takes: a text begins with few of its
documents, and a model trained on those alone knows the others less well."""


def pack_texts(config: SparsifyConfig, checkpoint: Checkpoint, processes: int) -> None:
    """Write the windows of every text; once there is a checkpoint they stay as they are.

    Raises:
        PspError: the context is too long for the model, or a text is unreadable.
    """
    begun = newest_checkpoint(config.training) is not None
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.shape.vocab_size, checkpoint.config)
    if config.context > checkpoint.shape.context_length:
        raise SettingsError(
            f"context is {config.context}, the model has {checkpoint.shape.context_length} "
            "positions; lower --context"
        )
    step = config.batch * config.accumulate * processes
    most = _SPREAD * config.schedule.steps * step
    wanted = {
        "train": (config.data, most + (0 if config.eval_data else config.eval_windows)),
        "sft": (config.sft_data, most),
        "eval": (config.eval_data, config.eval_windows),
    }
    for name, (source, count) in wanted.items():
        path = config.training / f"{name}.windows"
        if source is not None and not (begun and path.exists()):
            documents = read_documents(source, config.field)
            pack(cut_stream(documents, tokenizer, config.context), path, config.context, count)


def window_sets(config: SparsifyConfig, processes: int) -> tuple[WindowSet, WindowSet, float]:
    """Return the windows to train on, those held out, and how often the text is gone through.

    Raises:
        DataError: a text gives fewer windows than one step takes, or than are held out.
    """
    step = config.batch * config.accumulate * processes
    train, held = _windows(config, "train"), None
    if config.eval_data:
        held = _windows(config, "eval")
        need_windows(held, 1, config.eval_data)
    else:
        count = min(config.eval_windows, len(train) // 10)
        need_windows(train, step + max(count, 1), config.data)
        held, train = train[: max(count, 1)], train[max(count, 1) :]
    need_windows(train, step, config.data)
    first = config.schedule.start_of("sft") if config.sft_data else config.schedule.steps
    parts = [(train, first * step)]
    if config.sft_data:
        sft = _windows(config, "sft")
        need_windows(sft, step, config.sft_data)
        parts.append((sft, (config.schedule.steps - first) * step))
    passes = first * step / len(train)
    return WindowSet(parts, config.seed), WindowSet([(held, len(held))], None), passes


def _windows(config: SparsifyConfig, name: str) -> Windows:
    return open_windows(config.training / f"{name}.windows", config.context)
