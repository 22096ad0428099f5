"""What `benchmarks.soak` breaks: psp's writing commands in small, and what is theirs alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from benchmarks.soak_writer import (
    Work,
    Writer,
    determined_by_run,
    determined_by_training,
    evaluated,
    in_place,
    measured,
    read_answers,
)
from common.documents import read_text
from common.errors import OutputError
from common.sealed import read_sealed
from evaluation.answers import DIRECTORY
from evaluation.settings import EvaluateConfig
from gguf_export.bundle import Bundle, export
from gguf_export.commit import finish_commit
from gguf_export.gpu_split import split
from gguf_export.manifest import check_outputs
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
from predictor.head.artifact import HeadArtifact
from predictor.head.inputs import INPUTS_INDEX, read_inputs
from predictor.head.run import train_head
from predictor.head.settings import HeadConfig
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from results.evaluation import EVALUATION

_PIECE = 500
"""Characters of a document."""

_FROM_ROWS = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}"}
_TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "end": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
"""Tasks of `evaluate`, as lm-eval's files have them."""


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

    @cached_property
    def _tasks(self) -> Path:
        """Twelve questions with choices and twelve texts to be ended, made of the text."""
        tasks = self.work / "in" / "tasks"
        tasks.mkdir()
        said = [json.loads(line)["text"] for line in Path(self.data[0]).read_text().splitlines()]
        rows = [
            {"text": text[:60], "choices": [text[60:75], text[90:105]], "answer": number % 2}
            for number, text in enumerate(said[:12])
        ]
        data = tasks / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, task in _TASKS.items():
            whole = {"task": name, **_FROM_ROWS, **task}
            whole["dataset_kwargs"] = {"data_files": {"test": str(data)}}
            (tasks / f"{name}.yaml").write_text(json.dumps(whole))
        return tasks

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
            "evaluate": self._evaluating,
            "head": self._training_head,
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
        yield from in_place("bench-powerinfer", bench, config, {"repeats": 2}, seen=measured)

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

        yield from in_place("run", run, config, {"tokens": 900}, seen=determined_by_run)

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

        from prosparse.training import MARKER, sparsify  # torch's trainer takes seconds to import
        from prosparse.training_log import read_log

        def read() -> None:
            read_sealed(config.out / MARKER, OutputError, "")
            read_log(config.log)

        told = tuple(Path(name).name for name in (MARKER, config.log))
        how: dict[str, Any] = {"seen": determined_by_training, "read": read, "vouched": told}
        yield from in_place("sparsify", sparsify, config, {"learning_rate": 1e-3}, **how)

    def _evaluating(self) -> Iterator[Writer]:
        from evaluation.run import evaluate

        config = EvaluateConfig(
            model=(self.model,),
            tasks=(str(self._tasks),),
            gguf=(self._file,),
            batch_size=4,
            device="cpu",
            output_path=self.work / "out" / "v" / "evaluation",
        )
        out = config.output_path
        assert out is not None

        def read() -> None:
            EVALUATION.read(out)
            for file in (out / DIRECTORY).iterdir():
                read_answers(file)

        evaluate(replace(config, output_path=None))  # imports what every child would, for seconds
        how: dict[str, Any] = {"seen": evaluated, "out": "output_path"}
        yield from in_place("evaluate", evaluate, config, {"limit": 4}, read=read, **how)
        kept = replace(config, log_samples=True, resume=True)
        more, fewer = partial(evaluate, kept), partial(evaluate, replace(kept, limit=4))
        yield Writer(
            name="evaluate --resume, more questions",
            place=out.parent,
            old=fewer,
            write=more,
            go_on=more,
            read=None,
            seen=evaluated,
        )

    def _training_head(self) -> Iterator[Writer]:
        config = HeadConfig(
            model=self.model,
            data=self.data,
            out=self.work / "out" / "h" / "head",
            tokens=1500,
            context=128,
            rank=32,
            max_ppl_gap=9.0,
            max_changed=1.0,
            force=True,
        )
        train_head(replace(config, out=self.work / "in" / "head"))  # imports likewise
        again = partial(train_head, config)
        resumed = partial(train_head, replace(config, force=False, resume=True))
        begun = config.out.with_name(f".{config.out.name}.new") / INPUTS_INDEX

        def read() -> None:
            HeadArtifact.open(config.out).read()
            read_inputs(config.out)

        def go_on() -> object:
            return resumed() if begun.exists() else again()

        common: dict[str, Any] = {"place": config.out.parent, "write": again, "read": read}
        yield Writer(name="head", old=None, go_on=resumed, **common)
        older = partial(train_head, replace(config, seed=1))
        yield Writer(name="head --force", old=older, go_on=go_on, **common)
