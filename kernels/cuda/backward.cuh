// The backward kernel: the gradient of the whole LSTM recurrence in one launch.
//
// From the last step to the first, with d for the derivative of the loss:
//
//   dh_t = grad_h_t + carried_h;  dc_t = grad_c_t + carried_c   at first: grad_h_n, grad_c_n
//   da_i, da_f, da_g, da_o, carried_c                            cell_backward()
//   carried_h = da W_hh                                multiply_gradients(), GradientReduction
//
// and, with everything that can modify it, at the steps t < length of a row:
//
//   carried_h = recurrent_mask (da W_hh) + zoneout_h dh_t        0 where t was reset
//   carried_c = dc^ f + zoneout_c dc_t                           0 where t was reset
//
// In the end grad_h0 = carried_h and grad_c0 = carried_c.
//
// A team of TEAM blocks works on a tile of COLUMNS batch rows (columns of the product, hence the
// name), all T steps. Each block owns UNITS hidden units: it computes their da, in which a unit's
// four gates are adjacent, and keeps their 4 UNITS rows of W_hh, which it loads once, in registers
// as far as they go. The product of the two is one of TEAM terms of carried_h, of all H units: a
// partial. Each unit's owner gets the partials of its units (reduce.cuh) and adds them up.
// carried_h and carried_c stay in registers, in float32.
//
// Warp (row_warp, k_warp) multiplies ROW_TILES tiles of 16 units of carried_h with its 1 / K_WARPS
// of the block's da. What multiply_add leaves in a lane goes on as one chunk of 16 bytes, a
// fragment.
#pragma once
#include "backward_layout.cuh"
#include "cell.cuh"
#include "elements.cuh"
#include "multiply.cuh"
#include "reduce.cuh"

// What a cell passes on: the gradients of its gates before activation, what c_before has of dc, and
// what h_before has of dh past the gates.
struct CellGradients {
  float i, f, g, o, c_before, h_before;
};

// The gradients of one step of a cell (cell_forward), from those of its h (dh) and of its c by all
// later paths (dc):
//
//   dh^ = (1 - zoneout_h) dh                                     dh without HAS_ZONEOUT_H
//   dc^ = (1 - zoneout_c) dc + dh^ o (1 - tanh(c^)^2)            0 unless |c^| < cell_clip
//   da_i = dc^ g i (1 - i)        da_f = dc^ c_before f (1 - f)
//   da_g = dc^ i (1 - g^2)        da_o = dh^ tanh(c^) o (1 - o)
//   c_before: dc^ f + zoneout_c dc;  h_before: zoneout_h dh
//
// c^ is c before zoneout: c itself, or computed again with HAS_ZONEOUT_C.
template <class C>
DEVICE CellGradients cell_backward(float dh, float dc, float i, float f, float g, float o, float c,
                                   float c_before, float zoneout_h, float zoneout_c,
                                   float cell_clip) {
  CellGradients gradients;
  gradients.h_before = 0.f;
  float kept_dc = 0.f;
  if constexpr (C::HAS_ZONEOUT_H) {
    gradients.h_before = zoneout_h * dh;
    dh = (1.f - zoneout_h) * dh;
  }
  if constexpr (C::HAS_ZONEOUT_C) {
    kept_dc = zoneout_c * dc;
    dc = (1.f - zoneout_c) * dc;
    c = clipped<C>(device::fused_multiply_add(f, c_before, i * g), cell_clip);
  }
  const float tanh_c = tanh<C::TYPE>(c);
  dc = device::fused_multiply_add(dh * o, 1.f - tanh_c * tanh_c, dc);
  if constexpr (C::HAS_CELL_CLIP) dc = (c < 0.f ? -c : c) < cell_clip ? dc : 0.f;
  gradients.i = dc * g * (i * (1.f - i));
  gradients.f = dc * c_before * (f * (1.f - f));
  gradients.g = dc * i * (1.f - g * g);
  gradients.o = dh * tanh_c * (o * (1.f - o));
  gradients.c_before = dc * f;
  if constexpr (C::HAS_ZONEOUT_C) gradients.c_before += kept_dc;
  return gradients;
}

// Where a thread is in its block, lane = 4 g + q, and which cells are its own. Cell (share, k) is
// word k of the thread's part of a share of a fragment; within the fragment the words are in the
// order (even columns: units 0-7, 8-15), (odd columns: units 0-7, 8-15).
template <class C>
struct BackwardPlace {
  typedef BackwardLayout<C> L;
  static constexpr int SHARE_COLUMNS = L::COLUMN_TILES * L::FRAGMENT_SHARES;
  // Whether all cells of a thread are in the columns of its first share.
  static constexpr bool ALIGNED = L::WARPS % SHARE_COLUMNS == 0;
  // The columns of a thread's cells: one or two for each share, or for all of them.
  static constexpr int EDGES = L::SHARE_SLABS == 4 ? 2 : 1;
  static constexpr int OWN_COLUMNS = (ALIGNED ? 1 : L::OWN_SHARES) * EDGES;
  // Whether there are cells of no unit.
  static constexpr bool PADDED = C::TEAM * L::UNIT_TILES * L::TILE_UNITS != C::HIDDEN ||
                                 L::OWN_SHARES * L::WARPS != L::SHARES;

  const u32 thread, lane, g, q, warp, row_warp, k_warp;

  DEVICE BackwardPlace(u32 thread)
      : thread(thread),
        lane(thread % LANES),
        g(lane / 4),
        q(lane % 4),
        warp(thread / LANES),
        row_warp(C::K_WARPS == 1 ? warp : warp % C::ROW_WARPS),
        k_warp(C::K_WARPS == 1 ? 0 : warp / C::ROW_WARPS) {}

  DEVICE u32 unit_tile(int share) const {
    if constexpr (ALIGNED) return warp / SHARE_COLUMNS + share * (L::WARPS / SHARE_COLUMNS);
    return (warp + share * L::WARPS) / SHARE_COLUMNS;
  }
  DEVICE u32 share_column(int share) const {
    return ALIGNED ? warp % SHARE_COLUMNS : (warp + share * L::WARPS) % SHARE_COLUMNS;
  }
  DEVICE u32 fragment(int share) const {
    return unit_tile(share) * L::COLUMN_TILES + share_column(share) / L::FRAGMENT_SHARES;
  }
  // The first word of a share in a fragment, and that of a cell.
  DEVICE u32 word(int share) const {
    return share_column(share) % L::FRAGMENT_SHARES * L::SHARE_SLABS;
  }
  DEVICE u32 odd(int share, int k) const { return L::SHARE_SLABS == 4 ? k / 2 : word(share) / 2; }
  DEVICE u32 half(int share, int k) const { return L::SHARE_SLABS == 1 ? word(share) % 2 : k % 2; }
  // The first unit, in the block, of a cell's slab; and the column, in the tile, of its row q.
  DEVICE u32 unit(int share, int k) const {
    return unit_tile(share) * L::TILE_UNITS + half(share, k) * GROUP_UNITS;
  }
  DEVICE u32 column(int share, int k, u32 q) const {
    return share_column(share) / L::FRAGMENT_SHARES * 8 + 2 * q + odd(share, k);
  }
  // The units from the first cell of a thread's column to this one of the same column.
  static constexpr DEVICE int unit_offset(int share, int k) {
    return (ALIGNED ? share * (L::WARPS / SHARE_COLUMNS) * L::TILE_UNITS : 0) +
           (L::SHARE_SLABS > 1 ? k % 2 * GROUP_UNITS : 0);
  }
  // Which of the thread's columns a cell is in, and the first cell of that column.
  static constexpr DEVICE int own_column(int share, int k) {
    return (ALIGNED ? 0 : share * EDGES) + (EDGES == 2 ? k / 2 : 0);
  }
  DEVICE u32 column_of(int own, u32 q) const { return column(own / EDGES, own % EDGES * 2, q); }
  DEVICE u32 unit_of(int own) const { return unit(own / EDGES, own % EDGES * 2); }
  // Whether a slab has units.
  DEVICE bool exists(int share, int k, u32 first_unit) const {
    if constexpr (!PADDED) return true;
    return unit_tile(share) < L::UNIT_TILES && unit(share, k) < C::UNITS &&
           first_unit + unit(share, k) < C::HIDDEN;
  }
};

// Loops over the cells of a thread; all of them are unrolled.
#define FOR_EACH_CELL(share, k)                                 \
  _Pragma("unroll") for (int share = 0; share < L::OWN_SHARES; share++) \
      _Pragma("unroll") for (int k = 0; k < L::SHARE_SLABS; k++)

// The same of those in one of the thread's columns.
#define FOR_EACH_CELL_OF(own, share, k) \
  FOR_EACH_CELL(share, k) if (BackwardPlace<C>::own_column(share, k) == own)

// A number for each cell of a thread.
template <class C, class Number>
using OfCells = Number[BackwardLayout<C>::OWN_SHARES][BackwardLayout<C>::SHARE_SLABS];

// Rows of W_hh^T as the left operands of multiply_add: ROW_TILES tiles for each tile of K.
// A[unit j of h][4 u + gate] = W_hh[gate H + u][j].
template <class C>
struct BackwardWeights : Fragments<C::REGISTER_TILES, C::ROW_TILES, BackwardLayout<C>::THREADS> {
  typedef BackwardLayout<C> L;
  static constexpr bool ROWS_PADDED = C::ROW_WARPS * C::ROW_TILES * L::TILE_UNITS != C::HIDDEN;
  static constexpr bool K_PADDED =
      L::K_CHUNKS * L::CHUNK_UNITS != C::UNITS || C::TEAM * C::UNITS != C::HIDDEN;

  // One base address and offsets known to the compiler: 64 addresses would not fit into registers.
  DEVICE void load(const void* weight_hh, u32 first_unit, const BackwardPlace<C>& place,
                   u32 shared_base) {
    this->shared = shared_base + L::WEIGHTS + place.thread * CHUNK_BYTES;
    // Word q of a chunk is two gates of one of two units, or a gate of its only unit.
    const u32 gate = L::ELEMENT == 2 ? place.q % 2 * 2 : place.q;
    const u32 unit = place.k_warp * L::K_TILES * 2 * L::CHUNK_UNITS +
                     (L::ELEMENT == 2 ? place.q / 2 : 0);
    const u32 row = place.row_warp * C::ROW_TILES * L::TILE_UNITS + place.g;
    const u8* base =
        (const u8*)weight_hh +
        ((u64)(gate * C::HIDDEN + first_unit + unit) * C::HIDDEN + row) * L::ELEMENT;
#pragma unroll
    for (int tile = 0; tile < L::K_TILES; tile++)
#pragma unroll
      for (int m = 0; m < C::ROW_TILES; m++) {
        u32 a[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const int units = (2 * tile + r / 2) * L::CHUNK_UNITS;
          const int rows = m * L::TILE_UNITS + r % 2 * 8;
          const u8* from = base + ((u64)units * C::HIDDEN + rows) * L::ELEMENT;
          const bool exists =
              (!ROWS_PADDED || row + rows < C::HIDDEN) &&
              (!K_PADDED || (unit + units < C::UNITS && first_unit + unit + units < C::HIDDEN));
          if constexpr (L::ELEMENT == 2) {
            const u32 low = exists ? device::load_global16(from) : 0;
            const u32 high =
                exists ? device::load_global16(from + (u64)C::HIDDEN * C::HIDDEN * L::ELEMENT) : 0;
            a[r] = low | high << 16;
          } else {
            a[r] = exists ? device::load_global32(from) : 0;
            if constexpr (C::TERMS == 1) a[r] = device::round_to_tf32(a[r]);
          }
        }
        this->put(a, tile, m);
      }
  }
};

template <class C>
using BackwardSums =
    float[BackwardLayout<C>::SUMS][C::ROW_TILES][BackwardLayout<C>::PASS_TILES][4];

// sums = W_hh^T da of this warp's rows and part of K, in PASS_TILES tiles of columns from
// `first_tile` on.
template <class C>
DEVICE void multiply_gradients(BackwardSums<C>& sums, const BackwardWeights<C>& weights, u32 shared,
                               int first_tile, u32 half, const BackwardPlace<C>& place) {
  typedef BackwardLayout<C> L;
  const u32 operand = shared + L::OPERAND +
                      (place.k_warp * L::K_TILES * 2 + place.lane / 8) * L::OPERAND_STRIDE +
                      (first_tile * 8 + place.lane % 8) * CHUNK_BYTES;
  multiply<C::TYPE, C::TERMS, L::K_TILES>(sums, weights, operand, L::OPERAND_STRIDE, half);
}

// Computes this warp's part of the partials and sends it to the owners of the units.
template <class C, class Reduction>
DEVICE void send_partials(int s, const BackwardWeights<C>& weights, const Reduction& reduction,
                          u32 shared, const BackwardPlace<C>& place) {
  typedef BackwardLayout<C> L;
#pragma unroll
  for (int first_tile = 0; first_tile < L::COLUMN_TILES; first_tile += L::PASS_TILES) {
    BackwardSums<C> sums;
    multiply_gradients<C>(sums, weights, shared, first_tile, half_bit(s), place);
#pragma unroll
    for (int m = 0; m < C::ROW_TILES; m++) {
      const u32 row_tile = place.row_warp * C::ROW_TILES + m;
      if (C::ROW_WARPS * C::ROW_TILES != L::ROW_TILES && row_tile >= L::ROW_TILES) continue;
      const u32 owner = row_tile / L::UNIT_TILES, unit_tile = row_tile % L::UNIT_TILES;
#pragma unroll
      for (int n = 0; n < L::PASS_TILES; n++) {
        float sum[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          // Words 1 and 2 change places: those of one column are adjacent.
          const int word = k == 1 ? 2 : k == 2 ? 1 : k;
          sum[k] = sums[0][m][n][word];
#pragma unroll
          for (int set = 1; set < L::SUMS; set++) sum[k] += sums[set][m][n][word];
        }
        reduction.put(s, owner, place.k_warp, unit_tile * L::COLUMN_TILES + first_tile + n,
                      place.lane, sum);
      }
    }
  }
}

// The sums of the partials of a thread's cells: da W_hh, in a fixed order.
template <class C>
DEVICE void add_partials(OfCells<C, float>& sums, u32 partials, const BackwardPlace<C>& place) {
  typedef BackwardLayout<C> L;
#pragma unroll
  for (int producer = 0; producer < L::ADDED_PARTIALS; producer++)
#pragma unroll
    for (int share = 0; share < L::OWN_SHARES; share++) {
      if (L::OWN_SHARES * L::WARPS != L::SHARES && place.unit_tile(share) >= L::UNIT_TILES) {
#pragma unroll
        for (int k = 0; k < L::SHARE_SLABS; k++) sums[share][k] = 0.f;
        continue;
      }
      const u32 address = partials + producer * L::PARTIAL_BYTES +
                          place.fragment(share) * L::FRAGMENT_BYTES + place.lane * CHUNK_BYTES +
                          (place.word(share) + turn<C>(place.lane)) % 4 * 4;
      float part[L::SHARE_SLABS];
      if constexpr (L::SHARE_SLABS == 4) {
        const Words4 v = device::load_shared128(address);
        part[0] = device::float_of(v.x), part[1] = device::float_of(v.y);
        part[2] = device::float_of(v.z), part[3] = device::float_of(v.w);
      } else if constexpr (L::SHARE_SLABS == 2) {
        const Words2 v = device::load_shared64(address);
        part[0] = device::float_of(v.x), part[1] = device::float_of(v.y);
      } else {
        part[0] = device::float_of(device::load_shared32(address));
      }
#pragma unroll
      for (int k = 0; k < L::SHARE_SLABS; k++)
        sums[share][k] = producer ? sums[share][k] + part[k] : part[k];
    }
}

// The activations of the steps to come, on their way from global to shared memory. Each warp
// fetches those of its own cells, as chunks: for each slab [4 gates][4 columns][8 units].
template <class C>
struct ActivationRing {
  typedef BackwardLayout<C> L;
  typedef typename L::Bits Bits;
  typedef BackwardPlace<C> Place;
  static constexpr int SLAB_CHUNKS = L::SLAB_BYTES / CHUNK_BYTES;
  // A lane copies a chunk of every COPY_SLABS slabs: 2 slabs have 32 chunks of 16 bits.
  static constexpr int COPY_SLABS = LANES / SLAB_CHUNKS;

  u32 base;
  int stage = 0;
  int length[Place::OWN_COLUMNS];  // of the columns of this lane's chunks

  template <class Lengths>
  DEVICE ActivationRing(const Place& place, u32 shared, const Lengths& length_of) {
    base = shared + L::RING + place.warp * (L::CELLS * L::SLAB_BYTES);
#pragma unroll
    for (int own = 0; own < Place::OWN_COLUMNS; own++)
      length[own] = length_of(place.column_of(own, chunk_q(place)));
  }

  DEVICE u32 chunk_q(const Place& place) const { return place.lane / L::GROUP_CHUNKS % 4; }

  // Begins to copy the activations of step t into the stage that was read last. Column 0 of the
  // tile has row `row` of all rows.
  DEVICE void fetch(const void* activations, int t, i64 row, u32 first_unit, const Place& place) {
    const u32 gate = place.lane % SLAB_CHUNKS / L::GROUP_CHUNKS / 4;
    const u32 part = place.lane % L::GROUP_CHUNKS;
    // The first slab of a copy is known to the compiler; a lane may have the other half of it.
    const u32 other_half =
        L::SHARE_SLABS > 1 && place.lane >= (u32)SLAB_CHUNKS ? GROUP_UNITS : 0;
#pragma unroll
    for (int own = 0; own < Place::OWN_COLUMNS; own++) {
      const bool takes_part = (u32)t < (u32)length[own];
      const i64 first = (row + place.column_of(own, chunk_q(place))) * (GATES * C::HIDDEN) +
                        gate * C::HIDDEN + first_unit + place.unit_of(own) + other_half +
                        part * L::CHUNK_ELEMENTS;
      const Bits* from = (const Bits*)activations + (takes_part ? first : 0);
#pragma unroll
      for (int share = 0; share < L::OWN_SHARES; share++)
#pragma unroll
        for (int k = 0; k < L::SHARE_SLABS; k += COPY_SLABS) {
          if (Place::own_column(share, k) != own) continue;
          bool valid = takes_part;
          if constexpr (Place::PADDED)
            valid = valid && place.unit_tile(share) < L::UNIT_TILES &&
                    place.unit(share, k) + other_half < C::UNITS &&
                    first_unit + place.unit(share, k) + other_half < C::HIDDEN;
          const u32 to = base + stage * L::STAGE_BYTES +
                         (share * L::SHARE_SLABS + k) * L::SLAB_BYTES + place.lane * CHUNK_BYTES;
          if (L::SHARE_SLABS >= COPY_SLABS || place.lane < (u32)SLAB_CHUNKS)
            device::copy_async16(to, valid ? from + Place::unit_offset(share, k) : from, valid);
        }
    }
    device::copy_async_commit();
    stage = stage + 1 == C::STAGES ? 0 : stage + 1;
  }

  // Waits until the activations of the step whose turn it is are there for the whole warp.
  DEVICE void wait() const {
    device::copy_async_wait<C::STAGES - 1>();
    device::sync_warp();
  }

  DEVICE Bits read(int share, int k, int gate, const Place& place) const {
    const u32 address = base + stage * L::STAGE_BYTES +
                        (share * L::SHARE_SLABS + k) * L::SLAB_BYTES +
                        ((gate * 4 + place.q) * GROUP_UNITS + place.g) * L::ELEMENT;
    if constexpr (L::ELEMENT == 2)
      return device::load_shared16(address);
    else
      return device::load_shared32(address);
  }
};

// A thread's cells in the tensors of a recurrence. Their indices are those of the first cell of
// each of its columns; to the column's other cells it is unit_offset.
template <class C>
struct BackwardCells {
  typedef BackwardLayout<C> L;
  typedef BackwardPlace<C> Place;
  const BackwardRecurrence& r;
  const Place& place;
  const u32 first_unit;
  const i64 first_column;
  int length[Place::OWN_COLUMNS];  // a column has steps t < length

  template <class Lengths>
  DEVICE BackwardCells(const BackwardRecurrence& r, const Place& place, u32 first_unit,
                       i64 first_column, const Lengths& length_of)
      : r(r), place(place), first_unit(first_unit), first_column(first_column) {
#pragma unroll
    for (int own = 0; own < Place::OWN_COLUMNS; own++)
      length[own] = length_of(place.column_of(own, place.q));
  }

  DEVICE bool exists(int share, int k) const { return place.exists(share, k, first_unit); }
  DEVICE bool has_step(int t, int own) const { return (u32)t < (u32)length[own]; }
  DEVICE bool takes_part(int t, int share, int k) const {
    return exists(share, k) && has_step(t, Place::own_column(share, k));
  }
  // Whether step t is the first in the order of the forward pass, which c0 entered.
  DEVICE bool begins(int t, int own) const { return t == (r.reverse ? length[own] - 1 : 0); }

  DEVICE i64 column(int own) const { return first_column + place.column_of(own, place.q); }
  DEVICE u32 unit(int own) const { return first_unit + place.unit_of(own) + place.g; }
  // In [T, B, H] or [N, H]; `row` is the first of the step.
  DEVICE i64 index(i64 row, int own) const { return (row + column(own)) * C::HIDDEN + unit(own); }
  // Of the gate i in [T, B, 4H] or [N, 4H].
  DEVICE i64 gates_index(i64 row, int own) const {
    return (row + column(own)) * (GATES * C::HIDDEN) + unit(own);
  }
  // Of a row of step t in a tensor with strides.
  DEVICE i64 row_index(int t, i64 row, i64 stride_t, i64 stride_b, int own) const {
    return C::PACKED ? (row + column(own)) * stride_b : t * stride_t + column(own) * stride_b;
  }

  // Loads numbers of the cells of a column: load(index) is to become number[share][k].
  template <class Number, class Load>
  DEVICE void load(OfCells<C, Number>& number, int own, i64 first, const Load& load) const {
    FOR_EACH_CELL_OF(own, share, k)
      if (exists(share, k)) number[share][k] = load(first + Place::unit_offset(share, k));
  }
};

// What a step needs besides activations, loaded into registers while the step before is computed.
template <class C>
struct StepInputs {
  typedef BackwardLayout<C> L;
  typedef BackwardPlace<C> Place;
  OfCells<C, typename L::Bits> grad_h;
  OfCells<C, u32> grad_c;
  OfCells<C, float> c_before;
  OfCells<C, u32> zoneout_h, zoneout_c;
  bool reset[Place::OWN_COLUMNS];

  // Zeros where there is nothing. `row` is the first of step t, `row_before` that of the step that
  // was computed before it in the forward pass.
  DEVICE void load(int t, i64 row, i64 row_before, const BackwardCells<C>& cells) {
    const BackwardRecurrence& r = cells.r;
    const Modifiers& m = r.modifiers;
#pragma unroll
    for (int own = 0; own < Place::OWN_COLUMNS; own++) {
      clear(own);
      if (!cells.has_step(t, own)) continue;
      const u32 unit = cells.unit(own);
      if (r.grad_h)
        cells.load(grad_h, own,
                   cells.row_index(t, row, r.grad_h_stride_t, r.grad_h_stride_b, own) + unit,
                   [&](i64 index) { return load_element<C>(r.grad_h, index); });
      if (r.grad_c)
        cells.load(grad_c, own,
                   cells.row_index(t, row, r.grad_c_stride_t, r.grad_c_stride_b, own) + unit,
                   [&](i64 index) { return device::load_global32(r.grad_c + index); });
      if (cells.begins(t, own))
        cells.load(c_before, own, cells.index(0, own),
                   [&](i64 index) { return load_number<C>(r.c0, r.wide_states, index); });
      else
        cells.load(c_before, own, cells.index(row_before, own), [&](i64 index) {
          return device::float_of(device::load_global32(r.c + index));
        });
      if constexpr (C::HAS_ZONEOUT_H)
        cells.load(zoneout_h, own,
                   cells.row_index(t, row, m.zoneout_h_stride_t, m.zoneout_h_stride_b, own) + unit,
                   [&](i64 index) {
                     return load_bits<C>(m.zoneout_h, m.zoneout_h_is_float, index);
                   });
      if constexpr (C::HAS_ZONEOUT_C)
        cells.load(zoneout_c, own,
                   cells.row_index(t, row, m.zoneout_c_stride_t, m.zoneout_c_stride_b, own) + unit,
                   [&](i64 index) {
                     return load_bits<C>(m.zoneout_c, m.zoneout_c_is_float, index);
                   });
      if constexpr (C::HAS_RESETS)
        reset[own] =
            device::load_global8(m.resets + cells.row_index(t, row, m.resets_stride_t,
                                                            m.resets_stride_b, own)) != 0;
    }
  }

  DEVICE void clear(int own) {
    FOR_EACH_CELL_OF(own, share, k) {
      grad_h[share][k] = 0;
      grad_c[share][k] = zoneout_h[share][k] = zoneout_c[share][k] = 0;
      c_before[share][k] = 0.f;
    }
    reset[own] = false;
  }
};

// What a thread carries from step to step.
template <class C>
struct BackwardState {
  typedef BackwardLayout<C> L;
  typedef BackwardPlace<C> Place;
  typedef typename L::Bits Bits;
  OfCells<C, float> dh, dc;  // carried_h, but for its product while that is computed; carried_c
  OfCells<C, float> c;       // c of the step to come
  OfCells<C, float> mask;
  bool goes_on[L::OWN_SHARES][L::SHARE_SLABS];  // whether the product of this step is carried
  Bits da[L::OWN_SHARES][L::SHARE_SLABS][GATES];

  DEVICE BackwardState(const BackwardCells<C>& cells, int batch) {
    const BackwardRecurrence& r = cells.r;
    FOR_EACH_CELL(share, k) {
      const int own = Place::own_column(share, k);
      const i64 index = cells.index(0, own) + Place::unit_offset(share, k);
      const bool in_batch = cells.exists(share, k) && cells.column(own) < batch;
      dh[share][k] = dc[share][k] = c[share][k] = 0.f;
      mask[share][k] = 1.f;
      if (in_batch && r.grad_h_n)
        dh[share][k] = load_number<C>(r.grad_h_n, r.wide_states, index);
      if (in_batch && r.grad_c_n)
        dc[share][k] = load_number<C>(r.grad_c_n, r.wide_states, index);
      if constexpr (C::HAS_RECURRENT_MASK)
        if (in_batch)
          mask[share][k] =
              device::to_float<C::TYPE>(load_element<C>(r.modifiers.recurrent_mask, index));
      // c after the last step in the order of the forward pass.
      const int t = r.reverse ? 0 : cells.length[own] - 1;
      if (cells.takes_part(t, share, k))
        c[share][k] = device::float_of(device::load_global32(
            r.c + cells.index(first_row<C>(r.modifiers, t, batch), own) +
            Place::unit_offset(share, k)));
    }
  }

  // Computes da of step t, rounded, and what is carried past it but the product.
  DEVICE void step(int t, const StepInputs<C>& inputs, const ActivationRing<C>& activations,
                   const BackwardCells<C>& cells) {
    const Modifiers& m = cells.r.modifiers;
    FOR_EACH_CELL(share, k) {
#pragma unroll
      for (int gate = 0; gate < GATES; gate++)
        da[share][k][gate] = activations.read(share, k, gate, cells.place);
    }
    FOR_EACH_CELL(share, k) {
      // A column beyond the batch needs no care: nothing of it is stored, nor reaches others.
      const bool valid =
          !(C::HAS_LENGTHS || Place::PADDED) || cells.takes_part(t, share, k);
      const bool reset = C::HAS_RESETS && inputs.reset[Place::own_column(share, k)];
      const float c_before = inputs.c_before[share][k];
      float zoneout_h = 0.f, zoneout_c = 0.f;
      if constexpr (C::HAS_ZONEOUT_H)
        zoneout_h = number_of<C>(inputs.zoneout_h[share][k], m.zoneout_h_is_float);
      if constexpr (C::HAS_ZONEOUT_C)
        zoneout_c = number_of<C>(inputs.zoneout_c[share][k], m.zoneout_c_is_float);
      Bits(&gates)[GATES] = da[share][k];
      const CellGradients gradients = cell_backward<C>(
          dh[share][k] + device::to_float<C::TYPE>(inputs.grad_h[share][k]),
          dc[share][k] + device::float_of(inputs.grad_c[share][k]),
          device::to_float<C::TYPE>(gates[0]), device::to_float<C::TYPE>(gates[1]),
          device::to_float<C::TYPE>(gates[2]), device::to_float<C::TYPE>(gates[3]), c[share][k],
          reset ? 0.f : c_before, zoneout_h, zoneout_c, m.cell_clip);
      gates[0] = valid ? device::from_float<C::TYPE>(gradients.i) : Bits(0);
      gates[1] = valid ? device::from_float<C::TYPE>(gradients.f) : Bits(0);
      gates[2] = valid ? device::from_float<C::TYPE>(gradients.g) : Bits(0);
      gates[3] = valid ? device::from_float<C::TYPE>(gradients.o) : Bits(0);
      goes_on[share][k] = valid && !reset;
      if (valid) {
        dh[share][k] = reset ? 0.f : gradients.h_before;
        dc[share][k] = reset ? 0.f : gradients.c_before;
        c[share][k] = c_before;
      }
    }
  }

  // Writes da where the product reads it: a unit's four gates are adjacent.
  DEVICE void publish(u32 shared, const Place& place) const {
    FOR_EACH_CELL(share, k) {
      // Cells of no unit may have no place.
      if (Place::PADDED && place.unit_tile(share) >= L::UNIT_TILES) continue;
      const u32 chunk = place.unit(share, k) / L::CHUNK_UNITS + place.g / L::CHUNK_UNITS;
      const u32 address = shared + L::OPERAND + chunk * L::OPERAND_STRIDE +
                          place.column(share, k, place.q) * CHUNK_BYTES +
                          place.g % L::CHUNK_UNITS * (GATES * L::ELEMENT);
      const Bits(&v)[GATES] = da[share][k];
      if constexpr (L::ELEMENT == 2)
        device::store_shared64(address, Words2{v[0] | (u32)v[1] << 16, v[2] | (u32)v[3] << 16});
      else if constexpr (C::TERMS == 1)
        device::store_shared128(address,
                                Words4{device::round_to_tf32(v[0]), device::round_to_tf32(v[1]),
                                       device::round_to_tf32(v[2]), device::round_to_tf32(v[3])});
      else
        device::store_shared128(address, Words4{v[0], v[1], v[2], v[3]});
    }
  }

  // Stores da of step t, whose first row is `row`.
  DEVICE void store(int t, i64 row, const BackwardCells<C>& cells) const {
#pragma unroll
    for (int own = 0; own < Place::OWN_COLUMNS; own++) {
      if (!cells.has_step(t, own)) continue;
      const i64 first = cells.gates_index(row, own);
      FOR_EACH_CELL_OF(own, share, k) {
        if (!cells.exists(share, k)) continue;
#pragma unroll
        for (int gate = 0; gate < GATES; gate++)
          store_element<C>(cells.r.grad_gates,
                           first + gate * C::HIDDEN + Place::unit_offset(share, k),
                           da[share][k][gate]);
      }
    }
  }

  // Adds the product, which is the sum of the partials in shared memory.
  DEVICE void add_product(u32 partials, const Place& place) {
    OfCells<C, float> product;
    add_partials<C>(product, partials, place);
    FOR_EACH_CELL(share, k) {
      if constexpr (C::HAS_RECURRENT_MASK) product[share][k] *= mask[share][k];
      if (goes_on[share][k]) dh[share][k] += product[share][k];
    }
  }

  // Stores what is carried past the first step: the gradients of the initial state.
  DEVICE void store_initial(const BackwardCells<C>& cells, int batch) const {
    const BackwardRecurrence& r = cells.r;
    FOR_EACH_CELL(share, k) {
      const int own = Place::own_column(share, k);
      if (!cells.exists(share, k) || cells.column(own) >= batch) continue;
      const i64 index = cells.index(0, own) + Place::unit_offset(share, k);
      store_number<C>(r.grad_h0, r.wide_states, index, dh[share][k]);
      store_number<C>(r.grad_c0, r.wide_states, index, dc[share][k]);
    }
  }
};

template <class C>
DEVICE void lstm_backward(const BackwardParameters& p) {
  typedef BackwardLayout<C> L;
  const u32 shared = device::shared_base();
  const BackwardPlace<C> place(device::thread_index());
  const GradientReduction<C, C::SCOPE> reduction(p, shared, place.thread);
  const BackwardRecurrence& r = p.recurrence[reduction.team / p.tiles];
  const u32 first_unit = reduction.rank * C::UNITS;
  const i64 first_column = (i64)(p.first_tile + reduction.team % p.tiles) * C::COLUMNS;

  // The steps of a column of the tile: none beyond the batch.
  auto length_of = [&](u32 column) {
    if (first_column + column >= p.batch) return 0;
    if constexpr (C::HAS_LENGTHS) {
      const int length = device::load_global64(r.modifiers.lengths + first_column + column).x;
      return length < r.steps ? length : r.steps;
    }
    return r.steps;
  };
  // The tile's steps: those of its longest row.
  int steps = r.steps;
  if constexpr (C::HAS_LENGTHS) {
    steps = 0;
    for (u32 column = 0; column < C::COLUMNS; column++) {
      const int length = length_of(column);
      steps = steps < length ? length : steps;
    }
  }

  BackwardWeights<C> weights;
  weights.load(r.weight_hh, first_unit, place, shared);
  // Where K is padded da is 0 in all steps.
  if constexpr (BackwardWeights<C>::K_PADDED)
    for (u32 i = place.thread; i < L::K_CHUNKS * L::OPERAND_STRIDE / CHUNK_BYTES; i += L::THREADS)
      device::store_shared128(shared + L::OPERAND + i * CHUNK_BYTES, Words4{0, 0, 0, 0});

  // Step s, in the order of computation, is that of time(s). row(s, later) is the first row of the
  // step `later` steps after it; of packed rows it was loaded well before.
  const int first_time = r.reverse ? 0 : steps - 1, direction = r.reverse ? 1 : -1;
  auto time = [&](int s) { return first_time + s * direction; };
  auto load_row = [&](int s) {
    return s < steps ? first_row<C>(r.modifiers, time(s), p.batch) : 0;
  };
  i64 first_rows[C::STAGES + 1] = {};
  if constexpr (C::PACKED) {
#pragma unroll
    for (int later = 0; later <= C::STAGES; later++) first_rows[later] = load_row(later);
  }
  auto row = [&](int s, int later) {
    return C::PACKED ? first_rows[later] : (i64)time(s + later) * p.batch;
  };

  ActivationRing<C> activations(place, shared, length_of);
#pragma unroll
  for (int s = 0; s < C::STAGES; s++)
    activations.fetch(r.activations, time(s), row(0, s) + first_column, first_unit, place);
  const BackwardCells<C> cells(r, place, first_unit, first_column, length_of);
  BackwardState<C> state(cells, p.batch);
  StepInputs<C> inputs;
  inputs.load(time(0), row(0, 0), row(0, 1), cells);
  reduction.start();

#pragma unroll 1
  for (int s = 0; s < steps; s++) {
    i64 incoming_row = 0;
    if constexpr (C::PACKED) incoming_row = load_row(s + C::STAGES + 1);
    activations.wait();
    state.step(time(s), inputs, activations, cells);
    state.publish(shared, place);
    device::sync_block();

    // What the next steps need begins to come, and what this one has made leaves, meanwhile.
    activations.fetch(r.activations, time(s + C::STAGES), row(s, C::STAGES) + first_column,
                      first_unit, place);
    inputs.load(time(s + 1), row(s, 1), row(s, 2), cells);
    state.store(time(s), row(s, 0), cells);

    send_partials<C>(s, weights, reduction, shared, place);
    reduction.sent(s);
    reduction.wait(s);
    state.add_product(reduction.partials(s), place);
    if constexpr (C::PACKED) {
#pragma unroll
      for (int later = 0; later < C::STAGES; later++) first_rows[later] = first_rows[later + 1];
      first_rows[C::STAGES] = incoming_row;
    }
  }

  state.store_initial(cells, p.batch);
  reduction.finish();
}

#define LSTM_BACKWARD_KERNEL(Configuration)                                                 \
  extern "C" __global__ void __launch_bounds__(BackwardLayout<Configuration>::THREADS, 1)   \
      lstm_backward_kernel(const __grid_constant__ BackwardParameters p) {                  \
    lstm_backward<Configuration>(p);                                                        \
  }
