"""`verify`: whether an exported file keeps PowerInfer's contract, and its model's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from architectures.checkpoint import Checkpoint
from common.table import fact_table
from powerinfer_bridge.comparison import CompareSettings, check_model
from powerinfer_bridge.contract import Report, Subject, check_structure
from powerinfer_bridge.inspection import printable


def verify(
    path: Path,
    model: str | None = None,
    *,
    max_ppl_gap: float | None = None,
    context: int = 256,
    chunks: int = 4,
) -> dict[str, Any]:
    """Check a file, and compare it with its model if one is named.

    Args:
        path: `*.powerinfer.gguf`.
        model: checkpoint directory or hub id that the file was made from.
        max_ppl_gap: largest perplexity gap that passes, a fraction; None judges none.
        context: window of logits and perplexity, tokens; at most the model's context.
        chunks: perplexity windows, at most.

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
        settings = CompareSettings(max_ppl_gap=max_ppl_gap, context=context, chunks=chunks)
        check_model(report, subject, checkpoint, settings)
    return report.document()


def verification_table(document: Mapping[str, Any]) -> str:
    """Return a document of `verify` as text."""
    checks = document["checks"]
    lines = {c["name"]: f"{'ok    ' if c['ok'] else 'FAILED'}  {c['detail']}" for c in checks}
    failed = sum(not check["ok"] for check in checks)
    verdict = f"{failed} of {len(checks)} checks failed" if failed else "all checks hold"
    return f"{fact_table(lines)}\n\n{printable(document['file'], 1000)}: {verdict}"
