"""Silence of the libraries around tasks, whose notes and bars nobody asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_LOGGERS = ("lm_eval", "lm-eval", "datasets", "evaluate", "huggingface_hub", "fsspec", "httpx")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval, datasets and the hub's client from printing, and put all back afterwards.

    Errors that they log are still printed, and exceptions pass through.
    """
    import datasets
    import lm_eval.api.task as lm_eval_task

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    bars, bar = datasets.are_progress_bars_disabled(), lm_eval_task.tqdm
    try:
        for logger in loggers:
            logger.setLevel(max(logger.level, logging.ERROR))
        datasets.disable_progress_bars()
        lm_eval_task.tqdm = _no_bar
        yield
    finally:
        lm_eval_task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _no_bar(items: Iterable[Any], **options: Any) -> Iterable[Any]:
    return items
