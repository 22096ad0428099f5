"""Why a tensor of the family is not among those of a checkpoint, told by the names that are."""

from __future__ import annotations

from collections.abc import Collection

from architectures.directory import ORIGINAL
from common.errors import FETCH_AGAIN

_PACKED = ("qweight", "weight_packed", "qzeros")
"""What GPTQ and AWQ (the first) and compressed-tensors store in place of a weight."""

_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
"""First parts of all names in a model saved from within torch.compile, DataParallel or FSDP, peft.

Sources: torch@2.13.0 `_dynamo/eval_frame.py:OptimizedModule`, `nn/parallel/data_parallel.py`;
peft `peft_model.py:PeftModel.base_model`, `tuners/tuners_utils.py:BaseTuner.model`.
"""


def wrapper_prefix(names: Collection[str]) -> str:
    """Return the first parts that every name has and that a wrapper gave it, empty if none."""
    prefix = ""
    while names and (
        part := next((p for p in _WRAPPERS if all(n.startswith(prefix + p) for n in names)), "")
    ):
        prefix += part
    return prefix


def explain_missing(
    name: str, stored: Collection[str], *, head: bool, bare: bool
) -> tuple[str, str]:
    """Return problem and remedy.

    Args:
        name: the tensor that is missing.
        stored: names of the checkpoint's tensors.
        head: it is the output head, and no other tensor stands in for it.
        bare: the names are those of a model without a head, such as `LlamaModel`.
    """
    stem = name.removesuffix("weight")
    missing = f"tensor {name} is missing"
    for found in stored:
        if any(found.endswith(f"{stem}{packed}") for packed in _PACKED):
            return f"{missing}, {found} is there: the weights are quantised", ORIGINAL
    if lora := next((found for found in stored if "lora_" in found), None):
        remedy = "merge the adapter into the model (peft: merge_and_unload), save and pass that"
        return f"{missing}, {lora} is there: a LoRA adapter is not merged", remedy
    inner = name.partition(".")[2] if name.count(".") > 1 else name
    if other := next((found for found in stored if found.endswith(f".{inner}")), None):
        remedy = "save the language model alone, without what is around it, and pass that"
        return f"{missing}, {other} is there", remedy
    if not head:
        return missing, FETCH_AGAIN
    tie = "or set tie_word_embeddings to true in config.json if its head is the embedding"
    if not bare:
        return missing, f"{FETCH_AGAIN}, {tie}"
    remedy = f"pass the checkpoint of the causal language model, {tie}"
    return f"{missing}: the model was saved without its output head", remedy
