"""The steps of a run: the settings of each command, and what it reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from architectures.source import Source
from common.errors import ExportError
from common.sealed import write_sealed
from common.text_sources.names import DATASET, Sources, names_of
from common.typed_json import plain
from common.version import package_version, tool_version
from gguf_export.bundle import dense_beside, export
from gguf_export.gpu_split import split
from gguf_export.settings import ExportConfig
from pipeline.contents import files_in, model_files, source_files
from pipeline.layout import Layout
from pipeline.provenance import Making
from pipeline.settings import RunConfig
from pipeline.state import Step
from pipeline.text import TextPlan, text_files, write_held_out
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.setup import this_machine
from powerinfer_bridge.programs.build import build_directory
from powerinfer_bridge.verify.verification import ExportCheck, verify
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.reporting.report import report_predictors
from predictor.traces.store import TraceStore
from predictor.training.bounds import bound_of
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig
from prosparse.settings import SparsifyConfig
from report.figures.predictors import draw_report
from report.page import write_page
from report.settings import ReportConfig
from results.bench import BENCH
from results.predictors import PREDICTORS

Note = Callable[[str], None]
Inputs = Mapping[str, Callable[[], Iterable[Path]]]
_SPARSIFY = "sparsify"


_SPREAD = ("ray", "ray_cpus", "ray_gpus", "verbose")
"""Settings of the commands that can run on a cluster."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings of every command of a run; making them refuses what they refuse.

    Attributes:
        sparsify: None where it is not asked for.
        report: of the HTML page.
    """

    sparsify: SparsifyConfig | None
    collect: CollectConfig
    train: TrainConfig
    export: ExportConfig
    bench: BenchConfig
    report: ReportConfig

    @classmethod
    def of(cls, config: RunConfig, tokens: int, context: int) -> StepSettings:
        """Return them.

        Args:
            config: settings of the run.
            tokens: that traces are made of.
            context: longest window that text and model allow.

        Raises:
            PspError: a command's own refusal.
        """
        layout = Layout.of(config)
        model = str(layout.sparse_model) if config.sparsify else config.model
        spread: dict[str, Any] = {name: getattr(config, name) for name in _SPREAD}
        return cls(
            sparsify=_sparsify(config, layout, context) if config.sparsify else None,
            collect=CollectConfig(
                model=model,
                data=names_of(config.data),
                field=config.field,
                out=layout.traces,
                tokens=tokens,
                context=context,
                batch=config.batch,
                dtype=config.dtype,
                chat_template=config.chat_template,
                weights=config.weights,
                device=config.device,
                seed=config.seed,
                **spread,
            ),
            train=TrainConfig(
                traces=layout.traces,
                out=layout.predictors,
                recipe=config.recipe,
                rank=config.rank,
                max_ppl_gap=config.max_ppl_gap,
                ffn_bytes=config.ffn_bytes,
                predictor_type=config.predictor_type,
                outtype=config.outtype,
                model=model,
                device=config.device,
                seed=config.seed,
                **spread,
            ),
            export=ExportConfig(
                model=model,
                predictors=layout.predictors,
                out=layout.bundle.model_file,
                outtype=config.outtype,
                dense=config.dense,
                dense_arch=config.dense_arch,
                dense_type=config.dense_type,
                vram_budget=config.vram_budget,
                force=True,
            ),
            bench=_bench(config, layout, context),
            report=ReportConfig(directories=(config.out,), out=layout.page, force=True),
        )


def _sparsify(config: RunConfig, layout: Layout, context: int) -> SparsifyConfig:
    return SparsifyConfig(
        model=config.model,
        data=names_of(config.data),
        field=config.field,
        out=layout.sparse_model,
        schedule=config.schedule,
        eval_data=names_of(config.eval_data),
        context=context,
        batch=config.batch,
        learning_rate=config.learning_rate,
        device="cpu" if config.device == "cpu" else "auto",
        seed=config.seed,
    )


def _bench(config: RunConfig, layout: Layout, context: int) -> BenchConfig:
    real = config.powerinfer_bin is not None
    return BenchConfig(
        file=layout.bundle.model_file,
        powerinfer_bin=config.powerinfer_bin,
        vram_budget=config.vram_budget if real else None,
        dense_gguf=layout.bundle.dense_file if real and config.dense else None,
        data=names_of(config.eval_data or str(layout.held_out)),
        field=config.field if config.eval_data else "text",
        context=context,
        chunks=config.chunks,
        prompt=config.prompt,
        generate=config.generate,
        repeats=config.repeats,
        threads=config.threads,
        seed=config.seed,
        out=layout.bench,
    )


def steps_of(
    config: RunConfig, origin: Source, settings: StepSettings, text: TextPlan, note: Note
) -> list[Step]:
    """Return the steps of a run, in order.

    Args:
        config: settings of the run.
        origin: the model, as it was found.
        settings: those of the commands.
        text: how the text is used.
        note: takes the commands' lines for users.
    """
    layout = Layout.of(config)
    original, data = partial(source_files, origin), _texts("text", config.data, layout)
    model = partial(model_files, layout.sparse_model) if config.sparsify else original
    held = _texts("held-out text", config.eval_data, layout)
    traces = partial(_just, layout.traces / "manifest.json")
    predictors, bundle = partial(files_in, layout.predictors), partial(files_in, layout.export)
    steps = []
    if settings.sparsify is not None:
        made_of: Inputs = {"model": original, **data, **held}
        steps.append(_sparsify_step(settings.sparsify, layout, made_of, note))
    if text.held is not None:
        steps.append(_hold_out_step(config, text, layout, data))
        held = {"held-out text": partial(_just, layout.held_out)}
    report: Inputs = {
        "benchmark": partial(_just, layout.result),
        "predictors": predictors,
        "traces": traces,
    }
    return [
        *steps,
        _collect_step(settings, layout, {"model": model, **data}, note),
        _train_step(settings, layout, {"traces": traces, "model": model}, note),
        _export_step(settings, layout, {"predictors": predictors, "model": model}),
        _verify_step(settings, layout, {"bundle": bundle, "model": model}),
        _bench_step(settings, layout, {"bundle": bundle, **held, **_programs(config)}),
        _report_step(settings, layout, report, config.predictor_type),
    ]


def _sparsify_step(settings: SparsifyConfig, layout: Layout, inputs: Inputs, note: Note) -> Step:
    def work(resume: bool) -> None:
        from prosparse.training import sparsify
        from prosparse.training_log import read_log
        from report.figures.training_curves import draw_training

        making = Making.begin(replace(settings, resume=resume))
        sparsify(making.settings, note, told=True)  # by the plan
        making.sparsified()
        draw_training(settings.training, settings.out.name, read_log(settings.log))

    return Step(
        name=_SPARSIFY,
        settings=(settings,),
        inputs=inputs,
        made=(layout.sparse_model,),
        outputs=partial(model_files, layout.sparse_model),
        work=work,
    )


def _hold_out_step(config: RunConfig, text: TextPlan, layout: Layout, data: Inputs) -> Step:
    return Step(
        name="hold out text",
        settings=(),
        facts={"source": names_of(config.data), "field": config.field, **plain(text)},
        inputs=data,
        made=(layout.held_out,),
        outputs=partial(_just, layout.held_out),
        work=lambda resume: write_held_out(config, text, layout.held_out),
    )


def _collect_step(settings: StepSettings, layout: Layout, inputs: Inputs, note: Note) -> Step:
    return Step(
        name="collect",
        settings=(settings.collect,),
        inputs=inputs,
        made=(layout.traces,),
        outputs=partial(_just, layout.traces / "manifest.json"),
        work=lambda resume: _collect(replace(settings.collect, resume=resume), note),
    )


def _train_step(settings: StepSettings, layout: Layout, inputs: Inputs, note: Note) -> Step:
    return Step(
        name="train-predictor",
        settings=(settings.train,),
        facts={"bounded": bound_of(settings.train) is not None},
        chosen_last=("max_ppl_gap", "ffn_bytes"),
        inputs=inputs,
        made=(layout.predictors,),
        outputs=partial(files_in, layout.predictors),
        work=lambda resume: _train(replace(settings.train, resume=resume), note),
    )


def _export_step(settings: StepSettings, layout: Layout, inputs: Inputs) -> Step:
    return Step(
        name="export-gguf",
        settings=(settings.export,),
        facts={"name": layout.name},
        inputs=inputs,
        made=(layout.export,),
        outputs=partial(files_in, layout.export),
        work=lambda resume: _export(settings.export),
    )


def _verify_step(settings: StepSettings, layout: Layout, inputs: Inputs) -> Step:
    return Step(
        name="verify",
        settings=(),
        inputs=inputs,
        made=(layout.verified,),
        outputs=partial(_just, layout.verified),
        work=lambda resume: _verify(settings.export, layout.verified),
    )


def _bench_step(settings: StepSettings, layout: Layout, inputs: Inputs) -> Step:
    return Step(
        name="bench-powerinfer",
        settings=(settings.bench,),
        facts=_measured_by(),
        inputs=inputs,
        made=(layout.bench, layout.result),
        outputs=partial(_just, layout.result),
        work=lambda resume: BENCH.write(layout.out, bench(replace(settings.bench, resume=resume))),
    )


def _report_step(
    settings: StepSettings, layout: Layout, inputs: Inputs, predictor_type: str
) -> Step:
    return Step(
        name="report",
        settings=(settings.report,),
        facts={"predictor_type": predictor_type},
        inputs=inputs,
        made=(layout.predictor_report, layout.page),
        outputs=partial(_just, layout.predictor_report / PREDICTORS.name, layout.page),
        work=lambda resume: _report(settings, layout),
    )


def _export(config: ExportConfig) -> None:
    # `verify` runs the model as the next step.
    targets = (config.out, dense_beside(config.out))
    export(config, *(ExportCheck(config.model, target, most_bytes=0) for target in targets))
    if config.split is not None:
        split(config.split)


def _collect(config: CollectConfig, note: Note) -> None:
    making = Making.begin(config)
    if config.ray is None:
        making.traces(collect(config))  # what it would tell is in the plan
    else:
        making.traces(collect(config, note))


def _train(config: TrainConfig, note: Note) -> None:
    making = Making.begin(config)
    making.predictors(train_predictors(config, note), TraceStore.open(config.traces))


def _verify(config: ExportConfig, target: Path) -> None:
    report = verify(config.out, config.model)
    for name, outcome in report.checks.items():
        if not outcome.ok:
            raise ExportError(
                f"{config.out}: failed verification at '{name}' ({outcome.detail})",
                outcome.remedy or "see docs/verify.md",
            )
    write_sealed(target, report.document())


def _report(settings: StepSettings, layout: Layout) -> None:
    report_predictors(
        layout.predictor_report,
        TraceStore.open(layout.traces),
        PredictorArtifact.open(layout.predictors),
        draw=draw_report,
        force=True,
    )
    write_page(settings.report)


def _measured_by() -> dict[str, object]:
    """Return what a benchmark's figures hang on beside its files."""
    return {
        "machine": plain(this_machine().facts),
        "psp": tool_version(),
        "torch": package_version("torch"),
    }


def _programs(config: RunConfig) -> Inputs:
    if config.powerinfer_bin is None:
        return {}
    place = build_directory(config.powerinfer_bin, ("main",))
    return {"PowerInfer": partial(_just, place / "main", place / "perplexity")}


def _texts(role: str, sources: Sources, layout: Layout) -> Inputs:
    """Return the files of a text under their role; nothing if there are none, as of the hub's."""
    if all(name.startswith(DATASET) for name in names_of(sources)):
        return {}
    return {role: partial(text_files, sources, layout)}


def _just(*paths: Path) -> Iterator[Path]:
    yield from paths
