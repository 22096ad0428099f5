"""Training of a whole model's predictors, resumable after every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import choose_device
from architectures.model_files import compare_files, weight_files
from architectures.windows import LEAST_TOKENS
from common.documents import look_at_documents
from common.element_types import ELEMENT_TYPES
from common.errors import PredictorError
from common.files import refuse_existing, remove_output
from common.hashing import hash_files
from common.outputs import written_whole
from common.overlap import several_at_once
from common.text_sources.names import need_repeatable
from cost_model.hardware import load_hardware
from predictor.artifact import INDEX, Epoch, PredictorArtifact, PredictorHeader
from predictor.thresholds.choose import Bound, choose_thresholds
from predictor.thresholds.predicted_model import PredictedModel, held_out_windows
from predictor.traces.packing import RANKING_BITS
from predictor.traces.store import TraceStore, choose_documents
from predictor.training.layer import LayerResult, LayerTrainer
from predictor.training.ranks import choose_ranks
from predictor.training.settings import (
    AUTO,
    DEJAVU,
    RECIPES,
    TrainConfig,
    candidate_ranks,
    published_rank,
)

_DEFAULT_GAP = 0.001
Note = Callable[[str], None]


def train_predictors(config: TrainConfig, note: Note = lambda line: None) -> PredictorArtifact:
    """Train, measure on held-out documents and store a predictor for every recorded layer.

    Traces made in passes over the layers are trained one store after the other into one artifact,
    under `resume`. Thresholds are chosen once all layers are there, for all of them together.

    Args:
        config: settings.
        note: takes lines for the user.

    Raises:
        PspError: unusable traces, existing output, a bound out of reach, or an artifact made with
            other settings under `resume`.
    """
    weight = _predictor_weight(config, note)
    choose_device(config.device)
    go_on, replaces = config.resume, config.force
    with written_whole(
        config.out, resume=go_on, force=replaces, marker=INDEX, complete=_complete
    ) as out:
        artifact = _trained(replace(config, out=out), weight, note)
    return replace(artifact, path=config.out) if artifact.complete else artifact


def _complete(path: Path) -> bool:
    return PredictorArtifact.open(path).complete


def _trained(config: TrainConfig, weight: float, note: Note) -> PredictorArtifact:
    """Train into a directory that may be written, or go on with what is there."""
    store = TraceStore.open(config.traces)
    store.require_complete()
    layers = _chosen_layers(config, store)
    trainer = layer_trainer(config, store)
    sizes, rows = (store.header.n_layers, store.header.d_model), len(trainer.train)
    check_ranks(trainer.config, *sizes, rows, store.path)
    _check_importance(trainer)
    _check_activity(store, layers)
    if trainer.bound is not None and trainer.bound.ffn_bytes is None:
        _check_text(config, store, note)
    artifact = _open_artifact(trainer)
    _set_ranks(trainer, artifact, weight)
    _train_missing(trainer, artifact, layers)
    if trainer.bound is not None and artifact.complete:
        choose_thresholds(
            artifact,
            trainer.bound,
            ELEMENT_TYPES[config.predictor_type],
            store.header.ffn_matrices,
            lambda: _held_out_model(config, store, note),
        )
        if (line := unpaid(artifact)) is not None:
            note(line)
    return artifact


def unpaid(artifact: PredictorArtifact) -> str | None:
    """Return a line about layers whose predictors read no fewer bytes than all neurons do."""
    ratios = {n: metrics["ffn_bytes_ratio"] for n, metrics in sorted(artifact.layers.items())}
    if not (layers := [n for n, ratio in ratios.items() if ratio >= 1]):
        return None
    mean = sum(ratios.values()) / len(ratios)
    return (
        f"in {len(layers)} of {len(ratios)} layers ({', '.join(map(str, layers))}) the predictor "
        f"saves no bytes; mean over all {mean:.3f}: allow more with --max-ppl-gap, collect more "
        "--tokens, or make the model sparser (psp sparsify)"
    )


def _predictor_weight(config: TrainConfig, note: Note) -> float:
    """Return what a predictor's byte costs relative to one of a neuron, where ranks are chosen."""
    if config.hardware is None:
        return 1.0
    hardware = load_hardware(config.hardware, torch.get_num_threads())
    weight = hardware.predictor_weight
    note(f"a predictor's byte costs {weight:.2g} of a neuron's on {config.hardware}")
    return weight


def layer_trainer(
    config: TrainConfig, store: TraceStore, held: torch.Tensor | None = None
) -> LayerTrainer:
    """Return what trains layers by a run's settings.

    Args:
        config: settings.
        store: the traces.
        held: (rows,) bool, rows to hold out; None chooses documents.

    Raises:
        TraceError: documents are to be chosen and there is a single one.
    """
    recipe = RECIPES[config.recipe]
    if not ELEMENT_TYPES[config.predictor_type].fine:
        recipe = recipe.with_pairs()
    if recipe.name == DEJAVU.name and config.rank == AUTO:
        config = replace(config, rank=published_rank(store.header.d_model))
    held = store.holdout(config.holdout, config.seed) if held is None else held
    return LayerTrainer(
        config=config,
        store=store,
        recipe=recipe,
        bound=bound_of(config),
        train=(~held).nonzero()[:, 0],
        holdout=held.nonzero()[:, 0],
    )


def bound_of(config: TrainConfig) -> Bound | None:
    """Return what thresholds are chosen to keep to; None where every one is 0."""
    gap = config.max_ppl_gap
    if gap is None and config.ffn_bytes is None:
        if config.rank != AUTO or config.recipe == DEJAVU.name:
            return None
        gap = _DEFAULT_GAP
    return Bound(max_ppl_gap=gap, ffn_bytes=config.ffn_bytes)


def _chosen_layers(config: TrainConfig, store: TraceStore) -> list[int]:
    """Return the layers to train; refuse one that the traces lack."""
    recorded = store.header.layers
    if config.layers is None:
        return list(recorded)
    if unknown := [layer for layer in config.layers if layer not in recorded]:
        raise PredictorError(
            f"--layers: {store.path} has no layer {unknown[0]}",
            f"it holds {len(recorded)} layers from {recorded[0]} to {recorded[-1]}",
        )
    return list(config.layers)


def check_ranks(
    config: TrainConfig, n_layers: int, d_model: int, rows: int, source: str | Path
) -> None:
    """Refuse ranks that the model or the rows cannot fill, and another number than of layers.

    Args:
        config: settings.
        n_layers: of the model.
        d_model: its hidden size.
        rows: to train on.
        source: where they come from, for errors.

    Raises:
        PredictorError: naming the option.
    """
    if isinstance(config.rank, tuple) and len(config.rank) != n_layers:
        raise PredictorError(
            f"--rank names {len(config.rank)} ranks, the model has {n_layers} layers",
            "pass one for each or a single one",
        )
    for rank in config.fixed_ranks:
        if RECIPES[config.recipe].start != "random" and rank // 2 > d_model:
            raise PredictorError(
                f"rank {rank} exceeds twice d_model ({2 * d_model}), which is exact already",
                "lower --rank",
            )
    largest = max(config.fixed_ranks or candidate_ranks(d_model))
    if rows < largest:
        raise PredictorError(
            f"{source}: {rows} rows to train on are too few for rank {largest}",
            "collect more --tokens, or pass a lower --rank",
        )


def _check_importance(trainer: LayerTrainer) -> None:
    """Refuse traces without the importance that is asked for, with the bits to collect."""
    store, recipe = trainer.store, trainer.recipe
    bits = store.header.importance_bits
    if recipe.importance and not bits:
        raise PredictorError(
            f"{store.path}: holds no importance, by which recipe {recipe.name} weighs",
            "collect with --importance-bits 2, or pass --recipe dejavu",
        )
    if trainer.config.label_top_fraction is not None and bits < RANKING_BITS:
        raise PredictorError(
            f"{store.path}: its importance of {bits} bits cannot rank neurons",
            f"collect with --importance-bits {RANKING_BITS}, or leave out --label-top-fraction",
        )
    if trainer.bound is not None and not bits:
        raise PredictorError(
            f"{store.path}: holds no importance, by which thresholds are chosen",
            "collect with --importance-bits 2, or leave out the bound",
        )


def _check_activity(store: TraceStore, layers: list[int]) -> None:
    """Refuse layers in which there is nothing to tell apart."""
    sparsity = store.activation_sparsity()
    for layer in layers:
        if sparsity[layer] == 1:
            raise PredictorError(
                f"{store.path}: no neuron of layer {layer} was ever active, so its predictor has "
                "nothing to learn from",
                "collect from other text, or check the model's weights",
            )
        if sparsity[layer] == 0:
            raise PredictorError(
                f"{store.path}: every neuron of layer {layer} was always active, so there is "
                "nothing to skip",
                "make the model sparse first (psp sparsify)",
            )


def _open_artifact(trainer: LayerTrainer) -> PredictorArtifact:
    config, store = trainer.config, trainer.store
    header = PredictorHeader(
        model=store.header.model,
        model_fingerprint=store.header.model_fingerprint,
        architecture=store.header.architecture,
        activation=store.header.activation,
        n_layers=store.header.n_layers,
        d_model=store.header.d_model,
        d_ff=store.header.d_ff,
        rank=config.rank if isinstance(config.rank, int) else str(config.rank),
        threshold=0.0,
        own_thresholds=trainer.bound is not None,
        traces_identity=store.identity,
        recipe=asdict(trainer.recipe),
        holdout=config.holdout,
        label_top_fraction=config.label_top_fraction,
        seed=config.seed,
    )
    if config.resume and (config.out / INDEX).exists():
        artifact = PredictorArtifact.open(config.out)
        for key, value in vars(header).items():
            if key != "threshold" and getattr(artifact.header, key) != value:
                raise PredictorError(
                    f"{config.out}: was trained with another {key}",
                    "use the same settings and traces, or --force to start over",
                )
        return artifact
    refuse_existing(config.out, force=config.force, marker=INDEX, resumable=True)
    remove_output(config.out)
    artifact = PredictorArtifact(config.out, header, model_files=store.progress.model_files)
    artifact.write_header()
    return artifact


def _set_ranks(trainer: LayerTrainer, artifact: PredictorArtifact, weight: float) -> None:
    """Settle the rank of every layer of the store that has none."""
    rank, before = trainer.config.rank, dict(artifact.ranks)
    if isinstance(rank, tuple):
        artifact.ranks = dict(enumerate(rank))
    missing = [layer for layer in trainer.store.header.layers if layer not in artifact.ranks]
    if rank == AUTO and missing:
        artifact.ranks |= choose_ranks(trainer, missing, weight)
    if artifact.ranks != before:
        artifact.write_header()


def _train_missing(trainer: LayerTrainer, artifact: PredictorArtifact, layers: list[int]) -> None:
    """Train the layers that are not there yet and commit each as it is ready."""
    recipe = trainer.recipe
    steps = math.ceil(len(trainer.train) / recipe.batch) * recipe.epochs
    missing = [layer for layer in layers if layer not in artifact.layers]
    with tqdm(total=len(layers) * steps, unit="step", desc="train-predictor", disable=None) as bar:
        bar.update((len(layers) - len(missing)) * steps)
        shown = _Shown(bar, dict.fromkeys(missing, steps), len(layers))

        def work(layer: int, go_on: Callable[[], None]) -> LayerResult:
            def on_step(steps: int) -> None:
                go_on()
                shown.step(layer, steps)

            return trainer.run(layer, artifact.rank(layer), on_step, partial(shown.epoch, layer))

        for layer, result in several_at_once(work, missing, trainer.jobs(len(missing))):
            if result.curves is not None:
                artifact.add_curves(layer, result.curves.tensors())
            artifact.add(layer, result.predictor, result.metrics, result.epochs)
            shown.finished(layer)
        bar.update(bar.total - bar.n)  # a recipe may stop early


class _Shown:
    """What the progress bar of a training tells."""

    def __init__(self, bar: tqdm, expected: dict[int, int], layers: int) -> None:
        """Name what is told of.

        Args:
            bar: counts the steps of all layers.
            expected: number of a layer that is missing to the steps that it is counted with.
            layers: how many there are, with those that are finished.
        """
        self._bar, self._expected, self._layers = bar, expected, layers
        self._missing = set(expected)

    def step(self, layer: int, steps: int) -> None:
        """Count a step of a layer that takes so many in all."""
        self._bar.total += steps - self._expected[layer]
        self._expected[layer] = steps
        self._bar.update()

    def epoch(self, layer: int, epochs: Sequence[Epoch]) -> None:
        """Tell the last epoch of a layer."""
        last = epochs[-1]
        self._tell(
            layer=layer,
            epoch=len(epochs),
            loss=f"{last.loss:.3g}",
            held_out_loss=f"{last.held_out_loss:.3g}",
            held_out_error=f"{last.held_out_error:.2%}",
        )

    def finished(self, layer: int) -> None:
        """Count a layer."""
        self._missing.discard(layer)
        self._tell()

    def _tell(self, **last: object) -> None:
        done = self._layers - len(self._missing)
        self._bar.set_postfix({"layers": f"{done}/{self._layers}", **last})


def _check_text(config: TrainConfig, store: TraceStore, note: Note) -> None:
    """Refuse before hours of training what a gap could not be measured on after them."""
    header = store.header
    if config.data:
        field, template = header.field, header.chat_template
        look_at_documents(config.data, field, template, config.eval_tokens, note)
    else:
        need_repeatable(header.data, f"the held-out part of {store.path}", "pass --data")


def _held_out_model(config: TrainConfig, store: TraceStore, note: Note) -> PredictedModel:
    """Load the traces' model with held-out windows to run."""
    checkpoint = Checkpoint.open(config.model or store.header.model)
    for line in checkpoint.notes:
        note(line)
    if checkpoint.fingerprint != store.header.model_fingerprint:
        raise PredictorError(
            f"{checkpoint.path}: its weights or sizes differ from the model that {store.path} was "
            "made of",
            "pass that one as --model",
        )
    known = store.progress.model_files
    found = hash_files(weight_files(checkpoint)) if known else ()
    if (other := compare_files(checkpoint, found, known, store.path)) is not None:
        note(other)
    held = choose_documents(store.segments, config.holdout, config.seed)
    windows = held_out_windows(
        store.header, checkpoint, held, data=config.data, tokens=config.eval_tokens, note=note
    )
    tokens = sum(map(len, windows))
    if tokens < LEAST_TOKENS:
        raise PredictorError(
            f"{tokens} tokens of held-out text are too few to measure a perplexity gap",
            "collect from more text, raise --holdout, or pass --data",
        )
    note(f"measuring the perplexity gap on {tokens} held-out tokens")
    return PredictedModel(checkpoint, windows, config.device)
