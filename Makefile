# Needs CPython (>= 3.10) with pip and venv, make and git; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two stamps in one environment, so that the demo does not wait for the tools of development.
BASE := $(VENV)/.base
FULL := $(VENV)/.full
# Bytecode is compiled at the first import: most of what is installed is never imported.
INSTALL := $(BIN)/python -m pip install -qq --no-compile -c constraints.txt
PYTEST_ARGS ?=
# Test processes at a time; 0 for one in the foreground.
JOBS ?= 2
BENCH_ARGS ?=
FUZZ_PAIRS ?= 20000
FUZZ_ARGS ?=
# Of test-versions: which legs, if not all, and options of scripts/versions.py.
LEGS ?=
VERSIONS_ARGS ?=
# Of pictures: which, if not all.
PICTURES ?=
SITE ?= docs/_build/site

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-versions fuzz lint types docs docs-site pictures check bench release clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST))

venv: $(FULL)  ## Create .venv with the pinned versions

# PyTorch first and alone: it is by far the largest, and whichever build of the pinned version pip is
# set up to find (CPU or CUDA) is then kept by all that follows.
$(BASE): pyproject.toml constraints.txt
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch (large: this may take minutes) ..."
	@$(INSTALL) torch
	@echo "installing pyro-iw and what its examples need ..."
	@$(INSTALL) -e '.[examples]'
	@touch $@

$(FULL): $(BASE)
	@echo "installing the tools for tests, lint, types and docs ..."
	@$(INSTALL) -e '.[examples,test,docs,dev]'
	@touch $@

demo: $(BASE)  ## Train a VAE with six losses on real images (under two minutes)
	@$(BIN)/python examples/demo.py

# One thread: the tests' tensors are tiny, and on a busy machine idle threads spin on one another's cores.
test: $(FULL)  ## Run the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=10 $(PYTEST_ARGS)

# LEGS="floor newest-3.13" and PYTEST_ARGS="-m 'not slow'" for less; pip takes options from VERSIONS_PIP_ARGS.
test-versions:  ## Run the tests on the oldest, pinned and newest versions promised (gigabytes, an hour)
	@$(PYTHON) scripts/versions.py $(LEGS) --jobs $(JOBS) --pytest="$(PYTEST_ARGS)" $(VERSIONS_ARGS)

# A failure prints the seed of its pair, to be run alone: make fuzz FUZZ_ARGS="--seed 123".
fuzz: $(FULL)  ## Compare random model/guide pairs with a slow reference (half an hour; FUZZ_PAIRS=300: half a minute)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing --pairs $(FUZZ_PAIRS) --jobs $(JOBS) --refusals $(FUZZ_ARGS)

lint: $(FULL)  ## Check style and formatting with ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(FULL)  ## Check types with mypy
	@$(BIN)/mypy

docs: $(FULL)  ## Build the documentation; warnings are errors
	@echo "building docs/_build/html"
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# One by name: make pictures PICTURES="snr bias". Curves on MNIST need its files in data/.
pictures: $(BASE)  ## Draw the pictures of docs/images again (hours; PICTURES="bias khat": those alone)
	@$(BIN)/python scripts/pictures.py $(PICTURES)

# SITE is a folder to publish; pages of other versions in it stay.
docs-site: docs  ## Put the documentation beside those of other versions, into SITE=docs/_build/site
	@$(BIN)/python scripts/site.py docs/_build/html $(SITE)

check: lint types test docs  ## All of lint, types, test and docs

# NumPyro takes part where it is installed: $(BIN)/pip install -c constraints.txt '.[bench]'.
bench: $(BASE)  ## Time and memory beside what a user would pick instead (half an hour; BENCH_ARGS=--smoke: a minute)
	@for script in step_time memory time_to_nll; do \
	    $(BIN)/python benchmarks/$$script.py $(BENCH_ARGS) || exit 1; \
	done

# The two tools are only needed here, and bring a dozen packages: they are not among those of the tests.
release: $(FULL)  ## Build wheel and source archive in dist, and check them
	@rm -rf dist
	@$(BIN)/python -m pip install -qq build twine
	@$(BIN)/python -m build --outdir dist
	@$(BIN)/python -m twine check --strict dist/*

clean:  ## Remove .venv and everything generated
	rm -rf $(VENV) .venv-versions build dist *.egg-info docs/_build docs/api docs/tutorials results
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
