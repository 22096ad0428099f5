"""Where the plugin takes hold of vLLM: configs, a model class, a tokenizer mode, two methods.

All but the methods are vLLM's and transformers' own ways in. They are needed because the class that
a config names decides what runs it, and `LlamaForCausalLM` is vLLM's: for a ReLU model the name is
changed when vLLM has read the config, before anything is made of it or of its hash.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from common.errors import PspError
from vllm_plugin.act_info import VARIABLE
from vllm_plugin.register import LOGGER
from vllm_plugin.served import MODEL_CLASS, served, told
from vllm_plugin.versions import Drift, require_layers, seen

_MODEL = f"vllm_plugin.model:{MODEL_CLASS}"
_MODE = "psp"

_log = logging.getLogger(LOGGER)


def install() -> None:
    """Take hold; a second call changes nothing.

    Raises:
        Drift: vLLM lacks something that is needed; nothing is changed then.
    """
    from vllm.config import ModelConfig

    if getattr(ModelConfig, "of_psp", False):
        return
    first = {"get_model_arch_config": _serve, "verify_with_parallel_config": _require_division}
    for name in first:
        if not hasattr(ModelConfig, name):
            raise Drift(seen(f"ModelConfig has no {name}"))
    from vllm.model_executor.models import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils import config as of_vllm

    from vllm_plugin.configs import name_types, register_configs

    register_configs()
    # Without this table, configs need a model_type; nothing else does.
    name_types(getattr(of_vllm, "_ARCHITECTURE_TO_MODEL_TYPE", {}))
    ModelRegistry.register_model(MODEL_CLASS, _MODEL)
    TokenizerRegistry.register(_MODE, "vllm_plugin.tokenizer", "PspTokenizer")
    RENDERER_REGISTRY.register(_MODE, "vllm.renderers.hf", "HfRenderer")
    for name, before in first.items():
        setattr(ModelConfig, name, _preceded(getattr(ModelConfig, name), before))
    ModelConfig.of_psp = True


def _preceded(method: Callable[..., Any], before: Callable[..., None]) -> Callable[..., Any]:
    """Return a method that first calls another function with the same arguments."""

    @functools.wraps(method)
    def both(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return method(*args, **kwargs)

    return both


def _serve(model_config: Any, *args: Any, **kwargs: Any) -> None:
    """Adapt the config of a model that the plugin serves, and choose its tokenizer."""
    if model_config.model_impl in ("auto", "vllm"):
        if adapt(model_config.hf_config):
            _choose_tokenizer(model_config)
    elif os.environ.get(VARIABLE):
        _log.warning("%s is passed over: --model-impl leaves psp's model class out", VARIABLE)


def adapt(config: Any) -> bool:
    """Name the plugin's model class in a config of a model that it serves.

    Args:
        config: transformers' config; changed in place.

    Returns:
        Whether it was changed.

    Raises:
        ValueError: in one line, what of the config, of a variable of the environment or of vLLM
            itself cannot be used.
    """
    if _is_served(config):
        return False
    try:
        found = served(config.to_dict(), os.environ)
        if found is None:
            return False
        require_layers()
        config.psp = told(found, os.environ)
    except (PspError, Drift) as error:
        raise ValueError(f"psp: {error}") from error
    for line in found.notes:
        _log.warning("%s", line)
    config.architectures = [MODEL_CLASS]
    config.psp["unties"] = bool(found.unties and config.tie_word_embeddings)
    if config.psp["unties"]:
        config.tie_word_embeddings = False
    return True


def _is_served(config: Any) -> bool:
    return MODEL_CLASS in (getattr(config, "architectures", None) or ())


def _choose_tokenizer(model_config: Any) -> None:
    """Take psp's tokenizer mode where nobody chose one and transformers would misread the files."""
    if (model_config.tokenizer_mode, model_config.tokenizer) != ("auto", model_config.model):
        return
    from vllm_plugin.tokenizer import read_otherwise

    name, revision = model_config.tokenizer, model_config.tokenizer_revision
    try:
        otherwise = read_otherwise(name, revision, None, model_config.hf_token)
    except (PspError, OSError) as error:
        _log.warning("the tokenizer is left to transformers: %s", error)
        return
    if otherwise is not None:
        _log.warning(
            "transformers reads this tokenizer otherwise than the model's own does (ids or BOS): "
            "tokenizer mode psp is used; --tokenizer-mode hf keeps transformers'"
        )
        model_config.tokenizer_mode = _MODE


def _require_division(model_config: Any, parallel_config: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse to cut an FFN into unequal parts; vLLM looks at heads only.

    Raises:
        ValueError: in one line.
    """
    config, parts = model_config.hf_config, parallel_config.tensor_parallel_size
    if _is_served(config) and config.intermediate_size % parts:
        raise ValueError(
            f"psp: config.json: intermediate_size {config.intermediate_size} does not divide into "
            f"{parts} parts; choose another --tensor-parallel-size"
        )
