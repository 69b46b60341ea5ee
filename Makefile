# Everything happens in .venv, which each target makes when it is not there.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: run test test-slow test-all lint types bench chaos gpu clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "foretold needs Python 3.11 or newer, this is " + sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The loop: measure this machine, foretell the default plan, execute it, compare, report.
run: $(READY)
	$(BIN)/foretold real only=extract,dedup,tokens,kernels,network data.limit='8 MB' fresh=true
	$(BIN)/foretold analysis calibrate
	$(BIN)/foretold sim profile=runs/profile.yaml
	$(BIN)/foretold real profile=runs/profile.yaml
	$(BIN)/foretold analysis compare
	$(BIN)/foretold analysis report

# Two processes; which tests must not run beside each other is said in tests/conftest.py.
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup

test: $(READY)
	$(PYTEST) -m 'not slow and not gpu'

test-slow: $(READY)
	$(PYTEST) -m 'slow and not gpu'

test-all: test test-slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.bench

# Forty runs under two hundred random faults; `seed=17 runs=1` after python -m tests.chaos replays one.
chaos: $(READY)
	$(BIN)/python -m tests.chaos

# On a machine with a GPU whose own Python holds torch and the other packages: nothing is installed.
gpu:
	$(PYTHON) -m tests.gpu

clean:
	rm -rf .venv build dist
