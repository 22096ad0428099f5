"""Writing results: the document and its samples as a table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import write_bytes, write_json
from powerinfer_bridge.benchmark.document import RESULT, SAMPLE, SAMPLES


def write_results(out: Path, document: Mapping[str, Any]) -> None:
    """Write `bench.csv` and, last, `bench.json` into a directory.

    Raises:
        OutputError: the system refused a write.
    """
    write_bytes(out / SAMPLES, samples_csv(document).encode())
    write_json(out / RESULT, document)


def samples_csv(document: Mapping[str, Any]) -> str:
    """Return the samples as RFC 4180 has them, a row each; what is not known is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, SAMPLE)
    writer.writeheader()
    writer.writerows(document["samples"])
    return buffer.getvalue()
