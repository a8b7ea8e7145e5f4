"""The layer-normalized recurrence in plain PyTorch, and its gradient written out.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch. Gate order i, f, g, o.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lstm.modifiers import Modifiers
from fused_lstm.reference import (
    add,
    in_order_of_time,
    mix,
    rest,
    scaled,
    state_dtype,
    time_steps,
    without,
)

__all__ = [
    "LayerNorm",
    "LayerNormForward",
    "LayerNormGradients",
    "layer_norm_backward",
    "layer_norm_forward",
    "normalize",
]


class LayerNorm(NamedTuple):
    """What normalizes one recurrence.

    Attributes:
        gain_hh: [4H], of h·W_hhᵀ.
        gain_c: [H], of the cell state.
        bias_c: [H] or None.
        eps: added to the variances.
    """

    gain_hh: Tensor
    gain_c: Tensor
    bias_c: Tensor | None
    eps: float


class LayerNormForward(NamedTuple):
    """What a normalized recurrence computes.

    Attributes:
        h: [T, B, P] or [N, P], in the dtype of the gates.
        c: [T, B, H] or [N, H], in the dtype of states.
        activations: [T, B, 4H] or [N, 4H], σ(a_i), σ(a_f), tanh(a_g), σ(a_o), in that of the gates.
        normalized: like activations, LN(h_{t−1}·W_hhᵀ).
        rstd: [T, B] or [N], 1 / √(var + eps) of h_{t−1}·W_hhᵀ, in the dtype of states.
        h_n: [B, P].
        c_n: [B, H].
    """

    h: Tensor
    c: Tensor
    activations: Tensor
    normalized: Tensor
    rstd: Tensor
    h_n: Tensor
    c_n: Tensor


class LayerNormGradients(NamedTuple):
    """Gradients of a normalized recurrence.

    Attributes:
        gates: like gates, δa.
        product: like gates, of h_{t−1}·W_hhᵀ.
        z: like c, of gain_c ⊙ LN(ĉ) + bias_c.
        h0: [B, P].
        c0: [B, H].
        h: δĥ of all rows, like h, where there is a projection; else None.
    """

    gates: Tensor
    product: Tensor
    z: Tensor
    h0: Tensor
    c0: Tensor
    h: Tensor | None


def normalize(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LN(rows) = (rows − mean) ⊙ rstd over the last dimension, and rstd [..., 1]."""
    centered = rows - rows.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centered * rstd, rstd


def _normalize_backward(grad: Tensor, normalized: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of what was normalized."""
    along = (grad * normalized).mean(-1, keepdim=True)
    return rstd * (grad - grad.mean(-1, keepdim=True) - normalized * along)


def layer_norm_forward(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
    norm: LayerNorm,
) -> LayerNormForward:
    """Run the layer-normalized recurrence in operations that can be differentiated.

    As `fused_lstm.lstm_recurrence`, with LN(z) = (z − mean(z)) / √(var(z) + eps) over all features
    and (Ba, Kiros & Hinton 2016, "Layer normalization", arXiv:1607.06450, equations 20 to 22)

        a_t = gates_t + gain_hh ⊙ LN(h_{t−1}·W_hhᵀ)
        ĥ_t = o ⊙ tanh(gain_c ⊙ LN(ĉ_t) + bias_c), or that times W_hrᵀ

    Args:
        gates: [T, B, 4H] or [N, 4H], gain_ih ⊙ LN(x·W_ihᵀ) + b_ih + b_hh.
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: see `fused_lstm.lstm_recurrence`.
        reverse: whether time runs backwards.
        norm: in the dtype of gates.
    """
    dtype, wide = gates.dtype, state_dtype(gates.dtype)
    recurrent = weight_hh.to(wide).t()
    projection = None if weight_hr is None else weight_hr.to(wide).t()
    gain_hh, gain_c = norm.gain_hh.to(wide), norm.gain_c.to(wide)
    bias_c = None if norm.bias_c is None else norm.bias_c.to(wide)
    h, c = h0, c0.to(wide)
    hs: list[Tensor] = []
    cs: list[Tensor] = []
    activated: list[Tensor] = []
    normalized: list[Tensor] = []
    rstds: list[Tensor] = []
    for step in time_steps(gates.shape[0], h0.shape[0], batch_sizes, modifiers, reverse, wide):
        h_before, c_before = step.entering(h), step.entering(c)
        product = step.entering_product(h_before).to(wide) @ recurrent
        n, rstd = normalize(product, norm.eps)
        a_i, a_f, a_g, a_o = (step.within(gates[step.where]).to(wide) + gain_hh * n).chunk(4, -1)
        i, f, g, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
        c_new = step.clipped(f * c_before + i * g)
        h_new = o * F.layer_norm(c_new, c_new.shape[-1:], gain_c, bias_c, norm.eps).tanh()
        if projection is not None:
            h_new = h_new @ projection
        c_t = mix(step.zoneout_c, c_before, c_new)
        h_t = mix(step.zoneout_h, h_before.to(wide), h_new).to(dtype)
        h, c = step.update(h, h_t), step.update(c, c_t)
        hs.append(step.within(h_t))
        cs.append(step.within(c_t))
        activated.append(step.within(torch.cat([i, f, g, o], -1).to(dtype)))
        normalized.append(step.within(n.to(dtype)))
        rstds.append(step.within(rstd).squeeze(-1))
    packed = batch_sizes is not None
    return LayerNormForward(
        in_order_of_time(hs, packed, reverse),
        in_order_of_time(cs, packed, reverse),
        in_order_of_time(activated, packed, reverse),
        in_order_of_time(normalized, packed, reverse),
        in_order_of_time(rstds, packed, reverse),
        h,
        c.to(dtype),
    )


def layer_norm_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    activations: Tensor,
    c: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
    norm: LayerNorm,
) -> LayerNormGradients:
    """Run the normalized recurrence's gradient from the last step to the first.

    As `reference.recurrence_backward`, but for

        δz   = δm ⊙ o ⊙ (1 − tanh²(z)),   z = gain_c ⊙ LN(ĉ) + bias_c
        δĉ   = [(1 − z_c) ⊙] δc_t + LN'(gain_c ⊙ δz)                [0 where ĉ was clipped]
        δa_o = δm ⊙ tanh(z) ⊙ o(1 − o)
        δp   = LN'(gain_hh ⊙ δa),         p = h_{t−1}·W_hhᵀ
        carried_h = [mask ⊙] δp·W_hh [+ z_h ⊙ δh_t]                 [0 where t was reset]

    where LN'(δ) = rstd·(δ − mean(δ) − n·mean(δ ⊙ n)) is the gradient of n = LN(·).

    Args:
        grad_h: like h, or None for zeros; so for the other gradients.
        grad_c: like c.
        grad_h_n: [B, P].
        grad_c_n: [B, H].
        activations: as `layer_norm_forward` returned them, and so for the next three.
        c: see there.
        normalized: see there.
        rstd: see there.
        weight_hh: as in the forward pass, and so for what follows.
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] or None.
        modifiers: see there.
        reverse: see there.
        norm: see there.
    """
    dtype, wide = activations.dtype, state_dtype(activations.dtype)
    batch, hidden = c0.shape
    recurrent = weight_hh.to(wide)
    projection = None if weight_hr is None else weight_hr.to(wide)
    gain_hh, gain_c = norm.gain_hh.to(wide), norm.gain_c.to(wide)
    bias_c = 0 if norm.bias_c is None else norm.bias_c.to(wide)
    steps = time_steps(activations.shape[0], batch, batch_sizes, modifiers, reverse, wide)

    cell = c0.to(wide)
    cells_before: list[Tensor] = []
    for step in steps:
        cells_before.append(step.entering(cell))
        cell = step.update(cell, c[step.where])

    def start(grad: Tensor | None, width: int) -> Tensor:
        if grad is None:
            return activations.new_zeros((batch, width), dtype=wide)
        return grad.to(wide)

    dh, dc = start(grad_h_n, weight_hh.shape[1]), start(grad_c_n, hidden)
    grad_gates: list[Tensor] = []
    grad_products: list[Tensor] = []
    grad_zs: list[Tensor] = []
    grad_hs: list[Tensor] = []
    for step, c_before in zip(reversed(steps), reversed(cells_before), strict=True):
        where = step.where
        i, f, g, o = activations[where].to(wide).chunk(4, -1)
        c_new = c[where]
        if step.zoneout_c is not None:
            c_new = step.clipped(f * c_before + i * g)
        n_c, rstd_c = normalize(c_new, norm.eps)
        tanh_z = (gain_c * n_c + bias_c).tanh()
        dh_t, dc_t = dh[: step.active], dc[: step.active]
        if grad_h is not None:
            dh_t = dh_t + step.within(grad_h[where]).to(wide)
        if grad_c is not None:
            dc_t = dc_t + step.within(grad_c[where])
        dh_new = rest(step.zoneout_h, dh_t)
        dm = dh_new if projection is None else dh_new @ projection
        dz = dm * o * (1 - tanh_z * tanh_z)
        dc_new = rest(step.zoneout_c, dc_t) + _normalize_backward(dz * gain_c, n_c, rstd_c)
        dc_new = step.passed(dc_new, c_new)
        d_activated = torch.cat([dc_new * g, dc_new * c_before, dc_new * i, dm * tanh_z], -1)
        slope = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
        da = step.within(d_activated * slope)
        n = normalized[where].to(wide)
        dp = _normalize_backward(da * gain_hh, n, rstd[where].unsqueeze(-1))
        dh_before = add(step.entering_product(dp @ recurrent), scaled(step.zoneout_h, dh_t))
        dc_before = add(dc_new * f, scaled(step.zoneout_c, dc_t))
        dh = step.update(dh, without(step.reset, dh_before))
        dc = step.update(dc, without(step.reset, dc_before))
        grad_gates.append(da.to(dtype))
        grad_products.append(step.within(dp).to(dtype))
        grad_zs.append(step.within(dz))
        grad_hs.append(step.within(dh_new).to(dtype))
    packed = batch_sizes is not None
    return LayerNormGradients(
        in_order_of_time(grad_gates, packed, not reverse),
        in_order_of_time(grad_products, packed, not reverse),
        in_order_of_time(grad_zs, packed, not reverse),
        dh.to(dtype),
        dc.to(dtype),
        None if projection is None else in_order_of_time(grad_hs, packed, not reverse),
    )
