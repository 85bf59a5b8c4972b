# Every command of the repository. Each one first sets up what it needs, so `make demo` works on a bare machine.
# `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Python 3.11 or newer. Another one: make setup PYTHON=/usr/bin/python3.12
PYTHON ?= python3
# An extra package index for torch, e.g. https://download.pytorch.org/whl/cpu. Unset: PyPI's build, which carries CUDA.
TORCH_INDEX ?=
# What pytest gets besides: make test PYTEST_ARGS="-k batcher"
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := models,decoders,embedded,postgres,flower,parquet,regions,demo,dev
# setuptools comes from constraints.txt too: a build environment of its own would take the newest one.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help setup services demo test quick check bench scores docs clean

help: ## List these commands.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv with Readroom and every pinned package.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed. Name one: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory .apt-python3-venv
	@echo "Setting up $(VENV) (the first time takes some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $@

services: ## Install what the tests run beside Readroom: PostgreSQL and dcmtk, from Debian.
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null \
		|| $(MAKE) --no-print-directory .apt-postgresql
	@command -v dcmdump >/dev/null || $(MAKE) --no-print-directory .apt-dcmtk

# One Debian package, when this user may install it; else the sentence that says which one is missing.
.apt-%:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing $* from Debian"; \
		apt-get update -qq || true; \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $* </dev/null; \
	else \
		echo "$* is missing. Install it and run make again: sudo apt-get install --no-install-recommends $*"; \
		exit 1; \
	fi

demo: $(STAMP) ## Run the whole loop on this machine: sample images in, captions and a picture sheet out.
	@$(BIN)/readroom demo

test: $(STAMP) services ## Run every test.
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

quick: $(STAMP) ## Run the tests that take seconds.
	@$(BIN)/python -m pytest -m "not slow and not crash" $(PYTEST_ARGS)

check: $(STAMP) ## Check style, types and who imports whom.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## Measure the queue and VLP's decoder against their peers, VLP beside BLIP; half an hour.
	@$(PIP_INSTALL) --no-deps celery-batches==0.11
	@$(BIN)/python -m benchmarks.queue
	@$(BIN)/python -m benchmarks.vlp

scores: $(STAMP) ## Score the bundled models on held-out phantoms and write the scores into docs/evaluation.md.
	@$(BIN)/python evaluate.py --model blip --model vlp --markdown docs/evaluation.md

docs: $(STAMP) ## Write the generated pages and check that the pages tell the truth.
	@$(BIN)/python -m readroom.configuration > docs/configuration.md
	@$(BIN)/python -m readroom.manual > docs/commands.md
	@$(BIN)/python -m pytest tests/docs -m "not slow"

clean: ## Remove .venv, caches and the demo's output. State under READROOM_HOME stays.
	rm -rf $(VENV) build demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
