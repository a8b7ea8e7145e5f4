// How the hidden state that each block of a team computes reaches all of them: three scopes.
//
// Every block keeps the h that enters step s in its shared memory, in buffer s % 2, as chunks
// [K_UNITS / CHUNK_ELEMENTS][COLUMNS]. In each step it has the protocol
//
//   wait(s)                    h of step s is complete in buffer s % 2
//   ... multiply, compute the next h, write the own part of it into buffer (s + 1) % 2 ...
//   send(s + 1, ...)           by each warp, its chunks, after a sync_warp
//   sent(s + 1)                by every thread
//
// and the same, without wait, before the first step for h0. Two buffers suffice. Buffer s % 2 is
// written again, by this block or a peer, with h of step s + 2; who has computed that has waited
// for all of h of step s + 1, which no warp of this block sent before it had read buffer s % 2.
#pragma once
#include "layout.cuh"

// A block alone: a barrier is all it needs.
template <class C, Scope SCOPE>
struct HiddenExchange {
  static_assert(SCOPE == Scope::block, "");
  const u32 rank = 0, team;

  DEVICE HiddenExchange(const ForwardParameters&, u32, u32) : team(device::block_index()) {}
  DEVICE void start() const {}
  DEVICE void wait(int) const {}
  DEVICE void send(int, u32, u32, u32) const {}
  DEVICE void sent(int) const { device::sync_block(); }
  DEVICE void finish() const {}
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// A cluster: each warp stores its chunks into the shared memory of every peer, asynchronously. The
// mbarrier of a buffer counts the warps of its own block, which arrive, and the bytes of the peers.
// A barrier of the whole cluster costs several times as much: there is one at the start, when
// mbarriers must be there before bytes come, and one at the end, when no block may leave before
// what it sends has come, nor before what it is sent.
template <class C>
struct HiddenExchange<C, Scope::cluster> {
  typedef ForwardLayout<C> L;
  const u32 rank, team, shared, thread;

  DEVICE HiddenExchange(const ForwardParameters&, u32 shared, u32 thread)
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
  DEVICE void wait(int s) const { device::mbarrier_wait(mbarrier(s), (s >> 1) & 1); }
  // The i-th of `count` chunks, which is at `offset`, to peer i / count.
  DEVICE void send(int s, u32 i, u32 count, u32 offset) const {
    const u32 peer = i / count;
    if (peer == rank) return;
    device::store_remote128(device::map_shared(shared + offset, peer),
                            device::load_shared128(shared + offset),
                            device::map_shared(mbarrier(s), peer));
  }
  DEVICE void sent(int s) const {
    constexpr u32 BYTES_OF_PEERS = (C::TEAM - 1) * L::UNITS * C::COLUMNS * L::ELEMENT;
    if (thread == 0)
      device::mbarrier_arrive_expect(mbarrier(s), BYTES_OF_PEERS);
    else if (thread % LANES == 0)
      device::mbarrier_arrive(mbarrier(s));
  }
  DEVICE void finish() const { device::sync_cluster(); }
};
#endif

// A grid whose blocks are all resident: h goes through two buffers in global memory, which the L2
// cache holds. Each block has a flag, a number that only grows: s + 1 once its part of h of step s
// is there. Each flag is acquired by one thread of a block, before a barrier of all.
template <class C>
struct HiddenExchange<C, Scope::grid> {
  typedef ForwardLayout<C> L;
  static constexpr u32 BLOCK_CHUNKS = L::UNITS / L::CHUNK_ELEMENTS * C::COLUMNS;
  static constexpr u32 CHUNKS = C::TEAM * BLOCK_CHUNKS;
  const u32 rank, team, shared, thread;
  u8* const buffers;
  u32* const flags;

  DEVICE HiddenExchange(const ForwardParameters& p, u32 shared, u32 thread)
      : rank(device::block_index() % C::TEAM),
        team(device::block_index() / C::TEAM),
        shared(shared),
        thread(thread),
        buffers((u8*)p.exchange + (u64)team * L::EXCHANGE_BYTES),
        flags(p.flags + team * C::TEAM) {}

  DEVICE void start() const {}
  DEVICE void wait(int s) const {
    const u32 offset = (s & 1) * L::H_BYTES;
    for (u32 peer = thread; peer < C::TEAM; peer += L::THREADS)
      if (peer != rank) device::wait_acquire(flags + peer, s + 1);
    device::sync_block();
#pragma unroll 4
    for (u32 i = thread; i < CHUNKS; i += L::THREADS)
      if (i / BLOCK_CHUNKS != rank)
        device::store_shared128(shared + offset + i * CHUNK_BYTES,
                                device::load_global128_l2(buffers + offset + i * CHUNK_BYTES));
    device::sync_block();
  }
  DEVICE void send(int, u32 i, u32 count, u32 offset) const {
    if (i < count)
      device::store_global128(buffers + offset, device::load_shared128(shared + offset));
  }
  DEVICE void sent(int s) const {
    device::sync_block();
    if (thread == 0) device::store_release(flags + rank, s + 1);
  }
  DEVICE void finish() const {}
};
