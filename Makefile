PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart test lint types imports docs wheel bench check clean

quickstart: $(READY)
	$(BIN)/psp quickstart

# With bytecode kept, also where the environment says not to: workers start in half the time. Files in
# their own order: xdist would keep those of few tests for the end, some of which are the longest.
test: $(READY)
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports --no-cache

docs: $(READY)
	$(BIN)/python docs/make_reference.py

wheel: $(READY)
	$(BIN)/python tests/check_wheel.py $(BIN)/python

bench: quickstart
	$(BIN)/python benchmarks/recipes.py --model quickstart-out/model --tokens 50000 \
		--train quickstart-out/corpus/train.jsonl --valid quickstart-out/corpus/valid.txt

check: lint types imports test wheel

clean:
	rm -rf .venv quickstart-out

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "psp needs Python 3.10 or newer; name one with PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]' || echo "Ray cannot be installed here: the tests that need it are skipped"
	touch $(READY)
