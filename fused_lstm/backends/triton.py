"""The portable Triton kernels as a backend: NVIDIA and AMD GPUs, and the interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import os

import torch
from typing_extensions import override

from fused_lstm.backends.base import (
    Backend,
    BackwardArguments,
    ForwardArguments,
    LayerNormBackwardArguments,
    LayerNormForwardArguments,
    Problem,
    RecurrenceGradients,
    Support,
)
from fused_lstm.devices import input_precision
from fused_lstm.layer_norm_reference import LayerNormForward, LayerNormGradients
from fused_lstm.reference import RecurrenceForward

__all__ = ["TritonBackend"]

# Architectures on which the whole GPU suite has passed. Elsewhere the kernels can be named, but are
# not chosen by default.
VERIFIED_ARCHITECTURES: frozenset[str] = frozenset()

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Hidden units whose rows a normalizing program holds without spilling; see its `row_config`.
_MAX_NORMALIZED = 2048

# What the interpreter is launched for: any architecture's configuration computes the same.
_INTERPRETED_ARCH = "sm_90"


class TritonBackend(Backend):
    """The sequence kernel (one launch for all steps) or the step kernel (one launch per step)."""

    name = "triton"

    @override
    def supports(self, problem: Problem) -> Support:
        if problem.dtype not in _DTYPES:
            return Support(False, f"{problem.dtype} is not one of float32, float16, bfloat16")
        if "layer_norm" in problem.additions and problem.hidden_size > _MAX_NORMALIZED:
            return Support(
                False,
                f"{problem.hidden_size} hidden units are more than the {_MAX_NORMALIZED} whose "
                "normalization fits into registers",
            )
        if problem.proj_size:
            return Support(False, f"proj_size={problem.proj_size}: the kernels have no projection")
        interpreted = problem.device.type == "cpu" and "TRITON_INTERPRET" in os.environ
        if problem.device.type != "cuda" and not interpreted:
            return Support(
                False, f"Triton compiles for GPUs, not for a {problem.device.type} device"
            )
        if importlib.util.find_spec("triton") is None:
            return Support(False, "the package triton is not installed")
        if interpreted:
            return Support(True, f"interpreted, {_plan(problem)}", default=False)
        arch = problem.device.arch
        if arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
            return Support(False, f"{arch} is older than sm_80, the first with bfloat16 and TF32")
        if arch not in VERIFIED_ARCHITECTURES:
            return Support(
                True,
                f"{_plan(problem)}; to be named: its tests have not passed on {arch} yet",
                default=False,
            )
        return Support(True, _plan(problem))

    @override
    def forward(self, arguments: ForwardArguments) -> RecurrenceForward:
        from fused_lstm.kernels import triton as kernels

        options = arguments._asdict()
        # `supports` refuses problems with a projection.
        del options["weight_hr"]
        options |= options.pop("modifiers")._asdict()
        return RecurrenceForward(
            *kernels.lstm_forward(**options, input_precision=input_precision())
        )

    @override
    def backward(self, arguments: BackwardArguments) -> RecurrenceGradients:
        from fused_lstm.kernels import triton as kernels

        options = arguments._asdict()
        del options["weight_hr"]
        options |= options.pop("modifiers")._asdict()
        grad_gates, grad_h0, grad_c0 = kernels.lstm_backward(
            **options, input_precision=input_precision()
        )
        return RecurrenceGradients(grad_gates, grad_h0, grad_c0, None)

    @override
    def layer_norm_forward(self, arguments: LayerNormForwardArguments) -> LayerNormForward:
        from fused_lstm.kernels import triton as kernels

        *inputs, norm, save = arguments
        return LayerNormForward(
            *kernels.layer_norm_forward(*inputs, *norm, save, input_precision=input_precision())
        )

    @override
    def layer_norm_backward(self, arguments: LayerNormBackwardArguments) -> LayerNormGradients:
        from fused_lstm.kernels import triton as kernels

        *inputs, norm = arguments
        return LayerNormGradients(
            *kernels.layer_norm_backward(*inputs, *norm, input_precision=input_precision())
        )


def _plan(problem: Problem) -> str:
    """Describe the launch that `problem` gets."""
    if "layer_norm" in problem.additions:
        return "layer-norm kernels, two launches per step"
    from fused_lstm.kernels.triton.config import select_launch_config

    others = set(problem.additions) - {"return_cells"}
    config = select_launch_config(
        "forward",
        batch=problem.batch,
        hidden=problem.hidden_size,
        dtype=problem.dtype,
        arch=problem.device.arch or _INTERPRETED_ARCH,
        input_precision=problem.precision or input_precision(),
        modifiers="none" if not others else "lengths" if others == {"lengths"} else "any",
    )
    launches = "one launch for all steps" if config.scope == "sequence" else "one launch per step"
    return f"{config.scope} kernel, {launches}"
