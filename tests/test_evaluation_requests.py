"""Requests as ids: BOS once in front of whatever reaches a model, and lm-eval's own cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import TEXT, refused
from families import BY_NAME, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import ranked
from tokenizer_kinds import write as write_json

from architectures.piece_tokenizer import PieceTokenizer
from architectures.tokenizer import load_tokenizer
from common.chat import render
from common.errors import SettingsError
from evaluation.answers import Answers
from evaluation.arms import Arm, Arms
from evaluation.asking import Asker
from evaluation.backends.backend import KINDS, RequestKind, Scoring
from evaluation.backends.texts import continuation_of
from evaluation.requests import Encoder, answer_in, decoding, merged, request_keys

ARGUMENTS: dict[RequestKind, list[tuple[Any, ...]]] = {
    "loglikelihood": [
        ("The quick brown", " fox"),
        ("The quick brown ", "fox"),
        ("", "The quick"),
        (" ", "x"),
        (TEXT * 9, " token"),
        ("def f(x):\n    ", "return"),
    ],
    "loglikelihood_rolling": [(TEXT,), (TEXT * 9,), ("x",)],
    "generate_until": [
        ("The quick brown", {"until": ["\n"], "max_gen_toks": 5}),
        ("def", {"until": ["\n"], "max_gen_toks": 5}),
        (TEXT * 9, {"until": [], "max_gen_toks": 3}),
    ],
}
LAYOUTS = ("tokenizer.model", "tokenizer.json", "both", "Llama-2", "OPT", "MiniCPM")


def directory(layout: str, path: Path, tokenizer_bytes: bytes) -> Path:
    """Write a small model with tokenizer files as published models of that kind have them."""
    family = {"OPT": "opt-125m", "MiniCPM": "minicpm"}.get(layout, "relu-llama")
    written = write(BY_NAME[family], path, tokenizer_bytes).path
    if layout in ("tokenizer.json", "both"):
        ranked(path / "made", tokenizer_bytes)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / "made" / name).rename(path / name)
    if layout == "tokenizer.json":
        (path / "tokenizer.model").unlink()
    if layout == "Llama-2":
        llama = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
        write_json(
            path, "tokenizer_config.json", {**llama, "bos_token": "<s>", "eos_token": "</s>"}
        )
    if layout == "MiniCPM":
        template = (
            "{% for message in messages %}{{'<用户>' + message['content'] + '<AI>'}}{% endfor %}"
        )
        write_json(path, "tokenizer_config.json", {"bos_token": "<s>", "chat_template": template})
    return written


@contextmanager
def rows_of(model: torch.nn.Module) -> Iterator[list[list[int]]]:
    """Keep every row of ids that reaches a model, without padding or what it wrote itself."""
    rows: list[list[int]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        past = kwargs.get("cache", kwargs.get("past_key_values"))  # the name goes by version
        if ids is None or (past is not None and past.get_seq_length()):
            return  # a token that was written
        for number, row in enumerate(ids.tolist()):
            kept = row if mask is None else [i for i, m in zip(row, mask[number], strict=True) if m]
            rows.append(kept)

    inner: Any = model.base_model
    hooks = [each.register_forward_pre_hook(keep, with_kwargs=True) for each in (model, inner)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def asker_of(path: Path, size: int = 4) -> tuple[Asker, Any]:
    arm = Arm(name="dense", kind="dense", model=str(path))
    arms = Arms([arm], device="cpu", dtype="auto")
    backend, _ = arms.open(arm)
    model: Any = backend
    return Asker(backend, arms.first.tokenizer, Answers(), size), model._model.loaded.causal_lm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bos_is_once_in_front_of_every_row_that_reaches_the_model(
    layout: str, kind: RequestKind, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    asker, model = asker_of(directory(layout, tmp_path / "model", tokenizer_bytes))
    arguments = ARGUMENTS[kind]
    if layout == "MiniCPM":
        messages = [{"role": "user", "content": "The quick brown"}]
        prompt = render(messages, "minicpm", "a prompt")
        assert prompt == "<用户>The quick brown<AI>"
        arguments = [(prompt, *each[1:]) if len(each) == 2 else each for each in arguments[:1]]
    with rows_of(model) as rows:
        answers = asker.ask(kind, arguments, "test")
    assert len(answers) == len(arguments)
    assert len(rows) >= len(arguments) - 1  # two of the requests are one run
    bos = asker.tokenizer.bos_id()
    limit = asker.backend.max_length
    for row in rows:
        assert row[0] == bos
        # A right-padded row ends in zeros, which are no BOS of any of these.
        assert row.count(bos) == 1, (layout, kind, row)
        assert len(row) <= limit


def test_a_text_that_begins_with_bos_gets_no_second_one(
    tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    for layout in LAYOUTS:
        path = directory(layout, tmp_path / layout, tokenizer_bytes)
        asker, _ = asker_of(path)
        written = asker.tokenizer.bos_text
        assert written
        encoder = asker.encoder
        assert encoder.scoring(f"{written}The quick", " fox") == encoder.scoring(
            "The quick", " fox"
        )
        assert encoder.prompt(f"{written}The", 4) == encoder.prompt("The", 4)


@pytest.fixture(scope="module")
def pieces(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> PieceTokenizer:
    path = tmp_path_factory.mktemp("pieces")
    (path / "tokenizer.model").write_bytes(tokenizer_bytes)
    found = load_tokenizer(path, 320, {})
    assert isinstance(found, PieceTokenizer)
    return found


TEXTS = st.text(st.sampled_from("ab \nthe.(x"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(context=TEXTS, continuation=TEXTS.filter(bool))
def test_pairs_are_cut_as_lm_eval_cuts_them(
    pieces: PieceTokenizer, context: str, continuation: str
) -> None:
    from lm_eval.api.model import TemplateLM

    class Theirs:
        backend = "causal"

        def tok_encode(self, text: str) -> list[int]:
            return [1, *pieces.encode(text)]

    ids, target = Encoder(pieces, 100).pair(context, continuation)
    if context.strip():
        theirs = TemplateLM._encode_pair(Theirs(), context, continuation)
        if theirs[1]:
            assert ([1, *ids], target) == theirs
        else:  # one token holds the end of both: nothing at all would be certain
            assert [1, *ids, *target] == [1, *pieces.encode(context + continuation)]
            assert len(target) == 1
    else:
        assert (ids, target) == ([], pieces.encode(context + continuation))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, 70), size=st.integers(3, 12))
def test_rolling_windows_score_every_token_once_with_bos_and_context(
    pieces: PieceTokenizer, length: int, size: int
) -> None:
    text = "a" * length
    tokens = pieces.encode(text)
    windows = Encoder(pieces, size).rolling(text)
    assert [token for each in windows for token in each.targets[0]] == tokens
    done = 0
    for number, each in enumerate(windows):
        target = each.targets[0]
        assert each.ids[0] == 1
        assert len(each.ids) <= size
        assert (
            list(each.ids[1:])
            == tokens[done + len(target) - len(each.ids) : done + len(target) - 1]
        )
        assert number == 0 or len(each.ids) > len(target)  # a token of context beside BOS
        done += len(target)


def test_long_contexts_lose_their_left_end_and_keep_bos(pieces: PieceTokenizer) -> None:
    encoder = Encoder(pieces, 16)
    whole = pieces.encode(TEXT + " fox")
    scoring = encoder.scoring(TEXT, " fox")
    assert scoring.ids == (1, *whole[-16:-1])
    assert len(scoring.ids) == 16
    assert encoder.shortened == 1
    prompt = encoder.prompt(TEXT, 6)
    assert prompt.ids == (1, *pieces.encode(TEXT)[-9:])
    assert TEXT.endswith(prompt.text)
    assert encoder.shortened == 2
    with refused(SettingsError, "longer than the model's context of 16", "leave out the task"):
        encoder.scoring("x", TEXT)
    with refused(SettingsError, "no room for a prompt", "leave out the task"):
        encoder.prompt("x", 15)


class Joining:
    """A tokenizer whose last token holds the end of a context and what follows."""

    bos_text = "<s>"

    def encode(self, text: str) -> list[int]:
        return {"": [], "ab": [5], "abc": [6], "xab": [4, 5], "xabc": [9], "abd": [5, 7]}[text]


def test_what_goes_into_the_last_token_of_a_context_is_not_certain() -> None:
    encoder = Encoder(cast(Any, Joining()), 16)
    assert encoder.pair("ab", "c") == ([], [6])
    assert encoder.pair("xab", "c") == ([], [9])
    assert encoder.pair("ab", "d") == ([5], [7])
    assert encoder.pair("ab", "") == ([5], [])


class Letters:
    """A tokenizer of a token a letter."""

    bos_text = "<s>"

    def bos_id(self) -> int:
        return 1

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))


def test_a_context_is_used_to_its_last_token() -> None:
    encoder = Encoder(cast(Any, Letters()), 4)
    assert len(encoder.scoring("", "abcd").ids) == 4
    with refused(SettingsError, "a continuation of 5 tokens is longer"):
        encoder.scoring("", "abcde")
    windows = encoder.rolling("abcdefghij")
    assert [len(each.ids) for each in windows] == [4, 4, 4]
    assert [len(each.targets[0]) for each in windows] == [4, 3, 3]


def test_what_one_run_scores_is_put_together() -> None:
    one, two = Scoring(ids=(1, 5), targets=((7,),)), Scoring(ids=(1, 5), targets=((8,),))
    longer = Scoring(ids=(1, 5), targets=((5, 7),))
    found = merged([one, longer, two])
    assert found == [
        (Scoring(ids=(1, 5), targets=((7,), (8,))), [0, 2]),
        (longer, [1]),
    ]


def test_generation_settings_leave_nothing_open() -> None:
    greedy = decoding({"until": ["\n", ""], "max_gen_toks": 7, "do_sample": False}, 3)
    assert (greedy.stop, greedy.max_new_tokens, greedy.temperature) == (("\n",), 7, 0.0)
    assert decoding({}, 0).temperature == 0
    assert decoding({"until": "x"}, 0).stop == ("x",)
    assert decoding({"do_sample": False, "temperature": 0.8}, 0).temperature == 0
    assert decoding({"do_sample": True}, 0).temperature == 1
    assert decoding({"temperature": 0.2, "top_p": 0.9, "top_k": 5}, 0).top_k == 5
    assert decoding({}, 0).max_new_tokens == 256
    with refused(SettingsError, "'num_beams' is none that psp knows"):
        decoding({"num_beams": 4}, 0)
    for odd in ({"until": 5}, {"temperature": 1e-40}, {"top_k": "many"}, ["until"]):
        with refused(SettingsError, "generation settings", "mend generation_kwargs"):
            decoding(cast(Any, odd), 0)
    with refused(SettingsError, "temperature is nan", "mend generation_kwargs of the task"):
        decoding({"do_sample": True, "temperature": float("nan")}, 0)
    with refused(SettingsError, "max_gen_toks is 0"):
        decoding({"max_gen_toks": 0}, 0)


def test_answers_end_at_the_first_stop_text_and_begin_behind_the_space() -> None:
    assert answer_in("one two three", "Q:", ("three", " tw")) == "one"
    assert answer_in("one", "Q:", ("x",)) == "one"
    assert answer_in("one", "Q:", ()) == "one"
    assert answer_in(" False", "A:", ("Q",)) == "False"
    assert answer_in("  False", "A:", ()) == " False"
    assert answer_in("    return x", "def f():\n", ("\ndef",)) == "    return x"
    assert answer_in(" x", "A: ", ()) == " x"
    assert answer_in(" x", "", ()) == " x"
    assert answer_in(" x", "A:", (" ",)) == ""


def test_keys_tell_requests_apart_and_number_equal_ones() -> None:
    keys = request_keys("loglikelihood", [("a", "b"), ("a", "c"), ("a", "b"), ("ab", "")])
    assert len(set(keys)) == 4
    assert request_keys("loglikelihood", [("a", "b")]) == keys[:1]
    assert request_keys("generate_until", [("a", "b")]) != keys[:1]
    assert request_keys("loglikelihood", [("a", "b"), ("a", "b")])[1] == keys[2]


def test_a_continuation_keeps_the_space_in_front(pieces: PieceTokenizer) -> None:
    prompt = [1, *pieces.encode("def f(x):\n")]
    whole = pieces.encode("def f(x):\n    return x")
    made = whole[len(prompt) - 1 :]
    assert [*prompt[1:], *made] == whole
    assert continuation_of(pieces, prompt, made) == "    return x"
    assert pieces.decode(made) == "   return x"
    assert continuation_of(pieces, prompt, []) == ""
