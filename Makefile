# Two commands for a start: `make demo` and `make test`. Both need Python 3.11 or newer and make, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
SUITE := runs/suite
SEEDS := 0-4
SETTINGS := # of benchmarks/suite.toml; all where none is named

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo benchmark test format lint types layers tests fast docs clean

help:
	@echo "make demo       fine-tune a small CLIP across ten sites (in $(RUN)) and show what each gained"
	@echo "make benchmark  the suite of comparisons (in $(SUITE)): about 44 hours of one core; goes on where it stopped"
	@echo "make test       format, lint, types, layers and tests"
	@echo "make fast       the tests but the slow ones: five minutes on two cores"
	@echo "make docs       the documentation, in site/; a broken link is an error"
	@echo "make clean      remove the environment and the caches; runs/ stays"

# An interrupted demo goes on where it stopped; a finished one shows its result again.
demo: $(VENV)/.installed
	$(BIN)/fedloom run quickstart --out $(RUN) $(if $(wildcard $(RUN)),--resume)

benchmark: $(VENV)/.installed
	$(BIN)/fedloom suite $(SETTINGS) --seeds $(SEEDS) --out $(SUITE) --workers 2 --set backbone.dtype=bfloat16 --set federation.evaluate_every=0

test: format lint types layers tests

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy --strict src

layers: $(VENV)/.installed-dev
	$(BIN)/lint-imports

tests: $(VENV)/.installed-dev
	$(BIN)/pytest -q -n 2

fast: $(VENV)/.installed-dev
	$(BIN)/pytest -q -n 2 -m "not slow"

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedloom needs Python 3.11 or newer, and $(PYTHON) is not; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing fedloom into $(VENV): about 1.5 GB, a few minutes, once."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing fedloom and its development tools into $(VENV): about 1.5 GB, a few minutes, once."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@
