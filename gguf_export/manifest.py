"""What an export wrote, by everything that is in it, and what it was made with.

`FILE.manifest.json` beside the exported file is written last. While files get their names there is
none, so that none vouches for a mixture of two exports.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from architectures.checkpoint import Checkpoint
from common.errors import FormatError, OutputError
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
    dense = file.name.endswith(".dense.gguf")
    return sparse if dense and not os.path.lexists(own) else own


def write_manifest(
    config: ExportConfig,
    begun: str,
    checkpoint: Checkpoint,
    model_files: Sequence[HashedFile],
    outputs: Iterable[Path],
    written: Iterable[HashedFile],
) -> Path:
    """Write down what was exported, by hashes.

    Args:
        config: of the export.
        begun: when it was started.
        checkpoint: the model.
        model_files: its weights.
        outputs: files and directories.
        written: those of them that were hashed as they were written; the others are read.

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
    known = {spelt(each.name): replace(each, name=spelt(each.name)) for each in written}
    record(
        path,
        begun,
        artifact="exported model",
        identity=None,
        seed=None,
        settings=plain(config),
        ingredients=[model, *(_ingredient(each) for each in sources if each is not None)],
        outputs=[
            known.get(name) or _hashed(name, file) for name, file in _files(path.parent, outputs)
        ],
    )
    return path


@contextmanager
def changed_output(file: Path, output: Path) -> Iterator[None]:
    """Write one more file that goes with an exported one, and vouch for it if that has a manifest.

    Nothing is said of the file meanwhile, so that a kill leaves none that differs.

    Raises:
        ResultError: the manifest is damaged.
        OutputError: the system refused.
    """
    path, known = manifest_path(file), described(file)
    if known is None:
        yield
        return
    name = _name(path.parent, output)
    others = tuple(each for each in known.outputs if each.name != name)
    if others != known.outputs:
        write_sealed(path, plain(replace(known, outputs=others)))
    try:
        yield
    except BaseException:
        with suppress(OutputError):
            write_sealed(path, plain(known))
        raise
    [added] = (_hashed(*each) for each in _files(path.parent, [output]))
    write_sealed(path, plain(replace(known, outputs=(*others, added))))


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
    path, made = manifest_path(file), described(file)
    if made is None:
        return "no manifest, nothing to compare with"
    known = {each.name: each for each in made.outputs}
    compared = 0
    for name, each in _files(path.parent, outputs):
        if name not in known:
            continue
        if not _holds(each, known[name]):
            raise FormatError(
                f"{path.parent / name}: damaged (not what {path.name} says was exported)", remedy
            )
        compared += 1
    return f"{compared} files hold what was exported"


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
        ResultError: its manifest is damaged, or something else is in its place.
    """
    path = manifest_path(file)
    return read(path) if os.path.lexists(path) else None


def _files(base: Path, outputs: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Yield files and those of directories, with their names relative to a directory."""
    for output in outputs:
        inside = output.is_dir()
        files = sorted(each for each in output.iterdir() if each.is_file()) if inside else [output]
        for each in files:
            yield _name(base, each), each


def _holds(path: Path, known: HashedFile) -> bool:
    """Whether a file is what is known of it; one of another size, maybe terabytes, is not read."""
    with suppress(OSError):  # which its hash tells
        if path.stat().st_size != known.bytes:
            return False
    return _hashed(known.name, path) == known


def _hashed(name: str, path: Path) -> HashedFile:
    size, digest = hash_file(path)
    return HashedFile(name=name, bytes=size, xxh3_128=digest)


def _name(base: Path, file: Path) -> str:
    return spelt(Path(os.path.relpath(file, base)).as_posix())


def _ingredient(path: Path) -> Ingredient:
    """Return predictors as an ingredient, by the checksum that their index states."""
    role = "head" if (path / "head.json").is_file() else "predictors"
    identity = seal_of(path / f"{role}.json")
    return Ingredient(role=role, name=shortened(str(path)), identity=identity)
