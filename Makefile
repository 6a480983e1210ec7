# make demo: trains on scikit-learn's digits.   make test: lint, types, tests.
# make test-lowest: the fast tests on the lowest versions that setup.py allows
# (PYTHON 3.10 to 3.12).
# All create the virtual environment they need; a second run reuses it.

PYTHON ?= python3
VENV ?= .venv
LOWEST = $(VENV)-lowest
BIN = $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test lint types pytest fast test-lowest clean

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

test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info

$(VENV)/.examples $(VENV)/.dev: $(VENV)/.%: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

$(LOWEST)/.dev: setup.py tests/constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet \
		--constraint tests/constraints-lowest.txt --editable ".[dev]"
	touch $@
