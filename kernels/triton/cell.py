"""The mathematics of one cell update, forward and backward, shared by every kernel.

All tiles are float32 [BLOCK_B, BLOCK_H]; gate order i, f, g, o.
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
def lstm_cell_forward(a_i, a_f, a_g, a_o, c_prev):
    """One step of the recurrence from the gates before activation.

    i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
    c = f * c_prev + i * g
    h = o * tanh(c)

    Returns:
        i, f, g, o, c, h.
    """
    i = sigmoid(a_i)
    f = sigmoid(a_f)
    g = tanh(a_g)
    o = sigmoid(a_o)
    c = f * c_prev + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def lstm_cell_backward(dh, dc, i, f, g, o, c, c_prev):
    """Gradients of one step, from those of its h (dh) and of its c by all later paths (dc).

    dc   += dh * o * (1 - tanh(c)**2)
    da_i  = dc * g * i * (1 - i)
    da_f  = dc * c_prev * f * (1 - f)
    da_g  = dc * i * (1 - g**2)
    da_o  = dh * tanh(c) * o * (1 - o)
    dc_prev = dc * f

    Returns:
        da_i, da_f, da_g, da_o, dc_prev.
    """
    tanh_c = tanh(c)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    da_i = dc * g * (i * (1.0 - i))
    da_f = dc * c_prev * (f * (1.0 - f))
    da_g = dc * i * (1.0 - g * g)
    da_o = dh * tanh_c * (o * (1.0 - o))
    return da_i, da_f, da_g, da_o, dc * f


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
