"""Tokenizers of every layout: the ids are Hugging Face's, and what cannot be used is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import sentencepiece
import tokenizers
from conftest import TEXT
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from architectures.tokenizer import chat_template_of, load_sentencepiece, load_tokenizer
from common.errors import CheckpointError

refused = partial(conftest.refused, CheckpointError)

ROWS, BOS = 400, 2
TEXTS = {
    "english": "The quick brown fox jumps over the lazy dog.",
    "code": "def f(x):\n\treturn {'a': [1, 22, 333]}  # it's\n\n\n    pass\r\n",
    "chinese": "预测神经元的激活，只算需要的部分。",
    "emoji": "🙂👩‍💻🏳️‍🌈 ok ☃",
    "spaces": "   leading, trailing  \t \n",
    "space": " ",
    "accents": "naïve Café — e\u0301 ﬁ \u00a0\u200b",
    "controls": "\x00\x07\x7f\ufeff\ufffd",
    "long": TEXT * 50,
    "special": "a</s> b <pad><s></s>c < / s>",
    "markers": "<用户>q<AI>a<|endoftext|>",
}


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    """A byte-level BPE whose tokens 0 to 2 are those of OPT: `<s>`, `<pad>`, `</s>`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, *TEXTS.values()] * 5, trainer)
    return tokenizer


@pytest.fixture
def json_dir(trained: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "json"
    path.mkdir()
    trained.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def pair_dir(trained: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json, as OPT is published."""
    path = tmp_path / "pair"
    path.mkdir()
    trained.model.save(str(path))
    settings = {"bos_token": {"content": "</s>", "__type": "AddedToken"}, "eos_token": "</s>"}
    settings |= {"unk_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "GPT2Tokenizer"}
    write(path / "tokenizer_config.json", settings)
    return path


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    write(path, document)


def load(path: Path, rows: int = ROWS) -> Any:
    return load_tokenizer(path, rows, {"bos_token_id": BOS})


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_tokenizer_json_gives_the_ids_of_transformers(json_dir: Path, text: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(json_dir / "tokenizer.json"))
    ids = load(json_dir).encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ids
    assert all(type(number) is int and 0 <= number < ROWS for number in ids)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_vocab_and_merges_give_the_ids_of_transformers(pair_dir: Path, text: str) -> None:
    from transformers import GPT2Tokenizer

    ids = load(pair_dir).encode(text)
    theirs = GPT2Tokenizer.from_pretrained(str(pair_dir))
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert theirs.decode(ids) == text


def test_an_empty_text_has_no_tokens(json_dir: Path, pair_dir: Path) -> None:
    assert load(json_dir).encode("") == load(pair_dir).encode("") == []


def test_what_a_file_adds_to_a_sequence_is_left_out(json_dir: Path) -> None:
    """No BOS from its post-processor, nothing cut and nothing padded from its last use."""
    plain = load(json_dir).encode(TEXT)
    tokenizer = tokenizers.Tokenizer.from_file(str(json_dir / "tokenizer.json"))
    template = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", BOS)])
    tokenizer.post_processor = template
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=999)
    tokenizer.save(str(json_dir / "tokenizer.json"))
    assert len(tokenizer.encode(TEXT).ids) == 999
    assert load(json_dir).encode(TEXT) == plain


def test_a_pair_without_further_files_is_enough(pair_dir: Path) -> None:
    expected = load(pair_dir).encode(TEXT)
    (pair_dir / "tokenizer_config.json").unlink()
    assert load(pair_dir).encode(TEXT) == expected
    assert load(pair_dir).bos_id() == BOS


def test_special_tokens_that_the_vocabulary_lacks_get_no_id(pair_dir: Path) -> None:
    change(pair_dir / "tokenizer_config.json", lambda c: c.update(pad_token="<new>", unk_token=3))
    ids = load(pair_dir).encode("a<new>b")
    assert len(ids) == len("a<new>b")
    assert max(ids) < len(json.loads((pair_dir / "vocab.json").read_text()))


def test_the_first_layout_of_several_is_taken(json_dir: Path, pair_dir: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(json_dir / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(pair_dir / "tokenizer.json"))
    assert load(pair_dir).encode("ABC") == load(json_dir).encode("abc") != []


def test_sentencepiece_needs_no_config_and_is_what_export_gets(model_dir: Path) -> None:
    processor = load_sentencepiece(model_dir, 320)
    assert isinstance(processor, sentencepiece.SentencePieceProcessor)
    tokenizer = load_tokenizer(model_dir, 320)
    assert tokenizer.encode(TEXT) == processor.encode(TEXT)
    assert tokenizer.bos_id() == processor.bos_id() == 1


def test_sentencepiece_is_refused_where_only_other_layouts_are(json_dir: Path) -> None:
    with refused(str(json_dir / "tokenizer.model"), "not found", "SentencePiece tokenizer.model"):
        load_sentencepiece(json_dir, ROWS)


@pytest.mark.parametrize("kept", [[], ["vocab.json"], ["merges.txt"]])
def test_a_checkpoint_without_a_tokenizer_is_refused(pair_dir: Path, kept: list[str]) -> None:
    for name in {"vocab.json", "merges.txt"} - set(kept):
        (pair_dir / name).unlink()
    names = ["tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"]
    with refused(str(pair_dir), "not found", *names, "add the model's"):
        load(pair_dir)


def test_a_tokenizer_may_fill_the_models_rows_but_not_exceed_them(
    json_dir: Path, pair_dir: Path, trained: tokenizers.Tokenizer
) -> None:
    size = trained.get_vocab_size(with_added_tokens=True)
    for path, name in ((json_dir, "tokenizer.json"), (pair_dir, "vocab.json")):
        assert load(path, size).encode("a")
        with refused(str(path / name), f"{size} tokens", f"{size - 1} rows", f"model's own {name}"):
            load(path, size - 1)


def test_a_tokens_id_beyond_the_models_rows_is_refused_however_few_tokens_there_are(
    json_dir: Path,
) -> None:
    change(json_dir / "tokenizer.json", lambda d: d["model"]["vocab"].update(far=ROWS))
    with refused(str(json_dir / "tokenizer.json"), f"{ROWS + 1} tokens", f"{ROWS} rows"):
        load(json_dir)


@pytest.mark.parametrize(
    ("config", "generation", "settings", "expected"),
    [
        ({"bos_token_id": 11}, {"bos_token_id": 12}, {"bos_token": "</s>"}, 2),
        ({"bos_token_id": 11}, {"bos_token_id": 12}, {"bos_token": "<new>"}, 11),
        ({"bos_token_id": 0}, {"bos_token_id": 12}, {}, 0),
        ({"bos_token_id": ROWS - 1}, None, None, ROWS - 1),
        ({"bos_token_id": None}, {"bos_token_id": 12}, None, 12),
        ({"bos_token_id": ROWS}, {"bos_token_id": 12}, None, 12),
        ({"bos_token_id": -1}, {"bos_token_id": 12}, None, 12),
        ({"bos_token_id": True}, {"bos_token_id": 12}, None, 12),
        ({"bos_token_id": [1]}, {"bos_token_id": 12}, None, 12),
        ({"bos_token_id": "1"}, {"bos_token_id": 12}, None, 12),
        ({}, {"bos_token_id": ROWS}, {"bos_token": "<pad>"}, 1),
        ({}, None, {"bos_token": "</s>"}, 2),
        ({}, None, {"bos_token": {"content": "</s>"}}, 2),
    ],
)
@pytest.mark.parametrize("layout", ["json", "pair"])
def test_the_tokenizer_names_bos_and_else_the_first_usable_number_does(
    request: pytest.FixtureRequest,
    layout: str,
    config: dict[str, Any],
    generation: object,
    settings: object,
    expected: int,
) -> None:
    path: Path = request.getfixturevalue(f"{layout}_dir")
    write(path / "generation_config.json", generation or {})
    write(path / "tokenizer_config.json", settings or {})
    assert load_tokenizer(path, ROWS, config).bos_id() == expected


@pytest.mark.parametrize(
    "settings", [None, {}, {"bos_token": None}, {"bos_token": "<bos>"}, {"bos_token": {"id": 2}}]
)
def test_a_tokenizer_without_bos_is_refused(json_dir: Path, settings: object) -> None:
    if settings is not None:
        write(json_dir / "tokenizer_config.json", settings)
    with refused(str(json_dir / "config.json"), "bos_token_id", "tokenizer_config.json", "add"):
        load_tokenizer(json_dir, ROWS)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_damaged_settings_are_refused(json_dir: Path, name: str, content: bytes) -> None:
    (json_dir / name).write_bytes(content)
    with refused(str(json_dir / name), "fetch the checkpoint again"):
        load_tokenizer(json_dir, ROWS)


DAMAGE = [b"", b"garbage", b"{}", b"[1]", b"\xff\xfe", b"\x00" * 1000, b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_tokenizer_json_is_refused(json_dir: Path, content: bytes) -> None:
    (json_dir / "tokenizer.json").write_bytes(content)
    with refused(str(json_dir / "tokenizer.json"), "fetch the checkpoint again"):
        load(json_dir)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("vocab.json", content) for content in DAMAGE if content != b"{}"),
        ("vocab.json", b"{}"),  # which lacks every token of the merges
        ("vocab.json", b'{"a": -1}'),
        ("vocab.json", b'{"a": "b"}'),
        ("merges.txt", b"a b c d\n"),
        ("merges.txt", b"\xff\xfe \xfd\n"),
        ("merges.txt", "中 文\n".encode()),
    ],
)
def test_a_damaged_pair_is_refused(pair_dir: Path, name: str, content: bytes) -> None:
    (pair_dir / name).write_bytes(content)
    with refused(str(pair_dir / "vocab.json"), "cannot be used", "fetch the checkpoint again"):
        load(pair_dir)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["model"].update(type="Unheard"),
        lambda d: d["model"].update(merges=[["a", "missing"]]),
        lambda d: d["model"].update(dropout=7),
        lambda d: d.update(pre_tokenizer={"type": "Whatever"}),
        # The library panics, which is no Exception in Python.
        lambda d: d["model"].update(continuing_subword_prefix="#" * 9),
        lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ],
    ids=["model", "merge", "dropout", "pre-tokenizer", "panic", "second panic"],
)
def test_a_tokenizer_json_that_contradicts_itself_is_refused(json_dir: Path, edit: Any) -> None:
    change(json_dir / "tokenizer.json", edit)
    with refused(str(json_dir / "tokenizer.json"), "cannot be used", "fetch the checkpoint again"):
        load(json_dir)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
        lambda d: (d.update(pre_tokenizer=None), d["model"].update(unk_token="<unk>")),
        lambda d: d.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    ],
    ids=["words", "unknown", "panic"],
)
def test_damage_that_shows_only_in_use_is_refused(json_dir: Path, edit: Any) -> None:
    change(json_dir / "tokenizer.json", edit)
    with refused(str(json_dir / "tokenizer.json"), "cannot be used", "fetch the checkpoint again"):
        load(json_dir).encode("中 text")


def test_a_cancelled_load_is_not_taken_for_damage(
    json_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cancelled:
        @staticmethod
        def from_buffer(data: bytes) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers, "Tokenizer", Cancelled)
    with pytest.raises(KeyboardInterrupt):
        load(json_dir)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, None),
        ({}, None),
        ({"chat_template": None}, None),
        ({"chat_template": "{{ '<用户>' }}"}, "{{ '<用户>' }}"),
        ({"chat_template": [{"name": "default", "template": "d"}]}, "d"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "t"},
                    {"name": "default", "template": "d"},
                ]
            },
            "d",
        ),
    ],
)
def test_the_chat_template_is_the_settings_one(
    tmp_path: Path, settings: object, expected: str | None
) -> None:
    if settings is not None:
        write(tmp_path / "tokenizer_config.json", settings)
    assert chat_template_of(tmp_path) == expected


def test_a_template_file_goes_before_the_settings(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer_config.json", {"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("{{ '测试' }}\n", encoding="utf-8")
    assert chat_template_of(tmp_path) == "{{ '测试' }}\n"


@pytest.mark.parametrize(
    "template",
    [3, {"name": "default"}, [], ["default"], [{"name": "tool_use", "template": "t"}]],
)
def test_a_chat_template_of_another_shape_is_refused(tmp_path: Path, template: object) -> None:
    write(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with refused(str(tmp_path / "tokenizer_config.json"), "chat_template", "--chat-template"):
        chat_template_of(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_damaged_template_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff")
    with refused(str(tmp_path / name), "fetch the checkpoint again"):
        chat_template_of(tmp_path)
