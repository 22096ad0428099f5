"""Datasets of the Hugging Face hub, streamed.

Its JSON files are read as any other file of text. The library's own reader of them (datasets 5.2,
packaged_modules/json) makes JSON of every text behind one value of another type, without a word,
and ends at a column that only a later file has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from common.errors import DataError, reason
from common.hub import absence
from common.text_sources.names import Dataset, TextFile, text_file
from common.text_sources.rows import Row, rows_of

_REMEDY = "check name and network"
_MIXED = ") changed from"
"""In what pyarrow says of a column with values of several types."""


def dataset_rows(dataset: Dataset, field: str) -> Iterator[Row]:
    """Yield the rows of a dataset.

    Raises:
        DataError: no such dataset, configuration or split, no network, or files that differ in
            their columns.
    """
    count = 0
    try:
        for row in _rows(dataset, field):
            count += 1
            yield row
    except DataError:
        raise
    except Exception as error:
        # The library raises many kinds: no network, no such name, no such config or split.
        raise _failure(dataset.name, count, error) from error


def _rows(dataset: Dataset, field: str) -> Iterator[Row]:
    import datasets

    name, config, split = [*dataset.name.split(":")[1:], "", ""][:3]
    away = None if os.path.exists(name) else absence()
    if away is not None:
        datasets.config.HF_HUB_OFFLINE = True  # then it takes what this disk has, or gives up
    try:
        builder = datasets.load_dataset_builder(name, config or None)
    except Exception as error:
        if away is None:
            raise
        raise DataError(f"{dataset.name}: cannot be loaded ({away})", _REMEDY) from error
    files = _json_files(dataset.name, builder, split or "train")
    for file in files:
        yield from rows_of(file, field)
    if not files:
        rows = builder.as_streaming_dataset(split=split or "train")
        for number, row in enumerate(rows):
            yield f"{dataset.name} row {number}", row


def _json_files(name: str, builder: Any, split: str) -> list[TextFile]:
    """Return the files of a split if the library would read them as plain JSON, else none."""
    config = builder.config
    if not hasattr(config, "on_mixed_types"):
        return []
    places = [str(place) for place in (config.data_files or {}).get(split, ())]
    files = [text_file(f"{name} {place.rsplit('/')[-1]}", place) for place in places]
    plain = config.field is None and config.encoding in ("utf-8", None)
    if plain and files and all(file and file.kind in (".json", ".jsonl") for file in files):
        return [file for file in files if file is not None]
    # Archives and the like stay the library's; it then refuses what it would make JSON of.
    config.on_mixed_types = None
    return []


def _failure(name: str, count: int, error: Exception) -> DataError:
    where = f"{name}: after {count} row{'s' * (count != 1)}" if count else name
    if _MIXED in str(error):
        return DataError(
            f"{where}: {reason(error)}", "mend the row, or unpack the files and pass them"
        )
    wanted = getattr(error, "requested_column_names", None)
    found = getattr(error, "table_column_names", None)
    if wanted is None or found is None:
        return DataError(f"{where}: cannot be loaded ({reason(error)})", _REMEDY)
    more, less = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
    differ = [f"has '{each}' besides" for each in more] + [f"lacks '{each}'" for each in less]
    return DataError(
        f"{where}: a file {' and '.join(differ)}, unlike those before it",
        "name a configuration of alike files, or download the files and pass them",
    )
