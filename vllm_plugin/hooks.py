"""Where the plugin takes hold of vLLM: config classes, a model class, one method of ModelConfig.

The first two are vLLM's and transformers' own ways in. The third is needed because the class that a
config names decides what runs it, and `LlamaForCausalLM` is vLLM's: for a ReLU model the name is
changed when vLLM has read the config, before anything is made of it or of its hash.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

from common.errors import PspError
from vllm_plugin.register import LOGGER
from vllm_plugin.served import MODEL_CLASS, served, told

_MODEL = f"vllm_plugin.model:{MODEL_CLASS}"
TESTED = ("0.32.0",)
"""Versions of vLLM that the plugin was run with."""


class Drift(Exception):
    """vLLM has changed where the plugin takes hold of it."""


def install() -> None:
    """Take hold; a second call changes nothing.

    Raises:
        Drift: vLLM lacks something that is needed; nothing is changed then.
    """
    from vllm.config import ModelConfig

    original: Callable[..., Any] | None = getattr(ModelConfig, "get_model_arch_config", None)
    if getattr(original, "of_psp", False):
        return
    _require(original, "ModelConfig.get_model_arch_config", ())
    _require_layers()
    from vllm.model_executor.models import ModelRegistry

    from vllm_plugin.configs import register_configs

    register_configs()
    ModelRegistry.register_model(MODEL_CLASS, _MODEL)
    _register_tokenizer()

    @functools.wraps(original)  # type: ignore[arg-type]  # checked above
    def get_model_arch_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model_impl in ("auto", "vllm") and adapt(self.hf_config):
            _choose_tokenizer(self)
        return original(self, *args, **kwargs)  # type: ignore[misc]

    get_model_arch_config.of_psp = True  # type: ignore[attr-defined]
    ModelConfig.get_model_arch_config = get_model_arch_config


def adapt(config: Any) -> bool:
    """Name the plugin's model class in a config of a model that it serves.

    Args:
        config: transformers' config; changed in place.

    Returns:
        Whether it was changed.

    Raises:
        ValueError: in one line, what of the config or of `ACT_INFO` cannot be used.
    """
    if MODEL_CLASS in (getattr(config, "architectures", None) or ()):
        return False
    try:
        found = served(config.to_dict(), os.environ)
        if found is None:
            return False
        config.psp = told(found, os.environ)
    except PspError as error:
        raise ValueError(f"psp: {error}") from error
    for line in found.notes:
        logging.getLogger(LOGGER).warning("%s", line)
    config.architectures = [MODEL_CLASS]
    if found.unties:
        config.tie_word_embeddings = False
    return True


def _register_tokenizer() -> None:
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    TokenizerRegistry.register("psp", "vllm_plugin.tokenizer", "PspTokenizer")
    RENDERER_REGISTRY.register("psp", "vllm.renderers.hf", "HfRenderer")


def _choose_tokenizer(model_config: Any) -> None:
    """Take psp's tokenizer mode where nobody chose one and transformers would misread the files."""
    if (model_config.tokenizer_mode, model_config.tokenizer) != ("auto", model_config.model):
        return
    from vllm_plugin.tokenizer import read_otherwise

    log = logging.getLogger(LOGGER)
    name, revision = model_config.tokenizer, model_config.tokenizer_revision
    try:
        otherwise = read_otherwise(name, revision, None, model_config.hf_token)
    except (PspError, OSError) as error:
        log.warning("the tokenizer is left to transformers: %s", error)
        return
    if otherwise:
        log.warning(
            "transformers reads this tokenizer otherwise than the model's own does (ids or BOS): "
            "tokenizer mode psp is used; --tokenizer-mode hf keeps transformers'"
        )
        model_config.tokenizer_mode = "psp"


def _require_layers() -> None:
    """Look for what `model` uses without importing it: it would import all of vLLM's layers."""
    from importlib.util import find_spec

    for name in ("vllm.model_executor.models.llama", "vllm.forward_context"):
        if find_spec(name) is None:
            raise Drift(_says(f"has no module {name}"))


def _require(found: Callable[..., Any] | None, name: str, parameters: tuple[str, ...]) -> None:
    if found is None:
        raise Drift(_says(f"has no {name}"))
    missing = [each for each in parameters if each not in inspect.signature(found).parameters]
    if missing:
        raise Drift(_says(f"{name} takes no {missing[0]}"))


def _says(what: str) -> str:
    from importlib.metadata import version

    name = "vllm"
    try:
        found = version(name)
    except ModuleNotFoundError:
        found = "of unknown version"
    return f"vLLM {found} {what}; the plugin was run with {', '.join(TESTED)}"
