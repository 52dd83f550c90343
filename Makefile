# Everything a fresh clone needs: Python >= 3.11, pip and make. Each target does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-all lint format docs gpu clean

install: $(VENV)/installed

# Without ensurepip (Debian's bare python3) the environment is made without pip, and pip is lent to it.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowalign needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[dev,track]'
	touch $@

demo: install
	$(BIN)/lowalign demo

# By file, in order: xdist would put the files with few tests last, and the demo, the longest, is one of them.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[docs]'
	$(BIN)/python scripts/reference.py
	$(BIN)/zensical build --clean --strict

# Needs a CUDA device; `make gpu GPU=--tiny` runs the same on the CPU, as `make test` does.
gpu: install
	$(BIN)/python benchmarks/gpu.py --out gpu.jsonl $(GPU)

clean:
	rm -rf $(VENV) site dist .pytest_cache .ruff_cache
