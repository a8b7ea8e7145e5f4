import pytest
import torch


@pytest.fixture(params=[None, "aten", "reference"], ids=["default", "aten", "reference"])
def backend(request):
    """Every behaviour holds for the default choice, for PyTorch's layers and for plain PyTorch."""
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240229)
