// Launches of the LSTM kernels: what each may access follows from its parameters alone, so that
// every launch is checked, whoever prepared it. Included after an instance of a kernel.
#pragma once

#include "launcher.h"
#include "parameters.h"

namespace simt {

// Collects the ranges of one launch, with names that live as long.
class Ranges {
 public:
  std::vector<Range> list;

  void add(const std::string& name, const void* tensor, i64 bytes, Access access) {
    if (!tensor || bytes <= 0) return;
    names_.push_back(name);
    list.push_back(Range{(uint64_t)(uintptr_t)tensor, (uint64_t)bytes, access,
                         names_.back().c_str()});
  }

 private:
  std::deque<std::string> names_;
};

// The dimensions of one recurrence of a launch with configuration C.
template <class C>
struct Extents {
  std::string prefix;
  i64 steps, batch, rows;

  Extents(unsigned index, const Modifiers& modifiers, int steps, int batch)
      : prefix("recurrence " + std::to_string(index) + " "), steps(steps), batch(batch) {
    rows = this->steps * batch;
    if (C::PACKED) {
      rows = 0;
      for (int b = 0; b < batch; b++) rows += modifiers.lengths[b];
    }
  }

  static constexpr i64 ELEMENT = sizeof(typename Element<C::TYPE>::Bits);

  // Elements from the first to the last of [T, B, columns], or [N, columns], with these strides.
  i64 strided(i64 stride_t, i64 stride_b, i64 columns) const {
    if (!rows) return 0;
    if (C::PACKED) return (rows - 1) * stride_b + columns;
    return (steps - 1) * stride_t + (batch - 1) * stride_b + columns;
  }
  i64 contiguous(i64 columns) const { return rows * columns; }
  // Bytes of [B, H], of elements or, between the parts of a sequence, of float32.
  i64 state_bytes(int wide = 0) const { return batch * C::HIDDEN * (wide ? 4 : ELEMENT); }
};

template <class C>
void add_modifiers(Ranges& ranges, const Extents<C>& extents, const Modifiers& m) {
  const auto name = [&](const char* tensor) { return extents.prefix + tensor; };
  const auto zoneout = [&](i64 stride_t, i64 stride_b, int is_float) {
    return extents.strided(stride_t, stride_b, C::HIDDEN) * (is_float ? 4 : extents.ELEMENT);
  };
  ranges.add(name("lengths"), m.lengths, extents.batch * 8, READ_ONLY);
  ranges.add(name("step_rows"), m.step_rows, extents.steps * 8, READ_ONLY);
  ranges.add(name("resets"), m.resets,
             extents.strided(m.resets_stride_t, m.resets_stride_b, 1), READ_ONLY);
  ranges.add(name("recurrent_mask"), m.recurrent_mask, extents.state_bytes(),
             READ_ONLY);
  ranges.add(name("zoneout_h"), m.zoneout_h,
             zoneout(m.zoneout_h_stride_t, m.zoneout_h_stride_b, m.zoneout_h_is_float), READ_ONLY);
  ranges.add(name("zoneout_c"), m.zoneout_c,
             zoneout(m.zoneout_c_stride_t, m.zoneout_c_stride_b, m.zoneout_c_is_float), READ_ONLY);
}

template <class C>
void add_recurrence(Ranges& ranges, unsigned index, const ForwardRecurrence& r, int batch) {
  constexpr i64 H = C::HIDDEN, ELEMENT = Extents<C>::ELEMENT;
  const Extents<C> extents(index, r.modifiers, r.steps, batch);
  const auto add = [&](const char* name, const void* tensor, i64 bytes, Access access) {
    ranges.add(extents.prefix + name, tensor, bytes, access);
  };
  add("gates", r.gates, extents.strided(r.gates_stride_t, r.gates_stride_b, 4 * H) * ELEMENT,
      READ_ONLY);
  add("weight_hh", r.weight_hh, 4 * H * H * ELEMENT, READ_ONLY);
  add("h0", r.h0, extents.state_bytes(), READ_ONLY);
  add("c0", r.c0, extents.state_bytes(r.wide_states), READ_ONLY);
  add("h", r.h, extents.contiguous(H) * ELEMENT, WRITABLE);
  add("c", r.c, extents.contiguous(H) * 4, WRITABLE);
  add("activations", r.activations, extents.contiguous(4 * H) * ELEMENT, WRITABLE);
  add("h_n", r.h_n, extents.state_bytes(), WRITABLE);
  add("c_n", r.c_n, extents.state_bytes(r.wide_states), WRITABLE);
  add_modifiers<C>(ranges, extents, r.modifiers);
}

template <class C>
void add_recurrence(Ranges& ranges, unsigned index, const BackwardRecurrence& r, int batch) {
  constexpr i64 H = C::HIDDEN, ELEMENT = Extents<C>::ELEMENT;
  const Extents<C> extents(index, r.modifiers, r.steps, batch);
  const auto add = [&](const char* name, const void* tensor, i64 bytes, Access access) {
    ranges.add(extents.prefix + name, tensor, bytes, access);
  };
  add("grad_h", r.grad_h, extents.strided(r.grad_h_stride_t, r.grad_h_stride_b, H) * ELEMENT,
      READ_ONLY);
  add("grad_c", r.grad_c, extents.strided(r.grad_c_stride_t, r.grad_c_stride_b, H) * 4, READ_ONLY);
  add("grad_h_n", r.grad_h_n, extents.state_bytes(r.wide_states), READ_ONLY);
  add("grad_c_n", r.grad_c_n, extents.state_bytes(r.wide_states), READ_ONLY);
  add("activations", r.activations, extents.contiguous(4 * H) * ELEMENT, READ_ONLY);
  add("c", r.c, extents.contiguous(H) * 4, READ_ONLY);
  add("weight_hh", r.weight_hh, 4 * H * H * ELEMENT, READ_ONLY);
  add("c0", r.c0, extents.state_bytes(r.wide_states), READ_ONLY);
  add("grad_gates", r.grad_gates, extents.contiguous(4 * H) * ELEMENT, WRITABLE);
  add("grad_h0", r.grad_h0, extents.state_bytes(r.wide_states), WRITABLE);
  add("grad_c0", r.grad_c0, extents.state_bytes(r.wide_states), WRITABLE);
  add_modifiers<C>(ranges, extents, r.modifiers);
}

// All that a launch may access. Its exchange area is filled with NaN: its content must not matter.
template <class C, class Layout, class P>
void add_launch(Ranges& ranges, const P& parameters, unsigned teams) {
  for (int r = 0; r < parameters.recurrences; r++) {
    add_recurrence<C>(ranges, (unsigned)r, parameters.recurrence[r], parameters.batch);
  }
  if (C::SCOPE != Scope::grid) return;
  const i64 exchange_bytes = (i64)teams * Layout::EXCHANGE_BYTES;
  ranges.add("exchange", parameters.exchange, exchange_bytes, EXCHANGE);
  ranges.add("flags", parameters.flags, (i64)teams * C::TEAM * 4, FLAGS);
  memset(parameters.exchange, 0xff, (size_t)exchange_bytes);
}

}  // namespace simt

// Makes the functions of one instance: simt_launch, and what its layout says.
#define SIMT_LSTM_LAUNCHER(kernel, Layout, ParametersType)                                        \
  extern "C" int simt_threads() { return Layout::THREADS; }                                       \
  extern "C" int simt_shared_bytes() { return Layout::SHARED_BYTES; }                             \
  extern "C" long long simt_exchange_bytes() { return Layout::EXCHANGE_BYTES; }                   \
  extern "C" int simt_team() { return Configuration::TEAM; }                                      \
  extern "C" size_t simt_parameter_bytes() { return sizeof(ParametersType); }                     \
  extern "C" int simt_launch(unsigned teams, const void* parameters, const simt::Options* options, \
                             simt::Statistics* statistics, char* error, size_t error_bytes) {     \
    typedef Configuration C;                                                                      \
    const ParametersType copy = *(const ParametersType*)parameters;                               \
    simt::Ranges ranges;                                                                          \
    simt::add_launch<C, Layout>(ranges, copy, teams);                                             \
    const simt::Launch launch{teams * C::TEAM,                                                    \
                              Layout::THREADS,                                                    \
                              C::SCOPE == Scope::cluster ? (unsigned)C::TEAM : 1u,                \
                              Layout::SHARED_BYTES,                                               \
                              C::SCOPE == Scope::grid,                                            \
                              ranges.list};                                                       \
    return simt::guarded_run(                                                                     \
        launch, *options, [&] { kernel(copy); }, statistics, error, error_bytes);                 \
  }
