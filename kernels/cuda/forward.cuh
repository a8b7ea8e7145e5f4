// The forward kernel: the whole LSTM recurrence in one launch.
//
//   a_t = gates_t + h_{t-1} W_hh^T                   multiply_hidden()
//   i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)        cell_forward() in cell.cuh
//   c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)
//
// and, with everything that can modify it, at the steps t < length of a row:
//
//   h', c' = 0, 0 where resets_t, else h_{t-1}, c_{t-1}
//   a_t = gates_t + (h' recurrent_mask) W_hh^T
//   c^  = clip(f c' + i g);  h^ = o tanh(c^)
//   c_t = zoneout_c c' + (1 - zoneout_c) c^;  h_t = zoneout_h h' + (1 - zoneout_h) h^
//
// A team of TEAM blocks works on a tile of COLUMNS batch rows (columns of the product, hence the
// name), all T steps. Each block owns UNITS hidden units: 4 UNITS rows of W_hh, which it loads once
// and keeps, in registers as far as they go, and c of its units, in float32 registers.
//
// The rows of W_hh are dealt so that no gate has to change lanes. A group is 8 units; its 32 rows
// are two matrix tiles of 16: i of the 8 units over f of the same, and g over o. Of each product a
// lane then holds i, f, g and o of one unit in two columns. Warp (unit_warp, k_warp) multiplies
// GROUPS groups with its 1 / K_WARPS of K; the warps that share a group add their sums up in shared
// memory and divide its cells between them.
#pragma once
#include "cell.cuh"
#include "elements.cuh"
#include "exchange.cuh"
#include "layout.cuh"
#include "multiply.cuh"

// Where a thread is in its block: lane = 4 g + q.
template <class C>
struct ForwardPlace {
  typedef ForwardLayout<C> L;
  const u32 thread, lane, g, q, warp, unit_warp, k_warp;

  DEVICE ForwardPlace(u32 thread)
      : thread(thread),
        lane(thread % LANES),
        g(lane / 4),
        q(lane % 4),
        warp(thread / LANES),
        unit_warp(C::K_WARPS == 1 ? warp : warp % C::UNIT_WARPS),
        k_warp(C::K_WARPS == 1 ? 0 : warp / C::UNIT_WARPS) {}

  // Whether this warp has cells: of a few columns there are fewer slabs than warps that share them.
  DEVICE bool has_cells() const { return (int)k_warp < L::SLAB_OWNERS; }
  // The column, in the tile, of row `q` of this warp's slab.
  DEVICE u32 column(u32 slab, u32 q) const {
    const u32 k = k_warp * L::OWN_SLABS + slab;
    return k / 2 * 8 + 2 * q + k % 2;
  }
  // The first unit, in the block, of a group of this warp.
  DEVICE u32 unit(u32 group) const { return (unit_warp * C::GROUPS + group) * GROUP_UNITS; }
};

// Rows of W_hh as left operands. A group has two tiles of rows: i over f, and g over o.
template <class C>
struct ForwardWeights : Fragments<C::REGISTER_TILES, C::GROUPS * 2, ForwardLayout<C>::THREADS> {
  typedef ForwardLayout<C> L;

  // One base address and offsets known to the compiler: 64 addresses would not fit into registers.
  DEVICE void load(const void* weight_hh, u32 first_unit, const ForwardPlace<C>& place,
                   u32 shared_base) {
    this->shared = shared_base + L::WEIGHTS + place.thread * CHUNK_BYTES;
    const u32 unit = first_unit + place.unit(0) + place.g;
    const u32 k = place.k_warp * L::K_TILES * L::K_TILE + place.q * (4 / L::ELEMENT);
    const u8* base = (const u8*)weight_hh + ((u64)unit * C::HIDDEN + k) * L::ELEMENT;
#pragma unroll
    for (int tile = 0; tile < L::K_TILES; tile++)
#pragma unroll
      for (int group = 0; group < C::GROUPS; group++)
#pragma unroll
        for (int m = 0; m < 2; m++) {
          u32 a[4];
#pragma unroll
          for (int r = 0; r < 4; r++) {
            const int gate = 2 * m + r % 2, k_offset = (2 * tile + r / 2) * L::CHUNK_ELEMENTS;
            const u8* from = base + ((u64)(gate * C::HIDDEN + group * GROUP_UNITS) * C::HIDDEN +
                                     k_offset) *
                                        L::ELEMENT;
            const bool exists = !L::PADDED || (unit + group * GROUP_UNITS < C::HIDDEN &&
                                               k + k_offset < C::HIDDEN);
            a[r] = exists ? device::load_global32(from) : 0;
            if constexpr (C::TYPE == Type::float32 && C::TERMS == 1)
              a[r] = device::round_to_tf32(a[r]);
          }
          this->put(a, tile, group * 2 + m);
        }
  }
};

template <class C>
using ForwardSums = float[ForwardLayout<C>::SUMS][C::GROUPS * 2][ForwardLayout<C>::COLUMN_TILES][4];

// sums = W_hh h^T of this warp's units and part of K; h is read from the buffer at `hidden`.
template <class C>
DEVICE void multiply_hidden(ForwardSums<C>& sums, const ForwardWeights<C>& weights, u32 hidden,
                            u32 half, const ForwardPlace<C>& place) {
  typedef ForwardLayout<C> L;
  constexpr int CHUNK_STRIDE = C::COLUMNS * CHUNK_BYTES;
  const u32 operand = hidden + (place.k_warp * L::K_TILES * 2 + place.lane / 8) * CHUNK_STRIDE +
                      place.lane % 8 * CHUNK_BYTES;
  multiply<C::TYPE, C::TERMS, L::K_TILES>(sums, weights, operand, CHUNK_STRIDE, half);
}

template <class C>
using ForwardCells = float[C::GROUPS][ForwardLayout<C>::OWN_SLABS][GATES];

// The products of this thread's cells, summed over the warps that share K.
template <class C>
DEVICE void gather(ForwardCells<C>& a, const ForwardSums<C>& sums, u32 shared,
                   const ForwardPlace<C>& place) {
  typedef ForwardLayout<C> L;
  // Gate `gate` of slab k of a group, as multiply_add lays it out.
  auto part = [&](int group, int k, int gate) {
    float sum = sums[0][group * 2 + gate / 2][k / 2][gate % 2 * 2 + k % 2];
    if constexpr (L::SUMS == 2) sum += sums[1][group * 2 + gate / 2][k / 2][gate % 2 * 2 + k % 2];
    return sum;
  };
  if constexpr (C::K_WARPS == 1) {
#pragma unroll
    for (int group = 0; group < C::GROUPS; group++)
#pragma unroll
      for (int slab = 0; slab < L::OWN_SLABS; slab++)
#pragma unroll
        for (int gate = 0; gate < GATES; gate++) a[group][slab][gate] = part(group, slab, gate);
  } else {
    // To each owner of slabs there are K_WARPS - 1 places, one for every other warp, in order.
    auto address = [&](u32 owner, u32 source, int group, int slab) {
      const u32 place_of_sum =
          (owner * C::UNIT_WARPS + place.unit_warp) * (C::K_WARPS - 1) + source;
      return shared + L::SUMS_OF_K +
             (((place_of_sum * C::GROUPS + group) * L::OWN_SLABS + slab) * LANES + place.lane) *
                 CHUNK_BYTES;
    };
#pragma unroll
    for (int owner = 0; owner < L::SLAB_OWNERS; owner++)
#pragma unroll
      for (int group = 0; group < C::GROUPS; group++)
#pragma unroll
        for (int slab = 0; slab < L::OWN_SLABS; slab++) {
          float own[GATES];
#pragma unroll
          for (int gate = 0; gate < GATES; gate++)
            own[gate] = part(group, owner * L::OWN_SLABS + slab, gate);
          if (owner == (int)place.k_warp) {
#pragma unroll
            for (int gate = 0; gate < GATES; gate++) a[group][slab][gate] = own[gate];
          } else {
            const u32 source = place.k_warp - (place.k_warp > (u32)owner);
            device::store_shared128(address(owner, source, group, slab),
                                    Words4{device::bits_of(own[0]), device::bits_of(own[1]),
                                           device::bits_of(own[2]), device::bits_of(own[3])});
          }
        }
    device::sync_named(1 + place.unit_warp, C::K_WARPS * LANES);
    if (!place.has_cells()) return;
#pragma unroll
    for (int source = 0; source < C::K_WARPS - 1; source++)
#pragma unroll
      for (int group = 0; group < C::GROUPS; group++)
#pragma unroll
        for (int slab = 0; slab < L::OWN_SLABS; slab++) {
          const Words4 v = device::load_shared128(address(place.k_warp, source, group, slab));
          a[group][slab][0] += device::float_of(v.x);
          a[group][slab][1] += device::float_of(v.y);
          a[group][slab][2] += device::float_of(v.z);
          a[group][slab][3] += device::float_of(v.w);
        }
  }
}

// The gates of the steps to come, on their way from global to shared memory. Each warp fetches
// those of its own cells, as chunks: for each slab [4 gates][4 columns][8 units].
template <class C>
struct GateRing {
  typedef ForwardLayout<C> L;
  static constexpr int SLAB_CHUNKS = L::SLAB_BYTES / CHUNK_BYTES;
  static constexpr int CHUNKS = C::GROUPS * L::OWN_SLABS * SLAB_CHUNKS;
  static constexpr int COPIES = (CHUNKS + LANES - 1) / LANES;
  u32 base;
  int read = 0, write = 0;  // stages
  // This lane's chunks: where they are in a step's rows, in bytes, and until which step.
  i64 offset[COPIES];
  int length[COPIES];

  template <class Lengths>
  DEVICE GateRing(const ForwardRecurrence& r, const ForwardPlace<C>& place, u32 shared,
                  u32 first_unit, u32 first_column, const Lengths& length_of) {
    base = shared + L::GATE_RING + place.warp * L::WARP_GATE_BYTES;
#pragma unroll
    for (int k = 0; k < COPIES; k++) {
      const u32 chunk = place.lane + k * LANES;
      const u32 slab = chunk / SLAB_CHUNKS, within = chunk % SLAB_CHUNKS;
      const u32 group = slab / L::OWN_SLABS, part = within % L::GROUP_CHUNKS;
      const u32 gate = within / L::GROUP_CHUNKS / 4, q = within / L::GROUP_CHUNKS % 4;
      const u32 unit = first_unit + place.unit(group) + part * L::CHUNK_ELEMENTS;
      const u32 column = place.column(slab % L::OWN_SLABS, q);
      const bool exists = place.has_cells() && chunk < CHUNKS && unit < C::HIDDEN;
      length[k] = exists ? length_of(column) : 0;
      offset[k] =
          ((first_column + column) * r.gates_stride_b + gate * C::HIDDEN + unit) * L::ELEMENT;
    }
  }

  // Begins to copy the gates of step t, whose first row is number `row` of packed ones; of no step
  // if not `exists`.
  DEVICE void fetch(const ForwardRecurrence& r, int t, i64 row, bool exists,
                    const ForwardPlace<C>& place) {
    const u8* rows = (const u8*)r.gates +
                     (C::PACKED ? row * r.gates_stride_b : t * r.gates_stride_t) * L::ELEMENT;
#pragma unroll
    for (int k = 0; k < COPIES; k++) {
      const bool valid = exists && (C::HAS_LENGTHS ? t < length[k] : length[k] > 0);
      const u32 to = base + write * L::WARPS * L::WARP_GATE_BYTES +
                     (place.lane + k * LANES) * CHUNK_BYTES;
      if (CHUNKS % LANES == 0 || place.lane + k * LANES < CHUNKS)
        device::copy_async16(to, rows + (valid ? offset[k] : 0), valid);
    }
    device::copy_async_commit();
    write = write + 1 == C::STAGES ? 0 : write + 1;
  }

  // Waits until the gates of the step whose turn it is are there for the whole warp.
  DEVICE void wait() const {
    device::copy_async_wait<C::STAGES - 1>();
    device::sync_warp();
  }

  // Adds them to this lane's cell of a slab.
  DEVICE void add_to(float (&a)[GATES], int group, int slab, const ForwardPlace<C>& place) const {
    const u32 cell = base + read * L::WARPS * L::WARP_GATE_BYTES +
                     (group * L::OWN_SLABS + slab) * L::SLAB_BYTES +
                     (place.q * GROUP_UNITS + place.g) * L::ELEMENT;
#pragma unroll
    for (int gate = 0; gate < GATES; gate++) {
      const u32 address = cell + gate * 4 * GROUP_UNITS * L::ELEMENT;
      if constexpr (L::ELEMENT == 2)
        a[gate] += device::to_float<C::TYPE>(device::load_shared16(address));
      else
        a[gate] += device::float_of(device::load_shared32(address));
    }
  }

  DEVICE void next() { read = read + 1 == C::STAGES ? 0 : read + 1; }
};

template <class C>
DEVICE void lstm_forward(const ForwardParameters& p) {
  typedef ForwardLayout<C> L;
  typedef typename L::Bits Bits;
  constexpr int GROUPS = C::GROUPS, SLABS = L::OWN_SLABS;
  const u32 shared = device::shared_base();
  const ForwardPlace<C> place(device::thread_index());
  const HiddenExchange<C, C::SCOPE> exchange(p, shared, place.thread);
  const ForwardRecurrence& r = p.recurrence[exchange.team / p.tiles];
  const Modifiers& modifiers = r.modifiers;
  const u32 first_unit = exchange.rank * L::UNITS;
  const i64 first_column = (i64)(p.first_tile + exchange.team % p.tiles) * C::COLUMNS;

  // The steps of a column of the tile: none beyond the batch.
  auto length_of = [&](u32 column) {
    if (first_column + column >= p.batch) return 0;
    if constexpr (C::HAS_LENGTHS) {
      const int length = device::load_global64(modifiers.lengths + first_column + column).x;
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

  ForwardWeights<C> weights;
  weights.load(r.weight_hh, first_unit, place, shared);
  // Beyond the team's units K is padded: zeros that no one sends.
  constexpr u32 SENT_CHUNKS = C::TEAM * L::UNITS / L::CHUNK_ELEMENTS * C::COLUMNS;
  for (u32 i = SENT_CHUNKS + place.thread; i < L::H_BYTES / CHUNK_BYTES; i += L::THREADS) {
    device::store_shared128(shared + i * CHUNK_BYTES, Words4{0, 0, 0, 0});
    device::store_shared128(shared + L::H_BYTES + i * CHUNK_BYTES, Words4{0, 0, 0, 0});
  }

  // This lane's cells, one of each slab of each group.
  int length[SLABS];
  i64 cell[SLABS];  // index of the first group's cell in [B, H]
  bool exists[GROUPS][SLABS];
  Bits h[GROUPS][SLABS], mask[GROUPS][SLABS];
  float c[GROUPS][SLABS];
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++) {
    const u32 column = place.column(slab, place.q);
    const u32 unit = first_unit + place.unit(0) + place.g;
    length[slab] = place.has_cells() ? length_of(column) : 0;
    const bool in_batch = place.has_cells() && first_column + column < p.batch;
    cell[slab] = (first_column + column) * C::HIDDEN + unit;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      exists[group][slab] = in_batch && unit + group * GROUP_UNITS < C::HIDDEN;
      const i64 index = cell[slab] + group * GROUP_UNITS;
      const bool given = exists[group][slab];
      h[group][slab] = given ? load_element<C>(r.h0, index) : Bits(0);
      c[group][slab] = given ? load_number<C>(r.c0, r.wide_states, index) : 0.f;
      if constexpr (C::HAS_RECURRENT_MASK)
        mask[group][slab] =
            given ? load_element<C>(modifiers.recurrent_mask, index) : Bits(0);
    }
  }

  const int direction = r.reverse ? -1 : 1;
  int t = r.reverse ? steps - 1 : 0;
  auto takes_part = [&](int t, int slab) {
    return C::HAS_LENGTHS ? t < length[slab] : length[slab] > 0;
  };
  // Whether the state that enters step t in a column is to be zero.
  auto is_reset = [&](int t, i64 row, int slab) {
    if constexpr (C::HAS_RESETS) {
      if (!takes_part(t, slab)) return false;
      const i64 column = first_column + place.column(slab, place.q);
      const i64 first = C::PACKED ? row * modifiers.resets_stride_b : t * modifiers.resets_stride_t;
      const i64 index = first + column * modifiers.resets_stride_b;
      return device::load_global8(modifiers.resets + index) != 0;
    }
    return false;
  };
  // Writes what enters the product of step s, h', masked, into this block's buffer, and sends it.
  auto publish = [&](int s, const bool (&reset)[SLABS]) {
    const u32 buffer = (s & 1) * L::H_BYTES;
    if (place.has_cells()) {
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
          const u32 unit = first_unit + place.unit(group) + place.g;
          const u32 address = shared + buffer + (unit / L::CHUNK_ELEMENTS * C::COLUMNS +
                                                 place.column(slab, place.q)) *
                                                    CHUNK_BYTES +
                              unit % L::CHUNK_ELEMENTS * L::ELEMENT;
          Bits operand = h[group][slab];
          if constexpr (C::HAS_RECURRENT_MASK)
            operand = device::from_float<C::TYPE>(device::to_float<C::TYPE>(operand) *
                                                  device::to_float<C::TYPE>(mask[group][slab]));
          if constexpr (C::HAS_RESETS) operand = reset[slab] ? Bits(0) : operand;
          if constexpr (L::ELEMENT == 2)
            device::store_shared16(address, operand);
          else
            device::store_shared32(address,
                                   C::TERMS == 1 ? device::round_to_tf32(operand) : operand);
        }
      if constexpr (C::TEAM > 1) {
        device::sync_warp();
        constexpr u32 ROWS = SLABS * 4, CHUNKS = ROWS * L::GROUP_CHUNKS;
        constexpr u32 SENDS = CHUNKS * (C::SCOPE == Scope::cluster ? C::TEAM : 1);
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
          for (u32 first = 0; first < SENDS; first += LANES) {
            const u32 i = first + place.lane, chunk = i % CHUNKS;
            const u32 column = place.column(chunk / 4 % SLABS, chunk % 4);
            const u32 unit_chunk =
                (first_unit + place.unit(group)) / L::CHUNK_ELEMENTS + chunk / ROWS;
            const u32 offset = buffer + (unit_chunk * C::COLUMNS + column) * CHUNK_BYTES;
            if (SENDS % LANES == 0 || i < SENDS)
              exchange.send(s, i, CHUNKS, offset);
          }
      }
    }
    exchange.sent(s);
  };

  GateRing<C> gates(r, place, shared, first_unit, first_column, length_of);
  for (int stage = 0; stage < C::STAGES - 1; stage++) {
    const int later = t + stage * direction;
    const bool in_time = stage < steps;
    gates.fetch(r, later, in_time ? first_row<C>(modifiers, later, p.batch) : 0, in_time, place);
  }
  // The first rows of this step, and of the one whose gates are fetched next: loaded a step ahead.
  i64 row = steps ? first_row<C>(modifiers, t, p.batch) : 0;
  i64 fetched_row = 0;
  if (C::PACKED && C::STAGES - 1 < steps)
    fetched_row = first_row<C>(modifiers, t + (C::STAGES - 1) * direction, p.batch);

  bool reset[SLABS];
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++) reset[slab] = steps && is_reset(t, row, slab);
  exchange.start();
  if (steps) publish(0, reset);

#pragma unroll 1
  for (int s = 0; s < steps; s++, t += direction) {
    const bool last = s + 1 == steps;
    const int fetched = t + (C::STAGES - 1) * direction;
    gates.fetch(r, fetched, fetched_row, s + C::STAGES - 1 < steps, place);
    i64 next_row = 0;
    if constexpr (C::PACKED) {
      if (s + C::STAGES < steps)
        fetched_row = first_row<C>(modifiers, fetched + direction, p.batch);
      if (!last) next_row = first_row<C>(modifiers, t + direction, p.batch);
    }
    bool next_reset[SLABS];
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
      next_reset[slab] = !last && is_reset(t + direction, next_row, slab);
    float zoneout_h[GROUPS][SLABS], zoneout_c[GROUPS][SLABS];
    if constexpr (!C::PACKED) row = (i64)t * p.batch;
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int slab = 0; slab < SLABS; slab++) {
        zoneout_h[group][slab] = zoneout_c[group][slab] = 0.f;
        if (!exists[group][slab] || !takes_part(t, slab)) continue;
        const i64 column = first_column + place.column(slab, place.q);
        const i64 unit = first_unit + place.unit(group) + place.g;
        if constexpr (C::HAS_ZONEOUT_H)
          zoneout_h[group][slab] = load_number<C>(
              modifiers.zoneout_h, modifiers.zoneout_h_is_float,
              (C::PACKED ? row + column : column) * modifiers.zoneout_h_stride_b +
                  (C::PACKED ? 0 : t * modifiers.zoneout_h_stride_t) + unit);
        if constexpr (C::HAS_ZONEOUT_C)
          zoneout_c[group][slab] = load_number<C>(
              modifiers.zoneout_c, modifiers.zoneout_c_is_float,
              (C::PACKED ? row + column : column) * modifiers.zoneout_c_stride_b +
                  (C::PACKED ? 0 : t * modifiers.zoneout_c_stride_t) + unit);
      }

    exchange.wait(s);
    ForwardCells<C> a;
    {
      ForwardSums<C> sums;
      multiply_hidden<C>(sums, weights, shared + (s & 1) * L::H_BYTES, half_bit(s), place);
      gather<C>(a, sums, shared, place);
    }
    gates.wait();

    Cell cells[GROUPS][SLABS];
    if (place.has_cells()) {
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) gates.add_to(a[group][slab], group, slab, place);
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
          const float h_before = reset[slab] ? 0.f : device::to_float<C::TYPE>(h[group][slab]);
          const float c_before = reset[slab] ? 0.f : c[group][slab];
          const Cell now =
              cell_forward<C>(a[group][slab], h_before, c_before, zoneout_h[group][slab],
                              zoneout_c[group][slab], modifiers.cell_clip);
          cells[group][slab] = now;
          // Of units that only fill the team up h stays 0: from an infinite operand theirs is NaN.
          const bool kept = C::TEAM * L::UNITS == C::HIDDEN || exists[group][slab];
          if (kept && (!C::HAS_LENGTHS || takes_part(t, slab))) {
            c[group][slab] = now.c;
            h[group][slab] = device::from_float<C::TYPE>(now.h);
          }
        }
    }
    gates.next();
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) reset[slab] = next_reset[slab];
    if (!last) publish(s + 1, reset);

    // What is stored leaves while the others already wait for the next step.
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        if (!exists[group][slab] || !takes_part(t, slab)) continue;
        const i64 index = row * C::HIDDEN + cell[slab] + group * GROUP_UNITS;
        store_element<C>(r.h, index, h[group][slab]);
        if constexpr (C::SAVE_CELLS)
          device::store_global32(r.c + index, device::bits_of(c[group][slab]));
        if constexpr (C::SAVE_ACTIVATIONS) {
          // Rows of gates are four times as long.
          const i64 rows_before = row + first_column + place.column(slab, place.q);
          const i64 first = index + (GATES - 1) * rows_before * C::HIDDEN;
          const Cell& now = cells[group][slab];
          const float activations[GATES] = {now.i, now.f, now.g, now.o};
#pragma unroll
          for (int gate = 0; gate < GATES; gate++)
            store_element<C>(r.activations, first + gate * C::HIDDEN,
                             device::from_float<C::TYPE>(activations[gate]));
        }
      }
    if constexpr (C::PACKED) row = next_row;
  }

#pragma unroll
  for (int group = 0; group < GROUPS; group++)
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
      if (exists[group][slab]) {
        const i64 index = cell[slab] + group * GROUP_UNITS;
        store_element<C>(r.h_n, index, h[group][slab]);
        store_number<C>(r.c_n, r.wide_states, index, c[group][slab]);
      }
  exchange.finish();
}

#define LSTM_FORWARD_KERNEL(Configuration)                                                 \
  extern "C" __global__ void __launch_bounds__(ForwardLayout<Configuration>::THREADS, 1)   \
      lstm_forward_kernel(const __grid_constant__ ForwardParameters p) {                   \
    lstm_forward<Configuration>(p);                                                        \
  }
