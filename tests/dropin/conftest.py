import pytest
import torch


@pytest.fixture(params=[None, "reference"], ids=["default", "reference"])
def backend(request):
    """Every behaviour holds for the default choice and for the layer written in plain PyTorch."""
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240229)
