"""Tiny random checkpoints of every family, written by hand in the layout of the published models.

Config keys, tensor names, dtypes and file formats are theirs; nothing here knows `architectures`
or transformers. What the models compute is in `published`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from conftest import TEXT
from published import (
    Config,
    Reference,
    Shapes,
    Tensors,
    falcon_formula,
    falcon_shapes,
    gated_formula,
    gated_shapes,
    is_tied,
    opt_formula,
    opt_shapes,
)
from safetensors.torch import save_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A family's published layout.

    Attributes:
        name: name of the test.
        family: name of the family that it must be taken for.
        activation: of the FFN, and FATReLU's threshold.
        config: config.json.
        shapes: names and shapes of all tensors of such a config, the embedding first.
        formula: the published modelling code.
        files: layout of the weights, see `save_tensors`.
        tokenizer: `tokenizer.model`, `tokenizer.json` or `vocab.json`.
    """

    name: str
    family: str
    activation: tuple[str, float] = ("relu", 0.0)
    config: Config
    shapes: Callable[[Config], Shapes]
    formula: Callable[[Config, Tensors, torch.Tensor], Reference] = gated_formula
    files: str = "safetensors"
    tokenizer: str = "tokenizer.model"

    def changed(self, **changes: Any) -> Variant:
        """Return it with other config values; None removes a key."""
        kept = {k: v for k, v in (self.config | changes).items() if v is not None}
        return replace(self, config=kept)


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk and what it holds."""

    variant: Variant
    path: Path
    tensors: Tensors = field(repr=False)

    def reference(self, tokens: list[int]) -> Reference:
        """Run the formula on one sequence in float64."""
        wide = {name: tensor.double() for name, tensor in self.tensors.items()}
        return self.variant.formula(self.variant.config, wide, torch.tensor(tokens))


def write(variant: Variant, path: Path, tokenizer_model: bytes, *, seed: int = 0) -> Written:
    """Write a random checkpoint."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(variant.config, indent=2))
    dtype = DTYPES[variant.config["torch_dtype"]]
    tensors = random_tensors(variant.shapes(variant.config), dtype, seed)
    if "lm_head.weight" in tensors and is_tied(variant.config):
        tensors["lm_head.weight"] = tensors[next(iter(tensors))]
    save_tensors(tensors, path, variant.files)
    if variant.tokenizer == "tokenizer.model":
        (path / variant.tokenizer).write_bytes(tokenizer_model)
    else:
        for name, text in _byte_level(variant.tokenizer).items():
            (path / name).write_text(text, encoding="utf-8")
    return Written(variant, path, tensors)


def random_tensors(shapes: Shapes, dtype: torch.dtype, seed: int) -> Tensors:
    """Return tensors that keep activations of order one; norms and biases are not trivial."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            values = 0.3 * values
        elif len(shape) == 1:
            values = 0.5 + torch.rand(shape, generator=generator)
        else:
            values = 1.2 * values / math.sqrt(shape[1])
        tensors[name] = values.to(dtype)
    return tensors


def save_tensors(tensors: Tensors, path: Path, files: str) -> None:
    """Write weights.

    Args:
        tensors: name to tensor.
        path: directory.
        files: `safetensors`, `bin` (PyTorch's zip format) or `legacy` (its format before that),
            with `sharded ` before it for several files and an index.
    """
    kind, names = files.removeprefix("sharded "), sorted(tensors)
    where: dict[str, str] = {}
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    count = 1 if kind == files else 3
    for number in range(count):
        part = {name: tensors[name] for name in names[number::count]}
        file = f"{stem}.{suffix}"
        if count > 1:
            file = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        where |= dict.fromkeys(part, file)
        if kind == "safetensors":
            apart = {name: tensor.clone() for name, tensor in part.items()}
            save_file(apart, path / file, metadata={"format": "pt"})
        else:
            torch.save(part, path / file, _use_new_zipfile_serialization=kind == "bin")
    if count > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@cache
def _byte_level(kind: str) -> Mapping[str, str]:
    """Return the files of a byte-level BPE: OPT has vocab.json and merges.txt, Falcon one file."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "tokenizer.json":
        special = [*(f">>{number}<<" for number in range(11)), "<|endoftext|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 20, trainer)
    whole = bpe.to_str()
    if kind == "tokenizer.json":
        return {kind: whole}
    model = json.loads(whole)["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return {
        "vocab.json": json.dumps(model["vocab"]),
        "merges.txt": f"#version: 0.2\n{merges}\n",
        "tokenizer_config.json": json.dumps({"add_bos_token": True, "bos_token": "</s>"}),
    }


_COMMON: Config = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 116,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "transformers_version": "4.36.2",
    "use_cache": True,
    "vocab_size": 320,
}
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
_FATRELU = {"hidden_act": "fatrelu", "hidden_act_param": 0.2}


def _own_code(name: str, kind: str) -> Config:
    """Return the keys that name a checkpoint's own code, which must never be run."""
    auto = {"AutoConfig": f"configuration_{name}.{kind}Config"}
    auto["AutoModelForCausalLM"] = f"modeling_{name}.{kind}ForCausalLM"
    return {"architectures": [f"{kind}ForCausalLM"], "auto_map": auto}


_MISTRAL = _COMMON | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "sliding_window": 48,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_BAMBOO = _MISTRAL | _own_code("bamboo", "Bamboo") | {"model_type": "bamboo", "sliding_window": 32}
_SPARSE_LLAMA = _LLAMA | _own_code("sparsellama", "SparseLlama") | _FATRELU
_MINICPM = (
    _COMMON
    | _own_code("minicpm", "MiniCPM")
    | {
        "_name_or_path": "openbmb/CPM-2B",
        "dim_model_base": 16,
        "initializer_range": 0.1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "torch_dtype": "bfloat16",
    }
)
_OPT: Config = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 132,
    "hidden_size": 64,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 96,
    "model_type": "opt",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 320,
    "word_embed_proj_dim": 64,
}
_FALCON = _own_code("falcon", "Falcon") | {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "model_type": "falcon",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 320,
}
_FALCON_7B = _FALCON | {"hidden_act": "relu", "multi_query": True}
_FALCON_40B = _FALCON | {
    "activation": "relu",
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
}

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_YARN_IN_FULL = {
    "attention_factor": 1 + 0.1 * math.log(8),
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
    "rope_type": "yarn",
}

_gated = partial(Variant, shapes=gated_shapes)
_opt = partial(Variant, family="opt", formula=opt_formula, tokenizer="vocab.json")
_falcon = partial(
    Variant,
    family="falcon",
    shapes=falcon_shapes,
    formula=falcon_formula,
    tokenizer="tokenizer.json",
)
_fatrelu = partial(_gated, activation=("fatrelu", 0.2))
_drelu = partial(_gated, family="bamboo", activation=("drelu", 0.0))

VARIANTS = (
    _gated(
        name="relu-llama",
        family="llama",
        config=_LLAMA | {"num_key_value_heads": 2},
        shapes=partial(gated_shapes, inv_freq=True),
        files="sharded bin",
    ),
    _gated(name="llama-tied", family="llama", config=_LLAMA | {"tie_word_embeddings": True}),
    _gated(
        name="llama-linear",
        family="llama",
        config=_LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    _gated(name="llama-yarn", family="llama", config=_LLAMA | {"rope_scaling": YARN}),
    _gated(name="relu-mistral", family="llama", config=_MISTRAL, files="sharded safetensors"),
    _fatrelu(
        name="prosparse",
        family="prosparse",
        config=_SPARSE_LLAMA | {"model_type": "sparsellama", "torch_dtype": "float32"},
        files="sharded safetensors",
    ),
    _fatrelu(name="minicpm-s-llama-format", family="prosparse", config=_LLAMA | _FATRELU),
    _gated(name="minicpm", family="minicpm", config=_MINICPM, files="bin"),
    _fatrelu(
        name="minicpm-s",
        family="minicpm",
        config=_MINICPM
        | _FATRELU
        | {"model_type": "minicpm", "num_key_value_heads": 2, "tie_word_embeddings": False},
    ),
    _drelu(name="bamboo", config=_BAMBOO, files="sharded safetensors"),
    _drelu(
        name="turbosparse",
        config=_BAMBOO,
        shapes=partial(gated_shapes, predictor=24),
        files="sharded safetensors",
    ),
    _drelu(name="drelu-mistral", config=_MISTRAL | {"hidden_act": "drelu"}),
    _drelu(name="bamboo-yarn", config=_BAMBOO | {"rope_parameters": _YARN_IN_FULL}),
    _opt(
        name="opt-125m",
        config=_OPT,
        shapes=partial(opt_shapes, prefix="model.decoder", head=True),
        files="bin",
    ),
    _opt(
        name="opt-6.7b",
        config=_OPT | {"num_hidden_layers": 3},
        shapes=partial(opt_shapes, prefix="decoder", head=False),
        files="sharded bin",
    ),
    _falcon(name="falcon-7b", config=_FALCON_7B, files="sharded bin"),
    _falcon(name="falcon-40b", config=_FALCON_40B, files="sharded safetensors"),
    _falcon(
        name="falcon-11b",
        config=_FALCON_40B
        | {
            "ffn_hidden_size": 132,
            "num_hidden_layers": 3,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
    ),
    _falcon(
        name="falcon-without-multi-query",
        config=_FALCON_7B | {"multi_query": False},
        shapes=partial(falcon_shapes, head=False),
    ),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
