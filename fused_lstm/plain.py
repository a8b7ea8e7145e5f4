"""What ordinary calls on a CPU take: plain layers, or a cell, after one look at the tensors.

For a small model the questions of `functional.lstm` and `lstm_cell` take longer than the kernel.
Here they are asked once, and the answer, with `PlainLayers`, is remembered; of other tensors it is
asked only whether they are like those. Whatever is out of the ordinary is left to those functions,
and so are faults, but for a named backend that cannot run.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `L` layers, `D`
directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lstm import backends
from fused_lstm.alike import Alike, tensors_like
from fused_lstm.backends import Problem
from fused_lstm.backends.native import NativeBackend
from fused_lstm.devices import describe_device
from fused_lstm.layer import composed_layer, grouped, native_kernels
from fused_lstm.ops import autocast_off
from fused_lstm.recurrence import differentiable_gradients
from fused_lstm.transforms import (
    dual_numbers_under_way,
    hidden_observer,
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
    backend: str | None,
    cell: bool,
    input_size: int,
    hidden_size: int,
    bias: bool,
    num_layers: int = 1,
    directions: int = 1,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run layers without projection and dropout, or a cell, on the native kernels.

    Args:
        input: [T, B, I], or [B, T, I] with batch_first, for layers; [B, I] for a cell.
        hx: h_0 and c_0, [L·D, B, H] or [B, H], as the user gave them; zeros if None.
        weights: for each layer and direction weight_ih, weight_hh, and bias_ih and bias_hh.
        backend: a backend's name, or None for the default choice.
        cell: whether it is a cell.
        input_size: I of the module.
        hidden_size: H of the module.
        bias: whether `weights` holds biases.
        num_layers: L.
        directions: D.
        batch_first: how the input is laid out.

    Returns:
        Output (of a cell h_n), h_n and c_n, or None for "ask properly".

    Raises:
        BackendUnavailableError: if the named backend cannot run the problem.
        RuntimeError: if the memory of a tensor is gone.
    """
    if hidden_observer():
        return None
    name = backends.requested_name(backend)
    if name is not None and name != NativeBackend.name:
        return None
    tensors: tuple[Tensor, ...]
    if hx is None:
        tensors = (input, *weights)
    elif type(hx) is tuple and len(hx) == 2:
        tensors = (input, *hx, *weights)
    else:
        return None
    states, with_grad = hx is not None, torch.is_grad_enabled()
    sizes = (input_size, hidden_size, num_layers, directions, bias, batch_first, states, cell)
    try:
        key = (input.shape, len(weights), with_grad, name, sizes)
        calls = _calls.get(key, ())
    except (RuntimeError, TypeError):
        # Nested tensors have no shape, and odd sizes no hash.
        return None
    for call in calls:
        if call.alike(*tensors):
            break
    else:
        looked_at = _look_at(tensors, key)
        if looked_at is None:
            return None
        call, tensors = looked_at
    if call.bfloat16 and not native_kernels().multiplies_bfloat16():
        return None
    kernel = call.kernel
    addresses = kernel.addresses(tensors)
    if call.differentiated:
        results = _apply(call, addresses, *tensors)
        output, h_n, c_n = results[0], results[-2], results[-1]
    else:
        h_n, c_n, *outputs = kernel.forward(addresses, False)
        output = h_n if cell else outputs[-1]
    return (output.transpose(0, 1) if batch_first else output), h_n, c_n


class _Call:
    """What was found out about a call.

    Attributes:
        kernel: the `PlainLayers`, which says what the tensors are.
        differentiated: whether a gradient may be asked for.
        bfloat16: whether the tensors are.
        alike: tells the tensors of other such calls.
        backward_alike: by the number of gradients, what tells those of other backward passes and
            what was kept for them.
    """

    __slots__ = ("alike", "backward_alike", "bfloat16", "differentiated", "kernel")

    def __init__(self, kernel: Any, differentiated: bool, bfloat16: bool) -> None:
        self.kernel, self.differentiated, self.bfloat16 = kernel, differentiated, bfloat16
        self.alike: Alike = _unlike
        self.backward_alike: dict[int, list[Alike]] = {}


def _unlike(*tensors: Tensor) -> bool:
    return False


# Calls that were looked at, by what is known of them without a look at their tensors; and how many
# of each, and in all, are remembered.
_calls: dict[tuple[Any, ...], list[_Call]] = {}
_CALLS_OF_A_KEY = 8
_KEYS = 4096
# Gradients come with some strides or others.
_BACKWARDS_OF_A_CALL = 4


def _look_at(
    tensors: tuple[Tensor, ...], key: tuple[Any, ...]
) -> tuple[_Call, tuple[Tensor, ...]] | None:
    """Look at a call's tensors, and remember it.

    Args:
        tensors: input, h and c if they are given, and the weights.
        key: of `_calls`.

    Returns:
        The call and its tensors, the states contiguous; None if others run it.
    """
    _, weights, with_grad, name, sizes = key
    x, *rest = tensors
    dtype, states = x.dtype, len(rest) - weights
    if transform_under_way() or recording_under_way(tensors):
        return None
    if torch._C._is_any_autocast_enabled():
        return None
    # What is remembered is found again by equality, and 4.0 equals 4.
    if not all(type(size) in (int, bool) for size in sizes):
        return None
    for k, tensor in enumerate(tensors):
        if not (
            tensor is not None
            and tensor.dtype is dtype
            and tensor.is_cpu
            and (k <= states or tensor.is_contiguous())
            # Tensors that were freed have none.
            and tensor.data_ptr()
        ):
            return None
    shapes = tuple([tensor.shape for tensor in tensors])
    kernel = _prepare(sizes, dtype, with_grad, name, shapes, x.stride())
    if kernel is None:
        return None
    differentiated = with_grad and any(tensor.requires_grad for tensor in tensors)
    if dtype is torch.bfloat16 and differentiated:
        return None
    call = _Call(kernel, differentiated, dtype is torch.bfloat16)
    if not all(tensor.is_contiguous() for tensor in rest):
        return call, (x, *[tensor.contiguous() for tensor in rest])
    alike = tensors_like(tensors)
    if alike is not None:
        call.alike = alike
        if len(_calls) >= _KEYS:
            _calls.clear()
        calls = _calls.setdefault(key, [])
        if len(calls) >= _CALLS_OF_A_KEY:
            calls.clear()
        calls.append(call)
    return call, tensors


@functools.lru_cache(maxsize=4096)
def _prepare(
    sizes: tuple[int, int, int, int, bool, bool, bool, bool],
    dtype: torch.dtype,
    with_grad: bool,
    name: str | None,
    shapes: tuple[torch.Size, ...],
    strides: tuple[int, ...],
) -> Any:
    """Return the kernel for tensors of these sizes; None if they do not fit, or others run them.

    Args:
        sizes: I, H, L, D, bias and batch_first of `plain_layers`, whether h and c are given, and
            whether it is a cell.
        dtype: of all tensors.
        with_grad: whether a gradient may be asked for.
        name: of a backend that was asked for, or None.
        shapes: of the input, of h and c if they are given, and of the weights.
        strides: of the input.
    """
    input_size, hidden_size, num_layers, directions, bias, batch_first, states, cell = sizes
    of_input = shapes[0]
    if len(of_input) != (2 if cell else 3) or 0 in of_input or of_input[-1] != input_size:
        return None
    if num_layers < 1:
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
        cell=cell,
    )
    if backends.select_backend(problem, name) != NativeBackend.name:
        return None
    kernel = native_kernels().PlainLayers(
        of_input, strides, hidden_size, num_layers, directions, bias, batch_first, states, dtype
    )
    return kernel if shapes == kernel.shapes else None


class PlainLayersFunction(torch.autograd.Function):
    """Plain layers on the native kernels, all in one node of the graph.

    The gradients are those of `LSTMLayerFunction`, layer by layer. A second derivative goes through
    `composed_layer`.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, addresses: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute output (not for a cell), h_n and c_n.

        Args:
            ctx: for `backward`.
            call: what is known of the tensors.
            addresses: of the tensors.
            *tensors: x, h_0 and c_0 if they are given, and the weights.
        """
        h_n, c_n, *kept = call.kernel.forward(addresses, True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        # Of a cell without its output, which users may change in place.
        ctx.save_for_backward(*tensors, *kept)
        return (h_n, c_n) if call.kernel.cell else (kept[-1], h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the recurrences in reverse, and multiply as they go."""
        call, needed = ctx.call, ctx.needs_input_grad[2:]
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * (2 + len(needed))
        kernel, kept = call.kernel, ctx.saved_tensors
        if not torch.is_grad_enabled() and _kernel_can_read(call, given, kept):
            if kernel.cell:
                grads = None, *grads
            return None, None, *kernel.backward(*grads, kernel.addresses(kept), needed)
        with autocast_off("cpu"):
            gradients = differentiable_gradients(
                functools.partial(_composed, kernel), kept[: len(needed)], grads, needed
            )
        return None, None, *gradients


# `apply` without the detour that transforms need: none is under way where it is called.
_apply: Callable[..., tuple[Tensor, ...]]
_apply = super(torch.autograd.Function, PlainLayersFunction).apply


def _kernel_can_read(call: _Call, grads: list[Tensor], kept: tuple[Tensor, ...]) -> bool:
    """Whether a kernel can read gradients, and what was kept for a backward pass is what it needs.

    Where it is not, a parameter has been given other memory (`.data`), or a hook on saved tensors
    has brought back another tensor; PyTorch's operators say what does not fit.
    """
    if dual_numbers_under_way():
        return False
    questions = call.backward_alike.get(len(grads), [])
    for alike in questions:
        if alike(*grads, *kept):
            return True
    if not (readable(grads) and call.kernel.fits(*kept)):
        return False
    # What is looked at every time is not worth remembering.
    if call.alike is not _unlike and (question := tensors_like((*grads, *kept))) is not None:
        if len(questions) >= _BACKWARDS_OF_A_CALL:
            questions = []
        call.backward_alike[len(grads)] = [*questions, question]
    return True


def _composed(kernel: Any, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Compute what `PlainLayersFunction` does from operators that can be differentiated."""
    directions, states = kernel.directions, kernel.first_weight - 1
    groups = grouped(rest[states:], kernel.each)
    h_0, c_0 = rest[:states] or [x.new_zeros(kernel.state)] * 2
    if kernel.cell:
        _, h, c, _ = composed_layer(x[None], h_0[None], c_0[None], groups)
        return h[0], c[0]
    h_n, c_n = [], []
    for first in range(0, len(groups), directions):
        own = slice(first, first + directions)
        x, h, c, _ = composed_layer(
            x, h_0[own], c_0[own], groups[own], batch_first=kernel.batch_first and not first
        )
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n)
