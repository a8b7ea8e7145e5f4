"""The mathematics of one cell update, forward and backward, shared by every kernel.

Tiles are float32 [BLOCK_B, BLOCK_H] where nothing else is said; gate order i, f, g, o.
"""

import triton
import triton.language as tl

from .elementwise import INTERPRETED, round_to, sigmoid, tanh


@triton.jit
def dot(a, b, accumulator, INPUT_PRECISION: tl.constexpr):
    """Returns accumulator + a b, summed in float32; a [M, K] and b [K, N] in the input dtype."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter would multiply bfloat16's bit patterns as integers. In float32 the
        # products of two bfloat16 numbers are exact, as they are on a tensor core.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION)


@triton.jit
def takes_part(rows, n, t, lengths, HAS_LENGTHS: tl.constexpr):
    """Whether a row takes part in the step at time t.

    It does if it is one of the first n, those active in the step (0 where there is no such step),
    and, if HAS_LENGTHS, t is below its length. rows and lengths: [BLOCK_B, 1], int32.
    """
    active = rows < n
    if HAS_LENGTHS:
        active = active & (tl.cast(t, tl.int32) < lengths)
    return active


@triton.jit
def entering_product(h, recurrent_mask, HAS_RECURRENT_MASK: tl.constexpr):
    """What is multiplied by W_hh^T: h, or h times the recurrent mask, rounded to h's dtype."""
    if HAS_RECURRENT_MASK:
        h = round_to(h.to(tl.float32) * recurrent_mask.to(tl.float32), h.dtype)
    return h


@triton.jit
def candidate_cell(i, f, g, c_prev, cell_clip, HAS_CELL_CLIP: tl.constexpr):
    """The new cell state before zoneout: f * c_prev + i * g, within +-cell_clip."""
    c = f * c_prev + i * g
    if HAS_CELL_CLIP:
        # Comparisons with NaN are false: a NaN stays.
        c = tl.where(c > cell_clip, cell_clip, c)
        c = tl.where(c < -cell_clip, -cell_clip, c)
    return c


@triton.jit
def lstm_cell_forward(
    a_i,
    a_f,
    a_g,
    a_o,
    h_prev,
    c_prev,
    zoneout_h,
    zoneout_c,
    cell_clip,
    HAS_ZONEOUT_H: tl.constexpr,
    HAS_ZONEOUT_C: tl.constexpr,
    HAS_CELL_CLIP: tl.constexpr,
):
    """One step of the recurrence from the gates before activation.

    i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
    c = clip(f * c_prev + i * g)                  clip: to +-cell_clip, if HAS_CELL_CLIP
    h = o * tanh(c)
    c = zoneout_c * c_prev + (1 - zoneout_c) * c  if HAS_ZONEOUT_C
    h = zoneout_h * h_prev + (1 - zoneout_h) * h  if HAS_ZONEOUT_H

    h_prev and the zoneout tiles may be of any dtype, and anything where they are not used.

    Returns:
        i, f, g, o, c, h.
    """
    i = sigmoid(a_i)
    f = sigmoid(a_f)
    g = tanh(a_g)
    o = sigmoid(a_o)
    c = candidate_cell(i, f, g, c_prev, cell_clip, HAS_CELL_CLIP)
    h = o * tanh(c)
    if HAS_ZONEOUT_C:
        z = zoneout_c.to(tl.float32)
        c = z * c_prev + (1.0 - z) * c
    if HAS_ZONEOUT_H:
        z = zoneout_h.to(tl.float32)
        h = z * h_prev.to(tl.float32) + (1.0 - z) * h
    return i, f, g, o, c, h


@triton.jit
def lstm_cell_backward(
    dh,
    dc,
    i,
    f,
    g,
    o,
    c,
    c_prev,
    zoneout_h,
    zoneout_c,
    cell_clip,
    HAS_ZONEOUT_H: tl.constexpr,
    HAS_ZONEOUT_C: tl.constexpr,
    HAS_CELL_CLIP: tl.constexpr,
):
    """Gradients of one step, from those of its h (dh) and of its c by all later paths (dc).

    dh_new  = (1 - zoneout_h) * dh;  dc_new = (1 - zoneout_c) * dc
    dc_new += dh_new * o * (1 - tanh(c)**2), then 0 unless |c| < cell_clip
    da_i  = dc_new * g * i * (1 - i)
    da_f  = dc_new * c_prev * f * (1 - f)
    da_g  = dc_new * i * (1 - g**2)
    da_o  = dh_new * tanh(c) * o * (1 - o)
    dc_prev = dc_new * f + zoneout_c * dc
    dh_kept = zoneout_h * dh

    Under HAS_ZONEOUT_C the c of these equations is the candidate, computed again; else it is the
    saved one. Without zoneout or clip their terms are not there.

    Returns:
        da_i, da_f, da_g, da_o, dc_prev, dh_kept: the last is what reaches h_prev by zoneout, past
        the gates (dh itself, of no meaning, without HAS_ZONEOUT_H).
    """
    dh_kept = dh
    dc_kept = dc
    if HAS_ZONEOUT_H:
        z = zoneout_h.to(tl.float32)
        dh_kept = z * dh
        dh = (1.0 - z) * dh
    if HAS_ZONEOUT_C:
        z = zoneout_c.to(tl.float32)
        dc_kept = z * dc
        dc = (1.0 - z) * dc
        c = candidate_cell(i, f, g, c_prev, cell_clip, HAS_CELL_CLIP)
    tanh_c = tanh(c)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    if HAS_CELL_CLIP:
        dc = tl.where(tl.abs(c) < cell_clip, dc, 0.0)
    da_i = dc * g * (i * (1.0 - i))
    da_f = dc * c_prev * (f * (1.0 - f))
    da_g = dc * i * (1.0 - g * g)
    da_o = dh * tanh_c * (o * (1.0 - o))
    dc_prev = dc * f
    if HAS_ZONEOUT_C:
        dc_prev = dc_prev + dc_kept
    return da_i, da_f, da_g, da_o, dc_prev, dh_kept


@triton.jit
def zero_where_not(active, i, f, g, o):
    """The i, f, g, o tiles with zeros, whatever was there, in rows that are not active."""
    i = tl.where(active, i, 0.0)
    f = tl.where(active, f, 0.0)
    g = tl.where(active, g, 0.0)
    o = tl.where(active, o, 0.0)
    return i, f, g, o


@triton.jit
def load_gate_tiles(pointers, H, mask):
    """The i, f, g, o tiles of gate-major rows; `pointers` addresses the i tile."""
    i = tl.load(pointers, mask=mask, other=0.0)
    f = tl.load(pointers + H, mask=mask, other=0.0)
    g = tl.load(pointers + 2 * H, mask=mask, other=0.0)
    o = tl.load(pointers + 3 * H, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def store_gate_tiles(pointers, H, i, f, g, o, mask):
    """Stores i, f, g, o tiles into gate-major rows, rounded to the element type there."""
    dtype = pointers.dtype.element_ty
    tl.store(pointers, round_to(i, dtype), mask=mask)
    tl.store(pointers + H, round_to(f, dtype), mask=mask)
    tl.store(pointers + 2 * H, round_to(g, dtype), mask=mask)
    tl.store(pointers + 3 * H, round_to(o, dtype), mask=mask)
