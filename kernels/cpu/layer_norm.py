"""Calls the native kernels of the recurrence with layer normalization.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch. Gate order i, f, g, o. `layer_norm.h` has the equations.

As in `launch.py`, the callers have checked shapes, dtypes and devices.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from . import launch
from .launch import (
    DTYPES,
    Modifiers,
    _address,
    _backward_structure,
    _check,
    _dense,
    _forward_structure,
    _modifiers,
    _rows,
    _rows_or_none,
    _sequence,
)
from .library import load

__all__ = ["layer_norm_backward", "layer_norm_forward"]

# What LstmLayerNormForward and LstmLayerNormBackward in lstm.h add to the plain ones.
_FORWARD = struct.Struct("=9qd")
_BACKWARD = struct.Struct("=15qd")


def layer_norm_forward(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute one recurrence with layer normalization, from its gates.

    Args:
        gates: [T, B, 4H] or packed rows [N, 4H], what comes from the input.
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: what changes the recurrence.
        reverse: whether time runs from T-1 to 0, with lengths from each sequence's last step.
        gain_hh: [4H], of the normalized h_{t−1}·W_hhᵀ.
        gain_c: [H], of the normalized cell.
        bias_c: [H] or None, likewise.
        eps: added to variances.
        save: whether `layer_norm_backward` will be called.

    Returns:
        h; c; activations; the normalized h_{t−1}·W_hhᵀ; its rstd, [T, B] or [N]; h_n and c_n.
        Activations, normalized and rstd are empty unless saved.

    Raises:
        LibraryUnavailableError: if there is no native library.
        MemoryError: if there is no memory for the kernel's scratch.
    """
    packed = batch_sizes is not None
    leading, dtype = gates.shape[:-1], gates.dtype
    gates, h0, c0 = _rows(gates), _rows(h0), _rows(c0)
    recurrent, weight_hr, batch_sizes = _dense(weight_hh), _dense(weight_hr), _dense(batch_sizes)
    gain_hh, gain_c, bias_c = _dense(gain_hh), _dense(gain_c), _dense(bias_c)
    new = gates.new_empty
    h = new((*leading, h0.shape[1]))
    c = new((*leading, c0.shape[1]))
    activations = new(gates.shape if save else (0,))
    normalized = new(gates.shape if save else (0,))
    rstd = new(leading if save else (0,))
    h_n, c_n = new(h0.shape), new(c0.shape)
    if h0.shape[0]:
        tail, _alive = _modifiers(modifiers, packed, dtype)
        outputs = (h, c, activations, h_n, c_n)
        structure = _forward_structure(
            gates, recurrent, h0, c0, weight_hr, batch_sizes, reverse, *outputs
        )
        norm = _FORWARD.pack(
            *_sequence(normalized, packed),
            *_sequence(rstd, packed),
            _address(gain_hh),
            _address(gain_c),
            _address(bias_c),
            eps,
        )
        status = load().layer_norm_forward(
            structure + tail + norm,
            1,
            DTYPES[dtype],
            torch.get_num_threads(),
            launch._instruction_set,
        )
        _check(status, "forward")
    return h, c, activations, normalized, rstd, h_n, c_n


def layer_norm_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    activations: Tensor,
    c: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Differentiate one recurrence with layer normalization.

    Args:
        grad_h: like h, or None for zeros; so for the other gradients.
        grad_c: like c.
        grad_h_n: [B, P].
        grad_c_n: [B, H].
        activations: as `layer_norm_forward` returned them, and so for the next three.
        c: see there.
        normalized: see there.
        rstd: see there.
        weight_hh: as in the forward pass, and so for what follows.
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] int64 on the CPU, or None.
        modifiers: see there; nothing is differentiated by them.
        reverse: see there.
        gain_hh: see there.
        gain_c: see there.
        bias_c: see there.
        eps: see there.

    Returns:
        Gradients of gates, of h_{t−1}·W_hhᵀ (like gates), of the cell after gain and bias (like c),
        of h0 and c0, and the whole δh (of h before zoneout) where there is a projection, else None.

    Raises:
        LibraryUnavailableError: if there is no native library.
        MemoryError: if there is no memory for the kernel's scratch.
    """
    packed, dtype = batch_sizes is not None, activations.dtype
    activations, c, c0 = _rows(activations), _rows(c), _rows(c0)
    normalized = _rows(normalized)
    recurrent, weight_hr, batch_sizes = _dense(weight_hh), _dense(weight_hr), _dense(batch_sizes)
    gain_hh, gain_c, bias_c = _dense(gain_hh), _dense(gain_c), _dense(bias_c)
    grad_h, grad_c = _rows_or_none(grad_h), _rows_or_none(grad_c)
    grad_h_n, grad_c_n = _rows_or_none(grad_h_n), _rows_or_none(grad_c_n)
    new = activations.new_empty
    batch, features = c0.shape[0], weight_hh.shape[1]
    grad_gates, grad_product, grad_z = new(activations.shape), new(activations.shape), new(c.shape)
    whole = None if weight_hr is None else new((*c.shape[:-1], features))
    grad_h0, grad_c0 = new((batch, features)), new(c0.shape)
    if batch:
        tail, _alive = _modifiers(modifiers, packed, dtype)
        grads, saved = (grad_h, grad_c, grad_h_n, grad_c_n), (activations, c)
        outputs = (grad_gates, whole, grad_h0, grad_c0)
        structure = _backward_structure(
            *grads, *saved, recurrent, c0, weight_hr, batch_sizes, reverse, *outputs
        )
        norm = _BACKWARD.pack(
            *_sequence(normalized, packed),
            *_sequence(rstd, packed),
            *_sequence(grad_product, packed),
            *_sequence(grad_z, packed),
            _address(gain_hh),
            _address(gain_c),
            _address(bias_c),
            eps,
        )
        status = load().layer_norm_backward(
            structure + tail + norm,
            1,
            DTYPES[dtype],
            torch.get_num_threads(),
            launch._instruction_set,
        )
        _check(status, "backward")
    return grad_gates, grad_product, grad_z, grad_h0, grad_c0, whole
