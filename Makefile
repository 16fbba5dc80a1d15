# Everything goes through the virtual environment in .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests run in several processes; more threads than cores would only make them wait for each other.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help run test test-long quick findings bench check audit format clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(READY) ## Set up, then fine-tune and evaluate the embedded default (ARGS="lora=r16 seed=1")
	$(BIN)/python -m mathverify.train lora=r64 $(ARGS)

test: $(READY) ## Set up, then run all tests but the long ones
	$(TEST) -m "not long" $(ARGS)

test-long: $(READY) ## Tests that take minutes or need PostgreSQL, Slurm or Chromium (.ci/services installs these)
	$(TEST) -m long $(ARGS)

quick: $(READY) ## The tests without the slow ones
	$(TEST) -m "not slow and not long" $(ARGS)

findings: $(READY) ## Ask on the embedded default whether rank and batch size help (72 runs; the same command continues)
	$(BIN)/python -m tests.benchmarks.findings $(ARGS)

bench: $(READY) ## Speed on this machine's CPU, side by side: packs, the Trainer with PEFT, tokenising, start-up
	$(BIN)/python -m tests.benchmarks.cpu $(ARGS)

check: $(READY) ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(READY) ## Look for known vulnerabilities in what is installed (asks the Python Package Index)
	$(BIN)/pip-audit --local --skip-editable --progress-spinner off

format: $(READY) ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and what runs left behind
	rm -rf $(VENV) build dist *.egg-info outputs multirun .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else \
		"mathverify needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
