// The C interface of the native CPU kernels: the whole LSTM recurrence, forward and backward.
//
// Dimensions: T time steps, B batch, I input features, H hidden units, P features of h (H, or the
// size of the projection), N rows (T*B, or the sum of batch_sizes). Gate order i, f, g, o.
//
// Every field is eight bytes wide, so that a caller without a C compiler can pack the structures as
// an array. Strides count elements; the last dimension of every tensor is contiguous. A tensor
// "[T, B, F]" is addressed as base + t*stride_t + b*stride_b, or, where batch_sizes is given, as
// base + (rows of earlier steps + b)*stride_b. The caller has checked every shape.
//
// With lengths, sequence b has the steps 0 ... lengths[b]-1, and `reverse` starts from the last of
// them. What an input holds at other steps is not read, and an output is zero there.
#pragma once

#include <cstdint>

extern "C" {

// Raised with every change of the structures or functions below.
constexpr int64_t kLstmAbiVersion = 6;

// In bfloat16 there is fused_lstm_forward alone, where fused_lstm_multiplies_bfloat16 says so, and
// from x: without activations, c, projection, recurrent_mask and zoneout. Every h is rounded as it
// is stored, and c is kept in float until the end.
enum LstmDtype : int64_t { kLstmFloat32 = 0, kLstmFloat64 = 1, kLstmBFloat16 = 2 };

enum LstmStatus : int32_t { kLstmOk = 0, kLstmOutOfMemory = 1, kLstmBadArgument = 2 };

// A tensor [T, B, F], or [N, F] rows of a packed batch; data is null where it is not given.
struct LstmSequence {
  void *data;
  int64_t stride_t;
  int64_t stride_b;
};

// A tensor [B, F]; data is null where it is not given.
struct LstmState {
  void *data;
  int64_t stride_b;
};

// What changes a recurrence; all bytes are zero where nothing does. None of it is differentiated.
struct LstmModifiers {
  const int64_t *lengths;    // [B], the steps of each sequence of a padded batch, 0 ... T; or null
  LstmSequence resets;       // [T, B] of uint8_t: not 0 where a step starts from zeros; or null
  LstmState recurrent_mask;  // [B, P], what h is multiplied by where it enters W_hh; or null
  LstmSequence zoneout_h;    // [T, B, P], the part of h that stays as it was; or null
  LstmSequence zoneout_c;    // [T, B, H], likewise of c
  double cell_clip;          // the largest |c|, before zoneout; 0 for none
};

// One recurrence to compute: one direction of one layer.
struct LstmForward {
  int64_t steps;               // T
  int64_t batch;               // B
  int64_t input_size;          // I; 0 where `gates` is given
  int64_t hidden_size;         // H
  int64_t features;            // P; H without a projection
  int64_t reverse;             // whether time runs from T-1 to 0
  const int64_t *batch_sizes;  // [T], rows active at each step, not increasing; or null
  LstmSequence gates;          // in  [T, B, 4H], or null: computed from x
  LstmSequence x;              // in  [T, B, I], or null
  const void *weight_ih;       // in  [4H, I], or null with `gates`
  const void *bias_ih;         // in  [4H] or null
  const void *bias_hh;         // in  [4H] or null
  const void *weight_hh;       // in  [4H, P]
  const void *weight_hr;       // in  [P, H], or null without a projection
  LstmState h0;                // in  [B, P], or null for zeros
  LstmState c0;                // in  [B, H], or null for zeros
  LstmSequence h;              // out [T, B, P]
  LstmSequence c;              // out [T, B, H], or null
  LstmSequence activations;    // out [T, B, 4H], sigma(a_i), sigma(a_f), tanh(a_g), sigma(a_o); or null
  LstmState h_n;               // out [B, P]
  LstmState c_n;               // out [B, H]
  LstmModifiers modifiers;
};

// One recurrence to differentiate.
struct LstmBackward {
  int64_t steps;
  int64_t batch;
  int64_t input_size;  // 0 where neither grad_x nor grad_weight_ih is wanted
  int64_t hidden_size;
  int64_t features;
  int64_t reverse;
  const int64_t *batch_sizes;
  LstmSequence activations;  // in  [T, B, 4H], as the forward pass left them
  LstmSequence c;            // in  [T, B, H], likewise
  LstmSequence x;            // in  [T, B, I], or null
  LstmSequence h;            // in  [T, B, P], or null where T is 1 or grad_weight_hh is not wanted
  const void *weight_ih;     // in  [4H, I], or null where grad_x is not wanted
  const void *weight_hh;     // in  [4H, P]
  const void *weight_hr;     // in  [P, H] or null
  LstmState h0;              // in  [B, P], or null for zeros
  LstmState c0;              // in  [B, H], or null for zeros
  LstmSequence grad_h;       // in  [T, B, P], or null for zeros
  LstmSequence grad_c;       // in  [T, B, H], or null for zeros
  LstmState grad_h_n;        // in  [B, P], or null for zeros
  LstmState grad_c_n;        // in  [B, H], or null for zeros
  LstmSequence grad_gates;   // out [T, B, 4H], or null
  LstmSequence whole_grad_h; // out [T, B, P], of h before zoneout, with a projection; or null
  LstmSequence grad_x;       // out [T, B, I], or null
  void *grad_weight_ih;      // out [4H, I], or null
  void *grad_weight_hh;      // out [4H, P], or null
  void *grad_bias_ih;        // out [4H], or null
  void *grad_bias_hh;        // out [4H], the same once more, or null; null where grad_bias_ih is
  void *grad_weight_hr;      // out [P, H], or null
  LstmState grad_h0;         // out [B, P], or null
  LstmState grad_c0;         // out [B, H], or null
  LstmModifiers modifiers;   // as in the forward pass
};

// One recurrence with layer normalization to compute, from given gates; layer_norm.h has the
// equations.
struct LstmLayerNormForward : LstmForward {
  LstmSequence normalized;  // out [T, B, 4H], the normalized h_{t-1}·W_hhᵀ, or null
  LstmSequence rstd;        // out [T, B, 1], what it was multiplied by, 1/√(var + eps), or null
  const void *gain_hh;      // in  [4H], of h_{t-1}·W_hhᵀ
  const void *gain_c;       // in  [H], of c
  const void *bias_c;       // in  [H] or null
  double eps;               // added to variances
};

// One recurrence with layer normalization to differentiate. Gradients of x, of weights and of biases
// are not computed; grad_gates and, with a projection, whole_grad_h must be given.
struct LstmLayerNormBackward : LstmBackward {
  LstmSequence normalized;    // in  [T, B, 4H], as the forward pass left it
  LstmSequence rstd;          // in  [T, B, 1], likewise
  LstmSequence grad_product;  // out [T, B, 4H], of h_{t-1}·W_hhᵀ
  LstmSequence grad_z;        // out [T, B, H], of the normalized c, times its gain, plus its bias
  const void *gain_hh;        // in  [4H]
  const void *gain_c;         // in  [H]
  const void *bias_c;         // in  [H] or null
  double eps;
};

// Layers without projection, packing and modifiers, one upon another, or a cell. For small ones it
// takes as long to fill the structures above as to compute: what is known before there are tensors
// comes first, and the addresses of all tensors follow this structure. All but x and grad_output are
// contiguous.
//
// To compute them:
//   x                      [T, B, I]
//   h0, c0                 [L*D, B, H], if they are given
//   weights                of each layer and direction weight_ih, weight_hh and, if there are any,
//                          bias_ih and bias_hh
//   h_n, c_n               out [L*D, B, H]
//   saved, L times         out [D, T*B*5H]: activations [T, B, 4H], then c [T, B, H]; or null
//   output, L times        out [T, B, D*H]; two layers that do not follow each other may share one
//
// To differentiate them, but none below `lowest`:
//   x, h0, c0, weights     as above
//   saved, output          as above; outputs may be null where T is 1
//   grad_output            [T, B, D*H], or null for zeros
//   grad_h_n, grad_c_n     [L*D, B, H], or null for zeros
//   gradients              out, like x, h0, c0 and weights, or null; of a layer's weights all or none
//   between, 2*D times     scratch [T, B, D*H]: the last D where L is at least lowest + 3, the others
//                          where it is at least lowest + 2; or null
//   another gradient of x  scratch, or null where D is 1 or none is wanted
struct LstmPlain {
  int64_t dtype;       // LstmDtype
  int64_t layers;      // L
  int64_t directions;  // D; the second runs backwards in time
  int64_t steps;
  int64_t batch;
  int64_t input_size;
  int64_t hidden_size;
  int64_t biases;                           // whether there are any
  int64_t states;                           // whether h0 and c0 are given; else they are zeros
  int64_t x_stride_t, x_stride_b;           // of [T, B, I]
  int64_t grad_x_stride_t, grad_x_stride_b;
  int64_t grad_output_stride_t, grad_output_stride_b;
  int64_t lowest;                           // the lowest layer of which a gradient is wanted
  int64_t threads;
  int64_t instruction_set;
};

// The version of this interface that the library was built with.
int64_t fused_lstm_abi_version();

// Names of the instruction sets that were compiled in and that this CPU has, best first, separated
// by commas, such as "avx512,avx2,baseline".
const char *fused_lstm_instruction_sets();

// Whether fused_lstm_forward takes kLstmBFloat16 with an instruction set, an index into those names:
// 1 where there are instructions for products of bfloat16, else 0.
int64_t fused_lstm_multiplies_bfloat16(int64_t instruction_set);

// Hand over the OpenMP runtime that runs the threads: the one PyTorch uses, so that a process never
// holds two. Without it everything runs on the calling thread.
//   parallel:    GOMP_parallel(function, data, num_threads, flags)
//   thread_num:  omp_get_thread_num()
//   num_threads: omp_get_num_threads()
void fused_lstm_set_openmp(void (*parallel)(void (*)(void *), void *, unsigned, unsigned),
                           int (*thread_num)(), int (*num_threads)());

// Compute `count` independent recurrences, side by side where there are threads for it.
//   instruction_set: an index into fused_lstm_instruction_sets().
int32_t fused_lstm_forward(const LstmForward *recurrences, int64_t count, int64_t dtype,
                           int64_t threads, int64_t instruction_set);

// Differentiate `count` independent recurrences.
int32_t fused_lstm_backward(const LstmBackward *recurrences, int64_t count, int64_t dtype,
                            int64_t threads, int64_t instruction_set);

// The same for recurrences with layer normalization.
int32_t fused_lstm_layer_norm_forward(const LstmLayerNormForward *recurrences, int64_t count,
                                      int64_t dtype, int64_t threads, int64_t instruction_set);
int32_t fused_lstm_layer_norm_backward(const LstmLayerNormBackward *recurrences, int64_t count,
                                       int64_t dtype, int64_t threads, int64_t instruction_set);

// Compute plain layers, and differentiate them. Addresses follow the structure.
int32_t fused_lstm_plain_forward(const LstmPlain *layers);
int32_t fused_lstm_plain_backward(const LstmPlain *layers);

}  // extern "C"
