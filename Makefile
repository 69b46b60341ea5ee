# Everything happens in .venv, which each target makes when it is not there.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: run test test-slow test-all lint types bench chaos gpu gpu-test gpu-calibrate gpu-compare gpu-run clean

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

# On a machine with a GPU whose own Python holds torch and the other packages: nothing is installed. Each part takes at most nine
# minutes, and goes on where it stopped when it is given again.
gpu: gpu-test gpu-calibrate gpu-compare

gpu-test:
	timeout 530 $(PYTHON) -m pytest -q -m gpu tests/test_gpu.py

gpu-calibrate:
	$(PYTHON) -m real experiment=h200 only=kernels
	$(PYTHON) -m analysis calibrate out=runs/gpu.yaml

# Every plan of tests/kit/plans.py foretold, from the profile where there is one, then executed; the table is $(KIT)/table.md.
KIT ?= runs/gpu
gpu-compare:
	$(PYTHON) -m tests.kit $(KIT) $(addprefix profile=,$(wildcard runs/gpu.yaml))

# The loop of `make run`, on a GPU: one plan of 1.2 billion parameters.
GPU_PLAN = experiment=h200 data.limit='24 MB' $(addprefix profile=,$(wildcard runs/gpu.yaml))
gpu-run:
	$(PYTHON) -m sim $(GPU_PLAN)
	$(PYTHON) -m real $(GPU_PLAN)
	$(PYTHON) -m analysis compare
	$(PYTHON) -m analysis report

clean:
	rm -rf .venv build dist
