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
from .launch import (
    _BACKWARD,
    _FORWARD,
    _MODIFIERS,
    DTYPES,
    _address,
    _check,
    _rows,
    _time_and_batch,
)
from .library import load

__all__ = ["PlainLayers"]

# LstmForward and LstmBackward with nothing modified: zeros.
_PLAIN_FORWARD, _PLAIN_BACKWARD = (
    struct.Struct(f"{fields.format}{_MODIFIERS.size}x") for fields in (_FORWARD, _BACKWARD)
)

_NO_WEIGHTS = [0] * 4


class PlainLayers:
    """Layers without projection, packing and modifiers, for tensors of known sizes.

    The tensors of its calls are

        x: [T, B, I], [B, T, I] with batch_first, or [B, I] for a cell;
        h0, c0: [L·D, B, H], or [B, H] for a cell; None for zeros;
        weights: four for each layer and direction, in one list: weight_ih [4H, I] (above the first
            layer [4H, D·H]), weight_hh [4H, H], bias_ih [4H] and bias_hh [4H], or None for these
            two,

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
        dtype: of all tensors.

    Attributes:
        state: shape of h0, c0, h_n and c_n.
        weights: shapes of the weights.
        num_layers: L.
        directions: D.
        cell: whether it is a cell.
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
        self.num_layers, self.directions = num_layers, directions
        self.state: tuple[int, ...] = (num_layers * directions, batch, hidden_size)
        self._output: tuple[int, ...] = (steps, batch, features)
        if cell:
            self.state = self._output = (batch, hidden_size)
        widths = (inputs, *[features] * (num_layers - 1))
        vector = (gates,) if bias else None
        self.weights: list[tuple[int, ...] | None] = []
        for width in widths:
            self.weights += [(gates, width), (gates, hidden_size), vector, vector] * directions
        self._x, self._strides = tuple(shape), tuple(strides)
        self.cell, self._hidden = cell, hidden_size
        self._dtype, self._kind = dtype, DTYPES[dtype]
        # Each direction's activations of all rows, and then its cell states.
        self._saved = (directions, rows * (gates + hidden_size))
        # In bytes.
        size = dtype.itemsize
        self._row_bytes, self._state_bytes = hidden_size * size, batch * hidden_size * size
        self._activations_bytes, self._saved_bytes = rows * gates * size, self._saved[1] * size
        # The fields of the structures in lstm.h that are no address: sizes, then strides.
        self._sizes = [
            [(steps, batch, width, hidden_size, hidden_size, d, 0) for d in range(directions)]
            for width in widths
        ]
        self._output_strides = batch * features, features
        self._x_strides = [x_strides, *[self._output_strides] * (num_layers - 1)]
        self._grad_x_strides = [grad_x_strides, *[self._output_strides] * (num_layers - 1)]
        # Of a backward pass, which does not look at the biases.
        self._expected = (
            *(self._x, self.state, self.state),
            *[shape if k % 4 < 2 else None for k, shape in enumerate(self.weights)],
            *[self._output] * (0 if cell else num_layers),
            *[self._saved] * num_layers,
        )
        self._gates_strides = batch * gates, gates
        self._c_strides = batch * hidden_size, hidden_size

    def forward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor | None],
        save: bool,
    ) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
        """Compute the layers.

        Args:
            x: see the class, and so for what follows.
            h0: see the class.
            c0: see the class.
            weights: see the class.
            save: whether `backward` will be called.

        Returns:
            The output of each layer if `save`, else of the last, [T, B, D·H] (of a cell h_n); h_n
            and c_n, shaped as h0; and, if `save`, for each layer what `backward` is to be given.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        new, hidden = x.new_empty, self._hidden
        h_n, c_n = new(*self.state), new(*self.state)
        h_n_at, c_n_at, h0_at, c0_at = h_n.data_ptr(), c_n.data_ptr(), _address(h0), _address(c0)
        run, threads = load().forward, torch.get_num_threads()
        outputs, saved, state, k = [], [], 0, 0
        for sizes_by_direction, x_strides in zip(self._sizes, self._x_strides, strict=True):
            output = h_n if self.cell else new(*self._output)
            x_at, output_at, activations, c = x.data_ptr(), output.data_ptr(), 0, 0
            if save:
                buffer = new(*self._saved)
                saved.append(buffer)
                activations = buffer.data_ptr()
                c = activations + self._activations_bytes
            structures = b""
            for sizes in sizes_by_direction:
                structures += _PLAIN_FORWARD.pack(
                    *sizes,
                    0,
                    0,
                    0,
                    x_at,
                    *x_strides,
                    _address(weights[k]),
                    _address(weights[k + 2]),
                    _address(weights[k + 3]),
                    _address(weights[k + 1]),
                    0,
                    h0_at and h0_at + state,
                    hidden,
                    c0_at and c0_at + state,
                    hidden,
                    output_at,
                    *self._output_strides,
                    c,
                    *self._c_strides,
                    activations,
                    *self._gates_strides,
                    h_n_at + state,
                    hidden,
                    c_n_at + state,
                    hidden,
                )
                k, state, output_at = k + 4, state + self._state_bytes, output_at + self._row_bytes
                if save:
                    activations, c = activations + self._saved_bytes, c + self._saved_bytes
            status = run(structures, self.directions, self._kind, threads, launch._instruction_set)
            if status:
                _check(status, "forward")
            if not save:
                outputs.clear()
            outputs.append(output)
            x = output
        return outputs, h_n, c_n, saved

    def fits(self, *tensors: Tensor | None) -> bool:
        """Whether what was saved for `backward` is still what it was.

        It need not be: hooks on saved tensors bring back what they like, and a parameter may have
        been given other memory (`.data`).

        Args:
            *tensors: x, h0, c0, the weights, the outputs (not of a cell), and what was saved.
        """
        for tensor, shape in zip(tensors, self._expected, strict=True):
            if (
                tensor is not None
                and shape is not None
                and not (
                    tensor.shape == shape
                    and tensor.dtype is self._dtype
                    and tensor.is_cpu
                    and (tensor.is_contiguous() or tensor is tensors[0])
                    and not tensor.is_neg()
                    # Without memory are fakes, too, and other subclasses.
                    and tensor.data_ptr()
                )
            ):
                return False
        x = tensors[0]
        return x is not None and x.stride() == self._strides

    def backward(
        self,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Differentiate the layers.

        Args:
            grad_output: [T, B, D·H], of the last layer's output, with any strides, or None for
                zeros; a cell has none.
            grad_h_n: like h_n, with any strides, or None for zeros.
            grad_c_n: like c_n, likewise.
            x: see the class, and so for the next three.
            h0: see the class.
            c0: see the class.
            weights: see the class.
            outputs: as the forward pass returned them; of a cell none are needed.
            saved: as the forward pass returned it.
            needed: which gradients are wanted: of x, h0, c0 and each of the weights.

        Returns:
            Gradients of x, h0, c0 and the weights; None for those that are not wanted.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        new, hidden = x.new_empty, self._hidden
        of_x, of_h0, of_c0, *of_weights = needed
        each, lowest = 4 * self.directions, 0
        # Below the lowest weights that want a gradient nothing is differentiated.
        if not (of_x or of_h0 or of_c0):
            lowest = of_weights.index(True) // each
        grad_h0 = new(*self.state) if of_h0 else None
        grad_c0 = new(*self.state) if of_c0 else None
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        grad_c_n = None if grad_c_n is None else grad_c_n.contiguous()
        h0_at, c0_at, grad_h0_at, grad_c0_at = (
            _address(h0),
            _address(c0),
            _address(grad_h0),
            _address(grad_c0),
        )
        grad_h_n_at, grad_c_n_at = _address(grad_h_n), _address(grad_c_n)
        strides = self._output_strides
        if grad_output is not None and not grad_output.is_contiguous():
            grad_output = _rows(grad_output)
            strides = _time_and_batch(grad_output, False)
        grad_weights: list[Tensor | None] = [None] * len(weights)
        run, threads = load().backward, torch.get_num_threads()
        for layer in reversed(range(lowest, self.num_layers)):
            own_x, own_shape = (outputs[layer - 1], self._output) if layer else (x, self._x)
            x_at, output_at = own_x.data_ptr(), 0 if self.cell else outputs[layer].data_ptr()
            activations, grad_output_at = saved[layer].data_ptr(), _address(grad_output)
            want_weights = any(of_weights[each * layer : each * layer + each])
            grad_inputs: list[Tensor] = []
            structures = b""
            for d, sizes in enumerate(self._sizes[layer]):
                recurrence, row = layer * self.directions + d, d * self._row_bytes
                state, k = recurrence * self._state_bytes, 4 * recurrence
                grad_x_at, grad_weights_at = 0, _NO_WEIGHTS
                if of_x or layer > lowest:
                    grad_inputs.append(new(*own_shape))
                    grad_x_at = grad_inputs[d].data_ptr()
                if want_weights:
                    own = [shape and new(*shape) for shape in self.weights[k : k + 4]]
                    grad_weights[k : k + 4] = own
                    grad_weights_at = [_address(grad) for grad in own]
                structures += _PLAIN_BACKWARD.pack(
                    *sizes,
                    activations,
                    *self._gates_strides,
                    activations + self._activations_bytes,
                    *self._c_strides,
                    x_at,
                    *self._x_strides[layer],
                    output_at and output_at + row,
                    *self._output_strides,
                    _address(weights[k]),
                    _address(weights[k + 1]),
                    0,
                    h0_at and h0_at + state,
                    hidden,
                    c0_at and c0_at + state,
                    hidden,
                    grad_output_at and grad_output_at + row,
                    *strides,
                    0,
                    0,
                    0,
                    grad_h_n_at and grad_h_n_at + state,
                    hidden,
                    grad_c_n_at and grad_c_n_at + state,
                    hidden,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                    grad_x_at,
                    *self._grad_x_strides[layer],
                    *grad_weights_at,
                    0,
                    grad_h0_at and grad_h0_at + state,
                    hidden,
                    grad_c0_at and grad_c0_at + state,
                    hidden,
                )
                activations += self._saved_bytes
            status = run(structures, self.directions, self._kind, threads, launch._instruction_set)
            if status:
                _check(status, "backward")
            grad_output, strides = None, self._output_strides
            if grad_inputs:
                grad_output, *others = grad_inputs
                for other in others:
                    grad_output += other
        return [grad_output, grad_h0, grad_c0, *grad_weights]
