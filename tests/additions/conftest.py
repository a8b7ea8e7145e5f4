import pytest
import torch

import fused_lstm


@pytest.fixture(params=[None, "native", "reference"], ids=["default", "native", "reference"])
def backend(request):
    """Runs a test on the default choice and on every backend that a CPU always has.

    The choice is made around the test, so that its oracles and options stay as they are.
    """
    if request.param == "native":
        if request.node.callspec.params.get("dtype") == torch.float16:
            pytest.skip("the native kernels have no float16")
        kernels = pytest.importorskip("fused_lstm.kernels.cpu")
        try:
            kernels.load()
        except kernels.LibraryUnavailableError as error:
            pytest.skip(str(error))
    with fused_lstm.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240229)
