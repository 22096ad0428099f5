"""Dense files: of the arch that computes what the model does, or one that PowerInfer can time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from architectures.checkpoint import Checkpoint
from architectures.model_files import hashed_meanwhile
from common.clock import now
from common.element_types import ELEMENT_NAMES
from common.errors import ExportError
from common.files import atomic_path, refuse_existing, remove_output
from common.hashing import HashedFile
from common.lock import locked
from gguf_export.manifest import manifest_path, write_manifest
from gguf_export.plan import conversion_note, plan_model
from gguf_export.pwri.element_types import FileTypes
from gguf_export.requirements import check_types, window_note
from gguf_export.settings import AUTO, LLAMA_CPP, SECOND_ENGINE, ExportConfig
from gguf_export.smallthinker.file import write_one_expert
from gguf_export.smallthinker.head_predictor import open_head_predictor
from gguf_export.smallthinker.mixture import check_mixture
from gguf_export.smallthinker.mixture_file import mixture_notes, write_mixture
from gguf_export.smallthinker.plan import plan_expert
from gguf_export.smallthinker.requirements import check_one_expert, is_one_expert, shift_note
from gguf_export.smallthinker.second_engine import (
    added_neurons_note,
    check_second_engine,
    check_sizes,
    stored_neurons,
)
from gguf_export.smallthinker.types import ExpertTypes
from gguf_export.tokens import vocabulary as names
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.tokens.splitting import bos_note, splitting_note
from gguf_export.tokens.vocabulary import Vocabulary
from gguf_export.writer import ModelWriter
from gguf_files.names import NOTE_KEY, SMALLTHINKER
from predictor.head.artifact import HeadArtifact

_ENGINES = {SECOND_ENGINE: names.SECOND_ENGINE, LLAMA_CPP: names.LLAMA_CPP}


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """A dense file before it is written.

    Attributes:
        checkpoint: the model.
        vocabulary: its tokenizer.
        types: of its elements; `ExpertTypes` of arch `smallthinker`.
        transposed: of that arch, whether for PowerInfer's second engine; see `plan_expert`.
        head: of that engine, the output head's predictor if there is one.
    """

    checkpoint: Checkpoint
    vocabulary: Vocabulary
    types: FileTypes | ExpertTypes
    transposed: bool = False
    head: HeadArtifact | None = None

    @cached_property
    def architecture(self) -> str:
        """Its `general.architecture`."""
        expert = isinstance(self.types, ExpertTypes)
        return SMALLTHINKER if expert else self.checkpoint.architecture.gguf_name

    @property
    def warnings(self) -> Iterator[str]:
        """What a user should know of it, a line each."""
        if isinstance(self.types, ExpertTypes):
            tensors = list(plan_expert(self.checkpoint, self.types, transposed=self.transposed))
            said = [shift_note(self.checkpoint)]
            said += [note(self.checkpoint, self.vocabulary) for note in (splitting_note, bos_note)]
            said += [added_neurons_note(self.checkpoint.shape)] if self.transposed else []
        else:
            tensors = list(plan_model(self.checkpoint, sparse=False, types=self.types))
            said = [self.checkpoint.architecture.dense_note]
        engine = names.LLAMA_CPP if isinstance(self.types, ExpertTypes) else names.POWERINFER
        engine = names.SECOND_ENGINE if self.transposed else engine
        for line in (conversion_note(tensors, engine), *said):
            if line is not None:
                yield line if line.startswith("dense file") else f"dense file: {line}"

    def write(self, path: Path, target: Path) -> HashedFile:
        """Write it; see `ModelFile.write`.

        Args:
            path: a temporary name.
            target: its final name, for messages.

        Returns:
            What was written, by the target's name.
        """
        if isinstance(self.types, ExpertTypes):
            return write_one_expert(
                self.checkpoint,
                self.vocabulary,
                self.types,
                path,
                target,
                transposed=self.transposed,
                head=self.head,
            )
        writer = ModelWriter(self.checkpoint, self.vocabulary, self.types)
        note = {NOTE_KEY: self.checkpoint.architecture.dense_note or ""}
        return writer.write(path, target, note, sparse=False)


def dense_model(
    config: ExportConfig, checkpoint: Checkpoint, vocabulary: Vocabulary
) -> DenseModel | None:
    """Return the dense file that goes with a sparse one, None if none is asked for.

    Raises:
        ExportError: an arch or type that the model cannot have.
    """
    if not config.dense:
        return None
    types = dense_types(config, checkpoint)
    return DenseModel(checkpoint=checkpoint, vocabulary=vocabulary, types=types)


def dense_types(config: ExportConfig, checkpoint: Checkpoint) -> FileTypes | ExpertTypes:
    """Return the element types of a dense file, which tell its arch too.

    Raises:
        ExportError: an arch or type that the model cannot have.
    """
    family, asked = checkpoint.architecture.gguf_name, config.dense_arch
    if asked == SMALLTHINKER:
        check_one_expert(checkpoint, f"--dense-arch {asked}")
    if asked == SMALLTHINKER or (asked == AUTO and is_one_expert(checkpoint)):
        config.dense_types.check(checkpoint.shape)
        return config.dense_types
    if asked not in (AUTO, family):
        raise ExportError(f"--dense-arch {asked}: the model is a {family}", "leave it out")
    given = config.dense_type
    if given is not None and given not in ELEMENT_NAMES:
        raise ExportError(
            f"--dense-type {given}: psp writes arch {family} in the types of its sparse files",
            f"choose {' or '.join(ELEMENT_NAMES)}",
        )
    types = config.types if given is None else replace(config.types, weights=given)
    check_types(checkpoint, types, dense=True)
    return types


@dataclass(frozen=True)
class SingleFile:
    """A file that is all of an export.

    Attributes:
        model_file: its path.
        warnings: what a user should know of it, a line each.
        written: what it holds.
    """

    model_file: Path
    warnings: tuple[str, ...]
    written: HashedFile

    @property
    def outputs(self) -> dict[str, str]:
        """The paths that are there, by name."""
        paths = {"model_file": self.model_file, "manifest": manifest_path(self.model_file)}
        return {name: str(path) for name, path in paths.items() if path.exists()}

    def table(self, checks: int | None, dense_checks: int | None = None) -> str:
        """Return it as text, and how many checks of it hold (None: not verified)."""
        verified = "no" if checks is None else f"{checks} checks hold"
        return f"model file             {self.model_file}\nverified               {verified}"


def export_single(config: ExportConfig, verify: Callable[[Path], None] | None = None) -> SingleFile:
    """Write the file that llama.cpp or PowerInfer's second engine runs.

    Args:
        config: what to write.
        verify: looks at it before it gets its name; if it raises, what was there stays.

    Raises:
        PspError: an unusable checkpoint, one that the graph cannot compute, an existing output, or
            a refused write.
    """
    with locked(config.out):
        return _exported(config, verify)


def _exported(config: ExportConfig, verify: Callable[[Path], None] | None) -> SingleFile:
    begun, checkpoint = now(), Checkpoint.open(config.model, experts=True)
    write = _export_expert if checkpoint.shape.experts is None else _export_mixture
    with hashed_meanwhile(checkpoint) as files:
        made = write(config, checkpoint, verify)
    write_manifest(config, begun, checkpoint, files.result(), [config.out], [made.written])
    return made


def _export_expert(
    config: ExportConfig, checkpoint: Checkpoint, verify: Callable[[Path], None] | None
) -> SingleFile:
    """Write a model as one expert, transposed if it is for PowerInfer's second engine."""
    second = config.engine == SECOND_ENGINE
    check = check_second_engine if second else check_one_expert
    check(checkpoint, f"--engine {config.engine}")
    shape = checkpoint.shape
    neurons = stored_neurons(shape.d_model, shape.d_ff) if second else shape.d_ff
    config.plain_types.check(replace(shape, d_ff=neurons))
    vocabulary = _vocabulary(config, checkpoint)
    given = config.head_predictor
    made = DenseModel(
        checkpoint=checkpoint,
        vocabulary=vocabulary,
        types=config.plain_types,
        transposed=second,
        head=None if given is None else open_head_predictor(given, checkpoint),
    )
    told = (line.removeprefix("dense file: ") for line in made.warnings)
    said = window_note(checkpoint, vocabulary.engine)
    window = () if said is None else (said,)
    refuse_existing(config.out, force=config.force)
    with ExitStack() as stack:
        path = stack.enter_context(atomic_path(config.out))
        written = made.write(path, config.out)
        if verify is not None:
            verify(path)
        remove_output(manifest_path(config.out))
    warnings = (*checkpoint.notes, *vocabulary.notes, *vocabulary.warnings, *window, *told)
    return SingleFile(config.out, warnings, written)


def _vocabulary(config: ExportConfig, checkpoint: Checkpoint) -> Vocabulary:
    """Read the model's tokenizer for the engine that will run the file."""
    rows = checkpoint.shape.vocab_size
    engine = _ENGINES[config.engine]
    return read_vocabulary(checkpoint.directory, rows, checkpoint.config, engine=engine)


def _export_mixture(
    config: ExportConfig, checkpoint: Checkpoint, verify: Callable[[Path], None] | None
) -> SingleFile:
    """Write a mixture of experts, transposed if it is for PowerInfer's second engine."""
    second = config.engine == SECOND_ENGINE
    check_mixture(checkpoint)
    if second:
        check_sizes(checkpoint.shape, f"--engine {config.engine}")
    config.plain_types.check(checkpoint.shape)
    vocabulary = _vocabulary(config, checkpoint)
    given, types = config.head_predictor, config.plain_types
    head = None if given is None else open_head_predictor(given, checkpoint)
    refuse_existing(config.out, force=config.force)
    with atomic_path(config.out) as path:
        written = write_mixture(
            checkpoint, vocabulary, types, path, config.out, transposed=second, head=head
        )
        if verify is not None:
            verify(path)
        remove_output(manifest_path(config.out))
    told = (
        *checkpoint.notes,
        *vocabulary.notes,
        *vocabulary.warnings,
        *mixture_notes(checkpoint, vocabulary),
    )
    return SingleFile(config.out, told, written)
