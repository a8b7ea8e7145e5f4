// What the exchange of one time step takes, with nothing else in the step.
//
// The time loop of the forward kernel, through its own HiddenExchange (kernels/cuda/exchange.cuh),
// but instead of an LSTM each chunk of 16 bytes holds four counters. In every step, chunk k of
// block r becomes a function of one other chunk of the step before:
//
//   v[r][k] = MULTIPLIER * v[(r + s + k) mod TEAM][(k + 2) mod 8] + INCREMENT
//
// of another block, if there are any, in all steps but one in TEAM, and always of another warp. A
// block's chunks come from eight different blocks, and each block hears from all in TEAM steps: who
// goes on before all have sent, or hears nothing, ends with other counters than the host computes.
//
// Each block has the smallest part of h that the LSTM kernels give one, 8 units of 8 rows in 16
// bits, and four warps, one for each scheduler of a multiprocessor.
#include "exchange.cuh"

constexpr u32 MULTIPLIER = 1664525, INCREMENT = 1013904223;

DEVICE u32 next_counter(u32 x) { return x * MULTIPLIER + INCREMENT; }

// Of the parameters it reads recurrence[0].steps, exchange and flags; it writes the counters of all
// chunks after the last step to recurrence[0].h_n: u32 [TEAM][8][4].
template <class C>
DEVICE void exchange_steps(const ForwardParameters& p) {
  typedef ForwardLayout<C> L;
  constexpr u32 BLOCK_CHUNKS = L::UNITS / L::CHUNK_ELEMENTS * C::COLUMNS;
  constexpr u32 WARP_CHUNKS = BLOCK_CHUNKS / L::WARPS;
  constexpr u32 SENDS = WARP_CHUNKS * (C::SCOPE == Scope::cluster ? C::TEAM : 1);
  static_assert(BLOCK_CHUNKS == 8 && WARP_CHUNKS == 2, "");
  const u32 thread = device::thread_index(), lane = thread % LANES;
  const u32 first_chunk = thread / LANES * WARP_CHUNKS, chunk = first_chunk + lane % WARP_CHUNKS;
  const u32 shared = device::shared_base();
  const HiddenExchange<C, C::SCOPE> exchange(p, shared, thread);
  const int steps = p.recurrence[0].steps;
  const u32 first_of_block = exchange.rank * BLOCK_CHUNKS;

  auto publish = [&](int s, const Words4& v) {
    const u32 buffer = (s & 1) * L::H_BYTES;
    if (lane < WARP_CHUNKS)
      device::store_shared128(shared + buffer + (first_of_block + chunk) * CHUNK_BYTES, v);
    if constexpr (C::TEAM > 1) {
      device::sync_warp();
      if (SENDS % LANES == 0 || lane < SENDS)
        exchange.send(s, lane, WARP_CHUNKS,
                      buffer + (first_of_block + first_chunk + lane % WARP_CHUNKS) * CHUNK_BYTES);
    }
    exchange.sent(s);
  };

  const u32 first = (first_of_block + chunk) * 4;
  Words4 v{first, first + 1, first + 2, first + 3};
  u32 from = (exchange.rank + chunk) % C::TEAM;
  exchange.start();
  publish(0, v);
#pragma unroll 1
  for (int s = 0; s < steps; s++) {
    const u32 source = from * BLOCK_CHUNKS + (chunk + WARP_CHUNKS) % BLOCK_CHUNKS;
    from = from + 1 == C::TEAM ? 0 : from + 1;
    exchange.wait(s);
    v = device::load_shared128(shared + (s & 1) * L::H_BYTES + source * CHUNK_BYTES);
    v = Words4{next_counter(v.x), next_counter(v.y), next_counter(v.z), next_counter(v.w)};
    if (s + 1 < steps) publish(s + 1, v);
  }
  if (lane < WARP_CHUNKS)
    device::store_global128((u8*)p.recurrence[0].h_n + (first_of_block + chunk) * CHUNK_BYTES, v);
  exchange.finish();
}

#define EXCHANGE_KERNEL(kernel, C)                                              \
  extern "C" __global__ void __launch_bounds__(ForwardLayout<C>::THREADS, 1)    \
      kernel(const __grid_constant__ ForwardParameters p) {                     \
    exchange_steps<C>(p);                                                       \
  }
