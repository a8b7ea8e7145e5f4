// Plain layers: from their sizes and addresses to the recurrences of each layer and direction.
#pragma once

#include <cstdint>

#include "lstm.h"

namespace plain {

constexpr int64_t kMostDirections = 2;

// Where a call's tensors, or their gradients, lie: x, h0 and c0, and the weights.
struct Tensors {
  void *x, *h0, *c0;
  void *const *weights;
  void *const *end;  // what follows them

  Tensors(const LstmPlain &layers, void *const *addresses)
      : x(addresses[0]),
        h0(layers.states ? addresses[1] : nullptr),
        c0(layers.states ? addresses[2] : nullptr),
        weights(addresses + (layers.states ? 3 : 1)),
        end(weights + layers.layers * layers.directions * each(layers)) {}

  // The number of weights of a layer and direction.
  static int64_t each(const LstmPlain &layers) { return layers.biases ? 4 : 2; }
};

// The addresses behind a structure, see lstm.h.
inline void *const *addresses(const LstmPlain &layers) {
  return reinterpret_cast<void *const *>(&layers + 1);
}

// What lstm.h lists for each pass; `grads` are of output, h_n and c_n.
struct ForwardTensors : Tensors {
  void *h_n, *c_n;
  void *const *saved, *const *outputs;

  explicit ForwardTensors(const LstmPlain &layers)
      : Tensors(layers, addresses(layers)),
        h_n(end[0]),
        c_n(end[1]),
        saved(end + 2),
        outputs(saved + layers.layers) {}
};

struct BackwardTensors : Tensors {
  void *const *saved, *const *outputs, *const *grads;
  Tensors gradients;
  void *const *between;

  explicit BackwardTensors(const LstmPlain &layers)
      : Tensors(layers, addresses(layers)),
        saved(end),
        outputs(saved + layers.layers),
        grads(outputs + layers.layers),
        gradients(layers, grads + 3),
        between(gradients.end) {}

  // Where a direction leaves the gradient of its layer's input, or null. The first direction's is
  // the layer's in the end.
  void *grad_input(const LstmPlain &layers, int64_t layer, int64_t direction) const {
    if (layer > layers.lowest) {
      return between[(layer - layers.lowest - 1) % 2 * layers.directions + direction];
    }
    if (layer > 0 || !gradients.x) return nullptr;
    return direction ? between[2 * layers.directions] : gradients.x;
  }
};

// Where the tensors of one layer and direction lie.
class Direction {
 public:
  Direction(const LstmPlain &layers, int64_t layer, int64_t direction)
      : layers_(layers), layer_(layer), direction_(direction) {}

  // Its part of [L*D, B, H], of [T, B, D*H], and of what the layer saved.
  LstmState state(void *base) const {
    return {at(base, index() * layers_.batch * hidden()), hidden()};
  }
  LstmSequence output(void *base, int64_t stride_t, int64_t stride_b) const {
    return {at(base, direction_ * hidden()), stride_t, stride_b};
  }
  LstmSequence output(void *base) const { return output(base, layers_.batch * width(), width()); }
  LstmSequence activations(void *base) const {
    return {at(base, direction_ * rows() * 5 * hidden()), layers_.batch * 4 * hidden(),
            4 * hidden()};
  }
  LstmSequence c(void *base) const {
    return {at(base, (direction_ * 5 + 4) * rows() * hidden()), layers_.batch * hidden(), hidden()};
  }
  // Its weight `k`: 0 to 3 are weight_ih, weight_hh, bias_ih and bias_hh.
  void *weight(void *const *weights, int64_t k) const {
    const int64_t each = Tensors::each(layers_);
    return k < each ? weights[index() * each + k] : nullptr;
  }
  // The layer's input: of the lowest layer with these strides, of others as the layer below left it.
  LstmSequence input(void *base, int64_t stride_t, int64_t stride_b) const {
    if (layer_ == 0) return {base, stride_t, stride_b};
    return {base, layers_.batch * width(), width()};
  }
  int64_t input_size() const { return layer_ == 0 ? layers_.input_size : width(); }

 private:
  const LstmPlain &layers_;
  const int64_t layer_, direction_;

  int64_t index() const { return layer_ * layers_.directions + direction_; }
  int64_t hidden() const { return layers_.hidden_size; }
  int64_t width() const { return layers_.directions * hidden(); }
  int64_t rows() const { return layers_.steps * layers_.batch; }
  int64_t size() const {
    return layers_.dtype == kLstmFloat64 ? 8 : layers_.dtype == kLstmFloat32 ? 4 : 2;
  }
  void *at(void *base, int64_t numbers) const {
    return base ? static_cast<char *>(base) + numbers * size() : nullptr;
  }
};

// What the recurrence of a layer and direction is in both passes.
template <class Recurrence, class AllTensors>
Recurrence recurrence(const LstmPlain &layers, const AllTensors &tensors, int64_t layer,
                      int64_t direction) {
  const Direction own(layers, layer, direction);
  Recurrence a = {};
  a.steps = layers.steps;
  a.batch = layers.batch;
  a.input_size = own.input_size();
  a.hidden_size = a.features = layers.hidden_size;
  a.reverse = direction;
  a.x = own.input(layer ? tensors.outputs[layer - 1] : tensors.x, layers.x_stride_t,
                  layers.x_stride_b);
  a.weight_ih = own.weight(tensors.weights, 0);
  a.weight_hh = own.weight(tensors.weights, 1);
  a.h0 = own.state(tensors.h0);
  a.c0 = own.state(tensors.c0);
  a.h = own.output(tensors.outputs[layer]);
  a.c = own.c(tensors.saved[layer]);
  a.activations = own.activations(tensors.saved[layer]);
  return a;
}

inline LstmForward forward(const LstmPlain &layers, const ForwardTensors &tensors, int64_t layer,
                           int64_t direction) {
  const Direction own(layers, layer, direction);
  LstmForward a = recurrence<LstmForward>(layers, tensors, layer, direction);
  a.bias_ih = own.weight(tensors.weights, 2);
  a.bias_hh = own.weight(tensors.weights, 3);
  a.h_n = own.state(tensors.h_n);
  a.c_n = own.state(tensors.c_n);
  return a;
}

// Of a layer that is not below the lowest one.
inline LstmBackward backward(const LstmPlain &layers, const BackwardTensors &tensors, int64_t layer,
                             int64_t direction) {
  const Direction own(layers, layer, direction);
  LstmBackward a = recurrence<LstmBackward>(layers, tensors, layer, direction);
  a.grad_h = layer + 1 == layers.layers
                 ? own.output(tensors.grads[0], layers.grad_output_stride_t,
                              layers.grad_output_stride_b)
                 : own.output(tensors.grad_input(layers, layer + 1, 0));
  a.grad_h_n = own.state(tensors.grads[1]);
  a.grad_c_n = own.state(tensors.grads[2]);
  a.grad_x = own.input(tensors.grad_input(layers, layer, direction), layers.grad_x_stride_t,
                       layers.grad_x_stride_b);
  a.grad_weight_ih = own.weight(tensors.gradients.weights, 0);
  a.grad_weight_hh = own.weight(tensors.gradients.weights, 1);
  a.grad_bias_ih = own.weight(tensors.gradients.weights, 2);
  a.grad_bias_hh = own.weight(tensors.gradients.weights, 3);
  a.grad_h0 = own.state(tensors.gradients.h0);
  a.grad_c0 = own.state(tensors.gradients.c0);
  return a;
}

}  // namespace plain
