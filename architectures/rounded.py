"""A model with the rounding of the type that it will be exported in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from gguf import GGMLQuantizationType

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.tensors import GGUFTensors
from architectures.layouts import from_file, to_file
from architectures.spec import TensorRule
from common.element_types import F16, Q4_0
from common.rounding import to_f16, to_q4_0
from gguf_files.names import EMBEDDING, HEAD, stays_float16

_FFN = ("ffn_gate", "ffn_up", "ffn_down")


def rounded(checkpoint: Checkpoint, outtype: str) -> Checkpoint:
    """Return a checkpoint whose matrices hold what a file of some type holds.

    Args:
        checkpoint: the model.
        outtype: `f16`, in which it runs as it is; or `q4_0`, rounded in the file's layout.
    """
    if outtype == F16:
        return checkpoint
    targets = {rule.source: target for rule, target in checkpoint.architecture.exported}
    parts = (checkpoint.origin, checkpoint.config, checkpoint.architecture, checkpoint.shape)
    return _Rounded(*parts, targets)


@dataclass(frozen=True)
class _Rounded(Checkpoint):
    """See `rounded`; `targets` are the names in the file by the rules' sources."""

    targets: dict[str, str] = field(default_factory=dict)

    def read(self, rule: TensorRule, layer: int = 0, expert: int = 0) -> torch.Tensor:
        """Read a tensor as float32, rounded if it is a matrix that the file holds in Q4_0."""
        tensor, name = super().read(rule, layer, expert), self.targets.get(rule.source)
        head = HEAD if HEAD in self.targets.values() else EMBEDDING
        if tensor.dim() == 1 or name is None or stays_float16(name, head):
            return tensor
        stored = to_file(to_f16(tensor.float()), rule.transform, self.shape)
        return from_file(to_q4_0(stored.contiguous()), rule.transform, self.shape).contiguous()


def own_type(checkpoint: Checkpoint) -> str:
    """Return the type in which an export leaves a model's FFN if none is asked for.

    `q4_0` is that of a GGUF file that has all of it so, as PowerInfer reads it; else `f16`.
    """
    files = checkpoint.files
    if not isinstance(files, GGUFTensors):
        return F16
    for rule, target in checkpoint.architecture.exported:
        if any(f".{stem}" in target for stem in _FFN) and target.endswith(".weight"):
            info, transform = files.stored(checkpoint.source(rule))
            if info.kind is not GGMLQuantizationType.Q4_0 or transform != rule.transform:
                return F16
    return Q4_0
