"""Calls the native kernels for plain layers, or a cell, with nothing but addresses.

For small models the microseconds in which `launch.layer_forward` looks at its tensors are more than
the kernel's. `PlainLayers` are made once for tensors of some sizes, and do not look at them.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `L` layers, `D`
directions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .launch import _LOWEST, DTYPES, _address, _check, _rows, _time_and_batch
from .library import load

try:
    # What compiled graphs allocate with: half the time of torch.empty.
    from torch._C._dynamo.guards import _empty_strided_cpu as _empty
except ImportError:

    def _empty(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


__all__ = ["PlainLayers"]

# LstmPlain, LstmPlainForward and LstmPlainBackward in lstm.h, eight bytes a field.
_LAYER = struct.Struct("=11q")
_FORWARD = struct.Struct("=15q")
_BACKWARD = struct.Struct("=30q")
_WEIGHTS = 8

# Shape and strides of a tensor that is to be allocated.
_Form = tuple[tuple[int, ...], tuple[int, ...]]


def _form(*shape: int) -> _Form:
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return shape, tuple(strides)


class PlainLayers:
    """Layers without projection, packing and modifiers, for tensors of known sizes.

    The tensors of its calls are, in this order,

        x: [T, B, I], [B, T, I] with batch_first, or [B, I] for a cell;
        h0, c0, unless the states start from zeros: [L·D, B, H], or [B, H] for a cell;
        weights: for each layer and direction weight_ih [4H, I] (above the first layer [4H, D·H]),
            weight_hh [4H, H] and, with biases, bias_ih [4H] and bias_hh [4H],

    all on the CPU and of one dtype, and all but x contiguous. The callers have checked it: other
    tensors would be read or written beyond their ends.

    Args:
        shape: of x; no dimension is empty.
        strides: of x, whose features are contiguous.
        hidden_size: H.
        num_layers: L; 1 for a cell.
        directions: D; 1 for a cell.
        bias: whether there are biases.
        batch_first: whether x is [B, T, I].
        states: whether there are h0 and c0.
        dtype: of all tensors.

    Attributes:
        shapes: of the tensors of a call.
        state: shape of h0, c0, h_n and c_n.
        num_layers: L.
        directions: D.
        batch_first: whether x is [B, T, I].
        cell: whether it is a cell.
        first_weight: the number of tensors before the weights.
        each: the number of weights of a layer and direction.
    """

    def __init__(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        hidden_size: int,
        num_layers: int,
        directions: int,
        bias: bool,
        batch_first: bool,
        states: bool,
        dtype: torch.dtype,
    ) -> None:
        *leading, inputs = shape
        cell = len(leading) == 1
        steps, batch = (1, *leading)[-2:]
        # Of time and batch.
        x_strides, grad_x_strides = (0, *strides[:-1])[-2:], (batch * inputs, inputs)
        if batch_first:
            steps, batch = batch, steps
            x_strides, grad_x_strides = x_strides[::-1], grad_x_strides[::-1]
        rows, gates, features = steps * batch, 4 * hidden_size, directions * hidden_size
        self.num_layers, self.directions, self.batch_first = num_layers, directions, batch_first
        self.cell, self._states = cell, states
        self.state: tuple[int, ...] = (num_layers * directions, batch, hidden_size)
        output: tuple[int, ...] = (steps, batch, features)
        if cell:
            self.state = output = (batch, hidden_size)
        widths = (inputs, *[features] * (num_layers - 1))
        vectors = [(gates,)] * 2 if bias else []
        weights: list[tuple[int, ...]] = []
        for width in widths:
            weights += [(gates, width), (gates, hidden_size), *vectors] * directions
        self.first_weight, self.each = 3 if states else 1, 4 if bias else 2
        self.shapes = (tuple(shape), *[self.state] * (self.first_weight - 1), *weights)
        self._strides = tuple(strides)
        self._dtype = dtype
        # Each direction's activations of all rows, and then its cell states.
        saved = directions, rows * (gates + hidden_size)
        self._input_form, self._state_form = _form(*shape), _form(*self.state)
        self._output_form, self._saved_form = _form(*output), _form(*saved)
        self._weight_forms = [_form(*weight) for weight in weights]
        # In bytes, of one layer.
        self._state_bytes = directions * batch * hidden_size * dtype.itemsize
        self._output_strides = batch * features, features
        self._layers = []
        for width in widths:
            sizes = directions, steps, batch, width, hidden_size, bias
            self._layers.append(_LAYER.pack(DTYPES[dtype], *sizes, *x_strides, *grad_x_strides))
            x_strides = grad_x_strides = self._output_strides
        self._no_weights = (0,) * (_WEIGHTS - directions * self.each)
        # Of what is kept for a backward pass, which does not look at the biases.
        self._kept = (
            *[shape if len(shape) > 1 else None for shape in self.shapes],
            *[output] * (0 if cell else num_layers),
            *[saved] * num_layers,
        )

    @staticmethod
    def addresses(tensors: Sequence[Tensor]) -> list[int]:
        """Where tensors lie.

        Raises:
            RuntimeError: if the memory of one is gone.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        if min(addresses) < _LOWEST:
            return [_address(tensor) for tensor in tensors]
        return addresses

    def forward(
        self, addresses: Sequence[int], save: bool
    ) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
        """Compute the layers.

        Args:
            addresses: of the call's tensors.
            save: whether `backward` will be called.

        Returns:
            The output of each layer if `save`, else of the last, [T, B, D·H] (of a cell h_n); h_n
            and c_n, shaped as h0; and, if `save`, for each layer what `backward` needs.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        dtype, of_layer, k = self._dtype, self.each * self.directions, self.first_weight
        h_n, c_n = _empty(*self._state_form, dtype), _empty(*self._state_form, dtype)
        x_at, h_n_at, c_n_at = addresses[0], h_n.data_ptr(), c_n.data_ptr()
        h0_at, c0_at = addresses[1:3] if self._states else (0, 0)
        run, threads = load().plain_forward, torch.get_num_threads()
        outputs, saved, state = [], [], 0
        for layer in self._layers:
            output = h_n if self.cell else _empty(*self._output_form, dtype)
            output_at, saved_at = output.data_ptr(), 0
            if save:
                saved.append(_empty(*self._saved_form, dtype))
                saved_at = saved[-1].data_ptr()
            tensors = _FORWARD.pack(
                x_at,
                h0_at and h0_at + state,
                c0_at and c0_at + state,
                output_at,
                saved_at,
                h_n_at + state,
                c_n_at + state,
                *addresses[k : k + of_layer],
                *self._no_weights,
            )
            status = run(layer, tensors, threads, launch._instruction_set)
            if status:
                _check(status, "forward")
            if not save:
                outputs.clear()
            outputs.append(output)
            x_at, k, state = output_at, k + of_layer, state + self._state_bytes
        return outputs, h_n, c_n, saved

    def fits(self, *tensors: Tensor) -> bool:
        """Whether what was kept for `backward` is still what it was.

        It need not be: hooks on saved tensors bring back what they like, and a parameter may have
        been given other memory (`.data`).

        Args:
            *tensors: those of the call, the outputs (not of a cell), and what was saved.
        """
        x = tensors[0]
        for tensor, shape in zip(tensors, self._kept, strict=True):
            if shape is not None and not (
                tensor.shape == shape
                and tensor.dtype is self._dtype
                and tensor.is_cpu
                and (tensor.is_contiguous() or tensor is x)
                and not tensor.is_neg()
                # Without memory are fakes, too, and other subclasses.
                and tensor.data_ptr()
            ):
                return False
        return x.stride() == self._strides

    def backward(
        self,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        addresses: Sequence[int],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Differentiate the layers.

        Args:
            grad_output: [T, B, D·H], of the last layer's output, with any strides, or None for
                zeros; a cell has none.
            grad_h_n: like h_n, with any strides, or None for zeros.
            grad_c_n: like c_n, likewise.
            addresses: of the call's tensors, of the outputs (not of a cell), and of what the
                forward pass saved.
            needed: which gradients are wanted, of the call's tensors.

        Returns:
            Gradients of the call's tensors; None for those that are not wanted.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        dtype, first = self._dtype, self.first_weight
        of_layer = self.each * self.directions
        lowest, grads = 0, [None] * len(needed)  # type: list[Tensor | None]
        # Below the lowest weights that want a gradient nothing is differentiated.
        if True not in needed[:first]:
            lowest = (needed.index(True) - first) // of_layer
        h0_at = c0_at = 0
        grad_states_at = [0, 0]
        if self._states:
            h0_at, c0_at = addresses[1:3]
            for k in (0, 1):
                if needed[1 + k]:
                    grad = _empty(*self._state_form, dtype)
                    grads[1 + k], grad_states_at[k] = grad, grad.data_ptr()
        grad_h0_at, grad_c0_at = grad_states_at
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        grad_c_n = None if grad_c_n is None else grad_c_n.contiguous()
        grad_h_n_at, grad_c_n_at = _address(grad_h_n), _address(grad_c_n)
        strides = self._output_strides
        if grad_output is not None and not grad_output.is_contiguous():
            grad_output = _rows(grad_output)
            strides = _time_and_batch(grad_output, False)
        saved = len(addresses) - self.num_layers
        outputs = saved if self.cell else saved - self.num_layers
        run, threads = load().plain_backward, torch.get_num_threads()
        for layer in reversed(range(lowest, self.num_layers)):
            own, state = first + of_layer * layer, layer * self._state_bytes
            form = self._output_form if layer else self._input_form
            grad_inputs: list[Tensor] = []
            grad_inputs_at, grad_weights_at = [0, 0], [0] * of_layer
            if needed[0] or layer > lowest:
                for d in range(self.directions):
                    grad_inputs.append(_empty(*form, dtype))
                    grad_inputs_at[d] = grad_inputs[d].data_ptr()
            if True in needed[own : own + of_layer]:
                for k in range(of_layer):
                    grad = _empty(*self._weight_forms[own - first + k], dtype)
                    grads[own + k], grad_weights_at[k] = grad, grad.data_ptr()
            tensors = _BACKWARD.pack(
                addresses[outputs + layer - 1] if layer else addresses[0],
                h0_at and h0_at + state,
                c0_at and c0_at + state,
                0 if self.cell else addresses[outputs + layer],
                addresses[saved + layer],
                _address(grad_output),
                *strides,
                grad_h_n_at and grad_h_n_at + state,
                grad_c_n_at and grad_c_n_at + state,
                grad_h0_at and grad_h0_at + state,
                grad_c0_at and grad_c0_at + state,
                *grad_inputs_at,
                *addresses[own : own + of_layer],
                *self._no_weights,
                *grad_weights_at,
                *self._no_weights,
            )
            status = run(self._layers[layer], tensors, threads, launch._instruction_set)
            if status:
                _check(status, "backward")
            grad_output, strides = None, self._output_strides
            if grad_inputs:
                grad_output, *others = grad_inputs
                for other in others:
                    grad_output += other
        grads[0] = grad_output
        return grads
