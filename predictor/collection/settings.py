"""Settings of `psp collect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cluster.settings import RayAddress, RayCpus, RayGpus, Verbose
from common.chat import TEMPLATES
from common.errors import TraceError
from common.settings import (
    Device,
    Field,
    Force,
    ModelName,
    Option,
    Resume,
    Seed,
    check_settings,
    layers_option,
    text_option,
)
from common.text_sources.names import Sources
from common.urls import Url, path_or_url


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Settings of a collection.

    Attributes:
        shard_rows: rows after which a shard is closed; None goes by their size, or by a store that
            was begun.
    """

    model: ModelName
    data: Annotated[Sources, text_option("Text to run the model on.")]
    field: Field = "text"
    out: Annotated[
        Path | Url,
        Option("Directory for the traces, or s3://BUCKET/PREFIX.", "TRACES", parse=path_or_url),
    ]
    tokens: Annotated[int, Option("Tokens to record, in all.", least=1)]
    context: Annotated[int, Option("Longest window, tokens.", least=2)] = 512
    batch: Annotated[int, Option("Windows run at once.", least=1)] = 8
    dtype: Annotated[
        str, Option("How predictor inputs are stored.", choices=("float16", "bfloat16"))
    ] = "float16"
    importance_bits: Annotated[
        int,
        Option(
            "Bits an active neuron's importance takes; 8 can rank neurons, 0 stores none.",
            choices=(0, 2, 4, 8),
        ),
    ] = 2
    layers: Annotated[
        tuple[int, ...] | None,
        layers_option("Record these layers only, to go through the model in passes."),
    ] = None
    chat_template: Annotated[
        str,
        Option(
            "Put text in a chat model's format; auto: the model's own if psp knows it.",
            choices=("auto", *TEMPLATES),
        ),
    ] = "auto"
    weights: Annotated[
        str,
        Option(
            "Keep the model on the device, or read it block by block, or with --ray spread its "
            "blocks over several workers; auto: as it fits.",
            choices=("auto", "resident", "streamed", "pipelined"),
        ),
    ] = "auto"
    shard_rows: int | None = None
    device: Device = "auto"
    ray: RayAddress = None
    ray_cpus: RayCpus = 1
    ray_gpus: RayGpus = 0.0
    verbose: Verbose = False
    seed: Seed = 0
    resume: Resume = False
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse settings that record nothing."""
        check_settings(self, TraceError)
        if self.weights == "pipelined" and self.ray is None:
            raise TraceError("--weights pipelined needs several workers", "pass --ray too")

    @property
    def directory(self) -> Path:
        """Where traces go that go on a disk."""
        assert isinstance(self.out, Path)
        return self.out
