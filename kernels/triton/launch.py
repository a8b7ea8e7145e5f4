"""Launches the kernels on tensors: shapes, strides, buffers and the order of the steps."""

import contextlib
import functools
import itertools
from typing import NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from .config import LaunchConfig, Modifiers, Scope, select_launch_config
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


def _kind_of_modifiers(lengths: torch.Tensor | None, *others: object) -> Modifiers:
    """What is given of the modifiers, as the choice of a configuration asks for it."""
    if any(x is not None for x in others):
        return "any"
    return "none" if lengths is None else "lengths"


def _modifiers(
    lengths: torch.Tensor | None,
    resets: torch.Tensor | None,
    recurrent_mask: torch.Tensor | None,
    zoneout_h: torch.Tensor | None,
    zoneout_c: torch.Tensor | None,
    cell_clip: float | None,
    *,
    packed: bool,
    unread: torch.Tensor,
) -> dict[str, object]:
    """What modifies the recurrence, as the kernels' arguments by name.

    Args:
        lengths: as `lstm_forward` takes it, like all up to `cell_clip`.
        resets: likewise.
        recurrent_mask: likewise.
        zoneout_h: likewise.
        zoneout_c: likewise.
        cell_clip: likewise.
        packed: whether the rows are those of a packed sequence.
        unread: the address of what is not given, and not read.
    """
    if lengths is not None and packed:
        raise ValueError("lengths are for padded gates: with batch_sizes they must be None")
    arguments: dict[str, object] = {
        "HAS_LENGTHS": lengths is not None,
        "HAS_RESETS": resets is not None,
        "HAS_RECURRENT_MASK": recurrent_mask is not None,
        "HAS_ZONEOUT_H": zoneout_h is not None,
        "HAS_ZONEOUT_C": zoneout_c is not None,
        "HAS_CELL_CLIP": cell_clip is not None,
        "lengths_ptr": unread if lengths is None else lengths.contiguous(),
        "cell_clip": 0.0 if cell_clip is None else float(cell_clip),
    }
    if recurrent_mask is not None:
        recurrent_mask = _unit_columns(recurrent_mask)
    arguments["recurrent_mask_ptr"] = unread if recurrent_mask is None else recurrent_mask
    arguments["recurrent_mask_stride_b"] = 0 if recurrent_mask is None else recurrent_mask.stride(0)
    for name, x in ("resets", resets), ("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c):
        stride_t, stride_b = 0, 0
        if x is not None:
            # A reset is one element of a row: it has no columns.
            x = x.view(torch.uint8) if name == "resets" else _unit_columns(x)
            stride_t, stride_b = _row_strides(x, packed)
        arguments[f"{name}_ptr"] = unread if x is None else x
        arguments[f"{name}_stride_t"] = stride_t
        arguments[f"{name}_stride_b"] = stride_b
    return arguments


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
    lengths: torch.Tensor | None = None,
    resets: torch.Tensor | None = None,
    recurrent_mask: torch.Tensor | None = None,
    zoneout_h: torch.Tensor | None = None,
    zoneout_c: torch.Tensor | None = None,
    cell_clip: float | None = None,
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

    With everything that can modify it, at the steps t < lengths of a row:

        h', c' = 0, 0 where resets_t, else h_{t-1}, c_{t-1}
        a_t = gates_t + (h' * recurrent_mask) W_hh^T
        c^  = clip(f * c' + i * g, -cell_clip, cell_clip)
        h^  = o * tanh(c^)
        c_t = zoneout_c_t * c' + (1 - zoneout_c_t) * c^
        h_t = zoneout_h_t * h' + (1 - zoneout_h_t) * h^

    Products accumulate, and c is carried, in float32; h is rounded once, where it is stored.

    Args:
        gates: [T, B, 4H] input projections with biases, gate order i, f, g, o, any strides; or
            the rows [N, 4H] of a packed sequence. float32, float16 or bfloat16.
        weight_hh: [4H, H] same dtype, any strides.
        h0: [B, H] same dtype, initial state.
        c0: [B, H] same dtype, initial cell state.
        batch_sizes: [T] int64 on the CPU, not increasing, for packed rows: the number of rows at
            each time, as in torch.nn.utils.rnn.PackedSequence.
        lengths: [B] int64 on the device of the gates, 0 to T: the steps of each row, without
            batch_sizes. At later ones the results are exactly 0, and the gates are not read.
        resets: [T, B] or [N] bool, any strides: steps that begin with a state of zeros.
        recurrent_mask: [B, H], dtype of the gates: factor of h_{t-1} where it enters W_hh.
        zoneout_h: [T, B, H] or [N, H] in [0, 1], any strides of T and B (0 too), dtype of the gates
            or float32: the share of h_{t-1} in h_t.
        zoneout_c: likewise, the share of c_{t-1} in c_t.
        cell_clip: the largest magnitude of the new cell state.
        reverse: runs from the last step to the first; a row that is packed or has a length begins
            at its own last step.
        save_activations: returns the gates after activation, which the backward needs.
        save_cells: returns the cell states, which the backward needs.
        input_precision: of float32 products, "ieee" or "tf32".
        scope: names the kernel, "sequence" or "step"; None chooses.

    Returns:
        h: like gates, with H columns: output states, contiguous.
        c: same shape, float32: cell states; of shape (0,) unless save_cells.
        activations: like gates, contiguous: i, f, g, o; of shape (0,) unless save_activations.
        h_n, c_n: [B, H] final state; the initial one of rows without a step.

    Raises:
        ValueError: if a dtype, `input_precision` or `scope` cannot be had, without a GPU, or for
            lengths together with batch_sizes.
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
        modifiers=_kind_of_modifiers(
            lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip
        ),
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
    modifiers = _modifiers(
        lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip,
        packed=packed, unread=gates,
    )  # fmt: skip
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
                PACKED=packed, REVERSE=reverse, **flags, **modifiers, **_sequence_options(config),
            )  # fmt: skip
        else:
            c_state = c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            if lengths is not None:
                # Of a row without a step no launch stores the final state: it is the initial one.
                h_n.copy_(h0)
                c_n.copy_(c0)
            for before, step, after in _steps(T, B, batch_sizes, reverse):
                lstm_forward_step_kernel[_step_grid(config, step.n, H)](
                    gates, weight_hh, h0, h, c_state, c, activations, h_n, c_n,
                    *(s.row if packed else s.t for s in (step, before, after)),
                    step.row, before.row, step.n, before.n, after.n,
                    H, *strides, *weight_hh.stride(), h0.stride(0),
                    **flags, **modifiers, **_step_options(config),
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
    lengths: torch.Tensor | None = None,
    resets: torch.Tensor | None = None,
    recurrent_mask: torch.Tensor | None = None,
    zoneout_h: torch.Tensor | None = None,
    zoneout_c: torch.Tensor | None = None,
    cell_clip: float | None = None,
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

    With everything that can modify it (h', c' and c^ as in `lstm_forward`):

        dc^ = (1 - zoneout_c_t) * dc + (1 - zoneout_h_t) * dh * o * (1 - tanh(c^)^2),
              0 where c^ was held at +-cell_clip: dc of da_i, da_f (with c'), da_g
        dh^ = (1 - zoneout_h_t) * dh: dh of da_o (with c^)
        passed back to h_{t-1}: recurrent_mask * (dgates_t W_hh) + zoneout_h_t * dh
        passed back to c_{t-1}: dc^ * f + zoneout_c_t * dc;  both 0 where resets_t

    The gradient of weight_hh is one product of the result: the sum over all steps of
    dgates_t^T h_{t-1}, or dgates_t^T (h' * recurrent_mask).

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
        lengths: as in `lstm_forward`; at steps past a length dgates are exactly 0, and grad_h and
            grad_c are not read.
        resets: as in `lstm_forward`.
        recurrent_mask: as in `lstm_forward`.
        zoneout_h: as in `lstm_forward`.
        zoneout_c: as in `lstm_forward`.
        cell_clip: as in `lstm_forward`.
        reverse: as in `lstm_forward`.
        input_precision: as in `lstm_forward`.
        scope: as in `lstm_forward`.

    Returns:
        dgates: like activations: gradient of gates, contiguous.
        dh0, dc0: [B, H] gradients of the initial state; those of the final one for rows without a
            step.

    Raises:
        ValueError: if a dtype, `input_precision` or `scope` cannot be had, without a GPU, or for
            lengths together with batch_sizes.
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
        modifiers=_kind_of_modifiers(
            lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip
        ),
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
    modifiers = _modifiers(
        lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip,
        packed=packed, unread=dgates,
    )  # fmt: skip
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
                **flags, **modifiers, **_sequence_options(config),
            )  # fmt: skip
        else:
            if grad_c_n is None:
                dc = activations.new_zeros(B, H, dtype=torch.float32)
            else:
                dc = grad_c_n.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            if lengths is not None:
                # Of a row without a step no launch stores dh0: it is the final state's gradient.
                dh0.zero_() if grad_h_n is None else dh0.copy_(grad_h_n)
            dh_kept = dc if zoneout_h is None else torch.empty_like(dc)

            def launch(before: _Step, step: _Step, after: _Step, only_grad_h0: bool) -> None:
                rows = after.n if only_grad_h0 else step.n
                lstm_backward_step_kernel[_step_grid(config, rows, H)](
                    grad_h, grad_c, h_n_rows, activations, c, weight_hh, c0,
                    dgates, dc, dh0, dh_kept,
                    *(s.row if packed else s.t for s in (step, before, after)),
                    step.row, before.row, after.row, step.n, before.n, after.n,
                    H, *strides, h_n_rows.stride(0), c0.stride(0),
                    ONLY_GRAD_H0=only_grad_h0, **flags, **modifiers, **_step_options(config),
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
