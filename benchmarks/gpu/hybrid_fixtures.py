"""The files that the hybrid steps run, each made once and kept in the work directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.exact_density import FixtureShape
from benchmarks.gpu.kit import Kit
from benchmarks.speed_fixture import FixtureConfig, make_fixture
from common.files import remove_output
from gguf_export.bundle import Bundle, export
from gguf_export.pwri.element_types import OUTTYPES
from gguf_export.settings import ExportConfig
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig

DENSITY = 0.1
"""Share of the neurons that a token predicts, whichever fixture runs."""

_SHAPES = {
    # LLaMA-7B's width, 1.7 GB.
    "wide": FixtureShape(density=DENSITY, n_layers=4),
    # More layers than upstream's solver can tell apart.
    "deep": FixtureShape(
        density=DENSITY, d_model=512, d_ff=1536, n_heads=8, n_layers=12, rank=64, seed=1
    ),
    # A number of neurons that is no multiple of 256.
    "odd": FixtureShape(
        density=DENSITY, d_model=512, d_ff=1504, n_heads=8, n_layers=3, rank=64, seed=2
    ),
}
_DRY_SHAPES = {
    name: FixtureShape(
        density=DENSITY, d_model=64, d_ff=d_ff, n_heads=4, n_layers=n_layers, rank=32
    )
    for name, d_ff, n_layers in (("wide", 1024, 2), ("deep", 1024, 12), ("odd", 1056, 3))
}
_TOKENS, _DRY_TOKENS = 8192, 4096
"""Of traces: neurons are counted in them, and inputs whitened by them."""
_TRACE_CONTEXT, _RANK = 256, 64


def fixture(kit: Kit, name: str) -> Bundle:
    """Return a model of exactly known density and the dense file beside it.

    Args:
        kit: where to keep it, and whose vocabulary it has.
        name: `wide`, `deep` or `odd`.

    Raises:
        PspError: an unreadable tokenizer, or a refused write.
    """
    config = _fixture_config(kit, name)
    _once(config.bundle.model_file, config.out, lambda: make_fixture(config))
    return config.bundle


def fixture_q4_0(kit: Kit) -> Bundle:
    """Return the wide fixture and its dense file with matrices in Q4_0.

    Raises:
        PspError: see `fixture`.
    """
    config = _fixture_config(kit, "wide")
    model, out = config.out / config.name, kit.work / "hybrid-wide-q4_0"
    bundle = Bundle.beside(out / config.bundle.model_file.name)
    fixture(kit, "wide")
    settings = ExportConfig(
        model=str(model),
        predictors=model / "predictors",
        out=bundle.model_file,
        outtype="q4_0",
        dense=True,
    )
    _once(bundle.model_file, out, lambda: export(settings))
    return bundle


def trained(kit: Kit) -> dict[str, Bundle]:
    """Return the kit's trained model with predictors of its own, by its matrices' element type.

    Raises:
        PspError: a model or text that does not do.
    """
    place = kit.work / "hybrid-trained"
    bundles = {name: Bundle.beside(place / name / "trained.powerinfer.gguf") for name in OUTTYPES}

    def make() -> None:
        predictors = _train(kit, place)
        for name, bundle in bundles.items():
            settings = ExportConfig(
                model=str(kit.model), predictors=predictors, out=bundle.model_file, outtype=name
            )
            export(settings)

    _once(list(bundles.values())[-1].model_file, place, make)
    return bundles


def _fixture_config(kit: Kit, name: str) -> FixtureConfig:
    return FixtureConfig(
        shape=(_DRY_SHAPES if kit.dry else _SHAPES)[name],
        tokenizer=kit.tokenizer,
        out=kit.work / f"hybrid-{name}",
        dense=True,
        keep_model=name == "wide",
    )


def _train(kit: Kit, place: Path) -> Path:
    """Return predictors of the kit's model. They need no training: any are the same everywhere."""
    traces, out = place / "traces", place / "predictors"
    collect(
        CollectConfig(
            model=str(kit.model),
            data=(str(kit.data),),
            out=traces,
            tokens=_DRY_TOKENS if kit.dry else _TOKENS,
            context=_TRACE_CONTEXT,
            device=kit.device,
        )
    )
    settings = TrainConfig(traces=traces, out=out, recipe="svd", rank=_RANK, device=kit.device)
    train_predictors(settings)
    return out


def _once(final: Path, place: Path, make: Callable[[], object]) -> None:
    """Make what gets its name last, unless it is there; leftovers of a killed process go."""
    if not final.exists():
        remove_output(place)
        place.mkdir(parents=True)
        make()
