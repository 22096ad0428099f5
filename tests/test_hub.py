"""The hub: how long a command waits for it, and what is taken where it does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from conftest import refused

from common.documents import read_documents
from common.errors import CheckpointError, DataError
from common.hub import WAIT, absence, fetched, listed

Answer = Callable[..., object]
Hub = Callable[[Answer], None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let the hub do something when it is asked, and forget what it did before."""

    def serve(answer: Answer) -> None:
        session = SimpleNamespace(head=answer)
        monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: session)

    monkeypatch.delenv(WAIT, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    absence.cache_clear()
    yield serve
    absence.cache_clear()


def gone(*args: object, **options: object) -> None:
    raise ConnectionError("Name or service not known\nmore")


def test_a_hub_that_answers_is_asked_once(hub: Hub) -> None:
    asked: list[Any] = []
    hub(lambda *args, **options: asked.append((args, options)))
    assert absence() is absence() is None
    endpoint = huggingface_hub.constants.ENDPOINT
    assert asked == [((endpoint,), {"timeout": 2.0})]


def test_a_hub_that_is_silent_is_waited_for_as_long_as_the_user_says(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking a name up heeds no time-out of the request."""
    monkeypatch.setenv(WAIT, "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub(lambda *args, **options: time.sleep(1))
    begun = time.monotonic()
    assert f"nothing in 0.1 s, {WAIT} sets another limit" in str(absence())
    assert time.monotonic() - begun < 1


def test_without_the_hub_what_the_disk_has_is_taken(hub: Hub) -> None:
    hub(gone)

    def fetch(name: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if name != "kept":
            raise FileNotFoundError("not in the cache")
        return "/place"

    assert str(fetched("kept", "file", fetch, "kept")) == "/place"
    with refused(CheckpointError, "a/b: neither a file", "no answer", "not known);", "network"):
        fetched("a/b", "file", fetch, "b")
    assert listed("a/b") == []


def test_files_that_the_hub_does_not_list_are_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", gone)
    with refused(CheckpointError, "a/b: its files are not listed", "not known);", "access"):
        listed("a/b")


def test_without_the_hub_a_dataset_is_not_tried_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(gone)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "hf_hub_download", lambda *a, **o: pytest.fail("tried")
    )
    with refused(DataError, "hf:owner/name: cannot be loaded (no answer", "not known);", "network"):
        next(read_documents("hf:owner/name"))
