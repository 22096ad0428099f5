"""psp collect and psp traces: options, layers, space on disk, refused text, kills."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from conftest import TRACE_TOKENS, ModelMaker, refused

from architectures.checkpoint import Checkpoint
from common.errors import OutputError
from common.provenance import PROVENANCE
from common.sealed import SEAL
from predictor.collection.collect import collect, most_bytes, trace_header
from predictor.collection.settings import CollectConfig
from predictor.traces.store import TraceStore

_NEEDS = r"disk: needs at most ([\d.]+) kB, 1 GB free"

Psp = Callable[..., Result]
Settings = Callable[..., CollectConfig]


def contents(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    files = (path for path in found if path.name != PROVENANCE)  # of the time
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def size_of(directory: Path) -> int:
    return sum(len(data) for data in contents(directory).values())


@pytest.fixture
def copy(traces: TraceStore, tmp_path: Path) -> Path:
    """Return a copy of the traces that a test may damage."""
    return Path(shutil.copytree(traces.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def deep_model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep") / "model"
    return make_model(path, num_hidden_layers=4, intermediate_size=96)


@pytest.fixture
def run(psp: Psp, deep_model: Path, data_file: Path, tmp_path: Path) -> Psp:
    """Collect 300 tokens of a model of four layers to `out`."""

    def run(*arguments: object, data: object = data_file) -> Result:
        inputs = ("--model", deep_model, "--data", data, "--out", tmp_path / "out")
        return psp("collect", *inputs, "--tokens", 300, *arguments)

    return run


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(result: Result) -> str:
    """Check that a user error took one line, after what the command said it needs; return it."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    said = ("disk: needs ", "tokens: ", "psp export-gguf will refuse this model: ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(said)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def strict_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return document


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0-1", [0, 1]), ("3", [3]), ("3,0", [0, 3]), ("0-2,1-3", [0, 1, 2, 3]), (" 1 , 2-2", [1, 2])],
)
def test_layers_are_recorded_as_asked_for(
    run: Psp, tmp_path: Path, text: str, layers: list[int]
) -> None:
    document = strict_json(succeeded(run("--layers", text, "--json")))
    assert [layer["layer"] for layer in document["layers"]] == layers
    assert TraceStore.open(tmp_path / "out").header.layers == tuple(layers)
    directories = sorted(path.name for path in (tmp_path / "out").glob("layer-*"))
    assert directories == [f"layer-{layer:02d}" for layer in layers]


@pytest.mark.parametrize(
    "text", ["", "x", "1-", "-1", "2-1", "0,,1", "1.5", "\u0663", "0-999999", "1--2", "0 1"]
)
def test_layers_that_are_no_layers_are_wrong_usage(run: Psp, tmp_path: Path, text: str) -> None:
    result = run("--layers", text)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Invalid value for '--layers': " in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["4", "0-4", "0,99999"])
def test_layers_beyond_the_model_are_refused(run: Psp, tmp_path: Path, text: str) -> None:
    assert "--layers: the model has layers 0 to 3; " in error_of(run("--layers", text))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [0, 2, 4, 8])
def test_importance_takes_the_bits_asked_for(run: Psp, tmp_path: Path, bits: int) -> None:
    document = strict_json(succeeded(run("--importance-bits", bits, "--json")))
    assert document["importance_bits"] == bits
    (rows,) = TraceStore.open(tmp_path / "out").layer(0).pieces
    assert len(rows.importance) == -(-int(rows.counts.sum()) * bits // 8)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--importance-bits", 3), ("--weights", "both"), ("--chat-template", "x"), ("--tokens", 0)],
)
def test_a_value_that_is_no_choice_is_wrong_usage(run: Psp, option: str, value: object) -> None:
    result = run(option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': " in result.stderr.splitlines()[-1]


def test_streamed_weights_say_so_and_give_the_same_bytes(run: Psp, tmp_path: Path) -> None:
    kept = run("--weights", "resident")
    assert "streamed" not in kept.stderr
    before = contents(tmp_path / "out")
    streamed = run("--weights", "streamed", "--force")
    assert "weights: streamed block by block, " in streamed.stderr
    assert contents(tmp_path / "out") == before
    assert streamed.stdout == kept.stdout


@pytest.mark.parametrize(("own", "told"), [("<用户> it", "minicpm, as in"), ("[INST]", "does not")])
def test_the_model_s_own_chat_template_is_told(
    run: Psp, deep_model: Path, tmp_path: Path, own: str, told: str
) -> None:
    config = deep_model / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": own}))
    try:
        assert told in run().stderr
        assert "chat template" not in run("--chat-template", "none", "--force").stderr
    finally:
        config.unlink()


def test_a_chat_template_is_recorded_and_changes_the_rows(run: Psp, tmp_path: Path) -> None:
    succeeded(run())
    plain = TraceStore.open(tmp_path / "out")
    assert plain.header.chat_template == "none"
    succeeded(run("--chat-template", "minicpm", "--force"))
    chat = TraceStore.open(tmp_path / "out")
    assert chat.header.chat_template == "minicpm"
    assert chat.identity != plain.identity
    assert "chat_template 'minicpm', not 'none'" in error_of(run("--resume"))


# --- text ----------------------------------------------------------------------------------------


def test_data_that_ends_early_gives_a_complete_store_and_a_note(run: Psp, tmp_path: Path) -> None:
    document = strict_json(succeeded(run("--tokens", 10**6, "--json")))
    store = TraceStore.open(tmp_path / "out")
    store.require_complete()
    assert 100 < store.rows < 10**6
    assert document["tokens"] == store.rows
    again = run("--tokens", 10**6, "--resume")
    assert f"the data ended after {store.rows} tokens" in again.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("blank.jsonl", b"\n\n"),
        ("latin.txt", "caf\u00e9".encode("latin-1")),
        ("field.jsonl", b'{"other": "text"}\n'),
        ("cut.jsonl", b'{"text": "te'),
    ],
)
def test_unusable_text_costs_nothing(run: Psp, tmp_path: Path, name: str, content: bytes) -> None:
    succeeded(run())
    before = contents(tmp_path / "out")
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in error_of(run("--force", data=tmp_path / name))
    assert contents(tmp_path / "out") == before


def test_an_unknown_dataset_costs_nothing(
    run: Psp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("no such dataset\nand more")

    succeeded(run())
    before = contents(tmp_path / "out")
    monkeypatch.setattr("datasets.load_dataset_builder", unknown)
    assert "hf:no/such: cannot be loaded" in error_of(run("--force", data="hf:no/such"))
    assert contents(tmp_path / "out") == before


# --- psp traces ----------------------------------------------------------------------------------

FACTS = {
    *("traces", "complete", "tokens", "tokens_asked", "documents", "shards", "bytes", "layers"),
    *("model", "model_fingerprint", "architecture", "activation", "activation_threshold"),
    *("ffn_matrices", "n_layers", "d_model", "d_ff", "input_dtype", "importance_bits"),
    *("compute_dtype", "data", "field", "chat_template", "context", "batch", "shard_rows", "seed"),
    *("activation_sparsity", "skipped_rows"),
}


def test_info_says_what_collect_said(run: Psp, psp: Psp, tmp_path: Path) -> None:
    collected = strict_json(succeeded(run("--layers", "1-2", "--json")))
    info = ("traces", "info", tmp_path / "out")
    assert strict_json(succeeded(psp(*info, "--json"))) == collected
    assert set(collected) == FACTS
    assert (collected["complete"], collected["tokens"], collected["tokens_asked"]) == (
        True,
        300,
        300,
    )
    assert collected["bytes"] == size_of(tmp_path / "out")
    sparsity = [layer["activation_sparsity"] for layer in collected["layers"]]
    assert collected["activation_sparsity"] == pytest.approx(sum(sparsity) / 2)
    text = succeeded(psp(*info))
    for key, value in collected.items():
        if key != "layers":
            name = key.replace("_", " ")
            assert re.search(rf"^{name} +{re.escape(str(value))}$", text, re.MULTILINE), key
    for layer, value in zip((1, 2), sparsity, strict=True):
        assert re.search(rf"^{layer} +{100 * value:.2f}$", text, re.MULTILINE)


@pytest.mark.parametrize("shards", [0, 1])
def test_info_and_check_of_an_interrupted_store(psp: Psp, copy: Path, shards: int) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest.pop(SEAL)
    manifest["progress"]["complete"] = False
    del manifest["progress"]["shards"][shards:]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    rows = TraceStore.open(copy).rows
    document = strict_json(succeeded(psp("traces", "info", copy, "--json")))
    assert (document["complete"], document["tokens"]) == (False, rows)
    assert document["shards"] == shards
    assert [layer["layer"] for layer in document["layers"]] == [0, 1][: 2 * shards]
    text = succeeded(psp("traces", "info", copy))
    assert re.search(r"^complete +False$", text, re.MULTILINE)
    assert ("sparsity %" in text) == bool(shards)
    checked = succeeded(psp("traces", "check", copy))
    assert f"{rows} tokens are whole; interrupted, go on with 'psp collect --resume'" in checked


def test_check_says_what_it_has_checked(psp: Psp, traces: TraceStore) -> None:
    text = succeeded(psp("traces", "check", traces.path))
    assert text == f"{traces.path}: 8 files of {TRACE_TOKENS} tokens are whole; complete\n"
    document = strict_json(succeeded(psp("traces", "check", traces.path, "--json")))
    facts = {"complete": True, "tokens": TRACE_TOKENS, "files": 8}
    assert document == {"traces": str(traces.path), **facts}


@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.parametrize("file", ["manifest.json", "layer-01/shard-00002.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "a byte"])
def test_check_of_a_corrupt_store_exits_1_with_one_line(
    psp: Psp, copy: Path, file: str, damage: str, form: tuple[str, ...]
) -> None:
    data = (copy / file).read_bytes()
    if damage == "missing":
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(data[:-2] if damage == "cut" else b"\xff" + data[1:])
    assert str(copy / file) in error_of(psp("traces", "check", copy, *form))


@pytest.mark.parametrize("command", ["info", "check"])
def test_what_is_no_store_is_refused(
    psp: Psp, data_file: Path, tmp_path: Path, command: str
) -> None:
    for path in (tmp_path, tmp_path / "gone", data_file, Path("x" * 300)):
        assert str(path) in error_of(psp("traces", command, path))
    assert psp("traces", command).exit_code == 2


# --- space on disk -------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that so many bytes are free."""

    def pretend(size: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))

    return pretend


def needed(run: CollectConfig, done: int = 0) -> int:
    header = trace_header(run, Checkpoint.open(run.model), "none")
    return most_bytes(header, run.tokens - done)


def test_the_command_says_what_it_needs_before_it_starts(
    run: Psp, free: Callable[[int], None], tmp_path: Path
) -> None:
    free(10**9)
    lines = run().stderr.splitlines()
    assert lines[0] == "tokens: those of tokenizer.model, by sentencepiece"
    said = next(filter(None, (re.fullmatch(_NEEDS, line) for line in lines)))
    assert size_of(tmp_path / "out") <= 1000 * float(said[1]) < 2 * size_of(tmp_path / "out")


def test_a_disk_too_small_is_refused_and_nothing_touched(
    settings: Settings, copy: Path, tmp_path: Path, free: Callable[[int], None]
) -> None:
    before = contents(copy)
    free(999_999)
    parts = ("need up to 3.47 MB", "1 MB are free", "--tokens", "--layers", "another --out")
    with refused(OutputError, str(tmp_path / "new"), *parts):
        collect(settings(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    free(0)
    with refused(
        OutputError,
        str(copy),
        f"need up to {needed(settings(copy, tokens=30_000)) / 1e6:.1f} MB",
        "--layers",
    ):
        collect(settings(copy, tokens=30_000, force=True))
    assert contents(copy) == before


def test_exactly_what_is_needed_is_enough(
    settings: Settings, tmp_path: Path, free: Callable[[int], None]
) -> None:
    run = settings(tmp_path / "out", tokens=200)
    free(needed(run) - 1)
    with refused(OutputError, str(run.out)):
        collect(run)
    free(needed(run))
    collect(run)


def test_what_force_replaces_takes_its_place_until_then(
    settings: Settings, copy: Path, free: Callable[[int], None]
) -> None:
    run, before = settings(copy, tokens=4000, force=True), contents(copy)
    free(needed(run) - 1)
    with refused(OutputError, str(copy), "the old ones stay until the new ones are complete"):
        collect(run)
    assert contents(copy) == before
    free(needed(run))
    collect(run)
    assert contents(copy) != before


def test_what_a_link_points_to_is_replaced_and_does_not_count_as_free(
    settings: Settings, copy: Path, tmp_path: Path, free: Callable[[int], None]
) -> None:
    (tmp_path / "link").symlink_to(copy)
    run = settings(tmp_path / "link", force=True)
    free(needed(run) - 1)
    with refused(OutputError, str(copy)):
        collect(run)
    free(needed(run))
    before = contents(copy)
    collect(run)
    assert (tmp_path / "link").is_symlink()
    assert contents(copy) == before


def test_resume_needs_only_what_is_missing(
    settings: Settings, copy: Path, free: Callable[[int], None]
) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest.pop(SEAL)
    manifest["progress"] |= {"shards": manifest["progress"]["shards"][:2], "complete": False}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    run, before = settings(copy, resume=True), contents(copy)
    least = needed(run, TraceStore.open(copy).rows)
    assert least < needed(run) / 2
    free(least - 1)
    with refused(OutputError, str(copy)):
        collect(run)
    assert contents(copy) == before
    free(least)
    collect(run)
