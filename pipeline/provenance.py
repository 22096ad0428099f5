"""What each command writes down of its artifact; see `common.provenance`.

Written when the artifact is complete, beside its other files, none of which depends on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.clock import now
from common.files import sha256
from common.hashing import HashedFile
from common.provenance import PROVENANCE, Ingredient, record, shortened
from common.sealed import seal_of
from common.text_sources.names import shown
from common.typed_json import plain
from predictor.artifact import INDEX, PredictorArtifact
from predictor.head.artifact import INDEX as HEAD_INDEX
from predictor.head.artifact import HeadArtifact
from predictor.traces.store import TraceStore


@dataclass
class Making:
    """A command at work.

    Attributes:
        begun: when.
        settings: the command's.
    """

    begun: str
    settings: Any

    @classmethod
    def begin(cls, settings: Any) -> Making:
        """Note when a command begins.

        Args:
            settings: the command's, with `seed` and `resume`.
        """
        return cls(begun=now(), settings=settings)

    def traces(self, store: TraceStore) -> None:
        """Write what a store was made with, if it is complete."""
        if not store.progress.complete:
            return
        header = store.header
        with store.place.changing(PROVENANCE) as file:
            self._record(
                file, "traces", store.identity, [_model_of(store), _text_of(store, header.data)]
            )

    def predictors(self, artifact: PredictorArtifact, store: TraceStore) -> None:
        """Write what predictors were made with.

        Args:
            artifact: they.
            store: what they were trained on.
        """
        traces = Ingredient(role="traces", name=shortened(str(store)), identity=store.identity)
        ingredients = [traces, _model_of(store)]
        if self.settings.data:
            text = Ingredient(
                role="held-out text", name=_sources(self.settings.data), identity=None
            )
            ingredients.append(text)
        self._record(
            artifact.path / PROVENANCE, "predictors", seal_of(artifact.path / INDEX), ingredients
        )

    def head(self, artifact: HeadArtifact) -> None:
        """Write what a head's predictor was made with."""
        header, settings = artifact.header, self.settings
        ingredients = [
            Ingredient(
                role="model", name=shortened(header.model), identity=header.model_fingerprint
            ),
            Ingredient(role="head", name="output", identity=header.head_sha256),
        ]
        if settings.data:
            ingredients.append(Ingredient(role="text", name=_sources(settings.data), identity=None))
        if settings.traces is not None:
            name = shortened(str(settings.traces))
            ingredients.append(Ingredient(role="traces", name=name, identity=None))
        self._record(
            artifact.path / PROVENANCE, "head", seal_of(artifact.path / HEAD_INDEX), ingredients
        )

    def sparsified(self) -> None:
        """Write what a sparsified model was made with."""
        settings = self.settings
        ingredients = [
            Ingredient(role="model", name=shortened(settings.model), identity=None),
            Ingredient(role="text", name=_sources(settings.data), identity=None),
        ]
        self._record(settings.out / PROVENANCE, "sparsified model", None, ingredients)

    def _record(
        self, file: Path, artifact: str, identity: str | None, ingredients: list[Ingredient]
    ) -> None:
        record(
            file,
            self.begun,
            artifact=artifact,
            identity=identity,
            seed=self.settings.seed,
            settings=plain(self.settings),
            ingredients=ingredients,
            resumed=self.settings.resume,
        )


def _model_of(store: TraceStore) -> Ingredient:
    header = store.header
    files: tuple[HashedFile, ...] = store.progress.model_files
    return Ingredient(
        role="model",
        name=shortened(header.model),
        identity=header.model_fingerprint,
        files=files,
    )


def _text_of(store: TraceStore, data: Any) -> Ingredient:
    texts = [shard.text_sha256 for shard in store.progress.shards]
    return Ingredient(role="text", name=_sources(data), identity=sha256(json.dumps(texts).encode()))


def _sources(data: Any) -> str:
    names = (data,) if isinstance(data, str) else tuple(data)
    return shown(tuple(shortened(str(name)) for name in names))
