// The mathematics of a cell: its activation functions, and one step of it.
#pragma once
#include "layout.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
// What float32 loses of log2(e).
constexpr float LOG2_E_TAIL = 1.925963033500012e-08f;
constexpr float LN_2 = 0.6931471805599453f;

// e^x, for x up to 88 or NaN, with the rounding of x log2(e) given back: that alone would cost a
// relative error of |x| 2^-24. What is left of the product, r, enters as 2^r = 1 + r ln 2. (Beyond
// 88 the power overflows, and infinity times r would be NaN.)
DEVICE float exponential(float x) {
  const float product = x * LOG2_E;
  const float rest =
      device::fused_multiply_add(x, LOG2_E_TAIL, device::fused_multiply_add(x, LOG2_E, -product));
  const float power = device::exp2_approximate(product);
  return device::fused_multiply_add(power, rest * LN_2, power);
}

// The activations, as exact as what becomes of them: relative error a few 2^-24 for float32,
// absolute error about 2^-23 for float16, relative error 2^-11 for bfloat16 (in one instruction of
// the special function unit instead of two). All pass NaN on and reach their limits.

template <Type TYPE>
DEVICE float sigmoid(float x) {
  if constexpr (TYPE == Type::float32) {
    // Comparisons with NaN are false. Beyond 88 the result is 0, all but 2^-126, or 1 anyway.
    const float z = x > 88.f ? 88.f : x < -88.f ? -88.f : x;
    return device::reciprocal_approximate(1.f + exponential(-z));
  } else if constexpr (TYPE == Type::float16) {
    return device::reciprocal_approximate(1.f + device::exp2_approximate(-LOG2_E * x));
  } else {
    return device::fused_multiply_add(device::tanh_approximate(0.5f * x), 0.5f, 0.5f);
  }
}

// Of the forget gate. A cell state is multiplied by it again and again: an error e of f is one of
// e / (1 - f) of the state, which bfloat16's form above would make larger than its rounding.
template <Type TYPE>
DEVICE float sigmoid_of_forget(float x) {
  return sigmoid<TYPE == Type::bfloat16 ? Type::float16 : TYPE>(x);
}

template <Type TYPE>
DEVICE float tanh(float x) {
  if constexpr (TYPE == Type::float32) {
    // Away from zero 1 - 2 / (1 + e^2|x|); near it, where that cancels, an odd polynomial with a
    // relative error of at most 2.8e-9 on [-0.6, 0.6] (a weighted minimax fit).
    const float magnitude = x < 0.f ? -x : x;
    const float z = magnitude > 20.f ? 20.f : magnitude;
    const float far = 1.f - 2.f * device::reciprocal_approximate(1.f + exponential(2.f * z));
    const float square = x * x;
    float series =
        device::fused_multiply_add(square, -0.005895157650625267f, 0.020795971274173625f);
    series = device::fused_multiply_add(square, series, -0.053783830153075654f);
    series = device::fused_multiply_add(square, series, 0.1333192412506723f);
    series = device::fused_multiply_add(square, series, -0.33333298002043354f);
    const float near = device::fused_multiply_add(x, square * series, x);
    return magnitude < 0.6f ? near : x < 0.f ? -far : far;
  } else if constexpr (TYPE == Type::float16) {
    const float power = device::exp2_approximate(2.f * LOG2_E * x);
    return 1.f - 2.f * device::reciprocal_approximate(1.f + power);
  } else {
    return device::tanh_approximate(x);
  }
}

// The candidate for the new cell state, within +-cell_clip. NaN stays.
template <class C>
DEVICE float clipped(float c, float cell_clip) {
  if constexpr (C::HAS_CELL_CLIP) c = c > cell_clip ? cell_clip : c < -cell_clip ? -cell_clip : c;
  return c;
}

// What a cell has computed in a step: its gates after activation, and its state.
struct Cell {
  float i, f, g, o, c, h;
};

// One step of a cell (Hochreiter & Schmidhuber 1997; Gers et al. 2000), from its gates before
// activation, a[k] = gates + h W_hh^T in the order i, f, g, o:
//
//   i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g)
//   c = f c_before + i g                                   clipped with HAS_CELL_CLIP
//   h = o tanh(c)
//   c = zoneout_c c_before + (1 - zoneout_c) c             with HAS_ZONEOUT_C (Krueger et al. 2017)
//   h = zoneout_h h_before + (1 - zoneout_h) h             with HAS_ZONEOUT_H
template <class C>
DEVICE Cell cell_forward(const float (&a)[GATES], float h_before, float c_before, float zoneout_h,
                         float zoneout_c, float cell_clip) {
  Cell cell;
  cell.i = sigmoid<C::TYPE>(a[0]);
  cell.f = sigmoid_of_forget<C::TYPE>(a[1]);
  cell.g = tanh<C::TYPE>(a[2]);
  cell.o = sigmoid<C::TYPE>(a[3]);
  cell.c = clipped<C>(device::fused_multiply_add(cell.f, c_before, cell.i * cell.g), cell_clip);
  cell.h = cell.o * tanh<C::TYPE>(cell.c);
  if constexpr (C::HAS_ZONEOUT_C) cell.c = zoneout_c * c_before + (1.f - zoneout_c) * cell.c;
  if constexpr (C::HAS_ZONEOUT_H) cell.h = zoneout_h * h_before + (1.f - zoneout_h) * cell.h;
  return cell;
}
