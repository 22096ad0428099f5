"""The model and the held-out text that a perplexity gap is measured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from architectures.checkpoint import Checkpoint
from architectures.model_files import compare_files, weight_files
from architectures.rounded import rounded
from architectures.windows import LEAST_TOKENS
from common.errors import PredictorError
from common.hashing import hash_files
from predictor.thresholds.predicted_model import held_out_windows
from predictor.traces.holdout import choose_documents
from predictor.traces.store import TraceStore
from predictor.training.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a gap is measured with.

    Attributes:
        model: as it was named.
        outtype: type that it is rounded to; None leaves what a GGUF file stores in one as it is.
        windows: token ids.
    """

    model: str
    outtype: str | None
    windows: list[list[int]]

    def checkpoint(self) -> Checkpoint:
        """Open the model, as it will be exported."""
        checkpoint = Checkpoint.open(self.model)
        return checkpoint if self.outtype is None else rounded(checkpoint, self.outtype)


def held_out(
    config: TrainConfig, outtype: str, store: TraceStore, note: Callable[[str], None]
) -> HeldOut:
    """Return the traces' model, in the type that it will be exported in, with windows to run.

    Args:
        config: settings.
        outtype: for messages.
        store: the traces.
        note: takes lines for the user.

    Raises:
        PspError: another model, or text that cannot be read or is too little.
    """
    model = config.model or store.header.model
    checkpoint = Checkpoint.open(model)
    for line in checkpoint.notes:
        note(line)
    if checkpoint.fingerprint != store.header.model_fingerprint:
        raise PredictorError(
            f"{checkpoint.path}: its weights or sizes differ from the model that {store} was "
            "made of",
            "pass that one as --model",
        )
    known = store.progress.model_files
    found = hash_files(weight_files(checkpoint)) if known else ()
    if (other := compare_files(checkpoint, found, known, str(store))) is not None:
        note(other)
    held = choose_documents(store.segments, config.holdout, config.seed)
    windows = held_out_windows(
        store.header, checkpoint, held, data=config.data, tokens=config.eval_tokens, note=note
    )
    tokens = sum(map(len, windows))
    if tokens < LEAST_TOKENS:
        raise PredictorError(
            f"{tokens} tokens of held-out text are too few to measure a perplexity gap",
            "collect from more text, raise --holdout, or pass --data",
        )
    note(f"measuring the perplexity gap on {tokens} held-out tokens, the model in {outtype}")
    return HeldOut(model=model, outtype=config.outtype, windows=windows)
