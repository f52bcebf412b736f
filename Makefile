# Everyday commands of Miles. `make` alone lists them.
# Needs GNU make and Python 3.11 or newer; everything else goes into $(VENV), nothing outside the checkout changes.

PYTHON ?= python3
VENV ?= .venv
# Package index for torch alone, for example the CPU wheels (docs/install.md). Empty: pip's own configuration.
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Processes that run the tests; a file's tests stay in one of them. 0: all tests in one process, as a debugger wants it.
TEST_WORKERS ?= 2
# How often `make chaos` kills, and what it kills: megatron or fsdp.
KILLS ?= 20
BACKEND ?= megatron

PYTEST = $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
SHELL_FILES = .ci/run $(shell git ls-files '*.sh')

.DEFAULT_GOAL := help
.PHONY: help quickstart install test test-slurm lint format bench chaos writes damage docs clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

quickstart: $(INSTALLED) ## Train a tiny model on this machine and write its report
	$(BIN)/miles submit workflows/quickstart.toml --local

install: $(INSTALLED) ## Create the virtual environment and install Miles into it

test: $(INSTALLED_DEV) ## Run the tests, but for those on Slurm that take minutes each
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slurm: $(INSTALLED_DEV) ## Run all tests on a real Slurm, started on this machine (slurmctld slurmd slurm-client munge)
	$(PYTEST) tests/slurm $(PYTEST_ARGS)

lint: $(INSTALLED_DEV) ## Check style, types and shell files; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@command -v shellcheck >/dev/null || { echo "make lint needs shellcheck; fix: apt-get install shellcheck" >&2; exit 1; }
	shellcheck $(SHELL_FILES)

format: $(INSTALLED_DEV) ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED_DEV) ## Run the benchmarks on this machine (minutes); benchmarks/README.md says what they measure
	$(BIN)/python benchmarks/engine_ragged.py
	$(BIN)/python benchmarks/agreement.py --backend megatron
	$(BIN)/python benchmarks/agreement.py --backend fsdp

chaos: $(INSTALLED_DEV) ## Kill runs KILLS=n times; they must end with the same bits (docs/proofs.md)
	$(BIN)/python benchmarks/chaos.py --backend $(BACKEND) --kills $(KILLS)
	$(BIN)/python benchmarks/chaos.py --backend $(BACKEND) --kills $(KILLS) --partial

writes: $(INSTALLED_DEV) ## Kill a stage at each of its writes in turn (an hour)
	$(BIN)/python benchmarks/kill_at_every_write.py --backend $(BACKEND) --stage warmup
	$(BIN)/python benchmarks/kill_at_every_write.py --backend $(BACKEND) --stage grpo

damage: $(INSTALLED_DEV) ## Damage each file of a run's state; refuse its writes
	$(BIN)/python benchmarks/damage.py --backend $(BACKEND)

docs: $(INSTALLED_DEV) ## Regenerate the pages that are made from the code
	$(BIN)/python -c 'from miles.config.explain import reference_markdown as page; print(page(), end="")' > $(VENV)/page
	mv $(VENV)/page docs/reference/config.md
	$(BIN)/python -m tests.error_catalogue.page > $(VENV)/page
	mv $(VENV)/page docs/errors.md

clean: ## Remove the virtual environment and caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find miles kernels sbatch workflows tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone: a resolver that meets it later may take a build with gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Miles needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
		echo "  fix: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[report]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
