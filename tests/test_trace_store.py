"""Trace stores: interrupted runs, refused settings and outputs, damaged files, space on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import SHARD_ROWS, TEXT, ModelMaker, refused
from safetensors.torch import load_file, save_file

from common.errors import DataError, OutputError, TraceError
from common.sealed import SEAL
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.manifest import TraceHeader
from predictor.traces.store import TraceStore
from predictor.traces.summary import trace_summary

Settings = Callable[..., CollectConfig]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def copy(traces: TraceStore, tmp_path: Path) -> Path:
    """Return a copy of the traces that a test may damage."""
    return Path(shutil.copytree(traces.path, tmp_path / "copy"))


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def edit_manifest(directory: Path, change: Change) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest.pop(SEAL)
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


# --- resume with something else ------------------------------------------------------------------

OTHER_SETTINGS: list[tuple[str, str, object]] = [
    ("tokens", "tokens", 2999),
    ("context", "context", 99),
    ("batch", "batch", 4),
    ("seed", "seed", 1),
    ("dtype", "input_dtype", "bfloat16"),
    ("importance_bits", "importance_bits", 4),
    ("field", "field", "text"),
    ("data", "data", "other.txt"),
    ("chat_template", "chat_template", "minicpm"),
    ("layers", "layers", (1,)),
    ("shard_rows", "shard_rows", 512),
]


@pytest.mark.parametrize(("key", "name", "value"), OTHER_SETTINGS)
def test_resume_with_other_settings_is_refused(
    settings: Settings, copy: Path, key: str, name: str, value: object
) -> None:
    before = contents(copy)
    shown = repr(list(value) if isinstance(value, tuple) else value)
    with refused(TraceError, str(copy), name, shown, "same settings", "--force"):
        collect(settings(copy, resume=True, **{key: value}))
    assert contents(copy) == before


def test_no_setting_that_changes_the_bytes_is_left_out_above() -> None:
    known = {key for key, _, _ in OTHER_SETTINGS}
    elsewhere = {"model", "out", "weights", "device", "force", "resume"}
    elsewhere |= {"ray", "ray_cpus", "ray_gpus", "verbose"}
    assert {field.name for field in fields(CollectConfig)} == known | elsewhere


def test_a_store_that_was_begun_with_other_shards_goes_on_with_them(
    settings: Settings, copy: Path
) -> None:
    before = contents(copy)
    assert collect(settings(copy, resume=True, shard_rows=None)).header.shard_rows == SHARD_ROWS
    assert contents(copy) == before


def test_resume_with_another_model_is_refused(
    make_model: ModelMaker, settings: Settings, model_dir: Path, copy: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=1)
    with refused(TraceError, str(copy), "model", str(other), "--force"):
        collect(settings(copy, resume=True, model=str(other)))
    edit_manifest(copy, lambda manifest: manifest["header"].update(model=str(other)))
    with refused(TraceError, str(copy), "model_fingerprint", "--force"):
        collect(settings(copy, resume=True, model=str(other)))


# --- outputs -------------------------------------------------------------------------------------


def test_an_existing_output_needs_force(settings: Settings, copy: Path) -> None:
    (copy / "stray").write_text("old")
    before = contents(copy)
    with refused(OutputError, f"{copy} exists", "--resume", "--force", "another --out"):
        collect(settings(copy))
    assert contents(copy) == before
    collect(settings(copy, tokens=200, force=True))
    assert TraceStore.open(copy).rows == 200
    assert not (copy / "stray").exists()


@pytest.mark.parametrize("changes", [{"force": True}, {"resume": True}, {}])
def test_somebody_else_s_directory_is_never_touched(
    settings: Settings, tmp_path: Path, changes: dict[str, bool]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("precious")
    with refused(OutputError, str(tmp_path / "out"), "another --out"):
        collect(settings(tmp_path / "out", **changes))
    assert contents(tmp_path / "out") == {"precious": b"precious"}


@pytest.mark.parametrize("changes", [{"force": True}, {"resume": True}, {}])
def test_a_name_too_long_is_refused(settings: Settings, changes: dict[str, bool]) -> None:
    with refused(OutputError, "x" * 300, "File name too long"):
        collect(settings(Path("x" * 300), **changes))


def test_unreadable_text_costs_no_existing_store(
    settings: Settings, copy: Path, tmp_path: Path
) -> None:
    before = contents(copy)
    with refused(DataError, str(tmp_path / "gone.txt"), "check --data"):
        collect(settings(copy, data=str(tmp_path / "gone.txt"), force=True))
    assert contents(copy) == before
    with refused(DataError, str(tmp_path / "gone.txt")):
        collect(settings(tmp_path / "new", data=str(tmp_path / "gone.txt")))
    assert not (tmp_path / "new").exists()


# --- damaged manifests ---------------------------------------------------------------------------


def test_a_directory_without_traces_is_refused(tmp_path: Path) -> None:
    with refused(TraceError, str(tmp_path / "manifest.json"), "No such file", "'psp collect'"):
        TraceStore.open(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, [2]])
def test_another_schema_version_is_refused(settings: Settings, copy: Path, version: object) -> None:
    edit_manifest(copy, lambda manifest: manifest.update(schema_version=version))
    before = contents(copy)
    told = (str(copy), f"version is {version!r}", "reads 2", "again")
    with refused(TraceError, *told):
        TraceStore.open(copy)
    with refused(TraceError, *told):
        collect(settings(copy, resume=True))
    assert contents(copy) == before


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b"[" * 10**5, b"1" * 10**4],
    ids=["empty", "cut", "not UTF-8", "null", "array", "deep", "long number"],
)
def test_a_manifest_that_is_no_json_object_is_refused(copy: Path, text: bytes) -> None:
    (copy / "manifest.json").write_bytes(text)
    with refused(TraceError, str(copy / "manifest.json")):
        TraceStore.open(copy)


HEADER_TYPES = get_type_hints(TraceHeader)
WRONG: dict[object, list[object]] = {
    str: [None, 1, [], {}],
    int: [None, "1", [1], 1.5, {}, -1],
    float: [None, "0", [], {}],
    str | tuple[str, ...]: [None, 1, {}, [1], [None]],
    tuple[int, ...]: [None, "01", {}, 0, ["0"], [0.0], [None], [], [-1], [2], [0, 0]],
}


def accepts(directory: Path) -> bool:
    """Open a store and use all of it; whatever is refused must be refused in one line."""
    try:
        store = TraceStore.open(directory)
        trace_summary(store)
        store.check()
        store.holdout(0.1, 0)
        for layer in store.header.layers:
            store.layer(layer)
    except TraceError as error:
        return "\n" in str(error)
    return True


@pytest.mark.parametrize("key", HEADER_TYPES)
def test_a_header_without_a_key_or_with_a_wrong_value_is_refused(copy: Path, key: str) -> None:
    whole, accepted = (copy / "manifest.json").read_bytes(), []
    for value in ["absent", *WRONG[HEADER_TYPES[key]]]:
        manifest = json.loads(whole)
        manifest.pop(SEAL)
        manifest["header"].pop(key)
        if value != "absent":
            manifest["header"][key] = value
        (copy / "manifest.json").write_text(json.dumps(manifest))
        if accepts(copy):
            accepted.append(value)
    assert accepted == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("d_ff", 0), ("d_model", 0), ("n_layers", 0), ("input_dtype", "int8"), ("importance_bits", 3)],
)
def test_impossible_sizes_are_refused(copy: Path, key: str, value: object) -> None:
    edit_manifest(copy, lambda manifest: manifest["header"].update({key: value}))
    assert not accepts(copy)


WRONG_PROGRESS: dict[str, Change] = {
    "no header": lambda manifest: manifest.pop("header"),
    "header a list": lambda manifest: manifest.update(header=[]),
    "header with more": lambda manifest: manifest["header"].update(extra=1),
    "no progress": lambda manifest: manifest.pop("progress"),
    "progress null": lambda manifest: manifest.update(progress=None),
    "progress a list": lambda manifest: manifest.update(progress=[]),
    "no shards": lambda manifest: manifest["progress"].pop("shards"),
    "no complete": lambda manifest: manifest["progress"].pop("complete"),
    "shards null": lambda manifest: manifest["progress"].update(shards=None),
    "shards an object": lambda manifest: manifest["progress"].update(shards={}),
    "shards text": lambda manifest: manifest["progress"].update(shards=""),
    "a shard null": lambda manifest: manifest["progress"]["shards"].append(None),
    "a shard a list": lambda manifest: manifest["progress"]["shards"].append([]),
}


@pytest.mark.parametrize("change", WRONG_PROGRESS)
def test_a_damaged_manifest_is_refused(copy: Path, change: str) -> None:
    edit_manifest(copy, WRONG_PROGRESS[change])
    with refused(TraceError, str(copy / "manifest.json"), "damaged", "collect the traces again"):
        TraceStore.open(copy)


SEGMENTS: list[object] = [
    *(None, {}, "", "ab", 5, [5], [[0]], [[0, 1, 2]], [None], [], [{}], ["ab"]),
    *([[0, -1]], [[0, 0]], [[-1, 5]], [["0", 5]], [[0, 5.0]], [[0, True]], [[0, 10**30]]),
]


@pytest.mark.parametrize("segments", SEGMENTS, ids=repr)
def test_impossible_segments_are_refused(copy: Path, segments: object) -> None:
    edit_manifest(copy, lambda m: m["progress"]["shards"][1].update(segments=segments))
    with refused(TraceError, str(copy / "manifest.json"), "damaged", "collect the traces again"):
        TraceStore.open(copy)


@pytest.mark.parametrize("key", ["segments", "text_sha256", "sha256"])
def test_a_shard_entry_without_a_key_or_with_a_wrong_one_is_refused(copy: Path, key: str) -> None:
    whole = (copy / "manifest.json").read_bytes()
    for change in ("pop", "number", "null", "extra"):
        entry = json.loads(whole)
        entry.pop(SEAL)
        shard = entry["progress"]["shards"][0]
        value = shard.pop(key)
        if change != "pop":
            shard |= {key: {"number": 5, "null": None, "extra": value}[change]}
        if change == "extra":
            shard["other"] = 1
        (copy / "manifest.json").write_text(json.dumps(entry))
        with refused(TraceError, str(copy / "manifest.json"), "damaged", "again"):
            TraceStore.open(copy)


@pytest.mark.parametrize("change", ["one less", "one more", "rows moved", "a checksum"])
def test_a_manifest_of_other_shards_is_noticed(copy: Path, change: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest.pop(SEAL)
    shards = manifest["progress"]["shards"]
    if change == "one less":
        shards.pop(0)
    elif change == "one more":
        shards.append(shards[0])
    elif change == "rows moved":
        shards[0]["segments"][0][1] -= 1
        shards[1]["segments"][0][1] += 1
    else:
        shards[0]["sha256"] = shards[1]["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with refused(TraceError, str(copy), "collect the traces again"):
        TraceStore.open(copy).check()


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shard-00001", "weights"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "empty"])
def test_a_missing_or_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    file = copy / "layer-01" / f"{name}.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        damaged = {"truncated": file.read_bytes()[:-1], "garbage": b"garbage", "empty": b""}
        file.write_bytes(damaged[damage])
    store = TraceStore.open(copy)
    store.layer(0)
    uses: list[Callable[[], object]] = [store.check]
    if name == "weights":
        uses.append(lambda: store.weights(1))
    else:
        uses += [lambda: store.layer(1), lambda: trace_summary(store)]
    for use in uses:
        with refused(TraceError, str(file), "missing or damaged", "collect the traces again"):
            use()


@pytest.mark.parametrize("name", ["inputs", "active", "counts", "scale", "importance"])
@pytest.mark.parametrize("cut", [True, False], ids=["short", "absent"])
def test_a_shard_that_does_not_fit_the_manifest_is_named(copy: Path, name: str, cut: bool) -> None:
    file = copy / "layer-00" / "shard-00000.safetensors"
    tensors = load_file(file)
    whole = tensors.pop(name)
    if cut:
        tensors[name] = whole[1:].clone()
    save_file(tensors, file)
    for use in (lambda: TraceStore.open(copy).layer(0), TraceStore.open(copy).check):
        with refused(TraceError, str(file), "has shape", "collect the traces again"):
            use()


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("name", ["shard-00000", "shard-00002", "weights"])
def test_check_names_the_file_with_a_changed_byte(copy: Path, name: str, place: float) -> None:
    file = copy / "layer-01" / f"{name}.safetensors"
    TraceStore.open(copy).check()
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)
    with refused(TraceError, str(file), "collect the traces again"):
        TraceStore.open(copy).check()


@pytest.fixture
def even(settings: Settings, tmp_path: Path) -> TraceStore:
    """Return a store of two layers and two shards of as many rows: files of equal layouts."""
    data = tmp_path / "one.jsonl"
    data.write_text("".join(json.dumps({"body": TEXT * 30}) + "\n" for _ in range(2)))
    store = collect(settings(tmp_path / "even", data=str(data), tokens=2200))
    assert [shard.rows for shard in store.progress.shards] == [1100, 1100]
    return store


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("layer-00/shard-00000", "layer-01/shard-00000"),
        ("layer-00/shard-00000", "layer-00/shard-00001"),
        ("layer-01/shard-00001", "layer-00/shard-00000"),
        ("layer-00/weights", "layer-01/weights"),
    ],
)
def test_files_that_have_changed_places_are_noticed(even: TraceStore, one: str, other: str) -> None:
    first, second = (even.path / f"{name}.safetensors" for name in (one, other))
    even.check()
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with refused(TraceError, str(even.path), "collect the traces again"):
        TraceStore.open(even.path).check()


@pytest.mark.parametrize("documents", [0, 1])
def test_a_holdout_needs_two_documents(settings: Settings, tmp_path: Path, documents: int) -> None:
    store = collect(settings(tmp_path / "out", tokens=50))
    if not documents:
        store.progress = replace(store.progress, shards=())
    with refused(TraceError, str(store.path), f"{documents} document", "at least 2", "--tokens"):
        store.holdout(0.1, 0)


def test_the_identity_tells_collections_apart(
    traces: TraceStore, settings: Settings, tmp_path: Path
) -> None:
    changes: list[dict[str, object]] = [
        {"tokens": 200},
        {"tokens": 201},
        {"tokens": 200, "seed": 1},
        {"tokens": 200, "dtype": "bfloat16"},
        {"tokens": 200, "importance_bits": 8},
        {"tokens": 200, "context": 50},
    ]
    stores = [collect(settings(tmp_path / f"{n}", **c)) for n, c in enumerate(changes)]
    identities = {store.identity for store in (traces, *stores)}
    assert len(identities) == 1 + len(changes)
    assert TraceStore.open(traces.path).identity == traces.identity


@pytest.mark.parametrize("layers", [(), (2,), (-1, 0), (0, 99)])
def test_layers_that_the_model_does_not_have_are_refused(
    settings: Settings, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    with refused(TraceError, "--layers", "layers 0 to 1"):
        collect(settings(tmp_path / "out", layers=layers))
    assert not (tmp_path / "out").exists()
