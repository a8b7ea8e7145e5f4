"""Kernels that run a whole sequence in one launch, with W_hh and the state kept on chip."""

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


@triton.jit(do_not_specialize=["T", "B", "N"])
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
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE_ACTIVATIONS: tl.constexpr,
    SAVE_CELLS: tl.constexpr,
    GATES_IN_REGISTERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The forward recurrence of the whole sequence.

    For every step, in the order of time or (REVERSE) against it:

        a_t = gates_t + h_{t-1} W_hh^T
        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

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
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    rows_64 = rows.to(tl.int64)
    in_columns = columns < H
    in_state = (rows < B) & in_columns
    dtype = h_ptr.dtype.element_ty

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

    # n rows are active in the step run now, n_1 and n_2 in those run after it; `row`, row_1 and
    # row_2 are their first rows among the N. The counts are read three steps ahead, so that no
    # address ever waits for one.
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

    start = t * gates_stride_t
    start_1 = t_1 * gates_stride_t
    if PACKED:
        start = row * gates_stride_b
        start_1 = row_1 * gates_stride_b
    active = (rows < n) & in_columns
    active_1 = (rows < n_1) & in_columns
    gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates_tile + start, H, active)
    a_i = dot(h, w_i, gates_i.to(tl.float32), INPUT_PRECISION)
    a_f = dot(h, w_f, gates_f.to(tl.float32), INPUT_PRECISION)
    a_g = dot(h, w_g, gates_g.to(tl.float32), INPUT_PRECISION)
    a_o = dot(h, w_o, gates_o.to(tl.float32), INPUT_PRECISION)
    # h0 may hold an infinity, whose product with the zeros beyond H is NaN. It must not become
    # part of h there: every later product would be NaN.
    a_i = tl.where(in_columns, a_i, 0.0)
    a_f = tl.where(in_columns, a_f, 0.0)
    a_g = tl.where(in_columns, a_g, 0.0)
    a_o = tl.where(in_columns, a_o, 0.0)
    gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates_tile + start_1, H, active_1)

    for step in range(T):
        n_3 = active_rows(batch_sizes_ptr, step + 3, T, B, REVERSE, PACKED)
        if REVERSE:
            row_2 = row_1 - n_2
            t_2 = t_1 - 1
        else:
            row_2 = row_1 + n_1
            t_2 = t_1 + 1
        i, f, g, o, c_new, h_new = lstm_cell_forward(a_i, a_f, a_g, a_o, c)
        h_new = round_to(h_new, dtype)
        tl.store(h_tile + row * H, h_new, mask=active)
        if SAVE_CELLS:
            tl.store(c_tile + row * H, c_new, mask=active)
        if SAVE_ACTIVATIONS:
            store_gate_tiles(activations_tile + row * (4 * H), H, i, f, g, o, active)
        if PACKED:
            # A row outside its own sequence keeps its state: the initial one before the
            # sequence begins, the final one after it has ended.
            # Only here can h0 and its infinities come in after the first step.
            h = tl.where((rows < n) & in_columns, h_new, h)
            c = tl.where(rows < n, c_new, c)
        else:
            h = h_new
            c = c_new
        # The product of the step run next: after the last step it is of no use, and no harm.
        a_i = dot(h, w_i, gates_i.to(tl.float32), INPUT_PRECISION)
        a_f = dot(h, w_f, gates_f.to(tl.float32), INPUT_PRECISION)
        a_g = dot(h, w_g, gates_g.to(tl.float32), INPUT_PRECISION)
        a_o = dot(h, w_o, gates_o.to(tl.float32), INPUT_PRECISION)

        active_2 = (rows < n_2) & in_columns
        start_2 = t_2 * gates_stride_t
        if PACKED:
            start_2 = row_2 * gates_stride_b
        gates_i, gates_f, gates_g, gates_o = load_gate_tiles(gates_tile + start_2, H, active_2)

        n = n_1
        n_1 = n_2
        n_2 = n_3
        row = row_1
        row_1 = row_2
        t_1 = t_2
        active = active_1
        active_1 = active_2

    final = rows_64 * H + columns
    tl.store(h_n_ptr + final, h, mask=in_state)
    tl.store(c_n_ptr + final, round_to(c, dtype), mask=in_state)


@triton.jit(do_not_specialize=["T", "B", "N"])
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
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_GRAD_H: tl.constexpr,
    HAS_GRAD_C: tl.constexpr,
    HAS_GRAD_H_N: tl.constexpr,
    HAS_GRAD_C_N: tl.constexpr,
    GATES_IN_REGISTERS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The backward recurrence of the whole sequence: the forward's steps from last to first.

        dh = grad_h_t + dgates_{t+1} W_hh       (+ grad_h_n where t is a row's last step)
        dc = dc_{t+1} + grad_c_t + dh * o * (1 - tanh(c_t)^2)
        da_i = dc * g * i * (1 - i);            da_f = dc * c_{t-1} * f * (1 - f)
        da_g = dc * i * (1 - g^2);              da_o = dh * tanh(c_t) * o * (1 - o)
        dc_t = dc * f

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

    # n rows are active in the step run now, n_1 and n_2 in those run after it; `row`, row_1 and
    # row_2 are their first rows among the N.
    n = active_rows(batch_sizes_ptr, 0, T, B, DESCENDING, PACKED)
    n_1 = active_rows(batch_sizes_ptr, 1, T, B, DESCENDING, PACKED)
    n_2 = active_rows(batch_sizes_ptr, 2, T, B, DESCENDING, PACKED)
    row = tl.cast(0, tl.int64)
    t = tl.cast(0, tl.int64)
    if DESCENDING:
        row = row + N - n
        row_1 = row - n_1
        t = t + T - 1
    else:
        row_1 = row + n

    active = (rows < n) & in_columns
    i, f, g, o = load_gate_tiles(activations_tile + row * (4 * H), H, active)
    c = tl.load(c_tile + row * H, mask=active, other=0.0)
    # The step before this one, in the forward's order, is the one run next here. A row that was
    # not yet active in it began with c0.
    c_prev = tl.load(c_tile + row_1 * H, mask=(rows < n_1) & in_columns, other=0.0)
    c0_tile = c0_ptr + rows_64 * c0_stride_b + columns
    if n_1 < n:
        c0 = tl.load(c0_tile, mask=in_state, other=0.0)
        c_prev = tl.where(rows < n_1, c_prev, c0.to(tl.float32))
    if HAS_GRAD_H:
        start = t * grad_h_stride_t
        if PACKED:
            start = row * grad_h_stride_b
        grad_h = tl.load(grad_h_tile + start, mask=active, other=0.0)
    if HAS_GRAD_C:
        start = t * grad_c_stride_t
        if PACKED:
            start = row * grad_c_stride_b
        grad_c = tl.load(grad_c_tile + start, mask=active, other=0.0)

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
        t_1 = t + 1
        if DESCENDING:
            row_2 = row_1 - n_2
            t_1 = t - 1
        dh_t = dh
        dc_t = dc
        if HAS_GRAD_H:
            dh_t += grad_h.to(tl.float32)
        if HAS_GRAD_C:
            dc_t += grad_c
        da_i, da_f, da_g, da_o, dc_t = lstm_cell_backward(
            dh_t,
            dc_t,
            i.to(tl.float32),
            f.to(tl.float32),
            g.to(tl.float32),
            o.to(tl.float32),
            c,
            c_prev,
        )
        # The next step's loads take the place of what has just been used.
        active_1 = (rows < n_1) & in_columns
        i, f, g, o = load_gate_tiles(activations_tile + row_1 * (4 * H), H, active_1)
        c = c_prev
        c_prev = tl.load(c_tile + row_2 * H, mask=(rows < n_2) & in_columns, other=0.0)
        if n_2 < n_1:
            c0 = tl.load(c0_tile, mask=in_state, other=0.0)
            c_prev = tl.where(rows < n_2, c_prev, c0.to(tl.float32))
        if HAS_GRAD_H:
            start = t_1 * grad_h_stride_t
            if PACKED:
                start = row_1 * grad_h_stride_b
            grad_h = tl.load(grad_h_tile + start, mask=active_1, other=0.0)
        if HAS_GRAD_C:
            start = t_1 * grad_c_stride_t
            if PACKED:
                start = row_1 * grad_c_stride_b
            grad_c = tl.load(grad_c_tile + start, mask=active_1, other=0.0)

        da_i = round_to(da_i, dtype)
        da_f = round_to(da_f, dtype)
        da_g = round_to(da_g, dtype)
        da_o = round_to(da_o, dtype)
        store_gate_tiles(dgates_tile + row * (4 * H), H, da_i, da_f, da_g, da_o, active)

        dh_t = dot(da_i, w_i, tl.zeros([BLOCK_B, BLOCK_H], tl.float32), INPUT_PRECISION)
        dh_t = dot(da_f, w_f, dh_t, INPUT_PRECISION)
        dh_t = dot(da_g, w_g, dh_t, INPUT_PRECISION)
        dh_t = dot(da_o, w_o, dh_t, INPUT_PRECISION)
        if PACKED:
            # A row outside its own sequence keeps its gradients: those of the final state before
            # its last step is reached, those of the initial state after its first.
            dh = tl.where(rows < n, dh_t, dh)
            dc = tl.where(rows < n, dc_t, dc)
        else:
            dh = dh_t
            dc = dc_t
        n = n_1
        n_1 = n_2
        n_2 = n_3
        row = row_1
        row_1 = row_2
        t = t_1
        active = active_1

    first = rows_64 * H + columns
    tl.store(dh0_ptr + first, round_to(dh, dtype), mask=in_state)
    tl.store(dc0_ptr + first, round_to(dc, dtype), mask=in_state)
