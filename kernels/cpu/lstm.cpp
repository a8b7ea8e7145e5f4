// The C interface, and the kernels once per instruction set.

#include "lstm.h"

#include <pthread.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "layout.h"
#include "plain.h"
#include "team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Shuffles of vectors with indices known at compile time.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLES
#endif

namespace {

// Arithmetic below which a thread costs more than it brings: to start it, and to meet it after
// every step.
constexpr double kFlopsOfAThread = 400e3;
constexpr double kFlopsOfAMeeting = 20e3;
// Rows of a group at least, and the bytes of weights that each member may read at every step.
constexpr int64_t kRowsOfAGroup = 4;
constexpr int64_t kCachedWeights = int64_t{1} << 20;
// Rows, over all steps, that repay a rearrangement of the weights, where each step has one row, and
// where it has several, however long the sums; and what reading and rearranging one weight costs.
constexpr int64_t kPackedRows = 8;
constexpr int64_t kAlwaysPackedRows = 72;
constexpr double kFlopsOfAWeight = 20;
// Rows, over all steps, that repay a copy of the weights whose rows the backward pass reads, and which
// may stay where they are otherwise.
constexpr int64_t kCopiedRows = 64;

// The OpenMP runtime of the process, handed over by fused_lstm_set_openmp.
struct OpenMP {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  int (*thread_num)();
  int (*num_threads)();
} openmp = {};

// A child of fork has none of its parent's threads, and OpenMP does not know.
bool forked = false;

Scratch &scratch() {
  thread_local Scratch own;
  return own;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DISPATCH_X86
#endif

#ifdef DISPATCH_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define HAS_AVX512
#define VECTOR_BYTES 64
#define TILE_ROWS 6
#include "kernels.h"
#undef HAS_AVX512
#undef VECTOR_BYTES
#undef TILE_ROWS
}  // namespace avx512
#pragma GCC pop_options

#if __GNUC__ >= 10
#define DISPATCH_BFLOAT16
#pragma GCC push_options
#pragma GCC target( \
    "avx512bf16,avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
namespace avx512bf16 {
#define HAS_AVX512
#define HAS_AVX512_BF16
#define VECTOR_BYTES 64
#define TILE_ROWS 6
#include "kernels.h"
#undef HAS_AVX512
#undef HAS_AVX512_BF16
#undef VECTOR_BYTES
#undef TILE_ROWS
}  // namespace avx512bf16
#pragma GCC pop_options
#endif

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define HAS_AVX2
#define VECTOR_BYTES 32
#define TILE_ROWS 3
#include "kernels.h"
#undef HAS_AVX2
#undef VECTOR_BYTES
#undef TILE_ROWS
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace baseline {
#define VECTOR_BYTES 16
#ifdef __aarch64__
#define TILE_ROWS 6
#else
#define TILE_ROWS 3
#endif
#include "kernels.h"
#undef VECTOR_BYTES
#undef TILE_ROWS
}  // namespace baseline

struct InstructionSet {
  const char *name;
  bool (*supported)();
  int32_t (*forward)(const LstmForward *, int64_t, int64_t, int64_t, Scratch &);
  int32_t (*backward)(const LstmBackward *, int64_t, int64_t, int64_t, Scratch &);
  int32_t (*layer_norm_forward)(const LstmLayerNormForward *, int64_t, int64_t, int64_t, Scratch &);
  int32_t (*layer_norm_backward)(const LstmLayerNormBackward *, int64_t, int64_t, int64_t,
                                 Scratch &);
  void (*add)(void *, const void *, int64_t, int64_t);
  // Null where the compiler has no instructions for bfloat16; the CPU may lack them still.
  int32_t (*bfloat16_forward)(const LstmForward *, int64_t, int64_t, Scratch &);
};

#ifdef DISPATCH_BFLOAT16
constexpr auto kAvx512BFloat16Forward = avx512bf16::bfloat16_forward;
#else
constexpr decltype(InstructionSet::bfloat16_forward) kAvx512BFloat16Forward = nullptr;
#endif

// Best first; the last one runs everywhere.
const InstructionSet kInstructionSets[] = {
#ifdef DISPATCH_X86
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
     },
     avx512::forward, avx512::backward, avx512::layer_norm_forward, avx512::layer_norm_backward,
     avx512::add, kAvx512BFloat16Forward},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::forward, avx2::backward, avx2::layer_norm_forward, avx2::layer_norm_backward, avx2::add,
     nullptr},
#endif
    {"baseline", [] { return true; }, baseline::forward, baseline::backward,
     baseline::layer_norm_forward, baseline::layer_norm_backward, baseline::add, nullptr},
};

// Those that this CPU has.
struct Supported {
  const InstructionSet *sets[3] = {};
  int64_t count = 0;
  char names[64] = "";

  Supported() {
    char *end = names;
    for (const InstructionSet &set : kInstructionSets) {
      if (!set.supported()) continue;
      if (count) *end++ = ',';
      for (const char *c = set.name; *c; ++c) *end++ = *c;
      sets[count++] = &set;
    }
    *end = 0;
  }
};

const Supported &supported() {
  static const Supported once;
  return once;
}

// Whether there are kernels for bfloat16 in an instruction set, and this CPU runs them.
bool multiplies_bfloat16(const InstructionSet &set) {
#ifdef DISPATCH_BFLOAT16
  return set.bfloat16_forward && __builtin_cpu_supports("avx512bf16");
#else
  (void)set;
  return false;
#endif
}

// What there is in bfloat16, see lstm.h.
bool bfloat16_fits(const LstmForward &a) {
  const LstmModifiers &m = a.modifiers;
  return a.x.data && a.weight_ih && !a.gates.data && !a.weight_hr && a.features == a.hidden_size &&
         !a.c.data && !a.activations.data && !m.recurrent_mask.data && !m.zoneout_h.data &&
         !m.zoneout_c.data;
}

// Numbers of steps are values, not shapes: a wrong one would be written out of bounds.
template <class Arguments>
bool lengths_fit(const Arguments &a) {
  for (int64_t b = 0; a.modifiers.lengths && b < a.batch; ++b) {
    if (a.modifiers.lengths[b] < 0 || a.modifiers.lengths[b] > a.steps) return false;
  }
  return !(a.modifiers.lengths && a.batch_sizes);
}

template <class Arguments, class Run>
int32_t checked(const Arguments *recurrences, int64_t count, int64_t threads,
                int64_t instruction_set, Run run) {
  const Supported &sets = supported();
  if (!recurrences || count < 1 || instruction_set < 0 || instruction_set >= sets.count) {
    return kLstmBadArgument;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (!lengths_fit(recurrences[i])) return kLstmBadArgument;
  }
  const bool alone = forked || !openmp.parallel || threads < 1;
  return run(*sets.sets[instruction_set], alone ? 1 : threads);
}

bool plain_fits(const LstmPlain *layers) {
  return layers && layers->layers >= 1 && layers->directions >= 1 &&
         layers->directions <= plain::kMostDirections;
}

}  // namespace

extern "C" {

int64_t fused_lstm_abi_version() { return kLstmAbiVersion; }

const char *fused_lstm_instruction_sets() { return supported().names; }

int64_t fused_lstm_multiplies_bfloat16(int64_t instruction_set) {
  const Supported &sets = supported();
  return instruction_set >= 0 && instruction_set < sets.count &&
         multiplies_bfloat16(*sets.sets[instruction_set]);
}

void fused_lstm_set_openmp(void (*parallel)(void (*)(void *), void *, unsigned, unsigned),
                           int (*thread_num)(), int (*num_threads)()) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  openmp = registered == 0 ? OpenMP{parallel, thread_num, num_threads} : OpenMP{};
}

int32_t fused_lstm_forward(const LstmForward *recurrences, int64_t count, int64_t dtype,
                           int64_t threads, int64_t instruction_set) {
  return checked(recurrences, count, threads, instruction_set,
                 [&](const InstructionSet &set, int64_t used) -> int32_t {
                   if (dtype != kLstmBFloat16) {
                     return set.forward(recurrences, count, dtype, used, scratch());
                   }
                   if (!multiplies_bfloat16(set)) return kLstmBadArgument;
                   for (int64_t i = 0; i < count; ++i) {
                     if (!bfloat16_fits(recurrences[i])) return kLstmBadArgument;
                   }
                   return set.bfloat16_forward(recurrences, count, used, scratch());
                 });
}

int32_t fused_lstm_backward(const LstmBackward *recurrences, int64_t count, int64_t dtype,
                            int64_t threads, int64_t instruction_set) {
  const int32_t status = checked(recurrences, count, threads, instruction_set,
                                 [&](const InstructionSet &set, int64_t used) {
                                   return set.backward(recurrences, count, dtype, used, scratch());
                                 });
  const size_t size = dtype == kLstmFloat32 ? sizeof(float) : sizeof(double);
  for (int64_t i = 0; status == kLstmOk && i < count; ++i) {
    const LstmBackward &a = recurrences[i];
    if (a.grad_bias_hh) memcpy(a.grad_bias_hh, a.grad_bias_ih, 4 * a.hidden_size * size);
  }
  return status;
}

int32_t fused_lstm_layer_norm_forward(const LstmLayerNormForward *recurrences, int64_t count,
                                      int64_t dtype, int64_t threads, int64_t instruction_set) {
  return checked(recurrences, count, threads, instruction_set,
                 [&](const InstructionSet &set, int64_t used) {
                   return set.layer_norm_forward(recurrences, count, dtype, used, scratch());
                 });
}

int32_t fused_lstm_layer_norm_backward(const LstmLayerNormBackward *recurrences, int64_t count,
                                       int64_t dtype, int64_t threads, int64_t instruction_set) {
  return checked(recurrences, count, threads, instruction_set,
                 [&](const InstructionSet &set, int64_t used) {
                   return set.layer_norm_backward(recurrences, count, dtype, used, scratch());
                 });
}

int32_t fused_lstm_plain_forward(const LstmPlain *layers) {
  if (!plain_fits(layers)) return kLstmBadArgument;
  const plain::ForwardTensors tensors(*layers);
  int32_t status = kLstmOk;
  for (int64_t l = 0; status == kLstmOk && l < layers->layers; ++l) {
    LstmForward recurrences[plain::kMostDirections];
    for (int64_t d = 0; d < layers->directions; ++d) {
      recurrences[d] = plain::forward(*layers, tensors, l, d);
    }
    status = fused_lstm_forward(recurrences, layers->directions, layers->dtype, layers->threads,
                                layers->instruction_set);
  }
  return status;
}

int32_t fused_lstm_plain_backward(const LstmPlain *layers) {
  if (!plain_fits(layers)) return kLstmBadArgument;
  const plain::BackwardTensors tensors(*layers);
  int32_t status = kLstmOk;
  for (int64_t l = layers->layers; status == kLstmOk && l-- > layers->lowest;) {
    LstmBackward recurrences[plain::kMostDirections];
    for (int64_t d = 0; d < layers->directions; ++d) {
      recurrences[d] = plain::backward(*layers, tensors, l, d);
    }
    status = fused_lstm_backward(recurrences, layers->directions, layers->dtype, layers->threads,
                                 layers->instruction_set);
    const LstmBackward &first = recurrences[0];
    for (int64_t d = 1; status == kLstmOk && first.grad_x.data && d < layers->directions; ++d) {
      supported().sets[layers->instruction_set]->add(
          first.grad_x.data, recurrences[d].grad_x.data,
          first.steps * first.batch * first.input_size, layers->dtype);
    }
  }
  return status;
}

}  // extern "C"
