"""A made-up result of the GPU kit."""

from __future__ import annotations

from made_up_results import Document


def card() -> Document:
    """Return what a GPU did: an aim that was met, one that was missed, a step without a program."""
    figure = {"stage": "operators", "step": "7b-float16", "unit": "×", "details": {"samples": 25}}
    bound = {"name": "S2 over the bound", "value": 2.5, "most": 2.0, "least": None, "met": False}
    dense = {"name": "S2 against dense", "value": 4.25, "most": None, "least": 4.0, "met": True}
    plain = {"name": "S2", "value": 0.0, "unit": "µs", "most": None, "least": None, "met": None}
    absent = {"end": "absent", "line": "no PowerInfer: pass --powerinfer-bin", "seconds": 0.1}
    done = {"stage": "operators", "step": "7b-float16", "end": "done", "line": "", "seconds": 9.5}
    return {
        "kind": "psp.card",
        "schema_version": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "machine": {"card": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", "psp": "0.1.0"},
        "dry": False,
        "figures": [*(figure | each for each in (bound, dense, plain)), *_at_budgets()],
        "steps": [done, {"stage": "hybrid", "step": "placement", **absent}],
    }


def _at_budgets() -> list[Document]:
    speeds = {"hot neurons": (60.0, 350.0, 500.0), "dense in llama.cpp": (34.0, 40.0, 1066.0)}
    return [
        {
            "stage": "hybrid",
            "step": "speed",
            "name": f"speed, {arm}, {share:.0%}",
            "value": speed,
            "unit": "tokens/s",
            "most": None,
            "least": None,
            "met": None,
            "details": {"arm": arm, "vram_share": share},
        }
        for arm, found in speeds.items()
        for share, speed in zip((0.0, 0.5, 1.0), found, strict=True)
    ]
