// Plain layers: from their sizes and addresses to the recurrences of each direction.
#pragma once

#include <cstdint>

#include "lstm.h"

namespace plain {

// Where the tensors of one direction lie, in bytes from those of the first one.
class Direction {
 public:
  Direction(const LstmPlain &layer, int64_t direction) : layer_(layer), direction_(direction) {}

  // Its part of [D, B, H], of [T, B, D*H], and of what is saved.
  template <class Void>
  LstmState state(Void *base) const {
    return {at(base, layer_.batch * layer_.hidden_size), layer_.hidden_size};
  }
  template <class Void>
  LstmSequence output(Void *base, int64_t stride_t, int64_t stride_b) const {
    return {at(base, layer_.hidden_size), stride_t, stride_b};
  }
  template <class Void>
  LstmSequence output(Void *base) const {
    const int64_t features = layer_.directions * layer_.hidden_size;
    return output(base, layer_.batch * features, features);
  }
  template <class Void>
  LstmSequence activations(Void *base) const {
    const int64_t gates = 4 * layer_.hidden_size;
    return {at(base, saved_size()), layer_.batch * gates, gates};
  }
  template <class Void>
  LstmSequence c(Void *base) const {
    const int64_t hidden = layer_.hidden_size;
    void *own = at(base, saved_size());
    if (own) own = static_cast<char *>(own) + rows() * 4 * hidden * size();
    return {own, layer_.batch * hidden, hidden};
  }
  // Its weight `index`: 0 to 3 are weight_ih, weight_hh, bias_ih and bias_hh.
  template <class Void>
  Void *weight(Void *const *weights, int64_t index) const {
    const int64_t each = layer_.biases ? 4 : 2;
    return index < each ? weights[direction_ * each + index] : nullptr;
  }

 private:
  const LstmPlain &layer_;
  const int64_t direction_;

  int64_t rows() const { return layer_.steps * layer_.batch; }
  int64_t saved_size() const { return rows() * 5 * layer_.hidden_size; }
  int64_t size() const {
    return layer_.dtype == kLstmFloat64 ? 8 : layer_.dtype == kLstmFloat32 ? 4 : 2;
  }
  // This direction's part of a tensor where each has so many numbers.
  void *at(const void *base, int64_t numbers) const {
    if (!base) return nullptr;
    return const_cast<char *>(static_cast<const char *>(base)) + direction_ * numbers * size();
  }
};

// What the recurrence of a direction is in both passes.
template <class Recurrence, class Tensors>
Recurrence recurrence(const LstmPlain &layer, const Tensors &tensors, int64_t direction) {
  const Direction own(layer, direction);
  Recurrence a = {};
  a.steps = layer.steps;
  a.batch = layer.batch;
  a.input_size = layer.input_size;
  a.hidden_size = a.features = layer.hidden_size;
  a.reverse = direction;
  a.x = {const_cast<void *>(tensors.x), layer.x_stride_t, layer.x_stride_b};
  a.weight_ih = own.weight(tensors.weights, 0);
  a.weight_hh = own.weight(tensors.weights, 1);
  a.h0 = own.state(tensors.h0);
  a.c0 = own.state(tensors.c0);
  a.h = own.output(tensors.output);
  a.c = own.c(tensors.saved);
  a.activations = own.activations(tensors.saved);
  return a;
}

inline LstmForward forward(const LstmPlain &layer, const LstmPlainForward &tensors, int64_t d) {
  const Direction own(layer, d);
  LstmForward a = recurrence<LstmForward>(layer, tensors, d);
  a.bias_ih = own.weight(tensors.weights, 2);
  a.bias_hh = own.weight(tensors.weights, 3);
  a.h_n = own.state(tensors.h_n);
  a.c_n = own.state(tensors.c_n);
  return a;
}

inline LstmBackward backward(const LstmPlain &layer, const LstmPlainBackward &tensors, int64_t d) {
  const Direction own(layer, d);
  LstmBackward a = recurrence<LstmBackward>(layer, tensors, d);
  a.grad_h = own.output(tensors.grad_output, tensors.grad_output_stride_t,
                        tensors.grad_output_stride_b);
  a.grad_h_n = own.state(tensors.grad_h_n);
  a.grad_c_n = own.state(tensors.grad_c_n);
  a.grad_x = {tensors.grad_x[d], layer.grad_x_stride_t, layer.grad_x_stride_b};
  a.grad_weight_ih = own.weight(tensors.grad_weights, 0);
  a.grad_weight_hh = own.weight(tensors.grad_weights, 1);
  a.grad_bias_ih = own.weight(tensors.grad_weights, 2);
  a.grad_bias_hh = own.weight(tensors.grad_weights, 3);
  a.grad_h0 = own.state(tensors.grad_h0);
  a.grad_c0 = own.state(tensors.grad_c0);
  return a;
}

}  // namespace plain
