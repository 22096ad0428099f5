"""Perplexity over PowerInfer's windows, so that both engines' figures are the same quantity.

Source: PowerInfer@d3ebd7c examples/perplexity/perplexity.cpp: the text's tokens are cut into
windows of `context`; each window's first token is replaced by BOS, but there is no BOS at all with
byte-level tokens; targets are the tokens of the window's second half, its first excepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from common.errors import DataError
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.score import Score


def perplexity_windows(
    tokens: list[int], bos: int | None, context: int, chunks: int | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids to evaluate, original ids) for each window.

    Args:
        tokens: the text's tokens, after BOS if there is one.
        bos: id that replaces each window's first token, or None.
        context: window length.
        chunks: most windows, or None for all.

    Raises:
        DataError: fewer than two windows, which PowerInfer refuses too.
    """
    if len(tokens) < 2 * context:
        raise DataError(
            f"text has {len(tokens)} tokens, perplexity with --ctx {context} needs {2 * context}",
            "pass more text or a smaller --ctx",
        )
    count = len(tokens) // context
    for number in range(count if chunks is None else min(count, chunks)):
        window = tokens[number * context : (number + 1) * context]
        yield (window if bos is None else [bos, *window[1:]]), window


def perplexity(
    evaluate: Callable[[list[int]], torch.Tensor],
    windows: Iterator[tuple[list[int], list[int]]],
    description: str,
) -> float:
    """Return the perplexity of `score`."""
    return score(evaluate, windows, description).perplexity


def score(
    evaluate: Callable[[list[int]], torch.Tensor],
    windows: Iterator[tuple[list[int], list[int]]],
    description: str,
) -> Score:
    """Score windows.

    Args:
        evaluate: maps a window's ids to logits (tokens, vocab_size).
        windows: from `perplexity_windows`.
        description: label of the progress bar.
    """
    total, count, means = 0.0, 0, list[float]()
    for ids, originals in tqdm(list(windows), unit="window", desc=description, disable=None):
        first = len(ids) // 2
        logits = evaluate(ids)[first:-1].double()
        targets = torch.tensor(originals[first + 1 :])
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])
        total -= float(chosen.sum())
        count += len(targets)
        means.append(-float(chosen.mean()))
    try:
        value = math.exp(total / count)
    except OverflowError:
        value = math.inf
    return Score(perplexity=value, windows=tuple(means))


def engine_perplexity(
    engine: Engine | ExpertEngine, text: str, context: int, chunks: int | None, description: str
) -> float:
    """Return the perplexity of `engine_score`."""
    return engine_score(engine, text, context, chunks, description).perplexity


def engine_score(
    engine: Engine | ExpertEngine, text: str, context: int, chunks: int | None, description: str
) -> Score:
    """Score a text with the embedded engine as `perplexity -f FILE -c CONTEXT` would."""
    # PowerInfer drops one final newline when it reads the file (common.cpp, option -f).
    text = text.removesuffix("\n")
    vocabulary = engine.vocabulary
    windows = perplexity_windows(vocabulary.text_ids(text), vocabulary.bos, context, chunks)

    def evaluate(ids: list[int]) -> torch.Tensor:
        return engine.forward(ids, KVCache(engine.hyper.n_layers))

    return score(evaluate, windows, description)
