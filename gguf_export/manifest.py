"""What an export wrote, by everything that is in it, and what it was made with.

`FILE.manifest.json` beside the exported file is written last. While files get their names there is
none, so that none vouches for a mixture of two exports.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from architectures.checkpoint import Checkpoint
from common.errors import FormatError
from common.hashing import HashedFile, hash_file
from common.provenance import Ingredient, Provenance, read, record, shortened, spelt
from common.sealed import seal_of, write_sealed
from common.typed_json import plain
from gguf_export.settings import SUFFIX, ExportConfig

_AGAIN = "export again, or fetch it again"
MANIFEST = ".manifest.json"
"""Added to the exported file's name."""


def manifest_path(file: Path) -> Path:
    """Return where what is known of an exported file is, or of a dense file that goes with it."""
    own = file.with_name(f"{file.name}{MANIFEST}")
    sparse = file.with_name(f"{file.name.removesuffix('.dense.gguf')}{SUFFIX}{MANIFEST}")
    return sparse if file.name.endswith(".dense.gguf") and not own.exists() else own


def write_manifest(
    config: ExportConfig,
    begun: str,
    checkpoint: Checkpoint,
    model_files: Sequence[HashedFile],
    outputs: Iterable[Path],
) -> Path:
    """Hash what was exported and write it down.

    Args:
        config: of the export.
        begun: when it was started.
        checkpoint: the model.
        model_files: its weights.
        outputs: files and directories.

    Returns:
        The manifest.

    Raises:
        OutputError: the system refused.
        DataError: an output cannot be read.
    """
    path = config.out.with_name(f"{config.out.name}{MANIFEST}")
    model = Ingredient(
        role="model",
        name=shortened(config.model),
        identity=checkpoint.fingerprint,
        files=tuple(model_files),
    )
    sources = (config.predictors, config.head_predictor)
    record(
        path,
        begun,
        artifact="exported model",
        identity=None,
        seed=None,
        settings=plain(config),
        ingredients=[model, *(_ingredient(each) for each in sources if each is not None)],
        outputs=_hashed(path.parent, outputs),
    )
    return path


def add_output(file: Path, output: Path) -> None:
    """Vouch for one more file that goes with an exported one, where that has a manifest.

    Raises:
        ResultError: the manifest is damaged.
        OutputError: the system refused.
    """
    path = manifest_path(file)
    if not path.is_file():
        return
    known = read(path)
    [added] = _hashed(path.parent, [output])
    kept = (each for each in known.outputs if each.name != added.name)
    write_sealed(path, plain(replace(known, outputs=(*kept, added))))


def check_outputs(file: Path, outputs: Iterable[Path], remedy: str = _AGAIN) -> str:
    """Compare files with what their export's manifest says of them.

    Args:
        file: the exported file.
        outputs: that or others that go with it; directories stand for their files.
        remedy: what to do about one that differs.

    Returns:
        What was found, in a line: how many were compared.

    Raises:
        FormatError: one holds something else than was exported.
        ResultError: the manifest is damaged.
    """
    path = manifest_path(file)
    if not path.is_file():
        return "no manifest, nothing to compare with"
    known = {each.name: each for each in read(path).outputs}
    found = [each for each in _hashed(path.parent, outputs) if each.name in known]
    for each in found:
        if each != known[each.name]:
            raise FormatError(
                f"{path.parent / each.name}: damaged (not what {path.name} says was exported)",
                remedy,
            )
    return f"{len(found)} files hold what was exported"


def refuse_damaged(file: Path, digest: str) -> None:
    """Do nothing if a file is what was exported, or if nobody knows.

    Args:
        file: an exported file, or any other.
        digest: its XXH3, hexadecimal.

    Raises:
        FormatError: it holds something else.
        ResultError: its manifest is damaged.
    """
    made = described(file)
    for each in () if made is None else made.outputs:
        if each.name == spelt(file.name) and each.xxh3_128 != digest:
            raise FormatError(
                f"{file}: damaged (not what {manifest_path(file).name} says was exported)", _AGAIN
            )


def described(file: Path) -> Provenance | None:
    """Return what an exported file was made with, None where that is not known.

    Raises:
        ResultError: its manifest is damaged.
    """
    path = manifest_path(file)
    return read(path) if path.is_file() else None


def _hashed(base: Path, outputs: Iterable[Path]) -> tuple[HashedFile, ...]:
    found = []
    for output in outputs:
        inside = output.is_dir()
        files = sorted(each for each in output.iterdir() if each.is_file()) if inside else [output]
        for each in files:
            size, digest = hash_file(each)
            name = spelt(Path(os.path.relpath(each, base)).as_posix())
            found.append(HashedFile(name=name, bytes=size, xxh3_128=digest))
    return tuple(found)


def _ingredient(path: Path) -> Ingredient:
    """Return predictors as an ingredient, by the checksum that their index states."""
    role = "head" if (path / "head.json").is_file() else "predictors"
    identity = seal_of(path / f"{role}.json")
    return Ingredient(role=role, name=shortened(str(path)), identity=identity)
