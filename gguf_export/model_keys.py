"""The keys that tell PowerInfer a model's sizes and constants.

Source: PowerInfer@d3ebd7c llama.cpp:llm_load_hparams. Each is written where the model has it:
PowerInfer reads the norm's epsilon under one of two names by architecture (and none for OPT, whose
graph computes with 0), and rotary keys only matter to graphs that turn queries and keys.
"""

from __future__ import annotations

from gguf import GGUFWriter, RopeScalingType

from architectures.rope import RopeScaling
from architectures.spec import Architecture, ModelShape

_SCALING_TYPES = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}


def add_model_keys(
    writer: GGUFWriter, architecture: Architecture, model: ModelShape, name: str
) -> None:
    """Add them; `name` is `general.name`."""
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
        _add_scaling(writer, model.rope_scaling)


def _add_scaling(writer: GGUFWriter, scaling: RopeScaling) -> None:
    writer.add_rope_scaling_type(_SCALING_TYPES[scaling.kind])
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_finetuned(True)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
