# make demo | test | check -- everything happens in .venv, made on first use.
# PY=/path/to/python uses an environment of your own instead; PYTHON names the interpreter that .venv is made from.
PYTHON ?= python3
VENV ?= .venv
# Installed first and pinned, so that no later step pulls in another build of it.
TORCH ?= torch==2.13.0
# Two workers at the most: each loads torch, and more of them on a small machine only wait for each other.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -lt 2 ] && echo 1 || echo 2)
ARGS ?=

ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
# What test-oldest and test-newest run on: both ends of the ranges in pyproject.toml.
ENDS := oldest newest

.PHONY: help venv demo test test-plain $(ENDS:%=test-%) check lint format types slow faults real bench coverage docs docs-tables docs-table compat-table dist clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | awk -F': ' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(VENV)/.installed  ## .venv with this package, its tests' and its developers' tools

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

demo: $(READY)  ## PPO for positive movie reviews, on the models that ship with the package
	$(PY) -m trl.demo $(ARGS)

test: $(READY)  ## the suite
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -q $(ARGS)

test-plain:  ## the suite without trl/kernels, on plain torch and transformers code
	TRL_KERNELS=off $(MAKE) test

$(ENDS:%=$(VENV)-%/.installed): $(VENV)-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt torch
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e '.[test]'
	@touch $@

$(ENDS:%=test-%): test-%: $(VENV)-%/.installed
	$(VENV)-$*/bin/python -m pytest -n $(WORKERS) --dist loadfile -q $(ARGS)

test-oldest:  ## the suite on the oldest releases that pyproject.toml allows
test-newest:  ## the suite on the newest

check: lint types $(READY)  ## lint, format, types and the floors between the packages
	$(PY) -m pytest -q -p no:cacheprovider tests/test_architecture.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m mypy

format: $(READY)  ## rewrite the sources in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

slow: $(READY)  ## tests of ten seconds and more
	$(PY) -m pytest -m slow -q --timeout 1800 $(ARGS)

faults: $(READY)  ## runs that are killed, starved and corrupted: the full set, with a table at its end
	$(PY) -m pytest -m 'slow or not slow' -q --timeout 1800 tests/faults $(ARGS)

real: $(READY)  ## tests on real models and reviews (scripts/fetch_assets.py)
	$(PY) -m pytest -m real -q --timeout 3600 $(ARGS)

bench: $(READY)  ## measurements
	$(PY) -m pytest -m bench -q -s --timeout 3600 $(ARGS)

coverage: $(READY)  ## the suite with line and branch coverage: 90% of trl/, every branch of trl/functional/
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -q --cov --cov-report= $(ARGS)
	$(PY) -m coverage report --include='trl/functional/*' --fail-under=100
	$(PY) -m coverage report --fail-under=90

docs: $(READY)  ## the site in docs/_build/html, warnings being errors; installs the extra docs
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(PY) -m sphinx -W --keep-going -q -E -a -b html docs docs/_build/html $(ARGS)

docs-tables: $(READY)  ## the parts of the pages that follow from the code: settings, metrics
	$(PY) scripts/docs_tables.py $(ARGS)

docs-table: $(READY)  ## docs/models.md, from a run of every architecture
	$(PY) scripts/architecture_table.py $(ARGS)

compat-table: $(READY)  ## docs/compat.md, from what this library does with the interface of old TRL releases
	$(PY) scripts/compat_table.py $(ARGS)

dist: $(READY)  ## sdist and wheel in dist/
	$(PY) -m build

clean:  ## remove what was built; .venv stays
	rm -rf build dist docs/_build docs/reference/api docs/project htmlcov .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)*' -prune -exec rm -rf {} +
