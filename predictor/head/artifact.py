"""The artifact of a head's predictor: what `train-predictor --head` writes and an export reads.

Layout of a directory::

    head.json          schema, model, settings, and what was measured at each point that was tried
    head.safetensors   fc1 (rank, d_model) float16, fc2 (vocab_size, rank) float16,
                       level (d_model,) float32, to be added to every row of the head
    inputs.json        and inputs-*.safetensors: see `inputs`
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.errors import TRAIN_AGAIN, PredictorError
from common.sealed import read_sealed, write_sealed
from common.typed_json import Closed, Count, JsonError, parse, plain
from common.version import tool_version
from predictor.head.rule import HeadPredictor
from predictor.tensor_files import load_tensors, save_tensors
from results.head import HeadPoint

SCHEMA_VERSION = 1
INDEX = "head.json"
_TENSORS = "head.safetensors"


@dataclass(frozen=True, kw_only=True)
class HeadHeader(Closed):
    """What a head's predictor was made for and from.

    Attributes:
        model: the model as the user named it.
        model_fingerprint: `Checkpoint.fingerprint`.
        head_sha256: `output_head.head_digest`.
        d_model: hidden size.
        vocab_size: rows of the head.
        rank: hidden units.
        recipe: `psp` or `svd`.
        max_ppl_gap: bound on the growth of perplexity.
        max_changed: bound on the share of tokens whose most probable next token changes.
        tokens: rows that were trained and measured on.
        holdout: share of them held out, by document.
        seed: seed of the run.
        ranks: those that were asked for; None if they were to be chosen, or an older psp wrote it.
    """

    model: str
    model_fingerprint: str
    head_sha256: str
    d_model: Count
    vocab_size: Count
    rank: Count
    recipe: str
    max_ppl_gap: float
    max_changed: float
    tokens: Count
    holdout: float
    seed: Count
    ranks: tuple[Count, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class _Index:
    header: HeadHeader
    points: tuple[HeadPoint, ...]
    tensors: str | None = None


@dataclass(frozen=True, kw_only=True)
class HeadArtifact:
    """A head's predictor on disk.

    Attributes:
        path: its directory.
        header: what it was made for and from.
        points: what was measured, in the order of trying.
        digest: checksum (XXH3) of the tensors' file; None if an older psp wrote it.
    """

    path: Path
    header: HeadHeader
    points: tuple[HeadPoint, ...]
    digest: str | None = None

    @classmethod
    def open(cls, path: Path) -> HeadArtifact:
        """Open a directory.

        Raises:
            PredictorError: none there, damaged, or another schema version.
        """
        remedy = "pass a directory made by 'psp train-predictor --head'"
        document = read_sealed(path / INDEX, PredictorError, remedy)
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise PredictorError(
                f"{path}: head schema version is {version!r}, this psp reads {SCHEMA_VERSION}",
                TRAIN_AGAIN,
            )
        try:
            index = parse(_Index, document)
        except JsonError as error:
            raise PredictorError(f"{path}/{INDEX}: damaged ({error})", TRAIN_AGAIN) from error
        if sum(point.chosen for point in index.points) != 1:
            raise PredictorError(f"{path}/{INDEX}: damaged (one point is chosen)", TRAIN_AGAIN)
        return cls(path=path, header=index.header, points=index.points, digest=index.tensors)

    @property
    def chosen(self) -> HeadPoint:
        """What was measured of the predictor that is kept."""
        return next(point for point in self.points if point.chosen)

    def read(self) -> tuple[HeadPredictor, torch.Tensor]:
        """Return the predictor in float32, and the level, (d_model,) float32.

        Raises:
            PredictorError: missing or damaged file, or shapes that do not fit the header.
        """
        file, header = self.path / _TENSORS, self.header
        tensors = load_tensors(file, self.digest, PredictorError, TRAIN_AGAIN)
        expected = {
            "fc1": (header.rank, header.d_model),
            "fc2": (header.vocab_size, header.rank),
            "level": (header.d_model,),
        }
        for name, shape in expected.items():
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise PredictorError(
                    f"{file}: {name} has shape {found}, {INDEX} implies {shape}", TRAIN_AGAIN
                )
            if not torch.isfinite(tensors[name]).all():
                raise PredictorError(f"{file}: {name} holds NaN or inf", TRAIN_AGAIN)
        predictor = HeadPredictor(tensors["fc1"].float(), tensors["fc2"].float())
        return predictor, tensors["level"].float()


def write_head(
    path: Path,
    header: HeadHeader,
    points: tuple[HeadPoint, ...],
    predictor: HeadPredictor,
    level: torch.Tensor,
) -> HeadArtifact:
    """Write an artifact, the index that counts it last.

    Args:
        path: its directory.
        header: what it was made for and from.
        points: what was measured; one is chosen.
        predictor: its numbers fit float16.
        level: (d_model,) float32.
    """
    tensors = {"fc1": predictor.fc1.half(), "fc2": predictor.fc2.half(), "level": level.float()}
    digest = save_tensors(path / _TENSORS, tensors)
    document = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": tool_version(),
        "header": asdict(header),
        "points": plain(points),
        "tensors": digest,
    }
    write_sealed(path / INDEX, document)
    return HeadArtifact(path=path, header=header, points=points, digest=digest)
