"""Kernel tests run on a GPU where there is one, else in Triton's interpreter on the CPU."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when a kernel is defined: set before anything imports the kernels.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def assert_within_budget():
    path = Path(__file__).parents[1] / "budget.py"
    spec = importlib.util.spec_from_file_location("fused_lstm_tests_budget", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.assert_within_budget


@pytest.fixture
def poisoned_memory():
    """Fills memory with NaN where torch.empty would leave it as it was."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
