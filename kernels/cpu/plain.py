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
from .launch import _BACKWARD, _FORWARD, _MODIFIERS, DTYPES, _check, _rows, _time_and_batch
from .library import load

__all__ = ["PlainLayers"]

# LstmForward and LstmBackward with nothing modified: zeros.
_PLAIN_FORWARD, _PLAIN_BACKWARD = (
    struct.Struct(f"{fields.format}{_MODIFIERS.size}x") for fields in (_FORWARD, _BACKWARD)
)


def _at(tensor: Tensor | None, offset: int = 0) -> int:
    """Address of what is `offset` bytes into a tensor, or null."""
    return 0 if tensor is None else tensor.data_ptr() + offset


class PlainLayers:
    """Layers without projection, packing and modifiers, for contiguous tensors of known sizes.

    The tensors of its calls are

        x: [T, B, I], [B, T, I] with batch_first, or [B, I] for a cell;
        h0, c0: [L·D, B, H], or [B, H] for a cell; None for zeros;
        weights: four for each layer and direction, in one list: weight_ih [4H, I] (above the first
            layer [4H, D·H]), weight_hh [4H, H], bias_ih [4H] and bias_hh [4H], or None for these
            two,

    all contiguous, on the CPU and of one dtype. The callers have checked it: other tensors would be
    read or written beyond their ends.

    Args:
        shape: of x; no dimension is empty.
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
    """

    def __init__(
        self,
        shape: Sequence[int],
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
        x_strides = batch * inputs, inputs
        if batch_first:
            steps, batch = batch, steps
            x_strides = inputs, steps * inputs
        rows, gates, features = steps * batch, 4 * hidden_size, directions * hidden_size
        self.num_layers, self.directions = num_layers, directions
        self.state: tuple[int, ...] = (num_layers * directions, batch, hidden_size)
        self._output: tuple[int, ...] = (steps, batch, features)
        if cell:
            self.state = self._output = (batch, hidden_size)
        vector = (gates,) if bias else None
        self.weights: list[tuple[int, ...] | None] = []
        for width in (inputs, *[features] * (num_layers - 1)):
            self.weights += [(gates, width), (gates, hidden_size), vector, vector] * directions
        self._x, self._cell, self._hidden = tuple(shape), cell, hidden_size
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
            for width in (inputs, *[features] * (num_layers - 1))
        ]
        self._output_strides = batch * features, features
        self._x_strides = [x_strides, *[self._output_strides] * (num_layers - 1)]
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
            The output of each layer, [T, B, D·H] (of a cell h_n); h_n and c_n, shaped as h0; and,
            if `save`, for each layer what `backward` is to be given.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        new, hidden = x.new_empty, self._hidden
        h_n, c_n = new(*self.state), new(*self.state)
        run, threads = load().forward, torch.get_num_threads()
        outputs, saved, state, k = [], [], 0, 0
        for sizes_by_direction, x_strides in zip(self._sizes, self._x_strides, strict=True):
            output = h_n if self._cell else new(*self._output)
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
                    _at(weights[k]),
                    _at(weights[k + 2]),
                    _at(weights[k + 3]),
                    _at(weights[k + 1]),
                    0,
                    _at(h0, state),
                    hidden,
                    _at(c0, state),
                    hidden,
                    output_at,
                    *self._output_strides,
                    c,
                    *self._c_strides,
                    activations,
                    *self._gates_strides,
                    _at(h_n, state),
                    hidden,
                    _at(c_n, state),
                    hidden,
                )
                k, state, output_at = k + 4, state + self._state_bytes, output_at + self._row_bytes
                if save:
                    activations, c = activations + self._saved_bytes, c + self._saved_bytes
            status = run(structures, self.directions, self._kind, threads, launch._instruction_set)
            if status:
                _check(status, "forward")
            outputs.append(output)
            x = output
        return outputs, h_n, c_n, saved

    def fits(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> bool:
        """Whether tensors that were saved for `backward` are still what they were.

        They need not be: hooks on saved tensors bring back what they like, and a parameter may have
        been given other memory (`.data`).
        """
        shapes = [self._x, self.state, self.state, *self.weights]
        shapes += [self._output] * self.num_layers + [self._saved] * self.num_layers
        for tensor, shape in zip((x, h0, c0, *weights, *outputs, *saved), shapes, strict=True):
            if tensor is not None and not (
                tensor.shape == shape
                and tensor.dtype is self._dtype
                and tensor.is_cpu
                and tensor.is_contiguous()
            ):
                return False
        return True

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
            outputs: as the forward pass returned them.
            saved: likewise.
            needed: which gradients are wanted: of x, h0, c0 and each of the weights.

        Returns:
            Gradients of x, h0, c0 and the weights; None for those that are not wanted.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        new, hidden = x.new_empty, self._hidden
        of_x, of_h0, of_c0, *of_weights = needed
        each = 4 * self.directions
        want_weights = [any(of_weights[k : k + each]) for k in range(0, len(of_weights), each)]
        lowest = 0 if of_x or of_h0 or of_c0 else want_weights.index(True)
        grad_h0 = new(*self.state) if of_h0 else None
        grad_c0 = new(*self.state) if of_c0 else None
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        grad_c_n = None if grad_c_n is None else grad_c_n.contiguous()
        strides = self._output_strides
        if grad_output is not None and not grad_output.is_contiguous():
            grad_output = _rows(grad_output)
            strides = _time_and_batch(grad_output, False)
        grad_weights: list[Tensor | None] = [None] * len(weights)
        run, threads = load().backward, torch.get_num_threads()
        for layer in reversed(range(lowest, self.num_layers)):
            own_x = outputs[layer - 1] if layer else x
            x_at, x_strides = own_x.data_ptr(), self._x_strides[layer]
            grad_inputs: list[Tensor] = []
            structures = b""
            for d, sizes in enumerate(self._sizes[layer]):
                recurrence = layer * self.directions + d
                state, row = recurrence * self._state_bytes, d * self._row_bytes
                k = 4 * recurrence
                if want_weights[layer]:
                    grad_weights[k : k + 4] = [
                        None if shape is None else new(*shape) for shape in self.weights[k : k + 4]
                    ]
                grad_x_at = 0
                if of_x or layer > lowest:
                    grad_inputs.append(new(*own_x.shape))
                    grad_x_at = grad_inputs[d].data_ptr()
                activations = saved[layer].data_ptr() + d * self._saved_bytes
                grad_ih, grad_hh, grad_bias_ih, grad_bias_hh = grad_weights[k : k + 4]
                structures += _PLAIN_BACKWARD.pack(
                    *sizes,
                    activations,
                    *self._gates_strides,
                    activations + self._activations_bytes,
                    *self._c_strides,
                    x_at,
                    *x_strides,
                    outputs[layer].data_ptr() + row,
                    *self._output_strides,
                    _at(weights[k]),
                    _at(weights[k + 1]),
                    0,
                    _at(h0, state),
                    hidden,
                    _at(c0, state),
                    hidden,
                    _at(grad_output, row),
                    *strides,
                    0,
                    0,
                    0,
                    _at(grad_h_n, state),
                    hidden,
                    _at(grad_c_n, state),
                    hidden,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                    grad_x_at,
                    *x_strides,
                    _at(grad_ih),
                    _at(grad_hh),
                    _at(grad_bias_ih),
                    _at(grad_bias_hh),
                    0,
                    _at(grad_h0, state),
                    hidden,
                    _at(grad_c0, state),
                    hidden,
                )
            status = run(structures, self.directions, self._kind, threads, launch._instruction_set)
            if status:
                _check(status, "backward")
            grad_output, strides = None, self._output_strides
            if grad_inputs:
                grad_output, *others = grad_inputs
                for other in others:
                    grad_output += other
        return [grad_output, grad_h0, grad_c0, *grad_weights]
