// Where the rows of a sequence lie, and in which order its steps are computed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lstm.h"

#define INLINE_MEMBER inline __attribute__((always_inline))

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// The steps of a group of rows in the order of computation, k = 0 ... T-1, whichever way time runs.
// Each row has a place in the group, those with the most steps the first ones: the rows that
// are active at a step have the places 0 ... active(k)-1.
struct Timeline {
  int64_t steps;
  bool reverse;
  int64_t first, count;   // its rows are first ... first+count-1, unless `rows` names them
  const int64_t *rows;    // [count], the row at each place, or null
  const int64_t *starts;  // [T+1], active rows of the steps before; null where all always are

  INLINE_MEMBER int64_t time(int64_t k) const { return reverse ? steps - 1 - k : k; }
  INLINE_MEMBER int64_t row(int64_t place) const { return rows ? rows[place] : first + place; }
  // Active rows of steps begin ... end-1.
  INLINE_MEMBER int64_t active(int64_t begin, int64_t end) const {
    return starts ? starts[end] - starts[begin] : (end - begin) * count;
  }
  INLINE_MEMBER int64_t active(int64_t k) const { return active(k, k + 1); }
  // Rows of step k that had a step before it; places continuing(k) ... active(k)-1 begin here.
  INLINE_MEMBER int64_t continuing(int64_t k) const {
    return k == 0 ? 0 : min(active(k - 1), active(k));
  }
  // Rows of step k that have a step after it; places lasting(k) ... active(k)-1 end here.
  INLINE_MEMBER int64_t lasting(int64_t k) const {
    return k == steps - 1 ? 0 : min(active(k + 1), active(k));
  }
  // Call each(t, row) for steps that a row does not have: of all of them, the part-th of `parts`.
  template <class Each>
  INLINE_MEMBER void for_each_idle(int64_t part, int64_t parts, Each each) const {
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t place = active(k) + part; place < count; place += parts) {
        each(time(k), row(place));
      }
    }
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
  // Zeros instead of a row, where there is such an output.
  INLINE_MEMBER void clear(int64_t t, int64_t b, int64_t width) const {
    if (data) __builtin_memset(at(t, b), 0, size_t(width) * sizeof(Real));
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

// What changes the recurrence, see lstm.h; data is null where it is off.
template <class Real>
struct Modifiers {
  Sequence<const uint8_t> resets;
  State<Real> recurrent_mask;
  Sequence<const Real> zoneout_h, zoneout_c;
  bool clips;
  Real cell_clip;
  const Real *zeros;  // [max(H, P)]; as many of a narrower type as well

  Modifiers(const LstmModifiers &m, const int64_t *row_offsets, const Real *zero_row)
      : resets(m.resets, row_offsets),
        recurrent_mask(m.recurrent_mask, nullptr),
        zoneout_h(m.zoneout_h, row_offsets),
        zoneout_c(m.zoneout_c, row_offsets),
        clips(m.cell_clip > 0),
        cell_clip(Real(m.cell_clip)),
        zeros(zero_row) {}
  INLINE_MEMBER bool reset(int64_t t, int64_t row) const {
    return resets.data && *resets.at(t, row);
  }
  // The row of h, or of c, that enters step k.
  template <class Stored>
  INLINE_MEMBER const Stored *before(const Sequence<Stored> &states, const State<Stored> &initial,
                                     const Timeline &timeline, int64_t k, int64_t place) const {
    const int64_t row = timeline.row(place);
    if (reset(timeline.time(k), row)) return reinterpret_cast<const Stored *>(zeros);
    if (place >= timeline.continuing(k)) return initial.at(row);
    return states.at(timeline.time(k - 1), row);
  }
};

// A matrix [depth, width] cut into panels of at most `wide` vectors of `lanes` columns. Either each
// is stored by itself, as [depth][columns * lanes] with zeros behind the last column, or the matrix
// stays where it is; then its width is whole vectors.
struct Panels {
  int64_t depth, width, lanes, wide;
  bool in_place = false;

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
  INLINE_MEMBER int64_t offset(int64_t panel) const {
    return start(panel) * lanes * (in_place ? 1 : depth);
  }
  // Elements from one row of a panel to the next.
  INLINE_MEMBER int64_t pitch(int64_t panel) const {
    return in_place ? width : columns(panel) * lanes;
  }
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
