// Where the rows of a sequence lie, and in which order its steps are computed.
#pragma once

#include <cstdint>

#include "lstm.h"

#define INLINE_MEMBER inline __attribute__((always_inline))

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The steps in the order of computation: k = 0 ... T-1, whatever the direction of time.
struct Timeline {
  int64_t steps, batch, rows;
  bool reverse;
  const int64_t *batch_sizes;  // [T], or null for a padded batch
  const int64_t *offsets;      // [T], rows of earlier steps, or null for a padded batch

  INLINE_MEMBER int64_t time(int64_t k) const { return reverse ? steps - 1 - k : k; }
  INLINE_MEMBER int64_t active(int64_t k) const {
    return batch_sizes ? batch_sizes[time(k)] : batch;
  }
  // Rows of step k that had a step before it; rows continuing(k) ... active(k)-1 begin here.
  INLINE_MEMBER int64_t continuing(int64_t k) const {
    return k == 0 ? 0 : min(active(k - 1), active(k));
  }
  // Rows of step k that have a step after it; rows lasting(k) ... active(k)-1 end here.
  INLINE_MEMBER int64_t lasting(int64_t k) const {
    return k == steps - 1 ? 0 : min(active(k + 1), active(k));
  }
};

// A tensor [T, B, F] or [N, F].
template <class Real>
struct Sequence {
  Real *data;
  int64_t stride_t, stride_b;
  const int64_t *offsets;

  Sequence(const LstmSequence &s, const int64_t *row_offsets)
      : data(static_cast<Real *>(s.data)),
        stride_t(s.stride_t),
        stride_b(s.stride_b),
        offsets(row_offsets) {}
  INLINE_MEMBER Real *at(int64_t t, int64_t b) const {
    return data + (offsets ? (offsets[t] + b) * stride_b : t * stride_t + b * stride_b);
  }
};

// A tensor [B, F] that is read; null stands for zeros.
template <class Real>
struct State {
  const Real *data;
  int64_t stride_b;

  State(const LstmState &s, const Real *zeros)
      : data(s.data ? static_cast<const Real *>(s.data) : zeros),
        stride_b(s.data ? s.stride_b : 0) {}
  INLINE_MEMBER const Real *at(int64_t b) const { return data + b * stride_b; }
};

// A matrix [depth, width] cut into panels of at most `wide` vectors of `lanes` columns, each stored
// as [depth][columns * lanes] with zeros behind the last column.
struct Panels {
  int64_t depth, width, lanes, wide;

  INLINE_MEMBER int64_t vectors() const { return divide_up(width, lanes); }
  INLINE_MEMBER int64_t size() const { return vectors() * lanes * depth; }
  // `wide` is 1, 2 or 4: what is left of the vectors makes at most a 2 and a 1.
  INLINE_MEMBER int64_t count() const {
    const int64_t left = vectors() % wide;
    return vectors() / wide + (left == 3 ? 2 : left > 0);
  }
  INLINE_MEMBER int64_t start(int64_t panel) const {
    const int64_t whole = vectors() / wide;
    return panel <= whole ? panel * wide : whole * wide + 2;
  }
  INLINE_MEMBER int64_t columns(int64_t panel) const {
    const int64_t left = min(vectors() - start(panel), wide);
    return left == 3 ? 2 : left;
  }
  INLINE_MEMBER int64_t offset(int64_t panel) const { return start(panel) * lanes * depth; }
  INLINE_MEMBER int64_t first_column(int64_t panel) const { return start(panel) * lanes; }
  // Columns of the matrix, not of its padding.
  INLINE_MEMBER int64_t filled(int64_t panel) const {
    return min(columns(panel) * lanes, width - first_column(panel));
  }
  // The widest panels of which each of `members` gets one.
  static int64_t wide_for(int64_t width, int64_t lanes, int64_t members) {
    const int64_t vectors = divide_up(width, lanes);
    return vectors >= 4 * members ? 4 : vectors >= 2 * members ? 2 : 1;
  }
};
