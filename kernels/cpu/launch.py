"""Calls the native kernels with tensors: shapes in, pointers out.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of h (H,
or the size of the projection), `D` directions, `N` rows of a packed batch. Gate order i, f, g, o.

The callers have checked shapes, dtypes and devices: a tensor that is not shaped as the docstrings
say is read or written beyond its end.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .library import load

__all__ = [
    "DTYPES",
    "NO_MODIFIERS",
    "LayerForward",
    "LayerGradients",
    "Modifiers",
    "Weights",
    "layer_backward",
    "layer_forward",
    "lstm_backward",
    "lstm_forward",
    "multiplies_bfloat16",
]

# LstmDtype in lstm.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

# LstmForward and LstmBackward in lstm.h, eight bytes a field, and the LstmModifiers at their ends.
_FORWARD = struct.Struct("=35q")
_BACKWARD = struct.Struct("=54q")
_MODIFIERS = struct.Struct("=12qd")
_UNMODIFIED = bytes(_MODIFIERS.size)

# An address below may be an offset into a storage without memory, which starts at null.
_LOWEST = 1 << 32

# LstmStatus in lstm.h.
_OUT_OF_MEMORY = 1

# An LstmSequence and an LstmState that are not given.
_NO_SEQUENCE = (0, 0, 0)
_NO_STATE = (0, 0)

# An index into `Library.instruction_sets`: the best one. Tests run the others.
_instruction_set = 0

# Weights of one direction: ih [4H, I], hh [4H, P], bias_ih [4H] or None, bias_hh [4H] or None,
# hr [P, H] or None.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


# What changes the recurrence of one direction, each None where it is off; kernels/cpu/forward.h has
# the equations. By position:
#   lengths: [B] int64, the steps of each sequence, not with batch_sizes; outputs are zero behind.
#   resets: [T, B] or packed rows [N], bool, where a step starts from zeros.
#   recurrent_mask: [B, P], factors of h where it enters W_hh.
#   zoneout_h: [T, B, P] or [N, P], the part of h that stays as it was.
#   zoneout_c: [T, B, H] or [N, H], likewise of c.
#   cell_clip: the largest |c|, above zero.
Modifiers = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float | None
]
NO_MODIFIERS: Modifiers = (None,) * 6


def multiplies_bfloat16() -> bool:
    """Whether `layer_forward` computes plain layers in bfloat16 here.

    That is: without `save`, `save_cells`, projection, recurrent mask and zoneout. Nothing else
    here takes bfloat16.

    Raises:
        LibraryUnavailableError: if there is no native library.
    """
    return load().multiply_bfloat16[_instruction_set]


class LayerForward(NamedTuple):
    """What a layer computes.

    Attributes:
        output: [T, B, D·P], whatever the input's layout, or [N, D·P]; for a cell it is h_n.
        h_n: like h0.
        c_n: like c0.
        c: [T, B, D·H] or [N, D·H], for a cell [B, H]; None unless saved.
        activations: [D·T·B, 4H] or [D·N, 4H], σ(a_i), σ(a_f), tanh(a_g), σ(a_o); likewise.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    c: Tensor | None
    activations: Tensor | None


class LayerGradients(NamedTuple):
    """Gradients of a layer.

    Attributes:
        input: like the input, or None if it is not wanted.
        h0: like h0.
        c0: like c0.
        weights: for each direction, like its weights, or None if they are not wanted.
    """

    input: Tensor | None
    h0: Tensor
    c0: Tensor
    weights: list[tuple[Tensor | None, ...]]


def _with_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, whose memory holds its numbers."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with its last dimension contiguous."""
    tensor = _with_memory(tensor)
    if tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy of it, contiguous."""
    return None if tensor is None else _with_memory(tensor).contiguous()


def _rows_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _rows(tensor)


def _sequence(tensor: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """Address and strides of [T, B, F] or packed rows [N, F]: an LstmSequence."""
    if tensor is None or not tensor.numel():
        return _NO_SEQUENCE
    if packed:
        return _address(tensor), 0, tensor.stride(0)
    return _address(tensor), tensor.stride(0), tensor.stride(1)


def _state(tensor: Tensor | None) -> tuple[int, int]:
    """Address and stride of [B, F]: an LstmState."""
    return _NO_STATE if tensor is None else (_address(tensor), tensor.stride(0))


def _address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers are, or null.

    Raises:
        RuntimeError: if its memory is gone.
    """
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if address < _LOWEST and tensor.numel() and not tensor.untyped_storage().data_ptr():
        raise RuntimeError(
            f"Expected tensors with memory, got one of {list(tensor.shape)} whose storage is empty"
        )
    return address


def _modifiers(
    modifiers: Modifiers, packed: bool, dtype: torch.dtype
) -> tuple[bytes, tuple[Tensor, ...]]:
    """An LstmModifiers, and the tensors that must live as long as it does."""
    lengths, resets, mask, zoneout_h, zoneout_c, clip = modifiers
    if lengths is resets is mask is zoneout_h is zoneout_c is clip is None:
        return _UNMODIFIED, ()
    if lengths is not None:
        lengths = lengths.to("cpu", torch.int64).contiguous()
    if resets is not None:
        resets = resets.view(torch.uint8)
    # A state's dtype may be wider than that of the gates.
    mask, zoneout_h, zoneout_c = (
        None if tensor is None else _rows(tensor.to(dtype))
        for tensor in (mask, zoneout_h, zoneout_c)
    )
    alive = (lengths, resets, mask, zoneout_h, zoneout_c)
    structure = _MODIFIERS.pack(
        _address(lengths),
        *_sequence(resets, packed),
        *_state(mask),
        *_sequence(zoneout_h, packed),
        *_sequence(zoneout_c, packed),
        clip or 0.0,
    )
    return structure, tuple(tensor for tensor in alive if tensor is not None)


def _check(status: int, direction: str) -> None:
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"the native {direction} kernel found no memory for its scratch")
    if status:
        raise RuntimeError(f"the native {direction} kernel refused its arguments ({status})")


def _forward_structure(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    h: Tensor,
    c: Tensor,
    activations: Tensor,
    h_n: Tensor,
    c_n: Tensor,
) -> bytes:
    """An LstmForward of a recurrence from its gates, up to its modifiers."""
    packed = batch_sizes is not None
    return _FORWARD.pack(
        gates.shape[0] if batch_sizes is None else len(batch_sizes),
        h0.shape[0],
        0,
        c0.shape[1],
        weight_hh.shape[1],
        reverse,
        _address(batch_sizes),
        *_sequence(gates, packed),
        *_NO_SEQUENCE,
        0,
        0,
        0,
        _address(weight_hh),
        _address(weight_hr),
        *_state(h0),
        *_state(c0),
        *_sequence(h, packed),
        *_sequence(c, packed),
        *_sequence(activations, packed),
        *_state(h_n),
        *_state(c_n),
    )


def _backward_structure(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    activations: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    grad_gates: Tensor,
    whole: Tensor | None,
    grad_h0: Tensor,
    grad_c0: Tensor,
) -> bytes:
    """An LstmBackward of such a recurrence, up to its modifiers."""
    packed = batch_sizes is not None
    return _BACKWARD.pack(
        activations.shape[0] if batch_sizes is None else len(batch_sizes),
        c0.shape[0],
        0,
        c0.shape[1],
        weight_hh.shape[1],
        reverse,
        _address(batch_sizes),
        *_sequence(activations, packed),
        *_sequence(c, packed),
        *_NO_SEQUENCE,
        *_NO_SEQUENCE,
        0,
        _address(weight_hh),
        _address(weight_hr),
        *_NO_STATE,
        *_state(c0),
        *_sequence(grad_h, packed),
        *_sequence(grad_c, packed),
        *_state(grad_h_n),
        *_state(grad_c_n),
        *_sequence(grad_gates, packed),
        *_sequence(whole, packed),
        *_NO_SEQUENCE,
        0,
        0,
        0,
        0,
        0,
        *_state(grad_h0),
        *_state(grad_c0),
    )


def lstm_forward(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
    save_activations: bool,
    save_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute one recurrence from its gates.

    Args:
        gates: [T, B, 4H] or packed rows [N, 4H], x·W_ihᵀ + b_ih + b_hh.
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: what changes the recurrence.
        reverse: whether time runs from T-1 to 0, with lengths from each sequence's last step.
        save_activations: whether the activated gates are wanted.
        save_cells: whether the cell states are wanted.

    Returns:
        h, c, activations, h_n and c_n; c and activations are empty where not wanted.

    Raises:
        LibraryUnavailableError: if there is no native library.
        MemoryError: if there is no memory for the kernel's scratch.
    """
    packed = batch_sizes is not None
    hidden, features, batch = gates.shape[-1] // 4, weight_hh.shape[1], h0.shape[0]
    leading, dtype = gates.shape[:-1], gates.dtype
    gates, h0, c0 = _rows(gates), _rows(h0), _rows(c0)
    recurrent, weight_hr, batch_sizes = _dense(weight_hh), _dense(weight_hr), _dense(batch_sizes)
    new = gates.new_empty
    h = new((*leading, features))
    c = new((*leading, hidden) if save_cells else (0,))
    activations = new((*leading, 4 * hidden) if save_activations else (0,))
    h_n = new((batch, features))
    c_n = new((batch, hidden))
    if batch:
        tail, _alive = _modifiers(modifiers, packed, dtype)
        outputs = (h, c, activations, h_n, c_n)
        structure = _forward_structure(
            gates, recurrent, h0, c0, weight_hr, batch_sizes, reverse, *outputs
        )
        run, threads = load().forward, torch.get_num_threads()
        _check(run(structure + tail, 1, DTYPES[dtype], threads, _instruction_set), "forward")
    return h, c, activations, h_n, c_n


def lstm_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    activations: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Differentiate one recurrence.

    Args:
        grad_h: like h, or None for zeros; so for the other gradients.
        grad_c: like c.
        grad_h_n: [B, P].
        grad_c_n: [B, H].
        activations: as `lstm_forward` returned them.
        c: likewise.
        weight_hh: [4H, P], as in the forward pass, and so for what follows.
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] int64 on the CPU, or None.
        modifiers: as in the forward pass; nothing is differentiated by them.
        reverse: whether time ran from T-1 to 0.

    Returns:
        Gradients of gates, h0 and c0, and the whole δh (of h before zoneout) where there is a
        projection, else None.

    Raises:
        LibraryUnavailableError: if there is no native library.
        MemoryError: if there is no memory for the kernel's scratch.
    """
    packed = batch_sizes is not None
    (batch, hidden), features, dtype = c0.shape, weight_hh.shape[1], activations.dtype
    activations, c, c0 = _rows(activations), _rows(c), _rows(c0)
    recurrent, weight_hr, batch_sizes = _dense(weight_hh), _dense(weight_hr), _dense(batch_sizes)
    grad_h, grad_c = _rows_or_none(grad_h), _rows_or_none(grad_c)
    grad_h_n, grad_c_n = _rows_or_none(grad_h_n), _rows_or_none(grad_c_n)
    new = activations.new_empty
    grad_gates = new(activations.shape)
    whole = None
    if weight_hr is not None:
        whole = new((*activations.shape[:-1], features))
    grad_h0 = new((batch, features))
    grad_c0 = new((batch, hidden))
    if batch:
        tail, _alive = _modifiers(modifiers, packed, dtype)
        grads, saved = (grad_h, grad_c, grad_h_n, grad_c_n), (activations, c)
        outputs = (grad_gates, whole, grad_h0, grad_c0)
        structure = _backward_structure(
            *grads, *saved, recurrent, c0, weight_hr, batch_sizes, reverse, *outputs
        )
        run, threads = load().backward, torch.get_num_threads()
        _check(run(structure + tail, 1, DTYPES[dtype], threads, _instruction_set), "backward")
    return grad_gates, grad_h0, grad_c0, whole


def _time_and_batch(tensor: Tensor, batch_first: bool) -> tuple[int, int]:
    """Strides of time and batch of [T, B, F], [B, T, F] with batch_first, or [N, F] and [B, F]."""
    strides = tensor.stride()
    if len(strides) == 2:
        return 0, strides[0]
    return (strides[1], strides[0]) if batch_first else (strides[0], strides[1])


def _steps_and_rows(
    input: Tensor, batch: int, batch_sizes: Tensor | None, batch_first: bool
) -> tuple[int, int]:
    """T, and the rows of all steps."""
    if batch_sizes is not None:
        return batch_sizes.shape[0], input.shape[0]
    shape = input.shape
    steps = 1 if len(shape) == 2 else shape[1] if batch_first else shape[0]
    return steps, steps * batch


# By position and with pointer arithmetic from here on: for small models the microseconds of a
# tensor's view are more than the kernel's.


def layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None,
    batch_first: bool,
    modifiers: Sequence[Modifiers],
    save: bool,
    save_cells: bool,
) -> LayerForward:
    """Compute one layer in all its directions, side by side where there are threads for it.

    Args:
        x: [T, B, I], [B, T, I] with batch_first, or packed rows [N, I]; [B, I] for a cell.
        h0: [D, B, P]; [B, P] for a cell.
        c0: [D, B, H]; [B, H] for a cell.
        weights: one for each of the D directions; the second runs backwards in time.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        batch_first: how the input is laid out; packed rows are neither.
        modifiers: one for each direction, time first whatever the input's layout.
        save: whether `layer_backward` will be called.
        save_cells: whether the cell states are wanted.

    Raises:
        LibraryUnavailableError: if there is no native library.
        MemoryError: if there is no memory for the kernel's scratch.
    """
    dtype, directions = x.dtype, len(weights)
    x, h0, c0 = _rows(x), _rows(h0), _rows(c0)
    *_, batch, features = state_shape = h0.shape
    inputs, hidden = x.shape[-1], c0.shape[-1]
    packed = batch_sizes is not None
    steps, rows = _steps_and_rows(x, batch, batch_sizes, batch_first)
    new = x.new_empty
    h_n, c_n = new(*state_shape), new(*c0.shape)
    c = activations = None
    if save:
        activations = new(directions * rows, 4 * hidden)
    if len(state_shape) == 2:
        output = h_n
        c = new(*c0.shape) if save else None
    else:
        leading = (rows,) if packed else (steps, batch)
        output = new(*leading, directions * features)
        if save or save_cells:
            c = new(*leading, directions * hidden)
    if not batch:
        return LayerForward(output, h_n, c_n, c, activations)
    size = dtype.itemsize
    x_address, x_strides = _address(x), _time_and_batch(x, batch_first)
    out_address, out_strides = _address(output), _time_and_batch(output, False)
    h0_stride, c0_stride = h0.stride()[-2], c0.stride()[-2]
    h0_step = c0_step = 0
    if directions > 1:
        h0_step, c0_step = h0.stride(0) * size, c0.stride(0) * size
    h0_address, c0_address = _address(h0), _address(c0)
    h_n_address, c_n_address = h_n.data_ptr(), c_n.data_ptr()
    c_address, c_strides = (0, (0, 0)) if c is None else (_address(c), _time_and_batch(c, False))
    activations_address = 0 if activations is None else _address(activations)
    row_stride = 0 if packed else batch
    if batch_sizes is not None:
        batch_sizes = batch_sizes.contiguous()
    batch_sizes_address = 0 if batch_sizes is None else batch_sizes.data_ptr()
    structures = b""
    alive = []
    for d, own in enumerate(weights):
        ih, hh, bias_ih, bias_hh, hr = dense = [_dense(weight) for weight in own]
        tail, pointed_to = _modifiers(modifiers[d], packed, dtype)
        alive.append((dense, pointed_to))
        structures += _FORWARD.pack(
            steps,
            batch,
            inputs,
            hidden,
            features,
            d,
            batch_sizes_address,
            0,
            0,
            0,
            x_address,
            *x_strides,
            _address(ih),
            _address(bias_ih),
            _address(bias_hh),
            _address(hh),
            _address(hr),
            h0_address + d * h0_step,
            h0_stride,
            c0_address + d * c0_step,
            c0_stride,
            out_address + d * features * size,
            *out_strides,
            c_address and c_address + d * hidden * size,
            *c_strides,
            activations_address and activations_address + d * rows * 4 * hidden * size,
            row_stride * 4 * hidden,
            4 * hidden,
            h_n_address + d * batch * features * size,
            features,
            c_n_address + d * batch * hidden * size,
            hidden,
        )
        structures += tail
    status = load().forward(
        structures, directions, DTYPES[dtype], torch.get_num_threads(), _instruction_set
    )
    if status:
        _check(status, "forward")
    return LayerForward(output, h_n, c_n, c, activations)


def layer_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None,
    batch_first: bool,
    modifiers: Sequence[Modifiers],
    output: Tensor | None,
    c: Tensor,
    activations: Tensor,
    want_input: bool,
    want_weights: bool,
) -> LayerGradients:
    """Differentiate one layer.

    Args:
        grad_output: like the output, or None for zeros; so for the other three.
        grad_h_n: like h_n.
        grad_c_n: like c_n.
        grad_cells: like c.
        x: as in the forward pass, and so for what follows.
        h0: [D, B, P] or [B, P].
        c0: [D, B, H] or [B, H].
        weights: one for each direction.
        batch_sizes: [T] or None.
        batch_first: how the input is laid out.
        modifiers: one for each direction.
        output: what the forward pass computed, and so for the next two; not needed for a cell.
        c: [T, B, D·H] or [N, D·H]; [B, H] for a cell.
        activations: [D·T·B, 4H] or [D·N, 4H].
        want_input: whether a gradient of the input is wanted.
        want_weights: whether gradients of the weights are wanted.

    Raises:
        LibraryUnavailableError: if there is no native library.
        MemoryError: if there is no memory for the kernel's scratch.
    """
    dtype, directions = x.dtype, len(weights)
    x, h0, c0, c = _rows(x), _rows(h0), _rows(c0), _rows(c)
    # As they were left, unless a hook on saved tensors has brought them back otherwise.
    activations = _with_memory(activations).contiguous()
    *_, batch, features = h0.shape
    inputs, hidden = x.shape[-1], c0.shape[-1]
    packed = batch_sizes is not None
    steps, rows = _steps_and_rows(x, batch, batch_sizes, batch_first)
    row_stride = 0 if packed else batch
    size = dtype.itemsize
    new = x.new_empty
    grad_inputs = [new(*x.shape) for _ in weights] if want_input else []
    grad_h0, grad_c0 = new(*h0.shape), new(*c0.shape)
    grad_weights: list[tuple[Tensor | None, ...]] = []
    alive = []
    if grad_output is not None:
        grad_output = _rows(grad_output)
        grad_output_at = _address(grad_output), *_time_and_batch(grad_output, False)
    else:
        grad_output_at = _NO_SEQUENCE
    if grad_cells is not None:
        grad_cells = _rows(grad_cells)
        grad_cells_at = _address(grad_cells), *_time_and_batch(grad_cells, False)
    else:
        grad_cells_at = _NO_SEQUENCE
    grad_states = []
    for grad in (grad_h_n, grad_c_n):
        if grad is None:
            grad_states.append((0, 0, 0))
        else:
            grad = _rows(grad)
            alive.append(grad)
            strides = grad.stride()
            step = strides[0] * size if directions > 1 else 0
            grad_states.append((_address(grad), strides[-2], step))
    (gh_address, gh_stride, gh_step), (gc_address, gc_stride, gc_step) = grad_states
    x_address, x_strides = _address(x), _time_and_batch(x, batch_first)
    out_address, out_strides = 0, (0, 0)
    if output is not None:
        output = _rows(output)
        out_address, out_strides = _address(output), _time_and_batch(output, False)
    h0_address, c0_address = _address(h0), _address(c0)
    h0_step, c0_step = (h0.stride(0) * size, c0.stride(0) * size) if directions > 1 else (0, 0)
    c_address, c_strides = _address(c), _time_and_batch(c, False)
    activations_address = _address(activations)
    gh0_address, gc0_address = grad_h0.data_ptr(), grad_c0.data_ptr()
    if batch_sizes is not None:
        batch_sizes = batch_sizes.contiguous()
    structures = b""
    for d, (ih, hh, bias_ih, bias_hh, hr) in enumerate(weights):
        ih, hh, hr = _with_memory(ih).contiguous(), _with_memory(hh).contiguous(), _dense(hr)
        tail, pointed_to = _modifiers(modifiers[d], packed, dtype)
        alive += [ih, hh, hr, *pointed_to]
        part, cells_part = d * features * size, d * hidden * size
        grad_input_at = _NO_SEQUENCE
        if want_input:
            grad_input_at = grad_inputs[d].data_ptr(), *_time_and_batch(grad_inputs[d], batch_first)
        grad_ih = grad_hh = grad_bias_ih = grad_bias_hh = grad_hr = None
        if want_weights:
            grad_ih = new(*ih.shape)
            grad_hh = new(*hh.shape)
            grad_bias_ih = None if bias_ih is None else new(*bias_ih.shape)
            grad_bias_hh = None if bias_hh is None else new(*bias_hh.shape)
            grad_hr = None if hr is None else new(*hr.shape)
        grad_weights.append((grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_hr))
        grad_biases = [_address(grad_bias_ih), _address(grad_bias_hh)]
        if grad_bias_ih is None:
            grad_biases.reverse()
        structures += _BACKWARD.pack(
            steps,
            batch,
            inputs,
            hidden,
            features,
            d,
            _address(batch_sizes),
            activations_address + d * rows * 4 * hidden * size,
            row_stride * 4 * hidden,
            4 * hidden,
            c_address + cells_part,
            *c_strides,
            x_address,
            *x_strides,
            out_address and out_address + part,
            *out_strides,
            _address(ih),
            _address(hh),
            _address(hr),
            h0_address + d * h0_step,
            h0.stride(-2),
            c0_address + d * c0_step,
            c0.stride(-2),
            grad_output_at[0] and grad_output_at[0] + part,
            *grad_output_at[1:],
            grad_cells_at[0] and grad_cells_at[0] + cells_part,
            *grad_cells_at[1:],
            gh_address + d * gh_step,
            gh_stride,
            gc_address + d * gc_step,
            gc_stride,
            *_NO_SEQUENCE,
            *_NO_SEQUENCE,
            *grad_input_at,
            _address(grad_ih),
            _address(grad_hh),
            *grad_biases,
            _address(grad_hr),
            gh0_address + d * batch * features * size,
            features,
            gc0_address + d * batch * hidden * size,
            hidden,
        )
        structures += tail
    if batch:
        status = load().backward(
            structures, directions, DTYPES[dtype], torch.get_num_threads(), _instruction_set
        )
        if status:
            _check(status, "backward")
    else:
        for grads in grad_weights:
            for grad in grads:
                if grad is not None:
                    grad.zero_()
    grad_input = None
    if want_input:
        grad_input, *others = grad_inputs
        for other in others:
            grad_input += other
    return LayerGradients(grad_input, grad_h0, grad_c0, grad_weights)
