"""lm-eval's model `psp`, and the one that gives known answers.

Registered as `psp` with lm-eval's registry when this module is imported; the entry point of the
group `lm_eval.models` names it for versions of lm-eval that look there (0.4.13 does not).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from architectures.tokenizer import chat_template_of
from common.chat import detect, render
from common.errors import SettingsError
from evaluation.answers import Answer, Answers
from evaluation.arms import DENSE, Arm, Arms, CheckedModel
from evaluation.asking import Asker
from evaluation.backends.backend import RequestKind
from evaluation.requests import request_keys

Known = Mapping[tuple[str, str], Answer]
"""Answers by request kind and key."""


def chat_of(model: CheckedModel) -> str:
    """Return the name of a checkpoint's chat template, see `common.chat`.

    Raises:
        SettingsError: it has none, or one that psp does not know.
    """
    name = detect(chat_template_of(model.checkpoint.directory))
    if name is None or name == "none":
        what = "has no chat template" if name else "has a chat template that psp does not know"
        raise SettingsError(
            f"{model.name}: {what} (psp runs no template of a checkpoint)",
            "leave out --apply-chat-template",
        )
    return name


class _Chatting(LM):  # type: ignore[misc]  # lm-eval has no types
    """What all have in common: prompts in a chat model's format."""

    chat: Callable[[], str]
    tokens: str

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the text that the model is fed."""
        return render(chat_history, self.chat(), "a prompt")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the name of the format, None without one."""
        return self.chat() if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Tell whose ids they are, for lm-eval's cache of prompts."""
        return self.tokens


@register_model("psp")
class PspModel(_Chatting):
    """A checkpoint, with predictors or FATReLU or as it is, or an exported file."""

    def __init__(
        self,
        pretrained: str,
        *,
        predictors: str | None = None,
        fatrelu: float | str | None = None,
        gguf: str | None = None,
        powerinfer_bin: str | None = None,
        device: str | None = "auto",
        dtype: str | None = "auto",
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        """Load it.

        Args:
            pretrained: directory, hub id or GGUF file.
            predictors: directory of predictors to put in place.
            fatrelu: threshold of FATReLU to put in place; 0 is ReLU.
            gguf: exported file that answers in the checkpoint's place, in the embedded engine.
            powerinfer_bin: directory of PowerInfer's programs that run the file.
            device: torch device or `auto`, which `cuda:0` is too where there is no GPU: lm-eval's
                command line passes it if nobody names another, as its own models take it.
            dtype: `auto`, `float32`, `float16` or `bfloat16`.
            batch_size: requests at once; `auto` is 8, halved where memory does not do.
            max_batch_size: lm-eval passes it; of no meaning here.
            seed: of what is drawn.

        Raises:
            PspError: it cannot be used.
        """
        super().__init__()
        if sum(each is not None for each in (predictors, fatrelu, gguf)) > 1:
            raise SettingsError("predictors, fatrelu and gguf are arms of their own", "pass one")
        arm = Arm(
            name=DENSE,
            kind="dense",
            model=pretrained,
            predictors=None if predictors is None else Path(predictors),
            fatrelu=None if fatrelu is None else float(fatrelu),
            file=None if gguf is None else Path(gguf),
            programs=None if powerinfer_bin is None else Path(powerinfer_bin),
        )
        if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
            device = "auto"
        arms = Arms([arm], device=device, dtype=dtype or "auto")
        backend, _ = arms.open(arm)
        size = 8 if batch_size in (None, "auto") else int(str(batch_size))
        self.asker = Asker(
            backend,
            arms.first.tokenizer,
            Answers(),
            size,
            seed,
            logging.getLogger(__name__).warning,
        )
        self.chat = lambda: chat_of(arms.first)
        self.tokens = arms.first.checkpoint.fingerprint

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation."""
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Return the log-likelihood of each text."""
        return [each[0] for each in self._ask("loglikelihood_rolling", requests)]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return a continuation of each prompt."""
        return self._ask("generate_until", requests)

    def _ask(self, kind: RequestKind, requests: Sequence[Instance]) -> list[Any]:
        return self.asker.ask(kind, [request.args for request in requests], kind)


class KnownAnswers(_Chatting):
    """Gives answers that are known already, so that lm-eval makes its figures of them."""

    def __init__(self, known: Known, chat: Callable[[], str], tokens: str) -> None:
        """Take the answers.

        Args:
            known: by kind and key.
            chat: gives the name of the chat template.
            tokens: tells whose ids they are.
        """
        super().__init__()
        self._known, self.chat, self.tokens = known, chat, tokens

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        """Return what is known."""
        return self._look("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[Any]:
        """Return what is known."""
        return [each[0] for each in self._look("loglikelihood_rolling", requests)]

    def generate_until(self, requests: Sequence[Instance]) -> list[Any]:
        """Return what is known."""
        return self._look("generate_until", requests)

    def _look(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        arguments: dict[str, list[Any]] = {}
        for request in requests:  # keys number equal requests within a task
            arguments.setdefault(request.task_name, []).append(request.args)
        keys = {task: iter(request_keys(kind, each)) for task, each in arguments.items()}
        return [self._known[kind, next(keys[request.task_name])] for request in requests]
