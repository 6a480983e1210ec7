# make demo: trains on scikit-learn's digits.   make test: lint, types, tests.
# Both create the virtual environment they need; a second run reuses it.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test lint types pytest fast clean

demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py

test: lint types pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

fast: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.examples $(VENV)/.dev: $(VENV)/.%: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
