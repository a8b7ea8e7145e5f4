"""Kernels that run one time step in one launch, for any number of hidden units."""

import triton
import triton.language as tl

from .cell import (
    dot,
    entering_product,
    load_gate_tiles,
    lstm_cell_backward,
    lstm_cell_forward,
    store_gate_tiles,
    takes_part,
    zero_where_not,
)
from .elementwise import round_to


@triton.jit(
    do_not_specialize=[
        "t", "t_prev", "t_next", "row", "row_prev", "n", "n_prev", "n_next", "cell_clip"
    ]
)  # fmt: skip
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
    weight_stride_row,
    weight_stride_col,
    h0_stride_b,
    lengths_ptr,
    resets_ptr,
    recurrent_mask_ptr,
    zoneout_h_ptr,
    zoneout_c_ptr,
    resets_stride_t,
    resets_stride_b,
    recurrent_mask_stride_b,
    zoneout_h_stride_t,
    zoneout_h_stride_b,
    zoneout_c_stride_t,
    zoneout_c_stride_b,
    cell_clip,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAVE_ACTIVATIONS: tl.constexpr,
    SAVE_CELLS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_RECURRENT_MASK: tl.constexpr,
    HAS_ZONEOUT_H: tl.constexpr,
    HAS_ZONEOUT_C: tl.constexpr,
    HAS_CELL_CLIP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the forward recurrence.

        a_t = gates_t + h_{t-1} W_hh^T
        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    Modified as the sequence kernel is (see there for the flags' meaning): HAS_LENGTHS,
    HAS_RESETS, HAS_RECURRENT_MASK, HAS_CELL_CLIP, HAS_ZONEOUT_C, HAS_ZONEOUT_H.

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
        lengths_ptr: [B] int64, read if HAS_LENGTHS.
        resets_ptr: [T, B] bool, read if HAS_RESETS; the step's begin at t * stride_t.
        recurrent_mask_ptr: [B, H], read if HAS_RECURRENT_MASK.
        zoneout_h_ptr, zoneout_c_ptr: [T, B, H], each read if its flag is set; the step's begin at
            t * stride_t.
        t, t_prev, t_next: place in time of this step, of the one run before it, of the one after;
            in a packed sequence, where the row alone tells the place, their first rows.
        n, n_prev, n_next: rows active in this step, in the one run before it (0 at the first),
            in the one run after it (0 at the last).
        row_prev: first row that the step before wrote.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    t = tl.cast(t, tl.int64)
    row = tl.cast(row, tl.int64)
    dtype = h_ptr.dtype.element_ty

    # Anything will do for what is not read.
    lengths = rows
    if HAS_LENGTHS:
        lengths = tl.load(lengths_ptr + rows, mask=rows < n, other=0).to(tl.int32)
    in_columns = columns < H
    active_row = takes_part(rows, n, t, lengths, HAS_LENGTHS)
    active = active_row & in_columns
    # The rows that have a state to begin with; for the others the loads put zeros.
    has_state = active_row
    if HAS_RESETS:
        offsets = t * resets_stride_t + rows_64 * resets_stride_b
        reset = tl.load(resets_ptr + offsets, mask=active_row, other=0) != 0
        has_state = active_row & (reset == 0)

    # The gates do not depend on the product: fetched first, used last.
    gates_tile = gates_ptr + t * gates_stride_t + rows_64 * gates_stride_b
    gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates_tile + columns, H, active)
    c_state = c_state_ptr + rows_64 * H + columns
    c_prev = tl.load(c_state, mask=has_state & in_columns, other=0.0)

    inner_row = tl.arange(0, BLOCK_K)[None, :]
    inner = tl.arange(0, BLOCK_K)[:, None]
    # A row that begins with this step has no row in the step before: it reads h0.
    h_prev_rows = tl.where(
        takes_part(rows, n_prev, t_prev, lengths, HAS_LENGTHS),
        h_ptr + (rows_64 + row_prev) * H,
        h0_ptr + rows_64 * h0_stride_b,
    )
    h_prev_ptrs = h_prev_rows + inner_row
    recurrent_mask_ptrs = recurrent_mask_ptr + rows_64 * recurrent_mask_stride_b + inner_row
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
        h_prev = tl.load(h_prev_ptrs, mask=has_state & (inner_row < H - k), other=0.0)
        if HAS_RECURRENT_MASK:
            in_mask = has_state & (inner_row < H - k)
            recurrent_mask = tl.load(recurrent_mask_ptrs, mask=in_mask, other=0.0)
            h_prev = entering_product(h_prev, recurrent_mask, HAS_RECURRENT_MASK)
            recurrent_mask_ptrs += BLOCK_K
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

    h_kept = c_prev
    zoneout_h = c_prev
    zoneout_c = c_prev
    if HAS_ZONEOUT_H:
        h_kept = tl.load(h_prev_rows + columns, mask=has_state & in_columns, other=0.0)
        offsets = t * zoneout_h_stride_t + rows_64 * zoneout_h_stride_b + columns
        zoneout_h = tl.load(zoneout_h_ptr + offsets, mask=active, other=0.0)
    if HAS_ZONEOUT_C:
        offsets = t * zoneout_c_stride_t + rows_64 * zoneout_c_stride_b + columns
        zoneout_c = tl.load(zoneout_c_ptr + offsets, mask=active, other=0.0)
    i, f, g, o, c, h = lstm_cell_forward(
        a_i + gates_i.to(tl.float32),
        a_f + gates_f.to(tl.float32),
        a_g + gates_g.to(tl.float32),
        a_o + gates_o.to(tl.float32),
        h_kept,
        c_prev,
        zoneout_h,
        zoneout_c,
        cell_clip,
        HAS_ZONEOUT_H,
        HAS_ZONEOUT_C,
        HAS_CELL_CLIP,
    )
    stored = active
    if HAS_LENGTHS:
        # A row past its length has zeros for results; its state is not touched.
        stored = (rows < n) & in_columns
        i, f, g, o = zero_where_not(active, i, f, g, o)
        h = tl.where(active, h, 0.0)
        c = tl.where(active, c, 0.0)
    h = round_to(h, dtype)
    tl.store(h_ptr + (rows_64 + row) * H + columns, h, mask=stored)
    tl.store(c_state, c, mask=active)
    if SAVE_CELLS:
        tl.store(c_ptr + (rows_64 + row) * H + columns, c, mask=stored)
    if SAVE_ACTIVATIONS:
        tile = activations_ptr + (rows_64 + row) * (4 * H) + columns
        store_gate_tiles(tile, H, i, f, g, o, stored)
    ends = active & (takes_part(rows, n_next, t_next, lengths, HAS_LENGTHS) == 0)
    tl.store(h_n_ptr + rows_64 * H + columns, h, mask=ends)
    tl.store(c_n_ptr + rows_64 * H + columns, round_to(c, dtype), mask=ends)


@triton.jit(
    do_not_specialize=[
        "t", "t_prev", "t_next", "row", "row_prev", "row_next", "n", "n_prev", "n_next", "cell_clip"
    ]
)  # fmt: skip
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
    dh_kept_ptr,
    t,
    t_prev,
    t_next,
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
    lengths_ptr,
    resets_ptr,
    recurrent_mask_ptr,
    zoneout_h_ptr,
    zoneout_c_ptr,
    resets_stride_t,
    resets_stride_b,
    recurrent_mask_stride_b,
    zoneout_h_stride_t,
    zoneout_h_stride_b,
    zoneout_c_stride_t,
    zoneout_c_stride_b,
    cell_clip,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_GRAD_H: tl.constexpr,
    HAS_GRAD_C: tl.constexpr,
    HAS_GRAD_H_N: tl.constexpr,
    ONLY_GRAD_H0: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_RECURRENT_MASK: tl.constexpr,
    HAS_ZONEOUT_H: tl.constexpr,
    HAS_ZONEOUT_C: tl.constexpr,
    HAS_CELL_CLIP: tl.constexpr,
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

    Modified as the sequence kernel is (see there for the flags' meaning): HAS_LENGTHS,
    HAS_RESETS, HAS_RECURRENT_MASK, HAS_CELL_CLIP, HAS_ZONEOUT_C, HAS_ZONEOUT_H. What zoneout
    takes past the gates of step t+1 is handed on in dh_kept, updated in place as dc is.

    If ONLY_GRAD_H0 the program stops after the product: dh0 = dgates_{t+1} W_hh for the rows
    from n to n_next, those that began with step t+1. If HAS_LENGTHS, where any step may be the
    first of a row, every launch does so for such rows.

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
        dh0_ptr: [B, H] gradient of the initial h, written if ONLY_GRAD_H0 or HAS_LENGTHS.
        dh_kept_ptr: [B, H] float32, what of dh_t reaches h_{t-1} by zoneout, if HAS_ZONEOUT_H.
        lengths_ptr: [B] int64, read if HAS_LENGTHS.
        resets_ptr: [T, B] bool, read if HAS_RESETS; the step's begin at t * stride_t.
        recurrent_mask_ptr: [B, H], read if HAS_RECURRENT_MASK.
        zoneout_h_ptr, zoneout_c_ptr: [T, B, H], each read if its flag is set; the step's begin at
            t * stride_t.
        t, t_prev, t_next: place in time of this step, of the one before and of the one after it in
            the forward's order; in a packed sequence their first rows.
        row, row_prev, row_next: first row of this step, of the one before and of the one after
            it in the forward's order.
        n, n_prev, n_next: rows active in them; 0 where there is no such step.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    in_columns = columns < H
    t = tl.cast(t, tl.int64)
    row = tl.cast(row, tl.int64)
    dtype = dgates_ptr.dtype.element_ty

    # Anything will do for what is not read.
    lengths = rows
    if HAS_LENGTHS:
        in_batch = (rows < n) | (rows < n_next)
        lengths = tl.load(lengths_ptr + rows, mask=in_batch, other=0).to(tl.int32)
    active_row = takes_part(rows, n, t, lengths, HAS_LENGTHS)
    active_row_next = takes_part(rows, n_next, t_next, lengths, HAS_LENGTHS)
    active = active_row & in_columns
    active_next = active_row_next & in_columns

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
        da = tl.load(dgates_ptrs, mask=active_row_next & (inner_row < left), other=0.0)
        w = tl.load(weight_ptrs, mask=(inner < left) & in_columns, other=0.0)
        product = dot(da, w, product, INPUT_PRECISION)
        dgates_ptrs += BLOCK_K
        weight_ptrs += weight_block

    # What the step after hands back to the h it began with.
    dh = product
    if HAS_RECURRENT_MASK:
        offsets = rows_64 * recurrent_mask_stride_b + columns
        recurrent_mask = tl.load(recurrent_mask_ptr + offsets, mask=active_next, other=0.0)
        dh *= recurrent_mask.to(tl.float32)
    if HAS_RESETS:
        offsets = tl.cast(t_next, tl.int64) * resets_stride_t + rows_64 * resets_stride_b
        reset_next = tl.load(resets_ptr + offsets, mask=active_row_next, other=0) != 0
        dh = tl.where(reset_next, 0.0, dh)
    dh_kept_tile = dh_kept_ptr + rows_64 * H + columns
    if HAS_ZONEOUT_H:
        dh += tl.load(dh_kept_tile, mask=active_next, other=0.0)

    if ONLY_GRAD_H0 or HAS_LENGTHS:
        begun = active_next & (active_row == 0)
        tl.store(dh0_ptr + rows_64 * H + columns, round_to(dh, dtype), mask=begun)
    if not ONLY_GRAD_H0:
        tile = activations_ptr + (rows_64 + row) * (4 * H) + columns
        i, f, g, o = load_gate_tiles(tile, H, active)
        c = tl.load(c_ptr + (rows_64 + row) * H + columns, mask=active, other=0.0)
        has_state = active
        if HAS_RESETS:
            offsets = t * resets_stride_t + rows_64 * resets_stride_b
            reset = tl.load(resets_ptr + offsets, mask=active_row, other=0) != 0
            has_state = active & (reset == 0)
        # A row that began with this step began with c0.
        goes_on = takes_part(rows, n_prev, t_prev, lengths, HAS_LENGTHS)
        began = goes_on == 0
        c_prev = tl.load(
            c_ptr + (rows_64 + row_prev) * H + columns, mask=has_state & goes_on, other=0.0
        )
        c0 = tl.load(c0_ptr + rows_64 * c0_stride_b + columns, mask=has_state & began, other=0.0)
        c_prev = tl.where(began, c0.to(tl.float32), c_prev)
        dc_tile = dc_ptr + rows_64 * H + columns
        dc = tl.load(dc_tile, mask=active, other=0.0)
        if HAS_GRAD_H_N:
            ends = active & (active_row_next == 0)
            offsets = rows_64 * grad_h_n_stride_b + columns
            dh += tl.load(grad_h_n_ptr + offsets, mask=ends, other=0.0).to(tl.float32)
        if HAS_GRAD_H:
            offsets = t * grad_h_stride_t + rows_64 * grad_h_stride_b + columns
            dh += tl.load(grad_h_ptr + offsets, mask=active, other=0.0).to(tl.float32)
        if HAS_GRAD_C:
            offsets = t * grad_c_stride_t + rows_64 * grad_c_stride_b + columns
            dc += tl.load(grad_c_ptr + offsets, mask=active, other=0.0)
        zoneout_h = dh
        zoneout_c = dh
        if HAS_ZONEOUT_H:
            offsets = t * zoneout_h_stride_t + rows_64 * zoneout_h_stride_b + columns
            zoneout_h = tl.load(zoneout_h_ptr + offsets, mask=active, other=0.0)
        if HAS_ZONEOUT_C:
            offsets = t * zoneout_c_stride_t + rows_64 * zoneout_c_stride_b + columns
            zoneout_c = tl.load(zoneout_c_ptr + offsets, mask=active, other=0.0)
        da_i, da_f, da_g, da_o, dc, dh_kept = lstm_cell_backward(
            dh,
            dc,
            i.to(tl.float32),
            f.to(tl.float32),
            g.to(tl.float32),
            o.to(tl.float32),
            c,
            c_prev,
            zoneout_h,
            zoneout_c,
            cell_clip,
            HAS_ZONEOUT_H,
            HAS_ZONEOUT_C,
            HAS_CELL_CLIP,
        )
        stored = active
        if HAS_LENGTHS:
            stored = (rows < n) & in_columns
            da_i, da_f, da_g, da_o = zero_where_not(active, da_i, da_f, da_g, da_o)
        tile = dgates_ptr + (rows_64 + row) * (4 * H) + columns
        store_gate_tiles(tile, H, da_i, da_f, da_g, da_o, stored)
        if HAS_RESETS:
            dc = tl.where(reset, 0.0, dc)
            dh_kept = tl.where(reset, 0.0, dh_kept)
        tl.store(dc_tile, dc, mask=active)
        if HAS_ZONEOUT_H:
            tl.store(dh_kept_tile, dh_kept, mask=active)
