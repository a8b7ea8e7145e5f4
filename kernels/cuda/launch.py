"""Launches the kernels on tensors: shapes, strides, buffers, and which kernel runs.

Nothing here waits for the device: what a launch needs of the host's numbers goes with its
parameters, or by a copy from pinned memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .compiler import KernelUnavailableError
from .config import Config, DeviceLimits, Direction, Flags, Plan, fits, known_limits, plan, terms_of
from .driver import CudaExecutor, Executor, Kernel, describe, upload
from .instance import type_name
from .parameters import (
    MAX_RECURRENCES,
    BackwardParameters,
    BackwardRecurrence,
    ForwardParameters,
    ForwardRecurrence,
)

__all__ = [
    "BackwardProblem",
    "ForwardProblem",
    "executor_for",
    "lstm_backward",
    "lstm_backward_many",
    "lstm_forward",
    "lstm_forward_many",
]

# What a kernel copies or stores at once: rows of gates and activations begin on such a boundary.
_ALIGNMENT = 16
# Plans that are tried before giving up: each may cost a compilation.
_TRIED_PLANS = 6


@functools.cache
def executor_for(device: torch.device) -> Executor:
    """Where kernels for a device come from.

    Raises:
        ValueError: if it is not an NVIDIA GPU.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"CUDA kernels need tensors on an NVIDIA GPU, got device {device}")
    return CudaExecutor()


def limits_of(device: torch.device) -> DeviceLimits:
    """What a device has room for; an emulated one is an H100."""
    return describe(device) if device.type == "cuda" else known_limits("sm_90")


class ForwardProblem(NamedTuple):
    """One recurrence to compute: arguments of `lstm_forward`, and tensors for its results.

    Attributes:
        out_h: contiguous, on a 16-byte boundary, as `lstm_forward` returns h, which is written
            there; None for a new tensor.
        out_c: likewise, for c.
        out_activations: likewise, for activations.
    """

    gates: Tensor
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    cell_clip: float | None = None
    reverse: bool = False
    out_h: Tensor | None = None
    out_c: Tensor | None = None
    out_activations: Tensor | None = None


class BackwardProblem(NamedTuple):
    """One recurrence to differentiate: arguments of `lstm_backward`, and a tensor for dgates.

    Attributes:
        out_dgates: contiguous, on a 16-byte boundary, as `lstm_backward` returns dgates, which are
            written there; None for a new tensor.
    """

    grad_h: Tensor | None
    grad_c: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    activations: Tensor
    c: Tensor
    weight_hh: Tensor
    c0: Tensor
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    cell_clip: float | None = None
    reverse: bool = False
    out_dgates: Tensor | None = None


ForwardResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
BackwardResult = tuple[Tensor, Tensor, Tensor]


def lstm_forward(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    cell_clip: float | None = None,
    reverse: bool = False,
    save_activations: bool = True,
    save_cells: bool = True,
    input_precision: str = "ieee",
    config: Config | None = None,
) -> ForwardResult:
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
            the rows [N, 4H] of a packed sequence. float32, float16 or bfloat16; H a multiple of 8.
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
        input_precision: of float32 products, "ieee" (each of three TF32 ones) or "tf32".
        config: divides the work, whatever `plan` would choose; what it says of flags is ignored.

    Returns:
        h: like gates, with H columns: output states, contiguous.
        c: same shape, float32: cell states; of shape (0,) unless save_cells.
        activations: like gates, contiguous: i, f, g, o; of shape (0,) unless save_activations.
        h_n, c_n: [B, H] final state; the initial one of rows without a step.

    Raises:
        KernelUnavailableError: if no kernel for the problem can be had; it says why.
        ValueError: if a dtype or `input_precision` cannot be had, without a GPU, or for lengths
            together with batch_sizes.
    """
    problem = ForwardProblem(
        gates, weight_hh, h0, c0, batch_sizes, lengths, resets, recurrent_mask, zoneout_h,
        zoneout_c, cell_clip, reverse,
    )  # fmt: skip
    (result,) = lstm_forward_many(
        [problem],
        save_activations=save_activations,
        save_cells=save_cells,
        input_precision=input_precision,
        config=config,
    )
    return result


def lstm_forward_many(
    problems: Sequence[ForwardProblem],
    *,
    save_activations: bool = True,
    save_cells: bool = True,
    input_precision: str = "ieee",
    wide_states: bool = False,
    planned: int | None = None,
    config: Config | None = None,
) -> list[ForwardResult]:
    """Runs independent recurrences side by side, in one launch where they find room.

    Args:
        problems: of the same B, H, dtype and device, all with or all without batch_sizes, lengths
            and each of the modifiers. T, and the direction of time, may differ.
        save_activations: as in `lstm_forward`.
        save_cells: as in `lstm_forward`.
        input_precision: as in `lstm_forward`.
        wide_states: c0 and c_n are float32, as c is carried: cutting a sequence into parts rounds
            nothing.
        planned: how many recurrences the kernel is chosen for, so that launches of more and of
            fewer of them share one; by default, as many as there are.
        config: as in `lstm_forward`.

    Returns:
        What `lstm_forward` returns, for each.

    Raises:
        KernelUnavailableError: as `lstm_forward`.
        ValueError: as `lstm_forward`, if the problems differ where they may not, and if a result
            does not fit the tensor that it is to go to.
    """
    _check_alike([_kind(p, p.gates, p.h0) for p in problems])
    layout_of = functools.cache(_packed_layout)
    prepared = [
        _prepare_forward(p, save_activations, save_cells, wide_states, layout_of) for p in problems
    ]
    if problems:
        flags = _flags(problems[0], save_activations, save_cells)
        dtype = problems[0].gates.dtype
        shape, device = problems[0].h0.shape, problems[0].gates.device
        _run("forward", prepared, shape, dtype, device, flags, input_precision, planned, config)
    return [p.results for p in prepared]


def lstm_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    activations: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    cell_clip: float | None = None,
    reverse: bool = False,
    input_precision: str = "ieee",
    config: Config | None = None,
) -> BackwardResult:
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
        config: as in `lstm_forward`.

    Returns:
        dgates: like activations: gradient of gates, contiguous.
        dh0, dc0: [B, H] gradients of the initial state; those of the final one for rows without a
            step.

    Raises:
        KernelUnavailableError: if no kernel for the problem can be had; it says why.
        ValueError: if a dtype or `input_precision` cannot be had, without a GPU, or for lengths
            together with batch_sizes.
    """
    problem = BackwardProblem(
        grad_h, grad_c, grad_h_n, grad_c_n, activations, c, weight_hh, c0, batch_sizes, lengths,
        resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip, reverse,
    )  # fmt: skip
    (result,) = lstm_backward_many([problem], input_precision=input_precision, config=config)
    return result


def lstm_backward_many(
    problems: Sequence[BackwardProblem],
    *,
    input_precision: str = "ieee",
    wide_states: bool = False,
    planned: int | None = None,
    config: Config | None = None,
) -> list[BackwardResult]:
    """Differentiates independent recurrences side by side, in one launch where they find room.

    Args:
        problems: as in `lstm_forward_many`; gradients may be None in some of them.
        input_precision: as in `lstm_forward`.
        wide_states: c0 and the gradients of initial and final states are float32.
        planned: as in `lstm_forward_many`.
        config: as in `lstm_forward`.

    Returns:
        What `lstm_backward` returns, for each.

    Raises:
        KernelUnavailableError: as `lstm_backward`.
        ValueError: as `lstm_backward`, if the problems differ where they may not, and if dgates do
            not fit the tensor that they are to go to.
    """
    _check_alike([_kind(p, p.activations, p.c0) for p in problems])
    layout_of = functools.cache(_packed_layout)
    prepared = [_prepare_backward(p, wide_states, layout_of) for p in problems]
    if problems:
        flags = _flags(problems[0], save_activations=True, save_cells=True)
        dtype = problems[0].activations.dtype
        shape, device = problems[0].c0.shape, problems[0].activations.device
        _run("backward", prepared, shape, dtype, device, flags, input_precision, planned, config)
    return [p.results for p in prepared]


# ---- one recurrence: its tensors as the kernel takes them

# `_packed_layout`, whose answers the recurrences of a launch share: directions have the same rows.
_LayoutOf = Callable[[Tensor, int, torch.device], tuple[Tensor, Tensor]]


@dataclass
class _Prepared:
    """A recurrence ready to be launched.

    Attributes:
        results: what the caller gets.
        structure: the kernel's description of it; None if there is nothing to do.
        tensors: all that the structure points to, kept alive until the launch.
    """

    results: tuple[Tensor, ...]
    structure: ctypes.Structure | None = None
    tensors: list[Tensor] = field(default_factory=list)

    def point(self, owner: ctypes.Structure, name: str, tensor: Tensor | None) -> None:
        """Makes a field of the structure point to a tensor, or to nothing."""
        if tensor is None:
            setattr(owner, name, None)
            return
        setattr(owner, name, tensor.data_ptr())
        self.tensors.append(tensor)


def _prepare_forward(
    problem: ForwardProblem,
    save_activations: bool,
    save_cells: bool,
    wide_states: bool,
    layout_of: _LayoutOf,
) -> _Prepared:
    """Allocates the results of a recurrence, and describes it."""
    gates, weight_hh, h0, c0 = problem[:4]
    packed = problem.batch_sizes is not None
    B, H = h0.shape
    leading = gates.shape[:-1]
    state = torch.float32 if wide_states else gates.dtype
    zeroed = problem.lengths is not None
    h = _room(problem.out_h, gates, (*leading, H), gates.dtype, zeroed)
    cells = (*leading, H) if save_cells else (0,)
    c = _room(problem.out_c, gates, cells, torch.float32, zeroed)
    activated = (*leading, 4 * H) if save_activations else (0,)
    activations = _room(problem.out_activations, gates, activated, gates.dtype, zeroed)
    if h.numel() == 0:
        return _Prepared((h, c, activations, h0.clone(), c0.to(state, copy=True)))
    h_n, c_n = gates.new_empty(B, H), gates.new_empty(B, H, dtype=state)
    prepared = _Prepared((h, c, activations, h_n, c_n))
    prepared.structure = r = ForwardRecurrence()
    gates = _aligned_rows(gates)
    prepared.point(r, "gates", gates)
    prepared.point(r, "weight_hh", _dense(weight_hh))
    prepared.point(r, "h0", _dense(h0))
    prepared.point(r, "c0", _dense(c0.to(state)))
    prepared.point(r, "h", h)
    prepared.point(r, "c", c if save_cells else None)
    prepared.point(r, "activations", activations if save_activations else None)
    prepared.point(r, "h_n", h_n)
    prepared.point(r, "c_n", c_n)
    r.gates_stride_t, r.gates_stride_b = _row_strides(gates, packed)
    r.steps = len(problem.batch_sizes) if packed else gates.shape[0]
    r.reverse, r.wide_states = problem.reverse, wide_states
    _describe_modifiers(prepared, problem, gates.device, layout_of)
    return prepared


def _prepare_backward(
    problem: BackwardProblem, wide_states: bool, layout_of: _LayoutOf
) -> _Prepared:
    """Allocates the gradients of a recurrence, and describes it."""
    grad_h, grad_c, grad_h_n, grad_c_n, activations, c, weight_hh, c0 = problem[:8]
    packed = problem.batch_sizes is not None
    B, H = c0.shape
    dtype = activations.dtype
    state = torch.float32 if wide_states else dtype
    zeroed = problem.lengths is not None
    dgates = _room(problem.out_dgates, activations, activations.shape, dtype, zeroed)
    if activations.numel() == 0:
        dh0, dc0 = (
            c0.new_zeros(B, H, dtype=state) if grad is None else grad.to(state, copy=True)
            for grad in (grad_h_n, grad_c_n)
        )
        return _Prepared((dgates, dh0, dc0))
    dh0, dc0 = (activations.new_empty(B, H, dtype=state) for _ in range(2))
    prepared = _Prepared((dgates, dh0, dc0))
    prepared.structure = r = BackwardRecurrence()
    for name, grad, kind in ("grad_h", grad_h, dtype), ("grad_c", grad_c, torch.float32):
        if grad is not None:
            grad = _unit_columns(grad.to(kind))
            stride_t, stride_b = _row_strides(grad, packed)
            setattr(r, f"{name}_stride_t", stride_t)
            setattr(r, f"{name}_stride_b", stride_b)
        prepared.point(r, name, grad)
    for name, grad in ("grad_h_n", grad_h_n), ("grad_c_n", grad_c_n):
        prepared.point(r, name, None if grad is None else _dense(grad.to(state)))
    prepared.point(r, "activations", _dense(activations))
    prepared.point(r, "c", _dense(c))
    prepared.point(r, "weight_hh", _dense(weight_hh))
    prepared.point(r, "c0", _dense(c0.to(state)))
    prepared.point(r, "grad_gates", dgates)
    prepared.point(r, "grad_h0", dh0)
    prepared.point(r, "grad_c0", dc0)
    r.steps = len(problem.batch_sizes) if packed else activations.shape[0]
    r.reverse, r.wide_states = problem.reverse, wide_states
    _describe_modifiers(prepared, problem, activations.device, layout_of)
    return prepared


def _room(
    given: Tensor | None, like: Tensor, shape: Sequence[int], dtype: torch.dtype, zeroed: bool
) -> Tensor:
    """Where a result goes: the tensor that is given for it, or a new one beside `like`.

    Args:
        given: by the caller, or None.
        like: a tensor of the same device.
        shape: of the result.
        dtype: of the result.
        zeroed: whether it begins as zeros: where rows have lengths nothing is stored past them.
    """
    if given is None:
        new = like.new_zeros if zeroed else like.new_empty
        return new(tuple(shape), dtype=dtype)
    fits_in = given.shape == tuple(shape) and given.dtype == dtype and given.device == like.device
    if not fits_in or _dense(given) is not given:
        raise ValueError(
            f"a result of {list(shape)}, {dtype} on {like.device} is to go to a contiguous tensor "
            f"like it on a {_ALIGNMENT}-byte boundary, got {list(given.shape)}, {given.dtype} on "
            f"{given.device}"
        )
    return given.zero_() if zeroed else given


def _describe_modifiers(
    prepared: _Prepared,
    problem: ForwardProblem | BackwardProblem,
    device: torch.device,
    layout_of: _LayoutOf,
) -> None:
    """Adds what modifies the recurrence to its description."""
    modifiers = prepared.structure.modifiers
    packed = problem.batch_sizes is not None
    lengths = problem.lengths
    if packed:
        batch = len(prepared.results[-1])
        step_rows, lengths = layout_of(problem.batch_sizes, batch, device)
        prepared.point(modifiers, "step_rows", step_rows)
    prepared.point(modifiers, "lengths", None if lengths is None else lengths.contiguous())
    mask = problem.recurrent_mask
    prepared.point(modifiers, "recurrent_mask", None if mask is None else _dense(mask))
    if problem.resets is not None:
        resets = problem.resets.view(torch.uint8)
        prepared.point(modifiers, "resets", resets)
        strides = _row_strides(resets, packed)
        modifiers.resets_stride_t, modifiers.resets_stride_b = strides
    for name in "zoneout_h", "zoneout_c":
        zoneout = getattr(problem, name)
        if zoneout is None:
            continue
        zoneout = _unit_columns(zoneout)
        prepared.point(modifiers, name, zoneout)
        stride_t, stride_b = _row_strides(zoneout, packed)
        setattr(modifiers, f"{name}_stride_t", stride_t)
        setattr(modifiers, f"{name}_stride_b", stride_b)
        setattr(modifiers, f"{name}_is_float", zoneout.dtype == torch.float32)
    modifiers.cell_clip = 0.0 if problem.cell_clip is None else float(problem.cell_clip)


def _packed_layout(batch_sizes: Tensor, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each step's rows begin [T], and how many steps each row has [B], on a device.

    Args:
        batch_sizes: [T] int64 on the CPU, not increasing.
        batch: B.
        device: where the rows are.
    """
    steps = len(batch_sizes)
    step_rows = batch_sizes.cumsum(0) - batch_sizes
    # Of sizes in rising order, those up to b belong to steps that row b does not have.
    rising = batch_sizes.flip(0).contiguous()
    lengths = steps - torch.searchsorted(rising, torch.arange(batch), right=True)
    both = torch.cat([step_rows, lengths])
    if device.type == "cuda":
        both = upload(both, device)
    return both[:steps], both[steps:]


def _unit_columns(x: Tensor) -> Tensor:
    """Adjacent columns: x itself, whatever its other strides, or else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _aligned_rows(x: Tensor) -> Tensor:
    """Adjacent columns in rows on 16-byte boundaries: x itself, or else a copy."""
    x = _unit_columns(x)
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1][:-1]
    aligned = all(stride * x.element_size() % _ALIGNMENT == 0 for stride in strides)
    return x if aligned and x.data_ptr() % _ALIGNMENT == 0 else _copy(x)


def _dense(x: Tensor) -> Tensor:
    """A contiguous tensor on a 16-byte boundary: x itself, or else a copy."""
    return x if x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0 else _copy(x)


def _copy(x: Tensor) -> Tensor:
    """A contiguous copy. New memory is aligned."""
    return x.clone(memory_format=torch.contiguous_format)


def _row_strides(x: Tensor, packed: bool) -> tuple[int, int]:
    """Strides of time and batch. A packed row's place is told by its batch stride alone.

    Of a single step or row the stride is 0: kernels make no other address of it, even of nothing.
    """
    stride_t, stride_b = (x.stride(k) if x.shape[k] > 1 else 0 for k in (0, 0 if packed else 1))
    return stride_t, stride_b


# ---- what the recurrences of a launch share


def _flags(
    problem: ForwardProblem | BackwardProblem, save_activations: bool, save_cells: bool
) -> Flags:
    """What the kernel is asked to do."""
    packed = problem.batch_sizes is not None
    if packed and problem.lengths is not None:
        raise ValueError("lengths are for padded gates: with batch_sizes they must be None")
    return Flags(
        save_activations=save_activations,
        save_cells=save_cells,
        lengths=packed or problem.lengths is not None,
        packed=packed,
        resets=problem.resets is not None,
        recurrent_mask=problem.recurrent_mask is not None,
        zoneout_h=problem.zoneout_h is not None,
        zoneout_c=problem.zoneout_c is not None,
        cell_clip=problem.cell_clip is not None,
    )


def _kind(
    problem: ForwardProblem | BackwardProblem, rows: Tensor, state: Tensor
) -> tuple[object, ...]:
    """All that recurrences of one launch must have in common."""
    flags = _flags(problem, save_activations=True, save_cells=True)
    return tuple(state.shape), rows.dtype, rows.device, flags


def _check_alike(kinds: list[tuple[object, ...]]) -> None:
    for kind in kinds[1:]:
        if kind != kinds[0]:
            raise ValueError(
                f"recurrences of one launch must be alike in shape of the state, dtype, device and "
                f"what modifies them, got {kinds[0]} and {kind}"
            )


# ---- launches


class _Request(NamedTuple):
    """All that the choice of a kernel depends on."""

    executor: Executor
    direction: Direction
    device: torch.device
    batch: int
    hidden: int
    dtype: torch.dtype
    terms: int
    recurrences: int
    flags: Flags


# Kernels that were chosen, or why none could be: an error would keep its callers' tensors alive.
_chosen: dict[_Request, tuple[Config, Kernel] | str] = {}
_REMEMBERED = 4096


def _run(
    direction: Direction,
    prepared: list[_Prepared],
    state_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    flags: Flags,
    input_precision: str,
    planned: int | None,
    config: Config | None,
) -> None:
    """Launches all recurrences that have something to do."""
    terms = terms_of(dtype, input_precision)
    executor = executor_for(device)
    ready = [p for p in prepared if p.structure is not None]
    batch, hidden = state_shape
    for first in range(0, len(ready), MAX_RECURRENCES):
        some = ready[first : first + MAX_RECURRENCES]
        count = min(planned or len(some), MAX_RECURRENCES)
        request = _Request(executor, direction, device, batch, hidden, dtype, terms, count, flags)
        if config is None:
            chosen, kernel = _best_kernel(request)
        else:
            chosen, kernel = _named_kernel(request, config)
        _launch(chosen, kernel, some, batch, device)


def _named_kernel(request: _Request, config: Config) -> tuple[Config, Kernel]:
    """The kernel that divides the work as `config` does."""
    wanted = {
        "direction": request.direction,
        "HIDDEN": request.hidden,
        "TYPE": type_name(request.dtype),
        "TERMS": request.terms,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"config: expected {name} = {value}, got {getattr(config, name)}")
    config = config.with_flags(request.flags)
    return config, request.executor.load(config, request.device)


def _best_kernel(request: _Request) -> tuple[Config, Kernel]:
    """The kernel of the best plan that can be had; the answer is remembered.

    Raises:
        KernelUnavailableError: if there is none.
    """
    found = _chosen.get(request)
    if found is None:
        try:
            found = _first_available(request)
        except KernelUnavailableError as error:
            found = str(error)
        if len(_chosen) >= _REMEMBERED:
            _chosen.clear()
        _chosen[request] = found
    if isinstance(found, str):
        raise KernelUnavailableError(found)
    return found


def _first_available(request: _Request) -> tuple[Config, Kernel]:
    """The first kernel that compiles, loads and has room for a team."""
    limits = limits_of(request.device)
    options = {"terms": request.terms, "flags": request.flags}
    plans = plan(
        request.direction,
        batch=request.batch,
        hidden=request.hidden,
        dtype=request.dtype,
        recurrences=request.recurrences,
        limits=limits,
        **options,
    )
    reasons = []
    for candidate in _worth_trying(plans):
        try:
            kernel = request.executor.load(candidate.config, request.device)
        except KernelUnavailableError as error:
            reasons.append(str(error))
            continue
        if kernel.resident_teams > 0:
            return candidate.config, kernel
        reasons.append(f"the device has no room for a team of {candidate.config.TEAM} blocks")
    if not plans:
        fit, why_not = fits(request.hidden, request.dtype, limits, **options)
        reasons.append(why_not if not fit else f"no {request.direction} kernel fits")
    raise KernelUnavailableError("; ".join(dict.fromkeys(reasons)))


def _worth_trying(plans: list[Plan]) -> list[Plan]:
    """The best plans, and, should the device have less room than it says, the smallest teams."""
    best = plans[: _TRIED_PLANS - 2]
    others = sorted(plans[len(best) :], key=lambda p: (p.config.TEAM, p.config.SCOPE == "grid"))
    return best + others[:2]


def _rounds(
    recurrences: int, tiles: int, resident: int | None
) -> Iterator[tuple[int, int, int, int]]:
    """Launches that together do all tiles of all recurrences.

    Args:
        recurrences: how many.
        tiles: of each.
        resident: teams that a launch may have; None if teams may wait for others to end.

    Yields:
        The first recurrence and how many, the first tile and how many.
    """
    if resident is None or recurrences * tiles <= resident:
        yield 0, recurrences, 0, tiles
        return
    together = min(recurrences, resident)
    at_once = resident // together
    for first in range(0, recurrences, together):
        count = min(together, recurrences - first)
        for tile in range(0, tiles, at_once):
            yield first, count, tile, min(at_once, tiles - tile)


def _launch(
    config: Config, kernel: Kernel, prepared: list[_Prepared], batch: int, device: torch.device
) -> None:
    """Launches a kernel on up to MAX_RECURRENCES recurrences."""
    tiles = -(-batch // config.COLUMNS)
    resident = kernel.resident_teams if config.cooperative else None
    rounds = list(_rounds(len(prepared), tiles, resident))
    exchange = flags = None
    if config.cooperative:
        teams = [count * own_tiles for _, count, _, own_tiles in rounds]
        # Launches follow each other: the buffers may be the same, but each begins with flags of 0.
        exchange = torch.empty(max(teams) * config.exchange_bytes, dtype=torch.uint8, device=device)
        flags = torch.zeros(sum(teams) * config.TEAM, dtype=torch.int32, device=device)
    used_flags = 0
    parameters = ForwardParameters() if config.direction == "forward" else BackwardParameters()
    parameters.batch = batch
    for first, count, first_tile, own_tiles in rounds:
        some = prepared[first : first + count]
        for k, p in enumerate(some):
            parameters.recurrence[k] = p.structure
        parameters.recurrences, parameters.tiles = count, own_tiles
        parameters.first_tile = first_tile
        if exchange is not None and flags is not None:
            own_flags = flags[used_flags : used_flags + count * own_tiles * config.TEAM]
            used_flags += len(own_flags)
            parameters.exchange, parameters.flags = exchange.data_ptr(), own_flags.data_ptr()
        kernel.launch(count * own_tiles, parameters)
