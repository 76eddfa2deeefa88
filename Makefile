# `make demo` and `make test` are all a fresh machine needs: both set up .venv first, once.
PYTHON ?= python3
# Where pip looks for torch, when your default index would bring its CUDA build (several GB):
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
CUDA_PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := requirements/cpu.txt requirements/lmdeploy.txt pyproject.toml
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cpu test-cuda test-ascend test-full lint bench bench-cuda tune-cuda clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## virtual environment in .venv, with everything pinned and .venv/bin/epbackend

$(READY): $(PINS) scripts/check_setup.py
	@echo "== 1/4 virtual environment ($$($(PYTHON) --version))"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "the set-up is pinned for Python 3.11 to 3.13; name one: make setup PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== 2/4 torch"
	$(PIP) install --progress-bar on $$(grep '^torch==' requirements/cpu.txt) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "== 3/4 LMDeploy and what its PyTorch engine imports"
	$(PIP) install --progress-bar on -r requirements/cpu.txt
	$(PIP) install --progress-bar on --no-deps -r requirements/lmdeploy.txt
	@echo "== 4/4 epbackend"
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python scripts/check_setup.py
	@touch $@

demo: setup ## the main job: a LMDeploy pipeline whose experts live in two processes
	$(BIN)/epbackend demo

test: setup lint test-cpu ## everything that this machine can check

test-cpu: setup ## the suite on the CPU; tests of a device that is missing skip with the reason
	$(BIN)/python -m pytest -m "not slow"

# A machine with a GPU brings its own Python with torch, triton and pytest; nothing is installed there.
test-cuda: ## the contract suite and the kernels' own tests on a CUDA GPU
	$(CUDA_PYTHON) -m pytest tests/cuda tests/contract/test_kernels.py tests/contract/test_permute.py -m cuda
	$(CUDA_PYTHON) -m pytest tests/contract/test_layer.py -m cuda -k "1-1"  # one rank: NCCL wants a GPU for each
	@if command -v compute-sanitizer >/dev/null; then \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	    $(CUDA_PYTHON) -m pytest -q tests/cuda/test_sanitized.py -m cuda; \
	else echo "compute-sanitizer is not on the PATH: memory accesses were not checked"; fi

test-ascend: setup ## the contract suite on an NPU
	$(BIN)/python -m pytest tests/contract -m ascend

test-full: setup lint ## with the rarer combinations too
	$(BIN)/python -m pytest

lint: setup ## ruff, mypy, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## the MoE layer beside its peers, and each dispatcher; tables, JSON and pictures in benchmarks/results
	$(BIN)/python -m benchmarks.moe_layer
	$(BIN)/python -m benchmarks.dispatchers

bench-cuda: ## the CUDA kernels beside their peers on a GPU; LMDEPLOY=folder of an unpacked wheel adds LMDeploy's
	$(CUDA_PYTHON) -m benchmarks.cuda $(if $(LMDEPLOY),--lmdeploy $(LMDEPLOY))

tune-cuda: ## the best tile of each product on this GPU, written to tiles.json
	$(CUDA_PYTHON) -m benchmarks.cuda.tune --write

clean: ## caches and results of runs
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

distclean: clean ## the virtual environment too
	rm -rf $(VENV) *.egg-info
