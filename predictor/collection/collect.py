"""Collection of activation traces: text through the real model into a store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os.path import exists, isdir, islink
from pathlib import Path

import torch

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, choose_device, load_model
from architectures.model_files import hashed_meanwhile
from architectures.spec import ModelShape
from architectures.tokenizer import Tokenizer, chat_template_of
from cluster.settings import worker_device
from common import chat
from common.documents import look_at_documents, skipped_note
from common.errors import OutputError, TraceError
from common.files import refuse_existing, remove_output
from common.machine import device_named
from common.outputs import in_place, written_whole
from common.overlap import made_ahead
from common.text_sources.names import need_repeatable, recorded
from common.units import decimal_size
from common.urls import Url
from predictor.collection.recorder import Recorder, read_layer_weights
from predictor.collection.settings import CollectConfig
from predictor.collection.text import Text, token_bar
from predictor.collection.windows import cut_batches
from predictor.collection.writing import SHARDS, AtOnce, Meanwhile
from predictor.traces.manifest import MANIFEST, TraceHeader
from predictor.traces.objects import Objects, require_scratch
from predictor.traces.place import place_of
from predictor.traces.rows import LayerWeights
from predictor.traces.shard_file import INPUT_DTYPES
from predictor.traces.store import TraceStore

_SHARD_BYTES = 1 << 30
_SHARD_ROWS = (1024, 16384)
Report = Callable[[str], None]
Foresee = Callable[[Checkpoint], Iterable[str]]


def collect(
    config: CollectConfig,
    report: Report = lambda line: None,
    foresee: Foresee = lambda checkpoint: (),
) -> TraceStore:
    """Record traces into a store.

    Args:
        config: settings.
        report: receives lines about what is going to happen and about what was passed over.
        foresee: what later steps will say of the model, a line each.

    Returns:
        The complete store; it holds fewer rows than asked for if the data ended first.

    Raises:
        PspError: unreadable data, unsupported checkpoint, existing output, too little disk, a store
            of another model, text or settings under `resume`, or a residual that overflows the
            stored type.
    """
    if config.ray is None:
        choose_device(config.device)
    else:
        config = replace(config, device=worker_device(config.device, config.ray_gpus))
    if config.resume:
        need_repeatable(config.data, "--resume", "collect anew, or from a file")
    with _written(config) as out:
        _collected(replace(config, out=out), report, foresee)
    return TraceStore.open(config.out)


@contextmanager
def _written(config: CollectConfig) -> Iterator[Path | Url]:
    """Yield where to write: in an object store always the place itself, which has no lock."""
    if isinstance(config.out, Url):
        place = Objects(config.out)
        place.ask(write=True)
        place.remove_parts()
        yield config.out
        return
    resume, force = config.resume, config.force
    with written_whole(config.out, resume=resume, force=force, marker=MANIFEST) as out:
        yield out


def _collected(config: CollectConfig, report: Report, foresee: Foresee) -> None:
    """Collect into a directory that may be written, or go on with what is there."""
    checkpoint = Checkpoint.open(config.model)
    tokenizer = checkpoint.tokenizer()
    template = choose_template(checkpoint, config.chat_template, report)
    header = trace_header(config, checkpoint, template)
    store = _begun_store(config, header)
    if store is not None:
        header = store.header
        if store.progress.complete:
            if skipped := store.progress.skipped_rows:
                report(skipped_note(skipped, header.field))
            return
    # Nothing that cannot run costs an existing store.
    look_at_documents(config.data, config.field, template, config.tokens, report)
    lines = [*checkpoint.notes, f"tokens: {tokenizer.source}", *tokenizer.notes]
    if tokenizer.byte_level:
        lines.append("windows: every second one begins without BOS, as texts do in PowerInfer")
    for line in (*lines, *foresee(checkpoint)):
        report(line)
    _check_room(config, header, store, report)
    if config.ray is not None:
        from predictor.collection.nodes import collection_on_nodes

        with collection_on_nodes(config, checkpoint, header, report) as collection:
            collection.record(checkpoint, tokenizer, store or _created(config, header), report)
        return
    torch.manual_seed(config.seed)
    model = load_model(
        checkpoint,
        dtype=getattr(torch, header.compute_dtype),
        device=config.device,
        layers=range(max(header.layers) + 1),
        weights=config.weights,
        head=False,
    )
    if model.streamed:
        report("weights: streamed block by block, the model does not stay in memory")
    record(model, checkpoint, tokenizer, store or _created(config, header), report)


def _created(config: CollectConfig, header: TraceHeader) -> TraceStore:
    """Begin a store, in the place of what is there."""
    if isinstance(config.out, Path):
        remove_output(config.out)
    return TraceStore.create(config.out, header)


def record(
    model: LoadedModel,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    store: TraceStore,
    report: Report = lambda line: None,
) -> None:
    """Record what is missing in a store and mark it complete.

    Args:
        model: the model, as many blocks of it as are recorded.
        checkpoint: what it was loaded from.
        tokenizer: its own.
        store: see `TraceStore.create`.
        report: receives lines about rows that were passed over.

    Raises:
        PspError: the text is unreadable or not the one that the store was begun with, a residual
            overflows, or the disk refuses.
    """
    # A GPU would wait for this; the processor has nothing else to do meanwhile.
    ahead = torch.device(model.device).type != "cpu"
    norms = save_weights(store, checkpoint, ahead=ahead)
    record_rows(model, checkpoint, norms, tokenizer, store, report)


def record_rows(
    model: LoadedModel,
    checkpoint: Checkpoint,
    norms: Mapping[int, torch.Tensor],
    tokenizer: Tokenizer,
    store: TraceStore,
    report: Report = lambda line: None,
) -> None:
    """Do the same with weights that are saved already.

    Args:
        model: as for `record`.
        checkpoint: likewise.
        norms: what `save_weights` returned.
        tokenizer: as for `record`.
        store: likewise.
        report: likewise.
    """
    header = store.header
    recorder = Recorder(
        model,
        checkpoint,
        norms,
        dtype=INPUT_DTYPES[header.input_dtype],
        importance_bits=header.importance_bits,
    )
    text = Text(header, tokenizer)
    writing = AtOnce(store) if recorder.at_once else Meanwhile(store)
    with hashed_meanwhile(checkpoint) as files, token_bar(store) as bar, recorder, writing:
        for shard in text.missing(store, ahead=not recorder.at_once):
            with writing.shard(shard.segments, shard.text_sha256) as sink:
                for batch in cut_batches(shard.windows, header.batch * header.context):
                    recorder.run(batch, sink)
                    bar.update(sum(len(window.tokens) for window in batch))
                recorder.flush()
    text.finish(store, files.result(), report)


def trace_header(config: CollectConfig, checkpoint: Checkpoint, template: str) -> TraceHeader:
    """Return the header of the store that `config` asks for.

    Raises:
        TraceError: a layer that the model does not have.
    """
    shape = checkpoint.shape
    layers = tuple(range(shape.n_layers)) if config.layers is None else config.layers
    if not layers or layers[0] < 0 or layers[-1] >= shape.n_layers:
        raise TraceError(
            f"--layers: the model has layers 0 to {shape.n_layers - 1}", "choose among those"
        )
    on_cpu = torch.device(device_named(config.device)).type == "cpu"
    compute = torch.float32 if on_cpu else checkpoint.dtype
    return TraceHeader(
        model=config.model,
        model_fingerprint=checkpoint.fingerprint,
        architecture=checkpoint.architecture.name,
        activation=shape.activation,
        activation_threshold=shape.activation_threshold,
        ffn_matrices=checkpoint.architecture.ffn_matrices,
        n_layers=shape.n_layers,
        layers=layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        input_dtype=config.dtype,
        importance_bits=config.importance_bits,
        compute_dtype=str(compute).removeprefix("torch."),
        data=recorded(config.data) or (),
        field=config.field,
        chat_template=template,
        tokens=config.tokens,
        context=min(config.context, shape.context_length),
        batch=config.batch,
        shard_rows=config.shard_rows or usual_shard_rows(shape),
        seed=config.seed,
    )


def usual_shard_rows(shape: ModelShape) -> int:
    """Return the rows of a shard where nobody says: about a gibibyte of all layers."""
    row_bytes = 2 * shape.d_model + shape.d_ff // 8
    least, most = _SHARD_ROWS
    # Not by the layers recorded: passes over the layers must cut the text alike.
    return max(least, min(most, _SHARD_BYTES // (row_bytes * shape.n_layers)))


def choose_template(checkpoint: Checkpoint, choice: str, report: Report) -> str:
    """Return the name of the template to use.

    Args:
        checkpoint: the model's.
        choice: `auto` goes by the checkpoint's own template, anything else is returned as it is.
        report: receives a line where the user should know what was chosen.
    """
    if choice != "auto":
        return choice
    found = chat.detect(chat_template_of(checkpoint.directory))
    if found is None:
        report(
            "chat template: the model has one that psp does not know, text is used as it is; pass "
            "--chat-template none to accept that silently, or data that is already in its form"
        )
        return "none"
    if found == "none" and checkpoint.architecture.name == "minicpm":
        report("chat template: none found; MiniCPM's SFT models want --chat-template minicpm")
    if found != "none":
        report(f"chat template: {found}, as in the model's own; see --chat-template")
    return found


def _begun_store(config: CollectConfig, header: TraceHeader) -> TraceStore | None:
    """Return the store to go on with, or None where one is to be made."""
    if config.resume and place_of(config.out).has(MANIFEST):
        store = TraceStore.open(config.out)
        for key, value in vars(header).items():
            if key == "shard_rows" and config.shard_rows is None:
                continue
            if getattr(store.header, key) != value:
                begun = getattr(store.header, key)
                raise TraceError(
                    f"{config.out}: was collected with {key} {_shown(begun)}, not {_shown(value)}",
                    "use the same settings, or --force to start over",
                )
        return store
    if isinstance(config.out, Url):
        Objects(config.out).refuse_taken()
    else:
        refuse_existing(config.out, force=config.force, marker=MANIFEST, resumable=True)
    return None


def _shown(value: object) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _check_room(
    config: CollectConfig, header: TraceHeader, store: TraceStore | None, report: Report
) -> None:
    """Refuse disks that are too small; how much room an object store has nobody can tell."""
    rows = header.tokens - (store.rows if store else 0)
    if isinstance(config.out, Path):
        _check_disk(config.out, most_bytes(header, rows), new=store is None, report=report)
    elif config.ray is None:
        shards = 1 if torch.device(device_named(config.device)).type == "cpu" else SHARDS
        needed = most_bytes(header, min(rows, shards * header.shard_rows))
        report("disk: " + require_scratch(needed, "what is not uploaded yet"))


def _check_disk(path: Path, needed: int, *, new: bool, report: Report) -> None:
    place = next(each for each in (path, *path.absolute().parents) if exists(each))
    if not isdir(place):
        raise OutputError(f"{path}: {place} is no directory", "choose another --out")
    free = shutil.disk_usage(place).free
    if new and isdir(path) and not islink(path):
        free += sum(file.lstat().st_size for file in path.rglob("*"))
    most, left = decimal_size(needed), decimal_size(free)
    report(f"disk: needs at most {most}, {left} free")
    if needed > free:
        out = in_place(path)
        raise OutputError(
            f"{out}: the traces need up to {most}, {left} are free",
            "collect fewer --tokens, or some --layers at a time, or choose another --out"
            + ("" if out == path else "; the old ones stay until the new ones are complete"),
        )


def most_bytes(header: TraceHeader, rows: int) -> int:
    """Return the most that `rows` rows of all recorded layers and their weights can take on disk.

    Every neuron active on every token would take this much; half of them active, the most that is
    seen, takes `importance_bits · d_ff / 16` bytes less a row and layer.
    """
    row = 2 * header.d_model + -(-header.d_ff // 8) + 4
    row += -(-header.d_ff * header.importance_bits // 8)
    shards = -(-rows // header.shard_rows)
    weights = 2 * header.d_model * header.d_ff + 4 * header.d_ff + 1024
    layer = rows * row + shards * (8 * header.d_ff + 1024) + weights
    # The manifest: at worst every window, of two rows, is a document of its own.
    return len(header.layers) * layer + 4096 + 256 * shards + 24 * rows


def save_weights(
    store: TraceStore, checkpoint: Checkpoint, *, ahead: bool = False
) -> dict[int, torch.Tensor]:
    """Save the weights of all recorded layers in a store.

    Args:
        store: where to.
        checkpoint: where from.
        ahead: read two layers while one is written, for as much memory more.

    Returns:
        Layer number to norms of the down columns, (d_ff,) float32.
    """
    norms = {}
    reading = made_ahead if ahead else map

    def read() -> Iterator[tuple[int, LayerWeights]]:
        layers = store.header.layers
        found = reading(partial(read_layer_weights, checkpoint), layers)
        for layer, weights in zip(layers, found, strict=True):
            norms[layer] = weights.down_norms
            yield layer, weights

    store.save_weights(read())
    return norms
