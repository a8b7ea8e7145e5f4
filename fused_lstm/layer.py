"""One LSTM layer in all its directions.

Either composed of PyTorch's operators and the recurrence, or one call of a kernel that computes the
projections as well.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of h (H,
or proj_size), `D` directions, `N` rows of a packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lstm.backends.native import widened
from fused_lstm.ops import autocast_off
from fused_lstm.recurrence import recurrence

__all__ = ["DirectionWeights", "LSTMLayerFunction", "composed_layer", "native_layer"]


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
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None


def composed_layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[DirectionWeights],
    batch_sizes: Tensor | None,
    batch_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project the whole sequence with one GEMM a direction, then run the recurrence over it.

    Args:
        x: [T, B, I], [B, T, I] with batch_first, or packed rows [N, I].
        h_0: [D, B, P].
        c_0: [D, B, H].
        weights: one for each direction; the second runs backwards in time.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        batch_first: how x is laid out.
        backend: a backend's name, or None for the default choice.

    Returns:
        output [T, B, D·P] (whatever batch_first says) or [N, D·P], h_n [D, B, P], c_n [D, B, H].
    """
    outputs, h_n, c_n = [], [], []
    for direction, own in enumerate(weights):
        bias = own.bias_ih if own.bias_hh is None else own.bias_hh
        if own.bias_ih is not None and own.bias_hh is not None:
            bias = own.bias_ih + own.bias_hh
        gates = F.linear(x, own.ih, bias)
        if batch_first:
            # A view: the kernels read any strides.
            gates = gates.transpose(0, 1)
        # Under autocast the projection has chosen the dtype, and the recurrence follows it.
        dtype = gates.dtype
        h, _, h_last, c_last = recurrence(
            gates,
            own.hh.to(dtype),
            h_0[direction].to(dtype),
            c_0[direction].to(dtype),
            None if own.hr is None else own.hr.to(dtype),
            batch_sizes,
            direction == 1,
            backend,
            save_cells=False,
        )
        outputs.append(h)
        h_n.append(h_last)
        c_n.append(c_last)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return output, torch.stack(h_n), torch.stack(c_n)


def native_layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[DirectionWeights],
    batch_sizes: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a layer on the native CPU kernels.

    Args:
        x: [T, B, I], [B, T, I] with batch_first, or packed rows [N, I]; [B, I] for a cell.
        h_0: [D, B, P]; [B, P] for a cell.
        c_0: [D, B, H]; [B, H] for a cell.
        weights: one for each direction; the second runs backwards in time.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        batch_first: how x is laid out.

    Returns:
        output [T, B, D·P] (whatever batch_first says) or [N, D·P], for a cell h_n; h_n like h_0;
        c_n like c_0.
    """
    if not x.shape[-1]:
        # No features: a kernel knows by them that there is an input.
        return _composed_like_native(x, h_0, c_0, weights, batch_sizes, batch_first)
    if x.dtype == torch.bfloat16:
        # In float32: faster than oneDNN's bfloat16 kernels, and rounded once, at the end.
        wide = [DirectionWeights(*map(widened, own)) for own in weights]
        results = native_layer(x.float(), h_0.float(), c_0.float(), wide, batch_sizes, batch_first)
        output, h_n, c_n = (result.bfloat16() for result in results)
        return output, h_n, c_n
    if torch.is_grad_enabled() and (
        x.requires_grad
        or h_0.requires_grad
        or c_0.requires_grad
        or any(w is not None and w.requires_grad for own in weights for w in own)
    ):
        flat = [w for own in weights for w in own]
        outputs: tuple[Tensor, ...] = LSTMLayerFunction.apply(  # type: ignore[no-untyped-call]
            x, h_0, c_0, batch_sizes, batch_first, *flat
        )
        # A cell's output is h_n, and no output of its own.
        return outputs if len(outputs) == 3 else (outputs[0], *outputs)  # type: ignore[return-value]
    from fused_lstm.kernels import cpu as kernels

    out = kernels.layer_forward(x, h_0, c_0, weights, batch_sizes, batch_first, False)
    return out.output, out.h_n, out.c_n


def _composed_like_native(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[DirectionWeights],
    batch_sizes: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `native_layer` does from PyTorch's operators; arguments and results as there."""
    if x.dim() == h_0.dim() == 2:
        _, h, c = composed_layer(x[None], h_0[None], c_0[None], weights, None, False, None)
        return h[0], h[0], c[0]
    return composed_layer(x, h_0, c_0, weights, batch_sizes, batch_first, None)


class LSTMLayerFunction(torch.autograd.Function):
    """A layer on the native kernels, which compute the gradients of x and the weights as well.

    That is: while δa of some steps is in the cache. Equations as in kernels/cpu/backward.h, those
    of `reference.recurrence_backward` and, over all rows, δx = δa·W_ih, δW_ih = Σ δaᵀ·x,
    δW_hh = Σ δaᵀ·h_{t−1}, δb = Σ δa, δW_hr = Σ δhᵀ·(o ⊙ tanh(c)). A second derivative goes through
    `composed_layer`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        batch_sizes: Tensor | None,
        batch_first: bool,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Compute output (not for a cell), h_n and c_n; see `native_layer`."""
        from fused_lstm.kernels import cpu as kernels

        out = kernels.layer_forward(x, h_0, c_0, _grouped(flat), batch_sizes, batch_first, True)
        ctx.batch_first = batch_first
        ctx.save_for_backward(x, h_0, c_0, batch_sizes, out.output, out.c, out.activations, *flat)
        ctx.set_materialize_grads(False)
        return (out.h_n, out.c_n) if x.dim() == h_0.dim() == 2 else out[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the recurrence in reverse, and multiply as it goes."""
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        x, h_0, c_0, batch_sizes, output, c, activations, *flat = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or not all(map(_has_memory, grads)):
            inputs = (x, h_0, c_0, *flat)
            needed = (*needed[:3], *needed[5:])
            result = _differentiable(inputs, batch_sizes, ctx.batch_first, grads, needed)
            return (*result[:3], None, None, *result[3:])
        from fused_lstm.kernels import cpu as kernels

        grad_output = None if len(grads) == 2 else grads[0]
        weights = _grouped(flat)
        gradients = kernels.layer_backward(
            grad_output,
            *grads[-2:],
            x,
            h_0,
            c_0,
            weights,
            batch_sizes,
            ctx.batch_first,
            output,
            c,
            activations,
            needed[0],
            any(needed[5:]),
        )
        every = [grad for own in gradients.weights for grad in own]
        return (
            gradients.input,
            gradients.h0 if needed[1] else None,
            gradients.c0 if needed[2] else None,
            None,
            None,
            *(grad if need else None for grad, need in zip(every, needed[5:], strict=True)),
        )


def _has_memory(grad: Tensor | None) -> bool:
    """Whether a kernel can read a gradient: not where it stands for a batch of them, or others."""
    return grad is None or (
        type(grad) is Tensor
        and not grad.is_neg()
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
        and not torch._C._are_functorch_transforms_active()
    )


def _grouped(flat: Sequence[Tensor | None]) -> list[DirectionWeights]:
    """Weights by direction, from one list."""
    return [
        DirectionWeights(*flat[k : k + 5])  # type: ignore[arg-type]
        for k in range(0, len(flat), 5)
    ]


def _differentiable(
    inputs: tuple[Tensor | None, ...],
    batch_sizes: Tensor | None,
    batch_first: bool,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and the weights, by operations that can be differentiated.

    Also under `vmap`, which a batched gradient is.
    """
    create_graph = torch.is_grad_enabled()
    # Autocast has chosen the dtypes before the layer was called.
    with torch.enable_grad(), autocast_off("cpu"):
        return _recomputed(inputs, batch_sizes, batch_first, grads, needed, create_graph)


def _recomputed(
    inputs: tuple[Tensor | None, ...],
    batch_sizes: Tensor | None,
    batch_first: bool,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    create_graph: bool,
) -> list[Tensor | None]:
    """Compute the layer once more, from PyTorch's operators, and differentiate that."""
    # Views: a gradient is then of this use alone, even where one input was computed from another.
    views = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    x, h_0, c_0, *flat = views
    if x is None or h_0 is None or c_0 is None:
        raise AssertionError("only weights may be missing")
    outputs: tuple[Tensor, ...] = _composed_like_native(
        x, h_0, c_0, _grouped(flat), batch_sizes, batch_first
    )
    if len(grads) == 2:
        outputs = outputs[1:]
    given = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    wanted = [k for k, need in enumerate(needed) if need]
    gradients = torch.autograd.grad(
        [out for out, _ in given],
        [view for k in wanted if (view := views[k]) is not None],
        [grad for _, grad in given],
        create_graph=create_graph,
        allow_unused=True,
    )
    result: list[Tensor | None] = [None] * len(inputs)
    for k, gradient in zip(wanted, gradients, strict=True):
        result[k] = gradient
    return result
