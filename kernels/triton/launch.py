"""Launches the kernels on tensors: shapes, strides, buffers and the order of the steps."""

import contextlib
import functools
import itertools
from typing import NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from .config import LaunchConfig, Scope, select_launch_config
from .sequence import lstm_backward_sequence_kernel, lstm_forward_sequence_kernel
from .step import lstm_backward_step_kernel, lstm_forward_step_kernel

__all__ = ["lstm_backward", "lstm_forward"]


@functools.cache
def _arch(device: torch.device) -> str:
    """The name of a device's architecture as compilers know it: "sm_90", "gfx942"."""
    if device.type != "cuda":
        # The interpreter runs any configuration; one for 32-lane warps is as good as another.
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` current, so that a kernel goes to its stream."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if not isinstance(lstm_forward_step_kernel, InterpretedFunction):
        raise ValueError(
            f"Triton kernels need GPU tensors, got device {device}; set TRITON_INTERPRET=1 before "
            "importing to run them in Triton's interpreter"
        )
    return contextlib.nullcontext()


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    """Adjacent columns: x itself, whatever its other strides, or else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _row_strides(x: torch.Tensor, packed: bool) -> tuple[int, int]:
    """Strides of time and batch. A packed row's place is told by its batch stride alone."""
    return (x.stride(0), x.stride(0)) if packed else (x.stride(0), x.stride(1))


class _Step(NamedTuple):
    """A time step: its place in time, its first row among all, how many rows are active in it."""

    t: int
    row: int
    n: int


# The step before the first and after the last.
_NO_STEP = _Step(0, 0, 0)


def _steps(
    T: int, B: int, batch_sizes: torch.Tensor | None, reverse: bool
) -> list[tuple[_Step, _Step, _Step]]:
    """Every step with the ones run before and after it, in the order of the recurrence."""
    sizes = [B] * T if batch_sizes is None else batch_sizes.tolist()
    rows = itertools.accumulate(sizes, initial=0)
    steps = [_Step(t, row, n) for t, (row, n) in enumerate(zip(rows, sizes, strict=False))]
    if reverse:
        steps.reverse()
    return list(zip([_NO_STEP, *steps[:-1]], steps, [*steps[1:], _NO_STEP], strict=True))


def lstm_forward(
    gates: torch.Tensor,
    weight_hh: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    *,
    batch_sizes: torch.Tensor | None = None,
    reverse: bool = False,
    save_activations: bool = True,
    save_cells: bool = True,
    input_precision: str = "ieee",
    scope: Scope | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the LSTM recurrence forward (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

        a_t = gates_t + h_{t-1} W_hh^T
        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    Products accumulate, and c is carried, in float32; h is rounded once, where it is stored.

    Args:
        gates: [T, B, 4H] input projections with biases, gate order i, f, g, o, any strides; or
            the rows [N, 4H] of a packed sequence. float32, float16 or bfloat16.
        weight_hh: [4H, H] same dtype, any strides.
        h0: [B, H] same dtype, initial state.
        c0: [B, H] same dtype, initial cell state.
        batch_sizes: [T] int64 on the CPU, not increasing, for packed rows: the number of rows at
            each time, as in torch.nn.utils.rnn.PackedSequence.
        reverse: runs from the last step to the first; a packed row begins at its own last step.
        save_activations: returns the gates after activation, which the backward needs.
        save_cells: returns the cell states, which the backward needs.
        input_precision: of float32 products, "ieee" or "tf32".
        scope: names the kernel, "sequence" or "step"; None chooses.

    Returns:
        h: like gates, with H columns: output states, contiguous.
        c: same shape, float32: cell states; of shape (0,) unless save_cells.
        activations: like gates, contiguous: i, f, g, o; of shape (0,) unless save_activations.
        h_n, c_n: [B, H] final state.

    Raises:
        ValueError: if a dtype, `input_precision` or `scope` cannot be had, or without a GPU.
    """
    packed = batch_sizes is not None
    B, H = h0.shape
    T = len(batch_sizes) if packed else gates.shape[0]
    N = gates.shape[0] if packed else T * B
    config = select_launch_config(
        "forward",
        batch=B,
        hidden=H,
        dtype=gates.dtype,
        arch=_arch(gates.device),
        input_precision=input_precision,
        scope=scope,
    )
    leading = gates.shape[:-1]
    h = gates.new_empty(*leading, H)
    c = gates.new_empty((*leading, H) if save_cells else (0,), dtype=torch.float32)
    activations = gates.new_empty((*leading, 4 * H) if save_activations else (0,))
    if N == 0:
        return h, c, activations, h0.clone(), c0.clone()
    h_n = gates.new_empty(B, H)
    c_n = gates.new_empty(B, H)
    gates, h0, c0 = _unit_columns(gates), _unit_columns(h0), _unit_columns(c0)
    strides = _row_strides(gates, packed)
    flags = {
        "SAVE_ACTIVATIONS": save_activations,
        "SAVE_CELLS": save_cells,
        "INPUT_PRECISION": input_precision,
    }
    with _on_device(gates.device):
        if config.scope == "sequence":
            # A copy that does not wait; it is the only thing a launch uploads.
            sizes = batch_sizes.to(gates.device, non_blocking=True) if packed else gates
            lstm_forward_sequence_kernel[(triton.cdiv(B, config.BLOCK_B),)](
                gates, weight_hh, h0, c0, h, c, activations, h_n, c_n, sizes,
                T, B, N, H, *strides, *weight_hh.stride(), h0.stride(0), c0.stride(0),
                PACKED=packed, REVERSE=reverse, **flags, **_sequence_options(config),
            )  # fmt: skip
        else:
            c_state = c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for before, step, after in _steps(T, B, batch_sizes, reverse):
                lstm_forward_step_kernel[_step_grid(config, step.n, H)](
                    gates, weight_hh, h0, h, c_state, c, activations, h_n, c_n,
                    step.row if packed else step.t, step.row, before.row,
                    step.n, before.n, after.n,
                    H, *strides, *weight_hh.stride(), h0.stride(0),
                    **flags, **_step_options(config),
                )  # fmt: skip
    return h, c, activations, h_n, c_n


def lstm_backward(
    grad_h: torch.Tensor | None,
    grad_c: torch.Tensor | None,
    grad_h_n: torch.Tensor | None,
    grad_c_n: torch.Tensor | None,
    activations: torch.Tensor,
    c: torch.Tensor,
    weight_hh: torch.Tensor,
    c0: torch.Tensor,
    *,
    batch_sizes: torch.Tensor | None = None,
    reverse: bool = False,
    input_precision: str = "ieee",
    scope: Scope | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the recurrence backward: the gradients of gates, h0 and c0.

        dh = grad_h_t + dgates_{t+1} W_hh       (+ grad_h_n where t is a row's last step)
        dc = dc_{t+1} + grad_c_t + dh * o * (1 - tanh(c_t)^2)
        da_i = dc * g * i * (1 - i);            da_f = dc * c_{t-1} * f * (1 - f)
        da_g = dc * i * (1 - g^2);              da_o = dh * tanh(c_t) * o * (1 - o)
        dc_t = dc * f

    The gradient of weight_hh is one product of the result: the sum over all steps of
    dgates_t^T h_{t-1}.

    Args:
        grad_h: [T, B, H] or [N, H], gradient of h, any strides; None for zero.
        grad_c: same shape, float32, gradient of c; None for zero.
        grad_h_n: [B, H] gradient of h_n; None for zero.
        grad_c_n: [B, H] gradient of c_n; None for zero.
        activations: [T, B, 4H] or [N, 4H], as `lstm_forward` returned them.
        c: [T, B, H] or [N, H] float32, as `lstm_forward` returned them.
        weight_hh: [4H, H], any strides.
        c0: [B, H] initial cell state.
        batch_sizes: as in `lstm_forward`.
        reverse: as in `lstm_forward`.
        input_precision: as in `lstm_forward`.
        scope: as in `lstm_forward`.

    Returns:
        dgates: like activations: gradient of gates, contiguous.
        dh0, dc0: [B, H] gradients of the initial state.

    Raises:
        ValueError: if a dtype, `input_precision` or `scope` cannot be had, or without a GPU.
    """
    packed = batch_sizes is not None
    B, H = c0.shape
    T = len(batch_sizes) if packed else activations.shape[0]
    N = activations.shape[0] if packed else T * B
    config = select_launch_config(
        "backward",
        batch=B,
        hidden=H,
        dtype=activations.dtype,
        arch=_arch(activations.device),
        input_precision=input_precision,
        scope=scope,
    )
    dgates = torch.empty_like(activations, memory_format=torch.contiguous_format)
    if N == 0:
        dh0 = c0.new_zeros(B, H) if grad_h_n is None else grad_h_n.to(c0.dtype, copy=True)
        dc0 = c0.new_zeros(B, H) if grad_c_n is None else grad_c_n.to(c0.dtype, copy=True)
        return dgates, dh0, dc0
    dh0 = activations.new_empty(B, H)
    dc0 = activations.new_empty(B, H)
    activations, c, c0 = activations.contiguous(), c.contiguous(), _unit_columns(c0)
    flags = {
        "HAS_GRAD_H": grad_h is not None,
        "HAS_GRAD_C": grad_c is not None,
        "HAS_GRAD_H_N": grad_h_n is not None,
        "INPUT_PRECISION": input_precision,
    }
    # What a kernel is told not to read still needs an address: any will do.
    grad_h = dgates if grad_h is None else _unit_columns(grad_h)
    grad_c = dgates if grad_c is None else _unit_columns(grad_c)
    h_n_rows = dgates if grad_h_n is None else _unit_columns(grad_h_n)
    strides = (*_row_strides(grad_h, packed), *_row_strides(grad_c, packed), *weight_hh.stride())
    with _on_device(activations.device):
        if config.scope == "sequence":
            sizes = batch_sizes.to(activations.device, non_blocking=True) if packed else dgates
            c_n_rows = dgates if grad_c_n is None else _unit_columns(grad_c_n)
            lstm_backward_sequence_kernel[(triton.cdiv(B, config.BLOCK_B),)](
                grad_h, grad_c, h_n_rows, c_n_rows, activations, c, weight_hh, c0,
                dgates, dh0, dc0, sizes,
                T, B, N, H, *strides, h_n_rows.stride(0), c_n_rows.stride(0), c0.stride(0),
                PACKED=packed, REVERSE=reverse, HAS_GRAD_C_N=grad_c_n is not None,
                **flags, **_sequence_options(config),
            )  # fmt: skip
        else:
            if grad_c_n is None:
                dc = activations.new_zeros(B, H, dtype=torch.float32)
            else:
                dc = grad_c_n.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

            def launch(before: _Step, step: _Step, after: _Step, only_grad_h0: bool) -> None:
                rows = after.n if only_grad_h0 else step.n
                lstm_backward_step_kernel[_step_grid(config, rows, H)](
                    grad_h, grad_c, h_n_rows, activations, c, weight_hh, c0, dgates, dc, dh0,
                    step.row if packed else step.t, step.row, before.row, after.row,
                    step.n, before.n, after.n,
                    H, *strides, h_n_rows.stride(0), c0.stride(0),
                    ONLY_GRAD_H0=only_grad_h0, **flags, **_step_options(config),
                )  # fmt: skip

            for before, step, after in reversed(_steps(T, B, batch_sizes, reverse)):
                launch(before, step, after, only_grad_h0=False)
                if before.n < step.n:
                    # Rows begin with this step: what it passes back to them reaches h0.
                    launch(_NO_STEP, before, step, only_grad_h0=True)
            dc0.copy_(dc)
    return dgates, dh0, dc0


def _step_grid(config: LaunchConfig, rows: int, H: int) -> tuple[int, int]:
    return triton.cdiv(rows, config.BLOCK_B), triton.cdiv(H, config.BLOCK_H)


def _sequence_options(config: LaunchConfig) -> dict[str, int]:
    return {
        "BLOCK_B": config.BLOCK_B,
        "BLOCK_H": config.BLOCK_H,
        "GATES_IN_REGISTERS": config.GATES_IN_REGISTERS,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _step_options(config: LaunchConfig) -> dict[str, int]:
    return {
        "BLOCK_B": config.BLOCK_B,
        "BLOCK_H": config.BLOCK_H,
        "BLOCK_K": config.BLOCK_K,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
