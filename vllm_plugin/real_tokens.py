"""Which rows of a batch are somebody's tokens, as vLLM tells at each of its steps."""

from __future__ import annotations

from torch import Tensor


def real_tokens(count: int) -> Tensor | None:
    """Tell rows of the step that runs apart from padding and trial runs.

    vLLM gives every token a place in the KV cache and padding the place -1
    (vllm@0.32.0 v1/worker/gpu_model_runner.py:_get_slot_mappings).

    Args:
        count: rows of the batch.

    Returns:
        (count,) bool; None in a trial run, before there is a KV cache.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    places = get_forward_context().slot_mapping
    if not isinstance(places, dict) or not places:
        return None
    first: Tensor = next(iter(places.values()))[:count]
    return first >= 0
