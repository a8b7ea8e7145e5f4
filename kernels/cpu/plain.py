"""Calls the native kernels for plain layers, or a cell, with nothing but addresses.

For small models the microseconds in which `launch.layer_forward` looks at its tensors are more than
the kernel's. `PlainLayers` are made once for tensors of some sizes, and do not look at them.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `L` layers, `D`
directions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import starmap
from operator import itemgetter
from typing import Any, NamedTuple

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

# LstmPlain in lstm.h, eight bytes a field: what is known of all calls, and what a call adds, before
# its addresses.
_LAYERS = struct.Struct("=13q")
_OF_A_CALL = 5

# What a forward pass has for the strides of grad_output and the lowest layer to differentiate.
_NO_GRADIENTS = (0, 0, 0)

# Which gradients are wanted: so many answers are remembered for tensors of some sizes.
_PATTERNS = 64

_address_of = Tensor.data_ptr

# Shape, strides and dtype of a tensor.
_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class _Allocation(NamedTuple):
    """The tensors that a pass allocates.

    Attributes:
        forms: what they are.
        in_turn: puts their addresses, to which a zero is added, in the order of lstm.h.
    """

    forms: list[_Form]
    in_turn: Callable[[list[int]], tuple[int, ...]]


class _Gradients(NamedTuple):
    """The tensors that a backward pass allocates, gradients first.

    Attributes:
        lowest: the lowest layer of which a gradient is wanted.
        allocation: the tensors.
        of_tensors: puts them, to which None is added, in the order of the call's tensors.
    """

    lowest: int
    allocation: _Allocation
    of_tensors: Callable[[list[Any]], tuple[Tensor | None, ...]]


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
        self.cell, self._dtype, self._strides = cell, dtype, tuple(strides)
        self.state: tuple[int, ...] = (num_layers * directions, batch, hidden_size)
        output: tuple[int, ...] = (steps, batch, features)
        if cell:
            self.state = output = (batch, hidden_size)
        vectors = [(gates,)] * 2 if bias else []
        weights: list[tuple[int, ...]] = []
        for width in (inputs, *[features] * (num_layers - 1)):
            weights += [(gates, width), (gates, hidden_size), *vectors] * directions
        self.first_weight, self.each = 3 if states else 1, 4 if bias else 2
        self.shapes = (tuple(shape), *[self.state] * (self.first_weight - 1), *weights)
        # Each direction's activations of all rows, and then its cell states.
        saved = directions, rows * (gates + hidden_size)
        # Of what is kept for a backward pass, which does not look at the biases.
        self._kept = (
            *[shape if len(shape) > 1 else None for shape in self.shapes],
            *[saved] * num_layers,
            *[output] * (0 if cell else num_layers),
        )
        sizes = num_layers, directions, steps, batch, inputs, hidden_size
        self._layers = _LAYERS.pack(
            DTYPES[dtype], *sizes, bias, states, *x_strides, *grad_x_strides
        )
        self._output_form, self._output_strides = self._form(output), (batch * features, features)
        self._allocate_forward(self._form(self.state), self._form(saved))
        self._gradients: dict[tuple[bool, ...], _Gradients] = {}
        # A cell keeps no output, and of one step the kernel needs none.
        self._no_output = (0,) if cell else ()
        given, between = 3, 2 * directions + 1
        addresses = len(self.shapes) + 2 * num_layers
        self._pack_forward = _packer(addresses + 2)
        self._pack_backward = _packer(addresses + given + len(self.shapes) + between)

    def _form(self, shape: tuple[int, ...]) -> _Form:
        strides = [1]
        for size in shape[:0:-1]:
            strides.insert(0, strides[0] * size)
        return shape, tuple(strides), self._dtype

    def _allocate_forward(self, state: _Form, saved: _Form) -> None:
        """Find out what a forward pass allocates if it saves something, and if it does not."""
        layers = self.num_layers
        none_saved = [-1] * layers
        if self.cell:
            # The output is h_n.
            self._saving = _Allocation([state, state, saved], itemgetter(0, 1, 2, 0))
            self._passing = _Allocation([state, state], itemgetter(0, 1, *none_saved, 0))
            return
        forms = [state, state, *[saved] * layers, *[self._output_form] * layers]
        self._saving = _Allocation(forms, itemgetter(*range(len(forms))))
        # Two outputs take turns; that of the last layer is the last tensor.
        forms = [state, state, *[self._output_form] * min(layers, 2)]
        outputs = [len(forms) - 1 - k % 2 for k in reversed(range(layers))]
        self._passing = _Allocation(forms, itemgetter(0, 1, *none_saved, *outputs))

    @staticmethod
    def addresses(tensors: Sequence[Tensor]) -> list[int]:
        """Where tensors lie.

        Raises:
            RuntimeError: if the memory of one is gone.
        """
        addresses = list(map(_address_of, tensors))
        if min(addresses) < _LOWEST:
            return [_address(tensor) for tensor in tensors]
        return addresses

    def forward(self, addresses: Sequence[int], save: bool) -> list[Tensor]:
        """Compute the layers.

        Args:
            addresses: of the call's tensors.
            save: whether `backward` will be called.

        Returns:
            h_n and c_n, shaped as h0; then, if `save`, for each layer what `backward` needs, and
            the output of each layer, [T, B, D·H], else the last layer's as the last tensor. Of a
            cell there is no output: it is h_n.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        forms, in_turn = self._saving if save else self._passing
        results = list(starmap(_empty, forms))
        of_call = self._pack_forward(
            *_NO_GRADIENTS,
            torch.get_num_threads(),
            launch._instruction_set,
            *addresses,
            *in_turn([*map(_address_of, results), 0]),
        )
        status = load().plain_forward(self._layers + of_call)
        if status:
            _check(status, "forward")
        return results

    def fits(self, *tensors: Tensor) -> bool:
        """Whether what was kept for `backward` is still what it was.

        It need not be: hooks on saved tensors bring back what they like, and a parameter may have
        been given other memory (`.data`).

        Args:
            *tensors: those of the call, and what `forward` returned behind h_n and c_n.
        """
        for k, (tensor, shape) in enumerate(zip(tensors, self._kept, strict=True)):
            if shape is not None and not (
                tensor.shape == shape
                and tensor.dtype is self._dtype
                and tensor.is_cpu
                and (k == 0 or tensor.is_contiguous())
                and not tensor.is_neg()
                # Without memory are fakes, too, and other subclasses.
                and tensor.data_ptr()
            ):
                return False
        return tensors[0].stride() == self._strides

    def backward(
        self,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        addresses: Sequence[int],
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Differentiate the layers.

        Args:
            grad_output: [T, B, D·H], of the last layer's output, with any strides, or None for
                zeros; a cell has none.
            grad_h_n: like h_n, with any strides, or None for zeros.
            grad_c_n: like c_n, likewise.
            addresses: of the call's tensors, and of what `forward` returned behind h_n and c_n.
            needed: which gradients are wanted, of the call's tensors.

        Returns:
            Gradients of the call's tensors; None for those that are not wanted, unless they are of
            one layer with some that are.

        Raises:
            LibraryUnavailableError: if there is no native library.
            MemoryError: if there is no memory for the kernel's scratch.
        """
        lowest, (forms, in_turn), of_tensors = self._gradients.get(
            needed
        ) or self._allocate_backward(needed)
        results: list[Any] = list(starmap(_empty, forms))
        strides = self._output_strides
        if grad_output is not None and not grad_output.is_contiguous():
            grad_output = _rows(grad_output)
            strides = _time_and_batch(grad_output, False)
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        grad_c_n = None if grad_c_n is None else grad_c_n.contiguous()
        of_call = self._pack_backward(
            *strides,
            lowest,
            torch.get_num_threads(),
            launch._instruction_set,
            *addresses,
            *self._no_output,
            _address(grad_output),
            _address(grad_h_n),
            _address(grad_c_n),
            *in_turn([*map(_address_of, results), 0]),
        )
        status = load().plain_backward(self._layers + of_call)
        if status:
            _check(status, "backward")
        results.append(None)
        return of_tensors(results)

    def _allocate_backward(self, needed: tuple[bool, ...]) -> _Gradients:
        """Find out, and remember, what a backward pass allocates."""
        first, of_layer = self.first_weight, self.each * self.directions
        wanted = list(needed[:first])
        for own in range(first, len(needed), of_layer):
            wanted += [True in needed[own : own + of_layer]] * of_layer
        lowest = 0 if True in wanted[:first] else (wanted.index(True) - first) // of_layer
        # In the order of lstm.h: gradients, then scratch for those of the inputs of layers above
        # the lowest one, of which two take turns, and for another gradient of x.
        turns = min(self.num_layers - 1 - lowest, 2) * self.directions
        two = self.directions > 1 and needed[0]
        forms, places = [], []
        for form, want in (
            *zip(map(self._form, self.shapes), wanted, strict=True),
            *[(self._output_form, k < turns) for k in range(2 * self.directions)],
            (self._form(self.shapes[0]), two),
        ):
            places.append(len(forms) if want else -1)
            if want:
                forms.append(form)
        gradients = _Gradients(
            lowest, _Allocation(forms, itemgetter(*places)), itemgetter(*places[: len(needed)])
        )
        if len(self._gradients) >= _PATTERNS:
            self._gradients.clear()
        self._gradients[needed] = gradients
        return gradients


def _packer(addresses: int) -> Callable[..., bytes]:
    return struct.Struct(f"={_OF_A_CALL + addresses}q").pack
