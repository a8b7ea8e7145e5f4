# make demo · test · lint · bench work on a machine with Python and make: each builds .venv first.
# make gpu uses the Python at hand (its torch and triton must see the GPU) and needs no network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two workers: the tests are small, and torch is held to one thread in each.
WORKERS ?= 2
OUT ?= out

.PHONY: help venv demo test lint format bench gpu clean

help:
	@echo "make demo    train a language model with torch.nn.LSTM and with fused_lstm.LSTM, side by side"
	@echo "make test    the whole test suite (no GPU needed)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   time fused_lstm against torch.nn.LSTM on this machine"
	@echo "make gpu     test suite and timing on this machine's NVIDIA GPU"

venv: $(READY)

# setuptools goes first: the editable install builds with it, without a second download.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

demo: venv
	$(BIN)/python -m fused_lstm demo --out $(OUT)

test: venv
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python -m benchmarks.compare --device cpu --out benchmarks/results $(ARGS)

gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest $(ARGS)
	$(PYTHON) -m benchmarks.compare --device cuda --out benchmarks/results

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
