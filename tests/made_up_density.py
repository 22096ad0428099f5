"""A made-up sweep over densities."""

from __future__ import annotations

from made_up_results import MACHINE, Document


def density() -> Document:
    """Return a sweep over densities on random weights."""
    return {
        "kind": "psp.density",
        "schema_version": 1,
        "tool_version": "0.1.0",
        "shape": {
            "d_model": 4096,
            "d_ff": 11008,
            "n_heads": 32,
            "n_layers": 4,
            "rank": 512,
            "seed": 0,
        },
        "hardware": MACHINE,
        "threads": 2,
        "settings": {"threads": 2, "generate": 32},
        "points": [_density_point(share) for share in (0.05, 0.1, 0.2, 0.5, 1.0)],
    }


def _density_point(share: float) -> Document:
    speeds = {"dense": 14.0, "predicted": 20 / (0.5 + share), "all_neurons": 12.5}
    measured = {
        arm: {"tokens_per_second": rate, "quartiles": [0.98 * rate, 1.03 * rate]}
        for arm, rate in speeds.items()
    }
    ratio = speeds["predicted"] / speeds["all_neurons"]
    quartiles = [0.97 * ratio, 1.02 * ratio]
    return {
        "density": share,
        "density_wanted": share,
        **measured,
        "speedup": {
            "arm": "predicted",
            "over": "all_neurons",
            "ratio": ratio,
            "quartiles": quartiles,
        },
        "estimate": {arm: 1.1 * rate for arm, rate in speeds.items()},
        "ppl_gap": 0.0,
        "greedy_text_same": True,
    }
