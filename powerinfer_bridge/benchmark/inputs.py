"""What a benchmark read, told by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm
from xxhash import xxh3_128

from common.errors import DataError
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.subject import Subject

_PIECE = 1 << 24
_SMALL = 1 << 28  # no progress bar for what is read in a moment


def hash_file(path: Path) -> tuple[int, str]:
    """Return a file's bytes and its XXH3-128, hexadecimal; it is read piece by piece.

    Raises:
        DataError: it cannot be read.
    """
    state, size = xxh3_128(), 0
    try:
        total = path.stat().st_size
        with (
            path.open("rb") as file,
            tqdm(
                total=total,
                unit="B",
                unit_scale=True,
                desc=f"hash {path.name}",
                disable=True if total < _SMALL else None,
            ) as bar,
        ):
            while piece := file.read(_PIECE):
                state.update(piece)
                size += len(piece)
                bar.update(len(piece))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", "check that the file can be read"
        ) from error
    return size, state.hexdigest()


def describe_inputs(
    config: BenchConfig, subject: Subject, text: str, prompts: list[str]
) -> list[dict[str, Any]]:
    """Return role, path, size and hash of everything read.

    Text and prompts are hashed as they were understood, whatever file or data set they came from;
    a prompt of the command line has no path of its own.
    """
    paths = {
        "model": config.file,
        "dense_model": subject.dense.path if subject.dense else None,
        "llama_cpp_model": subject.llama_cpp_file.path if subject.llama_cpp_file else None,
        "gpu_index": subject.index,
    }
    known: dict[Path, tuple[int, str]] = {}
    inputs = []
    for role, path in paths.items():
        if path is not None:
            size, digest = known.setdefault(path, known.get(path) or hash_file(path))
            inputs.append({"role": role, "path": str(path), "bytes": size, "xxh3_128": digest})
    source = config.data or "pydoc_data.topics"
    inputs.append(_text("text", source, text))
    inputs.append(_text("prompts", str(config.prompts or "--prompt"), "\n".join(prompts)))
    return inputs


def _text(role: str, source: str, text: str) -> dict[str, Any]:
    data = text.encode("utf-8", "surrogateescape")
    digest = xxh3_128(data).hexdigest()
    return {"role": role, "path": source, "bytes": len(data), "xxh3_128": digest}
