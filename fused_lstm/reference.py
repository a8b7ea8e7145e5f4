"""The LSTM recurrence in plain PyTorch: the fallback that is always right.

Same signature as `fused_lstm.lstm_recurrence`, any device, any floating dtype, differentiable any
number of times. Next to it stand its derivatives, written out: the reverse-mode recurrence that the
fused kernels implement, and the forward-mode one.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch (the sum of `batch_sizes`). Gate order i, f, g, o.

Packed and padded batches run through one loop. At each step the first `active` rows are computed
and the others keep their state: a sequence that has ended its final state, one that has not begun
(reversed time) its initial state.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LSTMOutput",
    "RecurrenceForward",
    "lstm_recurrence",
    "recurrence_backward",
    "recurrence_forward",
    "recurrence_jvp",
    "state_dtype",
]


class LSTMOutput(NamedTuple):
    """What a recurrence returns.

    Attributes:
        h: [T, B, P] or [N, P], hidden state after each step, in the dtype of the gates.
        c: [T, B, H] or [N, H], cell state after each step, in the dtype the state is kept in
            (float32; float64 for float64 gates).
        h_n: [B, P], hidden state after each sequence's last step, in the dtype of the gates.
        c_n: [B, H], cell state after each sequence's last step, in the dtype of the gates.
    """

    h: Tensor
    c: Tensor
    h_n: Tensor
    c_n: Tensor


class RecurrenceForward(NamedTuple):
    """`LSTMOutput` and what the backward pass needs besides: the activated gates."""

    h: Tensor
    c: Tensor
    activations: Tensor
    h_n: Tensor
    c_n: Tensor


class TimeStep(NamedTuple):
    """Where one step's rows lie: `tensor[where]` is [active, ...] for padded and packed tensors."""

    where: int | slice
    active: int


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums and cell states are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_batch_sizes(batch_sizes: Tensor, rows: int, of: str) -> None:
    """Raise unless `batch_sizes` describes packed rows, `rows` of them in the tensor called `of`.

    Raises:
        ValueError: if it is not int64 [T] on the CPU, of positive counts that do not increase and
            whose sum is `rows`.
    """
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not len(batch_sizes):
        raise ValueError(
            "batch_sizes: expected a non-empty int64 tensor [T], got "
            f"{list(batch_sizes.shape)} {batch_sizes.dtype}"
        )
    if batch_sizes.device.type != "cpu":
        raise ValueError(f"batch_sizes: expected a CPU tensor, got {batch_sizes.device}")
    if torch.compiler.is_compiling():
        return
    sizes = batch_sizes.tolist()
    if sizes[-1] < 1 or any(a < b for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"batch_sizes: expected positive, non-increasing counts, got {sizes}")
    if sum(sizes) != rows:
        raise ValueError(f"batch_sizes: expected a sum of {rows} (rows of {of}), got {sum(sizes)}")


def time_steps(steps: int, batch: int, batch_sizes: Tensor | None, reverse: bool) -> list[TimeStep]:
    """List the steps in the order in which they are computed.

    Args:
        steps: T, used for a padded batch.
        batch: B, used for a padded batch.
        batch_sizes: [T] int64 on the CPU, rows active at each step, or None for a padded batch.
        reverse: whether time runs from T-1 to 0.
    """
    result: list[TimeStep] = []
    if batch_sizes is None:
        result = [TimeStep(t, batch) for t in range(steps)]
    else:
        start = 0
        for active in batch_sizes.tolist():
            result.append(TimeStep(slice(start, start + active), active))
            start += active
    return result[::-1] if reverse else result


def _update(state: Tensor, new: Tensor, active: int) -> Tensor:
    """Replace the first `active` rows of a [B, ...] state; the others keep theirs."""
    return new if active == state.shape[0] else torch.cat([new, state[active:]])


def _in_order_of_time(steps: list[Tensor], packed: bool, reverse: bool) -> Tensor:
    """Join per-step rows, listed in the order of computation, to [T, B, ...] or [N, ...]."""
    if reverse:
        steps = steps[::-1]
    # Not torch.stack, whose result is a view: users may write into it.
    return torch.cat(steps if packed else [step.unsqueeze(0) for step in steps])


def lstm_recurrence(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    weight_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> LSTMOutput:
    """Run the LSTM recurrence over a whole sequence in plain PyTorch.

    See `fused_lstm.lstm_recurrence` for the equations, the arguments and what is returned.
    """
    out = recurrence_forward(gates, weight_hh, h0, c0, weight_hr, batch_sizes, reverse)
    return LSTMOutput(out.h, out.c, out.h_n, out.c_n)


def recurrence_forward(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> RecurrenceForward:
    """Compute the recurrence and keep the activated gates.

    Args:
        gates: [T, B, 4H] or [N, 4H], x·W_ihᵀ + b_ih + b_hh.
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H], or None for P = H.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        reverse: whether time runs backwards.

    Returns:
        h, c, h_n and c_n as in `LSTMOutput`, and activations, shaped and typed like gates:
        σ(a_i), σ(a_f), tanh(a_g), σ(a_o).
    """
    dtype, accumulate = gates.dtype, state_dtype(gates.dtype)
    recurrent = weight_hh.to(accumulate).t()
    projection = None if weight_hr is None else weight_hr.to(accumulate).t()
    h, c = h0, c0.to(accumulate)
    hs: list[Tensor] = []
    cs: list[Tensor] = []
    activated: list[Tensor] = []
    for where, active in time_steps(gates.shape[0], h0.shape[0], batch_sizes, reverse):
        a = gates[where].to(accumulate) + h[:active].to(accumulate) @ recurrent
        a_i, a_f, a_g, a_o = a.chunk(4, -1)
        i, f, g, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
        c_t = f * c[:active] + i * g
        h_t = o * c_t.tanh()
        if projection is not None:
            h_t = h_t @ projection
        h_t = h_t.to(dtype)
        h, c = _update(h, h_t, active), _update(c, c_t, active)
        hs.append(h_t)
        cs.append(c_t)
        activated.append(torch.cat([i, f, g, o], -1).to(dtype))
    packed = batch_sizes is not None
    return RecurrenceForward(
        _in_order_of_time(hs, packed, reverse),
        _in_order_of_time(cs, packed, reverse),
        _in_order_of_time(activated, packed, reverse),
        h,
        c.to(dtype),
    )


def recurrence_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_activations: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    activations: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run the recurrence's gradient from the last step to the first, in differentiable operations.

    With m_t = o ⊙ tanh(c_t) (h_t = m_t, or m_t·W_hrᵀ) and δ for the derivative of the loss:

        δh_t = grad_h_t + δa_{t+1}·W_hh          (grad_h_n after a sequence's last step)
        δm_t = δh_t, or δh_t·W_hr
        δc_t = grad_c_t + δc_{t+1} ⊙ f_{t+1} + δm_t ⊙ o ⊙ (1 − tanh²(c_t))
        δa_i = δc_t ⊙ g ⊙ i(1 − i)      δa_f = δc_t ⊙ c_{t−1} ⊙ f(1 − f)
        δa_g = δc_t ⊙ i ⊙ (1 − g²)      δa_o = δm_t ⊙ tanh(c_t) ⊙ o(1 − o)

    Args:
        grad_h: like h, or None for zeros; so for the other gradients.
        grad_c: like c.
        grad_activations: like activations; only a second derivative has one.
        grad_h_n: [B, P].
        grad_c_n: [B, H].
        activations: as `recurrence_forward` returned them.
        c: likewise.
        weight_hh: [4H, P].
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: as in the forward pass.
        reverse: as in the forward pass.

    Returns:
        grad_gates like gates, grad_h0 [B, P], grad_c0 [B, H], and, where there is a projection,
        the whole δh [T, B, P] or [N, P] from which weight_hr's gradient follows (else None).
    """
    dtype, accumulate = activations.dtype, state_dtype(activations.dtype)
    batch, hidden = c0.shape
    features = weight_hh.shape[1]
    recurrent = weight_hh.to(accumulate)
    projection = None if weight_hr is None else weight_hr.to(accumulate)
    steps = time_steps(activations.shape[0], batch, batch_sizes, reverse)

    cell = c0.to(accumulate)
    cells_before: list[Tensor] = []
    for where, active in steps:
        cells_before.append(cell[:active])
        cell = _update(cell, c[where], active)

    def start(grad: Tensor | None, width: int) -> Tensor:
        if grad is None:
            return activations.new_zeros((batch, width), dtype=accumulate)
        return grad.to(accumulate)

    dh, dc = start(grad_h_n, features), start(grad_c_n, hidden)
    grad_gates: list[Tensor] = []
    grad_hs: list[Tensor] = []
    for (where, active), c_before in zip(reversed(steps), reversed(cells_before), strict=True):
        i, f, g, o = activations[where].to(accumulate).chunk(4, -1)
        tanh_c = c[where].tanh()
        dh_t, dc_t = dh[:active], dc[:active]
        if grad_h is not None:
            dh_t = dh_t + grad_h[where].to(accumulate)
        if grad_c is not None:
            dc_t = dc_t + grad_c[where]
        dm = dh_t if projection is None else dh_t @ projection
        dc_t = dc_t + dm * o * (1 - tanh_c * tanh_c)
        d_activated = torch.cat([dc_t * g, dc_t * c_before, dc_t * i, dm * tanh_c], -1)
        if grad_activations is not None:
            d_activated = d_activated + grad_activations[where].to(accumulate)
        slope = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
        da = d_activated * slope
        dh, dc = _update(dh, da @ recurrent, active), _update(dc, dc_t * f, active)
        grad_gates.append(da.to(dtype))
        if projection is not None:
            grad_hs.append(dh_t.to(dtype))
    packed = batch_sizes is not None
    return (
        _in_order_of_time(grad_gates, packed, not reverse),
        dh.to(dtype),
        dc.to(dtype),
        None if projection is None else _in_order_of_time(grad_hs, packed, not reverse),
    )


def recurrence_jvp(
    primals: RecurrenceForward,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    gates_tangent: Tensor | None,
    weight_hh_tangent: Tensor | None,
    h0_tangent: Tensor | None,
    c0_tangent: Tensor | None,
    weight_hr_tangent: Tensor | None,
) -> RecurrenceForward:
    """Push tangents through the recurrence, in differentiable operations.

    Args:
        primals: what `recurrence_forward` returned.
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: as in the forward pass.
        reverse: as in the forward pass.
        gates_tangent: like gates, or None for zeros; so for the other tangents.
        weight_hh_tangent: like weight_hh.
        h0_tangent: like h0.
        c0_tangent: like c0.
        weight_hr_tangent: like weight_hr.

    Returns:
        The tangents of everything `recurrence_forward` returns.
    """
    dtype, accumulate = primals.activations.dtype, state_dtype(primals.activations.dtype)
    recurrent = weight_hh.to(accumulate).t()
    h, c = h0, c0.to(accumulate)
    dh = torch.zeros_like(h, dtype=accumulate) if h0_tangent is None else h0_tangent.to(accumulate)
    dc = torch.zeros_like(c) if c0_tangent is None else c0_tangent.to(accumulate)
    dhs: list[Tensor] = []
    dcs: list[Tensor] = []
    d_activated: list[Tensor] = []
    steps = time_steps(primals.activations.shape[0], h0.shape[0], batch_sizes, reverse)
    for where, active in steps:
        i, f, g, o = primals.activations[where].to(accumulate).chunk(4, -1)
        c_t = primals.c[where]
        tanh_c = c_t.tanh()
        da = dh[:active] @ recurrent
        if gates_tangent is not None:
            da = da + gates_tangent[where].to(accumulate)
        if weight_hh_tangent is not None:
            da = da + h[:active].to(accumulate) @ weight_hh_tangent.to(accumulate).t()
        da_i, da_f, da_g, da_o = da.chunk(4, -1)
        di, df, do = da_i * i * (1 - i), da_f * f * (1 - f), da_o * o * (1 - o)
        dg = da_g * (1 - g * g)
        dc_t = df * c[:active] + f * dc[:active] + di * g + i * dg
        dh_t = do * tanh_c + o * (1 - tanh_c * tanh_c) * dc_t
        if weight_hr is not None:
            dh_t = dh_t @ weight_hr.to(accumulate).t()
            if weight_hr_tangent is not None:
                dh_t = dh_t + (o * tanh_c) @ weight_hr_tangent.to(accumulate).t()
        h, c = _update(h, primals.h[where], active), _update(c, c_t, active)
        dh, dc = _update(dh, dh_t, active), _update(dc, dc_t, active)
        dhs.append(dh_t.to(dtype))
        dcs.append(dc_t)
        d_activated.append(torch.cat([di, df, dg, do], -1).to(dtype))
    packed = batch_sizes is not None
    return RecurrenceForward(
        _in_order_of_time(dhs, packed, reverse),
        _in_order_of_time(dcs, packed, reverse),
        _in_order_of_time(d_activated, packed, reverse),
        dh.to(dtype),
        dc.to(dtype),
    )
