"""Task files in YAML as a user hands them over: what they may hold, and where their data is."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from common.errors import DataError, reason
from common.yaml_text import parse_yaml, read_yaml_text, safe_loader

LOCAL_KINDS = ("json", "csv", "parquet", "text", "arrow")
"""Readers of the datasets library that take files of this disk (`dataset_path` of a task)."""

_CODE_KEYS = ("class", "custom_dataset")
_ALLOW = "read it, and pass --allow-code if it may run"
_MEND = "mend the file or leave it out"


def built_in() -> Path:
    """Return the directory of lm-eval's own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).resolve().parent


def task_files(directory: Path) -> list[Path]:
    """Return a directory's YAML files in the order in which lm-eval reads them."""
    return sorted(directory.glob("**/*.yaml"), key=lambda path: path.as_posix())


def read_raw(path: Path) -> dict[str, Any]:
    """Return what a task file and those that it includes hold, functions as paths.

    Raises:
        DataError: no such file, or not YAML as lm-eval reads it.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if not Path(path).resolve().is_relative_to(built_in()):
        list(_included(path, set()))  # within limits, which lm-eval's own reader has not
    try:
        return dict(load_yaml(path, resolve_func=False))
    except Exception as error:  # of YAML, of files that it includes, of lm-eval
        raise DataError(f"{path}: not a task file ({_where(error)})", _MEND) from error


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return reason(error)
    problem = getattr(error, "problem", None)
    return f"{problem or reason(error)}, line {mark.line + 1}"


def refuse_code(path: Path) -> None:
    """Refuse a task file that makes lm-eval import Python, unless it is lm-eval's own.

    `!function` imports a file beside the YAML, `class` and `custom_dataset` name such functions.
    Who opens a table of questions expects none of it to run. This is no wall against a hostile
    file: lm-eval fills its templates with Jinja outside of Jinja's sandbox.

    Raises:
        DataError: it does; likewise any file that it includes.
    """
    for each in _included(path, set()):
        if each.is_relative_to(built_in()):
            continue
        what = _code_in(each)
        if what is not None:
            raise DataError(f"{each}: runs Python code ({what})", _ALLOW)


def _included(path: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield a file and those that it includes, each once."""
    path = path.expanduser().resolve()
    if path in seen:
        return
    seen.add(path)
    yield path
    include = _without_tags(path).get("include") or []
    names = include if isinstance(include, list) else [include]
    for name in names:
        if not isinstance(name, str) or not os.path.isfile(path.parent / name):
            raise DataError(f"{path}: not a task file (include: {name!r:.80} is no file)", _MEND)
        yield from _included(path.parent / name, seen)


def _without_tags(path: Path) -> dict[str, Any]:
    class Loader(safe_loader()):  # type: ignore[misc]
        """Takes a tagged value for its text."""

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    data = read_yaml_text(path, DataError, _MEND)
    try:
        found = parse_yaml(data, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a task file ({_where(error)})", _MEND) from error
    return found if isinstance(found, dict) else {}


def _code_in(path: Path) -> str | None:
    for event in yaml.parse(read_yaml_text(path, DataError, _MEND), Loader=safe_loader()):
        if getattr(event, "tag", None) == "!function":
            return f"!function {getattr(event, 'value', '')}, line {event.start_mark.line + 1}"
    return next((key for key in _CODE_KEYS if key in _without_tags(path)), None)


def refuse_kind(name: str, config: Mapping[str, Any], *, allow_code: bool) -> None:
    """Refuse a task that no arm can be asked.

    Raises:
        DataError: it shows pictures or sounds, runs what the model writes without leave, or reads
            its data by a program.
    """
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        problem = f"task {name}: has pictures or sounds, which no arm reads"
        raise DataError(problem, "leave it out of --tasks")
    if config.get("unsafe_code") and not allow_code:
        problem = f"task {name}: runs the programs that a model writes"
        raise DataError(problem, "pass --allow-code, best in a container, or leave it out")
    if str(config.get("dataset_path") or "").endswith(".py"):
        problem = f"task {name}: its data is read by a program ({config['dataset_path']})"
        raise DataError(problem, "give the data as .jsonl, .csv or .parquet")


def located(name: str, config: Mapping[str, Any], directory: Path | None) -> dict[str, Any]:
    """Return a task's settings with its local data found, wherever the command runs.

    lm-eval and datasets take relative paths from the working directory. Here they are first taken
    from the directory of the task's file, and only then from there.

    Args:
        name: of the task, for messages.
        config: as read; `trust_remote_code` is dropped, whoever asked for it.
        directory: of the file that defines the task, None without one.

    Raises:
        DataError: a file is not there or holds no rows.
    """
    kwargs = dict(config.get("dataset_kwargs") or {})
    kwargs.pop("trust_remote_code", None)
    places = [Path.cwd()] if directory is None else [directory, Path.cwd()]
    config, source = dict(config), config.get("dataset_path")
    if source in LOCAL_KINDS:
        if "data_dir" in kwargs:
            kwargs["data_dir"] = _found(name, str(kwargs["data_dir"]), places)
            places = [Path(kwargs["data_dir"])]
        if "data_files" in kwargs:
            kwargs["data_files"] = _all_found(name, kwargs["data_files"], places)
    elif isinstance(source, str):
        here = next((place / source for place in places if (place / source).is_dir()), None)
        config["dataset_path"] = source if here is None else str(here)
    if kwargs or config.get("dataset_kwargs") is not None:
        config["dataset_kwargs"] = kwargs
    return config


def is_local(config: Mapping[str, Any]) -> bool:
    """Whether a task's data, once located, is on this disk."""
    source = config.get("dataset_path")
    if source in LOCAL_KINDS:
        kwargs = config.get("dataset_kwargs") or {}
        return not any("://" in file for file in _names(kwargs.get("data_files")))
    return source is None or Path(str(source)).is_dir()


def _names(files: Any) -> Iterator[str]:
    if isinstance(files, Mapping):
        files = list(files.values())
    if isinstance(files, list | tuple):
        for each in files:
            yield from _names(each)
    elif files is not None:
        yield str(files)


def _all_found(name: str, files: Any, places: list[Path]) -> Any:
    if isinstance(files, Mapping):
        return {split: _all_found(name, each, places) for split, each in files.items()}
    if isinstance(files, list | tuple):
        return [_all_found(name, each, places) for each in files]
    return _found(name, str(files), places)


def _found(name: str, file: str, places: list[Path]) -> str:
    """Return an absolute path or pattern."""
    if "://" in file:
        return file
    for place in places:
        pattern = str(place / Path(file).expanduser())
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        for match in matches:
            if match.is_file() and _is_blank(match):
                raise DataError(f"task {name}: {match} holds no rows", "put questions into it")
        if matches:
            return pattern
    looked = " or in ".join(str(place) for place in dict.fromkeys(places))
    raise DataError(
        f"task {name}: its data file {file} is not in {looked}", "mend data_files in the task file"
    )


def _is_blank(file: Path) -> bool:
    with file.open("rb") as stream:
        return not stream.read(4096).strip()
