# `make demo` and `make test` set everything up in .venv and are repeatable. PYTHON chooses the interpreter the environment is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The tests' networks are tiny: one thread each, two tests at a time.
export OMP_NUM_THREADS ?= 1
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-upstream lint format type docs check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## make the environment in .venv

# A CPU build of PyTorch where the index offers one (plain `torch` can pull gigabytes of CUDA), the ordinary one elsewhere.
# TORCH="torch" make setup takes the ordinary one at once, for a GPU.
TORCH ?= torch==2.13.0+cpu
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet "torch>=2.8,<3"
	$(BIN)/python -m pip install --quiet --editable ".[dev,docs]"
	@touch $@

demo: setup  ## train NC-LQL on Pendulum-v1, evaluate it, save the model and its learning curve (about three minutes)
	$(BIN)/python examples/demo.py

test: setup  ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" --cov --cov-report=term

test-slow: setup  ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

test-upstream: setup  ## run Stable-Baselines3's own tests with our classes in SAC's and TD3's place
	$(BIN)/python tests/upstream/run.py --jobs $(JOBS) -m "not expensive"

lint: setup  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup  ## check types
	$(BIN)/mypy

docs: setup  ## build the documentation in site/, warnings are errors
	$(BIN)/mkdocs build --strict --quiet

check: lint type docs test test-upstream  ## everything that CI does

clean:  ## remove the environment and what the targets made
	rm -rf $(VENV) site demo .cache .coverage
