"""Every command that takes a device on this one, held against the CPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.commands import psp
from benchmarks.gpu.kit import Absent, Figure, Kit, Step
from common.version import package_version
from predictor.artifact import PredictorArtifact
from predictor.module import Predictor, decide
from predictor.traces.packing import unpack_active
from predictor.traces.store import TraceStore

_TOKENS, _CONTEXT, _RANK = 4096, 256, 64
_QUESTIONS = 40
_SCHEDULE = """stages:
- {kind: substitution, lambda: 0, until_step: 2}
- {kind: progressive, lambda: 1.0e-3, until_step: 8}
"""


def collect(kit: Kit) -> Iterator[Figure]:
    """Traces: the same text, tokens and windows; labels differ where a gate is next to zero."""
    stores, seconds = {}, {}
    for name, device in _devices(kit):
        out, start = _place(kit, f"traces-{name}"), time.perf_counter()
        psp(
            *("collect", "--model", kit.model, "--data", kit.data, "--out", out),
            *("--tokens", _TOKENS, "--context", _CONTEXT, "--importance-bits", 8),
            *("--device", device),
        )
        stores[name], seconds[name] = TraceStore.open(out), time.perf_counter() - start
    ours, theirs = stores["card"], stores["cpu"]
    shares, active, residuals = [], [], []
    index = torch.arange(theirs.rows)
    for layer in theirs.header.layers:
        rows = [store.layer(layer) for store in (ours, theirs)]
        bits = [unpack_active(each.active_at(index), theirs.header.d_ff) for each in rows]
        shares.append(float((bits[0] != bits[1]).float().mean()))
        active.append(float(bits[1].float().mean()))
        inputs = [each.inputs_at(index) for each in rows]
        residuals.append(float((inputs[0] - inputs[1]).norm() / inputs[1].norm()))
    details = {"by_layer": shares, "active_by_layer": active, "seconds": seconds}
    yield Figure(
        name="collect: labels that differ", value=_mean(shares), most=0.005, details=details
    )
    yield Figure(
        name="collect: residuals, relative distance",
        value=max(residuals),
        most=0.02,
        details={"by_layer": residuals},
    )


def streamed(kit: Kit) -> Iterator[Figure]:
    """A model that is read block by block gives the traces of one that stays on the device."""
    out = _place(kit, "traces-streamed")
    psp(
        *("collect", "--model", kit.model, "--data", kit.data, "--out", out, "--tokens", _TOKENS),
        *("--context", _CONTEXT, "--importance-bits", 8, "--device", kit.device),
        *("--weights", "streamed"),
    )
    ours, theirs = TraceStore.open(out), TraceStore.open(kit.work / "traces-card")
    index = torch.arange(theirs.rows)
    pairs = [(ours.layer(layer), theirs.layer(layer)) for layer in theirs.header.layers]
    same = [
        torch.equal(a.active_at(index), b.active_at(index))
        and torch.equal(a.inputs_at(index), b.inputs_at(index))
        for a, b in pairs
    ]
    yield Figure(
        name="collect: layers whose rows are the same with streamed weights",
        value=sum(same) / len(same),
        least=1,
    )


def train(kit: Kit) -> Iterator[Figure]:
    """Predictors of the same traces, and the decisions of one predictor on both."""
    metrics, seconds = {}, {}
    for name, device in _devices(kit):
        out, start = _place(kit, f"predictors-{name}"), time.perf_counter()
        psp(
            *("train-predictor", "--traces", kit.work / "traces-cpu", "--out", out),
            *("--rank", _RANK, "--max-ppl-gap", "1%", "--device", device),
        )
        seconds[name] = time.perf_counter() - start
        metrics[name] = PredictorArtifact.open(out).layers
    for key in ("activation_recall", "predicted_sparsity", "ffn_bytes_ratio"):
        means = {name: _mean([layer[key] for layer in by.values()]) for name, by in metrics.items()}
        yield Figure(
            name=f"train-predictor: {key.replace('_', ' ')}, less the CPU's",
            value=means["card"] - means["cpu"],
            least=-0.02,
            most=0.02,
            details={**means, "seconds": seconds},
        )


def decisions(kit: Kit) -> Iterator[Figure]:
    """Masks: the same predictors on the same residuals."""
    store = TraceStore.open(kit.work / "traces-cpu")
    artifact = PredictorArtifact.open(kit.work / "predictors-cpu")
    index, differ = torch.arange(min(store.rows, 2048)), []
    for layer in store.header.layers:
        stored, inputs = artifact.layer(layer), store.layer(layer).inputs_at(index)
        predictor = Predictor(stored.fc1.float(), stored.fc2.float())
        here = decide(predictor, inputs, 0.0)
        there = decide(predictor.to(kit.device), inputs.to(kit.device), 0.0).cpu()
        differ.append(float((here != there).float().mean()))
    yield Figure(
        name="masks that differ", value=_mean(differ), most=1e-4, details={"by_layer": differ}
    )


def sparsity(kit: Kit) -> Iterator[Figure]:
    """Perplexity and sparsity with FATReLU, by the command."""
    found = {
        name: psp(
            *("sparsity", "--model", kit.model, "--data", kit.eval_data, "--tokens", _TOKENS),
            *("--context", _CONTEXT, "--thresholds", "0.05", "--device", device),
        )
        for name, device in _devices(kit)
    }
    ppl = {name: [arm["ppl"] for arm in each["settings"]] for name, each in found.items()}
    gaps = [a / b - 1 for a, b in zip(ppl["card"], ppl["cpu"], strict=True)]
    yield Figure(
        name="sparsity: perplexity over the CPU's, less 1",
        value=max(gaps, key=abs),
        least=-0.005,
        most=0.005,
        details=ppl,
    )


def generate(kit: Kit) -> Iterator[Figure]:
    """Text with the operators against the dense model's, both on the device."""
    found = psp(
        *(
            "generate",
            "--model",
            kit.model,
            "--prompt",
            "def read(self",
            "-n",
            48,
            "--repeats",
            2,
            "--device",
            kit.device,
        ),
        *("--dtype", "float32" if kit.dry else "float16"),
    )
    yield Figure(
        name="generate: tokens that are the dense model's",
        value=found["same_tokens"] / len(found["dense"]["tokens"]),
        details={"text": found["operators"]["text"], "speedup": found["speedup"]},
    )


def sparsify(kit: Kit) -> Iterator[Figure]:
    """Eight steps of training: the perplexity behind them against the CPU's."""
    schedule = kit.work / "schedule.yaml"
    schedule.write_text(_SCHEDULE)
    found = {}
    for name, device in (("cpu", "cpu"), ("card", "cpu" if kit.dry else "auto")):
        out = _place(kit, f"sparse-{name}")
        found[name] = psp(
            *("sparsify", "--model", kit.model, "--data", kit.data, "--out", out),
            *("--schedule", schedule, "--context", 128, "--batch", 4, "--log-every", 8),
            *("--eval-windows", 4, "--device", device, "--precision", "float32"),
        )
    yield Figure(
        name="sparsify: perplexity over the CPU's, less 1",
        value=found["card"]["ppl"] / found["cpu"]["ppl"] - 1,
        least=-0.01,
        most=0.01,
        details=found,
    )


def evaluate(kit: Kit) -> Iterator[Figure]:
    """The same questions to the dense model and to predictors: scores less the CPU's."""
    if package_version("lm_eval") is None:
        raise Absent("no lm-eval: install psp[eval]")
    scores, seconds = {}, {}
    for name, device in _devices(kit):
        out, start = _place(kit, f"answers-{name}"), time.perf_counter()
        found = psp(
            *("evaluate", "--model", kit.model, "--suite", "tiny", "--data", kit.eval_data),
            *("--predictors", kit.work / "predictors-cpu", "--limit", _QUESTIONS),
            *("--dtype", "float32", "--output-path", out, "--device", device),
        )
        seconds[name] = time.perf_counter() - start
        scores[name] = {
            f"{score['arm']} {score['task']} {score['metric']} {score['filter']}": score["value"]
            for score in found["scores"]
        }
    off = {key: abs(scores["card"][key] / there - 1) for key, there in scores["cpu"].items()}
    yield Figure(
        name="evaluate: scores off the CPU's, relative",
        value=max(off.values()),
        most=0.02,
        details={"by_score": off, **scores, "seconds": seconds},
    )


def head(kit: Kit) -> Iterator[Figure]:
    """The output head's predictor of the same text: the share of the head's bytes that it reads."""
    bytes_read, seconds = {}, {}
    for name, device in _devices(kit):
        out, start = _place(kit, f"head-{name}"), time.perf_counter()
        found = psp(
            *("train-predictor", "--head", "--model", kit.model, "--data", kit.data, "--out", out),
            *("--tokens", _TOKENS, "--rank", _RANK, "--context", _CONTEXT, "--device", device),
        )
        seconds[name] = time.perf_counter() - start
        chosen = next(point for point in found["points"] if point["chosen"])
        bytes_read[name] = chosen["rows_read"] + chosen["predictor_share"]
    yield Figure(
        name="train-predictor --head: bytes read, less the CPU's",
        value=bytes_read["card"] - bytes_read["cpu"],
        least=-0.05,
        most=0.05,
        details={**bytes_read, "seconds": seconds},
    )


def run(kit: Kit) -> Iterator[Figure]:
    """All of it with one command; the gap that the predictors make, in the embedded engine."""
    out = _place(kit, "run")
    found = psp(
        *("run", "--model", kit.model, "--data", kit.data, "--eval-data", kit.eval_data),
        *("--out", out, "--tokens", _TOKENS, "--context", _CONTEXT, "--rank", _RANK),
        *("--max-ppl-gap", "1%", "--chunks", 2, "-n", 8, "--repeats", 1, "--device", kit.device),
    )
    bench = found["bench"]
    yield Figure(
        name="run: perplexity gap",
        value=bench["ppl_gap"],
        most=0.05,
        details={"seconds": found["seconds"], "ppl": bench["ppl_dense"]},
    )


def _devices(kit: Kit) -> tuple[tuple[str, str], ...]:
    return (("cpu", "cpu"), ("card", kit.device))


def _place(kit: Kit, name: str) -> Path:
    """Return a path in the work directory where nothing is."""
    path = kit.work / name
    shutil.rmtree(path, ignore_errors=True)
    return path


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


STEPS = (
    Step(name="collect", seconds=14, run=collect),
    Step(name="streamed", seconds=2, run=streamed),
    Step(name="train-predictor", seconds=7, run=train),
    Step(name="decisions", seconds=1, run=decisions),
    Step(name="generate", seconds=9, run=generate),
    Step(name="sparsity", seconds=2, run=sparsity),
    Step(name="sparsify", seconds=7, run=sparsify),
    Step(name="run", seconds=12, run=run),
    Step(name="evaluate", seconds=12, run=evaluate),
    Step(name="head", seconds=12, run=head),
)
"""Of this stage."""
