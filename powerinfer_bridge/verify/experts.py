"""A file of arch `smallthinker` with one expert against its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from gguf import GGUFValueType
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.byte_level import puts_bos
from architectures.gguf_model.source import GGUFSource
from architectures.model import load_model
from common.errors import EXPORT_AGAIN, FormatError
from gguf_export.contract import OpenedFile, Report
from gguf_export.smallthinker.contract import RUNNABLE, ExpertFile
from gguf_export.smallthinker.hyperparameters import is_transposed
from gguf_export.smallthinker.requirements import check_one_expert
from gguf_export.smallthinker.second_engine import stored_neurons
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.tokens.splitting import PRE_KEY, splitting_name, splitting_note
from gguf_export.tokens.vocabulary import ADD_BOS_KEY, BYTE_LEVEL, Vocabulary
from gguf_files.names import DENSE_DOWN, expert_name
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.verify.comparison import check_fingerprint, require_sizes
from powerinfer_bridge.verify.numbers import Compared, compared_text, json_number, relu_form
from powerinfer_bridge.verify.tensors import same_numbers, zeros_after
from powerinfer_bridge.verify.tokens import require_vocabulary, same_ids

_PPL_TOLERANCE = 5e-3
"""Largest relative difference from transformers' perplexity where weights are not rounded further:
float16 alone took 0.14 % of a SmolLM2 over four windows."""


def check_expert_model(report: Report, opened: ExpertFile, checkpoint: Checkpoint) -> None:
    """Compare sizes, tensors and tokens of a file with those of its checkpoint."""
    report.check("model fingerprint", lambda: check_fingerprint(opened.file, checkpoint), "file")
    report.check("model sizes", lambda: _sizes(opened, checkpoint), "keys", "tokenizer")
    report.check("model tensors", lambda: _same_tensors(opened, checkpoint), "shapes")
    report.check("model tokenizer", lambda: same_tokens(opened, checkpoint), "tokenizer")


def check_expert_numbers(
    report: Report,
    opened: ExpertFile,
    checkpoint: Checkpoint,
    context: int,
    chunks: int,
    max_ppl_gap: float | None,
) -> None:
    """Run both models and compare; figures go to the report (settings: `verification.verify`)."""
    numbers = _Numbers(opened, checkpoint, context, chunks, report.figures)
    ready = (*RUNNABLE, "model sizes")
    report.check("logits", numbers.logits, *ready)
    report.check("perplexity", lambda: numbers.perplexity(max_ppl_gap), *ready)


def _sizes(opened: ExpertFile, checkpoint: Checkpoint) -> str:
    check_one_expert(checkpoint, "--model")
    shape = checkpoint.shape
    turned = is_transposed(opened.file)
    require_sizes(opened, checkpoint, stored_neurons(shape.d_model, shape.d_ff) if turned else None)
    return f"sizes and constants of {checkpoint.architecture.name}"


def _same_tensors(opened: ExpertFile, checkpoint: Checkpoint) -> str:
    """Compare all tensors but routers bit by bit, one in memory at a time."""
    turned = is_transposed(opened.file)
    count = 0
    for rule, target in tqdm(list(checkpoint.architecture.exported), desc="compare", disable=None):
        for layer in range(checkpoint.shape.n_layers if rule.per_layer else 1):
            name = expert_name(target).format(layer=layer)
            if name not in opened.file.tensors:
                continue  # a head that is the embedding
            expected = checkpoint.read(rule, layer)
            if turned and f".{DENSE_DOWN}_exps." in name:
                expected = expected.T.contiguous()
            if not same_numbers(opened.file, name, expected):
                raise FormatError(f"tensor {name} differs from the model's", EXPORT_AGAIN)
            if not zeros_after(opened.file, name, expected.numel()):
                raise FormatError(f"tensor {name} has neurons that the model has not", EXPORT_AGAIN)
            opened.file.forget()
            count += 1
    return f"{count} are the model's, to the bit or rounded to their types"


def same_tokens(opened: OpenedFile, checkpoint: Checkpoint) -> str:
    """Demand the model's vocabulary, its ids or the name of how it splits texts, and its BOS."""
    rows = len(opened.vocabulary.tokens)
    expected = read_vocabulary(checkpoint.directory, rows, checkpoint.config, engine=opened.engine)
    require_vocabulary(opened.vocabulary, expected)
    _same_bos(opened, expected)
    if opened.vocabulary.kind != BYTE_LEVEL:
        return same_ids(opened, checkpoint, compared_text())
    found = opened.file.optional(PRE_KEY, GGUFValueType.STRING, None)
    origin, wanted = checkpoint.origin, None
    if isinstance(origin, GGUFSource):
        wanted = origin.file.optional(PRE_KEY, GGUFValueType.STRING, None)
    wanted = wanted or splitting_name(checkpoint, expected)
    if wanted != found:
        raise FormatError(f"{PRE_KEY} is {found!r}, expected {wanted!r}", EXPORT_AGAIN)
    note = splitting_note(checkpoint, expected)
    return f"the model's vocabulary; {note or f'llama.cpp splits texts as {found}'}"


def _same_bos(opened: OpenedFile, expected: Vocabulary) -> None:
    """Demand BOS before a text unless the model says that there is none."""
    found, wanted = opened.vocabulary.add_bos, expected.add_bos is not False
    if found is None:
        pre = opened.file.optional(PRE_KEY, GGUFValueType.STRING, "")
        found = expected.kind != BYTE_LEVEL or puts_bos(pre)
    if found != wanted:
        said, told = ("BOS" if each else "no BOS" for each in (found, wanted))
        raise FormatError(
            f"{ADD_BOS_KEY}: {opened.engine} puts {said} before a text of this file, expected "
            f"{told}",
            EXPORT_AGAIN,
        )


@dataclass(frozen=True)
class _Numbers(Compared):
    """The file's numbers against its model's, both with ReLU: the graph has no FATReLU.

    Either reads every text at once, so that each weight is read once and none stays in memory.
    """

    opened: ExpertFile

    @cached_property
    def _model(self) -> tuple[torch.Tensor, float]:
        """Transformers' logits of `ids`, (tokens, vocab_size) float32, and its perplexity."""
        checkpoint = relu_form(self.checkpoint)
        model = load_model(checkpoint, dtype=torch.float32, device="cpu", weights="streamed")
        texts = [self.ids, *(ids for ids, _ in self.windows)]
        first, *others = model.hidden(torch.tensor(texts))
        return model.head(first), self.perplexity_of(map(model.head, others), "transformers")

    @cached_property
    def _file(self) -> tuple[torch.Tensor, float]:
        """The same by the file's own graph."""
        engine = ExpertEngine(self.opened.path, budget=0)
        texts = [self.ids, *(ids for ids, _ in self.windows)]
        logits = engine.forward_all(texts, [KVCache(engine.hyper.n_layers) for _ in texts])
        return next(logits), self.perplexity_of(logits, "file")

    def logits(self) -> str:
        """Judge the logits of a window."""
        expected, _ = self._model
        return self.judge_logits(self._file[0], expected)

    def perplexity(self, bound: float | None) -> str:
        """Compare the perplexity of a text, and judge it."""
        theirs, ours = self._model[1], self._file[1]
        self.figures["ppl_transformers"] = json_number(theirs)
        return self.judge_perplexity(ours, theirs, "transformers", _PPL_TOLERANCE, bound)
