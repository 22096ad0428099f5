"""What led from a checkpoint to an exported file, as far as the artifacts in a directory tell."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.provenance import PROVENANCE, Ingredient, Provenance, read

_MANIFEST = ".manifest.json"
_ORDER = ("sparsified model", "traces", "predictors", "head", "exported model")
_DIGITS = 12
"""Of a checksum that a reader can compare by eye."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """An artifact of the chain.

    Attributes:
        what: its kind.
        name: of its file or directory.
        identity: the beginning of its checksum, empty where it has none.
        facts: how it was made, a line each.
        broken: what in it was not made from the artifacts before it in the chain.
    """

    what: str
    name: str
    identity: str
    facts: tuple[str, ...]
    broken: tuple[str, ...]


def chain_of(directory: Path) -> list[Link]:
    """Return the artifacts in a directory, or directly below it, the checkpoint first.

    Raises:
        ResultError: what one was made with is damaged.
    """
    found = sorted(_found(directory), key=lambda each: _ORDER.index(each[1].artifact))
    if not found:
        return []
    identities = {made.artifact: made.identity for _, made in found}
    origin = next((each for _, made in found for each in made.ingredients if _is_model(each)), None)
    first = [] if origin is None else [_origin(origin)]
    models = {} if origin is None else {"model": origin.identity}
    return [*first, *(_link(path, made, {**models, **identities}) for path, made in found)]


def _found(directory: Path) -> Iterator[tuple[Path, Provenance]]:
    places = [directory, *sorted(path for path in directory.iterdir() if path.is_dir())]
    for place in places:
        files = [place / PROVENANCE, *sorted(place.glob(f"*{_MANIFEST}"))]
        for file in (each for each in files if os.path.lexists(each)):
            made = read(file)
            if made.artifact in _ORDER:
                yield file, made


def _is_model(each: Ingredient) -> bool:
    return each.role == "model" and each.identity is not None


def _origin(model: Ingredient) -> Link:
    sizes = sum(file.bytes for file in model.files)
    facts = (f"{len(model.files)} files, {sizes / 1e9:.2f} GB",) if model.files else ()
    return Link(
        what="model",
        name=model.name,
        identity=(model.identity or "")[:_DIGITS],
        facts=facts,
        broken=(),
    )


def _link(file: Path, made: Provenance, known: dict[str, str | None]) -> Link:
    run = made.runs[-1]
    versions = [f"psp {run.psp}" + (f" ({run.commit[:_DIGITS]})" if run.commit else "")]
    versions += [f"{name} {run.versions[name]}" for name in ("torch",) if name in run.versions]
    facts = [f"{run.begun} to {run.ended}", ", ".join(versions)]
    facts += [] if made.seed is None else [f"seed {made.seed}"]
    facts += [] if run.command is None else [run.command]
    is_file = file.name.endswith(_MANIFEST)
    return Link(
        what=made.artifact,
        name=file.name.removesuffix(_MANIFEST) if is_file else file.parent.name,
        identity=(made.identity or "")[:_DIGITS],
        facts=tuple(facts),
        broken=tuple(_broken(made.ingredients, known)),
    )


def _broken(ingredients: Sequence[Ingredient], known: dict[str, str | None]) -> Iterator[str]:
    for each in ingredients:
        here = known.get(each.role)
        if here is not None and each.identity is not None and here != each.identity:
            yield f"made from other {each.role} ({each.identity[:_DIGITS]})"
