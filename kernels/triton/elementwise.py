"""Activation functions of the cell, written in Triton's own operations.

They replace libdevice so that the same source runs on every vendor's GPU and under the
interpreter. Each keeps a relative error of a few units in the last place of float32, never
overflows, passes NaN on, and reaches its limits at +-inf.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)
# What float32 loses of log2(e), so that the product with it can be carried in two parts.
LOG2_E_TAIL = tl.constexpr(1.925963033500012e-08)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x):
    """e**x with the rounding of x * log2(e) given back.

    The hardware's exp2 sees x * log2(e) rounded to float32, which alone would cost a relative
    error of |x| * 2**-24. The rest of that product, a number r far below 1, enters as
    2**r = 1 + r * ln 2.

    Args:
        x: float32, of magnitude at most 150 or NaN (the callers clamp it).
    """
    product = x * LOG2_E
    rest = tl.fma(x, LOG2_E, -product) + x * LOG2_E_TAIL
    return tl.exp2(product) * (1.0 + rest * LN_2)


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x) of a float32 tile."""
    # Comparisons with NaN are false: a NaN passes the clamps. At 100 the exponential is already
    # infinite and at -100 already nothing, so the clamps do not show in the result.
    z = tl.where(x > 100.0, 100.0, x)
    z = tl.where(z < -100.0, -100.0, z)
    return 1.0 / (1.0 + exponential(-z))


@triton.jit
def tanh(x):
    """Hyperbolic tangent of a float32 tile.

    Away from zero 1 - 2 / (1 + e**2|x|); near it, where that cancels, an odd polynomial whose
    relative error against tanh on [-0.6, 0.6] is at most 2.8e-9 (a weighted minimax fit).
    """
    magnitude = tl.abs(x)
    z = tl.where(magnitude > 20.0, 20.0, magnitude)
    far = 1.0 - 2.0 / (1.0 + exponential(2.0 * z))
    far = tl.where(x < 0.0, -far, far)
    square = x * x
    series = square * -0.005895157650625267 + 0.020795971274173625
    series = square * series - 0.053783830153075654
    series = square * series + 0.1333192412506723
    series = square * series - 0.33333298002043354
    near = x + x * (square * series)
    return tl.where(magnitude < 0.6, near, far)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """A float32 tile in `dtype`, rounded to the nearest value, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        # A GPU rounds; the interpreter cuts the lower bits off, so they are rounded here first.
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, (bits + 32767 + ((bits >> 16) & 1)) & -65536, bits)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
