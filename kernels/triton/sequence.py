"""Kernels that run a whole sequence in one launch, with W_hh and the state kept on chip."""

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


@triton.jit
def active_rows(batch_sizes_ptr, step, T, B, DESCENDING: tl.constexpr, PACKED: tl.constexpr):
    """Number of rows that take part in the `step`-th step run; 0 before the first, after the last.

    Time runs T-1 ... 0 if DESCENDING, else 0 ... T-1.
    """
    runs = (step >= 0) & (step < T)
    if PACKED:
        t = step
        if DESCENDING:
            t = T - 1 - step
        n = tl.load(batch_sizes_ptr + t, mask=runs, other=0).to(tl.int64)
    else:
        n = tl.where(runs, B, 0).to(tl.int64)
    return n


@triton.jit
def keep_in_registers(w):
    """Returns w, but as the result of an operation.

    Where a dot's operand is a plain copy from shared memory, the compiler moves that copy next
    to the dot: W_hh would be read again in every step. The result of an operation is left where
    it was computed, before the loop and in registers. The operation itself, low byte or all
    other bytes, is folded away by a later pass of the compiler.
    """
    bits: tl.constexpr = tl.int32 if w.dtype == tl.float32 else tl.int16
    b = w.to(bits, bitcast=True)
    return ((b & 255) | (b & -256)).to(w.dtype, bitcast=True)


@triton.jit
def load_cells_before(
    c_ptrs, c0_ptrs, rows, n, n_before, active, active_before, in_state, HAS_LENGTHS: tl.constexpr
):
    """The cell states a step began with: those of the step before, or c0 where a row begins.

    n rows and the elements `active` take part in the step, n_before and `active_before` in the one
    before it.
    """
    c = tl.load(c_ptrs, mask=active_before, other=0.0)
    if HAS_LENGTHS:
        # Any step may be the first of a row: the mask is the condition.
        begins = active & (active_before == 0)
        c0 = tl.load(c0_ptrs, mask=begins, other=0.0)
        c = tl.where(begins, c0.to(tl.float32), c)
    else:
        if n_before < n:
            c0 = tl.load(c0_ptrs, mask=in_state, other=0.0)
            c = tl.where(rows < n_before, c, c0.to(tl.float32))
    return c


@triton.jit(do_not_specialize=["T", "B", "N", "cell_clip"])
def lstm_forward_sequence_kernel(
    gates_ptr,
    weight_hh_ptr,
    h0_ptr,
    c0_ptr,
    h_ptr,
    c_ptr,
    activations_ptr,
    h_n_ptr,
    c_n_ptr,
    batch_sizes_ptr,
    T,
    B,
    N,
    H,
    gates_stride_t,
    gates_stride_b,
    weight_stride_row,
    weight_stride_col,
    h0_stride_b,
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
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE_ACTIVATIONS: tl.constexpr,
    SAVE_CELLS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_RECURRENT_MASK: tl.constexpr,
    HAS_ZONEOUT_H: tl.constexpr,
    HAS_ZONEOUT_C: tl.constexpr,
    HAS_CELL_CLIP: tl.constexpr,
    GATES_IN_REGISTERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The forward recurrence of the whole sequence.

    For every step, in the order of time or (REVERSE) against it:

        a_t = gates_t + h_{t-1} W_hh^T
        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    Modified, each where its flag is set:

        HAS_LENGTHS: a row takes part while t < length. Elsewhere it keeps its state, stores zeros
            as its results, and its gates are not read.
        HAS_RESETS: h_{t-1} and c_{t-1} are zero, whatever they held, where resets_t is true.
        HAS_RECURRENT_MASK: h_{t-1} is multiplied by the mask where it enters the product.
        HAS_CELL_CLIP: c_t is held within +-cell_clip.
        HAS_ZONEOUT_C, HAS_ZONEOUT_H: after both are computed,
            c_t = z * c_{t-1} + (1 - z) * c_t with z of zoneout_c, and h_t likewise.

    Program p owns batch rows p*BLOCK_B ... and all H <= BLOCK_H hidden units. W_hh is loaded
    once; h and c stay on chip from the first step to the last. Programs never meet. The gates
    of the next step are fetched while this step computes.

    Tensors:
        gates_ptr: [T, B, 4H] input projections with biases, any strides of T and B; if PACKED
            [N, 4H] rows of a packed sequence.
        weight_hh_ptr: [4H, H], any strides.
        h0_ptr, c0_ptr: [B, H] initial state.
        h_ptr: [N, H] output states, N = T * B unless PACKED.
        c_ptr: [N, H] float32 cell states, stored if SAVE_CELLS.
        activations_ptr: [N, 4H] gates after activation, stored if SAVE_ACTIVATIONS.
        h_n_ptr, c_n_ptr: [B, H] final state.
        batch_sizes_ptr: [T] int64, rows active at each time, read if PACKED.
        lengths_ptr: [B] int64, read if HAS_LENGTHS; never together with PACKED.
        resets_ptr: [T, B] bool, any strides ([N] if PACKED), read if HAS_RESETS.
        recurrent_mask_ptr: [B, H], read if HAS_RECURRENT_MASK.
        zoneout_h_ptr, zoneout_c_ptr: [T, B, H], any strides of T and B, which may be 0 ([N, H] if
            PACKED), each read if its flag is set.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    in_columns = columns < H
    in_state = (rows < B) & in_columns
    dtype = h_ptr.dtype.element_ty
    # Rows that do not take part keep their state. And where an infinity may stay in h (by zoneout)
    # or arise before the product (by the mask), h has to be kept from NaN beyond H.
    SELECTS_STATE: tl.constexpr = PACKED or HAS_LENGTHS or HAS_RECURRENT_MASK or HAS_ZONEOUT_H

    # W_hh^T of each gate: [H of h_{t-1}, H of the gate].
    inner = tl.arange(0, BLOCK_H)[:, None]
    weight_ptrs = (
        weight_hh_ptr
        + columns.to(tl.int64) * weight_stride_row
        + inner.to(tl.int64) * weight_stride_col
    )
    in_weight = (inner < H) & in_columns
    weight_gate = tl.cast(H, tl.int64) * weight_stride_row
    w_i = tl.load(weight_ptrs, mask=in_weight, other=0.0)
    w_f = tl.load(weight_ptrs + weight_gate, mask=in_weight, other=0.0)
    w_g = tl.load(weight_ptrs + 2 * weight_gate, mask=in_weight, other=0.0)
    w_o = tl.load(weight_ptrs + 3 * weight_gate, mask=in_weight, other=0.0)
    if GATES_IN_REGISTERS >= 1:
        w_i = keep_in_registers(w_i)
    if GATES_IN_REGISTERS >= 2:
        w_f = keep_in_registers(w_f)
    if GATES_IN_REGISTERS >= 3:
        w_g = keep_in_registers(w_g)
    if GATES_IN_REGISTERS >= 4:
        w_o = keep_in_registers(w_o)

    h = tl.load(h0_ptr + rows_64 * h0_stride_b + columns, mask=in_state, other=0.0)
    c = tl.load(c0_ptr + rows_64 * c0_stride_b + columns, mask=in_state, other=0.0).to(tl.float32)

    gates_tile = gates_ptr + rows_64 * gates_stride_b + columns
    h_tile = h_ptr + rows_64 * H + columns
    c_tile = c_ptr + rows_64 * H + columns
    activations_tile = activations_ptr + rows_64 * (4 * H) + columns
    resets_rows = resets_ptr + rows_64 * resets_stride_b
    zoneout_h_tile = zoneout_h_ptr + rows_64 * zoneout_h_stride_b + columns
    zoneout_c_tile = zoneout_c_ptr + rows_64 * zoneout_c_stride_b + columns
    # Anything will do for what is not read.
    lengths = rows
    recurrent_mask = h
    if HAS_LENGTHS:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0).to(tl.int32)
    if HAS_RECURRENT_MASK:
        offsets = rows_64 * recurrent_mask_stride_b + columns
        recurrent_mask = tl.load(recurrent_mask_ptr + offsets, mask=in_state, other=0.0)

    # n rows are active in the step run now, n_1 and n_2 in those run after it; `row`, row_1 and
    # row_2 are their first rows among the N, t, t_1 and t_2 their places in time (if PACKED,
    # where the row alone tells the place, the row again). The counts are read three steps ahead,
    # so that no address ever waits for one.
    n = active_rows(batch_sizes_ptr, 0, T, B, REVERSE, PACKED)
    n_1 = active_rows(batch_sizes_ptr, 1, T, B, REVERSE, PACKED)
    n_2 = active_rows(batch_sizes_ptr, 2, T, B, REVERSE, PACKED)
    row = tl.cast(0, tl.int64)
    t = tl.cast(0, tl.int64)
    if REVERSE:
        row = row + N - n
        row_1 = row - n_1
        t = t + T - 1
        t_1 = t - 1
    else:
        row_1 = row + n
        t_1 = t + 1
    if PACKED:
        t = row
        t_1 = row_1

    active_row = takes_part(rows, n, t, lengths, HAS_LENGTHS)
    active = active_row & in_columns
    active_1 = takes_part(rows, n_1, t_1, lengths, HAS_LENGTHS) & in_columns
    start = t * gates_stride_t
    gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates_tile + start, H, active)
    if HAS_RESETS:
        reset = tl.load(resets_rows + t * resets_stride_t, mask=active_row, other=0) != 0
        h = tl.where(reset, 0.0, h)
        c = tl.where(reset, 0.0, c)
    operand = entering_product(h, recurrent_mask, HAS_RECURRENT_MASK)
    a_i = dot(operand, w_i, gates_i.to(tl.float32), INPUT_PRECISION)
    a_f = dot(operand, w_f, gates_f.to(tl.float32), INPUT_PRECISION)
    a_g = dot(operand, w_g, gates_g.to(tl.float32), INPUT_PRECISION)
    a_o = dot(operand, w_o, gates_o.to(tl.float32), INPUT_PRECISION)
    # h0 may hold an infinity, whose product with the zeros beyond H is NaN. It must not become
    # part of h there: every later product would be NaN.
    a_i = tl.where(in_columns, a_i, 0.0)
    a_f = tl.where(in_columns, a_f, 0.0)
    a_g = tl.where(in_columns, a_g, 0.0)
    a_o = tl.where(in_columns, a_o, 0.0)
    start_1 = t_1 * gates_stride_t
    gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates_tile + start_1, H, active_1)

    for step in range(T):
        n_3 = active_rows(batch_sizes_ptr, step + 3, T, B, REVERSE, PACKED)
        if REVERSE:
            row_2 = row_1 - n_2
            t_2 = t_1 - 1
        else:
            row_2 = row_1 + n_1
            t_2 = t_1 + 1
        if PACKED:
            t_2 = row_2
        # Fetched now and not a step ahead: the activations hide the wait, and across the products
        # there are no registers to spare. Anything will do for what is not read.
        zoneout_h = h
        zoneout_c = h
        if HAS_ZONEOUT_H:
            zoneout_h = tl.load(zoneout_h_tile + t * zoneout_h_stride_t, mask=active, other=0.0)
        if HAS_ZONEOUT_C:
            zoneout_c = tl.load(zoneout_c_tile + t * zoneout_c_stride_t, mask=active, other=0.0)
        if HAS_RESETS:
            # Of the step run next, whose product is formed in this one.
            active_row_1 = takes_part(rows, n_1, t_1, lengths, HAS_LENGTHS)
            start_1 = t_1 * resets_stride_t
            reset_1 = tl.load(resets_rows + start_1, mask=active_row_1, other=0) != 0
        i, f, g, o, c_new, h_new = lstm_cell_forward(
            a_i,
            a_f,
            a_g,
            a_o,
            h,
            c,
            zoneout_h,
            zoneout_c,
            cell_clip,
            HAS_ZONEOUT_H,
            HAS_ZONEOUT_C,
            HAS_CELL_CLIP,
        )
        stored = active
        h_t = h_new
        c_t = c_new
        if HAS_LENGTHS:
            stored = in_state
            i, f, g, o = zero_where_not(active, i, f, g, o)
            h_t = tl.where(active, h_new, 0.0)
            c_t = tl.where(active, c_new, 0.0)
        h_new = round_to(h_new, dtype)
        tl.store(h_tile + row * H, round_to(h_t, dtype), mask=stored)
        if SAVE_CELLS:
            tl.store(c_tile + row * H, c_t, mask=stored)
        if SAVE_ACTIVATIONS:
            store_gate_tiles(activations_tile + row * (4 * H), H, i, f, g, o, stored)
        if SELECTS_STATE:
            # A row outside its own sequence keeps its state: the initial one before the
            # sequence begins, the final one after it has ended.
            # Only here can h0 and its infinities come in after the first step.
            active_row = takes_part(rows, n, t, lengths, HAS_LENGTHS)
            h = tl.where(active_row & in_columns, h_new, h)
            c = tl.where(active_row, c_new, c)
        else:
            h = h_new
            c = c_new
        if HAS_RESETS:
            h = tl.where(reset_1, 0.0, h)
            c = tl.where(reset_1, 0.0, c)
        # The product of the step run next: after the last step it is of no use, and no harm.
        operand = entering_product(h, recurrent_mask, HAS_RECURRENT_MASK)
        a_i = dot(operand, w_i, gates_i.to(tl.float32), INPUT_PRECISION)
        a_f = dot(operand, w_f, gates_f.to(tl.float32), INPUT_PRECISION)
        a_g = dot(operand, w_g, gates_g.to(tl.float32), INPUT_PRECISION)
        a_o = dot(operand, w_o, gates_o.to(tl.float32), INPUT_PRECISION)

        active_2 = takes_part(rows, n_2, t_2, lengths, HAS_LENGTHS) & in_columns
        start_2 = t_2 * gates_stride_t
        gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates_tile + start_2, H, active_2)

        n = n_1
        n_1 = n_2
        n_2 = n_3
        row = row_1
        row_1 = row_2
        t = t_1
        t_1 = t_2
        active = active_1
        active_1 = active_2

    final = rows_64 * H + columns
    tl.store(h_n_ptr + final, h, mask=in_state)
    tl.store(c_n_ptr + final, round_to(c, dtype), mask=in_state)


@triton.jit(do_not_specialize=["T", "B", "N", "cell_clip"])
def lstm_backward_sequence_kernel(
    grad_h_ptr,
    grad_c_ptr,
    grad_h_n_ptr,
    grad_c_n_ptr,
    activations_ptr,
    c_ptr,
    weight_hh_ptr,
    c0_ptr,
    dgates_ptr,
    dh0_ptr,
    dc0_ptr,
    batch_sizes_ptr,
    T,
    B,
    N,
    H,
    grad_h_stride_t,
    grad_h_stride_b,
    grad_c_stride_t,
    grad_c_stride_b,
    weight_stride_row,
    weight_stride_col,
    grad_h_n_stride_b,
    grad_c_n_stride_b,
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
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_GRAD_H: tl.constexpr,
    HAS_GRAD_C: tl.constexpr,
    HAS_GRAD_H_N: tl.constexpr,
    HAS_GRAD_C_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_RECURRENT_MASK: tl.constexpr,
    HAS_ZONEOUT_H: tl.constexpr,
    HAS_ZONEOUT_C: tl.constexpr,
    HAS_CELL_CLIP: tl.constexpr,
    GATES_IN_REGISTERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The backward recurrence of the whole sequence: the forward's steps from last to first.

        dh = grad_h_t + dgates_{t+1} W_hh       (+ grad_h_n where t is a row's last step)
        dc = dc_{t+1} + grad_c_t + dh * o * (1 - tanh(c_t)^2)
        da_i = dc * g * i * (1 - i);            da_f = dc * c_{t-1} * f * (1 - f)
        da_g = dc * i * (1 - g^2);              da_o = dh * tanh(c_t) * o * (1 - o)
        dc_t = dc * f

    Modified, each where its flag is set (the forward kernel has the same):

        HAS_LENGTHS: a row takes part while t < length. Elsewhere it keeps its dh and dc, its
            dgates are zero, and its other gradients are not read.
        HAS_RESETS: c_{t-1} is zero where resets_t is true, and nothing goes back to step t-1.
        HAS_RECURRENT_MASK: dgates_{t+1} W_hh is multiplied by the mask.
        HAS_CELL_CLIP: where c_t was held at +-cell_clip, dc is zero before the gates.
        HAS_ZONEOUT_C, HAS_ZONEOUT_H: z of dc and dh, z of zoneout_c and zoneout_h, goes to the
            step before as it is; the gates have 1 - z of them, at the c_t before zoneout.

    Program p owns batch rows p*BLOCK_B ... and all H <= BLOCK_H hidden units. W_hh is loaded
    once; dh and dc stay on chip. What the next step reads is fetched while this step computes.

    Tensors:
        grad_h_ptr: [T, B, H] gradient of h, any strides of T and B ([N, H] if PACKED).
        grad_c_ptr: like grad_h_ptr, float32, gradient of the cell states.
        grad_h_n_ptr, grad_c_n_ptr: [B, H] gradients of the final state.
        activations_ptr: [N, 4H] gates after activation, from the forward.
        c_ptr: [N, H] float32 cell states, from the forward.
        weight_hh_ptr: [4H, H], any strides.
        c0_ptr: [B, H] initial cell state.
        dgates_ptr: [N, 4H] gradient of the gates before activation.
        dh0_ptr, dc0_ptr: [B, H] gradients of the initial state.
        batch_sizes_ptr: [T] int64, rows active at each time, read if PACKED.
        lengths_ptr: [B] int64, read if HAS_LENGTHS; never together with PACKED.
        resets_ptr: [T, B] bool, any strides ([N] if PACKED), read if HAS_RESETS.
        recurrent_mask_ptr: [B, H], read if HAS_RECURRENT_MASK.
        zoneout_h_ptr, zoneout_c_ptr: [T, B, H], any strides of T and B, which may be 0 ([N, H] if
            PACKED), each read if its flag is set.
    """
    DESCENDING: tl.constexpr = not REVERSE
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    in_columns = columns < H
    in_state = (rows < B) & in_columns
    dtype = dgates_ptr.dtype.element_ty

    # W_hh of each gate: [H of the gate, H of h_{t-1}].
    inner = tl.arange(0, BLOCK_H)[:, None]
    weight_ptrs = (
        weight_hh_ptr
        + inner.to(tl.int64) * weight_stride_row
        + columns.to(tl.int64) * weight_stride_col
    )
    in_weight = (inner < H) & in_columns
    weight_gate = tl.cast(H, tl.int64) * weight_stride_row
    w_i = tl.load(weight_ptrs, mask=in_weight, other=0.0)
    w_f = tl.load(weight_ptrs + weight_gate, mask=in_weight, other=0.0)
    w_g = tl.load(weight_ptrs + 2 * weight_gate, mask=in_weight, other=0.0)
    w_o = tl.load(weight_ptrs + 3 * weight_gate, mask=in_weight, other=0.0)
    if GATES_IN_REGISTERS >= 1:
        w_i = keep_in_registers(w_i)
    if GATES_IN_REGISTERS >= 2:
        w_f = keep_in_registers(w_f)
    if GATES_IN_REGISTERS >= 3:
        w_g = keep_in_registers(w_g)
    if GATES_IN_REGISTERS >= 4:
        w_o = keep_in_registers(w_o)

    # Beginning with the final state's gradients puts them at each row's last step, whenever
    # that is: a row that is not active keeps its dh and dc.
    dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    dc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if HAS_GRAD_H_N:
        offsets = rows_64 * grad_h_n_stride_b + columns
        dh = tl.load(grad_h_n_ptr + offsets, mask=in_state, other=0.0).to(tl.float32)
    if HAS_GRAD_C_N:
        offsets = rows_64 * grad_c_n_stride_b + columns
        dc = tl.load(grad_c_n_ptr + offsets, mask=in_state, other=0.0).to(tl.float32)
    grad_h_tile = grad_h_ptr + rows_64 * grad_h_stride_b + columns
    grad_c_tile = grad_c_ptr + rows_64 * grad_c_stride_b + columns
    c_tile = c_ptr + rows_64 * H + columns
    activations_tile = activations_ptr + rows_64 * (4 * H) + columns
    dgates_tile = dgates_ptr + rows_64 * (4 * H) + columns
    resets_rows = resets_ptr + rows_64 * resets_stride_b
    zoneout_h_tile = zoneout_h_ptr + rows_64 * zoneout_h_stride_b + columns
    zoneout_c_tile = zoneout_c_ptr + rows_64 * zoneout_c_stride_b + columns
    # Anything will do for what is not read.
    lengths = rows
    if HAS_LENGTHS:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0).to(tl.int32)
    if HAS_RECURRENT_MASK:
        offsets = rows_64 * recurrent_mask_stride_b + columns
        recurrent_mask = tl.load(recurrent_mask_ptr + offsets, mask=in_state, other=0.0)

    # n rows are active in the step run now, n_1 and n_2 in those run after it; `row`, row_1 and
    # row_2 are their first rows among the N, t, t_1 and t_2 their places in time (if PACKED,
    # where the row alone tells the place, the row again).
    n = active_rows(batch_sizes_ptr, 0, T, B, DESCENDING, PACKED)
    n_1 = active_rows(batch_sizes_ptr, 1, T, B, DESCENDING, PACKED)
    n_2 = active_rows(batch_sizes_ptr, 2, T, B, DESCENDING, PACKED)
    row = tl.cast(0, tl.int64)
    t = tl.cast(0, tl.int64)
    if DESCENDING:
        row = row + N - n
        row_1 = row - n_1
        t = t + T - 1
        t_1 = t - 1
    else:
        row_1 = row + n
        t_1 = t + 1
    if PACKED:
        t = row
        t_1 = row_1

    active = takes_part(rows, n, t, lengths, HAS_LENGTHS) & in_columns
    active_1 = takes_part(rows, n_1, t_1, lengths, HAS_LENGTHS) & in_columns
    i, f, g, o = load_gate_tiles(activations_tile + row * (4 * H), H, active)
    c = tl.load(c_tile + row * H, mask=active, other=0.0)
    # The step before this one, in the forward's order, is the one run next here. A row that was
    # not yet active in it began with c0.
    c0_tile = c0_ptr + rows_64 * c0_stride_b + columns
    c_prev = load_cells_before(
        c_tile + row_1 * H, c0_tile, rows, n, n_1, active, active_1, in_state, HAS_LENGTHS
    )
    if HAS_GRAD_H:
        grad_h = tl.load(grad_h_tile + t * grad_h_stride_t, mask=active, other=0.0)
    if HAS_GRAD_C:
        grad_c = tl.load(grad_c_tile + t * grad_c_stride_t, mask=active, other=0.0)

    # A product with nothing, ahead of the loop: only where the compiler sees W_hh used there does
    # it bring W_hh into the registers of a dot's operand before the loop.
    nothing = tl.zeros([BLOCK_B, BLOCK_H], dtype)
    dh = dot(nothing, w_i, dh, INPUT_PRECISION)
    dh = dot(nothing, w_f, dh, INPUT_PRECISION)
    dh = dot(nothing, w_g, dh, INPUT_PRECISION)
    dh = dot(nothing, w_o, dh, INPUT_PRECISION)

    for step in range(T):
        n_3 = active_rows(batch_sizes_ptr, step + 3, T, B, DESCENDING, PACKED)
        row_2 = row_1 + n_1
        t_2 = t_1 + 1
        if DESCENDING:
            row_2 = row_1 - n_2
            t_2 = t_1 - 1
        if PACKED:
            t_2 = row_2
        active_row = takes_part(rows, n, t, lengths, HAS_LENGTHS)
        # Fetched now and not a step ahead: across the products there are no registers to spare.
        # Anything will do for what is not read.
        zoneout_h = dh
        zoneout_c = dh
        if HAS_ZONEOUT_H:
            zoneout_h = tl.load(zoneout_h_tile + t * zoneout_h_stride_t, mask=active, other=0.0)
        if HAS_ZONEOUT_C:
            zoneout_c = tl.load(zoneout_c_tile + t * zoneout_c_stride_t, mask=active, other=0.0)
        c_before = c_prev
        if HAS_RESETS:
            reset = tl.load(resets_rows + t * resets_stride_t, mask=active_row, other=0) != 0
            c_before = tl.where(reset, 0.0, c_prev)
        dh_t = dh
        dc_t = dc
        if HAS_GRAD_H:
            dh_t += grad_h.to(tl.float32)
        if HAS_GRAD_C:
            dc_t += grad_c
        da_i, da_f, da_g, da_o, dc_t, dh_kept = lstm_cell_backward(
            dh_t,
            dc_t,
            i.to(tl.float32),
            f.to(tl.float32),
            g.to(tl.float32),
            o.to(tl.float32),
            c,
            c_before,
            zoneout_h,
            zoneout_c,
            cell_clip,
            HAS_ZONEOUT_H,
            HAS_ZONEOUT_C,
            HAS_CELL_CLIP,
        )
        # The next step's loads take the place of what has just been used.
        active_1 = takes_part(rows, n_1, t_1, lengths, HAS_LENGTHS) & in_columns
        active_2 = takes_part(rows, n_2, t_2, lengths, HAS_LENGTHS) & in_columns
        i, f, g, o = load_gate_tiles(activations_tile + row_1 * (4 * H), H, active_1)
        c = c_prev
        c_prev = load_cells_before(
            c_tile + row_2 * H, c0_tile, rows, n_1, n_2, active_1, active_2, in_state, HAS_LENGTHS
        )
        if HAS_GRAD_H:
            grad_h = tl.load(grad_h_tile + t_1 * grad_h_stride_t, mask=active_1, other=0.0)
        if HAS_GRAD_C:
            grad_c = tl.load(grad_c_tile + t_1 * grad_c_stride_t, mask=active_1, other=0.0)

        stored = active
        if HAS_LENGTHS:
            stored = in_state
            da_i, da_f, da_g, da_o = zero_where_not(active, da_i, da_f, da_g, da_o)
        da_i = round_to(da_i, dtype)
        da_f = round_to(da_f, dtype)
        da_g = round_to(da_g, dtype)
        da_o = round_to(da_o, dtype)
        store_gate_tiles(dgates_tile + row * (4 * H), H, da_i, da_f, da_g, da_o, stored)

        dh_t = dot(da_i, w_i, tl.zeros([BLOCK_B, BLOCK_H], tl.float32), INPUT_PRECISION)
        dh_t = dot(da_f, w_f, dh_t, INPUT_PRECISION)
        dh_t = dot(da_g, w_g, dh_t, INPUT_PRECISION)
        dh_t = dot(da_o, w_o, dh_t, INPUT_PRECISION)
        if HAS_RECURRENT_MASK:
            dh_t *= recurrent_mask.to(tl.float32)
        if HAS_ZONEOUT_H:
            dh_t += dh_kept
        if HAS_RESETS:
            dh_t = tl.where(reset, 0.0, dh_t)
            dc_t = tl.where(reset, 0.0, dc_t)
        if PACKED or HAS_LENGTHS:
            # A row outside its own sequence keeps its gradients: those of the final state before
            # its last step is reached, those of the initial state after its first.
            dh = tl.where(active_row, dh_t, dh)
            dc = tl.where(active_row, dc_t, dc)
        else:
            dh = dh_t
            dc = dc_t
        n = n_1
        n_1 = n_2
        n_2 = n_3
        row = row_1
        row_1 = row_2
        t = t_1
        t_1 = t_2
        active = active_1

    first = rows_64 * H + columns
    tl.store(dh0_ptr + first, round_to(dh, dtype), mask=in_state)
    tl.store(dc0_ptr + first, round_to(dc, dtype), mask=in_state)
