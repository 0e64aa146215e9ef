# `make train` and `make test` need nothing but Python >= 3.11: they make .venv and install into it.
# The environment is kept; the project is installed again when its metadata or C++ files change.

PYTHON ?= python3
VENV ?= .venv
# Extra words for the trainer, e.g. make train ARGS="--recipe digits-token-choice steps=2000"
ARGS ?=
# Extra words for pytest, e.g. make test TESTS="tests/moe_kernels -k router"; with TESTS="-n 0" no tests
# run beside each other
TESTS ?=
# Extra words for pip, e.g. another index for a torch build without CUDA (see README)
PIP_ARGS ?=

# How long idle OpenMP threads spin. On 2 cores beside one busy process, a training step of EC-DiT-tiny
# (batch 64) took 1.12 s with the default and 0.89 s with this; on the idle machine 0.38 s and 0.40 s.
export GOMP_SPINCOUNT ?= 10000

BIN := $(VENV)/bin
METADATA := pyproject.toml setup.py constraints.txt
CXX_FILES := $(wildcard csrc/*.[ch]pp csrc/*/*.[ch]pp csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/simulator/*.[ch]pp)
NATIVE := $(wildcard csrc/*.py) $(CXX_FILES)
# Tests run the CUDA kernels on a simulated GPU; users of the library and `make train` do not.
FOR_TESTS := MOE_KERNELS_SIMULATED=1
# Compiles what changed and puts the modules beside the Python files, without a new installation.
REBUILD := $(FOR_TESTS) $(BIN)/python setup.py --quiet build_ext --inplace
# What follows in a recipe runs on another build; the usual one comes back also when that fails.
AND_RESTORE := trap '$(REBUILD)' EXIT; trap 'exit 130' INT TERM;

.PHONY: environment train train-text test test-reference test-sanitize bench gpu-check lint format help clean

help:
	@echo "make train    install, train EC-DiT on real digits, sample, evaluate  (ARGS=...)"
	@echo "make train-text  the same with captions: scenes of coloured digits  (ARGS=...)"
	@echo "make test     install, run the test suite, a process a core           (TESTS=...)"
	@echo "make test-reference  the suite without the compiled modules           (TESTS=...)"
	@echo "make test-sanitize   tests/moe_kernels on modules that check memory accesses and"
	@echo "                     undefined behaviour; wants GCC                    (TESTS=...)"
	@echo "make bench    install, measure this machine beside others, under 10 min.   (ARGS=...)"
	@echo "make gpu-check  tests and benchmarks that need a CUDA GPU, under 8 minutes (ARGS=...)"
	@echo "make lint     ruff, mypy and clang-format"
	@echo "make format   ruff and clang-format, in place"
	@echo "make clean    remove the environment and caches; runs are kept"

environment: $(VENV)/.installed-dev

train: $(VENV)/.installed-train
	$(BIN)/python -m dit_models.train $(ARGS)

train-text: $(VENV)/.installed-train
	$(BIN)/python -m dit_models.train --recipe digit-scenes $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m tests $(TESTS)

test-reference: $(VENV)/.installed-dev
	@$(AND_RESTORE) MOE_KERNELS_BUILD=none $(REBUILD) && $(BIN)/python -m tests $(TESTS)

# The sanitizers' libraries must be loaded before Python; with libstdc++, or the first exception that
# torch throws ends the process. Leaks are not looked for: Python itself keeps memory at its exit.
# An abort makes pytest print which test it was; its capture would swallow the sanitizer's report.
SANITIZER_LIBRARIES = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
test-sanitize: $(VENV)/.installed-dev
	@$(AND_RESTORE) MOE_KERNELS_BUILD=cpu MOE_KERNELS_SANITIZE=address,undefined $(REBUILD) && \
	  env LD_PRELOAD="$(SANITIZER_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
	  UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 \
	  $(BIN)/python -m pytest --capture=sys $(or $(TESTS),tests/moe_kernels)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.run $(ARGS)

# The CUDA kernels are tested where they could be built; without them the rest is.
gpu-check: export MOE_KERNELS_BUILD ?= auto
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

clean:
	rm -rf $(VENV) build dist *.egg-info moe_kernels/_cpu.*.so moe_kernels/_cuda*.so moe_kernels/_build.json .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed (make PYTHON=python3.12 ...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-train: $(METADATA) $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[train]"
	@touch $@

# Whole models are saved and loaded on the way, as by the trainer.
$(VENV)/.installed-bench: $(METADATA) $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[bench,train]"
	@touch $@ $(VENV)/.installed-train

$(VENV)/.installed-dev: $(METADATA) $(NATIVE) | $(BIN)/python
	$(FOR_TESTS) $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@# Without torchvision, of which there is no build for every torch; the tests stand in for it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-deps torch-fidelity
	@touch $@ $(VENV)/.installed-train $(VENV)/.installed-bench
