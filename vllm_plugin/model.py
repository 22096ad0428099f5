"""The model class: vLLM's LLaMA with another FFN, and constants folded into its weights."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterable, Iterator, Set
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)

from architectures.gated import GATED
from common.errors import PspError
from common.files import sha256
from vllm_plugin.ffn import GatedFFN
from vllm_plugin.register import LOGGER
from vllm_plugin.served import OWN_PREDICTOR, plain_name
from vllm_plugin.statistics import Statistics
from vllm_plugin.switches import SPARSE, STATISTICS, read_switches

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")

_SAMPLE = 64
"""Elements of a tensor by which a model is told from others."""

_log = logging.getLogger(LOGGER)


class PspDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's LLaMA block with a ReLU-family FFN."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str = "",
        config: Any = None,
        attn_layer_type: type[nn.Module] = LlamaAttention,
    ) -> None:
        """Build a block; `config` is transformers', with what `served.told` put there."""
        config = config or vllm_config.model_config.hf_config
        plain = copy.copy(config)
        plain.hidden_act = "silu"  # vLLM's FFN takes no other; it only lends its projections
        super().__init__(vllm_config, prefix, plain, attn_layer_type)
        psp = config.psp
        self.mlp: Any = GatedFFN(
            self.mlp,
            psp["activation"],
            psp["activation_threshold"],
            sparse=psp["sparse"] and _whole_weights(vllm_config),
            counted=psp["counted"] and _one_worker(vllm_config),
        )


class PspForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A ReLU-family LLaMA, Mistral, MiniCPM or Bamboo."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_type: type[nn.Module] = PspDecoderLayer,
    ) -> None:
        """Build the model."""
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        if self.config.psp["sparse"] and not _whole_weights(vllm_config):
            why = "LoRA adapters, biases and quantised weights need vLLM's own products"
            _log.warning("%s is passed over: %s", SPARSE, why)
        if vllm_config.lora_config is not None and self.config.psp["factors"]:
            raise ValueError(
                "psp: LoRA adapters are not served for a MiniCPM, whose constants are folded into "
                "the weights; start without --enable-lora"
            )
        self._incomplete = vllm_config.load_config.load_format != "dummy"
        self._statistics: Statistics | None = None
        self._vllm_config = vllm_config

    def _counted(self, weights: str) -> Statistics | None:
        """Return where counts go; None, with a line of the log, if they cannot be kept.

        Args:
            weights: tells the model from others of its sizes.
        """
        vllm_config = self._vllm_config
        directory = read_switches(os.environ).statistics
        if directory is None or not _one_worker(vllm_config):
            why = "one worker must run the model, without tensor, pipeline or data parallelism"
            _log.warning("%s is passed over: %s", STATISTICS, why)
            return None
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        facts = {name: getattr(self.config, name) for name in sizes}
        facts |= {name: self.config.psp[name] for name in ("activation", "activation_threshold")}
        facts |= {"name": Path(vllm_config.model_config.model).name, "weights": weights}
        try:
            made = Statistics(directory, facts, [each.mlp.counts for each in self.model.layers])
        except PspError as error:
            _log.warning("activation statistics are off: %s", error)
            return None
        # Not atexit: vLLM's engine is a process that multiprocessing ends without it.
        Finalize(self, made.close, exitpriority=0)
        return made

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Return vLLM's hidden states; counts that grow are written before long."""
        if self._statistics is not None:
            self._statistics.step()
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return vLLM's logits: called also where a CUDA graph stands for `forward`."""
        if self._statistics is not None:
            self._statistics.step()
        logits: Tensor | None = super().compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, each times its factor."""
        seen: dict[str, bytes] = {}
        loaded: set[str] = super().load_weights(self._adapted(weights, seen))
        if self._incomplete:
            self._require_all(seen.keys())
            self._incomplete = False  # what comes later, updates, may be parts
            if self.config.psp["counted"]:
                told = b"".join(name.encode() + seen[name] for name in sorted(seen))
                self._statistics = self._counted(sha256(told))
        return loaded

    def _require_all(self, names: Set[str]) -> None:
        """Demand every tensor: vLLM serves whatever memory held where a projection is lacking.

        Source: vllm@0.32.0 model_executor/model_loader/default_loader.py:track_weights_loading,
        which passes over modules that have a quantisation method, unquantised ones included.

        Raises:
            ValueError: in one line.
        """
        family = next(each for each in GATED if each.name == self.config.psp["family"])
        layers = range(self.config.num_hidden_layers)
        headed = hasattr(self, "lm_head")  # vLLM takes it off models that make embeddings
        wanted = {
            rule.source.format(layer=layer)
            for rule in family.tensors
            for layer in (layers if rule.per_layer else (None,))
            if rule.source != _HEAD or (headed and not self.config.tie_word_embeddings)
        }
        for name, _ in self.named_parameters():
            module = name.removesuffix(".bias").rpartition(".")[2]
            if name.endswith(".bias"):
                parts = self.packed_modules_mapping.get(module, [module])
                wanted |= {name.replace(f".{module}.", f".{part}.") for part in parts}
        if missing := sorted(wanted - names):
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise ValueError(f"psp: the checkpoint lacks {missing[0]}{more}; fetch it again")

    def _adapted(
        self, weights: Iterable[tuple[str, Tensor]], seen: dict[str, bytes]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what vLLM is to load, and note of each tensor its name and some of it."""
        factors, embedding = self.config.psp["factors"], None
        for name, tensor in weights:
            if OWN_PREDICTOR in name:
                continue
            name = plain_name(name)
            if name == _EMBEDDING:
                embedding = tensor
            seen[name] = tensor.flatten()[:_SAMPLE].float().cpu().numpy().tobytes()
            yield name, _times(tensor, factors.get(_LAYER.sub("{layer}", name), 1))
        if self.config.psp["unties"] and _HEAD not in seen and embedding is not None:
            seen[_HEAD] = b""
            yield _HEAD, _times(embedding, factors.get(_HEAD, 1))


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)


def _one_worker(vllm_config: VllmConfig) -> bool:
    parallel = vllm_config.parallel_config
    return bool(parallel.world_size == 1 and parallel.data_parallel_size == 1)


def _whole_weights(vllm_config: VllmConfig) -> bool:
    """Whether an FFN is the matrices that were loaded: no adapters, no biases, not quantised."""
    biased = getattr(vllm_config.model_config.hf_config, "mlp_bias", False)
    return not biased and vllm_config.lora_config is None and vllm_config.quant_config is None
