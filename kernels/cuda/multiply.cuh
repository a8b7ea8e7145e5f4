// The product that both kernels are made of: a few rows of weights, held as left operands, times a
// few columns of a small operand in shared memory; float32, too, on tensor cores, which have TF32.
#pragma once
#include "layout.cuh"

// Half of the last bit that `high` of split() keeps: 0x1000 in every step s, which compilers do not
// know. Else they would split the weights, the same in all steps, before the first one, and keep
// both parts in registers that are not there.
DEVICE u32 half_bit(int s) { return 0x1000 + (device::unknown(s) >> 31); }

// word = high + low, two TF32 numbers: high is rounded; of low, the exact rest, the tensor core
// does not look at the bits beyond the eleventh, 2^-23 of word at most. A NaN stays one in low.
DEVICE void split(u32 word, u32 half_bit, u32& high, u32& low) {
  high = (word + half_bit) & 0xffffe000;
  low = device::bits_of(device::float_of(word) - device::float_of(high));
}

// Left operands that a thread keeps for all steps: fragments of ROWS tiles of rows for each tile
// along K, the first ones in registers, the others in shared memory, [tile][row tile][thread].
template <int REGISTER_TILES, int ROWS, int THREADS>
struct Fragments {
  u32 registers[larger(REGISTER_TILES, 1)][ROWS][4];
  u32 shared;  // where this thread's first one in shared memory is

  DEVICE u32 address(int tile, int m) const {
    return shared + ((tile - REGISTER_TILES) * ROWS + m) * THREADS * CHUNK_BYTES;
  }
  // `tile` is known to the compiler.
  DEVICE void put(const u32 (&a)[4], int tile, int m) {
    if (tile < REGISTER_TILES) {
#pragma unroll
      for (int r = 0; r < 4; r++) registers[tile < REGISTER_TILES ? tile : 0][m][r] = a[r];
    } else {
      device::store_shared128(address(tile, m), Words4{a[0], a[1], a[2], a[3]});
    }
  }
  DEVICE void held(u32 (&a)[4], int tile, int m) const {
#pragma unroll
    for (int r = 0; r < 4; r++) a[r] = registers[tile][m][r];
  }
  DEVICE void stored(u32 (&a)[4], int tile, int m) const {
    const Words4 v = device::load_shared128(address(tile, m));
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
  }
};

// sums += A B over the tiles `tile` and `tile` + 1 along K.
//
// sums: [sets of sums][tiles of 16 rows][tiles of 8 columns], each as multiply_add has it. Tiles
//   along K take turns with the sets, so that products need not wait for each other; there is one
//   set for TERMS = 3.
// b: B's words, as load_matrices has them: two for each of the two tiles.
// half: half_bit of this step.
// get(a, k, m): reads A's fragment of tile k along K and rows m.
//
// With TERMS = 3 each product of float32 words is three of TF32, the small ones first; what is left
// out, low times low, is below float32's rounding. Tensor cores cut off what does not fit into a
// sum: of a sum over two tiles that is little, and the long sums are rounded.
template <Type TYPE, int TERMS, int SUMS, int ROWS, int COLUMNS, class Get>
DEVICE void multiply_add_pair(float (&sums)[SUMS][ROWS][COLUMNS][4], int tile,
                              const u32 (&b)[COLUMNS][4], u32 half, const Get& get) {
  if constexpr (TERMS == 3) {
    static_assert(SUMS == 1, "");
    u32 high_b[COLUMNS][4], low_b[COLUMNS][4];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) split(b[n][r], half, high_b[n][r], low_b[n][r]);
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
      float parts[COLUMNS][4] = {};
#pragma unroll
      for (int k = 0; k < 2; k++) {
        u32 a[4], high[4], low[4];
        get(a, tile + k, m);
#pragma unroll
        for (int r = 0; r < 4; r++) split(a[r], half, high[r], low[r]);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
          const u32(&high_n)[4] = high_b[n], (&low_n)[4] = low_b[n];
          device::multiply_add<TYPE>(parts[n], low, high_n[2 * k], high_n[2 * k + 1]);
          device::multiply_add<TYPE>(parts[n], high, low_n[2 * k], low_n[2 * k + 1]);
          device::multiply_add<TYPE>(parts[n], high, high_n[2 * k], high_n[2 * k + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < COLUMNS; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) sums[0][m][n][r] += parts[n][r];
    }
  } else {
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int m = 0; m < ROWS; m++) {
        u32 a[4];
        get(a, tile + k, m);
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
          device::multiply_add<TYPE>(sums[(tile + k) % SUMS][m][n], a, b[n][2 * k],
                                     b[n][2 * k + 1]);
      }
  }
}

// sums = A B over all K_TILES tiles along K; see multiply_add_pair.
//
// operand: the address from which this lane loads its row of B's first matrices; `chunk_stride`
//   bytes further are the next chunks along K, CHUNK_BYTES * 8 further the next tile of columns.
template <Type TYPE, int TERMS, int K_TILES, int SUMS, int ROWS, int COLUMNS, int REGISTER_TILES,
          int THREADS>
DEVICE void multiply(float (&sums)[SUMS][ROWS][COLUMNS][4],
                     const Fragments<REGISTER_TILES, ROWS, THREADS>& weights, u32 operand,
                     int chunk_stride, u32 half) {
#pragma unroll
  for (int k = 0; k < SUMS * ROWS * COLUMNS * 4; k++) (&sums[0][0][0][0])[k] = 0.f;
  u32 b[COLUMNS][4];
  auto load = [&](int pair) {
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
      device::load_matrices(b[n], operand + pair * 2 * chunk_stride + n * 8 * CHUNK_BYTES);
  };
#pragma unroll
  for (int pair = 0; pair < REGISTER_TILES; pair += 2) {
    load(pair);
    multiply_add_pair<TYPE, TERMS>(sums, pair, b, half, [&](u32(&a)[4], int k, int m) {
      weights.held(a, k, m);
    });
  }
  // Unrolled, the loads of what is split would all come first, into too many registers.
#pragma unroll(TERMS == 3 ? 1 : K_TILES)
  for (int pair = REGISTER_TILES; pair < K_TILES; pair += 2) {
    load(pair);
    multiply_add_pair<TYPE, TERMS>(sums, pair, b, half, [&](u32(&a)[4], int k, int m) {
      weights.stored(a, k, m);
    });
  }
}
