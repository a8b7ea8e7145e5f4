"""The persistent CUDA C++ kernels as a backend: NVIDIA GPUs, compiled when first used."""

from __future__ import annotations

from typing import Any

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
from fused_lstm.devices import DeviceDescription, describe_device, input_precision
from fused_lstm.reference import RecurrenceForward

__all__ = ["CudaBackend", "kernel_flags", "kernel_limits"]

# Architectures on which the whole GPU suite has passed. Elsewhere the kernels can be named, but are
# not chosen by default.
VERIFIED_ARCHITECTURES: frozenset[str] = frozenset()

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CudaBackend(Backend):
    """One launch for the whole sequence, W_hh on chip: in a block, a cluster, or the whole grid."""

    name = "cuda"

    @override
    def supports(self, problem: Problem) -> Support:
        refusal = _refusal(problem)
        if refusal:
            return Support(False, refusal)
        from fused_lstm.kernels.cuda import availability, config

        arch = problem.device.arch
        terms = config.terms_of(problem.dtype, problem.precision or input_precision())
        options = {
            "dtype": problem.dtype,
            "limits": kernel_limits(problem.device),
            "terms": terms,
            "flags": kernel_flags(problem),
        }
        ok, reason = config.fits(problem.hidden_size, **options)
        if not ok:
            return Support(False, reason)
        missing = availability()
        if missing:
            return Support(False, missing)
        plans = config.plan(
            "forward", batch=max(problem.batch, 1), hidden=problem.hidden_size, **options
        )
        how = plans[0].reason
        if arch not in VERIFIED_ARCHITECTURES:
            return Support(
                True, f"{how}; to be named: its tests have not passed on {arch} yet", default=False
            )
        return Support(True, how)

    @override
    def forward(self, arguments: ForwardArguments) -> RecurrenceForward:
        from fused_lstm.kernels import cuda as kernels

        options = arguments._asdict()
        # `supports` refuses problems with a projection.
        del options["weight_hr"]
        options |= options.pop("modifiers")._asdict()
        return RecurrenceForward(
            *kernels.lstm_forward(**options, input_precision=input_precision())
        )

    @override
    def backward(self, arguments: BackwardArguments) -> RecurrenceGradients:
        from fused_lstm.kernels import cuda as kernels

        options = arguments._asdict()
        del options["weight_hr"]
        options |= options.pop("modifiers")._asdict()
        grad_gates, grad_h0, grad_c0 = kernels.lstm_backward(
            **options, input_precision=input_precision()
        )
        return RecurrenceGradients(grad_gates, grad_h0, grad_c0, None)


def _refusal(problem: Problem) -> str:
    """Say why no kernel can serve, as far as that takes no look at the kernels; else nothing."""
    if problem.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on a {problem.device.type} device"
    if not problem.device.arch.startswith("sm_"):
        return f"it runs on NVIDIA GPUs, not on AMD's {problem.device.arch}"
    if problem.dtype not in _DTYPES:
        return f"{problem.dtype} is not one of float32, float16, bfloat16"
    if problem.proj_size:
        return f"proj_size={problem.proj_size}: the kernels have no projection"
    if "layer_norm" in problem.additions:
        return "the kernels have no layer normalization"
    return ""


def kernel_limits(device: DeviceDescription) -> Any:
    """The `DeviceLimits` of a device: of the GPU at hand, if that is the one described."""
    from fused_lstm.kernels.cuda.config import known_limits

    if torch.cuda.is_available() and describe_device("cuda") == device:
        from fused_lstm.kernels.cuda.driver import describe

        return describe(torch.device("cuda", torch.cuda.current_device()))
    return known_limits(device.arch)


def kernel_flags(problem: Problem) -> Any:
    """What a problem asks of a kernel, as the `Flags` of a configuration."""
    from fused_lstm.kernels.cuda.config import Flags

    asked = set(problem.additions)
    return Flags(
        save_activations=problem.training,
        save_cells=problem.training or "return_cells" in asked,
        lengths="lengths" in asked or problem.packed,
        packed=problem.packed,
        resets="resets" in asked,
        recurrent_mask=bool(asked & {"recurrent_dropout", "recurrent_mask"}),
        zoneout_h=bool(asked & {"zoneout", "zoneout_h"}),
        zoneout_c=bool(asked & {"zoneout", "zoneout_c"}),
        cell_clip="cell_clip" in asked,
    )
