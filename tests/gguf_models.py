"""Small GGUF files written with gguf's own writer, key by key and tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType

Data = tuple[npt.NDArray[Any], GGMLQuantizationType]
VOCAB, D_MODEL, D_FF, HEADS, KV_HEADS = 320, 256, 512, 4, 2
SHAPES = {
    "token_embd": (VOCAB, D_MODEL),
    "output": (VOCAB, D_MODEL),
    "output_norm": (D_MODEL,),
    "blk.0.attn_norm": (D_MODEL,),
    "blk.0.attn_q": (D_MODEL, D_MODEL),
    "blk.0.attn_k": (D_MODEL // 2, D_MODEL),
    "blk.0.attn_v": (D_MODEL // 2, D_MODEL),
    "blk.0.attn_output": (D_MODEL, D_MODEL),
    "blk.0.ffn_norm": (D_MODEL,),
    "blk.0.ffn_gate": (D_FF, D_MODEL),
    "blk.0.ffn_up": (D_FF, D_MODEL),
    "blk.0.ffn_down_t": (D_FF, D_MODEL),
}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += ["\u2581", "a", "b", "\u2581a", "ab", *(f"<pad{n}>" for n in range(VOCAB - 264))]


def llama_keys() -> dict[str, Any]:
    """Return the keys of a LLaMA of one layer with a SentencePiece vocabulary."""
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * 5 + [TokenType.UNUSED] * (VOCAB - 264)
    scores = [0.0] * 259 + [-float(number) for number in range(VOCAB - 259)]
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": D_MODEL,
        "llama.block_count": 1,
        "llama.feed_forward_length": D_FF,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": D_MODEL // HEADS,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.bos_token_id": 1,
    }


def llama_tensors(kind: GGMLQuantizationType = GGMLQuantizationType.F16) -> dict[str, Data]:
    """Return its tensors: matrices of random bytes of a type, norms of random float32."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Data] = {}
    for name, shape in SHAPES.items():
        block, size = GGML_QUANT_SIZES[kind]
        if len(shape) == 1:
            norm = rng.uniform(0.5, 1.5, shape).astype(np.float32)
            tensors[f"{name}.weight"] = norm, GGMLQuantizationType.F32
        elif kind in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
            dtype = np.float16 if kind is GGMLQuantizationType.F16 else np.float32
            numbers = (rng.standard_normal(shape) / 16).astype(dtype)
            tensors[f"{name}.weight"] = numbers, kind
        else:
            data = rng.integers(0, 256, (shape[0], shape[1] // block * size), dtype=np.uint8)
            tensors[f"{name}.weight"] = data, kind
    return tensors


def write_gguf(
    path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Data], *, sparse: bool = True
) -> Path:
    """Write a file; a dense one (`GGUF`) has its down matrices under the dense name, transposed."""
    writer = GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, (data, kind) in tensors.items():
        if not sparse and "ffn_down_t" in name:
            name, data = name.replace("_t.", "."), np.ascontiguousarray(data.T)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if sparse:
        path.write_bytes(b"PWRI" + path.read_bytes()[4:])
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    if not isinstance(value, list):
        writer.add_key_value(key, value, kinds[type(value)])
        return
    element = GGUFValueType.INT32 if isinstance(value[0], int) else kinds[type(value[0])]
    writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=element)
