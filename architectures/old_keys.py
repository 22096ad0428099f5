"""Keys of config.json that changed their names, under both of them.

transformers 5 writes `rope_parameters` and `dtype`. transformers 4 and PowerInfer's convert.py know
`rope_theta`, `rope_scaling` and `torch_dtype` alone, and take a base of 10000 and no scaling where
they are missing, without a word. Sources: transformers@4.57.6 `models/llama/
configuration_llama.py`, `configuration_utils.py`; PowerInfer@d3ebd7c convert.py:Params.
"""

from __future__ import annotations

from typing import Any

from architectures.config_json import Config
from architectures.rope import given_parameters


def with_old_keys(config: Config) -> dict[str, Any]:
    """Return a config.json that says under the old names too what it says under the new ones.

    A scaling has its kind as `type`, which is what all readers look for; transformers up to 4.42
    refuses a linear one with more than `type` and `factor`.
    """
    written = dict(config)
    if "dtype" in config:
        written["torch_dtype"] = config["dtype"]
    if not config.get("rope_parameters"):
        return written
    given = given_parameters(config)
    scaling = {key: value for key, value in given.items() if key != "rope_theta"}
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    theta = given.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        written["rope_theta"] = theta
    scaled = kind not in ("default", None)
    written["rope_scaling"] = {"type": kind, **scaling} if scaled else None
    return written
