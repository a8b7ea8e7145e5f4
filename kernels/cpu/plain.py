"""Calls the native kernels for one direction of one layer, or a cell, with nothing but addresses.

For small models the microseconds in which `launch.layer_forward` looks at its tensors are more than
the kernel's. A `PlainLayer` is made once for tensors of some sizes, and does not look at them.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .launch import _BACKWARD, _FORWARD, _MODIFIERS, DTYPES, _check, _rows, _time_and_batch
from .library import load

__all__ = ["PlainLayer"]

# LstmForward and LstmBackward with nothing modified: zeros.
_PLAIN_FORWARD, _PLAIN_BACKWARD = (
    struct.Struct(f"{fields.format}{_MODIFIERS.size}x") for fields in (_FORWARD, _BACKWARD)
)


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class PlainLayer:
    """A layer without projection, packing and modifiers, for contiguous tensors of known sizes.

    The tensors of its calls are

        x: [T, B, I], [B, T, I] with batch_first, or [B, I] for a cell;
        h0, c0: [1, B, H], or [B, H] for a cell; None for zeros;
        weight_ih: [4H, I];
        weight_hh: [4H, H];
        bias_ih, bias_hh: [4H], or None,

    all contiguous, on the CPU and of one dtype. The callers have checked it: other tensors would be
    read or written beyond their ends.

    Args:
        shape: of x; no dimension is empty.
        hidden_size: H.
        bias: whether there are biases.
        batch_first: whether x is [B, T, I].
        dtype: of all tensors.

    Attributes:
        state: shape of h0, c0, h_n and c_n.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden_size: int,
        bias: bool,
        batch_first: bool,
        dtype: torch.dtype,
    ) -> None:
        *leading, inputs = shape
        cell = len(leading) == 1
        if batch_first and not cell:
            batch, steps = leading
            self._x_strides = inputs, steps * inputs
        else:
            steps, batch = (1, *leading)[-2:]
            self._x_strides = batch * inputs, inputs
        rows, gates = steps * batch, 4 * hidden_size
        self.state = (batch, hidden_size) if cell else (1, batch, hidden_size)
        self._x = tuple(shape)
        self._output = self.state if cell else (steps, batch, hidden_size)
        self._weight_ih, self._weight_hh = (gates, inputs), (gates, hidden_size)
        self._gates, self._cell, self._bias = gates, cell, bias
        self._dtype, self._kind = dtype, DTYPES[dtype]
        # Activations of all rows, and then their cell states.
        self._saved = (rows * (gates + hidden_size),)
        self._bytes_of_activations = rows * gates * dtype.itemsize
        # The fields of the structures in lstm.h that are no address: sizes, then strides.
        self._sizes = steps, batch, inputs, hidden_size, hidden_size, 0, 0
        self._h_strides = batch * hidden_size, hidden_size
        self._gates_strides = batch * gates, gates

    def forward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Compute the layer.

        Args:
            x: see the class, and so for what follows.
            h0: see the class.
            c0: see the class.
            weight_ih: see the class.
            weight_hh: see the class.
            bias_ih: see the class.
            bias_hh: see the class.
            save: whether `backward` will be called.

        Returns:
            The output [T, B, H], which of a cell is h_n; h_n and c_n, shaped as h0; and what
            `backward` is to be given, or None.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        new, state = x.new_empty, self.state
        h_n, c_n = new(*state), new(*state)
        output = h_n if self._cell else new(*self._output)
        saved, activations, c = None, 0, 0
        if save:
            saved = new(*self._saved)
            activations = saved.data_ptr()
            c = activations + self._bytes_of_activations
        hidden = state[-1]
        structure = _PLAIN_FORWARD.pack(
            *self._sizes,
            0,
            0,
            0,
            x.data_ptr(),
            *self._x_strides,
            weight_ih.data_ptr(),
            _at(bias_ih),
            _at(bias_hh),
            weight_hh.data_ptr(),
            0,
            _at(h0),
            hidden,
            _at(c0),
            hidden,
            output.data_ptr(),
            *self._h_strides,
            c,
            *self._h_strides,
            activations,
            *self._gates_strides,
            h_n.data_ptr(),
            hidden,
            c_n.data_ptr(),
            hidden,
        )
        status = load().forward(
            structure,
            1,
            self._kind,
            torch.get_num_threads(),
            launch._instruction_set,
        )
        if status:
            _check(status, "forward")
        return output, h_n, c_n, saved

    def fits(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        output: Tensor,
        saved: Tensor,
    ) -> bool:
        """Whether tensors saved for `backward` are still what they were.

        They need not be: hooks on saved tensors bring back what they like, and a parameter may have
        been given other memory (`.data`).
        """
        for tensor, shape in (
            (x, self._x),
            (h0, self.state),
            (c0, self.state),
            (weight_ih, self._weight_ih),
            (weight_hh, self._weight_hh),
            (output, self._output),
            (saved, self._saved),
        ):
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
        weight_ih: Tensor,
        weight_hh: Tensor,
        output: Tensor,
        saved: Tensor,
        want_input: bool,
        want_states: bool,
        want_weights: bool,
    ) -> tuple[Tensor | None, ...]:
        """Differentiate the layer.

        Args:
            grad_output: [T, B, H] with any strides, or None for zeros; a cell has none.
            grad_h_n: like h_n, with any strides, or None for zeros.
            grad_c_n: like c_n, likewise.
            x: see the class, and so for the next four.
            h0: see the class.
            c0: see the class.
            weight_ih: see the class.
            weight_hh: see the class.
            output: as the forward pass returned it.
            saved: likewise.
            want_input: whether a gradient of x is wanted.
            want_states: whether gradients of h0 and c0 are wanted.
            want_weights: whether gradients of the weights are wanted.

        Returns:
            Gradients of x, h0, c0, weight_ih, weight_hh, bias_ih and bias_hh, None for those that
            are not wanted or not there.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        new, state = x.new_empty, self.state
        grad_x = new(*self._x) if want_input else None
        grad_h0 = grad_c0 = None
        if want_states:
            grad_h0, grad_c0 = new(*state), new(*state)
        grad_ih = grad_hh = grad_bias_ih = grad_bias_hh = None
        if want_weights:
            grad_ih, grad_hh = new(*self._weight_ih), new(*self._weight_hh)
            if self._bias:
                grad_bias_ih, grad_bias_hh = new(self._gates), new(self._gates)
        grad_output_strides = self._h_strides
        if grad_output is not None and not grad_output.is_contiguous():
            grad_output = _rows(grad_output)
            grad_output_strides = _time_and_batch(grad_output, False)
        if grad_h_n is not None:
            grad_h_n = grad_h_n.contiguous()
        if grad_c_n is not None:
            grad_c_n = grad_c_n.contiguous()
        hidden = state[-1]
        activations = saved.data_ptr()
        structure = _PLAIN_BACKWARD.pack(
            *self._sizes,
            activations,
            *self._gates_strides,
            activations + self._bytes_of_activations,
            *self._h_strides,
            x.data_ptr(),
            *self._x_strides,
            output.data_ptr(),
            *self._h_strides,
            weight_ih.data_ptr(),
            weight_hh.data_ptr(),
            0,
            _at(h0),
            hidden,
            _at(c0),
            hidden,
            _at(grad_output),
            *grad_output_strides,
            0,
            0,
            0,
            _at(grad_h_n),
            hidden,
            _at(grad_c_n),
            hidden,
            0,
            0,
            0,
            0,
            0,
            0,
            _at(grad_x),
            *self._x_strides,
            _at(grad_ih),
            _at(grad_hh),
            _at(grad_bias_ih),
            _at(grad_bias_hh),
            0,
            _at(grad_h0),
            hidden,
            _at(grad_c0),
            hidden,
        )
        status = load().backward(
            structure,
            1,
            self._kind,
            torch.get_num_threads(),
            launch._instruction_set,
        )
        if status:
            _check(status, "backward")
        return grad_x, grad_h0, grad_c0, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh
