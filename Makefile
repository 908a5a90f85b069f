# Every target sets up what it needs first: a fresh clone needs nothing but Python >= 3.11 and make.
# Knobs: VENV=.venv  PYTHON=python3  TORCH=…  WORKERS=auto  PYTEST_ARGS=…

VENV   ?= .venv
PYTHON ?= python3
# torch goes in first and alone, at an exact version. With a CPU wheel of this version on pip's
# index or find-links ("2.13.0+cpu" sorts above "2.13.0") pip takes that one; the open range of
# pyproject.toml would take any newer CUDA build, gigabytes of it. Override for another build.
TORCH  ?= torch==2.13.0
# Tests run tiny models: one thread each is fastest and leaves the other cores alone.
OMP_NUM_THREADS ?= 1
# As many tests at a time as there are cores; WORKERS=0 for one process and readable prints.
WORKERS ?= auto

# An install compiles them, where there is a compiler.
KERNELS = hatch_build.py $(wildcard src/visavis/native/build.py src/visavis/native/csrc/*)

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench check format docs clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
	  awk -F '\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## Search sample pictures and chat about them (set-up, weights and all)
	$(BIN)/visavis fetch nano
	$(BIN)/visavis demo

test: $(VENV)/.dev ## Run the default tests
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.dev ## Run every test, the slow and the network ones too
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest -m "" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

bench: $(VENV)/.bench ## Measure against transformers, llama.cpp and sentence-transformers
	@set -e; for name in decode prefill picture embed train gradcache load memory precision table; do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

check: $(VENV)/.dev ## Format, lint, types, spelling; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/typos

format: $(VENV)/.dev ## Rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## Remove what the other targets made here (not the user's cache of weights)
	rm -rf $(VENV) site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# --- set-up: a stamp per set of extras, renewed when pyproject.toml changes -----------------------

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "visavis needs Python 3.11 \
	or newer, this is %d.%d; try: make PYTHON=python3.12 …" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(PIP) install --quiet --editable ".[demo,index,serve]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(PIP) install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable ".[bench,demo,train]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable ".[docs]"
	@touch $@
