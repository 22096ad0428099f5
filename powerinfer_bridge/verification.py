"""`verify`: whether an exported file keeps PowerInfer's contract, and its model's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from architectures.checkpoint import Checkpoint
from common.errors import ExportError
from common.table import fact_table
from gguf_export.pwri.inspection import printable
from powerinfer_bridge.comparison import CompareSettings, check_model
from powerinfer_bridge.contract import Report, Subject, check_structure

_SMALL_BYTES = 64 << 20
"""Files up to this size are also run when they are exported: seconds, not minutes."""


def verify(
    path: Path,
    model: str | None = None,
    *,
    max_ppl_gap: float | None = None,
    context: int = 256,
    chunks: int = 4,
    run: bool = True,
) -> dict[str, Any]:
    """Check a file, and compare it with its model if one is named.

    Args:
        path: `*.powerinfer.gguf`.
        model: checkpoint directory or hub id that the file was made from.
        max_ppl_gap: largest perplexity gap that passes, a fraction; None judges none.
        context: window of logits and perplexity, tokens; at most the model's context.
        chunks: perplexity windows, at most.
        run: run both models too, for logits and perplexity.

    Returns:
        A JSON-ready document: `ok` (all checks hold), `checks` with `name`, `ok` and a line of
        `detail` each; with a model also `logit_spread`, `logit_difference_dense` and
        `logit_difference_sparse` (largest), `ppl_dense`, `ppl_sparse` and `ppl_gap`, absent where
        not measured and null where no finite number.

    Raises:
        CheckpointError: the model to compare with cannot be used.
    """
    checkpoint = None if model is None else Checkpoint.open(model)
    report, subject = Report(path), Subject(path)
    check_structure(report, subject)
    if checkpoint is not None:
        settings = CompareSettings(max_ppl_gap=max_ppl_gap, context=context, chunks=chunks, run=run)
        check_model(report, subject, checkpoint, settings)
    return report.document()


@dataclass
class ExportCheck:
    """Verifies an exported file before it gets its name.

    Attributes:
        model: checkpoint that it was made from.
        target: the name it is about to get.
        document: what was found, see `verify`.
    """

    model: str
    target: Path
    document: dict[str, Any] = field(default_factory=dict)

    def __call__(self, path: Path) -> None:
        """Verify the file under its temporary name.

        Raises:
            ExportError: a check failed.
        """
        found = verify(path, self.model, run=path.stat().st_size <= _SMALL_BYTES)
        for check in found["checks"]:
            if not check["ok"]:
                raise ExportError(
                    f"{self.target}: the written file failed verification at '{check['name']}' "
                    f"({check['detail']}) and was not kept",
                    "report this, or look into the file with --no-verify and 'psp verify'",
                )
        self.document = {**found, "file": str(self.target)}

    @property
    def hint(self) -> str:
        """What was left out, and how to do it; empty if nothing was."""
        if "ppl_gap" in self.document:
            return ""
        return (
            "logits and perplexity were not compared, which takes a while; run "
            f"'psp verify {quote(str(self.target))} --model {quote(self.model)}'"
        )


def verification_table(document: Mapping[str, Any]) -> str:
    """Return a document of `verify` as text."""
    checks = document["checks"]
    lines = {c["name"]: f"{'ok    ' if c['ok'] else 'FAILED'}  {c['detail']}" for c in checks}
    failed = sum(not check["ok"] for check in checks)
    verdict = f"{failed} of {len(checks)} checks failed" if failed else "all checks hold"
    return f"{fact_table(lines)}\n\n{printable(document['file'], 1000)}: {verdict}"
