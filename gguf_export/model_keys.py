"""Metadata of a model file: what its model says, and what a GGUF model's own file says besides."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
from gguf import GGUFValueType, GGUFWriter, RopeScalingType

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.source import GGUFSource
from common.version import tool_version
from gguf_export.pwri.schema import THRESHOLD_KEY
from gguf_export.tokens.vocabulary import Vocabulary, add_vocabulary
from gguf_files.names import (
    ACTIVATION_KEY,
    ACTIVATION_THRESHOLD_KEY,
    FINGERPRINT_KEY,
    VERSION_KEY,
)
from gguf_files.reader import GGUFFile, Value

_ANEW = ("general.architecture", "general.alignment", THRESHOLD_KEY)
_ANEW_BEFORE = ("psp.", "split.")
"""Keys that are never copied: they are of the file, or of the predictors that it gets."""

_SAME = 1e-6
"""Relative difference of numbers that a float32 may make of one."""


def add_keys(writer: GGUFWriter, checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Add the keys of a model and its tokenizer.

    Of a GGUF model all keys are copied, but for those whose value means something else to
    PowerInfer than to the model's family (a context beyond its window).
    """
    _add_model_keys(writer, checkpoint)
    origin = checkpoint.origin
    if not isinstance(origin, GGUFSource):
        add_vocabulary(writer, vocabulary)
        return
    for name, value in _copied(origin.file, writer):
        writer.kv_data[0].pop(name, None)
        data = value.data.tolist() if isinstance(value.data, np.ndarray) else value.data
        writer.add_key_value(name, data, value.kind, value.element)


def _copied(file: GGUFFile, writer: GGUFWriter) -> Iterator[tuple[str, Value]]:
    ours = writer.kv_data[0]
    prefix = file.value("general.architecture", GGUFValueType.STRING)
    foreign = prefix != ours["general.architecture"].value
    for name, value in file.values.items():
        if name in _ANEW or name.startswith(_ANEW_BEFORE):
            continue
        if foreign and name.startswith(f"{prefix}."):
            continue
        empty = value.element is not None and not len(value.data)  # the writer knows none
        differs = name in ours and not name.startswith("general.")
        if not empty and not (differs and not _agree(ours[name].value, value.data)):
            yield name, value


def _agree(ours: object, theirs: object) -> bool:
    """Whether two values say the same, as far as float32 can."""
    if isinstance(theirs, bytes):
        return ours == theirs.decode("utf-8", "replace")
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=_SAME)
    return type(ours) is type(theirs) and ours == theirs


def _add_model_keys(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add the keys that tell PowerInfer a model's sizes and constants.

    Source: PowerInfer@d3ebd7c llama.cpp:llm_load_hparams. Each is written where the model has it:
    PowerInfer reads the norm's epsilon under one of two names by architecture (and none for OPT,
    whose graph computes with 0), and rotary keys only matter to graphs that turn queries and keys.
    """
    architecture, model = checkpoint.architecture, checkpoint.shape
    name = os.fsencode(checkpoint.path.resolve().name).decode("utf-8", "replace")
    writer.add_name(name or architecture.name)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    if model.rope_theta:
        writer.add_rope_dimension_count(model.head_dim)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    if architecture.centred:
        writer.add_layer_norm_eps(model.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(model.norm_eps)
    if model.rope_theta:
        writer.add_rope_freq_base(model.rope_theta)
    if model.rope_scaling is not None:
        scaling = model.rope_scaling
        writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_finetuned(True)
        if scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_context)


def provenance(checkpoint: Checkpoint) -> dict[str, float | str]:
    """Return the keys that say what a file was made from."""
    return {
        VERSION_KEY: tool_version(),
        FINGERPRINT_KEY: checkpoint.fingerprint,
        ACTIVATION_KEY: checkpoint.shape.activation,
        ACTIVATION_THRESHOLD_KEY: checkpoint.shape.activation_threshold,
    }
