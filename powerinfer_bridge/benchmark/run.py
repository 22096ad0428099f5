"""`bench-powerinfer`: speed and quality of a file, predicted against all neurons and dense."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from common.documents import read_text, sample_text
from common.version import tool_version
from powerinfer_bridge.benchmark.arms import DENSE_LLAMA_CPP, DENSE_POWERINFER, make_arms
from powerinfer_bridge.benchmark.document import KIND, SCHEMA, SCHEMA_VERSION
from powerinfer_bridge.benchmark.expectation import expect, has_gpu
from powerinfer_bridge.benchmark.inputs import describe_inputs
from powerinfer_bridge.benchmark.journal import check_out, open_journal
from powerinfer_bridge.benchmark.machine import Machine, this_machine, versions
from powerinfer_bridge.benchmark.placement import (
    HotNeurons,
    frequency_curve,
    layer_shares,
    place,
    read_hot_neurons,
    vram_budget,
)
from powerinfer_bridge.benchmark.prompts import read_prompts, room_for
from powerinfer_bridge.benchmark.quality import QualityRun, check_model
from powerinfer_bridge.benchmark.results import write_results
from powerinfer_bridge.benchmark.rounds import run_rounds
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.shape import problems
from powerinfer_bridge.benchmark.subject import Subject, architecture, open_subject
from powerinfer_bridge.benchmark.summary import summarise_speeds, summarise_texts
from powerinfer_bridge.benchmark.warnings import Circumstances, find_warnings


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure a file.

    Predicted and all neurons (threshold −1e30) come from the same engine. Recall and sparsity
    always come from the embedded engine, which sees every neuron.

    Returns:
        The document that `benchmark.document.SCHEMA` describes, in the glossary's words. With
        `config.out` it is also written there, with its samples as CSV and the journal.

    Raises:
        PspError: unreadable files or text, an `out` that may not be written, or an engine that
            fails.
    """
    # Looked at first, because all that follows is load too; refused before anything takes long.
    machine = this_machine()
    check_out(config.out, resume=config.resume, force=config.force)
    gpu = has_gpu(config, machine)
    subject = open_subject(config)
    check_model(config, subject.file)
    text = read_text(config.data, config.field) if config.data else sample_text()
    prompts = read_prompts(config)
    hyper = subject.engine.hyper
    room = room_for(prompts, subject.engine.vocabulary, config.generate, hyper.context_length)
    hot = read_hot_neurons(subject)
    head = {
        "inputs": describe_inputs(config, subject, text, prompts),
        "hardware": machine.document(),
        "versions": versions(subject),
        "settings": config.document(),
    }
    identity = {**head, "settings": config.identity()}
    journal = open_journal(config.out, identity, resume=config.resume, force=config.force)
    quality = QualityRun(config=config, subject=subject, text=text, journal=journal)
    figures = quality.measure()
    arms = make_arms(config, subject, room)
    samples = run_rounds(arms, prompts, config, journal, subject.heartbeat)
    document: dict[str, Any] = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "tool_version": tool_version(),
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": hyper.name,
        "file": str(config.file),
        "engine": arms[0].engine,
        **head,
        **figures,
        "layers": [{**row, **layer_shares(hot, row["layer"])} for row in figures["layers"]],
        "context": quality.context,
        "text": config.data or "pydoc_data.topics",
        **summarise_speeds(arms, samples),
        **summarise_texts(samples),
        "prompts": len(prompts),
        "placement": place(subject, hot, vram_budget(config, subject, machine), room),
        "hot_neurons": frequency_curve(hot),
    }
    document["estimate"], trouble = expect(config, document, context=room, gpu=gpu)
    around = replace(_circumstances(config, subject, machine, hot), estimate_problem=trouble)
    document["warnings"] = find_warnings(document, around)
    problem = next(problems(document, SCHEMA), None)
    assert problem is None, problem
    if config.out is not None:
        write_results(config.out, document)
    return document


def _circumstances(
    config: BenchConfig, subject: Subject, machine: Machine, hot: HotNeurons
) -> Circumstances:
    facts, llama_cpp = subject.powerinfer_facts, subject.llama_cpp_facts
    dense = {DENSE_POWERINFER: subject.dense, DENSE_LLAMA_CPP: subject.llama_cpp_file}
    return Circumstances(
        machine=machine,
        n_layers=subject.engine.hyper.n_layers,
        cuda=None if facts is None else facts.cuda,
        vram_budget=vram_budget(config, subject, machine),
        model_bytes=config.file.stat().st_size,
        activation_threshold=subject.engine.hyper.activation_threshold,
        index_problem=hot.problem,
        dense_architectures={name: architecture(file) for name, file in dense.items() if file},
        llama_cpp_cuda=None if llama_cpp is None else llama_cpp.cuda,
    )
