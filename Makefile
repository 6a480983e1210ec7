# make demo: trains on scikit-learn's digits.   make test: lint, types, tests.
# make test-lowest: the fast tests on the lowest versions that setup.py allows
# (PYTHON 3.10 to 3.12).
# make bench-peers: steps of keras_vo beside those of other packages, which get
# environments of their own (one GB for JAX, six for PyTorch).
# All create the virtual environment they need; a second run reuses it.

PYTHON ?= python3
PEERS = $(VENV)-peers
VENV ?= .venv
LOWEST = $(VENV)-lowest
BIN = $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test lint types pytest fast test-lowest bench-peers clean

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

bench-peers: $(VENV)/.dev $(PEERS)/jax/.done $(PEERS)/torch/.done
	$(BIN)/python benchmarks/peers.py --environments=$(PEERS)

clean:
	rm -rf $(VENV) $(LOWEST) $(PEERS) build *.egg-info

$(VENV)/.examples $(VENV)/.dev: $(VENV)/.%: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

$(PEERS)/%/.done: benchmarks/packages/requirements-%.txt
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/python -m pip install --quiet --requirement $<
	touch $@

$(LOWEST)/.dev: setup.py tests/constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet \
		--constraint tests/constraints-lowest.txt --editable ".[dev]"
	touch $@
