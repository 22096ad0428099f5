"""Templates of tasks, compiled once each: lm-eval compiles them for every question anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

_KEPT = 1024
"""More than a task has, so that none is compiled twice while one is asked."""


@contextmanager
def compiled_once() -> Iterator[None]:
    """Let lm-eval's templates be compiled once each, and put its own way back afterwards.

    Source: lm-eval@0.4.13 `utils.py:apply_template`, 1.3 ms a call, nearly all of it to compile.
    """
    from lm_eval.utils import env

    before = vars(env).get("from_string")
    env.from_string = _compiled
    try:
        yield
    finally:
        if before is None:
            del env.from_string
        else:
            env.from_string = before


@lru_cache(_KEPT)
def _compiled(source: str) -> jinja2.Template:
    """Return a template in lm-eval's own environment.

    Raises:
        jinja2.TemplateSyntaxError: it is none; nothing is kept of it.
    """
    from lm_eval.utils import env

    template: jinja2.Template = type(env).from_string(env, source)
    return template
