"""What ordinary calls on a CPU take: a plain layer or cell, at the cost of one look at its tensors.

For a small model the questions of `functional.lstm` and `lstm_cell` take longer than the kernel.
Here most are asked once for tensors of some sizes, and the answer, a `PlainLayer`, is remembered;
at every call it is asked only what may differ between tensors of these sizes. Whatever is out of
the ordinary, a fault included, is left to those functions.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units.
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
from fused_lstm.layer import PlainLayerFunction, native_kernels
from fused_lstm.recurrence import PLAIN_TENSORS, no_entry_for_compilers, transform_under_way

__all__ = ["plain_layer"]


@no_entry_for_compilers
def plain_layer(
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    input_size: int,
    hidden_size: int,
    batch_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run a layer in one direction, or a cell, on the native kernels.

    Args:
        input: [T, B, I], or [B, T, I] with batch_first, for a layer; [B, I] for a cell.
        hx: h_0 and c_0, [1, B, H] or [B, H], as the user gave them; zeros if None.
        weights: weight_ih [4H, I] and weight_hh [4H, H], or these, bias_ih [4H] and bias_hh [4H].
        input_size: I of the module.
        hidden_size: H of the module.
        batch_first: how the input is laid out.
        backend: a backend's name, or None for the default choice.

    Returns:
        Output (of a cell h_n), h_n and c_n, or None for "ask properly".

    Raises:
        BackendUnavailableError: if the named backend cannot run the problem.
    """
    if (
        transform_under_way()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_any_autocast_enabled()
        or len(weights) not in (2, 4)
    ):
        return None
    if hx is None:
        h = c = None
        given = (input, *weights)
    elif type(hx) is tuple and len(hx) == 2:
        h, c = hx
        given = (input, h, c, *weights)
    else:
        return None
    dtype = input.dtype
    for tensor in given:
        if not (
            type(tensor) in PLAIN_TENSORS
            and tensor.dtype is dtype
            and tensor.is_cpu
            and tensor.is_contiguous()
            and not tensor.is_neg()
        ):
            return None
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    with_grad = torch.is_grad_enabled()
    kernel = _prepare(
        dtype,
        input_size,
        hidden_size,
        batch_first,
        with_grad,
        backends.requested_name(backend),
        input.shape,
        None if h is None else h.shape,
        None if c is None else c.shape,
        weight_ih.shape,
        weight_hh.shape,
        None if bias_ih is None else bias_ih.shape,
        None if bias_hh is None else bias_hh.shape,
    )
    if kernel is None:
        return None
    tensors = (input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    differentiated = with_grad and any(tensor.requires_grad for tensor in given)
    if dtype is torch.bfloat16 and (differentiated or not native_kernels().multiplies_bfloat16()):
        return None
    if differentiated:
        outputs: tuple[Tensor, ...] = PlainLayerFunction.apply(  # type: ignore[no-untyped-call]
            kernel, batch_first, *tensors
        )
        output, h_n, c_n = outputs[0], outputs[-2], outputs[-1]
    else:
        output, h_n, c_n, _ = kernel.forward(*tensors, False)
    return (output.transpose(0, 1) if batch_first else output), h_n, c_n


@functools.lru_cache(maxsize=4096)
def _prepare(
    dtype: torch.dtype,
    input_size: int,
    hidden_size: int,
    batch_first: bool,
    with_grad: bool,
    name: str | None,
    input: torch.Size,
    h: torch.Size | None,
    c: torch.Size | None,
    weight_ih: torch.Size,
    weight_hh: torch.Size,
    bias_ih: torch.Size | None,
    bias_hh: torch.Size | None,
) -> Any:
    """Return the kernel for tensors of these sizes; None if they do not fit, or others run them."""
    rows, cell = 4 * hidden_size, len(input) == 2
    if name not in (None, NativeBackend.name):
        return None
    if len(input) not in (2, 3) or 0 in input or input[-1] != input_size:
        return None
    steps, batch = (1, *input[:-1])[-2:]
    if batch_first:
        steps, batch = batch, steps
    state = (batch, hidden_size) if cell else (1, batch, hidden_size)
    expected = (
        (h, state),
        (c, state),
        (weight_ih, (rows, input_size)),
        (weight_hh, (rows, hidden_size)),
        (bias_ih, (rows,)),
        (bias_hh, (rows,)),
    )
    if any(shape is not None and shape != wanted for shape, wanted in expected):
        return None
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
    return native_kernels().PlainLayer(input, hidden_size, bias_ih is not None, batch_first, dtype)
