// What the host passes to the kernels: plain C, the same bytes as the structures of launch.py.
//
// Dimensions: T time steps, B batch, H hidden units, N rows of a packed batch. "element" is the
// type of the gates. Strides are counted in elements of their tensor. A tensor that is absent is
// null.
#pragma once

// How many recurrences one launch may hold: directions, and layers at different times.
constexpr int MAX_RECURRENCES = 8;

// What modifies one recurrence; see lstm_recurrence in fused_lstm/recurrence.py.
struct Modifiers {
  const i64* lengths;           // [B]: the steps of each row; of packed rows, too
  const i64* step_rows;         // [T]: packed rows only: the first row of each step
  const u8* resets;             // [T, B] or [N]
  const void* recurrent_mask;   // [B, H] element
  const void* zoneout_h;        // [T, B, H] or [N, H], element, or float32 if zoneout_h_is_float
  const void* zoneout_c;        // likewise
  i64 resets_stride_t, resets_stride_b;
  i64 zoneout_h_stride_t, zoneout_h_stride_b;
  i64 zoneout_c_stride_t, zoneout_c_stride_b;
  int zoneout_h_is_float, zoneout_c_is_float;
  float cell_clip;
  int reserved;
};

// One recurrence to compute. Tensors without strides here are contiguous.
struct ForwardRecurrence {
  const void* gates;      // [T, B, 4H] or [N, 4H] element; columns adjacent, rows on 16 bytes
  const void* weight_hh;  // [4H, H] element
  const void* h0;         // [B, H] element
  const void* c0;         // [B, H] element
  void* h;                // [T, B, H] or [N, H] element
  float* c;               // likewise, float32; only with SAVE_CELLS
  void* activations;      // [T, B, 4H] or [N, 4H] element; only with SAVE_ACTIVATIONS
  void* h_n;              // [B, H] element
  void* c_n;              // [B, H] element
  i64 gates_stride_t, gates_stride_b;
  Modifiers modifiers;
  int steps;        // T
  int reverse;      // whether time runs from T-1 to 0
  int wide_states;  // c0 and c_n are float32: those of a part of a sequence
  int reserved;
};

// One recurrence to differentiate.
struct BackwardRecurrence {
  const void* grad_h;       // [T, B, H] or [N, H] element; columns adjacent
  const float* grad_c;      // likewise, float32
  const void* grad_h_n;     // [B, H] element
  const void* grad_c_n;     // [B, H] element
  const void* activations;  // [T, B, 4H] or [N, 4H] element, rows on 16 bytes
  const float* c;           // [T, B, H] or [N, H]
  const void* weight_hh;    // [4H, H] element
  const void* c0;           // [B, H] element
  void* grad_gates;         // like activations
  void* grad_h0;            // [B, H] element
  void* grad_c0;            // [B, H] element
  i64 grad_h_stride_t, grad_h_stride_b;
  i64 grad_c_stride_t, grad_c_stride_b;
  Modifiers modifiers;
  int steps;        // T
  int reverse;      // whether time ran from T-1 to 0
  int wide_states;  // c0 and the gradients of states are float32: those of a part of a sequence
  int reserved;
};

// A launch: `recurrences` of them, `tiles` batch tiles of each, beginning with tile `first_tile`.
// Team (block / team size) r * tiles + k works on tile first_tile + k of recurrence r.
template <class Recurrence>
struct Parameters {
  Recurrence recurrence[MAX_RECURRENCES];
  int recurrences;
  int tiles;
  int first_tile;
  int batch;        // B
  void* exchange;   // grid scope: EXCHANGE_BYTES for each team; its content does not matter
  u32* flags;       // grid scope: one for each block, 0 at the start
};
typedef Parameters<ForwardRecurrence> ForwardParameters;
typedef Parameters<BackwardRecurrence> BackwardParameters;
