"""One LSTM layer in all its directions.

Either composed of PyTorch's operators and the recurrence, or one call of a kernel that computes the
projections as well.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of h (H,
or proj_size), `D` directions, `N` rows of a packed batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lstm.backends.native import widened
from fused_lstm.devices import autocast_is_on
from fused_lstm.layer_norm_recurrence import layer_norm_recurrence
from fused_lstm.layer_norm_reference import LayerNorm
from fused_lstm.modifiers import NO_MODIFIERS, Modifiers
from fused_lstm.ops import autocast_off
from fused_lstm.recurrence import differentiable_gradients, recurrence
from fused_lstm.reference import state_dtype
from fused_lstm.transforms import PLAIN_TENSORS, readable

__all__ = [
    "PLAIN",
    "DirectionNorms",
    "DirectionWeights",
    "LSTMLayerFunction",
    "LayerOutput",
    "composed_layer",
    "grouped",
    "native_kernels",
    "native_layer",
    "within_lengths",
]


class DirectionWeights(NamedTuple):
    """Weights of one layer in one direction.

    Attributes:
        ih: [4H, I].
        hh: [4H, P].
        bias_ih: [4H] or None.
        bias_hh: [4H] or None.
        hr: [P, H], or None without a projection.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


class DirectionNorms(NamedTuple):
    """What layer normalization adds to the weights of one layer in one direction.

    The biases of x·W_ihᵀ and h·W_hhᵀ, once normalized, are those of `DirectionWeights`.

    Attributes:
        gain_ih: [4H], of x·W_ihᵀ.
        gain_hh: [4H], of h·W_hhᵀ.
        gain_c: [H], of the cell state.
        bias_c: [H] or None.
    """

    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor
    bias_c: Tensor | None


class LayerOutput(NamedTuple):
    """What a layer computes.

    Attributes:
        output: [T, B, D·P], whatever the input's layout, or [N, D·P]; for a cell h_n.
        h_n: like h_0.
        c_n: like c_0.
        cells: cell states after each step, [T, B, D·H] or [N, D·H]; None unless asked for.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    cells: Tensor | None


# One for each direction at most; what is left over is not looked at.
PLAIN = (NO_MODIFIERS, NO_MODIFIERS)


def composed_layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[DirectionWeights],
    batch_sizes: Tensor | None = None,
    modifiers: Sequence[Modifiers] = PLAIN,
    batch_first: bool = False,
    return_cells: bool = False,
    backend: str | None = None,
    norms: Sequence[DirectionNorms] | None = None,
    eps: float = 1e-5,
) -> LayerOutput:
    """Project the whole sequence with one GEMM a direction, then run the recurrence over it.

    Args:
        x: [T, B, I], [B, T, I] with batch_first, or packed rows [N, I].
        h_0: [D, B, P].
        c_0: [D, B, H].
        weights: one for each direction; the second runs backwards in time.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: one for each direction, with the same lengths and resets.
        batch_first: how x is laid out.
        return_cells: whether cell states are wanted, in the dtype of the output.
        backend: a backend's name, or None for the default choice.
        norms: one for each direction, for a normalized layer.
        eps: added to the variances of a normalized layer.
    """
    lengths = modifiers[0].lengths
    if lengths is not None:
        x = within_lengths(x, lengths, batch_first)
    outputs, h_n, c_n, cells = [], [], [], []
    for direction, (own, modifier) in enumerate(zip(weights, modifiers, strict=False)):
        bias = own.bias_ih if own.bias_hh is None else own.bias_hh
        if own.bias_ih is not None and own.bias_hh is not None:
            bias = own.bias_ih + own.bias_hh
        if norms is None:
            gates = F.linear(x, own.ih, bias)
        else:
            gates = _normalized(F.linear(x, own.ih), x, norms[direction].gain_ih, bias, eps)
        if batch_first:
            # A view: the kernels read any strides.
            gates = gates.transpose(0, 1)
        # Under autocast the projection has chosen the dtype, and the recurrence follows it.
        dtype = gates.dtype
        if modifier is not NO_MODIFIERS:
            modifier = modifier.to(dtype)
        arguments = (
            gates,
            own.hh.to(dtype),
            h_0[direction].to(dtype),
            c_0[direction].to(dtype),
            None if own.hr is None else own.hr.to(dtype),
            batch_sizes,
            modifier,
            direction == 1,
        )
        if norms is None:
            out = recurrence(*arguments, backend, save_cells=return_cells)
        else:
            own_norms: list[Any] = list(norms[direction])
            if autocast_is_on(x.device.type):
                own_norms = [t if t is None else t.to(dtype) for t in own_norms]
            _, gain_hh, gain_c, bias_c = own_norms
            norm = LayerNorm(gain_hh, gain_c, bias_c, eps)
            out = layer_norm_recurrence(*arguments, norm, backend)
        h, c, h_last, c_last = out
        outputs.append(h)
        h_n.append(h_last)
        c_n.append(c_last)
        if return_cells:
            cells.append(c.to(dtype))
    return LayerOutput(
        _side_by_side(outputs),
        torch.stack(h_n),
        torch.stack(c_n),
        _side_by_side(cells) if return_cells else None,
    )


def _normalized(gates: Tensor, x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize x·W_ihᵀ over its 4H features, in the dtype of states, rounded once."""
    if tuple(gain.shape) != (gates.shape[-1],):
        raise RuntimeError(
            f"Expected gain_ih to have size {[gates.shape[-1]]}, got {list(gain.shape)}"
        )
    if gain.dtype != x.dtype and not autocast_is_on(x.device.type):
        raise RuntimeError(
            f"Expected gain_ih to have the dtype of the input, {x.dtype}, got {gain.dtype}"
        )
    wide = state_dtype(gates.dtype)
    bias = None if bias is None else bias.to(wide)
    with autocast_off(gates.device.type):
        normalized = F.layer_norm(gates.to(wide), gates.shape[-1:], gain.to(wide), bias, eps)
    return normalized.to(gates.dtype)


def _side_by_side(directions: list[Tensor]) -> Tensor:
    return directions[0] if len(directions) == 1 else torch.cat(directions, -1)


def within_lengths(x: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """The input, with zeros beyond the lengths: 0 times a NaN there would be one in δW_ih."""
    t = torch.arange(x.shape[1 if batch_first else 0], device=x.device)
    beyond = t >= lengths.unsqueeze(-1) if batch_first else t.unsqueeze(-1) >= lengths
    return torch.where(beyond.unsqueeze(-1), torch.zeros_like(x), x)


@functools.cache
def native_kernels() -> Any:
    """Import the kernels at their first call, and not at every one: that takes a microsecond."""
    from fused_lstm.kernels import cpu as kernels

    return kernels


def native_layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[DirectionWeights],
    batch_sizes: Tensor | None = None,
    modifiers: Sequence[Modifiers] = PLAIN,
    batch_first: bool = False,
    return_cells: bool = False,
) -> LayerOutput:
    """Compute a layer on the native CPU kernels.

    Args:
        x: [T, B, I], [B, T, I] with batch_first, or packed rows [N, I]; [B, I] for a cell.
        h_0: [D, B, P]; [B, P] for a cell.
        c_0: [D, B, H]; [B, H] for a cell.
        weights: one for each direction; the second runs backwards in time.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: one for each direction, with the same lengths and resets; none for a cell.
        batch_first: how x is laid out.
        return_cells: whether cell states are wanted; not for a cell.
    """
    sequence = (batch_sizes, modifiers, batch_first, return_cells)
    if not x.shape[-1]:
        # No features: a kernel knows by them that there is an input.
        return _composed_like_native(x, h_0, c_0, weights, *sequence)
    differentiated = torch.is_grad_enabled() and (
        x.requires_grad
        or h_0.requires_grad
        or c_0.requires_grad
        or any(w is not None and w.requires_grad for own in weights for w in own)
    )
    if x.dtype == torch.bfloat16 and (
        differentiated or return_cells or not _computed_in_bfloat16(weights, modifiers)
    ):
        # In float32, and rounded once, at the end.
        wide = [DirectionWeights(*map(widened, own)) for own in weights]
        modifiers = [widened(modifier) for modifier in modifiers]
        out = native_layer(
            x.float(), h_0.float(), c_0.float(), wide, batch_sizes, modifiers, *sequence[2:]
        )
        return LayerOutput(*(None if t is None else t.bfloat16() for t in out))  # type: ignore[arg-type]
    if differentiated:
        flat = [w for own in weights for w in own]
        cell_clip = None
        if modifiers[0] is not NO_MODIFIERS:
            lengths, resets, *_, cell_clip = modifiers[0]
            flat += [lengths, resets, *(mask for own in modifiers for mask in own[2:5])]
        # Few arguments: autograd looks at each one, here and in the backward pass.
        outputs: tuple[Tensor, ...] = LSTMLayerFunction.apply(  # type: ignore[no-untyped-call]
            (batch_first, cell_clip, return_cells, len(weights)), x, h_0, c_0, batch_sizes, *flat
        )
        if len(outputs) == 2:
            # A cell's output is h_n, and no output of its own.
            h_n, c_n = outputs
            return LayerOutput(h_n, h_n, c_n, None)
        output, h_n, c_n, *cells = outputs
        return LayerOutput(output, h_n, c_n, cells[0] if cells else None)
    out = native_kernels().layer_forward(
        x, h_0, c_0, weights, batch_sizes, batch_first, modifiers, False, return_cells
    )
    return LayerOutput(out.output, out.h_n, out.c_n, out.c)


def _computed_in_bfloat16(
    weights: Sequence[DirectionWeights], modifiers: Sequence[Modifiers]
) -> bool:
    """Whether the native kernels have this layer in bfloat16, without gradients and cells."""
    return (
        native_kernels().multiplies_bfloat16()
        and all(own.hr is None for own in weights)
        and all(mask is None for own in modifiers for mask in own[2:5])
    )


def _composed_like_native(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[DirectionWeights],
    batch_sizes: Tensor | None,
    modifiers: Sequence[Modifiers],
    batch_first: bool,
    return_cells: bool,
) -> LayerOutput:
    """Compute what `native_layer` does from PyTorch's operators; arguments and results as there."""
    if x.dim() == h_0.dim() == 2:
        _, h, c, _ = composed_layer(x[None], h_0[None], c_0[None], weights)
        return LayerOutput(h[0], h[0], c[0], None)
    return composed_layer(x, h_0, c_0, weights, batch_sizes, modifiers, batch_first, return_cells)


# Arguments of `LSTMLayerFunction.forward` before the weights.
_LEADING = 5


class LSTMLayerFunction(torch.autograd.Function):
    """A layer on the native kernels, which compute the gradients of x and the weights as well.

    That is: while δa of some steps is in the cache. Equations as in kernels/cpu/backward.h, those
    of `reference.recurrence_backward` and, over all rows, δx = δa·W_ih, δW_ih = Σ δaᵀ·x,
    δW_hh = Σ δaᵀ·h_{t−1}, δb = Σ δa, δW_hr = Σ δĥᵀ·(o ⊙ tanh(ĉ)). A second derivative goes through
    `composed_layer`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: tuple[bool, float | None, bool, int],
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        batch_sizes: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Compute output (not for a cell), h_n, c_n and maybe cells; see `native_layer`.

        `layout` is batch_first, cell_clip, return_cells and the number of directions; `flat` are
        the five weights of each direction, and then, if anything modifies the recurrence, lengths,
        resets and the three masks of each direction.
        """
        batch_first, cell_clip, return_cells, directions = layout
        weights, modifying = flat[: 5 * directions], flat[5 * directions :]
        out = native_kernels().layer_forward(
            x,
            h_0,
            c_0,
            grouped(weights),
            batch_sizes,
            batch_first,
            _modifiers(modifying, cell_clip),
            True,
            return_cells,
        )
        output, h_n, c_n, c, activations = out
        # A cell's output is h_n, which users may change in place: no h but h_0 is looked at again.
        cell = output is h_n
        saved = (x, h_0, c_0, batch_sizes, None if cell else output, c, activations, *flat)
        ctx.layout, ctx.forms = layout, _forms(saved)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        if cell:
            return h_n, c_n
        return (output, h_n, c_n, c) if return_cells else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the recurrence in reverse, and multiply as it goes."""
        needed = ctx.needs_input_grad
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * len(needed)
        x, h_0, c_0, batch_sizes, output, c, activations, *flat = saved = ctx.saved_tensors
        batch_first, cell_clip, return_cells, directions = ctx.layout
        weights, modifying = flat[: 5 * directions], flat[5 * directions :]
        modifiers = _modifiers(modifying, cell_clip)
        no_more = (None,) * len(modifying)
        wanted = needed[_LEADING : _LEADING + 5 * directions]
        if (
            torch.is_grad_enabled()
            or not readable(given)
            # Not what was saved: a parameter has been given other memory (`.data`), or a hook on
            # saved tensors has brought back another. PyTorch's operators say what does not fit.
            or _forms(saved) != ctx.forms
        ):
            inputs = (x, h_0, c_0, *weights)
            sequence = (batch_sizes, modifiers, batch_first, return_cells)
            result = _differentiable(inputs, sequence, grads, (*needed[1:4], *wanted))
            return (None, *result[:3], None, *result[3:], *no_more)
        cell = len(grads) == 2
        grad_output, grad_h_n, grad_c_n = (None, *grads) if cell else grads[:3]
        grad_x, grad_h_0, grad_c_0, grad_weights = native_kernels().layer_backward(
            grad_output,
            grad_h_n,
            grad_c_n,
            grads[3] if return_cells else None,
            x,
            h_0,
            c_0,
            grouped(weights),
            batch_sizes,
            batch_first,
            modifiers,
            output,
            c,
            activations,
            needed[1],
            any(wanted),
        )
        every = [grad for own in grad_weights for grad in own]
        return (
            None,
            grad_x,
            grad_h_0 if needed[2] else None,
            grad_c_0 if needed[3] else None,
            None,
            *[grad if need else None for grad, need in zip(every, wanted, strict=True)],
            *no_more,
        )


def _forms(tensors: Sequence[Tensor | None]) -> list[tuple[Any, ...] | None]:
    """What of tensors a kernel relies on that is given their addresses."""
    return [
        None if t is None else (type(t) in PLAIN_TENSORS, t.shape, t.dtype, t.device, t.is_neg())
        for t in tensors
    ]


def grouped(flat: Sequence[Tensor | None], each: int = 5) -> list[DirectionWeights]:
    """Weights by recurrence, from one list with the first `each` fields of every one."""
    return [
        DirectionWeights(*flat[k : k + each])  # type: ignore[arg-type]
        for k in range(0, len(flat), each)
    ]


def _modifiers(modifying: Sequence[Tensor | None], cell_clip: float | None) -> Sequence[Modifiers]:
    """Modifiers by direction, from lengths, resets and the masks of all in one list."""
    if not modifying:
        return PLAIN
    lengths, resets, *masks = modifying
    return [
        Modifiers(lengths, resets, masks[k], masks[k + 1], masks[k + 2], cell_clip)
        for k in range(0, len(masks), 3)
    ]


# What a layer is told of its sequence: batch_sizes, modifiers, batch_first, return_cells.
_SequenceArguments = tuple[Tensor | None, Sequence[Modifiers], bool, bool]


def _differentiable(
    inputs: tuple[Tensor | None, ...],
    sequence: _SequenceArguments,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and the weights, by operations that can be differentiated.

    Also under `vmap`, which a batched gradient is.
    """

    def layer(x: Tensor, h_0: Tensor, c_0: Tensor, *flat: Tensor | None) -> Sequence[Tensor | None]:
        out = _composed_like_native(x, h_0, c_0, grouped(flat), *sequence)
        # Of a cell there are only h_n and c_n.
        return out[1:3] if len(grads) == 2 else out[: len(grads)]

    # Autocast has chosen the dtypes before the layer was called.
    with autocast_off("cpu"):
        return differentiable_gradients(layer, inputs, grads, needed)
