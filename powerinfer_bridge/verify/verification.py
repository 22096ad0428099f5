"""`verify`: whether an exported file keeps PowerInfer's contract, and its model's numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from os.path import isfile, lexists
from pathlib import Path
from shlex import quote

from architectures.checkpoint import Checkpoint
from common.errors import ExportError, FormatError, SettingsError, printable
from common.table import fact_table
from common.units import MIB
from gguf_export.commit import finish_commit
from gguf_export.contract import OpenedFile, Report, check_structure
from gguf_export.manifest import check_outputs, manifest_path
from gguf_export.smallthinker.contract import (
    ExpertFile,
    check_expert_structure,
    open_model_file,
)
from gguf_export.smallthinker.mixture_contract import MixtureFile, check_mixture_structure
from powerinfer_bridge.verify.comparison import (
    CompareAll,
    check_model,
    check_numbers,
    compare_all,
)
from powerinfer_bridge.verify.experts import check_expert_model, check_expert_numbers
from powerinfer_bridge.verify.mixture import check_mixture_model, check_mixture_numbers


def verify(
    path: Path,
    model: str | None = None,
    *,
    max_ppl_gap: float | None = None,
    context: int = 256,
    chunks: int = 4,
    run: bool = True,
    note: Callable[[str], None] = lambda line: None,
    compare: CompareAll = compare_all,
) -> Report:
    """Check a file, and compare it with its model if one is named.

    Args:
        path: `*.powerinfer.gguf`, or a file of arch `smallthinker`.
        model: checkpoint directory or hub id that the file was made from.
        max_ppl_gap: largest perplexity gap that passes, a fraction; None judges none. It is to the
            same file with all neurons, of arch `smallthinker` to the model.
        context: window of logits and perplexity, tokens; at most the model's context.
        chunks: perplexity windows, at most.
        run: run both models too, for logits and perplexity.
        note: receives lines about the checkpoint.
        compare: compares the tensors of PowerInfer's own files.

    Returns:
        The checks; with a model its figures are `logit_spread`, `logit_difference_dense` and
        `logit_difference_sparse` (largest), `ppl_dense`, `ppl_sparse` and `ppl_gap`; of arch
        `smallthinker` `ppl_dense`, `ppl_transformers` of one expert or `ppl_model` of several, and
        `ppl_gap`. They are absent where not measured and None where no finite number.

    Raises:
        FormatError: there is no such file.
        CheckpointError: the model to compare with cannot be used.
    """
    finish_commit(path)
    report, opened = Report(path), OpenedFile(path)
    if not isfile(path):
        _ = opened.file  # says what is there instead
    with suppress(FormatError):  # which is a finding
        opened = open_model_file(path)
    if lexists(manifest_path(path)):
        report.check("checksum", lambda: check_outputs(path, [path]))
    mixture = isinstance(opened, MixtureFile)
    if compare is not compare_all and isinstance(opened, MixtureFile | ExpertFile):
        raise SettingsError(f"{path}: only files of PowerInfer's own arch are spread", "omit --ray")
    checkpoint = None if model is None else Checkpoint.open(model, experts=mixture)
    for line in () if checkpoint is None else checkpoint.notes:
        note(line)
    if isinstance(opened, MixtureFile):
        check_mixture_structure(report, opened)
        if checkpoint is not None:
            check_mixture_model(report, opened, checkpoint)
            if run:
                check_mixture_numbers(report, opened, checkpoint, context, chunks, max_ppl_gap)
        return report
    if isinstance(opened, ExpertFile):
        check_expert_structure(report, opened)
        if checkpoint is not None:
            check_expert_model(report, opened, checkpoint)
            if run:
                check_expert_numbers(report, opened, checkpoint, context, chunks, max_ppl_gap)
        return report
    check_structure(report, opened)
    if checkpoint is not None:
        check_model(report, opened, checkpoint, compare)
        if run:
            check_numbers(report, opened, checkpoint, context, chunks, max_ppl_gap)
    return report


@dataclass
class ExportCheck:
    """Verifies an exported file before it gets its name.

    Attributes:
        model: checkpoint that it was made from.
        target: the name it is about to get.
        most_bytes: files up to this size are also run: seconds, not minutes.
        report: what was found; None before.
    """

    model: str
    target: Path
    most_bytes: int = 64 * MIB
    report: Report | None = None

    def __call__(self, path: Path) -> None:
        """Verify the file under its temporary name.

        Raises:
            CheckpointError: the checkpoint's weights are not all finite.
            ExportError: another check failed.
        """
        found = verify(path, self.model, run=path.stat().st_size <= self.most_bytes)
        for name, outcome in found.checks.items():
            if not outcome.ok:
                Checkpoint.open(
                    self.model, experts=True
                ).check_numbers()  # the cause, if it is there
                raise ExportError(
                    f"{self.target}: the written file failed verification at '{name}' "
                    f"({outcome.line}) and was not kept",
                    "report this, or look into the file with --no-verify and 'psp verify'",
                )
        self.report = replace(found, path=self.target)

    @property
    def hint(self) -> str:
        """What was left out, and how to do it; empty if nothing was."""
        if self.report is None or "ppl_dense" in self.report.figures:
            return ""
        return (
            "logits and perplexity were not compared, which takes a while; run "
            f"'psp verify {quote(str(self.target))} --model {quote(self.model)}'"
        )


def verification_table(report: Report) -> str:
    """Return the checks as text."""
    checks = report.checks
    lines = {n: f"{'ok    ' if c.ok else 'FAILED'}  {c.line}" for n, c in checks.items()}
    failed = sum(not outcome.ok for outcome in checks.values())
    verdict = f"{failed} of {len(checks)} checks failed" if failed else "all checks hold"
    return f"{fact_table(lines)}\n\n{printable(str(report.path), 1000)}: {verdict}"
