"""LSTM kernels in CUDA C++: the whole sequence in one launch, compiled when first used.

`config` chooses how the work is divided, `compiler` and `cache` make machine code of it, `driver`
loads and launches it, and `launch` does all that on tensors. To read the kernels, begin with
layout.cuh and forward.cuh.
"""

from .compiler import KernelUnavailableError, availability
from .launch import (
    BackwardProblem,
    ForwardProblem,
    lstm_backward,
    lstm_backward_many,
    lstm_forward,
    lstm_forward_many,
)

__all__ = [
    "BackwardProblem",
    "ForwardProblem",
    "KernelUnavailableError",
    "availability",
    "lstm_backward",
    "lstm_backward_many",
    "lstm_forward",
    "lstm_forward_many",
]
