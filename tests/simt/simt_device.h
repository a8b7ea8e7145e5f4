// The twins of the functions of device.cuh, for the emulator; and what of CUDA's dialect the
// kernels are written in.
//
// Each does what its instruction does, as strictly as can be: what the hardware leaves undefined is
// an error here. Every function knows from where it is called (`site`), for its errors.
#pragma once

#include <cmath>

#include "simt.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define DEVICE inline
#define SITE simt::Site site = simt::Site::here()

namespace device {

using simt::machine;
using simt::Site;

// ---- where a thread is

inline u32 thread_index() { return machine().thread().index; }
inline u32 block_index() { return machine().block().index; }
inline u32 shared_base() { return simt::SHARED_BASE; }

// ---- numbers

inline u32 bits_of(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Without the compiler's own type for it, which not every compiler has.
struct Float16 {
  static float decode(u16 bits) {
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp((float)fraction, -24);
    return sign * std::ldexp((float)(fraction + 1024), exponent - 25);
  }

  // All of them, computed once.
  static const float* table() {
    static const std::vector<float> floats = [] {
      std::vector<float> all(1 << 16);
      for (u32 bits = 0; bits < 1 << 16; bits++) all[bits] = decode((u16)bits);
      return all;
    }();
    return floats.data();
  }

  // To the nearest, ties to even.
  static u16 encode(float x) {
    const u16 sign = (u16)(bits_of(x) >> 31 << 15);
    if (std::isnan(x)) return 0x7fff;
    const float magnitude = std::fabs(x);
    if (magnitude == 0.0f) return sign;
    if (magnitude >= 65520.0f) return sign | 0x7c00;  // half way above the largest number
    int exponent;
    std::frexp(magnitude, &exponent);  // in [2^(exponent - 1), 2^exponent)
    const int ulp = std::max(exponent - 11, -24);
    const u32 steps = (u32)std::nearbyint(std::ldexp(magnitude, -ulp));
    // A carry into the next exponent comes out right by itself.
    return sign | (u16)(((u32)(ulp + 24) << 10) + steps);
  }
};

template <Type TYPE>
inline float to_float(typename Element<TYPE>::Bits x) {
  if constexpr (TYPE == Type::float16) {
    static const float* const table = Float16::table();
    return table[x];
  } else if constexpr (TYPE == Type::bfloat16) {
    return float_of((u32)x << 16);
  } else {
    return float_of(x);
  }
}

template <Type TYPE>
inline typename Element<TYPE>::Bits from_float(float x) {
  if constexpr (TYPE == Type::float16) {
    return Float16::encode(x);
  } else if constexpr (TYPE == Type::bfloat16) {
    if (std::isnan(x)) return 0x7fff;
    const u32 bits = bits_of(x);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    return bits_of(x);
  }
}

// The bits of a float32 that TF32 does not have.
constexpr u32 TF32_IGNORED = 0x1fff;

inline u32 round_to_tf32(u32 x) {
  if (std::isnan(float_of(x)) || std::isinf(float_of(x))) return x & ~TF32_IGNORED;
  return (x + 0x1000) & ~TF32_IGNORED;
}

inline u32 unknown(u32 x) { return x; }

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline float flush_subnormal(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
inline float exp2_approximate(float x) { return flush_subnormal(std::exp2(flush_subnormal(x))); }
inline float reciprocal_approximate(float x) {
  return flush_subnormal(1.0f / flush_subnormal(x));
}
// Rounded to 11 significant bits: an error as large as the hardware's may be.
inline float tanh_approximate(float x) {
  const float y = std::tanh(x);
  return std::isnan(y) ? y : float_of((bits_of(y) + 0x1000) & ~TF32_IGNORED);
}

// ---- matrices

namespace detail {

// What a lane brings to a multiplication.
struct Fragments {
  float* c;
  const u32* a;
  u32 b[2];
};

// The elements of 16 bits, or the one number, of an operand's word.
template <Type TYPE>
inline void unpack(u32 word, float* elements) {
  if constexpr (TYPE == Type::float32) {
    elements[0] = float_of(word & ~TF32_IGNORED);
  } else {
    elements[0] = to_float<TYPE>((u16)word);
    elements[1] = to_float<TYPE>((u16)(word >> 16));
  }
}

// float32 without what does not fit into it: tensor cores do not round what they add up.
inline float cut_off(double x) {
  const float y = (float)x;
  return std::fabs((double)y) > std::fabs(x) && std::isfinite(y) ? std::nextafter(y, 0.0f) : y;
}

template <Type TYPE>
inline void multiply_warp(Fragments** lanes) {
  constexpr int PER_WORD = TYPE == Type::float32 ? 1 : 2;
  constexpr int K = 8 * PER_WORD;
  float a[16][K], b[8][K], transposed_b[K][8], c[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments& mine = *lanes[lane];
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 4; r++) {
      unpack<TYPE>(mine.a[r], &a[g + 8 * (r & 1)][(q + 4 * (r >> 1)) * PER_WORD]);
      c[g + 8 * (r >> 1)][2 * q + (r & 1)] = mine.c[r];
    }
    for (int r = 0; r < 2; r++) unpack<TYPE>(mine.b[r], &b[g][(q + 4 * r) * PER_WORD]);
  }
  for (int k = 0; k < K; k++) {
    for (int column = 0; column < 8; column++) transposed_b[k][column] = b[column][k];
  }
  for (int row = 0; row < 16; row++) {
    double sums[8];
    for (int column = 0; column < 8; column++) sums[column] = c[row][column];
    for (int k = 0; k < K; k++) {
      for (int column = 0; column < 8; column++) {
        sums[column] += (double)a[row][k] * transposed_b[k][column];
      }
    }
    for (int column = 0; column < 8; column++) c[row][column] = cut_off(sums[column]);
  }
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 4; r++) lanes[lane]->c[r] = c[g + 8 * (r >> 1)][2 * q + (r & 1)];
  }
  machine().statistics.multiplications++;
}

// What a lane brings to a load of four matrices.
struct MatrixRow {
  u32* r;
  u32 address;
};

// Eight rows of 16 bytes are read at a time, each from other banks if it goes well.
inline void count_bank_conflicts(MatrixRow** rows) {
  u32 taken = 0;
  for (int row = 0; row < 8; row++) {
    const u32 banks = 1u << (rows[row]->address / 16 % 8);
    if (taken & banks) machine().statistics.bank_conflicts++;
    taken |= banks;
  }
}

inline void load_matrices_of_warp(MatrixRow** lanes, const Site& site) {
  for (int matrix = 0; matrix < 4; matrix++) {
    MatrixRow** rows = lanes + 8 * matrix;
    count_bank_conflicts(rows);
    for (int row = 0; row < 8; row++) {
      const unsigned char* bytes = machine().readable(rows[row]->address, 16, site);
      for (int word = 0; word < 4; word++) {
        memcpy(&lanes[4 * row + word]->r[matrix], bytes + 4 * word, 4);
      }
    }
  }
  machine().statistics.matrix_loads++;
}

}  // namespace detail

template <Type TYPE>
inline void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, SITE) {
  detail::Fragments mine{c, a, {b0, b1}};
  machine().warp_together(mine, detail::multiply_warp<TYPE>, "multiply_add", site);
}

inline void load_matrices(u32 (&r)[4], u32 address, SITE) {
  detail::MatrixRow mine{r, address};
  machine().warp_together(
      mine, [&](detail::MatrixRow** lanes) { detail::load_matrices_of_warp(lanes, site); },
      "load_matrices", site);
}

// ---- barriers

inline void sync_warp(SITE) {
  int nothing = 0;
  machine().warp_together(
      nothing, [](int**) { machine().order_stores_of_warp(); }, "sync_warp", site);
}
inline void sync_block(SITE) {
  machine().meet(machine().block().barriers[0], machine().launch.threads, "sync_block", site);
}
inline void sync_named(u32 barrier, u32 threads, SITE) {
  if (barrier < 1 || barrier >= simt::MAX_BARRIERS) {
    machine().fail_at(site, "no named barrier " + std::to_string(barrier));
  }
  machine().meet(machine().block().barriers[barrier], threads, "sync_named", site);
}

// ---- shared memory

inline void store_shared16(u32 a, u16 v, SITE) { machine().write_shared(a, &v, 2, site); }
inline void store_shared32(u32 a, u32 v, SITE) { machine().write_shared(a, &v, 4, site); }
inline void store_shared64(u32 a, Words2 v, SITE) { machine().write_shared(a, &v, 8, site); }
inline void store_shared128(u32 a, Words4 v, SITE) { machine().write_shared(a, &v, 16, site); }

template <class Value>
inline Value load_shared(u32 a, const Site& site) {
  Value v;
  machine().read_shared(a, &v, sizeof v, site);
  return v;
}
inline u16 load_shared16(u32 a, SITE) { return load_shared<u16>(a, site); }
inline u32 load_shared32(u32 a, SITE) { return load_shared<u32>(a, site); }
inline Words2 load_shared64(u32 a, SITE) { return load_shared<Words2>(a, site); }
inline Words4 load_shared128(u32 a, SITE) { return load_shared<Words4>(a, site); }

// ---- global memory

template <class Value>
inline Value load_global(const void* p, const Site& site) {
  Value v;
  memcpy(&v, machine().readable_global(p, sizeof v, site), sizeof v);
  return v;
}
inline u8 load_global8(const void* p, SITE) { return load_global<u8>(p, site); }
inline u16 load_global16(const void* p, SITE) { return load_global<u16>(p, site); }
inline u32 load_global32(const void* p, SITE) { return load_global<u32>(p, site); }
inline Words2 load_global64(const void* p, SITE) { return load_global<Words2>(p, site); }
inline Words4 load_global128(const void* p, SITE) { return load_global<Words4>(p, site); }

inline void store_global16(void* p, u16 v, SITE) { machine().write_global(p, &v, 2, site); }
inline void store_global32(void* p, u32 v, SITE) { machine().write_global(p, &v, 4, site); }
inline void store_global64(void* p, Words2 v, SITE) { machine().write_global(p, &v, 8, site); }
inline void store_global128(void* p, Words4 v, SITE) { machine().write_global(p, &v, 16, site); }

inline void copy_async16(u32 to, const void* from, bool valid, SITE) {
  // The address must be a possible one even where nothing is read.
  machine().check_alignment(from, 16, "load", site);
  machine().start_copy(to, valid ? machine().readable_global(from, 16, site) : nullptr, site);
}
inline void copy_async_commit() { machine().commit_copies(); }
template <int PENDING>
inline void copy_async_wait() {
  machine().wait_copies(PENDING);
}

// ---- between the blocks of a grid

inline void store_release(u32* p, u32 v, SITE) { machine().release(p, v, site); }
inline void wait_acquire(const u32* p, u32 v, SITE) { machine().acquire(p, v, site); }

template <class Value>
inline Value load_global_l2(const void* p, const Site& site) {
  Value v;
  machine().read_exchange(p, &v, sizeof v, site);
  return v;
}
inline Words4 load_global128_l2(const void* p, SITE) { return load_global_l2<Words4>(p, site); }
inline Words2 load_global64_l2(const void* p, SITE) { return load_global_l2<Words2>(p, site); }

// ---- between the blocks of a cluster

inline u32 cluster_rank() { return machine().block().rank; }
inline void sync_cluster(SITE) {
  machine().meet(machine().block().cluster->barrier,
                 machine().launch.threads * machine().launch.cluster, "sync_cluster", site);
}
inline u32 map_shared(u32 address, u32 rank, SITE) {
  return machine().map_shared(address, rank, site);
}
inline void mbarrier_init(u32 a, u32 arrivals, SITE) { machine().init_mbarrier(a, arrivals, site); }
inline void mbarrier_init_fence() { machine().fence_mbarriers(); }
inline void mbarrier_arrive(u32 a, SITE) { machine().arrive(a, 0, site); }
inline void mbarrier_arrive_expect(u32 a, u32 bytes, SITE) { machine().arrive(a, bytes, site); }
inline void mbarrier_wait(u32 a, u32 parity, SITE) { machine().wait_mbarrier(a, parity, site); }
inline void store_remote128(u32 to, Words4 v, u32 mbarrier, SITE) {
  machine().store_remote(to, &v, mbarrier, site);
}

}  // namespace device

#undef SITE
