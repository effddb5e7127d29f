# Every target works on a fresh clone and uses .venv only. Another interpreter: make install PYTHON=/path/to/python3.11
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV := .venv
BIN := $(VENV)/bin
# One process a core, four at most: many tests start up to eight ranks themselves.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install quickstart test test-nightly test-slurm test-slurm-nightly slurm fidelity bench-data check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 22

install: $(VENV)/.installed-for-tests ## make .venv with everything, the `kosmos` command included

quickstart: $(VENV)/.installed ## train, evaluate and export a tiny KOSMOS on real data, in minutes, on the CPU
	@bash launch/quickstart.sh

test: $(VENV)/.installed-for-tests ## install, then lint, check types and layers, run the CPU tests
	@$(MAKE) --no-print-directory check

test-nightly: $(VENV)/.installed-for-tests ## the tests that are too long for every day: 300 random combinations, 100 kills, every layout resumed
	$(PYTEST) -m nightly -o faulthandler_timeout=3900  # some may take an hour; their own marks end them before

test-slurm: $(VENV)/.installed-for-tests slurm ## trainings on a real SLURM cluster on this machine: signal, crash, array; needs root
	$(BIN)/python -m pytest tests/slurm -m 'slurm and not nightly'

test-slurm-nightly: $(VENV)/.installed-for-tests slurm ## the long ones: every way to lose a job, 64 ranks, a soak; needs root
	$(BIN)/python -m pytest tests/slurm -m 'slurm and nightly'

slurm:
	@for program in slurmctld slurmd munged sbatch ip; do command -v $$program >/dev/null || missing=1; done; \
	test -z "$${missing:-}" || { apt-get update -q && apt-get install -q -y --no-install-recommends slurm-wlm munge iproute2; }

fidelity: $(VENV)/.installed-for-tests ## compare with the oracles and write the figures into docs/fidelity.md
	$(BIN)/python -m pytest tests/parity --fidelity docs/fidelity.md

bench-data: $(VENV)/.installed-for-tests ## measure preprocessing, pictures, packing and loading on Debian's corpora (an hour)
	@bash benchmarks/data.sh

check: ## what `make test` runs, without the installation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(PYTEST)

clean: ## remove .venv and what builds and tests left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find megatron_kosmos tools tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is written last, so an interrupted installation starts again; one that is newer than what it depends on is kept.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No python3 found: install Python 3.11 or newer, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: run make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: run 'apt-get install python3-venv' as root, then make again"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/bin/python
	@echo "Installing megatron_kosmos and its dependencies into $(VENV)"
	$(PIP) install --quiet -e '.[quickstart]'
	@touch $@

$(VENV)/.installed-for-tests: $(VENV)/.installed requirements/oracles.txt
	@echo "Installing test and development tools into $(VENV)"
	$(PIP) install --quiet -e '.[quickstart,test,dev]'
	$(PIP) install --quiet --no-deps -r requirements/oracles.txt
	@touch $@
