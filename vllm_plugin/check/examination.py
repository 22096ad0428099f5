"""`serve-check`: all checks in order, and the command that starts vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING

from common.examination import Examination, findings_text
from common.finding import Finding, Status, guarded
from common.machine import numa_nodes, read_gpus, read_memory
from vllm_plugin.check.installed import (
    SERVER,
    Installed,
    command_findings,
    media_findings,
    plugin_findings,
    read_installed,
    requirement_findings,
    version_findings,
)
from vllm_plugin.check.plan import (
    BYTES,
    PARTS,
    TOKENIZER_MODE,
    Place,
    context_findings,
    device_findings,
    dtype_findings,
    dtype_of,
    head_findings,
    memory_findings,
    node_findings,
    part_findings,
)
from vllm_plugin.check.variables import variable_findings
from vllm_plugin.settings import ServeCheckConfig

if TYPE_CHECKING:
    from vllm_plugin.check.model import Subject

KIND = "psp.serve-check"


@dataclass(frozen=True, kw_only=True)
class ServeCheck:
    """What was found, and what starts vLLM.

    Attributes:
        examination: the findings.
        command: for a shell.
    """

    examination: Examination
    command: str

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return self.examination.healthy

    def document(self) -> dict[str, object]:
        """Return it ready for JSON."""
        return {**self.examination.document(), "command": self.command}

    def text(self) -> str:
        """Return it as a table, the command last."""
        first = "start it with" if self.healthy else "when that is mended, start it with"
        return f"{findings_text(self.examination)}\n{first}: {self.command}"


def check_serving(config: ServeCheckConfig, environment: Mapping[str, str]) -> ServeCheck:
    """Run every check; nothing is started, fetched or written.

    Args:
        config: directory and parts.
        environment: variables by name, as vLLM will have them.
    """
    installed = read_installed()
    findings = tuple(_findings(config, installed, environment))
    examination = Examination(kind=KIND, findings=findings)
    return ServeCheck(examination=examination, command=_command(config, findings, installed))


def _command(config: ServeCheckConfig, findings: Sequence[Finding], installed: Installed) -> str:
    found = {(each.check, each.status) for each in findings}
    parts = config.tensor_parallel_size
    start = "vllm serve" if installed.has_command else f"{SERVER} --model"
    command = f"{start} {quote(str(config.model))}"
    if parts > 1 and (PARTS, Status.PROBLEM) not in found:
        command += f" --tensor-parallel-size {parts}"
    return f"{command} {TOKENIZER_MODE}" if ("tokenizer", Status.WARNING) in found else command


def _findings(
    config: ServeCheckConfig, installed: Installed, environment: Mapping[str, str]
) -> Iterator[Finding]:
    yield from version_findings(installed)
    yield from command_findings(installed)
    if installed.package is not None:
        yield from requirement_findings(installed)
        yield from media_findings()
    yield from guarded("packages", _own_packages)
    yield from guarded("model", lambda: _model(config, installed, environment))


def _own_packages() -> Iterator[Finding]:
    """Yield what psp itself lacks."""
    from powerinfer_bridge.doctor.installation import package_findings, read_packages

    found = package_findings(read_packages())
    yield from (each for each in found if each.status is Status.PROBLEM)


def _model(
    config: ServeCheckConfig, installed: Installed, environment: Mapping[str, str]
) -> Iterator[Finding]:
    from vllm_plugin.check.model import config_findings, read_subject, serving_findings

    subject, parts = read_subject(config.model, environment), config.tensor_parallel_size
    if installed.package is not None:
        yield from plugin_findings(environment, needed=subject.needs_plugin)
    yield from config_findings(subject)
    yield from serving_findings(subject, installed, environment)
    place = _place(installed, parts)
    yield from device_findings(place, installed.version)
    yield from part_findings(subject.config, parts)
    yield from node_findings(place, environment)
    yield from head_findings(subject.config, place)
    yield from context_findings(subject.config)
    yield from guarded("weights", lambda: _weights(subject, place, environment))
    yield from guarded("tokenizer", lambda: _tokenizer(subject))
    yield from variable_findings(environment, served=not subject.left_to_vllm, parts=parts)


def _place(installed: Installed, parts: int) -> Place:
    cards = () if installed.for_cpu else read_gpus().cards
    cpu = installed.for_cpu or (installed.package is None and not cards)
    return Place(cpu=cpu, cards=cards, memory=read_memory(), nodes=numa_nodes(), parts=parts)


def _weights(subject: Subject, place: Place, environment: Mapping[str, str]) -> Iterator[Finding]:
    from vllm_plugin.check.model import read_weights, weight_findings

    weights = read_weights(subject)
    taken, own = dtype_of(subject.config, weights.told_dtypes, place)
    yield from dtype_findings(taken, own)
    if "quantization_config" in subject.config:
        need, form = weights.stored, "its quantised form"
    else:
        need, form = weights.numbers * BYTES[taken], taken
    yield from memory_findings(need, form, place, environment)
    yield from weight_findings(subject, weights)


def _tokenizer(subject: Subject) -> Iterator[Finding]:
    from vllm_plugin.check.text import template_findings, tokenizer_findings

    yield from tokenizer_findings(subject)
    yield from template_findings(subject)
