"""The entry point that vLLM calls in each of its processes before it looks at a model.

Nothing is imported here until it is called, and nothing at all without vLLM. Whatever goes wrong is
one line of the log: an error would stop models that are not ours.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

LOGGER = "vllm.psp"
"""A child of vLLM's logger, so that lines look like and go where its own do."""


def register() -> None:
    """Make vLLM run ReLU-family models: all of it or, with a line that says why, nothing."""
    if find_spec("vllm") is None:
        return
    try:
        from vllm_plugin.hooks import install

        install()
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        logging.getLogger(LOGGER).warning("psp's plugin is off: %s", line)
