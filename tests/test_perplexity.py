"""Perplexity over PowerInfer's windows, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import DataError
from gguf_export.bundle import Bundle
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import (
    engine_perplexity,
    perplexity,
    perplexity_windows,
    score,
)
from powerinfer_bridge.score import Score, gap_error

BOS = 1


def test_windows_are_cut_without_overlap_and_start_with_bos() -> None:
    tokens = [BOS, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert list(perplexity_windows(tokens, BOS, 4)) == [
        ([BOS, 10, 11, 12], [BOS, 10, 11, 12]),
        ([BOS, 14, 15, 16], [13, 14, 15, 16]),
    ]


def test_a_text_of_exactly_two_windows_is_enough_and_one_token_less_is_not() -> None:
    assert len(list(perplexity_windows(list(range(16)), BOS, 8))) == 2
    with pytest.raises(DataError) as caught:
        next(perplexity_windows(list(range(15)), BOS, 8))
    assert str(caught.value) == (
        "text has 15 tokens, perplexity with --ctx 8 needs 16; pass more text or a smaller --ctx"
    )


@pytest.mark.parametrize(("chunks", "windows"), [(None, 5), (1, 1), (3, 3), (5, 5), (99, 5)])
def test_chunks_limit_the_windows(chunks: int | None, windows: int) -> None:
    tokens = list(range(43))
    cut = list(perplexity_windows(tokens, BOS, 8, chunks))
    assert len(cut) == windows
    assert [original for _, original in cut] == [
        tokens[8 * number : 8 * number + 8] for number in range(windows)
    ]


def test_the_limit_does_not_lower_what_is_needed() -> None:
    with pytest.raises(DataError, match="needs 16"):
        list(perplexity_windows(list(range(12)), BOS, 8, 1))


@pytest.mark.parametrize("vocabulary", [2, 320])
def test_a_uniform_distribution_s_perplexity_is_the_vocabulary_s_size(vocabulary: int) -> None:
    tokens = [number % vocabulary for number in range(40)]
    windows = perplexity_windows(tokens, BOS, 8)
    found = perplexity(lambda ids: torch.full((len(ids), vocabulary), 3.0), windows, "uniform")
    assert found == pytest.approx(vocabulary, rel=1e-12)


def test_certain_predictions_have_perplexity_one_and_wrong_ones_a_large_one() -> None:
    tokens = [number % 7 for number in range(32)]

    def certain(ids: list[int]) -> torch.Tensor:
        following = (torch.tensor(ids) + 1) % 7
        return 50.0 * torch.nn.functional.one_hot(following, 7).float()

    def wrong(ids: list[int]) -> torch.Tensor:
        return certain(ids).roll(1, dims=-1)

    assert perplexity(certain, perplexity_windows(tokens, BOS, 8), "certain") == pytest.approx(1)
    assert perplexity(wrong, perplexity_windows(tokens, BOS, 8), "wrong") > 1e20


@pytest.mark.parametrize(("context", "scored"), [(8, [5, 6, 7]), (9, [5, 6, 7, 8])])
def test_the_second_half_is_scored_but_for_its_first_token(context: int, scored: list[int]) -> None:
    """Give every (position, token) its own probability and add up the scored ones by hand."""
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]
    logits = torch.randn(context, 10, generator=torch.Generator().manual_seed(0)).double()
    likelihood = logits.log_softmax(-1)
    total = 0.0
    for start in (0, context):
        for position in scored:
            total -= float(likelihood[position - 1, tokens[start + position]])
    found = perplexity(lambda ids: logits, perplexity_windows(tokens, BOS, context), "by hand")
    assert found == pytest.approx(math.exp(total / (2 * len(scored))), rel=1e-12)


def test_windows_are_scored_one_by_one_and_their_mean_is_the_perplexity() -> None:
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)).double()
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 1, 1, 1, 1, 1, 1, 1, 1]
    found = score(lambda ids: logits, perplexity_windows(tokens, BOS, 8), "windows")
    for number, mean in enumerate(found.windows):
        part = tokens[8 * number : 8 * number + 8]
        told = perplexity(lambda ids: logits, perplexity_windows(part * 2, BOS, 8), "one")
        assert mean == pytest.approx(math.log(told))
    assert found.perplexity == pytest.approx(math.exp(sum(found.windows) / 3))


def test_the_error_of_a_gap_is_told_by_how_windows_differ() -> None:
    before = Score(perplexity=1.0, windows=(1.0, 5.0, 2.0, 3.0))
    alike = Score(perplexity=1.0, windows=(1.5, 5.5, 2.5, 3.5))
    one = Score(perplexity=1.0, windows=(1.0, 4.0, 2.0, 3.0))
    assert gap_error(before, alike) == pytest.approx(0)
    # Growths 0, -1, 0, 0 about their mean -1/4: squares sum to 3/4.
    assert gap_error(before, one) == pytest.approx(0.75**0.5 / 4)
    for unknown in ((), (1.0,), (1.0, 2.0, 3.0)):
        assert gap_error(before, Score(perplexity=1.0, windows=unknown)) is None
    single = Score(perplexity=1.0, windows=(1.0,))
    assert gap_error(single, single) is None


def test_what_is_evaluated_starts_with_bos_but_is_scored_against_the_text() -> None:
    seen: list[list[int]] = []

    def evaluate(ids: list[int]) -> torch.Tensor:
        seen.append(ids)
        return torch.zeros(len(ids), 100)

    perplexity(evaluate, perplexity_windows(list(range(50, 66)), BOS, 8), "seen")
    assert seen == [[BOS, *range(51, 58)], [BOS, *range(59, 66)]]


def test_without_bos_windows_are_evaluated_as_they_are() -> None:
    """PowerInfer replaces no token where the vocabulary is byte-level."""
    tokens = list(range(50, 67))
    windows = list(perplexity_windows(tokens, None, 8))
    assert windows == [(tokens[:8], tokens[:8]), (tokens[8:16], tokens[8:16])]


def test_one_final_newline_is_dropped_as_powerinfer_drops_it(exact_bundle: Bundle) -> None:
    engine = Engine(exact_bundle.model_file)
    text = "x" * 61
    assert len(engine.vocabulary.encode(text)) == 62, "with BOS one token less than two windows"
    for ending in ("", "\n"):
        with pytest.raises(DataError, match="text has 63 tokens"):
            engine_perplexity(engine, text + ending, 32, None, "newline")
    assert engine_perplexity(engine, text + "\n\n", 32, None, "newlines") > 1


def test_a_text_too_short_for_the_engine_names_the_remedy(exact_bundle: Bundle) -> None:
    with pytest.raises(DataError) as caught:
        engine_perplexity(Engine(exact_bundle.model_file), "short", 64, None, "short")
    assert "needs 128; pass more text or a smaller --ctx" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
