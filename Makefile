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
NPU_WHEEL := .torch-npu
# Each worker takes a file at a time: tests start engines of up to four processes themselves. A thread each: more than
# there are cores would burn them by waiting for each other. Bytecode is kept whatever the environment says: every
# process that a test starts would compile the package again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --numprocesses
# Two workers compute all the time. Those of engines wait for them as well: a third has work for the cores meanwhile.
SUITE := $(PYTEST) 3
CUDA_TESTS := tests/cuda tests/symmetric tests/contract
# Triton decides when a kernel is defined whether it will be interpreted, so this is a run of its own.
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) 2 $(CUDA_TESTS) tests/engines --hypothesis-profile interpreter
# Where the Ascend tests run: an emulated A3 or A2, or npu for real ones.
DEVICE ?= A3
MINUTES ?= 20
RANKS ?= 8

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-ascend test test-cpu test-cuda e2e-cuda gpu test-ascend test-vendor test-full lint soak bench bench-ascend bench-cuda tune-cuda gather-gpu clean distclean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## virtual environment in .venv, with everything pinned and .venv/bin/epbackend

$(READY): $(PINS) scripts/check_setup.py
	@echo "== 1/5 virtual environment ($$($(PYTHON) --version))"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "the set-up is pinned for Python 3.11 to 3.13; name one: make setup PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== 2/5 torch"
	$(PIP) install --progress-bar on $$(grep '^torch==' requirements/cpu.txt) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "== 3/5 LMDeploy and what its PyTorch engine imports"
	$(PIP) install --progress-bar on -r requirements/cpu.txt
	$(PIP) install --progress-bar on --no-deps -r requirements/lmdeploy.txt
	@echo "== 4/5 epbackend"
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python scripts/check_setup.py
	@echo "== 5/5 the planner, compiled once, and what this processor multiplies fastest"
	$(BIN)/python -m epbackend.placement.warmup
	$(BIN)/python -m epbackend.kernels.cpu.choice
	@touch $@

$(NPU_WHEEL)/.ready: requirements/ascend.txt $(READY)
	@echo "== torch-npu and dlinfer, unpacked aside for the Ascend tests"
	rm -rf $(NPU_WHEEL) && mkdir $(NPU_WHEEL)
	$(PIP) install --quiet --no-deps --target $(NPU_WHEEL) $$(grep -E '^(torch-npu|expecttest)==' requirements/ascend.txt) || \
	  echo "torch-npu has no wheel for this machine: make test-ascend will skip"
	$(PIP) install --quiet --no-deps --target $(NPU_WHEEL) --only-binary :all: --python-version 3.11 \
	  --platform manylinux2014_aarch64 $$(grep '^dlinfer-ascend==' requirements/ascend.txt)
	@touch $@

demo: setup ## the main job: a LMDeploy pipeline whose experts live in two processes
	$(BIN)/epbackend demo

demo-ascend: setup $(NPU_WHEEL)/.ready ## the same on two emulated NPUs, with LMDeploy's, dlinfer's and torch-npu's own code; DEVICE=npu for real ones
	$(BIN)/python -m tests.helpers.ascend_demo --device $(or $(filter-out A3,$(DEVICE)),A2) --dispatcher mc2

test: setup ## everything that this machine can check, lint beside the first tests
	@$(MAKE) --no-print-directory --jobs 2 lint test-cpu
	@$(MAKE) --no-print-directory test-ascend

test-cpu: setup ## the suite on the CPU, the CUDA kernels in Triton's interpreter; tests of a device that is missing skip with the reason
	$(SUITE) -m "not slow"
	$(INTERPRETED) -m "cuda and not layer and not slow"

# A machine with a GPU brings its own Python with torch, triton and pytest; nothing is installed there.
test-cuda: ## the contract suite and the kernels' own tests on a CUDA GPU
	$(CUDA_PYTHON) -m pytest $(CUDA_TESTS) -m "cuda and not several_ranks"
	@if command -v compute-sanitizer >/dev/null; then \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	    $(CUDA_PYTHON) -m pytest -q tests/cuda/test_sanitized.py -m cuda; \
	else echo "compute-sanitizer is not on the PATH: memory accesses were not checked"; fi

e2e-cuda: ## LMDeploy pipelines and whole layers on a GPU, two ranks on it; make gather-gpu brings what it needs
	$(CUDA_PYTHON) -m pytest tests/e2e -m cuda

gpu: ## tests and benchmarks for a GPU that is there for ten minutes, the most important first; GPU="--parts e2e engine --seconds 300"
	$(CUDA_PYTHON) -m benchmarks.cuda.session $(GPU)

test-ascend: setup $(NPU_WHEEL)/.ready ## the suite of the ascend device on an emulated A3; DEVICE=A2 for that chip, DEVICE=npu for four real NPUs
	$(if $(filter npu,$(DEVICE)),$(BIN)/python -m pytest,$(PYTEST) 2) tests/contract tests/ascend -m "ascend and not slow" --ascend $(DEVICE)

test-vendor: setup $(NPU_WHEEL)/.ready ## op-plugin's own tests of the operators used here, on an emulated A2, as a table; OPPLUGIN=checkout
	@test -n "$(OPPLUGIN)" || { echo "name a checkout of op-plugin: make test-vendor OPPLUGIN=folder"; exit 1; }
	$(BIN)/python -m tests.helpers.vendor_tests $(OPPLUGIN) --device A2

bench-ascend: ## milliseconds of a MoE layer on RANKS real NPUs, for each dispatcher (with the Python of your NPU environment)
	$(PYTHON) -m torch.distributed.run --nproc-per-node $(RANKS) -m benchmarks.ascend_layer

test-full: setup lint ## with the rarer combinations too
	$(SUITE)
	$(INTERPRETED) -m "cuda and not layer"
	$(PYTEST) 2 tests/contract tests/ascend -m ascend --ascend A3
	$(PYTEST) 2 tests/contract tests/ascend -m ascend --ascend A2

lint: setup ## ruff, mypy, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: setup ## experts move every few seconds under mixed requests: same answers, flat memory, nothing left; MINUTES=20 SOAK="--ep 4"
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(SOAK)

bench: setup ## the MoE layer, the planner, renumbering and transformers beside their peers, and each dispatcher; tables, JSON and pictures in benchmarks/results
	$(BIN)/python -m benchmarks.moe_layer
	$(BIN)/python -m benchmarks.dispatchers
	$(BIN)/python -m benchmarks.placement
	$(BIN)/python -m benchmarks.affinity
	$(BIN)/python -m benchmarks.rank_speed
	$(BIN)/python -m benchmarks.rebalance
	$(BIN)/python -m benchmarks.renumber
	$(BIN)/python -m benchmarks.transformers_engine

bench-cuda: ## the CUDA kernels beside their peers on a GPU; LMDEPLOY=folder of an unpacked wheel adds LMDeploy's
	$(CUDA_PYTHON) -m benchmarks.cuda $(if $(LMDEPLOY),--lmdeploy $(LMDEPLOY))

tune-cuda: ## the best tile of each benchmarked product on this GPU, into the packaged tiles.json; for a model: epbackend tune
	$(CUDA_PYTHON) -m benchmarks.cuda.tune --write

gather-gpu: setup ## one folder, out/gpu, with all that a GPU machine without network needs; GATHER="--python 3.11 --with ray"
	$(BIN)/python scripts/gather_gpu.py $(GATHER)

clean: ## caches and results of runs
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

distclean: clean ## the virtual environment too
	rm -rf $(VENV) $(NPU_WHEEL) *.egg-info
