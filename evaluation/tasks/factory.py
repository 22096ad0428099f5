"""Tasks made by lm-eval's own factory, with what may go wrong told in one line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import DataError, PspError, reason
from common.hub import absence
from evaluation.tasks.code_tasks import own_config
from evaluation.tasks.files import is_local, located, read_raw, refuse_code, refuse_kind

_TEMPLATES = "mend doc_to_text, doc_to_target or doc_to_choice, or name the column rightly"


def make_factory(*, allow_code: bool, cache: Path) -> Any:
    """Return a factory for lm-eval's `TaskManager`.

    Args:
        allow_code: whether Python of the user's own task files may run, and what models write.
        cache: directory for what the datasets library makes of local files.
    """
    from lm_eval.tasks._factory import TaskFactory

    class Factory(TaskFactory):  # type: ignore[misc]
        """Looks at settings before a task is made of them."""

        opened: Mapping[str, Any] | None = None
        looked_at: dict[str, Any] | None = None

        def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
            self.opened = self.looked_at = None
            with _blamed(entry.name, lambda: self.opened):
                self.looked_at = self._load_full_config(entry, overrides)
                with _as_far_as_the_hub(self.looked_at):
                    return super()._build_task(entry, overrides)

        def _build_group(self, name: str, *rest: Any) -> Any:
            with _blamed(name, lambda: None):
                return super()._build_group(name, *rest)

        def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> Any:
            if self.looked_at is not None:  # what a task is to be made of is read once
                config, self.looked_at = self.looked_at, None
                return config
            path = entry.yaml_path
            raw = entry.cfg if path is None else read_raw(path)
            refuse_kind(entry.name, {**(raw or {}), **(overrides or {})}, allow_code=allow_code)
            if path is not None:
                if not allow_code:
                    refuse_code(path)
                own = own_config(path)
                if own is not None:
                    entry = dataclasses.replace(entry, yaml_path=None, cfg=own)
            config = super()._load_full_config(entry, overrides)
            config["metadata"]["config_source"] = "inline" if path is None else str(path)
            self.opened = _prepared(entry.name, config, path, allow_code=allow_code, cache=cache)
            return self.opened

    return Factory()


def _prepared(
    name: str, config: Mapping[str, Any], path: Path | None, *, allow_code: bool, cache: Path
) -> dict[str, Any]:
    """Return settings of a task, or of a group with tasks of its own, with their data found."""
    directory = None if path is None else Path(path).parent
    found = located(name, config, directory)
    if is_local(found) and found.get("dataset_path") is not None:
        found["dataset_kwargs"] = {"cache_dir": str(cache), **(found.get("dataset_kwargs") or {})}
    members = found.get("task")
    if isinstance(members, list):
        found["task"] = [
            _member(name, each, path, allow_code=allow_code, cache=cache) for each in members
        ]
    return found


def _member(group: str, member: Any, path: Path | None, *, allow_code: bool, cache: Path) -> Any:
    if not isinstance(member, Mapping):
        return member
    name = str(member.get("task") or member.get("group") or group)
    refuse_kind(name, member, allow_code=allow_code)
    if "dataset_path" not in member and not isinstance(member.get("task"), list):
        return member
    return _prepared(name, member, path, allow_code=allow_code, cache=cache)


@contextmanager
def _blamed(name: str, opened: Callable[[], Mapping[str, Any] | None]) -> Iterator[None]:
    """Turn what goes wrong with a task into one line that names it."""
    try:
        yield
    except PspError:
        raise
    except Exception as error:  # a task file can hold anything
        raise _told(name, error, opened()) from error


def _told(name: str, error: Exception, config: Mapping[str, Any] | None) -> DataError:
    """Return the line of an error, `config` None where the task's file was not even opened."""
    import jinja2

    if config is None:
        problem = f"task {name}: cannot be opened ({_kind(error)})"
        return DataError(problem, "mend its file or install what it needs")
    if _is_of_hub(error) and not is_local(config):
        return _unfetched(name, config, hub_absence() or reason(error))
    if isinstance(error, jinja2.TemplateError):
        problem = f"task {name}: a template cannot be filled ({reason(error)})"
        return DataError(problem, _TEMPLATES)
    if isinstance(error, IndexError) and "size 0" in str(error):
        return DataError(f"task {name}: has no questions", "put some into its data")
    if isinstance(error, KeyError):
        problem = f"task {name}: its data has no {reason(error)} among its splits or columns"
        return DataError(problem, "mend test_split, validation_split and the names of columns")
    return DataError(f"task {name}: cannot be made ({_kind(error)})", "mend its file or its data")


def hub_absence() -> str | None:
    """Return why no data can come from the hub, None if it can."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    return absence()


@contextmanager
def _as_far_as_the_hub(config: Mapping[str, Any]) -> Iterator[None]:
    """Take data from this disk alone where the hub does not answer: else it is tried for 23 s."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    try:
        if not is_local(config) and hub_absence() is not None:
            datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"


def _is_of_hub(error: Exception) -> bool:
    """Whether an error says that data is neither on this disk nor fetched."""
    known = isinstance(error, ConnectionError | FileNotFoundError)
    by_library = type(error).__module__.split(".")[0] in ("huggingface_hub", "httpx", "requests")
    return known or by_library or "cache" in str(error)


def _unfetched(name: str, config: Mapping[str, Any], why: str) -> DataError:
    dataset, part = config["dataset_path"], config.get("dataset_name")
    shown = dataset if part is None else f"{dataset} ({part})"
    what = ", ".join(repr(each) for each in (dataset, part) if each is not None)
    return DataError(
        f"task {name}: its data {shown} is not on this disk, and the hub does not give it ({why})",
        f'run python -c "import datasets; datasets.load_dataset({what})" with a network and the '
        "same HF_HOME, and copy that directory here",
    )
