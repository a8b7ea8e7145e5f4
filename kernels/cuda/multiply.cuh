// The product that both kernels are made of: a few rows of weights, held as left operands, times a few
// columns of a small operand in shared memory; and float32 on tensor cores, which multiply TF32.
#pragma once
#include "device.cuh"

// word = high + low, two TF32 numbers: high is rounded; of low, the exact rest, the tensor core does
// not look at the bits beyond the eleventh, 2^-23 of word at most. A NaN stays one in low.
DEVICE void split(u32 word, u32& high, u32& low) {
  high = (word + 0x1000) & 0xffffe000;
  low = device::bits_of(device::float_of(word) - device::float_of(high));
}

// sum += a b of float32 words over two tiles along K, each of three TF32 products, the small ones
// first; what is left out, low times low, is below float32's rounding. Tensor cores cut off what they
// add: of what is added up here that is little, and the long sum is rounded.
DEVICE void multiply_add_split(float (&sum)[4], const u32 (&a)[2][4], const u32 (&high_b)[4],
                               const u32 (&low_b)[4]) {
  float part[4] = {0.f, 0.f, 0.f, 0.f};
  u32 high[2][4], low[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
#pragma unroll
    for (int r = 0; r < 4; r++)
      split(device::unknown(a[tile][r]), high[tile][r], low[tile][r]);
    device::multiply_add<Type::float32>(part, low[tile], high_b[2 * tile], high_b[2 * tile + 1]);
    device::multiply_add<Type::float32>(part, high[tile], low_b[2 * tile], low_b[2 * tile + 1]);
  }
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
    device::multiply_add<Type::float32>(part, high[tile], high_b[2 * tile], high_b[2 * tile + 1]);
#pragma unroll
  for (int k = 0; k < 4; k++) sum[k] += part[k];
}

// sums += A B over the tiles `tile` and `tile` + 1 along K.
//
// sums: [sets of sums][tiles of 16 rows][tiles of 8 columns], each as multiply_add has it. Tiles along
//   K take turns with the sets, so that products need not wait for each other.
// b: B's words, as load_matrices has them: two for each of the two tiles.
// get(a, k, m): reads A's fragment of tile k along K and rows m.
template <Type TYPE, int TERMS, int SUMS, int ROWS, int COLUMNS, class Get>
DEVICE void multiply_add_pair(float (&sums)[SUMS][ROWS][COLUMNS][4], int tile,
                              const u32 (&b)[COLUMNS][4], const Get& get) {
  if constexpr (TERMS == 3) {
    u32 high[COLUMNS][4], low[COLUMNS][4];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) split(b[n][r], high[n][r], low[n][r]);
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
      u32 a[2][4];
      get(a[0], tile, m);
      get(a[1], tile + 1, m);
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) multiply_add_split(sums[tile / 2 % SUMS][m][n], a, high[n], low[n]);
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
          device::multiply_add<TYPE>(sums[(tile + k) % SUMS][m][n], a, b[n][2 * k], b[n][2 * k + 1]);
      }
  }
}
