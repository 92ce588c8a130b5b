# `make demo` and `make test` work in a fresh clone; `make help` lists the other targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
# Another build of torch: make TORCH='torch==2.13.0 --index-url …'
TORCH ?= torch==$(shell sed -n 's/^PINNED_TORCH = "\(.*\)"/\1/p' build_backend/toolchain.py)
# More pytest options: make test PYTEST='-k probe -x'
PYTEST ?=

BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiler warnings are errors in our own builds.
export GRADPROBE_WERROR := 1

ENV_STAMP := .venv/.environment
BUILD_STAMP := .venv/.built
DEV_STAMP := .venv/.dev
BUILD_INPUTS := pyproject.toml setup.py $(wildcard build_backend/*.py) $(shell find csrc -type f)
CPP_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# A machine under load may need several times longer for a long test.
MARKS := $(if $(filter true,$(CI)),-m 'not gpu and not bench' --timeout 1500,)

.PHONY: demo lesson performance docs test test-matrix lint format build gpu test-gpu bench real-models clean help

demo: $(BUILD_STAMP)  ## run the degradation sweep on real data (plain and residual, 20 and 56 layers) and write its report
	mkdir -p demo
	$(BIN)/gradprobe sweep --data digits --families plain,resnet --depths 20,56 --seeds 0 --jobs 2 --out demo/run.sqlite
	$(BIN)/gradprobe report demo/run.sqlite --html demo/report.html

lesson: $(BUILD_STAMP)  ## run every experiment of docs/lesson.md again, and redraw its charts
	$(BIN)/python docs/make_lesson.py

performance: $(DEV_STAMP)  ## measure the cost beside other ways, and write it to docs/performance.md; 15 quiet minutes
	$(BIN)/python benchmarks/peers.py --json docs/performance.json --page docs/performance.md

# No network is needed, neither here nor to read the pages.
docs: $(DEV_STAMP)  ## build the site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# One process per core. Threads that wait must not spin on a core that another process needs.
test: lint  ## run linters, tests and doctests; with CI=true the long tests too
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(MARKS) $(PYTEST)

test-matrix: $(DEV_STAMP)  ## run a quick part of the tests with each Python and the oldest and newest dependencies
	$(BIN)/python tests/matrix.py

lint: $(DEV_STAMP)  ## check with ruff, mypy --strict and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(DEV_STAMP)  ## rewrite the files with ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

build: $(BUILD_STAMP)  ## set up .venv and build the native libraries

test-gpu: $(DEV_STAMP)  ## run the tests that need a CUDA device; skipped without one
	$(BIN)/python -m pytest -m gpu -rs $(PYTEST)

# Builds against the torch of PYTHON, not in .venv.
gpu:  ## on a machine with a GPU: build, test and measure in 8 minutes, into build/gpu
	@PYTHON='$(PYTHON)' bash benchmarks/on_gpu.sh build/gpu

bench: $(DEV_STAMP)  ## run every benchmark, one after another
	for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# torch is named again so that pip does not move it. With these packages in .venv, `make test` runs the trainers too.
real-models: $(DEV_STAMP)  ## install model libraries and trainers; compare trainings with and without a probe
	$(BIN)/python -m pip install $(TORCH) torchvision timm transformers diffusers torch_geometric lightning accelerate \
		tensorboard
	$(BIN)/python benchmarks/real_models.py

clean:  ## remove the environment, the build and the demo's results
	rm -rf .venv build dist demo *.egg-info gradprobe/*.so gradprobe/_build_info.json
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

$(ENV_STAMP): build_backend/toolchain.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH) 'setuptools>=77' 'ninja>=1.11'
	touch $@

$(BUILD_STAMP): $(ENV_STAMP) $(BUILD_INPUTS)
	$(BIN)/python -m pip install --no-build-isolation -e '.[sweep,report]'
	touch $@

$(DEV_STAMP): $(BUILD_STAMP)
	$(BIN)/python -m pip install --no-build-isolation -e '.[dev]'
	touch $@
