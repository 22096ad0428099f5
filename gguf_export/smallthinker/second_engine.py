"""What PowerInfer's second engine (its folder smallthinker/) demands of a file beyond llama.cpp.

It skips the up and down rows of neurons whose gate is not above 0, so its down matrices are stored
transposed, a row a neuron. Its kernels know one type and a few sizes; see docs/second-engine.md.
"""

from __future__ import annotations

import math
from dataclasses import replace

from architectures.checkpoint import Checkpoint
from architectures.spec import ModelShape
from common.errors import ExportError, FormatError
from common.head_sizes import misfit
from gguf_export.pwri.schema import EMBEDDING, HEAD
from gguf_export.smallthinker.requirements import check_one_expert, shift_note
from gguf_files.names import DENSE_DOWN, PROFILER
from gguf_files.reader import GGUFFile

NEURON_TYPE = "Q4_0"
"""Of the three matrices of an FFN; others it asserts against (PowerInfer@d3ebd7c
smallthinker/ggml/src/ggml.c:ggml_fused_sparse_moe)."""

MOST_D_MODEL = 4096
"""Its sums have room for so many numbers and no check
(powerinfer/fused_sparse_moe/fused_sparse_moe.cpp:max_embed_dim)."""

_PAGE = 4096
_BLOCK, _BLOCK_BYTES = 32, 18

NEURON_STEMS = ("ffn_gate_exps", "ffn_up_exps", f"{DENSE_DOWN}_exps")


def neuron_multiple(d_model: int) -> int:
    """Return what d_ff must be a multiple of: each FFN matrix of Q4_0 fills whole pages.

    Its loader asserts that (src/llama-model.cpp:load_tensors). Up to `MOST_D_MODEL` the result is a
    multiple of 16, the neurons that its kernel takes at once without a look at their end.

    Args:
        d_model: a multiple of 32.
    """
    return _PAGE // math.gcd(d_model // _BLOCK * _BLOCK_BYTES, _PAGE)


def check_second_engine(checkpoint: Checkpoint, option: str) -> None:
    """Refuse a model that the engine cannot run, or would compute as another.

    Args:
        checkpoint: the model.
        option: that asked for it, for messages.

    Raises:
        ExportError: saying what it lacks.
    """
    check_one_expert(checkpoint, option)
    shift = shift_note(checkpoint)
    if shift is not None:
        raise ExportError(
            f"{option}: {shift}", "export with --engine powerinfer, or make the model ReLU"
        )
    shape = checkpoint.shape
    check_sizes(replace(shape, d_ff=stored_neurons(shape.d_model, shape.d_ff)), option)


def stored_neurons(d_model: int, d_ff: int) -> int:
    """Return d_ff, or the least number above it that the engine takes."""
    return d_ff + -d_ff % neuron_multiple(d_model)


def added_neurons_note(shape: ModelShape) -> str | None:
    """Return what it costs that neurons are added, None if none are."""
    stored = stored_neurons(shape.d_model, shape.d_ff)
    if stored == shape.d_ff:
        return None
    return (
        f"d_ff {shape.d_ff} is no multiple of {neuron_multiple(shape.d_model)}, as PowerInfer's "
        f"second engine demands of d_model {shape.d_model}: {stored - shape.d_ff} neurons of zeros "
        f"are added, which are never active; gates are {stored / shape.d_ff:.2f} times as large"
    )


def check_sizes(shape: ModelShape, option: str) -> None:
    """Refuse sizes that are none of the engine's.

    Raises:
        ExportError: naming the option that asked for it.
    """
    problem = size_problem(shape.d_model, shape.d_ff)
    if problem is not None:
        raise ExportError(f"{option}: {problem}", "its kernels cannot take the model")


def size_problem(d_model: int, d_ff: int) -> str | None:
    """Return why sizes are none of the engine's, None if they are."""
    if d_model % _BLOCK or d_model > MOST_D_MODEL:
        return f"d_model {d_model} is not a multiple of {_BLOCK} up to {MOST_D_MODEL}"
    if d_ff % (multiple := neuron_multiple(d_model)):
        return f"d_ff {d_ff} is no multiple of {multiple}, as d_model {d_model} demands"
    if d_ff == d_model:
        return f"d_ff and d_model are both {d_ff}: a square matrix does not tell that it is turned"
    return None


def check_neuron_types(file: GGUFFile) -> None:
    """Do nothing if all FFNs of a file have the one type that the engine computes.

    Raises:
        FormatError: naming the first that has another.
    """
    for name, info in file.tensors.items():
        neurons = any(f".{stem}." in name for stem in NEURON_STEMS)
        if neurons and info.kind.name != NEURON_TYPE:
            raise FormatError(
                f"{file.path}: tensor {name} is {info.kind.name}, PowerInfer's second engine stops "
                f"with an assertion at neurons that are not {NEURON_TYPE}",
                "export it again with --engine smallthinker",
            )


def check_profiler(file: GGUFFile, d_model: int, vocab_size: int) -> None:
    """Do nothing if a file has no predictor of its output head, or one that the engine can run.

    Raises:
        FormatError: naming what it would stop at, or read as something else.
    """
    if (info := file.tensors.get(PROFILER)) is None:
        return
    head = file.tensors.get(HEAD) or file.tensors[EMBEDDING]
    for each, then in ((info, "reads it as Q4_0 all the same"), (head, "stops at an assertion")):
        if each.kind.name != "Q4_0":
            raise file.error(
                f"tensor {each.name} is {each.kind.name}; with {PROFILER} PowerInfer's second "
                f"engine {then}"
            )
    rank, rest = divmod(math.prod(info.shape), d_model + vocab_size)
    if rest or rank < 1 or info.shape[-1] != math.prod(info.shape):
        raise file.error(
            f"tensor {PROFILER} has shape {info.shape}, expected one row of a multiple of "
            f"{d_model + vocab_size} numbers"
        )
    if (problem := misfit(d_model, vocab_size, rank)) is not None:
        raise file.error(f"tensor {PROFILER}: {problem}, at which PowerInfer's second engine stops")
