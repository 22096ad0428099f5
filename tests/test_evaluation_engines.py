"""The embedded engine as it answers an evaluation, and which files fit a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT, ModelMaker, refused

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError, EngineError, FormatError
from evaluation.backends.backend import Decoding, Prompt, Scoring
from evaluation.backends.drawing import choose
from evaluation.backends.embedded import EmbeddedBackend
from evaluation.backends.fit import check_fit, room_for
from gguf_export.bundle import Bundle
from gguf_export.contract import OpenedFile
from gguf_export.tokens.vocabulary import Vocabulary
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine, generate

GREEDY = Decoding(stop=(), max_new_tokens=12)
SAMPLED = Decoding(stop=(), max_new_tokens=12, temperature=1.0, seed=5)


@pytest.fixture
def backend(exact_bundle: Bundle) -> EmbeddedBackend:
    return EmbeddedBackend(exact_bundle.model_file)


@pytest.fixture(scope="module")
def vocabulary(exact_bundle: Bundle) -> Vocabulary:
    return OpenedFile(exact_bundle.model_file).vocabulary


def choices(vocabulary: Vocabulary, length: int, count: int = 3) -> list[Scoring]:
    """Make the choices of a question: one context, several continuations."""
    ids = vocabulary.text_ids(TEXT)
    context, ends = ids[:length], [ids[at : at + 4] for at in range(60, 60 + count)]
    return [Scoring(ids=(*context, *end[:-1]), targets=(tuple(end),)) for end in ends]


def prompt(vocabulary: Vocabulary, text: str) -> Prompt:
    return Prompt(text=text, ids=tuple(vocabulary.text_ids(text)))


def test_a_score_is_the_sum_of_the_engine_s_log_probabilities(
    backend: EmbeddedBackend, exact_bundle: Bundle, vocabulary: Vocabulary
) -> None:
    request = choices(vocabulary, 20)[0]
    engine = Engine(exact_bundle.model_file)
    logs = engine.forward(list(request.ids), KVCache(2)).double().log_softmax(-1)
    target = request.targets[0]
    expected = sum(float(logs[19 + at, token]) for at, token in enumerate(target))
    [[found]] = backend.score([request])
    assert found.loglikelihood == pytest.approx(expected, abs=1e-9)
    assert not found.greedy
    best = tuple(logs[19:].argmax(-1).tolist())
    if len(set(best)) > 1:  # each position's best, though another context than its own
        [[score]] = backend.score([replace(request, targets=(best,))])
        assert score.greedy
    [[score]] = backend.score([replace(request, targets=((*best[:-1], target[-1]),))])
    assert score.greedy == (best[-1] == target[-1])


@pytest.mark.parametrize("length", [5, 31, 32, 33, 64, 90])
def test_sharing_changes_no_bit(
    backend: EmbeddedBackend, vocabulary: Vocabulary, length: int
) -> None:
    requests = choices(vocabulary, length)
    shared = backend.score(requests)
    alone = []
    for request in requests:
        backend.close()
        alone += backend.score([request])
    assert shared == alone
    assert len({score.loglikelihood for [score] in shared}) == 3


def test_what_two_requests_begin_with_is_run_once(
    backend: EmbeddedBackend, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = list[int]()
    forward = Engine.forward

    def counted(self: Engine, tokens: list[int], cache: KVCache, **options: int) -> torch.Tensor:
        run.append(len(tokens))
        return forward(self, tokens, cache, **options)

    monkeypatch.setattr(Engine, "forward", counted)
    backend.score(choices(vocabulary, 70))
    assert run == [32, 32, 9, 9, 9]


def test_a_request_after_another_one_is_its_own(
    backend: EmbeddedBackend, vocabulary: Vocabulary
) -> None:
    """What stays of one must not leak: also where the next is a beginning of it, or equal."""
    long, [short, *_] = choices(vocabulary, 90)[0], choices(vocabulary, 40)
    first = backend.score([short])
    assert backend.score([long, short, short, long])[1:3] == [*first, *first]
    whole = Scoring(ids=long.ids, targets=((*long.ids[1:], 7),))
    after = backend.score([whole])
    backend.close()
    assert backend.score([whole]) == after


def test_targets_of_one_run_differ_in_their_last_token(
    backend: EmbeddedBackend, vocabulary: Vocabulary
) -> None:
    request = choices(vocabulary, 20)[0]
    several = replace(request, targets=tuple((*request.targets[0][:-1], n) for n in range(320)))
    [scores] = backend.score([several])
    one = [backend.score([replace(request, targets=(t,))])[0][0] for t in several.targets[:3]]
    assert scores[:3] == one
    ends = torch.tensor([score.loglikelihood for score in scores]).double()
    [[start]] = backend.score([Scoring(ids=request.ids[:-1], targets=(request.targets[0][:-1],))])
    assert float(ends.logsumexp(0)) == pytest.approx(start.loglikelihood, abs=0.02)


def test_more_ids_than_the_context_are_refused(backend: EmbeddedBackend) -> None:
    assert backend.max_length == 128
    ids = tuple([1] * 129)
    with refused(EngineError, "129 tokens", "context is 128"):
        backend.score([Scoring(ids=ids, targets=((1,),))])
    with refused(EngineError, "129 tokens"):
        backend.generate([Prompt(text="", ids=ids)], GREEDY)
    assert len(backend.generate([Prompt(text="", ids=ids[:-5])], GREEDY)) > 0


def test_room_is_what_the_context_leaves() -> None:
    assert (room_for(5, 10, 128), room_for(120, 10, 128), room_for(128, 10, 128)) == (10, 8, 0)


@pytest.mark.parametrize("text", ["def f(", "The quick", "x"])
def test_a_greedy_text_is_the_engine_s(
    backend: EmbeddedBackend, exact_bundle: Bundle, vocabulary: Vocabulary, text: str
) -> None:
    # `generate` reads as main does, which puts no space in front.
    expected = generate(Engine(exact_bundle.model_file), f" {text}", 12)
    [found] = backend.generate([prompt(vocabulary, text)], GREEDY)
    ids = expected.tokens
    ends = ids.index(vocabulary.eos_id) if vocabulary.eos_id in ids else len(ids)
    assert found == vocabulary.decode(ids[:ends]).decode("utf-8", "replace")


def test_a_continuation_keeps_the_space_that_begins_it(
    backend: EmbeddedBackend, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = next(n for n, t in enumerate(vocabulary.tokens) if t.startswith("▁t".encode()))
    monkeypatch.setattr("evaluation.backends.embedded.choose", lambda *_: space)
    [text] = backend.generate([prompt(vocabulary, "The")], replace(GREEDY, max_new_tokens=2))
    assert text == vocabulary.decode([space]).decode() * 2
    assert text.startswith(" t")


def test_a_text_ends_at_a_stop_text_or_the_end_token(
    backend: EmbeddedBackend, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [vocabulary.ids[f"<0x{byte:02X}>".encode()] for byte in "a-é\n\nb".encode()]
    made += [vocabulary.eos_id, made[0]]
    drawn = list[int]()

    def scripted(*_: object) -> int:
        drawn.append(made[len(drawn)])
        return drawn[-1]

    monkeypatch.setattr("evaluation.backends.embedded.choose", scripted)
    asked = [prompt(vocabulary, "x")]
    for stop, text, count in [
        (("é",), "a-é", 4),
        (("\n\n", "zzz"), "a-é\n\n", 6),
        (("-",), "a-", 2),
        ((), "a-é\n\nb", 8),
    ]:
        drawn.clear()
        assert backend.generate(asked, Decoding(stop=stop, max_new_tokens=8)) == [text]
        assert len(drawn) == count


def test_a_sampled_text_hangs_on_its_seed_alone(
    backend: EmbeddedBackend, vocabulary: Vocabulary
) -> None:
    asked = [prompt(vocabulary, text) for text in ("The quick", "def f(")]
    both = backend.generate(asked, SAMPLED)
    assert backend.generate(asked[1:], SAMPLED) == both[1:]
    assert backend.generate(asked, replace(SAMPLED, seed=6)) != both
    greedy = backend.generate(asked, GREEDY)
    assert both != greedy
    again = [asked[0], replace(asked[0], seed=1)]
    assert len(set(backend.generate(again, SAMPLED))) == 2
    assert backend.generate(asked, replace(SAMPLED, top_k=1)) == greedy
    assert backend.generate(asked, replace(SAMPLED, top_p=0.0)) == greedy


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_shares(how: dict[str, float], expected: list[float]) -> None:
    order = [2, 0, 3, 1]
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    random, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(4000):
        counts[choose(logits, replace(SAMPLED, **how), random)] += 1  # type: ignore[arg-type]
    assert (counts[order] / 4000).tolist() == pytest.approx(expected, abs=0.03)


def test_logits_that_are_no_numbers_are_told() -> None:
    with refused(EngineError, "logits are no numbers"):
        choose(torch.tensor([0.0, float("nan")]), SAMPLED, torch.Generator())


def test_a_file_fits_the_model_that_it_was_made_from(
    exact_bundle: Bundle, model_dir: Path, make_model: ModelMaker, tmp_path: Path
) -> None:
    check_fit(exact_bundle.model_file, Checkpoint.open(str(model_dir)))
    other = make_model(tmp_path / "other", seed=1)
    with refused(CheckpointError, str(exact_bundle.model_file), "is not the model that"):
        check_fit(exact_bundle.model_file, Checkpoint.open(str(other)))


def test_a_file_with_another_vocabulary_does_not_fit(
    exact_bundle: Bundle, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids would mean other texts than those that were asked for."""
    path, checkpoint = exact_bundle.model_file, Checkpoint.open(str(model_dir))
    swapped = OpenedFile(path).vocabulary
    swapped.tokens[300], swapped.tokens[301] = swapped.tokens[301], swapped.tokens[300]
    monkeypatch.setattr(OpenedFile, "vocabulary", swapped)
    with refused(FormatError, str(path), "tokens differ"):
        check_fit(path, checkpoint)
    del swapped.tokens[-1]
    with refused(FormatError, str(path), "has 319 tokens, the model 320"):
        check_fit(path, checkpoint)
