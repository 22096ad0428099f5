"""A file's tensors on a Ray cluster: workers compare them with the model's, each another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.memory import PROCESS
from architectures.model_files import weight_files
from cluster.nodes import Worker
from cluster.pool import several_on_nodes
from cluster.session import cluster_for, path_on_nodes
from cluster.watch import Watch
from cluster.worker import Tell, Work
from gguf_files.reader import GGUFFile
from powerinfer_bridge.verify.comparison import CompareAll, Target, compare_tensor
from powerinfer_bridge.verify.settings import VerifyConfig

_COPIES = 3
"""Of a tensor in float32: as it is read, laid out, and told row by row."""


def compare_on_nodes(config: VerifyConfig, note: Callable[[str], None]) -> CompareAll:
    """Return what compares tensors on a cluster.

    Args:
        config: settings, with a model and a cluster's address.
        note: takes lines for the user.
    """
    assert config.ray is not None
    assert config.model is not None
    address, model = config.ray, path_on_nodes(config.model)

    def compare(file: GGUFFile, checkpoint: Checkpoint, targets: Sequence[Target]) -> None:
        path = Path(file.path).absolute()
        shape = checkpoint.shape
        largest = shape.d_model * max(shape.vocab_size, shape.d_ff)
        memory = PROCESS + _COPIES * 4 * largest
        worker = Worker(cpus=config.ray_cpus, gpus=0, memory=memory)
        start, read = partial(_comparing, path, model), [path, *weight_files(checkpoint)]
        with (
            cluster_for(address, worker, read=read, note=note),
            tqdm(total=len(targets), unit="tensor", desc="compare", disable=None) as bar,
        ):
            watch = Watch(
                bar, note, what="tensors", named=_named, verbose=config.verbose, each=False
            )
            for _ in several_on_nodes(start, targets, worker, watch, most=len(targets)):
                bar.update()

    return compare


def _named(target: Target) -> str:
    return f"tensor {target[2]}"


def _comparing(path: Path, model: str) -> Work[Target, None]:
    """Open file and model and return how a tensor is compared."""
    file, checkpoint = GGUFFile(path), Checkpoint.open(model)

    def compare(target: Target, tell: Tell) -> None:
        compare_tensor(file, checkpoint, target)

    return compare
