"""What the whole suite shares: where kernels run, and how many threads torch takes."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when a kernel is defined: set before anything imports the kernels.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers are the parallelism.
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, and mark what runs on a GPU.

    Where there is a GPU, `-m gpu` selects the tests that run there or elsewhere, too.
    """
    # A build of minutes: other workers go on beside it.
    items.sort(key=lambda item: "/test_native_sanitizers.py" not in item.nodeid)
    if not torch.cuda.is_available():
        return
    for item in items:
        # A parameter of this name is a text about some device.
        parameters = item.callspec.params if hasattr(item, "callspec") else ()
        if "device" in getattr(item, "fixturenames", ()) and "device" not in parameters:
            item.add_marker(pytest.mark.gpu)
