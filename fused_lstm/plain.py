"""What ordinary calls on a CPU take: plain layers, or a cell, after one look at the tensors.

For a small model the questions of `functional.lstm` and `lstm_cell` take longer than the kernel.
Here most are asked once for tensors of some sizes, and the answer, `PlainLayers`, is remembered; at
every call it is asked only what may differ between tensors of these sizes. Whatever is out of the
ordinary is left to those functions, and so are faults, but for a named backend that cannot run.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `L` layers, `D`
directions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lstm import backends
from fused_lstm.backends import Problem
from fused_lstm.backends.native import NativeBackend
from fused_lstm.devices import describe_device
from fused_lstm.layer import composed_layer, grouped, native_kernels
from fused_lstm.ops import autocast_off
from fused_lstm.recurrence import differentiable_gradients
from fused_lstm.transforms import (
    PLAIN_TENSORS,
    no_entry_for_compilers,
    readable,
    recording_under_way,
    transform_under_way,
)

__all__ = ["PlainLayersFunction", "plain_layers"]


@no_entry_for_compilers
def plain_layers(
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    input_size: int,
    hidden_size: int,
    num_layers: int,
    directions: int,
    bias: bool,
    batch_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run layers without projection and dropout, or a cell, on the native kernels.

    Args:
        input: [T, B, I], or [B, T, I] with batch_first, for layers; [B, I] for a cell.
        hx: h_0 and c_0, [L·D, B, H] or [B, H], as the user gave them; zeros if None.
        weights: for each layer and direction weight_ih, weight_hh, and bias_ih and bias_hh.
        input_size: I of the module.
        hidden_size: H of the module.
        num_layers: L; 1 for a cell.
        directions: D; 1 for a cell.
        bias: whether `weights` holds biases.
        batch_first: how the input is laid out.
        backend: a backend's name, or None for the default choice.

    Returns:
        Output (of a cell h_n), h_n and c_n, or None for "ask properly".

    Raises:
        BackendUnavailableError: if the named backend cannot run the problem.
    """
    if (
        transform_under_way()
        or recording_under_way(())
        or torch._C._is_any_autocast_enabled()
        # What is remembered is found again by equality, and 4.0 equals 4.
        or not (type(input_size) is type(hidden_size) is type(num_layers) is int)
        or not (type(bias) is type(batch_first) is bool)
    ):
        return None
    name = backends.requested_name(backend)
    if name is not None and name != NativeBackend.name:
        return None
    tensors: tuple[Tensor, ...]
    if hx is None:
        h = c = None
        tensors = (*weights, input)
    elif type(hx) is tuple and len(hx) == 2:
        h, c = hx
        tensors = (*weights, input, h, c)
    else:
        return None
    dtype, count = input.dtype, len(weights)
    for k, tensor in enumerate(tensors):
        if not (
            type(tensor) in PLAIN_TENSORS
            and tensor.dtype is dtype
            and tensor.is_cpu
            and (k >= count or tensor.is_contiguous())
            and not tensor.is_neg()
            # Zeros without memory have none, and tensors that were freed.
            and tensor.data_ptr()
        ):
            return None
    with_grad = torch.is_grad_enabled()
    kernel = _prepare(
        (input_size, hidden_size, num_layers, directions, bias, batch_first),
        dtype,
        with_grad,
        name,
        tuple([tensor.shape for tensor in tensors]),
        input.stride(),
    )
    if kernel is None:
        return None
    differentiated = with_grad and any(tensor.requires_grad for tensor in tensors)
    if dtype is torch.bfloat16 and (differentiated or not native_kernels().multiplies_bfloat16()):
        return None
    if h is not None and c is not None:
        h, c = h.contiguous(), c.contiguous()
    flat: Sequence[Tensor | None] = weights
    if not bias:
        flat = [w for k in range(0, len(weights), 2) for w in (*weights[k : k + 2], None, None)]
    if differentiated:
        results: tuple[Tensor, ...] = PlainLayersFunction.apply(  # type: ignore[no-untyped-call]
            kernel, batch_first, input, h, c, *flat
        )
        output, h_n, c_n = results[0], results[-2], results[-1]
    else:
        outputs, h_n, c_n, _ = kernel.forward(input, h, c, flat, False)
        output = outputs[-1]
    return (output.transpose(0, 1) if batch_first else output), h_n, c_n


@functools.lru_cache(maxsize=4096)
def _prepare(
    sizes: tuple[int, int, int, int, bool, bool],
    dtype: torch.dtype,
    with_grad: bool,
    name: str | None,
    shapes: tuple[torch.Size, ...],
    strides: tuple[int, ...],
) -> Any:
    """Return the kernel for tensors of these sizes; None if they do not fit, or others run them.

    Args:
        sizes: I, H, L, D, bias and batch_first of `plain_layers`.
        dtype: of all tensors.
        with_grad: whether a gradient may be asked for.
        name: of a backend that was asked for, or None.
        shapes: of the weights, of the input, and of h and c if they are given.
        strides: of the input.
    """
    input_size, hidden_size, num_layers, directions, bias, batch_first = sizes
    count = num_layers * directions * (4 if bias else 2)
    if len(shapes) not in (count + 1, count + 3):
        return None
    of_input = shapes[count]
    if len(of_input) not in (2, 3) or 0 in of_input or of_input[-1] != input_size:
        return None
    if strides[-1] != 1 and input_size > 1:
        return None
    steps, batch = (1, *of_input[:-1])[-2:]
    if batch_first:
        steps, batch = batch, steps
    problem = Problem(
        describe_device("cpu"),
        dtype,
        steps,
        batch,
        hidden_size,
        training=with_grad,
        whole_layers=True,
        cell=len(of_input) == 2,
    )
    if backends.select_backend(problem, name) != NativeBackend.name:
        return None
    kernel = native_kernels().PlainLayers(
        of_input, strides, hidden_size, num_layers, directions, bias, batch_first, dtype
    )
    weights = [shape for shape in kernel.weights if shape is not None]
    expected = (*weights, of_input, kernel.state, kernel.state)
    return kernel if shapes == expected[: len(shapes)] else None


class PlainLayersFunction(torch.autograd.Function):
    """Plain layers on the native kernels, all in one node of the graph.

    The gradients are those of `LSTMLayerFunction`, layer by layer. A second derivative goes through
    `composed_layer`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Any,
        batch_first: bool,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Compute output (not for a cell), h_n and c_n.

        Args:
            ctx: for `backward`.
            kernel: the `PlainLayers`, which says what the tensors are.
            batch_first: how x is laid out.
            x: input of the first layer.
            h_0: initial states, or None.
            c_0: likewise.
            *weights: four for each layer and direction.
        """
        outputs, h_n, c_n, saved = kernel.forward(x, h_0, c_0, weights, True)
        ctx.kernel, ctx.batch_first = kernel, batch_first
        ctx.set_materialize_grads(False)
        if kernel.cell:
            # Its output is h_n, which users may change in place: no h but h_0 is looked at again.
            ctx.save_for_backward(x, h_0, c_0, *weights, *saved)
            return h_n, c_n
        ctx.save_for_backward(x, h_0, c_0, *weights, *outputs, *saved)
        return outputs[-1], h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the recurrences in reverse, and multiply as they go."""
        kernel, (_, _, *needed) = ctx.kernel, ctx.needs_input_grad
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        x, h_0, c_0, *rest = tensors = ctx.saved_tensors
        count = len(kernel.weights)
        weights, outputs, saved = (
            rest[:count],
            rest[count : -kernel.num_layers],
            rest[-kernel.num_layers :],
        )
        if (
            torch.is_grad_enabled()
            or not all(map(readable, given))
            # A parameter has been given other memory (`.data`), or a hook on saved tensors has
            # brought back another. PyTorch's operators say what does not fit.
            or not kernel.fits(*tensors)
        ):
            if h_0 is None:
                h_0 = c_0 = x.new_zeros(kernel.state)
            composed = functools.partial(_composed, kernel.directions, ctx.batch_first)
            with autocast_off("cpu"):
                gradients = differentiable_gradients(
                    composed, (x, h_0, c_0, *weights), grads, needed
                )
            return None, None, *gradients
        if kernel.cell:
            grads = None, *grads
        return None, None, *kernel.backward(*grads, x, h_0, c_0, weights, outputs, saved, needed)


def _composed(
    directions: int, batch_first: bool, x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute what `PlainLayersFunction` does from operators that can be differentiated."""
    groups = grouped(weights, 4)
    if x.dim() == h_0.dim() == 2:
        _, h, c, _ = composed_layer(x[None], h_0[None], c_0[None], groups)
        return h[0], c[0]
    h_n, c_n = [], []
    for first in range(0, len(groups), directions):
        own = slice(first, first + directions)
        x, h, c, _ = composed_layer(
            x, h_0[own], c_0[own], groups[own], batch_first=batch_first and not first
        )
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n)
