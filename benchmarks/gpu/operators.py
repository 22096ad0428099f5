"""S2, S3 and the FFN made of them: how far from what memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.commands import psp
from benchmarks.gpu.kit import Absent, Figure, Kit, Step

_SPARSITY = "0.67,0.88,0.95"
_AIMED = "88 %"
_DRY = ("--shape", "256,1024", "--repeats", "3")


def _measured(kit: Kit, words: Sequence[object]) -> Iterator[Figure]:
    """What `psp bench-operators` says with some options."""
    if kit.dry:
        words = (*(word for word in words if word != "--tune"), *_DRY)
    found = psp("bench-operators", *words, "--sparsity", _SPARSITY, "--device", kit.device)
    yield from figures(found)


def traced(kit: Kit) -> Iterator[Figure]:
    """The neurons of real tokens, by the traces of the smoke stage."""
    traces = kit.work / "traces-cpu"
    if not traces.exists():
        raise Absent("no traces: run the stage smoke before")
    repeats = ("--repeats", 3) if kit.dry else ()
    yield from figures(
        psp("bench-operators", "--pattern", traces, "--device", kit.device, *repeats)
    )


def batches(kit: Kit) -> Iterator[Figure]:
    """Tokens at once, by other kernels than one token's."""
    for tokens in (2, 4, 8):
        yield from _measured(kit, ("--shape", "7b", "--dtype", "float16", "--tokens", tokens))


def figures(document: dict[str, Any]) -> Iterator[Figure]:
    """Yield what a document of `psp bench-operators` says, the issue's aims beside it."""
    shape = document["shape"]
    what = f"{shape['d_model']}×{shape['d_ff']} {document['dtype']} {document['pattern']}"
    tokens = document["tokens"]
    what += f", {tokens} tokens" if tokens > 1 else ""
    for row in document["sparsities"]:
        aimed = row["label"] == _AIMED and tokens == 1
        place = f"{what} {row['label']}"
        kept = {key: value for key, value in row.items() if key not in ("samples", "eager")}
        kept |= {"launches": document.get("launches"), "tuning": document.get("tuning")}
        eager = row.get("eager")
        if eager:
            kept["eager"] = {key: value for key, value in eager.items() if key != "samples"}
        for name in ("s2", "s3"):
            title = name.upper()
            bound = row[f"{name}_bandwidth_bound_ratio"]
            yield Figure(name=f"{title} {place}", value=1e6 * row[f"{name}_seconds"], unit="µs")
            if bound is not None:
                most = 2.0 if aimed else None
                yield Figure(
                    name=f"{title} over the bound {place}", value=bound, unit="×", most=most
                )
            yield Figure(
                name=f"{title} against dense {place}",
                value=row[f"{name}_speedup"],
                unit="×",
                least=4.0 if aimed else None,
            )
        yield Figure(
            name=f"FFN against dense {place}",
            value=row["ffn_speedup"],
            unit="×",
            least=2.0 if aimed else None,
            details=kept,
        )


def _step(name: str, seconds: float, *words: str) -> Step:
    return Step(name=name, seconds=seconds, run=partial(_measured, words=words))


STEPS = (
    _step("7b-float16", 15, "--shape", "7b", "--dtype", "float16"),
    _step("13b-float16", 4, "--shape", "13b", "--dtype", "float16"),
    _step("7b-bfloat16", 4, "--shape", "7b", "--dtype", "bfloat16"),
    _step("7b-float16-clustered", 3, "--shape", "7b", "--pattern", "clustered"),
    _step("13b-bfloat16", 3, "--shape", "13b", "--dtype", "bfloat16"),
    Step(name="traced", seconds=3, run=traced),
    Step(name="batches", seconds=12, run=batches),
    _step("7b-float16-tuned", 30, "--shape", "7b", "--dtype", "float16", "--tune"),
)
"""Of this stage."""
