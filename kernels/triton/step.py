"""Kernels that run one time step in one launch, for any number of hidden units."""

import triton
import triton.language as tl

from .cell import (
    dot,
    load_gate_tiles,
    lstm_cell_backward,
    lstm_cell_forward,
    store_gate_tiles,
)
from .elementwise import round_to


@triton.jit(do_not_specialize=["t", "row", "row_prev", "n", "n_prev", "n_next"])
def lstm_forward_step_kernel(
    gates_ptr,
    weight_hh_ptr,
    h0_ptr,
    h_ptr,
    c_state_ptr,
    c_ptr,
    activations_ptr,
    h_n_ptr,
    c_n_ptr,
    t,
    row,
    row_prev,
    n,
    n_prev,
    n_next,
    H,
    gates_stride_t,
    gates_stride_b,
    weight_stride_row,
    weight_stride_col,
    h0_stride_b,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAVE_ACTIVATIONS: tl.constexpr,
    SAVE_CELLS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the forward recurrence.

        a_t = gates_t + h_{t-1} W_hh^T
        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    Program (p, q) owns hidden units q*BLOCK_H ... of batch rows p*BLOCK_B ...: all four gates of
    its units, so that the cell update needs nobody else. It reads h_{t-1} of all units from the
    rows the previous step wrote, and updates its tile of the cell state in place.

    Tensors:
        gates_ptr: [T, B, 4H] input projections with biases; the step's begin at t * stride_t.
        weight_hh_ptr: [4H, H], any strides.
        h0_ptr: [B, H] initial state.
        h_ptr: [N, H] output states; this step writes rows `row` ... `row` + n.
        c_state_ptr: [B, H] float32, cell state before and after the step.
        c_ptr: [N, H] float32 cell states, stored if SAVE_CELLS.
        activations_ptr: [N, 4H] gates after activation, stored if SAVE_ACTIVATIONS.
        h_n_ptr, c_n_ptr: [B, H] final state, stored for the rows whose last step this is.
        n, n_prev, n_next: rows active in this step, in the one run before it (0 at the first),
            in the one run after it (0 at the last).
        row_prev: first row that the step before wrote.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    active_row = rows < n
    active = active_row & (columns < H)
    row = tl.cast(row, tl.int64)
    dtype = h_ptr.dtype.element_ty

    # The gates do not depend on the product: fetched first, used last.
    gates_tile = gates_ptr + tl.cast(t, tl.int64) * gates_stride_t + rows_64 * gates_stride_b
    gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates_tile + columns, H, active)
    c_state = c_state_ptr + rows_64 * H + columns
    c_prev = tl.load(c_state, mask=active, other=0.0)

    inner_row = tl.arange(0, BLOCK_K)[None, :]
    inner = tl.arange(0, BLOCK_K)[:, None]
    # A row that begins with this step has no row in the step before: it reads h0.
    h_prev_ptrs = (
        tl.where(
            rows < n_prev,
            h_ptr + (rows_64 + row_prev) * H,
            h0_ptr + rows_64 * h0_stride_b,
        )
        + inner_row
    )
    weight_ptrs = (
        weight_hh_ptr
        + columns.to(tl.int64) * weight_stride_row
        + inner.to(tl.int64) * weight_stride_col
    )
    weight_gate = tl.cast(H, tl.int64) * weight_stride_row
    weight_block = BLOCK_K * tl.cast(weight_stride_col, tl.int64)

    a_i = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    a_f = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    a_g = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    a_o = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for k in range(0, H, BLOCK_K):
        h_prev = tl.load(h_prev_ptrs, mask=active_row & (inner_row < H - k), other=0.0)
        in_weight = (inner < H - k) & (columns < H)
        w_i = tl.load(weight_ptrs, mask=in_weight, other=0.0)
        w_f = tl.load(weight_ptrs + weight_gate, mask=in_weight, other=0.0)
        w_g = tl.load(weight_ptrs + 2 * weight_gate, mask=in_weight, other=0.0)
        w_o = tl.load(weight_ptrs + 3 * weight_gate, mask=in_weight, other=0.0)
        a_i = dot(h_prev, w_i, a_i, INPUT_PRECISION)
        a_f = dot(h_prev, w_f, a_f, INPUT_PRECISION)
        a_g = dot(h_prev, w_g, a_g, INPUT_PRECISION)
        a_o = dot(h_prev, w_o, a_o, INPUT_PRECISION)
        h_prev_ptrs += BLOCK_K
        weight_ptrs += weight_block

    i, f, g, o, c, h = lstm_cell_forward(
        a_i + gates_i.to(tl.float32),
        a_f + gates_f.to(tl.float32),
        a_g + gates_g.to(tl.float32),
        a_o + gates_o.to(tl.float32),
        c_prev,
    )
    h = round_to(h, dtype)
    tl.store(h_ptr + (rows_64 + row) * H + columns, h, mask=active)
    tl.store(c_state, c, mask=active)
    if SAVE_CELLS:
        tl.store(c_ptr + (rows_64 + row) * H + columns, c, mask=active)
    if SAVE_ACTIVATIONS:
        tile = activations_ptr + (rows_64 + row) * (4 * H) + columns
        store_gate_tiles(tile, H, i, f, g, o, active)
    ends = active & (rows >= n_next)
    tl.store(h_n_ptr + rows_64 * H + columns, h, mask=ends)
    tl.store(c_n_ptr + rows_64 * H + columns, round_to(c, dtype), mask=ends)


@triton.jit(do_not_specialize=["t", "row", "row_prev", "row_next", "n", "n_prev", "n_next"])
def lstm_backward_step_kernel(
    grad_h_ptr,
    grad_c_ptr,
    grad_h_n_ptr,
    activations_ptr,
    c_ptr,
    weight_hh_ptr,
    c0_ptr,
    dgates_ptr,
    dc_ptr,
    dh0_ptr,
    t,
    row,
    row_prev,
    row_next,
    n,
    n_prev,
    n_next,
    H,
    grad_h_stride_t,
    grad_h_stride_b,
    grad_c_stride_t,
    grad_c_stride_b,
    weight_stride_row,
    weight_stride_col,
    grad_h_n_stride_b,
    c0_stride_b,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_GRAD_H: tl.constexpr,
    HAS_GRAD_C: tl.constexpr,
    HAS_GRAD_H_N: tl.constexpr,
    ONLY_GRAD_H0: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the backward recurrence.

        dh = grad_h_t + dgates_{t+1} W_hh       (+ grad_h_n where t is a row's last step)
        dc = dc_{t+1} + grad_c_t + dh * o * (1 - tanh(c_t)^2)
        da_i = dc * g * i * (1 - i);            da_f = dc * c_{t-1} * f * (1 - f)
        da_g = dc * i * (1 - g^2);              da_o = dh * tanh(c_t) * o * (1 - o)
        dc_t = dc * f

    Program (p, q) owns hidden units q*BLOCK_H ... of batch rows p*BLOCK_B .... It reads the
    gradients of all 4H gates from the rows that the following step wrote, writes those of its
    own units' four gates, and updates its tile of dc in place.

    If ONLY_GRAD_H0 the program stops after the product: dh0 = dgates_{t+1} W_hh for the rows
    from n to n_next, those that began with step t+1.

    Tensors:
        grad_h_ptr: [T, B, H] gradient of h; the step's begin at t * stride_t.
        grad_c_ptr: [T, B, H] float32 gradient of the cell states, likewise.
        grad_h_n_ptr: [B, H] gradient of the final h.
        activations_ptr: [N, 4H] gates after activation, from the forward.
        c_ptr: [N, H] float32 cell states, from the forward.
        weight_hh_ptr: [4H, H], any strides.
        c0_ptr: [B, H] initial cell state.
        dgates_ptr: [N, 4H] gradient of the gates before activation.
        dc_ptr: [B, H] float32 gradient of the cell state, updated in place.
        dh0_ptr: [B, H] gradient of the initial h, written if ONLY_GRAD_H0.
        row, row_prev, row_next: first row of this step, of the one before and of the one after
            it in the forward's order.
        n, n_prev, n_next: rows active in them; 0 where there is no such step.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    in_columns = columns < H
    active = (rows < n) & in_columns
    row = tl.cast(row, tl.int64)
    dtype = dgates_ptr.dtype.element_ty

    inner_row = tl.arange(0, BLOCK_K)[None, :]
    inner = tl.arange(0, BLOCK_K)[:, None]
    dgates_ptrs = dgates_ptr + (rows_64 + row_next) * (4 * H) + inner_row
    weight_ptrs = (
        weight_hh_ptr
        + inner.to(tl.int64) * weight_stride_row
        + columns.to(tl.int64) * weight_stride_col
    )
    weight_block = BLOCK_K * tl.cast(weight_stride_row, tl.int64)
    # Rows that no later step has are masked: their product is exactly 0.
    product = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for k in range(0, 4 * H, BLOCK_K):
        left = 4 * H - k
        da = tl.load(dgates_ptrs, mask=(rows < n_next) & (inner_row < left), other=0.0)
        w = tl.load(weight_ptrs, mask=(inner < left) & in_columns, other=0.0)
        product = dot(da, w, product, INPUT_PRECISION)
        dgates_ptrs += BLOCK_K
        weight_ptrs += weight_block

    if ONLY_GRAD_H0:
        begins = (rows >= n) & (rows < n_next) & in_columns
        tl.store(dh0_ptr + rows_64 * H + columns, round_to(product, dtype), mask=begins)
    else:
        tile = activations_ptr + (rows_64 + row) * (4 * H) + columns
        i, f, g, o = load_gate_tiles(tile, H, active)
        c = tl.load(c_ptr + (rows_64 + row) * H + columns, mask=active, other=0.0)
        # A row that began with this step began with c0.
        began = rows >= n_prev
        c_prev = tl.load(
            c_ptr + (rows_64 + row_prev) * H + columns, mask=active & (rows < n_prev), other=0.0
        )
        c0 = tl.load(c0_ptr + rows_64 * c0_stride_b + columns, mask=active & began, other=0.0)
        c_prev = tl.where(began, c0.to(tl.float32), c_prev)
        dc_tile = dc_ptr + rows_64 * H + columns
        dc = tl.load(dc_tile, mask=active, other=0.0)
        dh = product
        if HAS_GRAD_H_N:
            ends = active & (rows >= n_next)
            offsets = rows_64 * grad_h_n_stride_b + columns
            dh += tl.load(grad_h_n_ptr + offsets, mask=ends, other=0.0).to(tl.float32)
        t = tl.cast(t, tl.int64)
        if HAS_GRAD_H:
            offsets = t * grad_h_stride_t + rows_64 * grad_h_stride_b + columns
            dh += tl.load(grad_h_ptr + offsets, mask=active, other=0.0).to(tl.float32)
        if HAS_GRAD_C:
            offsets = t * grad_c_stride_t + rows_64 * grad_c_stride_b + columns
            dc += tl.load(grad_c_ptr + offsets, mask=active, other=0.0)
        da_i, da_f, da_g, da_o, dc = lstm_cell_backward(
            dh,
            dc,
            i.to(tl.float32),
            f.to(tl.float32),
            g.to(tl.float32),
            o.to(tl.float32),
            c,
            c_prev,
        )
        tile = dgates_ptr + (rows_64 + row) * (4 * H) + columns
        store_gate_tiles(tile, H, da_i, da_f, da_g, da_o, active)
        tl.store(dc_tile, dc, mask=active)
