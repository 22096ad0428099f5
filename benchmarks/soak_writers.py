"""What `benchmarks.soak` breaks: psp's writing commands in small, and what is theirs alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from common.documents import read_text
from common.errors import ResultError
from common.outputs import kept_beside
from common.provenance import PROVENANCE
from common.sealed import read_sealed
from gguf_export.bundle import Bundle, export
from gguf_export.commit import finish_commit
from gguf_export.gpu_split import split
from gguf_export.manifest import MANIFEST, check_outputs
from gguf_export.pwri.gpu_index import index_path
from gguf_export.settings import SUFFIX, ExportConfig, SplitConfig
from pipeline.plan import prepare
from pipeline.run import execute
from pipeline.settings import RunConfig
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from results.bench import BENCH

_PIECE = 500
"""Characters of a document."""

_MADE_BY_RUN = ("held-out.jsonl", "traces/", "predictors/", "export/", "verify.json")
"""What in a run's directory does not hold times or speeds."""

_MEASURED = ("layers", "ppl_dense", "ppl_sparse", "continuations", "prompts", "settings")
"""What in a benchmark does not."""

Files = dict[str, bytes]
Work = Callable[[], object]


def everything(directory: Path) -> Files:
    """Return all files by name, but for what is hidden."""
    found = (path for path in directory.rglob("*") if path.is_file())
    names = ((path, str(path.relative_to(directory))) for path in found)
    return {name: path.read_bytes() for path, name in names if "/." not in f"/{name}"}


def determined(directory: Path) -> Files:
    """Return what readers see, but for what tells the time."""
    found = everything(directory)
    return {name: data for name, data in found.items() if not name.endswith((PROVENANCE, MANIFEST))}


def determined_by_run(directory: Path) -> Files:
    """Return what a run makes, but for what was timed."""
    found = determined(directory)
    return {
        name: data
        for name, data in found.items()
        if name.partition("/")[2].startswith(_MADE_BY_RUN)
    }


def determined_by_training(directory: Path) -> Files:
    """Return a sparsified model, without what its training tells."""
    found = determined(directory)
    return {name: data for name, data in found.items() if "/training/" not in f"/{name}"}


def measured(directory: Path) -> Files:
    """Return a benchmark's document, but for what was timed."""
    found = {}
    for file in sorted(directory.glob(f"[!.]*/{BENCH.name}")):
        document = read_sealed(file, ResultError, "")
        known = {name: document[name] for name in _MEASURED} | {"rows": len(document["samples"])}
        found[str(file.relative_to(directory))] = json.dumps(known).encode()
    return found


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A command in one directory.

    Attributes:
        name: for counts.
        place: where it writes, and nothing else lies.
        old: makes what is there before, None where nothing is.
        write: the command.
        go_on: what a user runs after a kill.
        read: looks at what is there as the next reader would, None where nobody looks at bytes.
        seen: returns what is determined of a place.
        in_place: the directory beside which the old one is kept meanwhile, None if the old one
            stays until the end.
    """

    name: str
    place: Path
    old: Work | None
    write: Work
    go_on: Work
    read: Work | None
    seen: Callable[[Path], Files] = determined
    in_place: Path | None = None

    @property
    def kept(self) -> Path | None:
        """Where the old directory is kept at this moment, None if it is not."""
        kept = None if self.in_place is None else kept_beside(self.in_place)
        return kept if kept is not None and kept.exists() else None

    def look(self) -> None:
        """Let the next command finish what it would."""
        for file in self.place.glob(f".*{SUFFIX}.commit"):
            finish_commit(file.with_name(file.name[1:].removesuffix(".commit")))


class Workshop:
    """What commands read, made when the first of them asks, and the commands."""

    def __init__(self, model: str, data: str, work: Path) -> None:
        """Begin with nothing.

        Args:
            model: a small checkpoint.
            data: text.
            work: an empty directory.
        """
        self.model, self.work = model, work
        cut = work / "in" / "text.jsonl"
        cut.parent.mkdir(parents=True)
        text = read_text(data)
        pieces = (text[at : at + _PIECE] for at in range(0, 40 * _PIECE, _PIECE))
        cut.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
        self.data = (str(cut),)

    @property
    def _collect(self) -> CollectConfig:
        return CollectConfig(
            model=self.model,
            data=self.data,
            out=self.work / "in" / "traces",
            tokens=1500,
            context=128,
            shard_rows=300,
            force=True,
        )

    @cached_property
    def _train(self) -> TrainConfig:
        out = self.work / "in" / "p"
        traces = collect(self._collect).path
        return TrainConfig(traces=traces, out=out, rank=32, recipe="svd", ffn_bytes=0.5, force=True)

    @cached_property
    def _predictors(self) -> list[Path]:
        names = ((seed, self.work / "in" / f"p{seed}") for seed in (0, 1))
        configs = [replace(self._train, out=out, seed=seed) for seed, out in names]
        return [train_predictors(config).path for config in configs]

    @cached_property
    def _file(self) -> Path:
        out, predictors = self.work / "in" / f"m{SUFFIX}", self._predictors[0]
        export(ExportConfig(model=self.model, predictors=predictors, out=out, force=True))
        return out

    def writers(self, only: Collection[str] = ()) -> list[Writer]:
        """Return the commands whose name begins with one of some words, all if there are none."""
        made: dict[str, Callable[[], Iterator[Writer]]] = {
            "collect": self._collecting,
            "train-predictor": self._training,
            "export-gguf": self._exporting,
            "gpu-split": self._splitting,
            "bench-powerinfer": self._benchmarking,
            "run": self._running,
            "sparsify": self._sparsifying,
        }
        chosen = only or tuple(made)
        return [
            writer
            for name, make in made.items()
            if any(word.startswith(name) for word in chosen)
            for writer in make()
            if any(writer.name.startswith(word) for word in chosen)
        ]

    def _collecting(self) -> Iterator[Writer]:
        config = replace(self._collect, out=self.work / "out" / "t" / "traces")

        def read() -> None:
            opened = TraceStore.open(config.out)
            opened.require_complete()
            for layer in opened.header.layers:
                opened.layer(layer)
                opened.weights(layer)

        older, again = replace(config, tokens=1800, seed=1), partial(collect, config)
        resumed = partial(collect, replace(config, force=False, resume=True))
        common: dict[str, Any] = {"place": config.directory.parent, "write": again, "read": read}
        yield Writer(name="collect", old=None, go_on=resumed, **common)
        yield Writer(name="collect --force", old=partial(collect, older), go_on=again, **common)

    def _training(self) -> Iterator[Writer]:
        config = replace(self._train, out=self.work / "out" / "p" / "predictors")

        def read() -> None:
            opened = PredictorArtifact.open(config.out)
            opened.require_complete()
            for layer in range(opened.header.n_layers):
                opened.layer(layer)
                opened.curves(layer)

        def training(**changes: Any) -> Work:
            return partial(train_predictors, replace(config, **changes))

        again, resumed = training(), training(force=False, resume=True)
        common: dict[str, Any] = {"place": config.out.parent, "read": read}
        name, looser = "train-predictor", {"ffn_bytes": 0.7}
        yield Writer(name=name, old=None, write=again, go_on=resumed, **common)
        older = training(**looser, seed=1)
        yield Writer(name=f"{name} --force", old=older, write=again, go_on=again, **common)
        name, older = f"{name} --resume, another bound", training(**looser)
        yield Writer(name=name, old=older, write=resumed, go_on=resumed, **common)

    def _exporting(self) -> Iterator[Writer]:
        out = self.work / "out" / "e" / f"m{SUFFIX}"

        def read() -> None:
            finish_commit(out)
            check_outputs(out, Bundle.beside(out).written)

        new, old = (
            partial(export, ExportConfig(model=self.model, predictors=each, out=out, force=True))
            for each in self._predictors
        )
        name = "export-gguf --force"
        yield Writer(name=name, place=out.parent, old=old, write=new, go_on=new, read=read)

    def _splitting(self) -> Iterator[Writer]:
        out, predictors = self.work / "out" / "s" / f"m{SUFFIX}", self._predictors[0]
        given = ExportConfig(model=self.model, predictors=predictors, out=out, force=True)
        small, large = (
            SplitConfig(file=out, vram_budget=budget, force=True) for budget in ("40MiB", "1GiB")
        )

        def old() -> None:
            export(given)
            split(small)

        def read() -> None:
            check_outputs(out, [*Bundle.beside(out).written, index_path(out)])

        new = partial(split, large)
        name = "gpu-split --force"
        yield Writer(name=name, place=out.parent, old=old, write=new, go_on=new, read=read)

    def _benchmarking(self) -> Iterator[Writer]:
        config = BenchConfig(
            file=self._file,
            data=self.data,
            out=self.work / "out" / "b" / "bench",
            context=64,
            chunks=1,
            generate=2,
            repeats=1,
            warm_up=0,
        )
        yield from _in_place("bench-powerinfer", bench, config, {"repeats": 2}, seen=measured)

    def _running(self) -> Iterator[Writer]:
        config = RunConfig(
            model=self.model,
            data=self.data,
            out=self.work / "out" / "r" / "run",
            name="m",
            tokens=1200,
            context=64,
            rank=32,
            chunks=1,
            generate=2,
            repeats=1,
            threads=1,
        )

        def run(config: RunConfig) -> object:
            silent: Callable[[str], None] = lambda line: None  # noqa: E731
            return execute(prepare(config, silent), silent)

        yield from _in_place("run", run, config, {"tokens": 900}, seen=determined_by_run)

    def _sparsifying(self) -> Iterator[Writer]:
        config = SparsifyConfig(
            model=self.model,
            data=self.data,
            out=self.work / "out" / "m" / "sparse",
            schedule=Schedule.of(("substitution", 0, 1), ("progressive", 50, 4)),
            context=32,
            batch=1,
            eval_windows=1,
            save_every=2,
            log_every=2,
            eval_every=4,
            device="cpu",
        )

        from prosparse.training import sparsify  # torch's trainer takes seconds to import

        changes = {"learning_rate": 1e-3}
        yield from _in_place("sparsify", sparsify, config, changes, seen=determined_by_training)


def _in_place(
    name: str,
    command: Callable[[Any], object],
    config: Any,
    changes: dict[str, Any],
    *,
    seen: Callable[[Path], Files],
) -> Iterator[Writer]:
    """Yield a command that writes in its place, anew and over what other settings made."""
    forced, resumed = replace(config, force=True), replace(config, resume=True)

    def go_on() -> object:
        begun = kept_beside(config.out).exists()
        return command(resumed if begun else forced)

    common: dict[str, Any] = {
        **{"place": config.out.parent, "in_place": config.out, "seen": seen, "read": None},
    }
    again, older = partial(command, forced), partial(command, replace(forced, **changes))
    fresh = partial(command, resumed)
    yield Writer(name=name, old=None, write=fresh, go_on=fresh, **common)
    yield Writer(name=f"{name} --force", old=older, write=again, go_on=go_on, **common)
