"""What the head reads on each token, and the token that follows, on disk.

Layout of a directory::

    inputs.json                what they were made from and how many there are; written last
    inputs-00000.safetensors   inputs (rows, d_model) float16, following (rows,) int32,
                               document (rows,) int32

A trace store has no room for them: its rows are a layer's, with a bit for every neuron. Logits are
not stored, a vocabulary of 49,152 would make a token's a hundred times as large; who needs them
multiplies again, batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel
from common.documents import read_documents
from common.errors import TRAIN_AGAIN, DataError, PredictorError
from common.sealed import read_sealed, write_sealed
from common.text_sources.names import shown
from common.typed_json import Closed, Count, JsonError, Misfit, parse
from predictor.collection.windows import Window, cut_batches, cut_shards, cut_windows, order_windows
from predictor.tensor_files import load_tensors, save_tensors
from predictor.traces.holdout import choose_documents

SCHEMA_VERSION = 1
INPUTS_INDEX = "inputs.json"
_SHARD_ROWS = 16384
_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class InputsHeader(Closed):
    """What inputs were made from.

    Attributes:
        model_fingerprint: `Checkpoint.fingerprint`.
        data: the text source as the user named it, or several in order.
        field: key of the text in the source.
        chat_template: `none` or the name of the template that the text was put in.
        tokens: tokens asked for.
        context: longest window, tokens.
    """

    model_fingerprint: str
    data: str | tuple[str, ...]
    field: str
    chat_template: str
    tokens: Count
    context: Count


@dataclass(frozen=True, kw_only=True)
class _Index:
    header: InputsHeader
    shards: tuple[Count, ...]
    digests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an index that vouches for some shards."""
        if self.digests and len(self.digests) != len(self.shards):
            raise Misfit("digests", f"{len(self.shards)} checksums")


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of a head.

    Attributes:
        inputs: (rows, d_model) float16.
        following: (rows,) int64, the token that follows in the text.
        document: (rows,) int64, number of the document.
    """

    inputs: torch.Tensor
    following: torch.Tensor
    document: torch.Tensor

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.following)

    def part(self, rows: torch.Tensor) -> HeadInputs:
        """Return some rows, (n,) int64 or bool."""
        return HeadInputs(self.inputs[rows], self.following[rows], self.document[rows])

    def held_out(self, share: float, seed: int) -> torch.Tensor:
        """Choose whole documents to hold out, as traces do.

        Args:
            share: of rows, at least.
            seed: of the choice.

        Returns:
            (rows,) bool, true where the row is held out.

        Raises:
            PredictorError: a single document.
        """
        documents, counts = torch.unique(self.document, return_counts=True)
        if len(documents) < 2:
            raise PredictorError(
                "the text holds one document, a holdout by document needs at least 2",
                "pass more text or more --tokens",
            )
        segments = list(zip(documents.tolist(), counts.tolist(), strict=True))
        held = choose_documents(segments, share, seed)
        return torch.isin(self.document, torch.tensor(sorted(held)))


def record_inputs(
    model: LoadedModel, checkpoint: Checkpoint, header: InputsHeader, directory: Path
) -> None:
    """Run a model on text and keep what its head reads.

    Args:
        model: the model; its head is not used.
        checkpoint: what it was loaded from.
        header: what to record.
        directory: takes the files.

    Raises:
        PspError: the text cannot be read, inputs overflow float16, or the disk refuses.
    """
    documents = read_documents(header.data, header.field, header.chat_template)
    windows = cut_windows(documents, checkpoint.tokenizer(), header.context)
    shards: list[int] = []
    digests: list[str] = []
    with tqdm(total=header.tokens, unit="tok", desc="head inputs", disable=None) as bar:
        for shard in cut_shards(windows, _SHARD_ROWS, header.tokens):
            parts = [
                rows
                for batch in cut_batches(order_windows(shard), _BATCH_TOKENS)
                for rows in _rows_of(model, batch)
            ]
            bar.update(sum(len(window.tokens) for window in shard))
            if not parts:
                continue
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if not torch.isfinite(tensors["inputs"]).all():
                raise PredictorError(
                    f"{checkpoint.path}: what its head reads does not fit float16",
                    "check the model's weights",
                )
            digests.append(save_tensors(_shard_file(directory, len(shards)), tensors))
            shards.append(len(tensors["inputs"]))
    if not shards:
        raise DataError(f"{shown(header.data)}: gives no tokens", "pass a source with more text")
    index = {"schema_version": SCHEMA_VERSION, "header": asdict(header), "shards": shards}
    index |= {"digests": digests}
    write_sealed(directory / INPUTS_INDEX, index)


def _rows_of(model: LoadedModel, batch: Sequence[Window]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a batch's windows as rows.

    A window's last token has none that follows. Its first one the engine decodes with others, as a
    prompt, and of a prompt it asks for the last token alone; what the head reads there is like
    nothing else (attention has nowhere else to look), and would be learnt in vain.
    """
    longest = len(batch[0].tokens)
    ids = torch.tensor([[*w.tokens, *[0] * (longest - len(w.tokens))] for w in batch])
    hidden = model.hidden(ids)
    for window, states in zip(batch, hidden, strict=True):
        length = len(window.tokens)
        if length < 3:
            continue
        yield {
            "inputs": states[1 : length - 1].half().cpu(),
            "following": torch.tensor(window.tokens[2:], dtype=torch.int32),
            "document": torch.full((length - 2,), window.document, dtype=torch.int32),
        }


def recorded(directory: Path) -> InputsHeader | None:
    """Return what the inputs in a directory were made from, None if there are none."""
    return _read_index(directory).header if (directory / INPUTS_INDEX).exists() else None


def read_inputs(directory: Path) -> HeadInputs:
    """Read what `record_inputs` kept.

    Raises:
        PredictorError: missing or damaged.
    """
    parts, index = [], _read_index(directory)
    for number, rows in enumerate(index.shards):
        file = _shard_file(directory, number)
        digest = index.digests[number] if index.digests else None
        tensors = load_tensors(file, digest, PredictorError, TRAIN_AGAIN)
        if [len(tensors.get(name, ())) for name in HeadInputs.__annotations__] != 3 * [rows]:
            raise PredictorError(f"{file}: does not hold {rows} rows", TRAIN_AGAIN)
        parts.append(tensors)
    inputs, following, document = (
        torch.cat([part[name] for part in parts]) for name in HeadInputs.__annotations__
    )
    return HeadInputs(inputs, following.long(), document.long())


def _read_index(directory: Path) -> _Index:
    document = read_sealed(directory / INPUTS_INDEX, PredictorError, TRAIN_AGAIN)
    if document.pop("schema_version", None) != SCHEMA_VERSION:
        raise PredictorError(f"{directory}/{INPUTS_INDEX}: another schema version", TRAIN_AGAIN)
    try:
        return parse(_Index, document)
    except JsonError as error:
        raise PredictorError(
            f"{directory}/{INPUTS_INDEX}: damaged ({error})", TRAIN_AGAIN
        ) from error


def _shard_file(directory: Path, number: int) -> Path:
    return directory / f"inputs-{number:05d}.safetensors"
