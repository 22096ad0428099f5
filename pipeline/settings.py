"""Settings of `psp run`: those of the single commands that decide what a user gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cluster.settings import RayAddress, RayCpus, RayGpus, Verbose
from common.errors import SettingsError
from common.settings import (
    Device,
    Field,
    Force,
    ModelName,
    Option,
    PowerInferBin,
    Resume,
    Seed,
    Threads,
    check_settings,
    option_of,
    text_option,
)
from common.text_sources.names import Sources, names_of, need_repeatable
from gguf_export.settings import ExportConfig
from powerinfer_bridge.benchmark.settings import BenchConfig
from predictor.collection.settings import CollectConfig
from predictor.training.settings import TrainConfig
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig

_TOKENS = 400_000


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a whole run.

    Attributes:
        name: of the PowerInfer file, without its ending; None takes the model's.
        schedule: stages of the sparsification, already scaled; only with `sparsify`.
    """

    model: ModelName
    data: Annotated[
        Sources, text_option("Text to trace the model on, and to train it on.", piped=False)
    ]
    field: Field = "text"
    out: Annotated[Path, Option("Directory for everything that is made.", "DIR")]
    eval_data: Annotated[
        Sources,
        text_option(
            "Held-out text for the benchmark.",
            unset="documents of --data that no trace is made of",
            piped=False,
        ),
    ] = ()
    name: Annotated[str | None, Option("Of the PowerInfer file.", "NAME", unset="the model's")] = (
        None
    )
    sparsify: Annotated[
        bool, Option("Make the model sparse first, as psp sparsify does; needs --eval-data.")
    ] = False
    schedule: Annotated[Schedule, option_of(SparsifyConfig, "schedule")] = SparsifyConfig.schedule
    learning_rate: Annotated[
        float, option_of(SparsifyConfig, "learning_rate", help="With --sparsify: its peak.")
    ] = SparsifyConfig.learning_rate
    tokens: Annotated[int, option_of(CollectConfig, "tokens")] = _TOKENS
    context: Annotated[
        int,
        option_of(
            CollectConfig,
            "context",
            help="Longest window of traces, training and perplexity, tokens.",
            least=8,
        ),
    ] = CollectConfig.context
    batch: Annotated[int, option_of(CollectConfig, "batch")] = CollectConfig.batch
    dtype: Annotated[str, option_of(CollectConfig, "dtype")] = CollectConfig.dtype
    chat_template: Annotated[str, option_of(CollectConfig, "chat_template")] = (
        CollectConfig.chat_template
    )
    weights: Annotated[str, option_of(CollectConfig, "weights")] = CollectConfig.weights
    recipe: Annotated[str, option_of(TrainConfig, "recipe")] = TrainConfig.recipe
    rank: Annotated[int | str | tuple[int, ...], option_of(TrainConfig, "rank")] = TrainConfig.rank
    max_ppl_gap: Annotated[float | None, option_of(TrainConfig, "max_ppl_gap")] = (
        TrainConfig.max_ppl_gap
    )
    ffn_bytes: Annotated[float | None, option_of(TrainConfig, "ffn_bytes")] = TrainConfig.ffn_bytes
    outtype: Annotated[str | None, option_of(ExportConfig, "outtype")] = ExportConfig.outtype
    predictor_type: Annotated[str, option_of(TrainConfig, "predictor_type")] = (
        TrainConfig.predictor_type
    )
    dense: Annotated[
        bool,
        option_of(
            ExportConfig,
            "dense",
            help="Also write NAME.dense.gguf; with --dense-arch llama time PowerInfer with it.",
        ),
    ] = ExportConfig.dense
    dense_arch: Annotated[str, option_of(ExportConfig, "dense_arch")] = ExportConfig.dense_arch
    dense_type: Annotated[str | None, option_of(ExportConfig, "dense_type")] = (
        ExportConfig.dense_type
    )
    vram_budget: Annotated[str | None, option_of(ExportConfig, "vram_budget")] = (
        ExportConfig.vram_budget
    )
    powerinfer_bin: PowerInferBin = None
    chunks: Annotated[int, option_of(BenchConfig, "chunks")] = BenchConfig.chunks
    prompt: Annotated[str, option_of(BenchConfig, "prompt")] = BenchConfig.prompt
    generate: Annotated[int, option_of(BenchConfig, "generate")] = BenchConfig.generate
    repeats: Annotated[int, option_of(BenchConfig, "repeats")] = BenchConfig.repeats
    device: Device = "auto"
    ray: RayAddress = None
    ray_cpus: RayCpus = 1
    ray_gpus: RayGpus = 0.0
    verbose: Verbose = False
    threads: Threads = 2
    seed: Seed = 0
    dry_run: Annotated[bool, Option("Print the plan and end; nothing is written.")] = False
    resume: Resume = False
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other; each step refuses its own."""
        check_settings(self, SettingsError)
        if self.resume and self.force:
            raise SettingsError("--resume goes on, --force begins anew", "pass one of them")
        texts = (*names_of(self.data), *names_of(self.eval_data))
        need_repeatable(texts, "psp run, which reads a text several times,", "pass a file")
        if self.sparsify and not self.eval_data:
            raise SettingsError(
                "--sparsify trains on all of --data, which leaves nothing to measure on",
                "pass --eval-data",
            )
        if not self.sparsify and self.schedule != SparsifyConfig.schedule:
            raise SettingsError("--schedule is for --sparsify", "pass both or none")
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise SettingsError(f"--name {self.name!r} is no file name", "pass one without a /")
