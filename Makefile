# make demo · test · lint · bench · report work on a machine with Python and make: each builds .venv first.
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
# Where the demo draws, and where timings are recorded.
OUT ?= out
RESULTS ?= benchmarks/results
# For all cases; what does not fit is said.
BENCH_SECONDS ?= 640
# With TUNED_ALLOCATOR=1: benchmarks/environment.py says what for.
ALLOCATOR := $(if $(TUNED_ALLOCATOR),MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296)

.PHONY: help venv demo test lint format bench report gpu clean

help:
	@echo "make demo    train a language model with torch.nn.LSTM and with fused_lstm.LSTM, side by side"
	@echo "make test    the whole test suite (no GPU needed)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   time fused_lstm, torch.nn.LSTM and others on this machine's CPU"
	@echo "make report  the README's figures and the pictures, from the records"
	@echo "make gpu     tests, sanitizers, tuning and timing on this machine's NVIDIA GPU, in stages"

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
	$(ALLOCATOR) $(BIN)/python -m pytest benchmarks --device cpu --out $(RESULTS) --budget $(BENCH_SECONDS) \
		--benchmark-columns=median,iqr,rounds $(ARGS)

report: venv
	$(BIN)/python -m benchmarks.report --results $(RESULTS)

# Offline, in the Python at hand: nothing is downloaded, its torch and triton are used as they are.
# BUDGET: seconds for each stage. OUT: a folder, where a second run goes on with what is left.
# STAGES: some of tests, sanitize, tune, benchmarks. WHEELS: a folder of packages to compare with.
gpu:
	@$(PYTHON) -m benchmarks.gpu --workers $(GPU_WORKERS) $(if $(BUDGET),--budget $(BUDGET)) \
		$(if $(filter file,$(origin OUT)),,--out "$(OUT)") $(if $(WHEELS),--wheels "$(WHEELS)") \
		$(if $(STAGES),--stages $(STAGES)) $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info kernels/cpu/_native.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
