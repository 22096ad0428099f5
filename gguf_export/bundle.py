"""The export bundle: the PWRI file and what PowerInfer expects beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from architectures.checkpoint import Checkpoint
from common.errors import ExportError
from common.files import (
    atomic_directory,
    atomic_path,
    refuse_existing,
    remove_output,
    write_error,
)
from common.version import tool_version
from gguf_export.predictor_source import (
    PredictorSource,
    open_predictors,
    write_directory,
    write_statistics,
)
from gguf_export.pwri.element_types import FileTypes
from gguf_export.pwri.gpu_index import index_path
from gguf_export.pwri.schema import (
    ACTIVATION_KEY,
    ACTIVATION_THRESHOLD_KEY,
    FINGERPRINT_KEY,
    NOTE_KEY,
    RECIPE_KEY,
    THRESHOLD_KEY,
    VERSION_KEY,
)
from gguf_export.pwri.statistics import ACTIVATION_DIRECTORY, statistics_file
from gguf_export.requirements import check_requirements
from gguf_export.settings import SUFFIX, ExportConfig
from gguf_export.tensors import PlannedTensor, plan_model, plan_predictors
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.tokens.vocabulary import Vocabulary
from gguf_export.writer import write_file

Check = Callable[[Path], None]
"""Looks at the model file before it gets its name; raises if it must not get it."""


@dataclass(frozen=True)
class Bundle:
    """Paths of an export.

    Attributes:
        model_file: the PWRI file.
        predictor_directory: `model_N.pt` and `config.json`, the form that PowerInfer's own
            converters read.
        activation_directory: `activation_N.pt`, hot/cold statistics; not there if imported
            predictors came without.
        dense_file: only written on demand.
        warnings: what a user should know of the files, a line each.
    """

    model_file: Path
    predictor_directory: Path
    activation_directory: Path
    dense_file: Path
    warnings: tuple[str, ...] = ()

    @classmethod
    def beside(cls, model_file: Path) -> Bundle:
        """Return the bundle of a model file."""
        stem = model_file.name.removesuffix(SUFFIX)
        return cls(
            model_file,
            model_file.with_name(f"{stem}.predictors"),
            model_file.with_name(ACTIVATION_DIRECTORY),
            model_file.with_name(f"{stem}.dense.gguf"),
        )

    def refuse_existing(self, *, force: bool) -> None:
        """Refuse to replace anything without `force`, and another model's statistics at all.

        Raises:
            ExportError: another exported model lies in the directory, whose statistics have the
                same name, which PowerInfer fixes.
            OutputError: an output is there already.
        """
        names = {path.name for path in self.model_file.parent.glob(f"*{SUFFIX}")}
        others = names - {self.model_file.name}
        if others and self.activation_directory.exists():
            raise ExportError(
                f"{self.activation_directory}: belongs to {sorted(others)[0]}",
                "give every model a directory of its own",
            )
        first = statistics_file(self.activation_directory, 0).name
        refuse_existing(self.model_file, force=force)
        refuse_existing(self.predictor_directory, force=force, marker="config.json")
        refuse_existing(self.activation_directory, force=force, marker=first)
        refuse_existing(self.dense_file, force=force)
        refuse_existing(index_path(self.model_file), force=force)

    @property
    def outputs(self) -> dict[str, str]:
        """The paths that are there, by name."""
        names = ("model_file", "predictor_directory", "activation_directory", "dense_file")
        paths = {name: getattr(self, name) for name in names}
        return {name: str(path) for name, path in paths.items() if path.exists()}

    def table(self, checks: int | None) -> str:
        """Return them as text, and how many checks of the model file hold (None: not verified)."""
        verified = "no" if checks is None else f"{checks} checks hold"
        facts = {**self.outputs, "verified": verified}
        return "\n".join(f"{name.replace('_', ' '):<22} {text}" for name, text in facts.items())


def export(config: ExportConfig, check: Check | None = None) -> Bundle:
    """Write the bundle under temporary names; the model file gets its name last.

    Args:
        config: what to write.
        check: looks at the model file before anything gets its name. If it raises, nothing does,
            and existing outputs stay as they are.

    Raises:
        PspError: the checkpoint or predictors are unusable or do not belong together, sizes that
            PowerInfer cannot run, existing outputs, or a refused write.
    """
    checkpoint = Checkpoint.open(config.model)
    predictors = open_predictors(config.predictors)
    ranks = check_requirements(config, checkpoint, predictors)
    vocab_size = checkpoint.shape.vocab_size
    vocabulary = read_vocabulary(checkpoint.path, vocab_size, checkpoint.config)
    notes = (dense_note(checkpoint),) if config.dense else ()
    bundle = replace(Bundle.beside(config.out), warnings=(*vocabulary.warnings, *notes))
    bundle.refuse_existing(force=config.force)
    tensors = [
        *plan_model(checkpoint, sparse=True, types=config.types),
        *plan_predictors(predictors, ranks, checkpoint.shape, config.types),
    ]
    write = partial(_write, checkpoint=checkpoint, vocabulary=vocabulary, types=config.types)
    with _unnamed(bundle, config.dense, predictors.counted) as unnamed:
        write_directory(unnamed.predictor_directory, predictors)
        if predictors.counted:
            write_statistics(unnamed.activation_directory, predictors)
        keys = _sparse_keys(checkpoint, predictors)
        write(unnamed.model_file, bundle.model_file, keys, tensors)
        if check is not None:
            check(unnamed.model_file)
        if config.dense:
            dense = list(plan_model(checkpoint, sparse=False, types=config.types))
            note = {NOTE_KEY: dense_note(checkpoint)}
            write(unnamed.dense_file, bundle.dense_file, note, dense)
    return bundle


@contextmanager
def _unnamed(bundle: Bundle, dense: bool, counted: bool) -> Iterator[Bundle]:
    """Yield a bundle of temporary names, which become the bundle's own, the model file's last.

    Then what an earlier model left there goes: its index, which PowerInfer would load, and the
    dense file and statistics where this one has none.
    """
    with ExitStack() as stack:
        paths = {"model_file": stack.enter_context(atomic_path(bundle.model_file))}
        if dense:
            paths["dense_file"] = stack.enter_context(atomic_path(bundle.dense_file))
        for name in ("predictor_directory", *(["activation_directory"] if counted else [])):
            paths[name] = stack.enter_context(atomic_directory(getattr(bundle, name)))
        yield replace(bundle, warnings=(), **paths)
        remove_output(index_path(bundle.model_file))
        if not dense:
            remove_output(bundle.dense_file)
        if not counted:
            remove_output(bundle.activation_directory)


def _sparse_keys(checkpoint: Checkpoint, predictors: PredictorSource) -> dict[str, float | str]:
    return {
        THRESHOLD_KEY: predictors.threshold,
        ACTIVATION_THRESHOLD_KEY: checkpoint.shape.activation_threshold,
        RECIPE_KEY: predictors.recipe,
    }


def _write(
    path: Path,
    target: Path,
    keys: Mapping[str, float | str],
    tensors: list[PlannedTensor],
    *,
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    types: FileTypes,
) -> None:
    """Write one of the two model files to `path`, whose final name `target` errors show."""
    try:
        write_file(
            path,
            architecture=checkpoint.architecture,
            model=checkpoint.shape,
            name=os.fsencode(checkpoint.path.resolve().name).decode("utf-8", "replace"),
            vocabulary=vocabulary,
            keys={**keys, **_provenance(checkpoint)},
            tensors=tensors,
            types=types,
            sparse=THRESHOLD_KEY in keys,
        )
    except OSError as error:
        raise write_error(target, error) from error


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        VERSION_KEY: tool_version(),
        FINGERPRINT_KEY: checkpoint.fingerprint,
        ACTIVATION_KEY: checkpoint.shape.activation,
    }


def dense_note(checkpoint: Checkpoint) -> str:
    """Return what a user must know of a dense file."""
    note = checkpoint.architecture.dense_note
    assert note is not None, "refused before"
    return note
