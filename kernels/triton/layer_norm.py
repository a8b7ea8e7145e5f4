"""The layer-normalized recurrence (Ba, Kiros & Hinton 2016): kernels and their launches.

A time step is two launches, for any number of hidden units. A product kernel forms tiles of
h W_hh^T (backward: of its gradient times W_hh) in float32; a row kernel then owns whole rows, for
the mean and variance that their normalization needs, and does all the rest. Between them a product
of [B, 4H] (backward: [B, H]) passes through memory.

LN(x) = (x - mean(x)) * rstd(x) with rstd(x) = 1 / sqrt(mean((x - mean(x))^2) + eps), over a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import KernelInterface

from .cell import (
    candidate_cell,
    dot,
    entering_product,
    load_gate_tiles,
    store_gate_tiles,
    takes_part,
    zero_where_not,
)
from .config import Direction, math_of
from .elementwise import round_to, sigmoid, tanh
from .launch import _arch, _modifiers, _on_device, _row_strides, _steps, _unit_columns

__all__ = ["layer_norm_backward", "layer_norm_forward"]


@triton.jit
def row_mean(x, H):
    """[BLOCK_B, 1], the mean of each row's H elements; x holds zeros beyond them."""
    return tl.sum(x, axis=1, keep_dims=True) / tl.cast(H, tl.float32)


@triton.jit
def normalize(x, in_columns, H, eps):
    """LN of each row's H elements, with zeros beyond them, and its rstd [BLOCK_B, 1]."""
    # Beyond H an x of zero would be -mean.
    x = tl.where(in_columns, x - row_mean(x, H), 0.0)
    rstd = 1.0 / tl.sqrt_rn(row_mean(x * x, H) + eps)
    return x * rstd, rstd


@triton.jit
def normalize_gates(i, f, g, o, in_columns, H, eps):
    """LN of each row's 4H elements, in tiles of H, and its rstd [BLOCK_B, 1]."""
    mean = 0.25 * row_mean((i + f) + (g + o), H)
    i = tl.where(in_columns, i - mean, 0.0)
    f = tl.where(in_columns, f - mean, 0.0)
    g = tl.where(in_columns, g - mean, 0.0)
    o = tl.where(in_columns, o - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(0.25 * row_mean((i * i + f * f) + (g * g + o * o), H) + eps)
    return i * rstd, f * rstd, g * rstd, o * rstd, rstd


@triton.jit
def normalize_backward(grad, normalized, rstd, H):
    """The gradient of x, from that of normalized = LN(x): both with zeros beyond H."""
    along = row_mean(grad * normalized, H)
    return rstd * (grad - row_mean(grad, H) - normalized * along)


@triton.jit(do_not_specialize=["t", "t_prev", "row_prev", "n", "n_prev"])
def layer_norm_forward_product_kernel(
    weight_hh_ptr,
    h0_ptr,
    h_ptr,
    product_ptr,
    t,
    t_prev,
    row_prev,
    n,
    n_prev,
    H,
    weight_stride_row,
    weight_stride_col,
    h0_stride_b,
    lengths_ptr,
    resets_ptr,
    recurrent_mask_ptr,
    resets_stride_t,
    resets_stride_b,
    recurrent_mask_stride_b,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_RECURRENT_MASK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The product of one step of the forward recurrence, before its normalization.

        p = (h' * recurrent_mask) W_hh^T              with h' = h_{t-1}, or zero where t is reset

    HAS_RESETS and HAS_RECURRENT_MASK put those two there. If HAS_LENGTHS, p is zero in the rows
    that are past theirs.

    Program (q, s) owns batch rows q*BLOCK_B ... and columns s*BLOCK_N ... of the 4H.

    Tensors:
        weight_hh_ptr: [4H, H], any strides.
        h0_ptr: [B, H] initial state.
        h_ptr: [N, H] states; the step before wrote rows `row_prev` ... `row_prev` + n_prev.
        product_ptr: [B, 4H] float32, p.
        lengths_ptr: [B] int64, read if HAS_LENGTHS.
        resets_ptr: [T, B] bool, read if HAS_RESETS; the step's begin at t * stride_t.
        recurrent_mask_ptr: [B, H], read if HAS_RECURRENT_MASK.
        t, t_prev: place in time of this step and of the one run before it; in a packed sequence,
            where the row alone tells the place, their first rows.
        n, n_prev: rows active in them; n_prev is 0 at the first.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rows_64 = rows.to(tl.int64)

    # Anything will do for what is not read.
    lengths = rows
    if HAS_LENGTHS:
        lengths = tl.load(lengths_ptr + rows, mask=rows < n, other=0).to(tl.int32)
    # The rows that have a state to begin with; for the others the loads put zeros.
    has_state = takes_part(rows, n, t, lengths, HAS_LENGTHS)
    if HAS_RESETS:
        offsets = tl.cast(t, tl.int64) * resets_stride_t + rows_64 * resets_stride_b
        reset = tl.load(resets_ptr + offsets, mask=has_state, other=0) != 0
        has_state = has_state & (reset == 0)

    inner_row = tl.arange(0, BLOCK_K)[None, :]
    inner = tl.arange(0, BLOCK_K)[:, None]
    # A row that begins with this step has no row in the step before: it reads h0.
    h_ptrs = inner_row + tl.where(
        takes_part(rows, n_prev, t_prev, lengths, HAS_LENGTHS),
        h_ptr + (rows_64 + row_prev) * H,
        h0_ptr + rows_64 * h0_stride_b,
    )
    recurrent_mask_ptrs = recurrent_mask_ptr + rows_64 * recurrent_mask_stride_b + inner_row
    weight_ptrs = (
        weight_hh_ptr
        + columns.to(tl.int64) * weight_stride_row
        + inner.to(tl.int64) * weight_stride_col
    )
    weight_block = BLOCK_K * tl.cast(weight_stride_col, tl.int64)
    in_columns = columns < 4 * H

    product = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for k in range(0, H, BLOCK_K):
        in_rows = has_state & (inner_row < H - k)
        h = tl.load(h_ptrs, mask=in_rows, other=0.0)
        if HAS_RECURRENT_MASK:
            recurrent_mask = tl.load(recurrent_mask_ptrs, mask=in_rows, other=0.0)
            h = entering_product(h, recurrent_mask, HAS_RECURRENT_MASK)
            recurrent_mask_ptrs += BLOCK_K
        w = tl.load(weight_ptrs, mask=(inner < H - k) & in_columns, other=0.0)
        product = dot(h, w, product, INPUT_PRECISION)
        h_ptrs += BLOCK_K
        weight_ptrs += weight_block
    offsets = rows_64 * (4 * H) + columns
    tl.store(product_ptr + offsets, product, mask=(rows < n) & in_columns)


@triton.jit(
    do_not_specialize=[
        "t", "t_prev", "t_next", "row", "row_prev", "n", "n_prev", "n_next", "eps", "cell_clip"
    ]
)  # fmt: skip
def layer_norm_forward_row_kernel(
    gates_ptr,
    product_ptr,
    gain_hh_ptr,
    gain_c_ptr,
    bias_c_ptr,
    h0_ptr,
    c0_ptr,
    h_ptr,
    c_ptr,
    activations_ptr,
    normalized_ptr,
    rstd_ptr,
    h_n_ptr,
    c_n_ptr,
    t,
    t_prev,
    t_next,
    row,
    row_prev,
    n,
    n_prev,
    n_next,
    H,
    gates_stride_t,
    gates_stride_b,
    h0_stride_b,
    c0_stride_b,
    eps,
    lengths_ptr,
    resets_ptr,
    zoneout_h_ptr,
    zoneout_c_ptr,
    resets_stride_t,
    resets_stride_b,
    zoneout_h_stride_t,
    zoneout_h_stride_b,
    zoneout_c_stride_t,
    zoneout_c_stride_b,
    cell_clip,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS_C: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_ZONEOUT_H: tl.constexpr,
    HAS_ZONEOUT_C: tl.constexpr,
    HAS_CELL_CLIP: tl.constexpr,
):
    """One step of the forward recurrence, from its product p = h_{t-1} W_hh^T on.

        a_t = gates_t + gain_hh * LN(p)               LN over all 4H
        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(gain_c * LN(c_t) + bias_c)     LN over all H; bias_c if HAS_BIAS_C

    Modified, each where its flag is set:

        HAS_LENGTHS: a row takes part while t < length. Elsewhere it keeps its state, stores zeros
            as its results, and its gates are not read.
        HAS_RESETS: h_{t-1} and c_{t-1} are zero, whatever they held, where resets_t is true.
        HAS_CELL_CLIP: the new c_t is held within +-cell_clip, before its normalization.
        HAS_ZONEOUT_C, HAS_ZONEOUT_H: after both are computed,
            c_t = z * c_{t-1} + (1 - z) * c_t with z of zoneout_c, and h_t likewise.

    Program q owns batch rows q*BLOCK_B ... and all H <= BLOCK_H hidden units: a row's mean and
    variance need nobody else.

    Tensors:
        gates_ptr: [T, B, 4H] normalized input projections with biases; the step's begin at
            t * stride_t.
        product_ptr: [B, 4H] float32, p.
        gain_hh_ptr: [4H].
        gain_c_ptr, bias_c_ptr: [H].
        h0_ptr, c0_ptr: [B, H] initial state; h0 read if HAS_ZONEOUT_H.
        h_ptr: [N, H] output states; this step writes rows `row` ... `row` + n, like all that
            follow, and reads those from row_prev.
        c_ptr: [N, H] float32 cell states.
        activations_ptr: [N, 4H] gates after activation, stored if SAVE.
        normalized_ptr: [N, 4H] LN(p), stored if SAVE.
        rstd_ptr: [N] float32, rstd(p), stored if SAVE.
        h_n_ptr, c_n_ptr: [B, H] final state, stored for the rows whose last step this is.
        lengths_ptr: [B] int64, read if HAS_LENGTHS.
        resets_ptr: [T, B] bool, read if HAS_RESETS; the step's begin at t * stride_t.
        zoneout_h_ptr, zoneout_c_ptr: [T, B, H], each read if its flag is set; the step's begin at
            t * stride_t.
        t, t_prev, t_next: place in time of this step, of the one run before it, of the one after;
            in a packed sequence their first rows.
        n, n_prev, n_next: rows active in this step, in the one run before it (0 at the first),
            in the one run after it (0 at the last).
        row_prev: first row that the step before wrote.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    in_columns = columns < H
    t = tl.cast(t, tl.int64)
    row = tl.cast(row, tl.int64)
    dtype = h_ptr.dtype.element_ty

    # Anything will do for what is not read.
    lengths = rows
    if HAS_LENGTHS:
        lengths = tl.load(lengths_ptr + rows, mask=rows < n, other=0).to(tl.int32)
    active_row = takes_part(rows, n, t, lengths, HAS_LENGTHS)
    active = active_row & in_columns
    # What has a state to begin with; for all else the loads put zeros.
    has_state = active
    if HAS_RESETS:
        offsets = t * resets_stride_t + rows_64 * resets_stride_b
        reset = tl.load(resets_ptr + offsets, mask=active_row, other=0) != 0
        has_state = active & (reset == 0)
    # A row that begins with this step has no row in the step before: it reads the initial state.
    goes_on = takes_part(rows, n_prev, t_prev, lengths, HAS_LENGTHS)
    begins = goes_on == 0
    offsets_prev = (rows_64 + row_prev) * H + columns
    c_prev = tl.load(c_ptr + offsets_prev, mask=has_state & goes_on, other=0.0)
    c0_ptrs = c0_ptr + rows_64 * c0_stride_b + columns
    c0 = tl.load(c0_ptrs, mask=has_state & begins, other=0.0)
    c_prev = tl.where(begins, c0.to(tl.float32), c_prev)

    product = product_ptr + rows_64 * (4 * H) + columns
    p_i, p_f, p_g, p_o = load_gate_tiles(product, H, active)
    gates = gates_ptr + t * gates_stride_t + rows_64 * gates_stride_b + columns
    gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates, H, active)
    gain_i, gain_f, gain_g, gain_o = load_gate_tiles(gain_hh_ptr + columns, H, in_columns)
    n_i, n_f, n_g, n_o, rstd = normalize_gates(p_i, p_f, p_g, p_o, in_columns, H, eps)
    i = sigmoid(gates_i.to(tl.float32) + gain_i.to(tl.float32) * n_i)
    f = sigmoid(gates_f.to(tl.float32) + gain_f.to(tl.float32) * n_f)
    g = tanh(gates_g.to(tl.float32) + gain_g.to(tl.float32) * n_g)
    o = sigmoid(gates_o.to(tl.float32) + gain_o.to(tl.float32) * n_o)

    # Zero beyond H, where g and c_prev are.
    c = candidate_cell(i, f, g, c_prev, cell_clip, HAS_CELL_CLIP)
    n_c, _ = normalize(c, in_columns, H, eps)
    z = n_c * tl.load(gain_c_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    if HAS_BIAS_C:
        z += tl.load(bias_c_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    h = o * tanh(z)
    if HAS_ZONEOUT_C:
        offsets = t * zoneout_c_stride_t + rows_64 * zoneout_c_stride_b + columns
        kept = tl.load(zoneout_c_ptr + offsets, mask=active, other=0.0).to(tl.float32)
        c = kept * c_prev + (1.0 - kept) * c
    if HAS_ZONEOUT_H:
        h_prev_ptrs = tl.where(
            goes_on, h_ptr + offsets_prev, h0_ptr + rows_64 * h0_stride_b + columns
        )
        h_prev = tl.load(h_prev_ptrs, mask=has_state, other=0.0).to(tl.float32)
        offsets = t * zoneout_h_stride_t + rows_64 * zoneout_h_stride_b + columns
        kept = tl.load(zoneout_h_ptr + offsets, mask=active, other=0.0).to(tl.float32)
        h = kept * h_prev + (1.0 - kept) * h

    stored_row = rows < n
    if HAS_LENGTHS:
        # A row past its length has zeros for results.
        i, f, g, o = zero_where_not(active, i, f, g, o)
        n_i, n_f, n_g, n_o = zero_where_not(active, n_i, n_f, n_g, n_o)
        rstd = tl.where(active_row, rstd, 0.0)
        h = tl.where(active, h, 0.0)
        c = tl.where(active, c, 0.0)
    stored = stored_row & in_columns
    h = round_to(h, dtype)
    tl.store(h_ptr + (rows_64 + row) * H + columns, h, mask=stored)
    tl.store(c_ptr + (rows_64 + row) * H + columns, c, mask=stored)
    if SAVE:
        offsets = (rows_64 + row) * (4 * H) + columns
        store_gate_tiles(activations_ptr + offsets, H, i, f, g, o, stored)
        store_gate_tiles(normalized_ptr + offsets, H, n_i, n_f, n_g, n_o, stored)
        tl.store(rstd_ptr + (rows_64 + row), rstd, mask=stored_row)
    ends = active & (takes_part(rows, n_next, t_next, lengths, HAS_LENGTHS) == 0)
    tl.store(h_n_ptr + rows_64 * H + columns, h, mask=ends)
    tl.store(c_n_ptr + rows_64 * H + columns, round_to(c, dtype), mask=ends)


@triton.jit(
    do_not_specialize=["t", "t_prev", "row", "row_prev", "n", "n_prev", "eps", "cell_clip"]
)  # fmt: skip
def layer_norm_backward_row_kernel(
    grad_h_ptr,
    grad_c_ptr,
    activations_ptr,
    c_ptr,
    normalized_ptr,
    rstd_ptr,
    gain_hh_ptr,
    gain_c_ptr,
    bias_c_ptr,
    c0_ptr,
    dgates_ptr,
    dproduct_ptr,
    dz_ptr,
    dh_ptr,
    dc_ptr,
    t,
    t_prev,
    row,
    row_prev,
    n,
    n_prev,
    H,
    grad_h_stride_t,
    grad_h_stride_b,
    grad_c_stride_t,
    grad_c_stride_b,
    c0_stride_b,
    eps,
    lengths_ptr,
    resets_ptr,
    zoneout_h_ptr,
    zoneout_c_ptr,
    resets_stride_t,
    resets_stride_b,
    zoneout_h_stride_t,
    zoneout_h_stride_b,
    zoneout_c_stride_t,
    zoneout_c_stride_b,
    cell_clip,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_GRAD_H: tl.constexpr,
    HAS_GRAD_C: tl.constexpr,
    HAS_BIAS_C: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_ZONEOUT_H: tl.constexpr,
    HAS_ZONEOUT_C: tl.constexpr,
    HAS_CELL_CLIP: tl.constexpr,
):
    """One step of the backward recurrence, up to the gradient of its product p = h_{t-1} W_hh^T.

        dh = grad_h_t + dh_t,  dc = grad_c_t + dc_t   (dh_t, dc_t: from the steps after t)
        n_c = LN(c_t);  z = gain_c * n_c + bias_c;    bias_c if HAS_BIAS_C
        dz = dh * o * (1 - tanh(z)^2)
        dc = dc + LN'(dz * gain_c)
        da_i = dc * g * i * (1 - i);                  da_f = dc * c_{t-1} * f * (1 - f)
        da_g = dc * i * (1 - g^2);                    da_o = dh * tanh(z) * o * (1 - o)
        dp = LN'(da * gain_hh)
        dc_{t-1} = dc * f

    where LN'(d) = rstd * (d - mean(d) - n * mean(d * n)) is the gradient through n = LN(x). The
    product kernel goes on to dh_{t-1} = dp W_hh.

    Modified, each where its flag is set:

        HAS_LENGTHS: elsewhere than at t < length the row passes dh_t and dc_t on unchanged and
            stores zeros as its results; grad_h and grad_c are not read.
        HAS_ZONEOUT_C: c_t above is computed again as it was before zoneout; dc = grad_c_t + dc_t
            is divided into z * dc for dc_{t-1} and (1 - z) * dc for what follows it.
        HAS_ZONEOUT_H: dh likewise; z * dh is left in place of dh_t.
        HAS_CELL_CLIP: the dc of da_i, da_f, da_g, dc_{t-1} is 0 unless |c_t| < cell_clip.
        HAS_RESETS: c_{t-1} is zero where resets_t is true, and so is dc_{t-1}.

    Program q owns batch rows q*BLOCK_B ... and all H <= BLOCK_H hidden units.

    Tensors:
        grad_h_ptr: [T, B, H] gradient of h, read if HAS_GRAD_H; the step's begin at t * stride_t.
        grad_c_ptr: [T, B, H] float32 gradient of the cell states, likewise.
        activations_ptr, c_ptr, normalized_ptr, rstd_ptr: [N, ...] as the forward stored them.
        gain_hh_ptr: [4H].
        gain_c_ptr, bias_c_ptr: [H].
        c0_ptr: [B, H] initial cell state.
        dgates_ptr: [N, 4H] gradient of the gates before activation, da.
        dproduct_ptr: [N, 4H] gradient of p.
        dz_ptr: [N, H] float32 gradient of z.
        dh_ptr: [B, H] float32 gradient of h_t from later steps; if HAS_ZONEOUT_H what of it goes
            past the step takes its place.
        dc_ptr: [B, H] float32 gradient of the cell state, updated in place.
        lengths_ptr: [B] int64, read if HAS_LENGTHS.
        resets_ptr: [T, B] bool, read if HAS_RESETS; the step's begin at t * stride_t.
        zoneout_h_ptr, zoneout_c_ptr: [T, B, H], each read if its flag is set; the step's begin at
            t * stride_t.
        t, t_prev: place in time of this step and of the one before it in the forward's order; in
            a packed sequence their first rows.
        row, row_prev: first row of this step and of that one.
        n, n_prev: rows active in them; 0 where there is no such step.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    in_columns = columns < H
    t = tl.cast(t, tl.int64)
    row = tl.cast(row, tl.int64)

    # Anything will do for what is not read.
    lengths = rows
    if HAS_LENGTHS:
        lengths = tl.load(lengths_ptr + rows, mask=rows < n, other=0).to(tl.int32)
    active_row = takes_part(rows, n, t, lengths, HAS_LENGTHS)
    active = active_row & in_columns
    has_state = active
    if HAS_RESETS:
        offsets = t * resets_stride_t + rows_64 * resets_stride_b
        reset = tl.load(resets_ptr + offsets, mask=active_row, other=0) != 0
        has_state = active & (reset == 0)
    # A row that began with this step began with c0.
    goes_on = takes_part(rows, n_prev, t_prev, lengths, HAS_LENGTHS)
    began = goes_on == 0
    offsets = (rows_64 + row_prev) * H + columns
    c_prev = tl.load(c_ptr + offsets, mask=has_state & goes_on, other=0.0)
    c0_ptrs = c0_ptr + rows_64 * c0_stride_b + columns
    c0 = tl.load(c0_ptrs, mask=has_state & began, other=0.0)
    c_prev = tl.where(began, c0.to(tl.float32), c_prev)

    i, f, g, o = load_gate_tiles(activations_ptr + (rows_64 + row) * (4 * H) + columns, H, active)
    i = i.to(tl.float32)
    f = f.to(tl.float32)
    g = g.to(tl.float32)
    o = o.to(tl.float32)
    if HAS_ZONEOUT_C:
        c = candidate_cell(i, f, g, c_prev, cell_clip, HAS_CELL_CLIP)
    else:
        c = tl.load(c_ptr + (rows_64 + row) * H + columns, mask=active, other=0.0)
    n_c, rstd_c = normalize(c, in_columns, H, eps)
    gain_c = tl.load(gain_c_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    z = n_c * gain_c
    if HAS_BIAS_C:
        z += tl.load(bias_c_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    tanh_z = tanh(z)

    dh_tile = dh_ptr + rows_64 * H + columns
    dc_tile = dc_ptr + rows_64 * H + columns
    dh = tl.load(dh_tile, mask=active, other=0.0)
    dc = tl.load(dc_tile, mask=active, other=0.0)
    if HAS_GRAD_H:
        offsets = t * grad_h_stride_t + rows_64 * grad_h_stride_b + columns
        dh += tl.load(grad_h_ptr + offsets, mask=active, other=0.0).to(tl.float32)
    if HAS_GRAD_C:
        offsets = t * grad_c_stride_t + rows_64 * grad_c_stride_b + columns
        dc += tl.load(grad_c_ptr + offsets, mask=active, other=0.0)
    dh_kept = dh
    dc_kept = dc
    if HAS_ZONEOUT_H:
        offsets = t * zoneout_h_stride_t + rows_64 * zoneout_h_stride_b + columns
        kept = tl.load(zoneout_h_ptr + offsets, mask=active, other=0.0).to(tl.float32)
        dh_kept = kept * dh
        dh = (1.0 - kept) * dh
    if HAS_ZONEOUT_C:
        offsets = t * zoneout_c_stride_t + rows_64 * zoneout_c_stride_b + columns
        kept = tl.load(zoneout_c_ptr + offsets, mask=active, other=0.0).to(tl.float32)
        dc_kept = kept * dc
        dc = (1.0 - kept) * dc

    dz = dh * o * (1.0 - tanh_z * tanh_z)
    dc += normalize_backward(dz * gain_c, n_c, rstd_c, H)
    if HAS_CELL_CLIP:
        dc = tl.where(tl.abs(c) < cell_clip, dc, 0.0)
    da_i = dc * g * (i * (1.0 - i))
    da_f = dc * c_prev * (f * (1.0 - f))
    da_g = dc * i * (1.0 - g * g)
    da_o = dh * tanh_z * (o * (1.0 - o))
    dc *= f
    if HAS_ZONEOUT_C:
        dc += dc_kept
    if HAS_RESETS:
        dc = tl.where(reset, 0.0, dc)

    stored = active
    if HAS_LENGTHS:
        # A row past its length has zeros for results.
        stored = (rows < n) & in_columns
        da_i, da_f, da_g, da_o = zero_where_not(active, da_i, da_f, da_g, da_o)
        dz = tl.where(active, dz, 0.0)
    offsets = (rows_64 + row) * (4 * H) + columns
    store_gate_tiles(dgates_ptr + offsets, H, da_i, da_f, da_g, da_o, stored)
    tl.store(dz_ptr + (rows_64 + row) * H + columns, dz, mask=stored)

    gain_i, gain_f, gain_g, gain_o = load_gate_tiles(gain_hh_ptr + columns, H, in_columns)
    n_i, n_f, n_g, n_o = load_gate_tiles(normalized_ptr + offsets, H, active)
    rstd = tl.load(rstd_ptr + (rows_64 + row), mask=active_row, other=0.0)
    # From here on da stands for the gradient of LN(p).
    da_i *= gain_i.to(tl.float32)
    da_f *= gain_f.to(tl.float32)
    da_g *= gain_g.to(tl.float32)
    da_o *= gain_o.to(tl.float32)
    n_i = n_i.to(tl.float32)
    n_f = n_f.to(tl.float32)
    n_g = n_g.to(tl.float32)
    n_o = n_o.to(tl.float32)
    mean = 0.25 * row_mean((da_i + da_f) + (da_g + da_o), H)
    along = 0.25 * row_mean((da_i * n_i + da_f * n_f) + (da_g * n_g + da_o * n_o), H)
    dp_i = rstd * (da_i - mean - n_i * along)
    dp_f = rstd * (da_f - mean - n_f * along)
    dp_g = rstd * (da_g - mean - n_g * along)
    dp_o = rstd * (da_o - mean - n_o * along)
    store_gate_tiles(dproduct_ptr + offsets, H, dp_i, dp_f, dp_g, dp_o, stored)
    # Rows past their lengths keep both.
    tl.store(dc_tile, dc, mask=active)
    if HAS_ZONEOUT_H:
        tl.store(dh_tile, dh_kept, mask=active)


@triton.jit(do_not_specialize=["t", "row", "n"])
def layer_norm_backward_product_kernel(
    dproduct_ptr,
    weight_hh_ptr,
    dh_ptr,
    t,
    row,
    n,
    H,
    weight_stride_row,
    weight_stride_col,
    lengths_ptr,
    resets_ptr,
    recurrent_mask_ptr,
    resets_stride_t,
    resets_stride_b,
    recurrent_mask_stride_b,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_RECURRENT_MASK: tl.constexpr,
    HAS_ZONEOUT_H: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """What one step of the backward recurrence hands back to the h it began with.

        dh = recurrent_mask * (dp W_hh) + dh          0 where t was reset

    HAS_RECURRENT_MASK and HAS_RESETS put those two there. The dh on the right is what the row
    kernel left of zoneout, if HAS_ZONEOUT_H. If HAS_LENGTHS, rows past theirs keep their dh.

    Program (q, s) owns batch rows q*BLOCK_B ... and hidden units s*BLOCK_N ....

    Tensors:
        dproduct_ptr: [N, 4H], dp; the step's are the rows `row` ... `row` + n.
        weight_hh_ptr: [4H, H], any strides.
        dh_ptr: [B, H] float32, updated in place.
        lengths_ptr: [B] int64, read if HAS_LENGTHS.
        resets_ptr: [T, B] bool, read if HAS_RESETS; the step's begin at t * stride_t.
        recurrent_mask_ptr: [B, H], read if HAS_RECURRENT_MASK.
        t: place in time of the step; in a packed sequence its first row.
        n: rows active in it.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rows_64 = rows.to(tl.int64)
    in_columns = columns < H

    # Anything will do for what is not read.
    lengths = rows
    if HAS_LENGTHS:
        lengths = tl.load(lengths_ptr + rows, mask=rows < n, other=0).to(tl.int32)
    active_row = takes_part(rows, n, t, lengths, HAS_LENGTHS)
    active = active_row & in_columns

    inner_row = tl.arange(0, BLOCK_K)[None, :]
    inner = tl.arange(0, BLOCK_K)[:, None]
    dproduct_ptrs = dproduct_ptr + (rows_64 + row) * (4 * H) + inner_row
    weight_ptrs = (
        weight_hh_ptr
        + inner.to(tl.int64) * weight_stride_row
        + columns.to(tl.int64) * weight_stride_col
    )
    weight_block = BLOCK_K * tl.cast(weight_stride_row, tl.int64)
    dh = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for k in range(0, 4 * H, BLOCK_K):
        left = 4 * H - k
        dp = tl.load(dproduct_ptrs, mask=active_row & (inner_row < left), other=0.0)
        w = tl.load(weight_ptrs, mask=(inner < left) & in_columns, other=0.0)
        dh = dot(dp, w, dh, INPUT_PRECISION)
        dproduct_ptrs += BLOCK_K
        weight_ptrs += weight_block

    if HAS_RECURRENT_MASK:
        offsets = rows_64 * recurrent_mask_stride_b + columns
        recurrent_mask = tl.load(recurrent_mask_ptr + offsets, mask=active, other=0.0)
        dh *= recurrent_mask.to(tl.float32)
    dh_tile = dh_ptr + rows_64 * H + columns
    if HAS_ZONEOUT_H:
        dh += tl.load(dh_tile, mask=active, other=0.0)
    if HAS_RESETS:
        offsets = tl.cast(t, tl.int64) * resets_stride_t + rows_64 * resets_stride_b
        reset = tl.load(resets_ptr + offsets, mask=active_row, other=0) != 0
        dh = tl.where(reset, 0.0, dh)
    tl.store(dh_tile, dh, mask=active)


class ProductConfig(NamedTuple):
    """How a product kernel is launched.

    Attributes:
        BLOCK_B: batch rows of a program.
        BLOCK_N: columns of a program.
        BLOCK_K: length of the inner tile.
        num_warps: warps of a program.
        num_stages: tiles of the inner loop in flight.
    """

    BLOCK_B: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class RowConfig(NamedTuple):
    """How a row kernel is launched.

    Attributes:
        BLOCK_B: batch rows of a program.
        BLOCK_H: hidden units of a program, at least all of them.
        num_warps: warps of a program.
    """

    BLOCK_B: int
    BLOCK_H: int
    num_warps: int


def product_config(
    direction: Direction,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    arch: str,
    input_precision: str,
) -> ProductConfig:
    """The tiles of a product: none that the compiler would have to spill.

    Raises:
        ValueError: if the kernels have no such arithmetic.
    """
    math = math_of(dtype, input_precision)
    amd = arch.startswith("gfx")
    stages = 2 if amd else 3
    if math == "ieee" and not amd:
        # Without tensor cores a tile's operands pass through registers.
        return ProductConfig(16 if batch <= 16 else 64, 32, 32, 4, stages)
    if batch <= 16:
        # Few tiles: narrow ones, of the H columns more than of the 4H, spread W_hh over more of
        # the GPU.
        block_k = 128 if math == "16-bit" else 32
        return ProductConfig(16, 32 if direction == "forward" else 16, block_k, 4, stages)
    if hidden % 16:
        # Addresses of single elements take more registers.
        return ProductConfig(64, 64, 32, 8, stages)
    return ProductConfig(64, 64, 64 if math == "16-bit" else 32, 4, stages)


def row_config(hidden: int, arch: str) -> RowConfig:
    """The rows of a program: whole ones, several where they are short.

    Up to 2048 hidden units nothing spills. Above, rows outgrow the registers of a program: the
    results are the same, and the step waits for memory.
    """
    block_h = triton.next_power_of_2(hidden)
    block_b = max(1, min(4, 128 // block_h))
    # Four elements of a tile for a thread, as long as a program can have the threads.
    threads = min(1024, max(64, block_b * block_h // 4))
    return RowConfig(block_b, block_h, threads // (64 if arch.startswith("gfx") else 32))


def _chosen(kernel: KernelInterface, arguments: dict[str, object]) -> dict[str, object]:
    """Those of the arguments that a kernel has."""
    return {name: x for name, x in arguments.items() if name in kernel.arg_names}


def _refuse_projection(weight_hr: torch.Tensor | None) -> None:
    if weight_hr is not None:
        raise ValueError(
            f"weight_hr: the kernels have no projection, expected None, got {list(weight_hr.shape)}"
        )


def layer_norm_forward(
    gates: torch.Tensor,
    weight_hh: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weight_hr: None,
    batch_sizes: torch.Tensor | None,
    modifiers: tuple,
    reverse: bool,
    gain_hh: torch.Tensor,
    gain_c: torch.Tensor,
    bias_c: torch.Tensor | None,
    eps: float,
    save: bool,
    *,
    input_precision: str = "ieee",
) -> tuple[torch.Tensor, ...]:
    """Runs the layer-normalized LSTM recurrence forward (Ba, Kiros & Hinton 2016).

        p   = (h' * recurrent_mask) W_hh^T      h', c' = 0, 0 where resets_t, else h_{t-1}, c_{t-1}
        a_t = gates_t + gain_hh * LN(p)
        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
        c^  = clip(f * c' + i * g, -cell_clip, cell_clip)
        h^  = o * tanh(gain_c * LN(c^) + bias_c)
        c_t = zoneout_c_t * c' + (1 - zoneout_c_t) * c^
        h_t = zoneout_h_t * h' + (1 - zoneout_h_t) * h^

    at the steps t < lengths of a row. Products and sums are, and c is carried, in float32; h is
    rounded once, where it is stored.

    Args:
        gates: [T, B, 4H] normalized input projections with biases, gate order i, f, g, o, any
            strides; or the rows [N, 4H] of a packed sequence. float32, float16 or bfloat16.
        weight_hh: [4H, H] same dtype, any strides.
        h0: [B, H] same dtype, initial state.
        c0: [B, H] same dtype, initial cell state.
        weight_hr: None: the kernels have no projection.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip, as
            `lstm_forward` takes them.
        reverse: runs from the last step to the first.
        gain_hh: [4H], dtype of the gates.
        gain_c: [H], dtype of the gates.
        bias_c: likewise; None for zero.
        eps: added to the variances.
        save: returns what the backward needs besides c.
        input_precision: of float32 products, "ieee" or "tf32".

    Returns:
        h: like gates, with H columns: output states, contiguous.
        c: same shape, float32: cell states.
        activations: like gates, contiguous: i, f, g, o; of shape (0,) unless save.
        normalized: like gates, contiguous: LN(p); of shape (0,) unless save.
        rstd: [T, B] or [N] float32: that of p; of shape (0,) unless save.
        h_n, c_n: [B, H] final state; the initial one of rows without a step.

    Raises:
        ValueError: if a dtype, `input_precision` or a projection cannot be had, without a GPU, or
            for lengths together with batch_sizes.
    """
    _refuse_projection(weight_hr)
    packed = batch_sizes is not None
    B, H = h0.shape
    T = len(batch_sizes) if packed else gates.shape[0]
    arch = _arch(gates.device)
    product = product_config("forward", B, H, gates.dtype, arch, input_precision)
    per_row = row_config(H, arch)
    leading = gates.shape[:-1]
    h = gates.new_empty(*leading, H)
    c = gates.new_empty(*leading, H, dtype=torch.float32)
    activations = gates.new_empty((*leading, 4 * H) if save else (0,))
    normalized = torch.empty_like(activations)
    rstd = gates.new_empty(leading if save else (0,), dtype=torch.float32)
    if gates.numel() == 0:
        return h, c, activations, normalized, rstd, h0.clone(), c0.clone()
    h_n = gates.new_empty(B, H)
    c_n = gates.new_empty(B, H)
    gates, h0, c0 = _unit_columns(gates), _unit_columns(h0), _unit_columns(c0)
    gain_hh, gain_c = gain_hh.contiguous(), gain_c.contiguous()
    gates_strides, state_strides = _row_strides(gates, packed), (h0.stride(0), c0.stride(0))
    products = gates.new_empty(B, 4 * H, dtype=torch.float32)
    arguments = _modifiers(*modifiers, packed=packed, unread=gates)
    product_arguments = _chosen(layer_norm_forward_product_kernel, arguments)
    product_arguments |= {**product._asdict(), "INPUT_PRECISION": input_precision}
    row_arguments = _chosen(layer_norm_forward_row_kernel, arguments)
    row_arguments |= {**per_row._asdict(), "HAS_BIAS_C": bias_c is not None, "SAVE": save}
    bias_c = gain_c if bias_c is None else bias_c.contiguous()
    with _on_device(gates.device):
        if arguments["HAS_LENGTHS"]:
            # Rows without a step are in no launch.
            h_n.copy_(h0)
            c_n.copy_(c0)
        for before, step, after in _steps(T, B, batch_sizes, reverse):
            t, t_prev, t_next = (s.row if packed else s.t for s in (step, before, after))
            grid = triton.cdiv(step.n, product.BLOCK_B), triton.cdiv(4 * H, product.BLOCK_N)
            layer_norm_forward_product_kernel[grid](
                weight_hh, h0, h, products, t, t_prev, before.row, step.n, before.n,
                H, *weight_hh.stride(), h0.stride(0), **product_arguments,
            )  # fmt: skip
            layer_norm_forward_row_kernel[(triton.cdiv(step.n, per_row.BLOCK_B),)](
                gates, products, gain_hh, gain_c, bias_c, h0, c0,
                h, c, activations, normalized, rstd, h_n, c_n,
                t, t_prev, t_next, step.row, before.row, step.n, before.n, after.n,
                H, *gates_strides, *state_strides, float(eps), **row_arguments,
            )  # fmt: skip
    return h, c, activations, normalized, rstd, h_n, c_n


def layer_norm_backward(
    grad_h: torch.Tensor | None,
    grad_c: torch.Tensor | None,
    grad_h_n: torch.Tensor | None,
    grad_c_n: torch.Tensor | None,
    activations: torch.Tensor,
    c: torch.Tensor,
    normalized: torch.Tensor,
    rstd: torch.Tensor,
    weight_hh: torch.Tensor,
    c0: torch.Tensor,
    weight_hr: None,
    batch_sizes: torch.Tensor | None,
    modifiers: tuple,
    reverse: bool,
    gain_hh: torch.Tensor,
    gain_c: torch.Tensor,
    bias_c: torch.Tensor | None,
    eps: float,
    *,
    input_precision: str = "ieee",
) -> tuple[torch.Tensor | None, ...]:
    """Runs the normalized recurrence backward: the gradients of gates, h0 and c0, and what else.

        dh  = grad_h_t + dh_t,  dc = grad_c_t + dc_t        (dh_t: grad_h_n at a row's last step)
        dh^ = (1 - zoneout_h_t) * dh
        z   = gain_c * LN(c^) + bias_c;                     dz = dh^ * o * (1 - tanh(z)^2)
        dc^ = (1 - zoneout_c_t) * dc + LN'(gain_c * dz),    0 where c^ was held at +-cell_clip
        da_i = dc^ * g * i * (1 - i);                       da_f = dc^ * c' * f * (1 - f)
        da_g = dc^ * i * (1 - g^2);                         da_o = dh^ * tanh(z) * o * (1 - o)
        dp  = LN'(gain_hh * da)
        dh_{t-1} = recurrent_mask * (dp W_hh) + zoneout_h_t * dh
        dc_{t-1} = dc^ * f + zoneout_c_t * dc;              both 0 where resets_t

    with the names of `layer_norm_forward` and LN'(d) = rstd * (d - mean(d) - n * mean(d * n)), the
    gradient through n = LN(x). What remains are sums over all steps: that of dp^T (h' *
    recurrent_mask) is the gradient of weight_hh, of da * LN(p) that of gain_hh, of dz * LN(c^) that
    of gain_c, of dz that of bias_c.

    Args:
        grad_h: [T, B, H] or [N, H], gradient of h, any strides; None for zero.
        grad_c: same shape, float32, gradient of c; None for zero.
        grad_h_n: [B, H] gradient of h_n; None for zero.
        grad_c_n: [B, H] gradient of c_n; None for zero.
        activations: as `layer_norm_forward` returned them, like the next three.
        c: likewise.
        normalized: likewise.
        rstd: likewise.
        weight_hh: [4H, H], any strides.
        c0: [B, H] initial cell state.
        weight_hr: None: the kernels have no projection.
        batch_sizes: as in `layer_norm_forward`, like all that follow.
        modifiers: likewise; at steps past a length all results are exactly 0, and grad_h and
            grad_c are not read.
        reverse: likewise.
        gain_hh: likewise.
        gain_c: likewise.
        bias_c: likewise.
        eps: likewise.
        input_precision: likewise.

    Returns:
        dgates: like activations: gradient of gates, da, contiguous.
        dproduct: likewise, dp.
        dz: like c, float32.
        dh0, dc0: [B, H] gradients of the initial state; those of the final one for rows without a
            step.
        None, where other kernels return dh^ for the gradient of a projection.

    Raises:
        ValueError: if a dtype, `input_precision` or a projection cannot be had, without a GPU, or
            for lengths together with batch_sizes.
    """
    _refuse_projection(weight_hr)
    packed = batch_sizes is not None
    B, H = c0.shape
    T = len(batch_sizes) if packed else activations.shape[0]
    arch = _arch(activations.device)
    product = product_config("backward", B, H, activations.dtype, arch, input_precision)
    per_row = row_config(H, arch)
    dgates = torch.empty_like(activations, memory_format=torch.contiguous_format)
    dproduct = torch.empty_like(dgates)
    dz = torch.empty_like(c, memory_format=torch.contiguous_format)

    def carried(grad: torch.Tensor | None) -> torch.Tensor:
        if grad is None:
            return c0.new_zeros(B, H, dtype=torch.float32)
        return grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    dh, dc = carried(grad_h_n), carried(grad_c_n)
    if activations.numel() == 0:
        return dgates, dproduct, dz, dh.to(c0.dtype), dc.to(c0.dtype), None
    activations, c, c0 = activations.contiguous(), c.contiguous(), _unit_columns(c0)
    normalized, rstd = normalized.contiguous(), rstd.contiguous()
    gain_hh, gain_c = gain_hh.contiguous(), gain_c.contiguous()
    arguments = _modifiers(*modifiers, packed=packed, unread=dgates)
    product_arguments = _chosen(layer_norm_backward_product_kernel, arguments)
    product_arguments |= {**product._asdict(), "INPUT_PRECISION": input_precision}
    row_arguments = _chosen(layer_norm_backward_row_kernel, arguments)
    row_arguments |= {
        **per_row._asdict(),
        "HAS_GRAD_H": grad_h is not None,
        "HAS_GRAD_C": grad_c is not None,
        "HAS_BIAS_C": bias_c is not None,
    }
    # What a kernel is told not to read still needs an address: any will do.
    grad_h = dgates if grad_h is None else _unit_columns(grad_h)
    grad_c = dz if grad_c is None else _unit_columns(grad_c)
    bias_c = gain_c if bias_c is None else bias_c.contiguous()
    strides = (*_row_strides(grad_h, packed), *_row_strides(grad_c, packed), c0.stride(0))
    with _on_device(activations.device):
        for before, step, _ in reversed(_steps(T, B, batch_sizes, reverse)):
            t, t_prev = (s.row if packed else s.t for s in (step, before))
            layer_norm_backward_row_kernel[(triton.cdiv(step.n, per_row.BLOCK_B),)](
                grad_h, grad_c, activations, c, normalized, rstd, gain_hh, gain_c, bias_c, c0,
                dgates, dproduct, dz, dh, dc,
                t, t_prev, step.row, before.row, step.n, before.n,
                H, *strides, float(eps), **row_arguments,
            )  # fmt: skip
            grid = triton.cdiv(step.n, product.BLOCK_B), triton.cdiv(H, product.BLOCK_N)
            layer_norm_backward_product_kernel[grid](
                dproduct, weight_hh, dh, t, step.row, step.n,
                H, *weight_hh.stride(), **product_arguments,
            )  # fmt: skip
    return dgates, dproduct, dz, dh.to(c0.dtype), dc.to(c0.dtype), None
