"""The export bundle: the PWRI file and what PowerInfer expects beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from architectures.checkpoint import Checkpoint
from architectures.model_files import compare_files, hashed_meanwhile
from common.clock import now
from common.errors import ExportError, PredictorError
from common.files import atomic_directory, atomic_path, refuse_existing, remove_output
from common.lock import locked
from gguf_export.commit import begin_commit, end_commit, finish_commit, own_files
from gguf_export.dense import dense_model, dense_types
from gguf_export.manifest import manifest_path, write_manifest
from gguf_export.plan import conversion_note, plan_model, plan_predictors
from gguf_export.predictor_kinds import open_predictors
from gguf_export.predictor_source import PredictorSource, read_ranks, write_directories
from gguf_export.pwri.dense_layers import joined
from gguf_export.pwri.element_types import FileTypes
from gguf_export.pwri.gpu_index import index_path
from gguf_export.pwri.schema import BLOCK, THRESHOLD_KEY
from gguf_export.pwri.statistics import (
    may_have_statistics,
    statistics_file,
)
from gguf_export.requirements import check_model, check_types, window_note
from gguf_export.settings import SUFFIX, ExportConfig
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.tokens.vocabulary import POWERINFER
from gguf_export.trained_types import following, predictor_types
from gguf_export.writer import ModelWriter
from gguf_files.names import DENSE_LAYERS_KEY, PREDICTOR_TYPE_KEY, RECIPE_KEY, SMALLTHINKER


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
        foreign_statistics: `activation_directory` is another model's and stays as it is.
    """

    model_file: Path
    predictor_directory: Path
    activation_directory: Path
    dense_file: Path
    warnings: tuple[str, ...] = ()
    foreign_statistics: bool = False

    @classmethod
    def beside(cls, model_file: Path) -> Bundle:
        """Return the bundle of a model file."""
        file, predictors, activation, dense, *_ = own_files(model_file)
        return cls(file, predictors, activation, dense)

    def beside_others(self, *, counted: bool) -> Bundle:
        """Leave another model's statistics alone, whose name PowerInfer fixes.

        Args:
            counted: this model comes with statistics.

        Raises:
            ExportError: it does, and another exported model lies in the directory to which those
                that are there may belong.
        """
        files = sorted(self.model_file.parent.glob(f"*{SUFFIX}"))
        owners = [path for path in files if may_have_statistics(path)]
        others = [path.name for path in owners if path.name != self.model_file.name]
        if not others:
            return self
        belongs = "may belong" if self.model_file in owners else "belongs"
        told = f"{self.activation_directory}: {belongs} to {others[0]}, as far as the files tell"
        if counted:
            raise ExportError(told, "give every model a directory of its own")
        line = f"{told}, and stays; PowerInfer's --vram-budget would take it for this model's too"
        return replace(self, warnings=(*self.warnings, line), foreign_statistics=True)

    def refuse_existing(self, *, force: bool) -> None:
        """Refuse to replace anything without `force`; see `common.files.refuse_existing`."""
        first = statistics_file(self.activation_directory, 0).name
        refuse_existing(self.model_file, force=force)
        refuse_existing(self.predictor_directory, force=force, marker="config.json")
        if not self.foreign_statistics:
            refuse_existing(self.activation_directory, force=force, marker=first)
        refuse_existing(self.dense_file, force=force)
        refuse_existing(index_path(self.model_file), force=force)

    @property
    def manifest(self) -> Path:
        """What vouches for the rest; see `gguf_export.manifest`."""
        return manifest_path(self.model_file)

    @property
    def outputs(self) -> dict[str, str]:
        """The paths that are there, by name."""
        statistics = () if self.foreign_statistics else ("activation_directory",)
        names = ("model_file", "predictor_directory", *statistics, "dense_file", "manifest")
        paths = {name: getattr(self, name) for name in names}
        return {name: str(path) for name, path in paths.items() if path.exists()}

    @property
    def written(self) -> list[Path]:
        """What the manifest vouches for."""
        return [Path(path) for name, path in self.outputs.items() if name != "manifest"]

    def table(self, checks: int | None, dense_checks: int | None = None) -> str:
        """Return them as text, and how many checks hold (None: not verified).

        Args:
            checks: of the model file.
            dense_checks: of the dense file.
        """
        verified = "no" if checks is None else f"{checks} checks hold"
        facts = {**self.outputs, "verified": verified}
        if dense_checks is not None:
            facts["dense_verified"] = f"{dense_checks} checks hold"
        return "\n".join(f"{name.replace('_', ' '):<22} {text}" for name, text in facts.items())


def dense_beside(model_file: Path) -> Path:
    """Return the name of the dense file that goes with a model file."""
    return own_files(model_file)[3]


def export(
    config: ExportConfig,
    check: Callable[[Path], None] | None = None,
    dense_check: Callable[[Path], None] | None = None,
) -> Bundle:
    """Write the bundle under temporary names; the model file gets its name last.

    Args:
        config: what to write.
        check: looks at the model file before anything gets its name. If it raises, nothing does,
            and existing outputs stay as they are.
        dense_check: looks at the dense file likewise, where it has a graph that can be checked.

    Raises:
        PspError: the checkpoint or predictors are unusable or do not belong together, sizes that
            PowerInfer cannot run, existing outputs, or a refused write.
    """
    with locked(config.out):
        finish_commit(config.out)
        return _exported(config, check, dense_check)


def _exported(
    config: ExportConfig,
    check: Callable[[Path], None] | None,
    dense_check: Callable[[Path], None] | None,
) -> Bundle:
    begun, checkpoint = now(), Checkpoint.open(config.model)
    assert config.predictors is not None  # of another engine if it is
    predictors = open_predictors(config.predictors, checkpoint.shape)
    config = following(config, checkpoint, predictors)
    ranks = _check_requirements(config, checkpoint, predictors)
    shape = checkpoint.shape
    vocabulary = read_vocabulary(checkpoint.directory, shape.vocab_size, checkpoint.config)
    dense = dense_model(config, checkpoint, vocabulary)
    converted = conversion_note(list(plan_model(checkpoint, sparse=True, types=config.types)))
    warnings = (
        *checkpoint.notes,
        *vocabulary.notes,
        *vocabulary.warnings,
        *(line for line in (window_note(checkpoint, POWERINFER), converted) if line is not None),
        *(() if dense is None else dense.warnings),
    )
    bundle = replace(Bundle.beside(config.out), warnings=warnings)
    bundle = bundle.beside_others(counted=predictors.counted)
    bundle.refuse_existing(force=config.force)
    sparse_keys = _predictor_keys(predictors, config.types)
    writer = ModelWriter(checkpoint, vocabulary, config.types)
    with (
        hashed_meanwhile(checkpoint) as files,
        _unnamed(bundle, config.dense, predictors) as unnamed,
    ):
        if not predictors.empty:
            write_directories(predictors, unnamed.predictor_directory, unnamed.activation_directory)
        planned = plan_predictors(predictors, ranks, shape, config.types)
        written = [
            writer.write(unnamed.model_file, bundle.model_file, sparse_keys, planned, sparse=True)
        ]
        if check is not None:
            check(unnamed.model_file)
        if dense is not None:
            written.append(dense.write(unnamed.dense_file, bundle.dense_file))
            if dense_check is not None and dense.architecture == SMALLTHINKER:
                dense_check(unnamed.dense_file)
        changed = compare_files(checkpoint, files.result(), predictors.model_files, predictors.path)
    write_manifest(config, begun, checkpoint, files.result(), bundle.written, written)
    return bundle if changed is None else replace(bundle, warnings=(*bundle.warnings, changed))


def _predictor_keys(predictors: PredictorSource, types: FileTypes) -> dict[str, float | str]:
    """Return the keys of a file that tell of its predictors."""
    keys: dict[str, float | str] = {
        THRESHOLD_KEY: predictors.threshold,
        RECIPE_KEY: predictors.recipe,
    }
    if predictors.dense:
        keys[DENSE_LAYERS_KEY] = joined(predictors.dense)
    said = predictor_types(predictors, types)
    return keys if said is None else keys | {PREDICTOR_TYPE_KEY: said}


@contextmanager
def _unnamed(bundle: Bundle, dense: bool, predictors: PredictorSource) -> Iterator[Bundle]:
    """Yield a bundle of temporary names, which become the bundle's own, the model file's last.

    Then what an earlier model left there goes: its index, which PowerInfer would load, and what
    this one has not: a dense file, statistics that are no other model's, predictors.
    """
    directories = {
        "predictor_directory": not predictors.empty,
        "activation_directory": predictors.counted,
    }
    with ExitStack() as stack:
        paths = {"model_file": stack.enter_context(atomic_path(bundle.model_file))}
        if dense:
            paths["dense_file"] = stack.enter_context(atomic_path(bundle.dense_file))
        for name in (name for name, there in directories.items() if there):
            paths[name] = stack.enter_context(atomic_directory(getattr(bundle, name)))
        yield replace(bundle, warnings=(), foreign_statistics=False, **paths)
        gone = [bundle.manifest, index_path(bundle.model_file)]
        for name in ("dense_file", *directories):
            foreign = name == "activation_directory" and bundle.foreign_statistics
            if name not in paths and not foreign:
                gone.append(getattr(bundle, name))
        begin_commit(bundle.model_file, [getattr(bundle, name) for name in paths], gone)
        for path in gone:
            remove_output(path)
    end_commit(bundle.model_file)


def _check_requirements(
    config: ExportConfig, checkpoint: Checkpoint, predictors: PredictorSource
) -> list[int]:
    """Refuse what PowerInfer could not run, before anything is written.

    Returns:
        The rank of every layer's predictor.

    Raises:
        PredictorError: predictors that are incomplete, of another model, or with other shapes.
        ExportError: a family, sizes or types that PowerInfer has no graph or kernels for; no
            statistics to split neurons by.
    """
    check_model(checkpoint)
    check_types(checkpoint, config.types, dense=False)
    if config.dense:
        dense_types(config, checkpoint)
    ranks = _check_fit(checkpoint, predictors)
    if config.vram_budget is not None and not predictors.counted:
        raise ExportError(
            f"{predictors.path}: comes without activation statistics, by which --vram-budget "
            "chooses neurons",
            "leave that out, or train predictors with psp train-predictor",
        )
    return ranks


def _check_fit(checkpoint: Checkpoint, predictors: PredictorSource) -> list[int]:
    """Refuse predictors of another model and sizes that PowerInfer cannot run; give the ranks."""
    shape = checkpoint.shape
    if predictors.n_layers != shape.n_layers:
        raise PredictorError(
            f"{predictors.path}: predictors have {predictors.n_layers} layers, the model has "
            f"{shape.n_layers}",
            "pass predictors of this model",
        )
    ranks = read_ranks(predictors, shape.d_model, shape.d_ff)
    if predictors.model is not None and predictors.model[1] != checkpoint.fingerprint:
        raise PredictorError(
            f"{predictors.path}: predictors were trained for {predictors.model[0]}, whose weights "
            f"or sizes differ from {checkpoint.path}",
            "pass that model or collect and train for this one",
        )
    for rank in ranks:
        if rank % BLOCK or not rank:
            raise ExportError(f"rank {rank} is no multiple of {BLOCK}", "PowerInfer cannot run it")
    return ranks
