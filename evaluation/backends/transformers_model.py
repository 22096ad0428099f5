"""A checkpoint in transformers, with its own activation or another, with predictors or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence

from architectures.model import LoadedModel, choose_device, enough_memory, load_model
from common.errors import EngineError
from evaluation.backends.backend import (
    KINDS,
    NOT_FINITE,
    Decoding,
    Prompt,
    RequestKind,
    Score,
    Scoring,
    Zeros,
)
from evaluation.backends.drawing import choose, random_of
from evaluation.backends.texts import continuation_of, ends_within
from predictor.masking import PredictorMasks
from predictor.module import Predictor
from prosparse.activation import Opened, Setting, exchange, has_one_gate

_LOGITS = 1 << 26
"""Elements of logits at once, 256 MiB of float32: of long windows they would fill the memory."""


@dataclass(frozen=True)
class Placed:
    """Predictors and what they are compared with.

    Attributes:
        predictors: layer number to predictor.
        threshold: neurons whose logit is below it are skipped.
    """

    predictors: Mapping[int, Predictor]
    threshold: float


class TransformersModel:
    """A loaded model that several arms share.

    Attributes:
        opened: the checkpoint.
        loaded: the runnable model.
        dtype: in which it computes.
    """

    def __init__(self, opened: Opened, *, device: str, dtype: torch.dtype | None) -> None:
        """Load the model.

        Args:
            opened: the checkpoint, of any activation.
            device: torch device or `auto`.
            dtype: None is float32 on the CPU, elsewhere the checkpoint's own.

        Raises:
            CheckpointError: the device is not there or too small.
        """
        device = choose_device(device)
        checkpoint = self.opened = opened.checkpoint
        self.own = opened.own
        self.dtype = dtype or (torch.float32 if device == "cpu" else checkpoint.dtype)
        self.loaded: LoadedModel = load_model(checkpoint, dtype=self.dtype, device=device)
        self.tokenizer = checkpoint.tokenizer()
        if has_one_gate(checkpoint):
            exchange(self.loaded.blocks, self.own.activation, self.own.thresholds)
        self.masks = PredictorMasks(self.loaded, checkpoint.architecture)
        self.zeros = Zeros()
        self._real: torch.Tensor | None = None
        for block in self.loaded.blocks:
            output = block.get_submodule(checkpoint.architecture.ffn_output)
            output.register_forward_pre_hook(self._count)

    @contextmanager
    def arranged(self, setting: Setting, placed: Placed | None) -> Iterator[None]:
        """Let the model have an activation, and predictors, within the block."""
        blocks = self.loaded.blocks
        other = setting != self.own
        kept = [block.get_submodule("mlp").act_fn for block in blocks] if other else []
        if other:
            exchange(blocks, setting.activation, setting.thresholds)
        masked = nullcontext() if placed is None else self.masks.placed(**vars(placed))
        try:
            with masked:
                yield
        finally:
            for block, module in zip(blocks, kept, strict=False):
                block.get_submodule("mlp").act_fn = module

    @contextmanager
    def counting(self, real: torch.Tensor) -> Iterator[None]:
        """Count zeros of the tokens that are no padding, (batch, length) bool, within the block.

        A pass over another number of tokens, as those of a continuation are, is not counted.
        """
        self._real = real.to(self.loaded.device).flatten()
        try:
            yield
        finally:
            self._real = None

    def _count(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        neurons = args[0].flatten(0, -2)
        if self._real is None or len(neurons) != len(self._real):
            return
        counted = neurons.shape[1] - neurons.count_nonzero(1)
        self.zeros.zero += int(counted[self._real].sum())
        self.zeros.total += int(self._real.sum()) * neurons.shape[1]


class TransformersBackend:
    """One arm of a loaded model."""

    kinds: Sequence[RequestKind] = KINDS
    why_not = ""

    def __init__(
        self, model: TransformersModel, setting: Setting | None = None, placed: Placed | None = None
    ) -> None:
        """Take a loaded model.

        Args:
            model: that other arms may share.
            setting: its activation; None is its own.
            placed: predictors; None runs every neuron.
        """
        self._model, self._placed = model, placed
        self._setting = model.own if setting is None else setting

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self._model.opened.shape.context_length

    @torch.inference_mode()
    def score(self, batch: Sequence[Scoring]) -> list[list[Score]]:
        """Return a score for each target of each request; see `Backend`."""
        rows = [torch.tensor(each.ids) for each in batch]
        tokens = pad_sequence(rows, batch_first=True)
        real = torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows])
        model = self._model
        with model.arranged(self._setting, self._placed), model.counting(real):
            hidden = model.loaded.hidden(tokens)
            with enough_memory(model.loaded.device):
                return [
                    _scores(model.loaded, hidden[number], each) for number, each in enumerate(batch)
                ]

    @torch.inference_mode()
    def generate(self, batch: Sequence[Prompt], decoding: Decoding) -> list[str]:
        """Return the continuation of each prompt; see `Backend`."""
        model, tokenizer = self._model, self._model.tokenizer
        longest = max(len(each.ids) for each in batch)
        pads = [longest - len(each.ids) for each in batch]
        ends = sorted(tokenizer.end_ids)
        pad = ends[0] if ends else tokenizer.bos_id()
        ids = torch.tensor([[pad] * n + [*p.ids] for n, p in zip(pads, batch, strict=True)])
        real = torch.arange(longest) >= torch.tensor(pads)[:, None]
        prompts = [each.ids for each in batch]
        stopped = _Stopped(partial(ends_within, tokenizer, prompts, decoding.stop), longest)
        with model.arranged(self._setting, self._placed), model.counting(real):
            made = _continue(model.loaded, ids, real, stopped, _Drawn(batch, decoding), ends, pad)
        return [
            continuation_of(tokenizer, prompt, _until(row, ends))
            for prompt, row in zip(prompts, made[:, longest:].tolist(), strict=True)
        ]

    def zeros(self) -> Zeros:
        """Return what was counted since the last call."""
        found, self._model.zeros = self._model.zeros, Zeros()
        return found

    def close(self) -> None:
        """Leave the model to the other arms."""


def _scores(model: LoadedModel, hidden: torch.Tensor, request: Scoring) -> list[Score]:
    """Return the scores of a request from its (length, width) of what the head reads."""
    count, end = len(request.targets[0]), len(request.ids)
    if not count:
        return [Score(0.0, True) for _ in request.targets]
    targets = torch.tensor(request.targets, device=hidden.device)
    likely: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    done = 0
    for part in torch.split(hidden[end - count : end], max(1, _LOGITS // _width(model))):
        predicted = log_softmax(model.head(part), dim=-1, dtype=torch.float32)
        here = targets[:, done : done + len(part)]
        likely.append(predicted.expand(len(here), -1, -1).gather(2, here[..., None])[..., 0])
        chosen.append(predicted.argmax(-1) == here)
        done += len(part)
    sums = torch.cat(likely, 1).double().sum(1).tolist()
    greedy = torch.cat(chosen, 1).all(1).tolist()
    return [Score(total, same) for total, same in zip(sums, greedy, strict=True)]


def _width(model: LoadedModel) -> int:
    causal_lm: Any = model.causal_lm
    return int(causal_lm.get_output_embeddings().weight.shape[0])


class _Stopped:
    """transformers' criterion: whether each row holds a stop text."""

    def __init__(self, ended: Callable[[int, list[int]], bool], prompt_length: int) -> None:
        self._ended, self._start = ended, prompt_length

    def __call__(self, ids: torch.Tensor, scores: Any, **settings: Any) -> torch.Tensor:
        rows = ids[:, self._start :].tolist()
        ended = [self._ended(number, row) for number, row in enumerate(rows)]
        return torch.tensor(ended, device=ids.device)


class _Drawn:
    """transformers' logits processor: leaves each row the one token that is drawn for it."""

    def __init__(self, batch: Sequence[Prompt], decoding: Decoding) -> None:
        self.decoding = decoding
        self._random = [random_of(prompt, decoding) for prompt in batch]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(scores.isnan().any()):
            raise EngineError("the model's logits are no numbers", NOT_FINITE)
        if self.decoding.temperature == 0:
            return scores
        rows = zip(scores.float().cpu(), self._random, strict=True)
        drawn = torch.tensor([[choose(row, self.decoding, random)] for row, random in rows])
        return torch.full_like(scores, -math.inf).scatter(1, drawn.to(scores.device), 0.0)


def _continue(
    model: LoadedModel,
    ids: torch.Tensor,
    real: torch.Tensor,
    stopped: _Stopped,
    drawn: _Drawn,
    ends: list[int],
    pad: int,
) -> torch.Tensor:
    from transformers import LogitsProcessorList, StoppingCriteriaList

    causal_lm: Any = model.causal_lm
    with enough_memory(model.device):
        made: torch.Tensor = causal_lm.generate(
            input_ids=ids.to(model.device),
            attention_mask=real.long().to(model.device),
            max_new_tokens=drawn.decoding.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([drawn]),
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
    return made.cpu()


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return ids up to the first that ends a sequence."""
    at = next((at for at, number in enumerate(ids) if number in ends), len(ids))
    return ids[:at]
