"""What PowerInfer demands of a model and its tokenizer, told before hours are spent on them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from architectures.checkpoint import Checkpoint
from architectures.spec import ModelShape
from common.element_types import ELEMENT_TYPES
from common.errors import CheckpointError, ExportError
from gguf_export.pwri.element_types import FileTypes
from gguf_export.pwri.schema import BLOCK, SMALLEST_D_FF
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.tokens.vocabulary import Vocabulary


def foresee(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what `psp export-gguf` will say of a model, a line each: refusals, then warnings."""
    try:
        check_model(checkpoint)
    except ExportError as error:
        yield _refused(error)
    try:
        rows = checkpoint.shape.vocab_size
        vocabulary = read_vocabulary(checkpoint.directory, rows, checkpoint.config)
    except (CheckpointError, ExportError) as error:
        yield _refused(error)
        return
    yield from vocabulary_notes(vocabulary, checkpoint.tokenizer().notes)


def vocabulary_notes(vocabulary: Vocabulary, said: Collection[str]) -> Iterator[str]:
    """Yield what a user should know of a vocabulary and has not been said yet."""
    yield from (note for note in vocabulary.notes if note not in said)
    yield from (f"in PowerInfer: {warning}" for warning in vocabulary.warnings)


def _refused(error: CheckpointError | ExportError) -> str:
    return f"psp export-gguf will refuse this model: {error}"


def check_model(checkpoint: Checkpoint) -> None:
    """Refuse a sound model for which PowerInfer has no graph or no kernels.

    Raises:
        ExportError: naming what PowerInfer lacks.
    """
    family, shape = checkpoint.architecture, checkpoint.shape
    if family.context_length not in (None, shape.context_length):
        raise ExportError(
            f"{checkpoint.path}: context of {shape.context_length} tokens",
            f"PowerInfer's {family.gguf_name} graph has exactly {family.context_length} positions",
        )
    for rule in family.tensors:
        if rule.target is None and not shape.tied_embeddings:
            raise ExportError(
                f"{checkpoint.path}: {rule.source} is not tied to {rule.tied_to}, which is the "
                f"only head in PowerInfer's {family.gguf_name} graph",
                "pass a model whose output head is its embedding",
            )
    if shape.d_ff < SMALLEST_D_FF:
        raise ExportError(
            f"d_ff {shape.d_ff} is below {SMALLEST_D_FF}",
            "PowerInfer computes smaller FFNs wrongly",
        )
    if shape.d_model != shape.n_heads * shape.head_dim:
        raise ExportError(
            f"{shape.n_heads} heads of {shape.head_dim} numbers are not d_model {shape.d_model}, "
            "from which PowerInfer derives their size",
            "export for llama.cpp (--engine llama.cpp) if it is a LLaMA with ReLU",
        )
    if shape.d_model % BLOCK:
        raise ExportError(
            f"d_model {shape.d_model} is no multiple of {BLOCK}", "PowerInfer cannot run it"
        )


def window_note(checkpoint: Checkpoint, engine: str) -> str | None:
    """Return that a model's sliding window became its context, None if it has none."""
    named, context = (
        checkpoint.config.get("max_position_embeddings"),
        checkpoint.shape.context_length,
    )
    if not isinstance(named, int) or named <= context:
        return None
    return (
        f"the file's context is {context} tokens, the model's sliding window, which {engine} does "
        f"not compute: in a text of more, up to {named}, every token would see all before it"
    )


def check_types(checkpoint: Checkpoint, types: FileTypes, *, dense: bool) -> None:
    """Refuse what cannot be written in the types, and the dense files, that are asked for.

    Raises:
        ExportError: naming the option.
    """
    family = checkpoint.architecture
    if dense and family.dense_note is None:
        raise ExportError(
            f"--dense: PowerInfer cannot run a dense {family.gguf_name} file, because its graph "
            "reads a tensor that its loader never makes",
            "leave --dense out",
        )
    _check_rows(checkpoint.shape, types)


def _check_rows(shape: ModelShape, types: FileTypes) -> None:
    """Refuse sizes that do not go into the blocks of a type.

    Q4_0's hold for d_model, the row size of most matrices, and for d_ff: activations that multiply
    the down matrix are rounded in blocks too (ggml.c:ggml_compute_forward_mul_mat_axpy_q4_0).
    """
    for key, option, name in (
        ("d_model", "outtype", types.weights),
        ("d_ff", "outtype", types.weights),
        ("d_model", "predictor-type", types.predictors),
    ):
        size, block = getattr(shape, key), ELEMENT_TYPES[name].row_multiple
        if name != "f16" and size % block:
            raise ExportError(
                f"{key} {size} is no multiple of {block}, as --{option} {name} needs", "choose f16"
            )
