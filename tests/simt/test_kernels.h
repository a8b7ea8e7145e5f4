// Tiny kernels that try the emulator: each does one thing right with fault 0, and one thing wrong
// with every other. Compiled by test_emulator.py, which says what must come of them.
#pragma once
#include "device.cuh"
#include "launcher.h"

using namespace device;

struct Arguments {
  const void* in;
  void* out;
  void* exchange;
  u32* flags;
  int fault;
};

DEVICE u32 lane() { return thread_index() % 32; }
DEVICE u32 warp() { return thread_index() / 32; }
DEVICE void put(const Arguments& p, u32 i, u32 v) { store_global32((u32*)p.out + i, v); }
DEVICE u32 get(const Arguments& p, u32 i) { return load_global32((const u32*)p.in + i); }

// ---- numbers: out[k][thread] for k functions of in[thread]

__global__ void numbers(const __grid_constant__ Arguments p) {
  const u32 i = thread_index(), n = 256;
  const u32 x = get(p, i);
  const float f = float_of(x);
  put(p, i, from_float<Type::float16>(f));
  put(p, n + i, from_float<Type::bfloat16>(f));
  put(p, 2 * n + i, round_to_tf32(x));
  put(p, 3 * n + i, bits_of(tanh_approximate(f)));
  put(p, 4 * n + i, bits_of(exp2_approximate(f)));
  put(p, 5 * n + i, bits_of(reciprocal_approximate(f)));
  put(p, 6 * n + i, bits_of(to_float<Type::float16>((u16)x)));
  put(p, 7 * n + i, bits_of(to_float<Type::bfloat16>((u16)x)));
}

// ---- c + a b, of in = [a: 16 rows of 8 words][b: 8 columns of 8 words][c: 16 x 8]

template <Type TYPE>
DEVICE void multiply_matrices(const Arguments& p) {
  const u32 g = lane() / 4, q = lane() % 4;
  const u32 b = 16 * 8, c = b + 8 * 8;
  u32 words[4];
  float sums[4];
  for (u32 r = 0; r < 4; r++) {
    words[r] = get(p, (g + 8 * (r & 1)) * 8 + q + 4 * (r >> 1));
    sums[r] = float_of(get(p, c + (g + 8 * (r >> 1)) * 8 + 2 * q + (r & 1)));
  }
  multiply_add<TYPE>(sums, words, get(p, b + g * 8 + q), get(p, b + g * 8 + q + 4));
  for (u32 r = 0; r < 4; r++) put(p, (g + 8 * (r >> 1)) * 8 + 2 * q + (r & 1), bits_of(sums[r]));
}

__global__ void multiply_float16(const __grid_constant__ Arguments p) {
  multiply_matrices<Type::float16>(p);
}
__global__ void multiply_bfloat16(const __grid_constant__ Arguments p) {
  multiply_matrices<Type::bfloat16>(p);
}
__global__ void multiply_float32(const __grid_constant__ Arguments p) {
  multiply_matrices<Type::float32>(p);
}

// ---- four 8 x 8 matrices of 16 bits: word [matrix][row][word] is in[...]; out[lane][matrix]

__global__ void matrices(const __grid_constant__ Arguments p) {
  enum { NONE, BANK_CONFLICTS, MISALIGNED };
  const u32 stride = p.fault == BANK_CONFLICTS ? 128 : 16;
  const u32 shift = p.fault == MISALIGNED ? 8 : 0;
  const u32 row = shared_base() + lane() * stride;
  for (u32 word = 0; word < 4; word++) store_shared32(row + 4 * word, get(p, lane() * 4 + word));
  sync_warp();
  u32 r[4];
  load_matrices(r, row + shift);
  for (u32 matrix = 0; matrix < 4; matrix++) put(p, lane() * 4 + matrix, r[matrix]);
}

// ---- a block of two warps hands words to each other: out[i] = in[last - i]

__global__ void reverse_block(const __grid_constant__ Arguments p) {
  enum { NONE, NO_BARRIER, WARP_BARRIER_ONLY, COUNT_MISMATCH, ONE_WARP_EXITS, OUT_OF_BOUNDS,
         MISALIGNED, NO_BASE, NAMED_BARRIER };
  const u32 i = thread_index(), base = shared_base();
  const u32 to = p.fault == NO_BASE         ? i * 4
                 : p.fault == OUT_OF_BOUNDS ? base + i * 4 + 4
                 : p.fault == MISALIGNED    ? base + i * 4 + 2
                                            : base + i * 4;
  store_shared32(to, get(p, i));
  if (p.fault == ONE_WARP_EXITS && warp() == 1) return;
  if (p.fault == WARP_BARRIER_ONLY) sync_warp();
  else if (p.fault == NAMED_BARRIER) sync_named(3, 64);
  else if (p.fault == COUNT_MISMATCH) sync_named(3, warp() ? 64 : 96);
  else if (p.fault != NO_BARRIER) sync_block();
  put(p, i, load_shared32(base + (63 - i) * 4));
}

// ---- a warp hands words to its other lanes, twice through one place: out[i] = in[31 - i]

__global__ void reverse_warp(const __grid_constant__ Arguments p) {
  enum { NONE, NO_FIRST_BARRIER, NO_SECOND_BARRIER, DIVERGENT_SITES, DIVERGENT_KINDS,
         HALF_OF_THEM };
  const u32 address = shared_base() + lane() * 4, mirrored = shared_base() + (31 - lane()) * 4;
  store_shared32(address, get(p, lane()));
  if (p.fault == DIVERGENT_SITES && lane() == 7) {
    sync_warp();
  } else if (p.fault == DIVERGENT_KINDS && lane() == 7) {
    u32 r[4];
    load_matrices(r, shared_base());
  } else if (p.fault == HALF_OF_THEM && lane() > 15) {
    sync_block();
  } else if (p.fault != NO_FIRST_BARRIER) {
    sync_warp();
  }
  const u32 value = load_shared32(mirrored);
  if (p.fault != NO_SECOND_BARRIER) sync_warp();
  store_shared32(address, value + 1);
  sync_warp();
  put(p, lane(), load_shared32(address) - 1);
}

// ---- asynchronous copies through a ring of two stages: out[step][lane][4] = in[step][lane][4]

__global__ void copies(const __grid_constant__ Arguments p) {
  enum { NONE, NO_WAIT, WAIT_SHORT, NO_WARP_BARRIER, REUSED_TOO_EARLY, MISALIGNED, NO_COMMIT };
  const int STEPS = 4;
  const u32 base = shared_base(), row = lane() * 16, mirrored = (31 - lane()) * 16;
  auto fetch = [&](int step) {
    const u32* from = (const u32*)p.in + (step * 32 + lane()) * 4;
    copy_async16(base + step % 2 * 512 + row, from + (p.fault == MISALIGNED ? 1 : 0), step < STEPS);
    if (p.fault != NO_COMMIT) copy_async_commit();
  };
  fetch(0);
  for (int step = 0; step < STEPS; step++) {
    if (p.fault != REUSED_TOO_EARLY) sync_warp();
    fetch(step + 1);
    if (p.fault == WAIT_SHORT) copy_async_wait<2>();
    else if (p.fault != NO_WAIT) copy_async_wait<1>();
    if (p.fault != NO_WARP_BARRIER) sync_warp();
    const Words4 v = load_shared128(base + step % 2 * 512 + mirrored);
    store_global128((u32*)p.out + (step * 32 + 31 - lane()) * 4, v);
  }
}

// ---- a ring of three blocks, two warps each: every thread adds one to its number and sends it to
// the next block, six times. Who sends for the fourth time knows, around the ring, that the first
// has been read, and not earlier: it takes three buffers.

__global__ void cluster_ring(const __grid_constant__ Arguments p) {
  enum { NONE, TOO_FEW_BYTES, TOO_MANY_BYTES, TOO_MANY_ARRIVALS, NO_FENCE, NO_BARRIER_AT_START,
         EXIT_TOO_EARLY, NO_WAIT, WRONG_PARITY, OTHER_BLOCKS_MBARRIER, TWO_BUFFERS, WRONG_RANK,
         PLAIN_STORE, ONE_WARP_ARRIVES };
  const u32 STEPS = 6, BUFFER = 64 * 16, BLOCKS = 3;
  const u32 buffers = p.fault == TWO_BUFFERS ? 2 : 3;
  const u32 base = shared_base(), i = thread_index(), rank = cluster_rank();
  const u32 next = (rank + 1) % BLOCKS;
  auto buffer = [&](u32 step) { return base + step % buffers * BUFFER; };
  auto mbarrier = [&](u32 step) { return base + 3 * BUFFER + step % buffers * 8; };
  if (i == 0) {
    for (u32 k = 0; k < buffers; k++) mbarrier_init(mbarrier(k), 2);
    if (p.fault != NO_FENCE) mbarrier_init_fence();
  }
  if (p.fault == NO_BARRIER_AT_START) sync_block();
  else sync_cluster();
  const u32 first = get(p, block_index() * 64 + i);
  Words4 v{first, first, first, first};
  for (u32 step = 0; step < STEPS; step++) {
    v.x++;
    const u32 to = map_shared(buffer(step) + i * 16, p.fault == WRONG_RANK ? rank + 1 : next);
    const u32 other = p.fault == OTHER_BLOCKS_MBARRIER ? rank : next;
    if (p.fault == PLAIN_STORE) store_shared128(to, v);
    store_remote128(to, v, map_shared(mbarrier(step), other));
    const u32 bytes = p.fault == TOO_MANY_BYTES  ? BUFFER + 16
                      : p.fault == TOO_FEW_BYTES ? BUFFER / 2
                                                 : BUFFER;
    if (i == 0) mbarrier_arrive_expect(mbarrier(step), bytes);
    else if (i == 32 && p.fault != ONE_WARP_ARRIVES) mbarrier_arrive(mbarrier(step));
    if (i < 3 && p.fault == TOO_MANY_ARRIVALS) mbarrier_arrive(mbarrier(step));
    if (p.fault == EXIT_TOO_EARLY && step == STEPS - 1) return;
    const u32 parity = (step / buffers & 1) ^ (p.fault == WRONG_PARITY ? 1 : 0);
    if (p.fault != NO_WAIT) mbarrier_wait(mbarrier(step), parity);
    v = load_shared128(buffer(step) + i * 16);
  }
  put(p, block_index() * 64 + i, v.x);
  sync_cluster();
}

// ---- the same ring through global memory

__global__ void grid_ring(const __grid_constant__ Arguments p) {
  enum { NONE, NO_BARRIER_BEFORE_RELEASE, NO_ACQUIRE, NO_BARRIER_AFTER_ACQUIRE, NO_RELEASE,
         TWO_BUFFERS, FLAG_STORED, READ_AS_CONSTANT, EXCHANGE_AS_FLAG };
  const u32 STEPS = 6, BLOCKS = 3;
  const u32 i = thread_index(), block = block_index(), before = (block + BLOCKS - 1) % BLOCKS;
  auto slot = [&](u32 step, u32 of_block) {
    const u32 buffer = step % (p.fault == TWO_BUFFERS ? 2 : 3);
    return (u8*)p.exchange + ((buffer * BLOCKS + of_block) * 64 + i) * 8;
  };
  u32 v = get(p, block * 64 + i);
  for (u32 step = 0; step < STEPS; step++) {
    store_global64(slot(step, block), Words2{v + 1, 0});
    if (p.fault != NO_BARRIER_BEFORE_RELEASE) sync_block();
    if (i == 0 && p.fault == FLAG_STORED) store_global32(p.flags + block, step + 1);
    if (i == 0 && p.fault == EXCHANGE_AS_FLAG) store_release((u32*)p.exchange, step + 1);
    if (i == 0 && p.fault != NO_RELEASE) store_release(p.flags + block, step + 1);
    if (i == 0 && p.fault != NO_ACQUIRE) wait_acquire(p.flags + before, step + 1);
    if (p.fault != NO_BARRIER_AFTER_ACQUIRE) sync_block();
    v = p.fault == READ_AS_CONSTANT ? load_global64(slot(step, before)).x
                                    : load_global64_l2(slot(step, before)).x;
  }
  put(p, block * 64 + i, v);
}

// ---- accesses to global memory: out[i] = in[i]

__global__ void global_accesses(const __grid_constant__ Arguments p) {
  enum { NONE, LOAD_BEYOND, LOAD_BEFORE, WIDE_LOAD_BEYOND, STORE_BEYOND, STORE_TO_INPUT,
         LOAD_OF_OUTPUT, MISALIGNED_LOAD, MISALIGNED_STORE, COPY_BEYOND };
  const u32 i = thread_index();
  const u32* in = (const u32*)p.in;
  // Right beside a tensor there is nothing; a little further there may be another one.
  if (p.fault == LOAD_BEYOND) get(p, 32);
  if (p.fault == LOAD_BEFORE) load_global32(in - 1);
  if (p.fault == WIDE_LOAD_BEYOND) load_global128(in + 4 * (i % 9));
  if (p.fault == STORE_BEYOND) put(p, 32, i);
  if (p.fault == STORE_TO_INPUT) store_global32((u32*)p.in + i, 0);
  if (p.fault == LOAD_OF_OUTPUT) load_global32(p.out);
  if (p.fault == MISALIGNED_LOAD) load_global64(in + 1);
  if (p.fault == MISALIGNED_STORE) store_global128((u32*)p.out + 2, Words4{0, 0, 0, 0});
  if (p.fault == COPY_BEYOND) copy_async16(shared_base() + i * 16, in + 32, true);
  put(p, i, get(p, i));
}

SIMT_LAUNCHER(numbers, Arguments, 256, 0, 1, false)
SIMT_LAUNCHER(multiply_float16, Arguments, 32, 0, 1, false)
SIMT_LAUNCHER(multiply_bfloat16, Arguments, 32, 0, 1, false)
SIMT_LAUNCHER(multiply_float32, Arguments, 32, 0, 1, false)
SIMT_LAUNCHER(matrices, Arguments, 32, 32 * 128, 1, false)
SIMT_LAUNCHER(reverse_block, Arguments, 64, 64 * 4, 1, false)
SIMT_LAUNCHER(reverse_warp, Arguments, 32, 32 * 4, 1, false)
SIMT_LAUNCHER(copies, Arguments, 32, 2 * 512, 1, false)
SIMT_LAUNCHER(cluster_ring, Arguments, 64, 3 * 64 * 16 + 24, 3, false)
SIMT_LAUNCHER(grid_ring, Arguments, 64, 0, 1, true)
SIMT_LAUNCHER(global_accesses, Arguments, 32, 32 * 16, 1, false)
