"""The model with predictors in place, in transformers, masking as PowerInfer does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch.nn.functional import log_softmax
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import choose_device, load_model
from architectures.windows import document_windows, first_tokens, growth_error
from common.documents import read_documents
from common.text_sources.names import Sources
from predictor.masking import PredictorMasks
from predictor.module import Predictor
from predictor.traces.manifest import TraceHeader


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What predictors do to a model on held-out text.

    Attributes:
        ppl_dense: perplexity of the model itself.
        ppl_sparse: with predictors.
        kl_divergence: mean over tokens of KL(complete ‖ sparse) of the next-token distributions,
            nats. `complete` misses no active neuron, which is the model itself but for FATReLU,
            whose wrongly predicted neurons PowerInfer computes by ReLU. If its probabilities are
            right, the exponential is what perplexity grows by in expectation through what is
            missed; the measured growth scatters around that far more.
        standard_error: of the logarithm of the measured growth, told by how windows differ.
    """

    ppl_dense: float
    ppl_sparse: float
    kl_divergence: float
    standard_error: float

    @property
    def ppl_gap(self) -> float:
        """Growth of the perplexity, a fraction."""
        return self.ppl_sparse / self.ppl_dense - 1


def held_out_windows(
    header: TraceHeader,
    checkpoint: Checkpoint,
    held: set[int],
    *,
    data: Sources,
    tokens: int,
    note: Callable[[str], None] = lambda line: None,
) -> list[list[int]]:
    """Return windows of text that training never saw, of at most `tokens` token ids in all.

    Args:
        header: of the traces that predictors were trained from.
        checkpoint: the traces' model.
        held: numbers of the documents that were held out.
        data: other text instead, all of it; () is none.
        tokens: most token ids, BOS included.
        note: takes lines about rows of the other text that were passed over.

    Raises:
        PspError: the text or the tokenizer cannot be read.
    """
    texts = read_documents(data or header.data, header.field, header.chat_template)
    tokenizer = checkpoint.tokenizer()
    numbered = document_windows(texts, tokenizer, header.context, as_powerinfer=True)
    if not data:
        last = max(held)
        seen = takewhile(lambda found: found[0] <= last, numbered)
        numbered = (found for found in seen if found[0] in held)
    windows = list(first_tokens((window for _, window in numbered), tokens))
    for line in texts.row_notes if data else ():
        note(line)
    return windows


class MaskedModel:
    """A model whose FFN neurons can be masked by predictors, see `predictor.masking`."""

    def __init__(self, checkpoint: Checkpoint, device: str, weights: str = "auto") -> None:
        """Load the model.

        Args:
            checkpoint: the model.
            device: torch device; on the CPU the model runs in float32.
            weights: see `load_model`.

        Raises:
            CheckpointError: the device is not there or too small.
        """
        device = choose_device(device)
        dtype = measured_dtype(checkpoint, device)
        self._model = load_model(checkpoint, dtype=dtype, device=device, weights=weights)
        self._masks = PredictorMasks(self._model, checkpoint.architecture)

    @torch.inference_mode()
    def log_probabilities(self, window: list[int]) -> torch.Tensor:
        """Return (tokens - 1, vocab_size) float32 log-probabilities on the CPU."""
        logits = self._model.logits(torch.tensor([window]))[0, :-1]
        return log_softmax(logits.float(), dim=-1).cpu()

    @torch.inference_mode()
    def compared(
        self,
        windows: Iterable[tuple[list[int], torch.Tensor]],
        predictors: Mapping[int, Predictor],
        threshold: float,
    ) -> list[torch.Tensor]:
        """Run windows with predictors in place.

        Args:
            windows: token ids, and their log-probabilities without predictors, float16.
            predictors: layer number to predictor; other layers compute every neuron.
            threshold: neurons whose logit is below it are skipped.

        Returns:
            (4,) float64 of each window, for `quality_of`.
        """
        with self._masks.placed(predictors, threshold):
            return [self._compared(window, dense.float()) for window, dense in windows]

    def _compared(self, window: list[int], dense: torch.Tensor) -> torch.Tensor:
        complete = dense
        if self._masks.fatrelu:
            self._masks.complete = True
            complete = self.log_probabilities(window)
            self._masks.complete = False
        return _compare(window, dense, complete, self.log_probabilities(window))


class PredictedModel:
    """A model and windows, for several sets of predictors."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[list[int]], device: str) -> None:
        """Load the model and compute its own predictions on the windows.

        Args:
            checkpoint: the model.
            windows: token ids, each window by itself.
            device: see `MaskedModel`.

        Raises:
            CheckpointError: the device is not there or too small.
        """
        self._model, self._windows = MaskedModel(checkpoint, device), windows
        bar = tqdm(windows, unit="window", desc="dense model", disable=None)
        self._dense = [self._model.log_probabilities(window).half() for window in bar]

    def quality(
        self, predictors: Mapping[int, Predictor], threshold: float, *, every: int = 1
    ) -> Quality:
        """Run windows with predictors in place.

        Args:
            predictors: see `MaskedModel.compared`.
            threshold: likewise.
            every: how many windows there are for each that is run.
        """
        chosen = zip(self._windows[::every], self._dense[::every], strict=True)
        return quality_of(self._model.compared(chosen, predictors, threshold))


def measured_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    """Return the type that a model is measured in."""
    return torch.float32 if device == "cpu" else checkpoint.dtype


def quality_of(windows: Sequence[torch.Tensor]) -> Quality:
    """Judge what `MaskedModel.compared` returned."""
    sums = torch.stack(list(windows))
    dense, sparse, divergence, tokens = sums.sum(0).tolist()
    growth = torch.tensor((sparse - dense) / tokens, dtype=torch.float64)
    return Quality(
        ppl_dense=math.exp(dense / tokens),
        ppl_sparse=math.exp(sparse / tokens),
        kl_divergence=divergence / tokens,
        standard_error=growth_error(sums[:, 1] - sums[:, 0], sums[:, 3], growth),
    )


def _compare(
    window: list[int], dense: torch.Tensor, complete: torch.Tensor, sparse: torch.Tensor
) -> torch.Tensor:
    """Return sums over tokens: both negative log-likelihoods, the divergence, and the count."""
    following = torch.tensor(window[1:])[:, None]
    divergence = (complete.exp() * (complete - sparse)).sum()
    sums = [-dense.gather(1, following).sum(), -sparse.gather(1, following).sum(), divergence]
    return torch.stack([*sums, torch.tensor(float(len(following)))]).double()
