"""Training of a head's predictor from text or traces to its artifact."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import choose_device, load_model
from architectures.tokenizer import chat_template_of
from architectures.windows import LEAST_TOKENS
from common import chat
from common.documents import look_at_documents
from common.errors import PredictorError
from common.files import refuse_existing, remove_output
from common.head_sizes import RANK_MULTIPLE, misfit
from common.outputs import written_whole
from common.text_sources.names import recorded as named
from predictor.head.artifact import INDEX, HeadArtifact, HeadHeader, write_head
from predictor.head.inputs import (
    INPUTS_INDEX,
    HeadInputs,
    InputsHeader,
    read_inputs,
    record_inputs,
    recorded,
)
from predictor.head.measure import Text, perplexity
from predictor.head.output_head import check_family, head_digest, read_head
from predictor.head.rule import predictor_share
from predictor.head.search import Found, Search
from predictor.head.settings import SVD, HeadConfig, candidate_ranks
from predictor.head.start import moments_of
from predictor.head.training import HeadTrainer
from predictor.traces.store import TraceStore
from results.head import HeadPoint

_FITTED_ROWS = 4096
Note = Callable[[str], None]


@dataclass(frozen=True)
class _Source:
    """A model and the text to run it on."""

    checkpoint: Checkpoint
    name: str
    header: InputsHeader


def train_head(config: HeadConfig, note: Note = lambda line: None) -> HeadArtifact:
    """Train, measure on held-out documents and store a predictor of a model's head.

    Args:
        config: settings.
        note: takes lines for the user.

    Raises:
        PspError: an unusable model or text, existing output, or bounds out of reach.
    """
    resume, force = config.resume, config.force
    how = written_whole(config.out, resume=resume, force=force, marker=INDEX, begun_by=INPUTS_INDEX)
    with how as out:
        artifact = _trained(replace(config, out=out), note)
    return replace(artifact, path=config.out)


def _trained(config: HeadConfig, note: Note) -> HeadArtifact:
    """Train into a directory that may be written, or go on with what is there."""
    device = torch.device(choose_device(config.device))
    source = _source(config, note)
    if (line := _unrunnable(source.checkpoint)) is not None:
        note(line)
    done = _begun(config, source)
    if done is not None:
        return done
    inputs = _inputs(config, source)
    held = inputs.held_out(config.holdout, config.seed)
    if min(int(held.sum()), int((~held).sum())) < LEAST_TOKENS:
        raise PredictorError(
            f"{len(inputs)} tokens are too few to train and to measure on", "pass more text"
        )
    head = read_head(source.checkpoint).to(device)
    train, measured = Text(inputs.part(~held), head), Text(inputs.part(held), head)
    note(f"training on {len(train.rows)} tokens, measuring on {len(measured.rows)}")
    with tqdm(unit="step", desc="train-predictor --head", disable=None) as bar:
        search = _search(config, train, measured, bar)
        found = _best(config, search, train)
    return _written(config, source, search, found, len(inputs))


def _source(config: HeadConfig, note: Note) -> _Source:
    """Return what to run, by the settings or as traces were made."""
    traces = None if config.traces is None else TraceStore.open(config.traces).header
    name = config.model or (traces.model if traces else "")
    checkpoint = Checkpoint.open(name, experts=True)
    check_family(checkpoint)
    for line in checkpoint.notes:
        note(line)
    if traces is not None and checkpoint.fingerprint != traces.model_fingerprint:
        raise PredictorError(
            f"{checkpoint.path}: its weights or sizes differ from the model that {config.traces} "
            "was made of",
            "pass that one as --model",
        )
    own = traces is not None and not config.data
    field = traces.field if traces is not None and own else config.field
    if traces is not None:
        template, context = traces.chat_template, traces.context
    else:
        template = chat.detect(chat_template_of(checkpoint.directory)) or "none"
        context = min(config.context, checkpoint.shape.context_length)
    data = traces.data if traces is not None and own else named(config.data) or ()
    look_at_documents(data, field, template, config.tokens, note)
    header = InputsHeader(
        model_fingerprint=checkpoint.fingerprint,
        data=data,
        field=field,
        chat_template=template,
        tokens=config.tokens,
        context=context,
    )
    return _Source(checkpoint, name, header)


def _unrunnable(checkpoint: Checkpoint) -> str | None:
    """Return a line about a head that the engine cannot take."""
    shape = checkpoint.shape
    problem = misfit(shape.d_model, shape.vocab_size, rank=RANK_MULTIPLE)
    return problem and f"{problem}, so PowerInfer's second engine cannot run this predictor"


def _begun(config: HeadConfig, source: _Source) -> HeadArtifact | None:
    """Prepare the directory; return what is there if it is finished."""
    out = config.out
    if not config.resume:
        refuse_existing(out, force=config.force, marker=INDEX, resumable=True)
        remove_output(out)
        return None
    if not (out / INDEX).exists():
        return None
    artifact = HeadArtifact.open(out)
    asked = {
        "model_fingerprint": source.checkpoint.fingerprint,
        "head_sha256": head_digest(source.checkpoint),
        "recipe": config.recipe,
        "max_ppl_gap": config.max_ppl_gap,
        "max_changed": config.max_changed,
        "holdout": config.holdout,
        "seed": config.seed,
        "ranks": config.ranks,
    }
    found, used = asdict(artifact.header), recorded(out)
    if used is not None:
        found, asked = found | asdict(used), asked | asdict(source.header)
    for key, value in asked.items():
        if found[key] != value:
            raise PredictorError(
                f"{out}: was trained with another {key}",
                "use the same settings, or --force to start over",
            )
    return artifact


def _inputs(config: HeadConfig, source: _Source) -> HeadInputs:
    """Record what the head reads, unless a run before did."""
    if not (config.resume and recorded(config.out) == source.header):
        os.makedirs(config.out, exist_ok=True)
        dtype = torch.float32 if choose_device(config.device) == "cpu" else source.checkpoint.dtype
        model = load_model(source.checkpoint, dtype=dtype, device=config.device, head=False)
        record_inputs(model, source.checkpoint, source.header, config.out)
    return read_inputs(config.out)


def _search(config: HeadConfig, train: Text, measured: Text, bar: tqdm) -> Search:
    generator = torch.Generator().manual_seed(config.seed)
    rows = max(_FITTED_ROWS, 4 * train.head.shape[1])
    chosen = torch.randperm(len(train.rows), generator=generator)[:rows].sort().values
    moments = moments_of(train)

    def on_step(loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
        bar.update()

    return Search(
        fitted=Text(train.rows.part(chosen), train.head),
        held_out=measured,
        ppl_head=perplexity(measured),
        moments=moments,
        trainer=HeadTrainer(train, moments, config.seed),
        max_ppl_gap=config.max_ppl_gap,
        max_changed=config.max_changed,
        on_step=on_step,
    )


def _best(config: HeadConfig, search: Search, train: Text) -> Found:
    """Return what reads the fewest bytes within the bounds.

    Raises:
        PredictorError: nothing keeps them.
    """
    vocab_size, d_model = train.head.shape
    best: Found | None = None
    search.perfect()
    for rank in config.ranks or candidate_ranks(d_model):
        if best is not None and predictor_share(rank, d_model, vocab_size) >= best.bytes_ratio:
            continue
        if config.recipe != SVD:
            search.at(SVD, rank)
        found = search.at(config.recipe, rank)
        if found is not None and (best is None or found.bytes_ratio < best.bytes_ratio):
            best = found
    search.by_frequency(torch.bincount(train.rows.following, minlength=vocab_size))
    if best is None:
        tried = [point for point in search.points if point.rank]
        nearest = min(tried, key=lambda point: (point.ppl_gap, point.changed))
        raise PredictorError(
            f"no predictor keeps perplexity within {config.max_ppl_gap:.3%} and changed tokens "
            f"within {config.max_changed:.2%}; the nearest, rank {nearest.rank}, has "
            f"{nearest.ppl_gap:+.3%} and {nearest.changed:.2%}",
            "allow more with --max-ppl-gap or --max-changed, or pass more --tokens",
        )
    return best


def _written(
    config: HeadConfig, source: _Source, search: Search, found: Found, tokens: int
) -> HeadArtifact:
    points = tuple(
        replace(point, chosen=True) if point is found.point else point for point in search.points
    )
    shape = source.checkpoint.shape
    header = HeadHeader(
        model=source.name,
        model_fingerprint=source.checkpoint.fingerprint,
        head_sha256=head_digest(source.checkpoint),
        d_model=shape.d_model,
        vocab_size=shape.vocab_size,
        rank=found.predictor.rank,
        recipe=config.recipe,
        max_ppl_gap=config.max_ppl_gap,
        max_changed=config.max_changed,
        tokens=tokens,
        holdout=config.holdout,
        seed=config.seed,
        ranks=config.ranks,
    )
    return write_head(config.out, header, points, found.predictor, found.level)


def best_points(artifact: HeadArtifact) -> list[HeadPoint]:
    """Return, of each method and rank, what read the fewest bytes within the bounds.

    Where none kept them, what came nearest.
    """
    gap, changed = artifact.header.max_ppl_gap, artifact.header.max_changed
    groups: dict[tuple[str, int], list[HeadPoint]] = {}
    for point in artifact.points:
        groups.setdefault((point.method, point.rank), []).append(point)
    found = []
    for points in groups.values():
        kept = [point for point in points if point.keeps(gap, changed)]
        nearest = [min(points, key=lambda point: point.ppl_gap / gap + point.changed / changed)]
        found.append(min(kept or nearest, key=lambda point: point.bytes_ratio))
    return found
