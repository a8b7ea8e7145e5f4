"""The LSTM recurrence in plain PyTorch: the fallback that is always right.

Same signature as `fused_lstm.lstm_recurrence`, any device, any floating dtype, differentiable any
number of times. Next to it stand its derivatives, written out: the reverse-mode recurrence that the
fused kernels implement, and the forward-mode one.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch (the sum of `batch_sizes`). Gate order i, f, g, o.

Packed and padded batches run through one loop. At each step the first `active` rows are computed
and the others keep their state: a sequence that has ended its final state, one that has not begun
(reversed time) its initial state. Rows of a padded batch that are beyond their `lengths` are
computed from zeros, and what comes out is not used.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lstm.devices import upload
from fused_lstm.modifiers import NO_MODIFIERS, Modifiers

__all__ = [
    "LSTMOutput",
    "RecurrenceForward",
    "lstm_recurrence",
    "new_cells",
    "packed_positions",
    "recurrence_backward",
    "recurrence_forward",
    "recurrence_jvp",
    "state_dtype",
    "states_before",
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
    """One step's rows, and what the modifiers do to them.

    Attributes:
        where: `tensor[where]` is [active, ...] for padded and packed tensors.
        active: how many rows of the batch take part.
        valid: [B, 1] bool, rows that are within their lengths; None for all.
        reset: [active, 1] bool, rows whose state is set to zero first; None for none.
        recurrent_mask: [active, P], or None.
        zoneout_h: [active, P] in the dtype of the state, or None.
        zoneout_c: [active, H] likewise.
        cell_clip: see `Modifiers`.
    """

    where: int | slice
    active: int
    valid: Tensor | None
    reset: Tensor | None
    recurrent_mask: Tensor | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None
    cell_clip: float | None

    def entering(self, state: Tensor) -> Tensor:
        """The state that enters the step: [B, ...] to [active, ...]."""
        return without(self.reset, state[: self.active])

    def entering_product(self, h: Tensor) -> Tensor:
        """Return h as it enters the product with W_hh."""
        return h if self.recurrent_mask is None else h * self.recurrent_mask

    def within(self, rows: Tensor) -> Tensor:
        """The rows, with zeros beyond their lengths."""
        return rows if self.valid is None else without(~self.valid, rows)

    def clipped(self, c: Tensor) -> Tensor:
        """A new cell state, clipped."""
        return c if self.cell_clip is None else c.clamp(-self.cell_clip, self.cell_clip)

    def passed(self, derivative: Tensor, clipped: Tensor) -> Tensor:
        """A derivative of `clipped`, by what was clipped: zero where the clip is reached."""
        if self.cell_clip is None:
            return derivative
        return without(~(clipped.abs() < self.cell_clip), derivative)

    def update(self, state: Tensor, new: Tensor) -> Tensor:
        """Replace the rows of a [B, ...] state that take part; the others keep theirs."""
        if self.valid is not None:
            return torch.where(self.valid, new, state)
        return new if self.active == state.shape[0] else torch.cat([new, state[self.active :]])


def without(where: Tensor | None, rows: Tensor) -> Tensor:
    """Zeros where a condition holds: by selection, which stops NaN."""
    return rows if where is None else torch.where(where, torch.zeros_like(rows), rows)


def mix(part: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """Compute part ⊙ old + (1 − part) ⊙ new."""
    return new if part is None else part * old + (1 - part) * new


def add(sum: Tensor, other: Tensor | None) -> Tensor:
    return sum if other is None else sum + other


def scaled(part: Tensor | None, tensor: Tensor) -> Tensor | None:
    """Compute part ⊙ tensor; None stands for zeros."""
    return None if part is None else part * tensor


def rest(part: Tensor | None, tensor: Tensor) -> Tensor:
    """Compute (1 − part) ⊙ tensor."""
    return tensor if part is None else (1 - part) * tensor


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


def time_steps(
    steps: int,
    batch: int,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
    dtype: torch.dtype,
) -> list[TimeStep]:
    """List the steps in the order in which they are computed.

    Args:
        steps: T, used for a padded batch.
        batch: B, used for a padded batch.
        batch_sizes: [T] int64 on the CPU, rows active at each step, or None for a padded batch.
        modifiers: of the recurrence.
        reverse: whether time runs from T-1 to 0.
        dtype: dtype of the state.
    """
    lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip = modifiers

    def step(t: int, where: int | slice, active: int) -> TimeStep:
        return TimeStep(
            where,
            active,
            None if lengths is None else (lengths > t).unsqueeze(-1),
            None if resets is None else resets[where].unsqueeze(-1),
            None if recurrent_mask is None else recurrent_mask[:active],
            None if zoneout_h is None else zoneout_h[where].to(dtype),
            None if zoneout_c is None else zoneout_c[where].to(dtype),
            cell_clip,
        )

    result: list[TimeStep] = []
    if batch_sizes is None:
        result = [step(t, t, batch) for t in range(steps)]
    else:
        start = 0
        for t, active in enumerate(batch_sizes.tolist()):
            result.append(step(t, slice(start, start + active), active))
            start += active
    return result[::-1] if reverse else result


def in_order_of_time(steps: list[Tensor], packed: bool, reverse: bool) -> Tensor:
    """Join per-step rows, listed in the order of computation, to [T, B, ...] or [N, ...]."""
    if reverse:
        steps = steps[::-1]
    # Not torch.stack, whose result is a view: users may write into it.
    return torch.cat(steps if packed else [step.unsqueeze(0) for step in steps])


def packed_positions(batch_sizes: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Time step and column of each of the [N] packed rows, on the CPU."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    step = torch.repeat_interleave(
        torch.arange(batch_sizes.shape[0]), batch_sizes, output_size=rows
    )
    return step, torch.arange(rows) - starts[step]


def states_before(
    states: Tensor,
    initial: Tensor,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
) -> Tensor:
    """Gather the state that enters each step, shaped as states: [T, B, F] or [N, F].

    Args:
        states: [T, B, F] or [N, F], h or c after each step.
        initial: [B, F], h0 or c0.
        batch_sizes: as in the forward pass, and so for the others.
        modifiers: a reset state is zero, and so is one that enters no valid step.
        reverse: whether time ran from T-1 to 0.
    """
    if batch_sizes is not None:
        before = _packed_states_before(states, initial, batch_sizes, reverse)
    elif reverse:
        before = torch.cat([states[1:], initial.unsqueeze(0)])
    else:
        before = torch.cat([initial.unsqueeze(0), states[:-1]])
    if modifiers.lengths is not None:
        t = torch.arange(states.shape[0], device=states.device).unsqueeze(-1)
        if reverse:
            first = (t == modifiers.lengths - 1).unsqueeze(-1)
            before = torch.where(first, initial, before)
        before = without((t >= modifiers.lengths).unsqueeze(-1), before)
    reset = None if modifiers.resets is None else modifiers.resets.unsqueeze(-1)
    return without(reset, before)


def _packed_states_before(
    states: Tensor, initial: Tensor, batch_sizes: Tensor, reverse: bool
) -> Tensor:
    """Row (t, b) follows row (t', b) of the step computed before, or initial[b] without one."""
    batch, steps = initial.shape[0], batch_sizes.shape[0]
    step, column = packed_positions(batch_sizes, states.shape[0])
    starts = batch_sizes.cumsum(0) - batch_sizes
    before = step + 1 if reverse else step - 1
    exists = (before >= 0) & (before < steps)
    before = before.clamp(0, steps - 1)
    source = torch.where(
        exists & (column < batch_sizes[before]), batch + starts[before] + column, column
    )
    return torch.cat([initial, states]).index_select(0, upload(source, states.device))


def new_cells(
    activations: Tensor,
    c: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
) -> Tensor:
    """Compute ĉ, the cell states before zoneout, of every row from what was saved."""
    if modifiers.zoneout_c is None:
        return c
    i, f, g, _ = activations.to(c.dtype).chunk(4, -1)
    c = f * states_before(c, c0.to(c.dtype), batch_sizes, modifiers, reverse) + i * g
    return c if modifiers.cell_clip is None else c.clamp(-modifiers.cell_clip, modifiers.cell_clip)


def lstm_recurrence(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    weight_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    cell_clip: float | None = None,
    reverse: bool = False,
) -> LSTMOutput:
    """Run the LSTM recurrence over a whole sequence in plain PyTorch.

    See `fused_lstm.lstm_recurrence` for the equations, the arguments and what is returned.
    """
    modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip)
    out = recurrence_forward(gates, weight_hh, h0, c0, weight_hr, batch_sizes, modifiers, reverse)
    return LSTMOutput(out.h, out.c, out.h_n, out.c_n)


def recurrence_forward(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    modifiers: Modifiers = NO_MODIFIERS,
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
        modifiers: see `fused_lstm.lstm_recurrence`.
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
    steps = time_steps(gates.shape[0], h0.shape[0], batch_sizes, modifiers, reverse, accumulate)
    for step in steps:
        h_before, c_before = step.entering(h), step.entering(c)
        operand = step.entering_product(h_before).to(accumulate)
        a = step.within(gates[step.where]).to(accumulate) + operand @ recurrent
        a_i, a_f, a_g, a_o = a.chunk(4, -1)
        i, f, g, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
        c_new = step.clipped(f * c_before + i * g)
        h_new = o * c_new.tanh()
        if projection is not None:
            h_new = h_new @ projection
        c_t = mix(step.zoneout_c, c_before, c_new)
        h_t = mix(step.zoneout_h, h_before.to(accumulate), h_new).to(dtype)
        h, c = step.update(h, h_t), step.update(c, c_t)
        hs.append(step.within(h_t))
        cs.append(step.within(c_t))
        activated.append(step.within(torch.cat([i, f, g, o], -1).to(dtype)))
    packed = batch_sizes is not None
    return RecurrenceForward(
        in_order_of_time(hs, packed, reverse),
        in_order_of_time(cs, packed, reverse),
        in_order_of_time(activated, packed, reverse),
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
    modifiers: Modifiers = NO_MODIFIERS,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run the recurrence's gradient from the last step to the first, in differentiable operations.

    In the notation of `fused_lstm.lstm_recurrence`, with m_t = o ⊙ tanh(ĉ_t) and δ for the
    derivative of the loss; what only a modifier brings stands in brackets:

        δh_t = grad_h_t + carried_h         (carried_h begins as grad_h_n)
        δc_t = grad_c_t + carried_c         (carried_c begins as grad_c_n)
        δĥ_t = [(1 − z_h) ⊙] δh_t
        δm_t = δĥ_t, or δĥ_t·W_hr
        δĉ_t = [(1 − z_c) ⊙] δc_t + δm_t ⊙ o ⊙ (1 − tanh²(ĉ_t))     [0 where ĉ_t was clipped]
        δa_i = δĉ_t ⊙ g ⊙ i(1 − i)      δa_f = δĉ_t ⊙ c_{t−1} ⊙ f(1 − f)
        δa_g = δĉ_t ⊙ i ⊙ (1 − g²)      δa_o = δm_t ⊙ tanh(ĉ_t) ⊙ o(1 − o)
        carried_h = [mask ⊙] δa·W_hh [+ z_h ⊙ δh_t]                 [0 where t was reset]
        carried_c = δĉ_t ⊙ f [+ z_c ⊙ δc_t]                         [0 where t was reset]

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
        modifiers: as in the forward pass.
        reverse: as in the forward pass.

    Returns:
        grad_gates like gates, grad_h0 [B, P], grad_c0 [B, H], and, where there is a projection,
        δĥ of all rows [T, B, P] or [N, P] from which weight_hr's gradient follows (else None).
    """
    dtype, accumulate = activations.dtype, state_dtype(activations.dtype)
    batch, hidden = c0.shape
    features = weight_hh.shape[1]
    recurrent = weight_hh.to(accumulate)
    projection = None if weight_hr is None else weight_hr.to(accumulate)
    steps = time_steps(activations.shape[0], batch, batch_sizes, modifiers, reverse, accumulate)

    cell = c0.to(accumulate)
    cells_before: list[Tensor] = []
    for step in steps:
        cells_before.append(step.entering(cell))
        cell = step.update(cell, c[step.where])

    def start(grad: Tensor | None, width: int) -> Tensor:
        if grad is None:
            return activations.new_zeros((batch, width), dtype=accumulate)
        return grad.to(accumulate)

    dh, dc = start(grad_h_n, features), start(grad_c_n, hidden)
    grad_gates: list[Tensor] = []
    grad_hs: list[Tensor] = []
    for step, c_before in zip(reversed(steps), reversed(cells_before), strict=True):
        where = step.where
        i, f, g, o = activations[where].to(accumulate).chunk(4, -1)
        c_new = c[where]
        if step.zoneout_c is not None:
            c_new = step.clipped(f * c_before + i * g)
        tanh_c = c_new.tanh()
        dh_t, dc_t = dh[: step.active], dc[: step.active]
        if grad_h is not None:
            dh_t = dh_t + step.within(grad_h[where]).to(accumulate)
        if grad_c is not None:
            dc_t = dc_t + step.within(grad_c[where])
        dh_new = rest(step.zoneout_h, dh_t)
        dm = dh_new if projection is None else dh_new @ projection
        dc_new = rest(step.zoneout_c, dc_t) + dm * o * (1 - tanh_c * tanh_c)
        dc_new = step.passed(dc_new, c_new)
        d_activated = torch.cat([dc_new * g, dc_new * c_before, dc_new * i, dm * tanh_c], -1)
        if grad_activations is not None:
            d_activated = d_activated + step.within(grad_activations[where]).to(accumulate)
        slope = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
        da = step.within(d_activated * slope)
        dh_before = add(step.entering_product(da @ recurrent), scaled(step.zoneout_h, dh_t))
        dc_before = add(dc_new * f, scaled(step.zoneout_c, dc_t))
        dh = step.update(dh, without(step.reset, dh_before))
        dc = step.update(dc, without(step.reset, dc_before))
        grad_gates.append(da.to(dtype))
        if projection is not None:
            grad_hs.append(step.within(dh_new).to(dtype))
    packed = batch_sizes is not None
    return (
        in_order_of_time(grad_gates, packed, not reverse),
        dh.to(dtype),
        dc.to(dtype),
        None if projection is None else in_order_of_time(grad_hs, packed, not reverse),
    )


def recurrence_jvp(
    primals: RecurrenceForward,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
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
        modifiers: as in the forward pass.
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
    steps = time_steps(
        primals.activations.shape[0], h0.shape[0], batch_sizes, modifiers, reverse, accumulate
    )
    for step in steps:
        where = step.where
        i, f, g, o = primals.activations[where].to(accumulate).chunk(4, -1)
        c_before, c_new = step.entering(c), primals.c[where]
        if step.zoneout_c is not None:
            c_new = step.clipped(f * c_before + i * g)
        tanh_c = c_new.tanh()
        dh_before, dc_before = step.entering(dh), step.entering(dc)
        da = step.entering_product(dh_before) @ recurrent
        if gates_tangent is not None:
            da = da + step.within(gates_tangent[where]).to(accumulate)
        if weight_hh_tangent is not None:
            operand = step.entering_product(step.entering(h)).to(accumulate)
            da = da + operand @ weight_hh_tangent.to(accumulate).t()
        da_i, da_f, da_g, da_o = da.chunk(4, -1)
        di, df, do = da_i * i * (1 - i), da_f * f * (1 - f), da_o * o * (1 - o)
        dg = da_g * (1 - g * g)
        dc_new = step.passed(df * c_before + f * dc_before + di * g + i * dg, c_new)
        dh_new = do * tanh_c + o * (1 - tanh_c * tanh_c) * dc_new
        if weight_hr is not None:
            dh_new = dh_new @ weight_hr.to(accumulate).t()
            if weight_hr_tangent is not None:
                dh_new = dh_new + (o * tanh_c) @ weight_hr_tangent.to(accumulate).t()
        dh_t = mix(step.zoneout_h, dh_before, dh_new)
        dc_t = mix(step.zoneout_c, dc_before, dc_new)
        h, c = step.update(h, primals.h[where]), step.update(c, primals.c[where])
        dh, dc = step.update(dh, dh_t), step.update(dc, dc_t)
        dhs.append(step.within(dh_t).to(dtype))
        dcs.append(step.within(dc_t))
        d_activated.append(step.within(torch.cat([di, df, dg, do], -1)).to(dtype))
    packed = batch_sizes is not None
    return RecurrenceForward(
        in_order_of_time(dhs, packed, reverse),
        in_order_of_time(dcs, packed, reverse),
        in_order_of_time(d_activated, packed, reverse),
        dh.to(dtype),
        dc.to(dtype),
    )
