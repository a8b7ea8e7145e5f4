"""The native CPU kernels as a backend: whole layers, and the recurrence by itself."""

from __future__ import annotations

import torch
from typing_extensions import override

from fused_lstm.backends.base import (
    Backend,
    BackwardArguments,
    ForwardArguments,
    Problem,
    RecurrenceGradients,
    Support,
)
from fused_lstm.reference import RecurrenceForward

__all__ = ["NativeBackend"]

_DTYPES = (torch.float32, torch.float64)


class NativeBackend(Backend):
    """C++ kernels for the instruction set of the CPU, on the threads of PyTorch."""

    name = "native"

    @override
    def supports(self, problem: Problem) -> Support:
        if problem.device.type != "cpu":
            return Support(False, f"it runs on CPUs, not on a {problem.device.type} device")
        if problem.dtype not in _DTYPES:
            return Support(False, f"{problem.dtype} is not one of float32, float64")
        from fused_lstm.kernels import cpu as kernels

        try:
            library = kernels.load()
        except kernels.LibraryUnavailableError as error:
            return Support(False, str(error))
        how = f"native kernels for {library.instruction_sets[0]}"
        if not library.openmp:
            how += f", on one thread ({library.openmp_reason})"
        if problem.transform in ("trace", "modes"):
            return Support(
                True, f"{how}; a recording holds PyTorch's operator instead", default=False
            )
        return Support(True, how)

    @override
    def forward(self, arguments: ForwardArguments) -> RecurrenceForward:
        from fused_lstm.kernels import cpu as kernels

        return RecurrenceForward(*kernels.lstm_forward(*arguments))

    @override
    def backward(self, arguments: BackwardArguments) -> RecurrenceGradients:
        from fused_lstm.kernels import cpu as kernels

        return RecurrenceGradients(*kernels.lstm_backward(*arguments))
