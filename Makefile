# make serve   a model with three adapters on http://127.0.0.1:3000 (ARGS="--port 8080" and so on)
# make test    every check and every test
# make test-oldest   every test with the oldest torch, Triton and transformers that we claim (PYTHON=python3.12)
# make check   format, lint, types, import contracts, the page of settings
# make test-clients   released clients, lm-eval and schemathesis, each in an environment of its own
# make bench   the benchmark (ARGS="--help")

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
# An index to take torch from besides pip's own, such as the one with builds for the CPU alone.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
SET_UP := $(VENV)/.set-up

.PHONY: help setup serve demo-model test tests test-oldest test-clients check bench settings clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(SET_UP)

# torch first and alone, so that the long download is done once whatever changes in the rest.
$(SET_UP): pyproject.toml $(CONSTRAINTS)
	@echo "setting up $(VENV): takes a minute or more, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet pip==26.3
	$(PIP) install --quiet --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --group dev --editable .
	@touch $@

serve: setup
	$(BIN)/loraplex demo $(ARGS)

demo-model: setup
	$(BIN)/python -c "from loraplex import demo; print(demo.prepare())"

test: check tests

tests: setup
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

# In an environment of its own. Types are checked with the newest set alone.
test-oldest:
	$(MAKE) tests VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# Needs a package index, and node with npm; what it installs is kept in .cache/clients.
test-clients: setup
	$(BIN)/python tests/clients/matrix.py $(ARGS)
	$(BIN)/python tests/clients/lm_eval_run.py
	$(BIN)/python tests/clients/openapi_cases.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m loraplex.settings_page --check

bench: setup
	$(BIN)/python bench/serve.py $(ARGS)

settings: setup
	$(BIN)/python -m loraplex.settings_page

clean:
	rm -rf $(VENV) .venv-oldest .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage
