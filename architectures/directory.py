"""What a directory is that is no Hugging Face checkpoint, told by the files that its kind leaves.

Each kind has its own line: what it is, and how to come to a checkpoint from it.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import FETCH_AGAIN, CheckpointError, printable
from common.files import read_whole

ORIGINAL = "pass the float16, bfloat16 or float32 original"
"""Remedy for weights that were quantised, or written for another program."""

_LANGUAGE_MODEL = "pass a causal language model"
_MOST_NAMED = 3
_MOST_BYTES = 1 << 20
"""Of a small JSON file that is read for a name in it."""


@dataclass(frozen=True)
class Kind:
    """A kind of directory.

    Attributes:
        marks: patterns of names in it, of which any tells; `folder/*` looks into folders.
        what: what it holds.
        remedy: takes what stands before names in it, and the names that told, in order.
    """

    marks: tuple[str, ...]
    what: str
    remedy: Callable[[str, list[str]], str]


def _say(remedy: str) -> Callable[[str, list[str]], str]:
    return lambda before, names: remedy


def _name_a_file(before: str, names: list[str]) -> str:
    first = next((name for name in names if "-00001-of-" in name), names[0])
    others = [name for name in names if name != first]
    also = f" (or {', '.join(others[:_MOST_NAMED])})" if others else ""
    return f"name the file to use: --model {before}{first}{also}"


def _name_a_folder(before: str, names: list[str]) -> str:
    folders = [str(Path(name).parent) for name in names]
    also = f" (or {', '.join(folders[1 : 1 + _MOST_NAMED])})" if folders[1:] else ""
    return f"name the model to use: --model {before}{folders[0]}{also}"


def _merge(before: str, names: list[str]) -> str:
    base = text_in(Path(before, names[0]), "base_model_name_or_path")
    into = f"its base model {base!r}" if base else "its base model"
    return (
        f"merge it into {into} (peft: PeftModel.from_pretrained(base, adapter)"
        ".merge_and_unload().save_pretrained(DIR)) and pass the result"
    )


_KINDS = (
    Kind(("adapter_config.json",), "a LoRA adapter, no model", _merge),
    Kind(("*.gguf",), "GGUF files, no Hugging Face checkpoint", _name_a_file),
    Kind(("model_index.json",), "a diffusers pipeline", _say(_LANGUAGE_MODEL)),
    Kind(
        ("modules.json", "config_sentence_transformers.json"),
        "a sentence-transformers model, which makes embeddings and no text",
        _say(_LANGUAGE_MODEL),
    ),
    Kind(("*.onnx", "onnx/*.onnx"), "ONNX graphs", _say("pass the model that they were made of")),
    Kind(
        ("consolidated*.pth", "consolidated*.safetensors", "params.json"),
        "weights in their publisher's own layout",
        _say(
            "pass the Hugging Face version, or convert them with transformers' "
            "convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py"
        ),
    ),
    Kind(
        ("zero_to_fp32.py", "global_step*/*"),
        "a checkpoint of DeepSpeed, in pieces",
        _say("run 'python zero_to_fp32.py . .' in it, put config.json beside, and pass that"),
    ),
    Kind(
        ("*.distcp", "pytorch_model_fsdp_*/*.distcp"),
        "a checkpoint of FSDP, in pieces",
        _say("join them with 'accelerate merge-weights' and pass the result"),
    ),
    Kind(
        ("tf_model*.h5", "flax_model*.msgpack"),
        "weights for TensorFlow or JAX",
        _say("save them from transformers 4 for PyTorch (from_tf or from_flax) and pass that"),
    ),
    Kind(
        ("predictors.json", "head.json", "layer-*/weights.safetensors"),
        "traces or predictors of psp's",
        _say("pass the model that they were made of"),
    ),
)
_FOLDERS = Kind(
    ("*/config.json", "snapshots/*/config.json"),
    "no model, but folders that hold one",
    _name_a_folder,
)


def other_kind(path: Path) -> tuple[str, str] | None:
    """Return problem and remedy for a directory without weights or without config.json.

    Returns:
        None where nothing tells what else it is.
    """
    for kind in (*_KINDS, _FOLDERS):
        if names := sorted(set(_matching(path, kind.marks))):
            return f"{path}: holds {kind.what}", kind.remedy(f"{path}{os.sep}", names)
    if not os.listdir(path):
        return f"{path}: is empty", "pass a Hugging Face model directory"
    return None


def other_repository(model: str, files: Collection[str]) -> tuple[str, str] | None:
    """Return the same for a repository of the hub, told by its files' names alone.

    Args:
        model: `OWNER/NAME`.
        files: paths of all its files; marks count in any of its folders.
    """
    for kind in _KINDS:
        marked = (name for name in files if any(map(PurePosixPath(name).match, kind.marks)))
        if names := sorted(marked):
            return f"{model}: holds {kind.what}", kind.remedy(f"{model}:", names)
    return None


def _matching(path: Path, marks: tuple[str, ...]) -> Iterator[str]:
    """Yield what is named so, relative to a directory; unreadable folders hold nothing."""
    for mark in marks:
        folder, _, rest = mark.partition("/")
        if not rest:
            yield from fnmatch.filter(_listed(path), folder)
        else:
            for name in fnmatch.filter(_listed(path), folder):
                yield from (f"{name}/{found}" for found in _matching(path / name, (rest,)))


def _listed(path: Path) -> list[str]:
    try:
        return os.listdir(path) if path.is_dir() else []
    except OSError:
        return []


def text_in(file: Path, key: str) -> str:
    """Return a short text of a small JSON object, empty if there is none."""
    try:
        found = json.loads(read_whole(file, CheckpointError, FETCH_AGAIN, limit=_MOST_BYTES))
    except (CheckpointError, ValueError, RecursionError):
        return ""
    value = found.get(key) if isinstance(found, dict) else None
    return printable(value) if isinstance(value, str) else ""
