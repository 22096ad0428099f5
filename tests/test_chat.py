"""Chat formats: what a model is fed, and which format a checkpoint's own template is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import jinja2
import pyarrow
import pytest
from pyarrow import parquet

from common.chat import TEMPLATES, detect, render
from common.documents import read_documents
from common.errors import DataError

refused = partial(conftest.refused, DataError)

# The chat_template of the published MiniCPM checkpoints.
MINICPM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<用户>' + message['content'].strip() + '<AI>'}}{% else %}{{message['content'].strip()}}"
    "{% endif %}{% endfor %}"
)


def turns(*contents: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in contents]


CHATS = [
    turns(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")),
    turns(("system", "Be brief."), ("user", "q"), ("assistant", "a")),
    turns(("user", " \n q \t"), ("assistant", "\n\na b\n")),
    turns(("user", "only a question")),
    turns(("assistant", "an answer alone")),
    turns(("user", "q"), ("user", "q again"), ("assistant", "")),
    turns(("user", "<用户>nested<AI>"), ("assistant", "{{ 7 * 6 }} naïve 測試")),
]


CHAT = CHATS[0][:2]


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write rows in the kind that the suffix names."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    return str(path)


def test_minicpm_conversations_are_question_and_answer_in_turn() -> None:
    assert render(CHATS[0], "minicpm", "f:1") == "<用户>q1<AI>a1<用户>q2<AI>a2"


def test_a_system_message_stands_bare_before_the_first_question() -> None:
    assert render(CHATS[1], "minicpm", "f:1") == "Be brief.<用户>q<AI>a"


@pytest.mark.parametrize("chat", CHATS)
def test_minicpm_is_what_the_published_template_gives(chat: list[dict[str, str]]) -> None:
    assert render(chat, "minicpm", "f:1") == jinja2.Template(MINICPM).render(messages=chat)


@pytest.mark.parametrize("text", ["What is it?", " \n stripped \n", "<AI> 測試"])
def test_a_text_is_a_single_question_to_minicpm(text: str) -> None:
    published = jinja2.Template(MINICPM).render(messages=turns(("user", text)))
    assert render(text, "minicpm", "f:1") == published == f"<用户>{text.strip()}<AI>"


@pytest.mark.parametrize("text", ["", " \n", "  as it is \r\n", "<用户>{{ 7 * 6 }}<AI>"])
def test_without_a_template_text_is_left_alone(text: str) -> None:
    assert render(text, "none", "f:1") == text


@pytest.mark.parametrize("value", ["", " \n", [], turns(("user", " "), ("assistant", ""))])
def test_what_holds_no_text_stays_empty(value: object) -> None:
    assert render(value, "minicpm", "f:1") == ""


def test_further_keys_of_a_message_do_not_matter() -> None:
    message = {"role": "user", "content": "q", "name": "Ann", "tool_calls": None}
    assert render([message], "minicpm", "f:1") == "<用户>q<AI>"


@pytest.mark.parametrize("value", [CHATS[0], [], ["a"]])
def test_a_list_without_a_template_is_refused(value: list[object]) -> None:
    with refused("f:1", "list", "--chat-template minicpm"):
        render(value, "none", "f:1")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("value", [None, 3, {"role": "user", "content": "q"}, b"q", ("q",)])
def test_what_is_neither_text_nor_list_is_refused(template: str, value: object) -> None:
    with refused("f:1", f"holds {type(value).__name__}", "neither text nor messages", "mend"):
        render(value, template, "f:1")


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ("q", ["is str", "role and content"]),
        (None, ["is NoneType"]),
        (["user", "q"], ["is list"]),
        ({}, ["role is missing", "system, user, assistant"]),
        ({"from": "human", "value": "q"}, ["role is missing"]),
        ({"role": "human", "content": "q"}, ["role is 'human'", "system, user, assistant"]),
        ({"role": "tool", "content": "q"}, ["role is 'tool'"]),
        ({"role": None, "content": "q"}, ["role is None"]),
        ({"role": ["user"], "content": "q"}, ["role is ['user']"]),
        ({"role": "x\n" * 1000, "content": "q"}, ["role is 'x\\nx"]),
        ({"role": "user"}, ["content is missing", "expected text"]),
        ({"role": "user", "content": None}, ["content is NoneType", "expected text"]),
        ({"role": "user", "content": [{"type": "text", "text": "q"}]}, ["content is list"]),
    ],
)
def test_another_shape_of_message_is_refused_by_its_number(
    message: object, parts: list[str]
) -> None:
    with refused("f:1, message 1", *parts, "mend the row"):
        render([{"role": "user", "content": "fine"}, message], "minicpm", "f:1")


def test_a_role_of_any_length_is_refused_in_a_short_line() -> None:
    with pytest.raises(DataError) as error:
        render([{"role": "x" * 10_000, "content": "q"}], "minicpm", "f:1")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("template", ["", "auto", "MiniCPM", "chatml"])
def test_an_unknown_template_is_refused_with_the_known_ones(template: str) -> None:
    with refused(template, "unknown chat template", *TEMPLATES):
        render("text", template, "f:1")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "none"),
        (MINICPM, "minicpm"),
        ("{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}", None),
        ("", None),
    ],
    ids=["absent", "minicpm", "chatml", "empty"],
)
def test_a_checkpoints_template_is_known_by_its_markers(
    template: str | None, name: str | None
) -> None:
    assert detect(template) == name
    assert name is None or name in TEMPLATES


def test_a_checkpoints_template_is_never_run() -> None:
    assert detect("<用户>{{ 1 / 0 }}{% for %}") == "minicpm"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_conversations_need_a_chat_template(tmp_path: Path, suffix: str) -> None:
    source = write_rows(tmp_path / f"a.{suffix}", [{"messages": CHAT}])
    with refused(source, "'messages'", "--chat-template minicpm"):
        list(read_documents(source, "messages"))
    assert list(read_documents(source, "messages", "minicpm")) == ["<用户>q1<AI>a1"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_texts_are_put_into_the_chat_template(tmp_path: Path, suffix: str) -> None:
    source = write_rows(
        tmp_path / f"a.{suffix}", [{"text": " one\n"}, {"text": " "}, {"text": "two"}]
    )
    documents = ["<用户>one<AI>", "<用户>two<AI>"]
    assert list(read_documents(source, template="minicpm")) == documents


def test_text_files_are_put_into_the_chat_template(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a question?\n\n")
    assert list(read_documents(str(tmp_path / "a.txt"), template="minicpm")) == [
        "<用户>a question?<AI>"
    ]


def test_a_broken_conversation_is_named_by_row_and_message(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": [*CHAT, {"from": "human", "value": "q"}]}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    documents = read_documents(source, "messages", "minicpm")
    assert next(documents) == "<用户>q1<AI>a1"
    with refused(f"{source}:2", "'messages'", "message 2", "role is missing"):
        next(documents)


def test_half_a_surrogate_pair_is_refused_in_texts_and_conversations(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "\ud800"}]
    source = write_rows(tmp_path / "a.jsonl", [{"text": "x\udfff", "chat": chat}])
    with refused(f"{source}:1", "'text'", "surrogate", "mend the text"):
        list(read_documents(source))
    with refused(f"{source}:1", "'chat'", "surrogate", "mend the text"):
        list(read_documents(source, "chat", "minicpm"))


def test_a_directory_of_files_is_a_dataset(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}])
    documents = list(read_documents(f"hf:{tmp_path}", "messages", "minicpm"))
    assert documents == ["<用户>q1<AI>a1", "<用户>q1<AI>"]
