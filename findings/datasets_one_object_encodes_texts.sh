#!/usr/bin/env bash
# One value that is no text makes `datasets` hand out every text of its block of a JSON file as JSON: with quotes around it
# and escapes within. Nothing is said, and the column is still called a string.
#
# Expected: an error at that row, or that one row changed. `datasets` settles on the column's type by the first block (10 MB)
# of the file, here a string. In a later block with an object in it, all texts are encoded so that they fit one column, and
# are never decoded again, because a string was promised. Text for a model is spoilt by it in silence; a reader of few rows
# sees nothing. With the object in the first block the column is of type Json and every text is as it was.
#
# Seen with: datasets 5.2.0, pyarrow 26.0.1, Python 3.11.
# Fails with: datasets 4.0.0, which ends in an error at that block.
set -euo pipefail
DATASETS=${DATASETS:-5.2.0}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "datasets==$DATASETS" "pyarrow==26.0.1"

cat > "$work/show.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import datasets

ROWS, OBJECT_AT = 100_000, 50_000


def text(number: int) -> str:
    return f"text {number} " + "some words of no meaning " * 10


path = Path(sys.argv[1], "texts.jsonl")
with path.open("w") as file:
    for number in range(ROWS):
        value = {"body": "an object"} if number == OBJECT_AT else text(number)
        file.write(json.dumps({"text": value}) + "\n")
rows = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
changed, encoded, outcome = 0, 0, "read to the end"
try:
    for number, row in enumerate(rows):
        if number != OBJECT_AT and row["text"] != text(number):
            changed += 1
            encoded += row["text"] == json.dumps(text(number))
except Exception as error:
    outcome = f"{type(error).__name__} at row {number}"
print(*(f"{name} {version(name)}" for name in ("datasets", "pyarrow")))
print(f"{changed} of {ROWS - 1} texts changed, {encoded} of them JSON of themselves; {outcome}; {rows.features}")
sys.exit(not (changed == encoded > ROWS // 10 and rows.features["text"].dtype == "string"))
PYTHON
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/show.py" "$work" 2> "$work/err" || { tail -3 "$work/err"; echo "it does not hold any more"; exit 1; }
echo "it holds"
