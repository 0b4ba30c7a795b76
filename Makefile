# Everything here starts from nothing but make and Python 3.11 or newer. The environment lives in .venv and is
# made once: each stamp in it is redone only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH ?= all
NOTEBOOK ?= examples/quickstart.ipynb

python := $(VENV)/bin/python
pip_install := $(python) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
inputs := pyproject.toml constraints.txt
# Jupyter does not start for root, which is who people are in containers, without being told to.
as_root = $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
# Two pips at once in one environment break it.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo lab test test-all check bench bench-report notebooks images clean

help:  ## this list
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.lab  ## run the first notebook on a swarm of two server processes, here, offline
	$(python) examples/demo.py $(NOTEBOOK) --out build

lab: $(VENV)/.lab  ## open the first notebook in JupyterLab
	$(python) -m jupyterlab $(as_root) $(NOTEBOOK)

test: $(VENV)/.browser  ## run the tests (PYTEST_ARGS="-k journal" to choose)
	$(python) -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.browser  ## the tests, and those that take minutes
	$(python) -m pytest $(PYTEST_ARGS)

check: $(VENV)/.check  ## ruff, mypy and the layers
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.test  ## the benchmarks beside plain transformers (BENCH=decode to choose)
	@$(python) -m benchmarks $(BENCH)

bench-report: $(VENV)/.test  ## write docs/performance.md from the benchmarks (BENCH="decode hop" for some of them)
	@mkdir -p build
	$(python) -m benchmarks $(BENCH) --json > build/benchmarks.jsonl
	$(python) -m benchmarks.page < build/benchmarks.jsonl > build/performance.md
	mv build/performance.md docs/performance.md

notebooks: $(VENV)/.lab  ## run the example notebooks and keep their outputs in them
	$(python) examples/keep_outputs.py

images: $(VENV)/.browser  ## take the pictures of the README anew, by the browser tests
	NBRUNNER_IMAGES=docs/images $(python) -m pytest -m browser -q

clean:  ## remove .venv, build/ and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "nbrunner needs Python 3.11 or newer; this is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "Could not make an environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.lab: $(VENV)/.made $(inputs)
	@echo "Installing nbrunner and Jupyter into $(VENV) (minutes the first time: torch is large)"
	@$(pip_install) --editable '.[lab]'
	@touch $@

$(VENV)/.test: $(VENV)/.made $(inputs)
	@echo "Installing nbrunner and what its tests need into $(VENV) (minutes the first time: torch is large)"
	@$(pip_install) --editable '.[test]'
	@touch $@ $(VENV)/.lab

$(VENV)/.check: $(VENV)/.made $(inputs)
	@echo "Installing nbrunner and its checkers into $(VENV) (minutes the first time: torch is large)"
	@$(pip_install) --editable '.[check]'
	@touch $@

# Debian's chromium serves if it is there; playwright has builds for the common systems. Without either the
# browser tests skip and say so.
$(VENV)/.browser: $(VENV)/.test
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	else $(python) -m playwright install chromium || echo "No browser could be had: the browser tests will be skipped."; fi
	@touch $@
