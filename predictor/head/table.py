"""A head's predictor as a text table: what each method and rank reads within the bounds."""

from __future__ import annotations

from common.table import table
from predictor.head.artifact import HeadArtifact
from predictor.head.run import best_points
from results.head import HeadPoint

_COLUMNS = (
    "method",
    "hidden size",
    "rows read %",
    "head bytes",
    "perplexity",
    "gap %",
    "±",
    "divergence",
    "changed %",
    "kept",
)


def head_table(artifact: HeadArtifact) -> str:
    """Return one row a method and hidden size, and what the predictor is of."""
    header = artifact.header
    rows = [_row(artifact, point) for point in best_points(artifact)]
    chosen = artifact.chosen
    return (
        f"{table(_COLUMNS, rows)}\n\n"
        f"bounds: perplexity {header.max_ppl_gap:+.3%}, changed greedy tokens "
        f"{header.max_changed:.2%}; head of {header.vocab_size} rows of {header.d_model}\n"
        f"all rows in Q4_0: perplexity {chosen.ppl_head:.4f}, with the level in them "
        f"{chosen.ppl_levelled:.4f}; rows read alone {chosen.ppl_renormalised:.4f} on "
        f"{1 - chosen.missed:.2%} of the tokens\n"
        f"{artifact.path}"
    )


def _row(artifact: HeadArtifact, point: HeadPoint) -> list[str]:
    header = artifact.header
    kept = point.keeps(header.max_ppl_gap, header.max_changed)
    return [
        point.method,
        str(point.rank) if point.rank else "–",
        f"{100 * point.rows_read:.2f}",
        f"{point.bytes_ratio:.3f}",
        f"{point.ppl_predicted:.4f}",
        f"{100 * point.ppl_gap:+.3f}",
        f"{100 * point.standard_error:.3f}",
        f"{point.kl_divergence:.5f}",
        f"{100 * point.changed:.2f}",
        "written" if point.chosen else "yes" if kept else "no",
    ]
