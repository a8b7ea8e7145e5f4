// How the partials of dh, which every block computes for all units, reach the blocks that own the
// units, and are added up there: three scopes.
//
// In step s a block has the protocol
//
//   put(s, ...)                by each warp, its fragments of all the team's units
//   sent(s)                    by every thread, after its last put
//   wait(s)                    the partials of the own units are in shared memory, at partials(s)
//   ... every thread adds those of its cells, in order, and computes the next da ...
//   sync_block                 and here every warp has read them
//
// No sum depends on which partial came first. The same barrier makes the own da of the next step
// known to every warp; before it is written every warp has multiplied the one before, because wait
// returns only when all of this block's warps have arrived in sent.
//
// Two buffers suffice where partials leave the block. Partials of step s + 2 are written to where
// those of step s were by who has waited for all partials of step s + 1, among them the owner's
// own; and the owner's warps put theirs after the sync_block that follows their reading of step s.
// Within a block one suffices, by that same sync_block.
#pragma once
#include "backward_layout.cuh"

// A lane's words of a fragment lie in its chunk from word turn() on, round about: so that lanes 8
// apart, whose chunks are in the same banks, have the words that they read together in different
// ones.
template <class C>
DEVICE u32 turn(u32 lane) {
  return lane / 8 * BackwardLayout<C>::SHARE_SLABS % 4;
}
template <class C>
DEVICE Words4 turned(const float (&sums)[4], u32 lane) {
  u32 v[4];
#pragma unroll
  for (int k = 0; k < 4; k++) v[k] = device::bits_of(sums[k]);
  if constexpr (BackwardLayout<C>::SHARE_SLABS == 1) {
    const bool once = lane & 8;
    const u32 last = v[3];
    v[3] = once ? v[2] : v[3];
    v[2] = once ? v[1] : v[2];
    v[1] = once ? v[0] : v[1];
    v[0] = once ? last : v[0];
  }
  if constexpr (BackwardLayout<C>::SHARE_SLABS < 4) {
    const bool twice = lane & (BackwardLayout<C>::SHARE_SLABS == 1 ? 16 : 8);
    return Words4{twice ? v[2] : v[0], twice ? v[3] : v[1], twice ? v[0] : v[2],
                  twice ? v[1] : v[3]};
  }
  return Words4{v[0], v[1], v[2], v[3]};
}

// A block alone: its warps write where they read, with a barrier between.
template <class C, Scope SCOPE>
struct GradientReduction {
  typedef BackwardLayout<C> L;
  static_assert(SCOPE == Scope::block, "");
  const u32 rank = 0, team, shared;

  DEVICE GradientReduction(const BackwardParameters&, u32 shared, u32)
      : team(device::block_index()), shared(shared) {}
  DEVICE void start() const { device::sync_block(); }
  // This lane's part of fragment `fragment` of the units that `owner` owns.
  DEVICE void put(int, u32, u32 k_warp, u32 fragment, u32 lane, const float (&sums)[4]) const {
    device::store_shared128(
        shared + k_warp * L::PARTIAL_BYTES + fragment * L::FRAGMENT_BYTES + lane * CHUNK_BYTES,
        turned<C>(sums, lane));
  }
  DEVICE void sent(int) const { device::sync_block(); }
  DEVICE void wait(int) const {}
  DEVICE u32 partials(int) const { return shared; }
  DEVICE void finish() const {}
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// A cluster: fragments are stored straight into the owner's shared memory, asynchronously. The
// mbarrier of a buffer counts the warps of its own block, which arrive, and the bytes of the peers.
// A barrier of the whole cluster costs several times as much: there is one at the start, when
// mbarriers must be there before bytes come, and one at the end, when no block may leave before
// what it sends has come.
template <class C>
struct GradientReduction<C, Scope::cluster> {
  typedef BackwardLayout<C> L;
  const u32 rank, team, shared, thread;

  DEVICE GradientReduction(const BackwardParameters&, u32 shared, u32 thread)
      : rank(device::cluster_rank()),
        team(device::block_index() / C::TEAM),
        shared(shared),
        thread(thread) {}

  DEVICE u32 mbarrier(int s) const { return shared + L::MBARRIERS + (s & 1) * 8; }

  DEVICE void start() const {
    if (thread == 0) {
      device::mbarrier_init(mbarrier(0), L::WARPS);
      device::mbarrier_init(mbarrier(1), L::WARPS);
      device::mbarrier_init_fence();
    }
    device::sync_cluster();
  }
  DEVICE void put(int s, u32 owner, u32 k_warp, u32 fragment, u32 lane,
                  const float (&sums)[4]) const {
    const u32 to = partials(s) + (rank * C::K_WARPS + k_warp) * L::PARTIAL_BYTES +
                   fragment * L::FRAGMENT_BYTES + lane * CHUNK_BYTES;
    const Words4 words = turned<C>(sums, lane);
    if (owner == rank)
      device::store_shared128(to, words);
    else
      device::store_remote128(device::map_shared(to, owner), words,
                              device::map_shared(mbarrier(s), owner));
  }
  DEVICE void sent(int s) const {
    constexpr u32 BYTES_OF_PEERS = (C::TEAM - 1) * C::K_WARPS * L::PARTIAL_BYTES;
    device::sync_warp();
    if (thread == 0)
      device::mbarrier_arrive_expect(mbarrier(s), BYTES_OF_PEERS);
    else if (thread % LANES == 0)
      device::mbarrier_arrive(mbarrier(s));
  }
  DEVICE void wait(int s) const { device::mbarrier_wait(mbarrier(s), (s >> 1) & 1); }
  DEVICE u32 partials(int s) const {
    return shared + (s & 1) * (L::ADDED_PARTIALS * L::PARTIAL_BYTES);
  }
  DEVICE void finish() const { device::sync_cluster(); }
};
#endif

// A grid whose blocks are all resident: partials [2][owner][producer] go through global memory,
// which the L2 cache holds. Each block has a flag, a number that only grows: s + 1 once its
// partials of step s are there. The warps that read a block's partials acquire its flag.
//
// Warps add up what they read before it goes to shared memory: of a fragment, where there are
// several warps for it, each adds every ADDED_PARTIALS-th producer's.
template <class C>
struct GradientReduction<C, Scope::grid> {
  typedef BackwardLayout<C> L;
  static constexpr u32 TASKS = L::FRAGMENTS * L::ADDED_PARTIALS;
  static constexpr u32 ROUNDS = round_up(L::PRODUCERS, L::ADDED_PARTIALS) / L::ADDED_PARTIALS;
  // Partials on their way to a lane at the same time.
  static constexpr u32 IN_FLIGHT = smaller(ROUNDS, 8);
  const u32 rank, team, shared, thread;
  u8* const buffers;
  u32* const flags;

  DEVICE GradientReduction(const BackwardParameters& p, u32 shared, u32 thread)
      : rank(device::block_index() % C::TEAM),
        team(device::block_index() / C::TEAM),
        shared(shared),
        thread(thread),
        buffers((u8*)p.exchange + (u64)team * L::EXCHANGE_BYTES),
        flags(p.flags + team * C::TEAM) {}

  DEVICE u8* partial(int s, u32 owner, u32 producer) const {
    const u32 owners_before = (s & 1) * C::TEAM + owner;
    return buffers + ((u64)owners_before * L::PRODUCERS + producer) * L::PARTIAL_BYTES;
  }

  DEVICE void start() const { device::sync_block(); }
  DEVICE void put(int s, u32 owner, u32 k_warp, u32 fragment, u32 lane,
                  const float (&sums)[4]) const {
    device::store_global128(partial(s, owner, rank * C::K_WARPS + k_warp) +
                                fragment * L::FRAGMENT_BYTES + lane * CHUNK_BYTES,
                            Words4{device::bits_of(sums[0]), device::bits_of(sums[1]),
                                   device::bits_of(sums[2]), device::bits_of(sums[3])});
  }
  DEVICE void sent(int s) const {
    device::sync_block();
    if (thread == 0) device::store_release(flags + rank, s + 1);
  }
  DEVICE void wait(int s) const {
    const u32 lane = thread % LANES;
#pragma unroll 1
    for (u32 task = thread / LANES; task < TASKS; task += L::WARPS) {
      const u32 fragment = task % L::FRAGMENTS, first = task / L::FRAGMENTS;
#pragma unroll 1
      for (u32 round = lane; round < ROUNDS; round += LANES) {
        const u32 producer = first + round * L::ADDED_PARTIALS;
        if (producer < L::PRODUCERS) device::wait_acquire(flags + producer / C::K_WARPS, s + 1);
      }
      device::sync_warp();
      const u8* from =
          partial(s, rank, first) + fragment * L::FRAGMENT_BYTES + lane * CHUNK_BYTES;
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (u32 round = 0; round < ROUNDS; round += IN_FLIGHT) {
        Words4 v[IN_FLIGHT];
#pragma unroll
        for (u32 k = 0; k < IN_FLIGHT; k++) {
          const bool there = first + (round + k) * L::ADDED_PARTIALS < L::PRODUCERS;
          v[k] = there ? device::load_global128_l2(
                             from + (u64)(round + k) * L::ADDED_PARTIALS * L::PARTIAL_BYTES)
                       : Words4{0, 0, 0, 0};
        }
#pragma unroll
        for (u32 k = 0; k < IN_FLIGHT; k++) {
          sum[0] += device::float_of(v[k].x);
          sum[1] += device::float_of(v[k].y);
          sum[2] += device::float_of(v[k].z);
          sum[3] += device::float_of(v[k].w);
        }
      }
      device::store_shared128(shared + first * L::PARTIAL_BYTES + fragment * L::FRAGMENT_BYTES +
                                  lane * CHUNK_BYTES,
                              turned<C>(sum, lane));
    }
    device::sync_block();
  }
  DEVICE u32 partials(int) const { return shared; }
  DEVICE void finish() const {}
};
