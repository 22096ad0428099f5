"""Text that training never saw, and the model to run on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import load_tokenizer
from common.documents import read_documents
from common.errors import PredictorError
from predictor.calibration.predicted_model import PredictedModel
from predictor.collection.windows import Window, cut_windows
from predictor.traces.holdout import choose_documents

if TYPE_CHECKING:
    from predictor.traces.store import TraceStore
    from predictor.training.settings import TrainConfig

_LEAST_TOKENS = 64


def held_out_model(
    config: TrainConfig, store: TraceStore, note: Callable[[str], None]
) -> PredictedModel:
    """Load the traces' model with held-out windows to run.

    Raises:
        PspError: the model or the text is not there or not the one of the traces, or too short.
    """
    checkpoint = Checkpoint.open(config.model or store.header.model)
    if checkpoint.fingerprint != store.header.model_fingerprint:
        raise PredictorError(
            f"{checkpoint.path}: its weights or sizes differ from the model that {store.path} was "
            "made of",
            "pass that one as --model",
        )
    windows = list(_cut(_windows(config, store, checkpoint), config.eval_tokens))
    tokens = sum(len(window.tokens) for window in windows)
    if tokens < _LEAST_TOKENS:
        raise PredictorError(
            f"{tokens} tokens of held-out text are too few to measure a perplexity gap",
            "collect from more text, raise --holdout, or pass --data",
        )
    note(f"measuring the perplexity gap on {tokens} held-out tokens")
    return PredictedModel(checkpoint, windows, config.device)


def _windows(config: TrainConfig, store: TraceStore, checkpoint: Checkpoint) -> Iterator[Window]:
    header, segments = store.header, [s for shard in store.progress.shards for s in shard.segments]
    held = choose_documents(segments, config.holdout, config.seed)
    texts = read_documents(config.data or header.data, header.field, header.chat_template)
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.shape.vocab_size, checkpoint.config)
    for window in cut_windows(texts, tokenizer, header.context):
        if config.data is not None or window.document in held:
            yield window
        if config.data is None and window.document > max(held):
            return


def _cut(windows: Iterable[Window], tokens: int) -> Iterator[Window]:
    """Yield windows of at most `tokens` in all; a window of one token predicts nothing."""
    for window in windows:
        taken = window.tokens[:tokens]
        if len(taken) > 1:
            yield Window(window.document, taken)
        tokens -= len(taken)
        if tokens < 2:
            return
