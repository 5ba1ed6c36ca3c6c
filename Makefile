# Octet's chores. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-fast check docs format bench bench-all audit licences clean distclean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PACKAGES := core models data quant training deploy report pipeline configs
ENTRIES := $(wildcard train_qat.py export.py)
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n < 4 ? n : 4 )))
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

help: ## List what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, found $$("$(PYTHON)" --version); use make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(if $(HASHES),$(INSTALL) --require-hashes --no-deps --no-build-isolation --requirement hashes.txt)
	$(INSTALL) $(if $(HASHES),--no-deps --no-build-isolation,--constraint constraints.txt) --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## Make .venv with the pinned packages (again only when they change); HASHES=1 also checks their hashes

demo: $(STAMP) ## Train, quantize, fine-tune, export and time a small detector on the built-in set
	$(BIN)/python train_qat.py +experiment=demo

test: $(STAMP) ## Run the tests
	@$(PYTEST) -m "not exhaustive"

test-all: $(STAMP) ## Run the tests, and those that repeat them for every architecture and target
	@$(PYTEST)

test-fast: $(STAMP) ## Run the tests that take seconds
	@$(PYTEST) -m "not slow and not exhaustive"

check: $(STAMP) ## Lint, formatting, types, prose and documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES) examples benchmarks $(ENTRIES)
	$(BIN)/python scripts/prose.py
	$(MAKE) --no-print-directory docs

docs: $(STAMP) ## Build the documentation strictly into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(STAMP) ## Sort imports and format
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

bench: $(STAMP) ## Compare speed with the committed ratios (benchmarks/ratios.json); fails on a regression
	$(BIN)/python benchmarks/regression.py

bench-all: $(STAMP) ## Run every other script in benchmarks/
	@shopt -s nullglob; for script in benchmarks/*.py; do [[ $$script == */regression.py ]] && continue; echo "== $$script"; $(BIN)/python "$$script"; done

AUDIT := .venv-audit

$(AUDIT)/bin/pip-audit:
	"$(PYTHON)" -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit

audit: $(AUDIT)/bin/pip-audit ## Ask for known vulnerabilities of the pinned packages (needs the network)
	@$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off 2> $(AUDIT)/log \
		|| { tail -n 1 $(AUDIT)/log >&2; grep -q Traceback $(AUDIT)/log \
		&& echo "make audit: the service could not be asked. It needs the network (pypi.org)." >&2; exit 1; }

licences: $(STAMP) ## List the licence of every installed package
	@$(BIN)/python scripts/licences.py

clean: ## Remove caches and build leftovers (runs/ and .venv stay)
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV) $(AUDIT)
