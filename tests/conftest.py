"""What the whole suite shares: where kernels run, and how many threads torch takes."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read by Triton when a kernel is defined: set before anything imports the kernels.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers are the parallelism.
    torch.set_num_threads(1)
