# Everything Armillary needs from a checkout: `make help` lists the targets.
#
# VENV is the virtual environment (made here, or one you made yourself, with uv for instance: `make test VENV=~/envs/arm`),
# PYTHON the interpreter that makes it (3.11 to 3.13).

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PYTEST_WORKERS ?= 2
# Tests that share a cluster carry the same xdist_group, so that one worker starts it once.
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup
CODE := platform tests bench

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

.PHONY: help venv install install-test install-bench demo bench test test-fast lint format types imports constraints clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(BIN)/python  ## Make the virtual environment

install: $(VENV)/.installed  ## Install Armillary and the faces it trains on

install-test: $(VENV)/.installed-test  ## Install what the tests and the checks need as well

demo: install  ## Sweep, train, evaluate and rank on real faces, in a few minutes
	$(BIN)/armillary demo

install-bench: $(VENV)/.installed-bench  ## Install the peers that the benchmarks run beside us

bench: install-bench  ## Every figure as a ratio to a peer or to its floor, then a verdict for every goal (BENCH=names)
	@$(BIN)/python bench/_all.py $(BENCH) $(if $(JSON),--json $(JSON))

test: install-test lint types imports  ## Lint, types, import rules and every test
	$(PYTEST) --durations=25

test-fast: install-test  ## The tests that take no cluster and no long training
	$(PYTEST) -m "not slow"

lint: install-test  ## Ruff's rules and its formatting, nothing changed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: install-test  ## Let ruff mend and format the code
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

types: install-test  ## Strict mypy on the package and the tests
	$(BIN)/mypy $(CODE)

imports: install-test  ## A layer imports only the layers below it
	$(BIN)/lint-imports --no-logo

constraints: install-test  ## Write the installed versions to constraints.txt
	$(BIN)/python -m pip list --format freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel \
	  | sed -E '/^armillary==/d; s/\+[A-Za-z0-9.]+$$//' | LC_ALL=C sort -f > constraints.new
	{ sed '/^[^#]/,$$d' constraints.txt; cat constraints.new; } > constraints.out
	mv constraints.out constraints.txt && rm constraints.new

clean:  ## Remove the environment and every cache; .armillary with your runs stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find $(CODE) -type d -name __pycache__ -prune -exec rm -rf {} +

# An environment that uv made has no pip of its own.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "Armillary needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: apt install python3-venv)." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[faces]"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[faces,test,dev,bench]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[faces,test,dev]"
	@touch $@
