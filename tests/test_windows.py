"""Windows, shards, batches, segments and the holdout; a text that changes under resume."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from conftest import TEXT, ModelMaker, refused
from letters import BOS, Letters
from tokenizer_kinds import byte_level

from architectures.tokenizer import load_tokenizer
from architectures.windows import document_windows
from common.errors import DataError, TraceError
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.collection.windows import (
    Window,
    cut_batches,
    cut_shards,
    cut_windows,
    order_windows,
    segments_of,
    text_sha256,
)
from predictor.traces.holdout import hold_out
from predictor.traces.manifest import Progress, write_manifest
from predictor.traces.store import TraceStore


def lengths_of(windows: list[Window]) -> list[int]:
    return [len(window.tokens) for window in windows]


def random_windows(seed: int, count: int = 60, longest: int = 50) -> list[Window]:
    draw, windows, document = random.Random(seed), list[Window](), 0
    for number in range(count):
        document += draw.random() < 0.6
        windows.append(Window(document, [number, *range(draw.randrange(1, longest))]))
    return windows


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [2, 3, 10, 100])
@pytest.mark.parametrize("sizes", [[], [0], [1], [9, 0, 10, 18, 19, 1], [99, 100, 198]])
def test_windows_are_bos_and_all_tokens_of_one_document(sizes: list[int], context: int) -> None:
    documents = ["".join(chr(100 * n + i) for i in range(size)) for n, size in enumerate(sizes)]
    windows = list(cut_windows(documents, Letters(), context))
    joined: dict[int, list[int]] = {}
    for window in windows:
        assert window.tokens[0] == BOS
        assert 2 <= len(window.tokens) <= context
        joined.setdefault(window.document, []).extend(window.tokens[1:])
    assert joined == {n: Letters().encode(text) for n, text in enumerate(documents) if text}
    assert [w.document for w in windows] == sorted(w.document for w in windows)
    counts = Counter(window.document for window in windows)
    assert all(counts[n] == -(-size // (context - 1)) for n, size in enumerate(sizes))


def test_windows_of_a_real_tokenizer_begin_with_its_bos(model_dir: Path) -> None:
    tokenizer, documents = load_tokenizer(model_dir, 320), [TEXT * 3, "a", TEXT]
    windows = list(cut_windows(documents, tokenizer, 50))
    joined: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for window in windows:
        assert window.tokens[0] == 1
        assert 2 <= len(window.tokens) <= 50
        joined[window.document] += window.tokens[1:]
    assert joined == {n: tokenizer.encode(text) for n, text in enumerate(documents)}


def test_every_second_window_of_a_byte_level_vocabulary_begins_without_bos() -> None:
    """As PowerInfer begins all of its texts; what asks for the model's own windows has BOS."""

    class Bytes(Letters):
        byte_level = True

    documents = ["abcdefghij", "", "k", "lmnopqrst"]
    found = [(w.document, w.tokens) for w in cut_windows(documents, Bytes(), 4)]
    spelt = [(n, "".join("<" if t == BOS else chr(t) for t in tokens)) for n, tokens in found]
    assert spelt == [
        *((0, part) for part in ("<abc", "defg", "<hij")),
        (2, "k"),
        *((3, part) for part in ("<lmn", "opqr", "<st")),
    ]
    plain = [tokens for _, tokens in document_windows(documents, Bytes(), 4)]
    assert all(tokens[0] == BOS for tokens in plain)
    assert len(plain) == 8


@pytest.mark.parametrize("kind", ["GPT-2", "Falcon", "Llama-3"])
def test_byte_level_vocabularies_are_known(tmp_path: Path, kind: str) -> None:
    path = byte_level(tmp_path, kind, ["<s>", "</s>"])
    assert load_tokenizer(path, 600, {"bos_token_id": 0}).byte_level


def test_a_vocabulary_of_pieces_is_not_byte_level(model_dir: Path) -> None:
    assert not load_tokenizer(model_dir, 320).byte_level


def test_documents_are_read_as_windows_are_asked_for() -> None:
    read = []

    def documents() -> Iterator[str]:
        for number in range(10**9):
            read.append(number)
            yield "abc"

    shards = cut_shards(cut_windows(documents(), Letters(), 10), 8, 10**9)
    assert lengths_of(next(shards)) == [4, 4]
    assert len(read) <= 3


# --- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [30, 36])
@pytest.mark.parametrize("tokens", [1, 10, 35, 36, 37, 95, 96, 200])
def test_shards_are_whole_windows_of_at_least_the_rows_asked_for(tokens: int, rows: int) -> None:
    windows = [Window(number, list(range(12))) for number in range(8)]
    shards = list(cut_shards(windows, rows, tokens))
    sizes = [sum(len(window.tokens) for window in shard) for shard in shards]
    assert sum(sizes) == min(tokens, 96)
    assert all(rows <= size < rows + 12 for size in sizes[:-1])
    flat = [window for shard in shards for window in shard]
    assert flat[:-1] == windows[: len(flat) - 1]
    assert list(cut_shards([], rows, tokens)) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 100, 10**6])
def test_shards_of_uneven_windows_hold_the_first_tokens_in_order(rows: int, seed: int) -> None:
    windows = random_windows(seed)
    everything = [(w.document, token) for w in windows for token in w.tokens]
    for tokens in (1, 2, 500, len(everything) - 1, len(everything), len(everything) + 1):
        shards = list(cut_shards(iter(windows), rows, tokens))
        flat = [(w.document, token) for shard in shards for w in shard for token in w.tokens]
        assert flat == everything[:tokens]
        assert all(sum(lengths_of(shard)) >= rows for shard in shards[:-1])
        assert all(sum(lengths_of(shard[:-1])) < rows for shard in shards), "closed in time"
        assert all(window.tokens for shard in shards for window in shard)


# --- order and batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_by_length_and_else_as_it_was(seed: int) -> None:
    windows = random_windows(seed)
    ordered = order_windows(windows)
    assert lengths_of(ordered) == sorted(lengths_of(windows), reverse=True)
    for length in set(lengths_of(windows)):
        same = [window for window in windows if len(window.tokens) == length]
        assert [window for window in ordered if len(window.tokens) == length] == same
    assert order_windows(iter(windows)) == ordered


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tokens", [1, 49, 50, 51, 400, 10**6])
def test_batches_hold_all_windows_once_and_never_more_positions(tokens: int, seed: int) -> None:
    windows = order_windows(random_windows(seed))
    batches = [list(batch) for batch in cut_batches(windows, tokens)]
    assert [window for batch in batches for window in batch] == windows
    for batch, after in zip(batches, [*batches[1:], [Window(0, [])]], strict=True):
        longest = max(lengths_of(batch))
        assert len(batch) * longest <= tokens or len(batch) == 1
        assert (len(batch) + 1) * longest > tokens or after[0].tokens == []


def test_full_windows_go_through_in_batches_of_the_size_asked_for() -> None:
    windows = [Window(n, list(range(100))) for n in range(20)]
    assert [len(batch) for batch in cut_batches(windows, 8 * 100)] == [8, 8, 4]


def test_sorted_short_documents_cost_little_padding() -> None:
    windows = order_windows(random_windows(0, count=400))
    padded = sum(
        len(batch) * len(batch[0].tokens) - sum(lengths_of(list(batch)))
        for batch in cut_batches(windows, 8 * 50)
    )
    assert padded < 0.05 * sum(lengths_of(windows))


# --- segments and checksum -----------------------------------------------------------------------


def test_segments_join_neighbouring_windows_of_a_document() -> None:
    order = [(0, 5), (0, 3), (2, 3), (0, 2), (1, 2), (1, 1)]
    windows = [Window(document, [0] * rows) for document, rows in order]
    assert segments_of(windows) == ((0, 8), (2, 3), (0, 2), (1, 3))
    assert segments_of(iter(windows)) == segments_of(windows)
    assert segments_of([]) == ()


@pytest.mark.parametrize("seed", range(5))
def test_segments_name_the_document_of_every_row(seed: int) -> None:
    windows = order_windows(random_windows(seed))
    segments = segments_of(windows)
    rows = [window.document for window in windows for _ in window.tokens]
    assert [document for document, count in segments for _ in range(count)] == rows
    assert all(one[0] != other[0] for one, other in pairwise(segments))


def test_the_checksum_tells_tokens_order_and_cuts_apart() -> None:
    texts = [
        [[1, 2, 3, 4]],
        [[1, 2], [3, 4]],
        [[1], [2, 3, 4]],
        [[3, 4], [1, 2]],
        [[1, 2, 3]],
        [[1, 2, 3, 4], []],
        [[1, 2, 3, 5]],
        [[1, 2, 3, 4 + 2**32]],
        [[1, 2], [2, 3, 4]],
        [],
    ]
    digests = [text_sha256([Window(0, tokens) for tokens in text]) for text in texts]
    assert len(set(digests)) == len(texts)
    assert all(len(digest) == 64 for digest in digests)
    again = text_sha256(iter([Window(0, [1, 2]), Window(0, [3, 4])]))
    assert again == digests[1]


# --- the holdout ---------------------------------------------------------------------------------

UNEVEN = [[n, rows] for n, rows in enumerate([30, 7, 50, 1, 12, 25, 40, 33, 18, 9])]
SCATTERED = [[2, 30], [0, 5], [2, 7], [1, 50], [5, 1], [0, 12], [3, 25], [4, 40], [2, 1], [3, 9]]


def rows_by_document(segments: list[list[int]], held: torch.Tensor) -> dict[int, set[bool]]:
    """Return which of held and not held the rows of every document are."""
    found: dict[int, set[bool]] = {}
    parts = torch.split(held, [rows for _, rows in segments])
    for (document, _), part in zip(segments, parts, strict=True):
        found.setdefault(document, set()).update(part.tolist())
    return found


@pytest.mark.parametrize("segments", [UNEVEN, SCATTERED], ids=["uneven", "scattered"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.7])
def test_the_holdout_is_whole_documents_of_at_least_the_share(
    share: float, segments: list[list[int]]
) -> None:
    lengths = Counter[int]()
    for document, rows in segments:
        lengths[document] += rows
    chosen = set()
    for seed in range(20):
        held = hold_out(segments, share, seed)
        assert held.dtype == torch.bool
        assert len(held) == lengths.total()
        kinds = rows_by_document(segments, held)
        assert all(len(kind) == 1 for kind in kinds.values()), "a document is never divided"
        # At least the share, and no document more than that takes; something is left to train on.
        wanted, most = share * lengths.total(), max(lengths.values())
        everything_but_one = sum(kind == {False} for kind in kinds.values()) == 1
        assert int(held.sum()) < wanted + most
        assert int(held.sum()) >= wanted or everything_but_one
        assert not held.all()
        assert torch.equal(held, hold_out(segments, share, seed))
        chosen.add(tuple(held.tolist()))
    assert len(chosen) > (5 if len(lengths) > 6 else 2)


def test_the_holdout_depends_on_documents_and_not_on_where_their_rows_are() -> None:
    """Sorting windows by length must not change which documents are held out."""
    draw = random.Random(0)
    for seed in range(10):
        shuffled = draw.sample(SCATTERED, len(SCATTERED))
        before = rows_by_document(SCATTERED, hold_out(SCATTERED, 0.3, seed))
        assert rows_by_document(shuffled, hold_out(shuffled, 0.3, seed)) == before


def test_the_holdout_never_takes_everything_nor_nothing() -> None:
    for seed in range(10):
        for share in (1e-9, 0.9):
            assert int(hold_out([[3, 10], [8, 10]], share, seed).sum()) == 10


# --- a text that has changed ---------------------------------------------------------------------

Settings = Callable[..., CollectConfig]


def contents(directory: Path) -> dict[str, bytes]:
    """Return all files but the manifest, which names the text's file."""
    files = (path for path in directory.rglob("*.safetensors*"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))


def collect_half(run: CollectConfig) -> None:
    """Leave a store as a kill does that comes before the second manifest."""
    store = collect(run)
    write_manifest(
        store.place,
        store.header,
        Progress(shards=store.progress.shards[:1], weights=(), complete=False),
    )


TEXT_CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "a letter": lambda texts: [texts[0].replace("quick", "quack"), *texts[1:]],
    "order": lambda texts: [texts[1], texts[0], *texts[2:]],
    "one less": lambda texts: texts[1:],
    "one more": lambda texts: ["new", *texts],
    "shorter than what is recorded": lambda texts: texts[:1],
    "joined": lambda texts: [texts[0] + texts[1], *texts[2:]],
}


@pytest.mark.parametrize("change", TEXT_CHANGES)
def test_a_text_that_has_changed_is_refused_until_it_is_restored(
    traces: TraceStore, settings: Settings, long_data: Path, tmp_path: Path, change: str
) -> None:
    data = tmp_path / "text.jsonl"
    original = [json.loads(line)["body"] for line in long_data.read_text().splitlines()]
    write_texts(data, original)
    run = settings(tmp_path / "out", data=str(data), resume=True)
    collect_half(run)
    before = contents(run.directory)
    write_texts(data, TEXT_CHANGES[change](original))
    with refused(TraceError, str(run.out), f"{data} or the tokenizer has changed", "--force"):
        collect(run)
    assert contents(run.directory) == before
    write_texts(data, [*original, "text behind what is asked for"])
    collect(run)
    assert contents(run.directory) == contents(traces.path)


def test_document_boundaries_that_have_moved_are_noticed(
    settings: Settings, model_dir: Path, tmp_path: Path
) -> None:
    """Three full windows of one document, then the same windows as three documents."""
    tokenizer, data, text = (
        load_tokenizer(model_dir, 320),
        tmp_path / "d.jsonl",
        "dog " * 15 + "dog",
    )
    context, rest = len(tokenizer.encode(text)) + 1, [text] * 60
    one, three = [" ".join([text] * 3), *rest], [*[text] * 3, *rest]
    cuts = [list(cut_windows(texts, tokenizer, context)) for texts in (one, three)]
    assert text_sha256(cuts[0]) == text_sha256(cuts[1])
    write_texts(data, one)
    run = settings(tmp_path / "out", data=str(data), context=context, resume=True)
    collect_half(run)
    write_texts(data, three)
    with refused(TraceError, str(run.out), "has changed"):
        collect(run)


def test_a_tokenizer_that_has_changed_is_refused(
    make_model: ModelMaker, settings: Settings, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    run = settings(tmp_path / "out", model=str(model), tokens=2000, resume=True)
    collect_half(run)
    changed = tokenizer_bytes.replace("▁the".encode(), "▁teh".encode())
    assert changed != tokenizer_bytes
    (model / "tokenizer.model").write_bytes(changed)
    with refused(TraceError, "or the tokenizer has changed", "restore it"):
        collect(run)


def test_a_bad_line_amid_the_text_costs_nothing_that_is_recorded(
    traces: TraceStore,
    settings: Settings,
    long_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Damage that the first look did not meet, as behind very long words."""
    monkeypatch.setattr("predictor.collection.collect.look_at_documents", lambda *args: None)
    data, lines = tmp_path / "text.jsonl", long_data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:6], "not JSON\n", *lines[6:]]))
    run = settings(tmp_path / "out", data=str(data), resume=True)
    with refused(DataError, f"{data}:7", "not valid JSON"):
        collect(run)
    assert 0 < len(TraceStore.open(run.out).progress.shards) < 3
    assert not list(run.directory.rglob(".*"))
    data.write_text("".join(lines))
    collect(run)
    assert contents(run.directory) == contents(traces.path)


def test_a_text_without_a_token_ends_without_a_traceback(
    psp: Callable[..., Any], model_dir: Path, tmp_path: Path
) -> None:
    """Sentencepiece's usual normalisation leaves nothing of some characters."""
    model, data = Path(shutil.copytree(model_dir, tmp_path / "model")), tmp_path / "text.txt"
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20),
        model_writer=trained,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    (model / "tokenizer.model").write_bytes(trained.getvalue())
    data.write_text("\ufeff\u200b\n")
    paths = ("--model", model, "--data", data, "--out", tmp_path / "out")
    result = psp("collect", *paths, "--tokens", 10)
    assert result.exit_code == 1
    assert str(data) in result.stderr.splitlines()[-1]
