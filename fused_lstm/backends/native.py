"""The native CPU kernels as a backend: whole layers, and the recurrence by itself."""

from __future__ import annotations

import functools
from typing import Any

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
from fused_lstm.layer_norm_reference import LayerNorm, LayerNormForward, LayerNormGradients
from fused_lstm.modifiers import Modifiers
from fused_lstm.reference import RecurrenceForward, check_batch_sizes

__all__ = ["NativeBackend", "widened"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class NativeBackend(Backend):
    """C++ kernels for the instruction set of the CPU, on the threads of PyTorch."""

    name = "native"

    @override
    def supports(self, problem: Problem) -> Support:
        if problem.device.type != "cpu":
            return Support(False, f"it runs on CPUs, not on a {problem.device.type} device")
        if problem.dtype not in _DTYPES:
            return Support(False, f"{problem.dtype} is not one of float32, float64, bfloat16")
        from fused_lstm.kernels import cpu as kernels

        try:
            library = kernels.load()
        except kernels.LibraryUnavailableError as error:
            return Support(False, str(error))
        how = f"native kernels for {library.instruction_sets[0]}"
        if problem.dtype == torch.bfloat16:
            how += _how_in_bfloat16(problem)
        if not library.openmp:
            how += f", on one thread ({library.openmp_reason})"
        reason = _why_pytorchs_own(problem)
        if reason:
            return Support(True, f"{how}; {reason}", default=False)
        return Support(True, how)

    @override
    def forward(self, arguments: ForwardArguments) -> RecurrenceForward:
        from fused_lstm.kernels import cpu as kernels

        _check_rows(arguments.batch_sizes, arguments.gates, arguments.h0)
        out = RecurrenceForward(*kernels.lstm_forward(*map(widened, arguments)))
        dtype = arguments.gates.dtype
        if dtype == torch.bfloat16:
            # The cell states stay in float32; see `reference.state_dtype`.
            return RecurrenceForward(*(t.to(dtype) for t in out))._replace(c=out.c)
        return out

    @override
    def backward(self, arguments: BackwardArguments) -> RecurrenceGradients:
        from fused_lstm.kernels import cpu as kernels

        _check_rows(arguments.batch_sizes, arguments.activations, arguments.c0)
        gradients = RecurrenceGradients(*kernels.lstm_backward(*map(widened, arguments)))
        dtype = arguments.activations.dtype
        if dtype == torch.bfloat16:
            gates, h0, c0, h = gradients
            whole = None if h is None else h.to(dtype)
            return RecurrenceGradients(gates.to(dtype), h0.to(dtype), c0.to(dtype), whole)
        return gradients

    @override
    def layer_norm_forward(self, arguments: LayerNormForwardArguments) -> LayerNormForward:
        from fused_lstm.kernels import cpu as kernels

        _check_rows(arguments.batch_sizes, arguments.gates, arguments.h0)
        *inputs, norm, save = map(widened, arguments)
        out = LayerNormForward(*kernels.layer_norm_forward(*inputs, *norm, save))
        dtype = arguments.gates.dtype
        if dtype == torch.bfloat16:
            rounded = LayerNormForward(*(t.to(dtype) for t in out))
            return rounded._replace(c=out.c, rstd=out.rstd)
        return out

    @override
    def layer_norm_backward(self, arguments: LayerNormBackwardArguments) -> LayerNormGradients:
        from fused_lstm.kernels import cpu as kernels

        _check_rows(arguments.batch_sizes, arguments.activations, arguments.c0)
        *inputs, norm = map(widened, arguments)
        out = LayerNormGradients(*kernels.layer_norm_backward(*inputs, *norm))
        dtype = arguments.activations.dtype
        if dtype == torch.bfloat16:
            rounded = [t if t is None else t.to(dtype) for t in out]
            return LayerNormGradients(*rounded)._replace(z=out.z)  # type: ignore[arg-type]
        return out


# What may be asked beyond `torch.nn.LSTM` of the kernels in bfloat16.
_ADDITIONS_IN_BFLOAT16 = {"lengths", "resets", "cell_clip"}


def _how_in_bfloat16(problem: Problem) -> str:
    """Say in which dtype a problem in bfloat16 is computed."""
    if not (
        problem.whole_layers
        and not problem.proj_size
        and not problem.transform
        and _ADDITIONS_IN_BFLOAT16.issuperset(problem.additions)
        and kernels_multiply_bfloat16()
    ):
        return ", in float32"
    return ", in float32 where gradients are needed" if problem.training else ", in bfloat16"


_ALL_PRODUCTS = "oneDNN is as fast or faster where the time is all large matrix products"


def _why_pytorchs_own(problem: Problem) -> str:
    """Say why PyTorch's own layers are the default for `problem`; empty where they are not.

    The sizes were measured on two AVX-512 cores, of CPUs with and without products of bfloat16
    (benchmarks/results).
    """
    if not problem.whole_layers:
        return ""
    if problem.transform in ("trace", "modes") and not problem.additions:
        return "a recording holds PyTorch's operator instead"
    if problem.transform or problem.additions:
        return ""
    if problem.packed or problem.proj_size:
        # PyTorch leaves oneDNN here, and is slower everywhere.
        return "autocast mixes dtypes here as PyTorch's layers do" if problem.autocast else ""
    # The time is all matrix products then, and of those oneDNN loses none.
    products_alone = problem.batch >= 32 and not problem.training
    if problem.dtype == torch.bfloat16:
        if not problem.training and kernels_multiply_bfloat16() and not multiplies_tiles():
            return _ALL_PRODUCTS if problem.hidden_size > 512 and products_alone else ""
        one_by_one = problem.training and problem.batch < 4
        large = problem.batch > 8 or (problem.hidden_size > 64 and not one_by_one)
        if large and multiplies_bfloat16():
            return "oneDNN multiplies in bfloat16 on this CPU, and is faster at this size"
        if problem.hidden_size > 384 and problem.batch < 16 and not problem.training:
            return "in float32, few rows of large weights read twice the bytes of oneDNN's"
    elif problem.dtype == torch.float32 and problem.hidden_size > 768 and products_alone:
        return _ALL_PRODUCTS
    return ""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, and PyTorch says so."""
    return _torch_says("_is_avx512_bf16_supported") or multiplies_tiles()


@functools.cache
def multiplies_tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (AMX): oneDNN does, our kernels do not."""
    return _torch_says("_is_amx_tile_supported")


def _torch_says(question: str) -> bool:
    return bool(getattr(torch.cpu, question, bool)())


def kernels_multiply_bfloat16() -> bool:
    """Whether our kernels compute in bfloat16 where nothing is to be differentiated."""
    from fused_lstm.kernels import cpu as kernels

    return bool(kernels.multiplies_bfloat16())


def _check_rows(batch_sizes: torch.Tensor | None, rows: torch.Tensor, state: torch.Tensor) -> None:
    """Raise unless packed rows are as `batch_sizes` says: compiled programs come unchecked."""
    if batch_sizes is None:
        return
    check_batch_sizes(batch_sizes, rows.shape[0], "gates")
    if int(batch_sizes[0]) != state.shape[0]:
        raise ValueError(
            f"batch_sizes: expected {state.shape[0]} rows in the first step, as the states have, "
            f"got {int(batch_sizes[0])}"
        )


def widened(argument: Any) -> Any:
    """The argument, in float32 if it is a tensor in bfloat16, or what it holds of such."""
    if isinstance(argument, torch.Tensor) and argument.dtype == torch.bfloat16:
        return argument.float()
    if isinstance(argument, (Modifiers, LayerNorm)):
        return type(argument)(*map(widened, argument))
    return argument
