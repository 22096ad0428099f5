"""Any artifact of psp's, for readers: what it is, what it was made with, how two differ."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.decisions import mean_metrics
from common.errors import ResultError
from common.hashing import hash_files
from common.provenance import PROVENANCE, Made, Provenance, read
from common.sealed import read_sealed, seal_of
from common.table import fact_table, layer_table, table
from common.typed_json import plain
from common.urls import Url
from gguf_export.manifest import described

_LONGEST = 60
"""Characters of a value in a table of differences."""

_MOST = 100
"""Differences that a table names; the JSON document has all."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """An artifact.

    Attributes:
        path: where it is.
        kind: `traces`, `predictors`, `head`, `sparsified model`, `results` in a JSON document, or
            `file` for one in GGUF.
        facts: what it says of itself, JSON-ready.
        sealed: whether its index, or every result, states its own checksum; None of a `file`, whose
            manifest vouches for it.
        files: hash of each of its files, by name.
        provenance: what it was made with, None where that is not known.
    """

    path: str
    kind: str
    facts: dict[str, Any]
    sealed: bool | None
    files: dict[str, str]
    provenance: Provenance | None


def describe(path: Path | Url) -> Described:
    """Describe what psp made; every file is read once, for its hash.

    Of traces in an object store it is the manifest alone that is read and hashed.

    Args:
        path: a directory or file, or where traces are.

    Raises:
        PspError: it is none, or damaged.
    """
    if isinstance(path, Url):
        return _described_objects(path)
    kind, indices, facts = _facts(path)
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    own = [each for each in files if each.name != PROVENANCE]
    names = [str(each.relative_to(path)) if path.is_dir() else each.name for each in own]
    hashes = (each.xxh3_128 for each in hash_files(own))
    return Described(
        path=str(path),
        kind=kind,
        facts=facts,
        sealed=all(seal_of(each) is not None for each in indices) if indices else None,
        files=dict(zip(names, hashes, strict=True)),
        provenance=_provenance(path),
    )


def _described_objects(url: Url) -> Described:
    from predictor.traces.manifest import MANIFEST
    from predictor.traces.store import TraceStore
    from predictor.traces.summary import trace_summary

    store = TraceStore.open(url)
    with store.place.document(MANIFEST) as file:
        [hashed] = hash_files([file])
        sealed = seal_of(file) is not None
    made = None
    if store.place.has(PROVENANCE):
        with store.place.document(PROVENANCE) as file:
            made = read(file)
    return Described(
        path=str(url),
        kind="traces",
        facts=_without(trace_summary(store), "traces"),
        sealed=sealed,
        files={MANIFEST: hashed.xxh3_128},
        provenance=made,
    )


def _facts(path: Path) -> tuple[str, list[Path], dict[str, Any]]:
    """Return an artifact's kind, its documents that may be sealed, and what they say."""
    from gguf_export.pwri.inspection import inspect_file
    from predictor.artifact import PredictorArtifact
    from predictor.head.artifact import HeadArtifact
    from predictor.traces.store import TraceStore
    from predictor.traces.summary import trace_summary
    from prosparse.training import MARKER
    from report.runs import FILES
    from results.cluster import CLUSTER

    if not path.is_dir():
        return "file", [], inspect_file(path)
    if (index := path / "manifest.json").is_file():
        return "traces", [index], _without(trace_summary(TraceStore.open(path)), "traces")
    if (index := path / "predictors.json").is_file():
        return "predictors", [index], _predictors(PredictorArtifact.open(path))
    if (index := path / "head.json").is_file():
        head = HeadArtifact.open(path)
        return "head", [index], {"header": plain(head.header), "chosen": plain(head.chosen)}
    if (index := path / MARKER).is_file():
        facts = read_sealed(index, ResultError, "sparsify it again")
        return "sparsified model", [index], facts
    if results := [each for each in (*FILES, CLUSTER) if (path / each.name).is_file()]:
        facts = {each.path(path).stem: plain(each.read(path)) for each in results}
        return "results", [each.path(path) for each in results], facts
    raise ResultError(
        f"{path}: holds no traces, predictors, sparsified model or results",
        "pass a directory that psp made, or an exported file",
    )


def _without(document: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in names}


def _predictors(artifact: Any) -> dict[str, Any]:
    return {
        "header": plain(artifact.header),
        "complete": artifact.complete,
        "ranks": {str(layer): artifact.ranks[layer] for layer in sorted(artifact.ranks)},
        "dense": {str(layer): artifact.dense[layer] for layer in sorted(artifact.dense)},
        "search": plain(artifact.search),
        "layers": artifact.rows(),
        "mean": mean_metrics(list(artifact.layers.values())) if artifact.layers else None,
    }


def described_table(found: Described) -> str:
    """Return an artifact as text: facts, layers, and what it was made with."""
    layers = found.facts.get("layers")
    flat = {
        key.removeprefix("header."): value
        for key, value in _flat(_without(found.facts, "layers", "mean", "search", "ranks"))
    }
    if found.kind == "results":  # their tables are for the page
        flat = {key: value for key, value in flat.items() if "[" not in key}
    if found.sealed is False:
        flat["checksum"] = "none (an older psp made it)"
    parts = [fact_table({"what": found.kind, **{k: str(v) for k, v in flat.items()}})]
    if isinstance(layers, list) and layers:
        parts.append(layer_table(layers, found.facts.get("mean")))
    parts.append(_made(found.provenance))
    return "\n\n".join(parts)


def made_table(path: Path) -> str:
    """Return what an artifact was made with as text.

    Raises:
        ResultError: what is told of it is damaged.
    """
    return _made(_provenance(path))


def _provenance(path: Path) -> Provenance | None:
    if not path.is_dir():
        return described(path)
    return read(path / PROVENANCE) if os.path.lexists(path / PROVENANCE) else None


def _made(provenance: Provenance | None) -> str:
    if provenance is None:
        return "made with: not known (an older psp, or not psp, made it)"
    runs = (line for run in provenance.runs for line in _run_lines(run))
    sources = [
        f"  {each.role:<12} {each.name}" + (f"  ({each.identity[:16]})" if each.identity else "")
        for each in provenance.ingredients
    ]
    return "\n".join(["made with", *runs, *(["made from", *sources] if sources else [])])


def _run_lines(run: Made) -> Iterator[str]:
    commit = f", commit {run.commit[:12]}" if run.commit else ""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    more = ", went on with what earlier runs had begun" if run.resumed else ""
    yield f"  {run.begun} to {run.ended}  {run.command or 'from a program'}{more}"
    yield f"    psp {run.psp}{commit}; {versions}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something that is another in one of two artifacts; None where it is not there."""

    what: str
    one: object
    other: object


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two artifacts.

    Attributes:
        paths: of both.
        same_bytes: whether all files are the same.
        differences: in what they say and what they were made with.
        files: names of files that differ or that one has not.
    """

    paths: tuple[str, str]
    same_bytes: bool
    differences: tuple[Difference, ...]
    files: tuple[str, ...]


def compare(one: Described, other: Described) -> Comparison:
    """Say in what two artifacts differ.

    Raises:
        ResultError: they are things of different kinds.
    """
    if one.kind != other.kind:
        raise ResultError(
            f"{one.path} is {one.kind}, {other.path} is {other.kind}", "compare like with like"
        )
    facts = [dict(_flat({**each.facts, **_provenance_facts(each)})) for each in (one, other)]
    names = list(dict.fromkeys([*facts[0], *facts[1]]))
    differences = tuple(
        Difference(what=name, one=facts[0].get(name), other=facts[1].get(name))
        for name in names
        if facts[0].get(name) != facts[1].get(name)
    )
    every = sorted({*one.files, *other.files})
    if not Path(one.path).is_dir():  # two files, whatever their names
        same = list(one.files.values()) == list(other.files.values())
        changed = () if same else tuple(every)
    else:
        changed = tuple(name for name in every if one.files.get(name) != other.files.get(name))
    return Comparison(
        paths=(one.path, other.path),
        same_bytes=not changed,
        differences=differences,
        files=changed,
    )


def _provenance_facts(found: Described) -> dict[str, Any]:
    made = found.provenance
    if made is None:
        return {}
    last = made.runs[-1]
    return {
        "settings": made.settings,
        "made_with": {"psp": last.psp, "commit": last.commit, **last.versions},
        "made_from": {each.role: each.identity for each in made.ingredients},
    }


def comparison_table(found: Comparison) -> str:
    """Return it as text."""
    one, other = found.paths
    if found.same_bytes and not found.differences:
        return f"{one} and {other} are the same, byte for byte"
    rows = [[each.what, _cut(each.one), _cut(each.other)] for each in found.differences[:_MOST]]
    lines = [table(("differs in", one, other), rows)] if rows else []
    if (more := len(found.differences) - _MOST) > 0:
        lines.append(f"and in {more} more (--json has all)")
    if found.same_bytes:
        lines.append("all files are the same, byte for byte")
    else:
        lines.append(f"files that differ: {', '.join(found.files[:20])}")
        if (more := len(found.files) - 20) > 0:
            lines[-1] += f" and {more} more"
    return "\n".join(lines)


def _cut(value: object) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield what is nested under names with dots."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str) and _of_mappings(value):
        for number, each in enumerate(value):
            key = each.get("name", each.get("layer", number))
            yield from _flat(_without(dict(each), "name", "layer"), f"{name}[{key}]")
    else:
        yield name, value


def _of_mappings(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(each, Mapping) for each in values)
