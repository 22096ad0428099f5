"""Which tensors a model file holds, in which types, and how each comes from where it is now.

What a GGUF model stores as PowerInfer runs it is copied; the rest is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from torch.nn.functional import pad

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.tensors import GGUFTensors
from architectures.layouts import to_file
from architectures.spec import ModelShape, TensorRule
from common.element_types import ELEMENT_TYPES, F16, Q4_0
from gguf_export.predictor_source import PredictorSource
from gguf_export.pwri.element_types import OUTTYPES, FileTypes, runnable
from gguf_export.pwri.schema import EMBEDDING, FC1, FC2, HEAD, parse_name
from gguf_files.elements import PLAIN, data_size
from gguf_files.names import DENSE_DOWN, DOWN
from gguf_files.reader import GGUFFile, TensorInfo


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        shape: numpy order.
        kind: element type.
        read: returns the numbers when their turn comes, mapped from the checkpoint where nothing
            but their order changes.
        stored: returns its bytes instead, (size,) uint8 and mapped, where they are copied.
        before: type in a GGUF model whose numbers are not copied; None elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]
    stored: Callable[[], npt.NDArray[np.uint8]] | None = None
    before: GGMLQuantizationType | None = None

    @property
    def size(self) -> int:
        """Bytes of its data in the file."""
        return data_size(self.shape, self.kind)


def plan_model(
    checkpoint: Checkpoint, *, sparse: bool, types: FileTypes
) -> Iterator[PlannedTensor]:
    """Yield the model's tensors as its family lists them.

    Args:
        checkpoint: the model.
        sparse: a dense file has the down matrix under another name and not transposed
            (PowerInfer@d3ebd7c llama.cpp:llm_load_tensors).
        types: of its elements.
    """
    model, rules = checkpoint.shape, list(checkpoint.architecture.exported)
    head = HEAD if any(target == HEAD for _, target in rules) else EMBEDDING
    for rule, target in rules:
        if not sparse:
            target = target.replace(f".{DOWN}.", f".{DENSE_DOWN}.")
            transform = "none" if rule.transform == "transpose" else rule.transform
            rule = replace(rule, transform=transform)
        for layer in range(model.n_layers if rule.per_layer else 1):
            shape = rule.shape(model)
            shape = shape[::-1] if rule.transform == "transpose" else shape
            name = target.format(layer=layer)
            read = partial(_read_model, checkpoint, rule, layer)
            made = PlannedTensor(name, shape, types.of(name, shape, head), read)
            yield _copied(made, checkpoint, rule, layer, types)


def _copied(
    tensor: PlannedTensor, checkpoint: Checkpoint, rule: TensorRule, layer: int, types: FileTypes
) -> PlannedTensor:
    """Return a tensor as a GGUF model stores it, if it does so in a layout and type that run."""
    files = checkpoint.files
    if not isinstance(files, GGUFTensors):
        return tensor
    info, transform = files.stored(checkpoint.source(rule, layer))
    same = transform == rule.transform and rule.factor(checkpoint.shape) == 1
    if same and _stays(tensor, info.kind, chosen=types.weights_chosen):
        return replace(tensor, kind=info.kind, stored=partial(files.file.mapped, info.name))
    return replace(tensor, before=info.kind)


def _stays(tensor: PlannedTensor, kind: GGMLQuantizationType, *, chosen: bool) -> bool:
    """Whether PowerInfer runs a tensor in the type that it has, and none was chosen for it.

    What is quantised already stays so too where one was: it would only be rounded again.
    """
    name = tensor.name.replace(f".{DENSE_DOWN}.", f".{DOWN}.")
    wanted = not chosen or kind not in PLAIN or kind is tensor.kind
    return wanted and kind in runnable(name, tensor.shape) and _fits(name, tensor.shape, kind)


def _fits(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> bool:
    """Whether rows are whole blocks, of an FFN in both directions; see `requirements`."""
    element = ELEMENT_TYPES.get(kind.name.lower())
    sizes = shape if parse_name(name).neurons else shape[-1:]
    return element is None or element.block == 1 or not any(n % element.row_multiple for n in sizes)


def plan_predictors(
    predictors: PredictorSource, ranks: Sequence[int], model: ModelShape, types: FileTypes
) -> Iterator[PlannedTensor]:
    """Yield the predictors' tensors, given the rank of each layer.

    A rank that the type does not allow is padded: a hidden unit without weights is always 0.
    """
    for layer, rank in enumerate(ranks):
        pair = [name.format(layer=layer) for name in (FC1, FC2)]
        if predictors.file is not None and keeps_types(predictors, types):
            yield from (_copy(predictors.file, predictors.file.tensors[name]) for name in pair)
            continue
        kind = types.predictors if predictors.kinds is None else predictors.kinds[layer]
        rank = ELEMENT_TYPES[kind].padded(rank)
        shapes = (rank, model.d_model), (model.d_ff, rank)
        for name, part, shape in zip(pair, (0, 1), shapes, strict=True):
            read = partial(_read_predictor, predictors, layer, part, shape)
            made = PlannedTensor(name, shape, OUTTYPES[kind], read)
            as_stored = predictors.kinds is not None and kind == Q4_0
            stored = partial(_stored_predictor, predictors, layer, part) if as_stored else None
            yield replace(made, stored=stored)


def keeps_types(predictors: PredictorSource, types: FileTypes) -> bool:
    """Whether predictors are copied out of a file that has them in types that PowerInfer runs."""
    if predictors.file is None or types.predictors_chosen:
        return False
    held = [i for i in predictors.file.tensors.values() if parse_name(i.name).role == "predictor"]
    return all(info.kind in runnable(info.name, info.shape) for info in held)


def _copy(file: GGUFFile, info: TensorInfo) -> PlannedTensor:
    read = lambda: torch.tensor(file.tensor(info.name))  # noqa: E731
    return PlannedTensor(
        info.name, info.shape, info.kind, read, stored=partial(file.mapped, info.name)
    )


def _read_model(checkpoint: Checkpoint, rule: TensorRule, layer: int) -> torch.Tensor:
    """Return a checkpoint tensor in the file's layout."""
    return to_file(checkpoint.read(rule, layer), rule.transform, checkpoint.shape)


def _read_predictor(
    predictors: PredictorSource, layer: int, part: int, shape: tuple[int, ...]
) -> torch.Tensor:
    stored = predictors.layer(layer)
    found = (stored.fc1, stored.fc2)[part] if stored.kind == F16 else stored.numbers()[part]
    rows, columns = (want - have for want, have in zip(shape, found.shape, strict=True))
    return pad(found, (0, columns, 0, rows)) if rows or columns else found


def _stored_predictor(predictors: PredictorSource, layer: int, part: int) -> npt.NDArray[np.uint8]:
    stored = predictors.layer(layer)
    blocks: npt.NDArray[np.uint8] = (stored.fc1, stored.fc2)[part].contiguous().numpy()
    return blocks.reshape(-1)


def conversion_note(tensors: Sequence[PlannedTensor], engine: str = "PowerInfer") -> str | None:
    """Return what an export of a GGUF model did not copy, None if it copied all or is of another.

    A type that stays itself is told where rows became columns: blocks are rounded anew.

    Args:
        tensors: all of a file.
        engine: that runs it.
    """
    changes: dict[str, list[str]] = {}
    copied = 0
    for tensor in tensors:
        copied += tensor.stored is not None
        before = tensor.before
        if before is not None and not (before is tensor.kind and before in PLAIN):
            change = f"{before.name} to {tensor.kind.name}"
            stems = changes.setdefault(change, [])
            stem = parse_name(tensor.name).stem
            if stem not in stems:
                stems.append(stem)
    if not changes:
        return None
    told = "; ".join(f"{', '.join(stems)} from {change}" for change, stems in changes.items())
    return (
        f"converted {told} (--outtype chooses the type of what {engine} does not run as it was "
        f"stored); the other {copied} tensors are copied bit for bit"
    )
