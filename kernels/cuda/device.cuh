// The device intrinsics that the kernels use, each with its instruction of the PTX ISA.
//
// Nothing else in this folder is specific to a GPU: with SIMT_EMULATION defined, the same kernels
// compile as host C++ against twins of these functions and run in an emulator (tests/simt).
// No CUDA header is needed. Addresses in shared memory are 32-bit numbers, as PTX has them.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// What one instruction moves.
struct alignas(8) Words2 {
  u32 x, y;
};
struct alignas(16) Words4 {
  u32 x, y, z, w;
};

// The type of tensors that matrix products read.
enum class Type { float16, bfloat16, float32 };

template <Type TYPE>
struct Element {
  typedef u16 Bits;
};
template <>
struct Element<Type::float32> {
  typedef u32 Bits;
};

#ifdef SIMT_EMULATION
#include "simt_device.h"
#else

#define DEVICE __device__ __forceinline__

namespace device {

// ---- where a thread is. Volatile, or the compiler reads the special register again in every step.

DEVICE u32 thread_index() {
  u32 r;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
  return r;
}
DEVICE u32 block_index() { return blockIdx.x; }
DEVICE u32 shared_base() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return (u32)__cvta_generic_to_shared(shared_memory);
}

// ---- numbers

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 x) { return __uint_as_float(x); }

template <Type TYPE>
DEVICE float to_float(typename Element<TYPE>::Bits x) {
  if constexpr (TYPE == Type::float16) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  } else if constexpr (TYPE == Type::bfloat16) {
    return __uint_as_float((u32)x << 16);
  } else {
    return __uint_as_float(x);
  }
}

// Rounded to the nearest, ties to even.
template <Type TYPE>
DEVICE typename Element<TYPE>::Bits from_float(float x) {
  if constexpr (TYPE == Type::float32) {
    return __float_as_uint(x);
  } else {
    u16 y;
    if constexpr (TYPE == Type::float16)
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    else
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
  }
}

// float32 rounded to the 11 significant bits of TF32, ties away from zero; the rest are zeros.
DEVICE u32 round_to_tf32(u32 x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

// x, of which the compiler no longer knows anything.
DEVICE u32 unknown(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}

DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Relative error at most 2^-22.
DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Relative error at most 2^-23.
DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Relative error at most 2^-11.
DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- matrices. Operands are 32-bit words: two elements of 16 bits, or one TF32 number.

// c[16x8] += a[16xK] b[Kx8] in float32; K is 16 for elements of 16 bits and 8 for TF32. With g =
// lane / 4 and q = lane % 4, a lane holds, in words along K (8 in a row of a or a column of b):
//   a[0] = a(g, q), a[1] = a(g + 8, q), a[2] = a(g, q + 4), a[3] = a(g + 8, q + 4);
//   b0 = b(q, g), b1 = b(q + 4, g);
//   c[0] = c(g, 2q), c[1] = c(g, 2q + 1), c[2] = c(g + 8, 2q), c[3] = c(g + 8, 2q + 1).
// Volatile: all lanes multiply, even where only some use the sums.
template <Type TYPE>
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (TYPE == Type::float16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else if constexpr (TYPE == Type::bfloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of eight rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8
// and gets, of matrix m, word l % 4 of row l / 4 in r[m].
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ---- barriers; each also orders the memory accesses of those that meet there

DEVICE void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
DEVICE void sync_block() { asm volatile("barrier.cta.sync.aligned 0;" ::: "memory"); }
// Only `threads` threads, whole warps, meet; barriers 1 to 15.
DEVICE void sync_named(u32 barrier, u32 threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- shared memory

DEVICE void store_shared16(u32 a, u16 v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(a), "h"(v) : "memory");
}
DEVICE void store_shared32(u32 a, u32 v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(v) : "memory");
}
DEVICE void store_shared64(u32 a, Words2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(a), "r"(v.x), "r"(v.y) : "memory");
}
DEVICE void store_shared128(u32 a, Words4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
DEVICE u16 load_shared16(u32 a) {
  u16 v;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(a) : "memory");
  return v;
}
DEVICE u32 load_shared32(u32 a) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
DEVICE Words2 load_shared64(u32 a) {
  Words2 v;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a) : "memory");
  return v;
}
DEVICE Words4 load_shared128(u32 a) {
  Words4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(a)
               : "memory");
  return v;
}

// ---- global memory. `load_global` reads what no one writes while the kernel runs.

DEVICE u8 load_global8(const void* p) {
  u32 v;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return (u8)v;
}
DEVICE u16 load_global16(const void* p) {
  u16 v;
  asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
DEVICE u32 load_global32(const void* p) {
  u32 v;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
DEVICE Words2 load_global64(const void* p) {
  Words2 v;
  asm volatile("ld.global.nc.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
DEVICE Words4 load_global128(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
DEVICE void store_global16(void* p, u16 v) {
  asm volatile("st.global.b16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}
DEVICE void store_global32(void* p, u32 v) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEVICE void store_global64(void* p, Words2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
DEVICE void store_global128(void* p, Words4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// 16 bytes from global to shared memory, or zeros; they are there, for the thread that asked, when
// its copy_async_wait returns, and for its warp after a sync_warp.
DEVICE void copy_async16(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16u : 0u)
               : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of the committed groups are under way.
template <int PENDING>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- between the blocks of a grid, through the L2 cache

// Everything that this thread's block wrote before a barrier that this thread passed is seen by who
// acquires the value.
DEVICE void store_release(u32* p, u32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Waits until *p, a number that only grows, has reached v.
DEVICE void wait_acquire(const u32* p, u32 v) {
  u32 x;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  } while ((int)(x - v) < 0);
}
// Reads what other blocks wrote: from the L2 cache, never from the multiprocessor's own.
DEVICE Words4 load_global128_l2(const void* p) {
  Words4 v;
  asm volatile("ld.global.cg.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
DEVICE Words2 load_global64_l2(const void* p) {
  Words2 v;
  asm volatile("ld.global.cg.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}

// ---- between the blocks of a cluster, through each other's shared memory (sm_90 and up)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// The address of this block's `address` in the shared memory of the block of rank `rank`.
DEVICE u32 map_shared(u32 address, u32 rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
// An mbarrier's phase ends when `arrivals` threads have arrived and the bytes they said to expect
// have come.
DEVICE void mbarrier_init(u32 a, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(a), "r"(arrivals) : "memory");
}
DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void mbarrier_arrive(u32 a) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.release.cta.shared::cta.b64 s, [%0];}" ::"r"(a)
               : "memory");
}
DEVICE void mbarrier_arrive_expect(u32 a, u32 bytes) {
  asm volatile(
      "{.reg .b64 s; mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 s, [%0], %1;}" ::"r"(a),
      "r"(bytes)
      : "memory");
}
// Until the phase of that parity has ended. Acquires at cluster scope: the writers are peers.
DEVICE void mbarrier_wait(u32 a, u32 parity) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tW_%=:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n\t"
      "@!p bra W_%=;\n\t}" ::"r"(a),
      "r"(parity)
      : "memory");
}
// 16 bytes into a peer's shared memory; they count as come on the mbarrier of the same peer.
DEVICE void store_remote128(u32 to, Words4 v, u32 mbarrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, "
      "[%5];" ::"r"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(mbarrier)
      : "memory");
}
#endif

}  // namespace device

#endif  // SIMT_EMULATION
