// How the backward kernel divides its work, and the sizes that follow from it; see backward.cuh.
#pragma once
#include "layout.cuh"

// From the kernel's configuration C (instance.py has the fields).
template <class C>
struct BackwardLayout {
  typedef typename Element<C::TYPE>::Bits Bits;
  static constexpr int ELEMENT = sizeof(Bits);
  static constexpr int CHUNK_ELEMENTS = CHUNK_BYTES / ELEMENT;
  // Chunks that 8 units fill in one column; units whose four gates fill a chunk.
  static constexpr int GROUP_CHUNKS = GROUP_UNITS / CHUNK_ELEMENTS;
  static constexpr int CHUNK_UNITS = CHUNK_ELEMENTS / GATES;

  static constexpr int WARPS = C::ROW_WARPS * C::K_WARPS;
  static constexpr int THREADS = WARPS * LANES;

  // A fragment is what multiply_add makes of 16 units and 8 columns of dh: 16 bytes of a lane.
  static constexpr int TILE_UNITS = 16;
  static constexpr int UNIT_TILES = round_up(C::UNITS, TILE_UNITS) / TILE_UNITS;
  static constexpr int COLUMN_TILES = C::COLUMNS / 8;
  static constexpr int FRAGMENTS = UNIT_TILES * COLUMN_TILES;
  static constexpr int FRAGMENT_BYTES = LANES * CHUNK_BYTES;

  // K, the gates of this block's units that da W_hh sums over: padded so that every warp has pairs
  // of tiles.
  static constexpr int K_CHUNKS =
      round_up(UNIT_TILES * TILE_UNITS / CHUNK_UNITS, 2 * 2 * C::K_WARPS);
  static constexpr int K_TILES = K_CHUNKS / 2 / C::K_WARPS;
  static constexpr int SHARED_TILES = K_TILES - C::REGISTER_TILES;
  // Row tiles of the product, those of all the team's units.
  static constexpr int ROW_TILES = C::TEAM * UNIT_TILES;

  // Tiles of columns that a warp multiplies at a time: as many as 32 sums of a lane allow. Several
  // sets of sums where there would be less than four chains of products that wait for each other.
  static constexpr int PASS_TILES =
      smaller(COLUMN_TILES,
              C::ROW_TILES == 1 ? 8 : C::ROW_TILES == 2 ? 4 : C::ROW_TILES <= 4 ? 2 : 1);
  static constexpr int CHAINS = C::ROW_TILES * PASS_TILES;
  static constexpr int SUMS =
      C::TERMS == 3 ? 1 : larger(1, smaller(4 / CHAINS, K_TILES / 2));

  // A slab is 8 units in 4 columns, a cell for each lane: a quarter of a fragment, one word of each
  // lane. The slabs are dealt to the warps in shares: four, two or one slab of the same fragment.
  static constexpr int SLABS = 4 * FRAGMENTS;
  static constexpr int SHARE_SLABS = SLABS >= 4 * WARPS ? 4 : SLABS >= 2 * WARPS ? 2 : 1;
  static constexpr int FRAGMENT_SHARES = 4 / SHARE_SLABS;
  static constexpr int SHARES = SLABS / SHARE_SLABS;
  static constexpr int OWN_SHARES = round_up(SHARES, WARPS) / WARPS;
  static constexpr int CELLS = OWN_SHARES * SHARE_SLABS;
  static constexpr int SLAB_BYTES = LANES * GATES * ELEMENT;
  static constexpr int STAGE_BYTES = WARPS * CELLS * SLAB_BYTES;

  // A partial is dh of this block's units, as one warp's part of K contributes to it. All warps of
  // the team with the same rows make one; so many are added up at the end, from shared memory. In
  // grid scope warps add them up first, as far as there are more warps than fragments.
  static constexpr int PARTIAL_BYTES = FRAGMENTS * FRAGMENT_BYTES;
  static constexpr int PRODUCERS = C::TEAM * C::K_WARPS;
  static constexpr int ADDED_PARTIALS =
      C::SCOPE == Scope::grid ? larger(1, smaller(WARPS / FRAGMENTS, PRODUCERS)) : PRODUCERS;
  static constexpr int PARTIAL_BUFFERS = C::SCOPE == Scope::cluster ? 2 : 1;

  // Shared memory: partials, da as the product's right operand, weights that registers do not hold,
  // activations of the steps to come, mbarriers. A chunk more than its columns between the chunks
  // of da: then all of a warp's stores, and its matrix loads, hit different banks.
  static constexpr int OPERAND = PARTIAL_BUFFERS * ADDED_PARTIALS * PARTIAL_BYTES;
  static constexpr int OPERAND_STRIDE = (C::COLUMNS + 1) * CHUNK_BYTES;
  static constexpr int WEIGHTS = OPERAND + K_CHUNKS * OPERAND_STRIDE;
  static constexpr int RING = WEIGHTS + SHARED_TILES * C::ROW_TILES * THREADS * CHUNK_BYTES;
  static constexpr int MBARRIERS = RING + C::STAGES * STAGE_BYTES;
  static constexpr int SHARED_BYTES = MBARRIERS + 16;
  static constexpr i64 EXCHANGE_BYTES =
      C::SCOPE == Scope::grid ? (i64)2 * C::TEAM * PRODUCERS * PARTIAL_BYTES : 0;

  static_assert(C::HIDDEN % GROUP_UNITS == 0, "hidden units come in groups of 8");
  static_assert(C::TEAM * C::UNITS >= C::HIDDEN, "the team must own every unit");
  static_assert(C::UNITS % TILE_UNITS == 0 || (C::TEAM == 1 && C::UNITS % GROUP_UNITS == 0), "");
  static_assert(C::ROW_WARPS * C::ROW_TILES >= ROW_TILES, "the warps must own every row");
  static_assert(C::COLUMNS == 8 || C::COLUMNS == 16 || C::COLUMNS == 32 || C::COLUMNS == 64, "");
  static_assert(C::REGISTER_TILES % 2 == 0 && SHARED_TILES >= 0, "");
  static_assert(C::STAGES >= 2, "the step after the next has its row at hand");
  static_assert((C::SCOPE == Scope::block) == (C::TEAM == 1), "a block alone exchanges nothing");
  static_assert(C::SCOPE != Scope::cluster || C::TEAM <= 16, "");
  static_assert(C::TERMS == 1 || (C::TERMS == 3 && C::TYPE == Type::float32), "");
  static_assert(!C::PACKED || C::HAS_LENGTHS, "packed rows come with their lengths");
};
