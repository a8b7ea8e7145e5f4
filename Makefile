# make demo · test · lint · bench work on a machine with Python and make: each builds .venv first.
# make gpu uses the Python at hand (its torch and triton must see the GPU) and needs no network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Touched when the native CPU library, kernels/cpu/_native.*, is up to date.
NATIVE := $(VENV)/.native
NATIVE_SOURCES := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
# Two workers: the tests are small, and torch is held to one thread in each.
WORKERS ?= 2
# The GPU suite's, which share one GPU.
GPU_WORKERS ?= 4
# Watches the GPU's memory and synchronization; part of the CUDA toolkit.
SANITIZER ?= $(firstword $(shell command -v compute-sanitizer 2> /dev/null) \
	$(wildcard /usr/local/cuda/bin/compute-sanitizer))
# Our own CUDA kernels, of the tests that are small enough. A kernel has two mbarriers.
SANITIZE = $(SANITIZER) --error-exitcode 1 --num-cuda-barriers 2 \
	--kernel-name kernel_substring=lstm_
SANITIZED = $(PYTHON) -m pytest tests/kernels/test_cuda_gpu.py -k small -p no:cacheprovider --timeout 1800
# Where the demo draws, and where timings are recorded.
OUT ?= out
RESULTS ?= benchmarks/results

.PHONY: help venv demo test lint format bench gpu clean

help:
	@echo "make demo    train a language model with torch.nn.LSTM and with fused_lstm.LSTM, side by side"
	@echo "make test    the whole test suite (no GPU needed)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   time fused_lstm against torch.nn.LSTM on this machine"
	@echo "make gpu     test suite, sanitizers and timing on this machine's NVIDIA GPU"

venv: $(READY) $(NATIVE)

# setuptools goes first: the editable install builds with it, without a second download.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	@rm -f kernels/cpu/_native.*
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

# The install has built it, unless a source has changed since. Where there is no compiler, or one that
# refuses, this says so, each time, and goes on: the package works without the library.
$(NATIVE): $(NATIVE_SOURCES) $(READY)
	@library=$$(echo kernels/cpu/_native.*); \
	if [ ! -e "$$library" ] || [ -n "$$(find $(NATIVE_SOURCES) -newer "$$library")" ]; then \
		rm -rf kernels/cpu/_native.* $(VENV)/native; \
		$(BIN)/python -W ignore -c "import setuptools; setuptools.setup()" --quiet build_ext --inplace \
			--build-temp $(VENV)/native --build-lib $(VENV)/native || true; \
	fi; \
	if ls kernels/cpu/_native.* > /dev/null 2>&1; then touch $@; \
	else echo "The native CPU library could not be built: going on without it."; fi

demo: venv
	$(BIN)/python -m fused_lstm demo --out $(OUT)

test: venv
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python -m benchmarks.compare --device cpu --out $(RESULTS) $(ARGS)
	$(BIN)/python -m benchmarks.additions --device cpu --out $(RESULTS)

# Offline, in the Python at hand: nothing is downloaded, its torch and triton are used as they are.
# The rest runs even where a test failed, and the exit status says so. Without PyTorch's cache of
# memory every tensor is an allocation, whose ends memcheck knows; what an API answers, the tests see.
gpu:
	@$(PYTHON) -c "import torch, sys; torch.cuda.is_available() or sys.exit('make gpu: torch ' + torch.__version__ + ' of $(PYTHON) sees no GPU')"
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	@status=0; \
	$(PYTHON) -m pytest -n $(GPU_WORKERS) $(ARGS) || status=$$?; \
	if command -v "$(SANITIZER)" > /dev/null; then \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool memcheck --report-api-errors no \
			$(SANITIZED) || status=$$?; \
		$(SANITIZE) --tool racecheck $(SANITIZED) || status=$$?; \
		$(SANITIZE) --tool synccheck $(SANITIZED) || status=$$?; \
	else \
		echo "make gpu: compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin: its checks are left out"; \
	fi; \
	$(PYTHON) -m benchmarks.compare --device cuda --out $(RESULTS) || status=$$?; \
	exit $$status

clean:
	rm -rf $(VENV) build dist out *.egg-info kernels/cpu/_native.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
