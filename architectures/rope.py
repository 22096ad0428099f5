"""Rotary positions as configs give them: their base, and what scales them for longer contexts.

Only what PowerInfer computes without any option on its command line is accepted: `linear`, and
`yarn` with the constants that its context parameters begin with. llama.cpp's one graph with ReLU is
given no factors of frequencies, which `llama3` needs. Source: transformers
`modeling_rope_utils.py`; PowerInfer@d3ebd7c llama.cpp:llama_context_default_params,
llama_new_context_with_model and ggml.c:rope_yarn; llama.cpp@0c1e570 src/models/smallthinker.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from architectures.config_json import MAX_SIZE, MEND, Config, number, real, refuse

_LARGEST_BASE = 1e30
"""Well within float32, the type of the file's key."""

_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Turns within the original context between which YaRN blends, the same in both programs."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model reaches positions beyond those that it was first trained on.

    Attributes:
        kind: `linear` divides every position by the factor; `yarn` only those of slow pairs, and
            makes queries and keys longer (arXiv 2309.00071 §3).
        factor: at least 1.
        original_context: tokens of the first training; 0 for `linear`, which needs none.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_context: int = 0


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Return the length that YaRN gives queries and keys (arXiv 2309.00071 §3.4)."""
    return 1.0 + 0.1 * weight * math.log(factor)


def rope_parameters(theta: float, scaling: RopeScaling | None) -> dict[str, object]:
    """Return the `rope_parameters` of a transformers config."""
    found: dict[str, object] = {"rope_theta": theta, "rope_type": "default"}
    if scaling is not None:
        found |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "yarn":
            found["original_max_position_embeddings"] = scaling.original_context
    return found


def read_rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Read base and scaling from the new (`rope_parameters`) or the old keys.

    Raises:
        CheckpointError: a scaling that PowerInfer does not compute.
    """
    given, kind = given_parameters(config), rope_kind(config)
    theta = real(given if "rope_theta" in given else config, "rope_theta", 10000.0)
    if theta > _LARGEST_BASE:
        refuse("rope_theta", theta, f"at most {_LARGEST_BASE:g}", MEND)
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1):
        remedy = "PowerInfer turns whole heads, and so does llama.cpp where it computes ReLU"
        refuse("partial_rotary_factor", share, "1", remedy)
    if kind == "default":
        return theta, None
    if kind not in ("linear", "yarn"):
        remedy = "PowerInfer scales positions in no other way, nor does llama.cpp in its ReLU graph"
        refuse("rope_type", kind, "'default', 'linear' or 'yarn'", remedy)
    factor = real(given, "factor", None)
    if not 1 <= factor <= MAX_SIZE:
        refuse("factor", factor, f"1 to {MAX_SIZE}", MEND)
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    return theta, _yarn(config, given, factor, theta)


def rope_kind(config: Config) -> str:
    """Return what kind of scaling a config asks for, `default` for none."""
    given = given_parameters(config)
    return str(given.get("rope_type", given.get("type", "default")))


def given_parameters(config: Config) -> Config:
    """Return the parameters as transformers chooses them where both keys are there.

    Raises:
        CheckpointError: they are no object.
    """
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key)
        if found and not isinstance(found, dict):
            refuse(key, found, "an object", MEND)
        if found:
            return dict(found)
    return {}


def _yarn(config: Config, given: Config, factor: float, theta: float) -> RopeScaling:
    if theta <= 1:
        refuse("rope_theta", theta, "above 1", MEND)
    for key, needed in _BETAS.items():
        if (given.get(key) or needed) != needed:
            refuse(key, given[key], f"{needed:g}", "PowerInfer reads no other from a file")
    if not given.get("truncate", True):
        refuse("truncate", False, "true", "PowerInfer rounds the pairs between which it blends")
    magnitude, needed = _magnitude(given, factor), yarn_magnitude(factor)
    if not math.isclose(magnitude, needed, rel_tol=1e-6):
        expected = f"{needed:g} (1 + 0.1 ln factor)"
        refuse("attention_factor", magnitude, expected, "PowerInfer reads no other from a file")
    key = "original_max_position_embeddings"
    source = next((place for place in (config, given) if place.get(key) is not None), None)
    original = number(config, "max_position_embeddings") if source is None else number(source, key)
    # Outside, all pairs are on one side of the blend: transformers turns it around, ggml does not.
    largest = int(min(64 * math.pi * theta, MAX_SIZE))
    if not 7 <= original <= largest:
        refuse(key, original, f"7 to {largest}", MEND)
    return RopeScaling(kind="yarn", factor=factor, original_context=original)


def _magnitude(given: Config, factor: float) -> float:
    """Return what transformers multiplies cosines and sines with."""
    if given.get("attention_factor") is not None:
        return real(given, "attention_factor", None)
    if given.get("mscale") and given.get("mscale_all_dim"):
        over, under = (real(given, key, None) for key in ("mscale", "mscale_all_dim"))
        return yarn_magnitude(factor, over) / yarn_magnitude(factor, under)
    return yarn_magnitude(factor)
