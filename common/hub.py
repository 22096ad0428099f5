"""The Hugging Face hub, which is asked once, and for seconds only, whether it answers.

Its own library tries a file six times, in 23 seconds, and waits for a network that answers nothing
as long as the system does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from common.errors import CheckpointError, reason

WAIT = "HF_HUB_ETAG_TIMEOUT"
"""Environment variable of huggingface_hub: seconds to wait for the hub's first answer."""

_SECONDS = 2.0
"""Where the variable is not set."""


@cache
def absence() -> str | None:
    """Return why the hub does not answer, one line, None if it does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if WAIT in os.environ else _SECONDS
    said = [f"nothing in {seconds:g} s, {WAIT} sets another limit"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            said.append("")
        except Exception as error:  # of many kinds: no network, no such host, offline by choice
            said.append(reason(error))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)  # looking a name up heeds no time-out
    return f"no answer from {constants.ENDPOINT}: {said[-1]}" if said[-1] else None


def fetched(name: str, kind: str, fetch: Callable[..., str], *what: str, **options: Any) -> Path:
    """Return what a function of huggingface_hub fetches; without the hub, what this disk has of it.

    Args:
        name: of the model, as the user typed it.
        kind: what the name was expected to be on this disk.
        fetch: `snapshot_download` or `hf_hub_download`.
        what: its arguments.
        options: its options.

    Raises:
        CheckpointError: no network, and nothing on this disk; an unknown or a gated repository.
    """
    away = absence()
    if away is not None:
        options["local_files_only"] = True
    try:
        return Path(fetch(*what, **options))
    except Exception as error:
        raise _unfetched(
            f"{name}: neither a {kind} nor fetched from the hub", away, error
        ) from error


def listed(name: str) -> list[str]:
    """Return the paths of all files of a model's repository, none without the hub.

    Raises:
        CheckpointError: the hub does not list them.
    """
    from huggingface_hub import list_repo_files

    if absence() is not None:
        return []
    try:
        return list(list_repo_files(name))
    except Exception as error:
        raise _unfetched(f"{name}: its files are not listed by the hub", None, error) from error


def _unfetched(problem: str, away: str | None, error: Exception) -> CheckpointError:
    """Return the error of one that the client raises: no network, unknown, gated, many more."""
    return CheckpointError(
        f"{problem} ({away or reason(error)})",
        "check the name, the network and your access",
    )
