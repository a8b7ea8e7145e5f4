// How the kernels divide their work, and the sizes that follow from it.
//
// A team of blocks works on a tile of the batch, all hidden units, from the first step to the last;
// each block of it owns UNITS hidden units. Everything that moves is counted in chunks of 16 bytes,
// and everything that is multiplied in tiles of 32 bytes along K, two chunks, so that elements of
// 16 bits and TF32 numbers of 32 share one code: see multiply_add in device.cuh.
#pragma once
#include "device.cuh"
#include "parameters.h"

// How what one block computes reaches the others of its team; see exchange.cuh.
enum class Scope { block, cluster, grid };

constexpr int LANES = 32;
constexpr int CHUNK_BYTES = 16;
constexpr int K_TILE_BYTES = 32;
// Units that one pair of matrix tiles has all four gates of; see forward.cuh.
constexpr int GROUP_UNITS = 8;
constexpr int GATES = 4;

constexpr int round_up(int number, int multiple) {
  return (number + multiple - 1) / multiple * multiple;
}
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a < b ? b : a; }

// The forward kernel's division of its work, from its configuration C (config.py has the fields).
template <class C>
struct ForwardLayout {
  typedef typename Element<C::TYPE>::Bits Bits;
  static constexpr int ELEMENT = sizeof(Bits);
  static constexpr int CHUNK_ELEMENTS = CHUNK_BYTES / ELEMENT;
  // Chunks that the 8 units of a group fill in one column.
  static constexpr int GROUP_CHUNKS = GROUP_UNITS / CHUNK_ELEMENTS;

  static constexpr int WARPS = C::UNIT_WARPS * C::K_WARPS;
  static constexpr int THREADS = WARPS * LANES;
  static constexpr int UNITS = C::UNIT_WARPS * C::GROUPS * GROUP_UNITS;

  // K, the units that h W_hh^T sums over: padded so that every warp has pairs of tiles.
  static constexpr int K_TILE = K_TILE_BYTES / ELEMENT;
  static constexpr int K_UNITS = round_up(C::TEAM * UNITS, 2 * K_TILE * C::K_WARPS);
  static constexpr int K_TILES = K_UNITS / K_TILE / C::K_WARPS;
  static constexpr int SHARED_TILES = K_TILES - C::REGISTER_TILES;
  static constexpr bool PADDED = K_UNITS != C::HIDDEN;

  // A slab is a group's 8 units in 4 columns, a cell for each lane. The slabs of a group are dealt
  // to the warps that share its sum over K; where these are more, the first ones own one each.
  static constexpr int COLUMN_TILES = C::COLUMNS / 8;
  static constexpr int SLABS = 2 * COLUMN_TILES;
  static constexpr int SLAB_OWNERS = smaller(C::K_WARPS, SLABS);
  static constexpr int OWN_SLABS = SLABS / SLAB_OWNERS;
  // Two sets of sums where there would be one chain of products that wait for each other.
  static constexpr int SUMS = C::TERMS == 1 && C::GROUPS * COLUMN_TILES == 1 ? 2 : 1;

  static constexpr int SLAB_BYTES = LANES * GATES * ELEMENT;
  static constexpr int WARP_GATE_BYTES = C::GROUPS * OWN_SLABS * SLAB_BYTES;

  // Shared memory: h twice, weights that registers do not hold, sums on their way between the warps
  // that share them, gates of the steps to come, mbarriers.
  static constexpr int H_BYTES = K_UNITS * C::COLUMNS * ELEMENT;
  static constexpr int WEIGHTS = 2 * H_BYTES;
  static constexpr int SUMS_OF_K = WEIGHTS + SHARED_TILES * C::GROUPS * 2 * THREADS * CHUNK_BYTES;
  static constexpr int GATE_RING = SUMS_OF_K + SLAB_OWNERS * C::UNIT_WARPS * (C::K_WARPS - 1) *
                                                   C::GROUPS * OWN_SLABS * LANES * GATES * 4;
  static constexpr int MBARRIERS = GATE_RING + C::STAGES * WARPS * WARP_GATE_BYTES;
  static constexpr int SHARED_BYTES = MBARRIERS + 16;
  static constexpr int EXCHANGE_BYTES = C::SCOPE == Scope::grid ? 2 * H_BYTES : 0;

  static_assert(C::HIDDEN % GROUP_UNITS == 0, "hidden units come in groups of 8");
  static_assert(C::TEAM * UNITS >= C::HIDDEN, "the team must own every unit");
  static_assert(C::COLUMNS == 8 || C::COLUMNS == 16 || C::COLUMNS == 32 || C::COLUMNS == 64, "");
  static_assert(C::K_WARPS == 1 || C::K_WARPS == 2 || C::K_WARPS == 4 || C::K_WARPS == 8, "");
  static_assert(C::REGISTER_TILES % 2 == 0 && SHARED_TILES >= 0, "");
  static_assert((C::SCOPE == Scope::block) == (C::TEAM == 1), "a block alone exchanges nothing");
  static_assert(C::SCOPE != Scope::cluster || C::TEAM <= 16, "");
  static_assert(C::TERMS == 1 || (C::TERMS == 3 && C::TYPE == Type::float32), "");
  static_assert(!C::PACKED || C::HAS_LENGTHS, "packed rows come with their lengths");
};
