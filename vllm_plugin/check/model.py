"""The model directory: who serves it, with which arithmetic, and whether its files are whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from architectures.checkpoint import Checkpoint, read_config
from architectures.config_json import MEND, Config, refuse
from architectures.registry import model_type_of, resolve
from architectures.source import Directory
from architectures.tensor_files import TensorFiles
from common.errors import CheckpointError, PspError, SettingsError, printable
from common.finding import Finding, from_error, note, ok, problem
from common.units import size
from vllm_plugin.act_info import VARIABLE, read_act_info
from vllm_plugin.check.installed import Installed, knows_class
from vllm_plugin.served import CLASSES, OWN_PREDICTOR, Served, factors, served

_VLLM_FALCON = "FalconForCausalLM"
"""vLLM 0.32.0 (model_executor/models/falcon.py) computes GELU in it, whatever the config says."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A directory with a config.json, and what the plugin makes of it.

    Attributes:
        path: the directory.
        config: config.json, its class filled in.
        served: how the plugin serves it; None if vLLM runs it by itself, or the plugin refuses it.
        refusal: why the plugin refuses it.
        variable_refusal: why it refuses ACT_INFO.
    """

    path: Path
    config: Config
    served: Served | None = None
    refusal: PspError | None = None
    variable_refusal: PspError | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Its model classes."""
        return tuple(map(str, self.config.get("architectures") or ()))

    @property
    def left_to_vllm(self) -> bool:
        """Whether vLLM is to run it by itself."""
        return self.served is None and self.refusal is None

    @property
    def needs_plugin(self) -> bool:
        """Whether vLLM cannot run it without the plugin, or not read its config."""
        return not self.left_to_vllm or self.config.get("model_type") in OWN_TYPES

    @property
    def gated(self) -> bool:
        """Whether its graph is LLaMA's."""
        return bool(CLASSES.intersection(self.classes))


OWN_TYPES = ("sparsellama", "minicpm", "bamboo")
"""What `configs` makes known to transformers."""


def read_subject(path: Path, environment: Mapping[str, str]) -> Subject:
    """Read a directory's config.json.

    Raises:
        CheckpointError: no directory, or one without a config.json that can be read.
    """
    if not path.is_dir():
        what = "is a file" if path.is_file() else "no such directory"
        raise CheckpointError(f"{path}: {what}", "pass a model's Hugging Face directory")
    config, variable_refusal = read_config(path), None
    names = config.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        refuse("architectures", names, "a list of names", MEND)
    found, refusal = None, None
    try:
        read_act_info(environment)
    except SettingsError as error:
        variable_refusal, environment = error, {}
    try:
        found = served(config, environment)
    except PspError as error:
        refusal = error
    return Subject(
        path=path,
        config=config,
        served=found,
        refusal=refusal,
        variable_refusal=variable_refusal,
    )


def config_findings(subject: Subject) -> Iterator[Finding]:
    """Judge what transformers needs to read the config."""
    config = subject.config
    kind = model_type_of(config)
    if not isinstance(config.get("model_type"), str) and kind in OWN_TYPES:
        yield ok("config", f"no model_type; the plugin says that it is {kind}")
    elif not isinstance(config.get("model_type"), str):
        remedy = (
            f'add "model_type": "{kind}" to config.json'
            if kind is not None
            else "add the model's model_type to config.json"
        )
        yield problem("config", "config.json has no model_type, which vLLM reads it by", remedy)
    else:
        yield ok("config", f"model_type {printable(config['model_type'])}")
    if config.get("auto_map"):
        found = "config.json names code of its own (auto_map)"
        if subject.gated:
            yield note("own code", f"{found}; it is not needed: pass no --trust-remote-code")
        else:
            yield note("own code", f"{found}; psp runs none, vLLM only with --trust-remote-code")


def serving_findings(
    subject: Subject, installed: Installed, environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Tell who serves the model, with which activation, and what ACT_INFO does to it."""
    found = subject.served
    if subject.refusal is not None:
        yield from_error("activation", subject.refusal)
    elif found is None:
        yield from _left(subject, installed)
    else:
        values = found.arithmetic
        threshold = f" from {values.activation_threshold:g}" if values.activation_threshold else ""
        folded = ", its constants folded into weights" if factors(found) else ""
        name = found.family.name
        told = f"{values.activation}{threshold}, served by psp's plugin as {name}{folded}"
        yield ok("activation", told)
    yield from _act_info(subject, environment)


def _left(subject: Subject, installed: Installed) -> Iterator[Finding]:
    config, names = subject.config, ", ".join(subject.classes)
    if subject.gated:
        why = "no ReLU-family activation" if not config.get("num_experts") else "experts"
        yield note("activation", f"left to vLLM: {why} (hidden_act {config.get('hidden_act')!r})")
        return
    if _VLLM_FALCON in subject.classes and _act(config) not in (None, "gelu"):
        found = f"vLLM's Falcon computes GELU, the model is of {_act(config)!r}"
        yield problem("activation", found, "run it with PowerInfer: psp export-gguf")
        return
    listed = any(knows_class(installed, name) for name in subject.classes)
    who = "vLLM, which has the class" if listed else "vLLM, whose list does not have it either"
    yield note("model class", f"{printable(names) or 'none named'}: not psp's; left to {who}")


def _act(config: Config) -> object:
    """Return the activation that a Falcon's config names."""
    return config.get("activation", config.get("hidden_act"))


def _act_info(subject: Subject, environment: Mapping[str, str]) -> Iterator[Finding]:
    if subject.variable_refusal is not None and not subject.gated:
        yield note(VARIABLE, f"{subject.variable_refusal.problem}; not read for this model")
    elif subject.variable_refusal is not None:
        yield from_error(VARIABLE, subject.variable_refusal)
    elif environment.get(VARIABLE, "").strip() and subject.refusal is None:
        said = environment[VARIABLE].strip()
        if subject.served is None:
            yield note(VARIABLE, f"{said}: not read, vLLM runs this model by itself")
        elif not subject.served.notes:
            yield ok(VARIABLE, f"{said}: agrees with config.json")
        for line in subject.served.notes if subject.served is not None else ():
            yield note(VARIABLE, line, f"unset {VARIABLE} to follow config.json")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the files hold that vLLM loads.

    Attributes:
        files: names of the files.
        tensors: how many there are.
        numbers: of all tensors.
        stored: bytes of them.
        told_dtypes: names of their types, which vLLM looks up in safetensors files only.
    """

    files: tuple[str, ...]
    tensors: int
    numbers: int
    stored: int
    told_dtypes: frozenset[str]


def read_weights(subject: Subject) -> Weights:
    """Read the headers of a directory's weights.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    files = TensorFiles(subject.path, subject.config.get("transformers_weights"))
    found = [files.describe(name) for name in files.shards if OWN_PREDICTOR not in name]
    sizes = [(math.prod(shape), getattr(dtype, "itemsize", 1)) for shape, dtype in found]
    safe = all(file.suffix == ".safetensors" for file in files.shards.values())
    return Weights(
        files=tuple(sorted({file.name for file in files.shards.values()})),
        tensors=len(found),
        numbers=sum(number for number, _ in sizes),
        stored=sum(number * width for number, width in sizes),
        told_dtypes=frozenset(str(dtype).removeprefix("torch.") for _, dtype in found if safe),
    )


def weight_findings(subject: Subject, weights: Weights) -> Iterator[Finding]:
    """Judge whether every tensor is there that a family of psp's has.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or quantised.
    """
    config, count = _with_zeros(subject), len(weights.files)
    told = f"{size(weights.stored)} in {count} file{'s' * (count > 1)}"
    try:
        resolve(config).read_shape(config)
    except CheckpointError as error:
        why = error.problem if subject.gated else "psp does not know the layout"
        why = "quantised" if "quantization_config" in subject.config else why
        yield note("weights", f"{told}, {weights.tensors} tensors, not checked one by one: {why}")
        return
    checkpoint = Checkpoint.of(Directory(subject.path, subject.config), config)
    yield ok("weights", f"complete: {told}")
    yield from (note("weights", line) for line in checkpoint.notes)


def _with_zeros(subject: Subject) -> Config:
    """Return the config with an activation that psp knows: tensors are the same with any."""
    if not subject.gated or "BambooForCausalLM" in subject.classes:
        return subject.config
    return {**subject.config, "hidden_act": "relu"}
