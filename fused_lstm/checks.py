"""Whether the tensors of a call fit each other, with torch's texts where they do not.

Kernels get pointers: nothing reaches them that has not passed here.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of h (H,
or proj_size), `D` directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lstm.devices import autocast_is_on
from fused_lstm.layer import DirectionWeights
from fused_lstm.modifiers import Modifiers, check_modifiers

__all__ = ["check_cell", "check_sequences", "check_tensors", "check_weights", "fit"]


def check_tensors(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    batch_first: bool,
    states: int,
) -> None:
    """Raise what PyTorch's operator raises, with its texts where they name the fault."""
    if isinstance(hx, Tensor):
        raise TypeError("lstm(): argument 'hx' must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    for kind, tensors in (("hidden", hx), ("parameter", weights)):
        for tensor in tensors:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at "
                    f"{input.device} and {kind} tensor at {tensor.device}"
                )
    if batch_sizes is None:
        batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    else:
        # The tensor's first entry is read nowhere else: the states say how large the batch is.
        batch = hx[0].shape[1] if torch.compiler.is_compiling() else int(batch_sizes[0])
    hidden_size, features = weights[1].shape[0] // 4, weights[1].shape[1]
    autocast = autocast_is_on(input.device.type)
    for weight in weights:
        if weight.dtype != input.dtype and not autocast:
            raise RuntimeError(
                f"Expected parameters of the dtype of the input, {input.dtype}, got {weight.dtype}"
            )
    for k, (state, size) in enumerate(zip(hx, (features, hidden_size), strict=True)):
        if tuple(state.shape) != (states, batch, size):
            raise RuntimeError(
                f"Expected hidden[{k}] size {(states, batch, size)}, got {list(state.shape)}"
            )
        if state.dtype != input.dtype and not autocast:
            raise RuntimeError(
                f"Expected hidden[{k}] to have the dtype of the input, {input.dtype}, "
                f"got {state.dtype}"
            )


def check_sequences(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    packed: bool,
    batch_first: bool,
) -> None:
    """Raise unless lengths and resets fit the input: kernels get pointers, aten packs."""
    leading = tuple(input.shape[:-1])
    if batch_first and not packed:
        leading = leading[::-1]
    batch = hx[0].shape[1] if packed else leading[1]
    rows, features = weights[1].shape
    modifiers = Modifiers(lengths, resets)
    check_modifiers(modifiers, leading, batch, features, rows // 4, input.dtype, input.device)


def fit(
    groups: list[DirectionWeights],
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    leading: tuple[int, ...],
    states: tuple[int, ...],
    directions: int,
) -> bool:
    """Whether tensors on a CPU fit each other: one look, where the checks would find the fault.

    Args:
        groups: weights of all layers and directions.
        input: [..., I].
        hx: h and c.
        leading: the expected shape of the input, without I.
        states: the expected shape of c, whose last dimension is H.
        directions: D.
    """
    if isinstance(hx, Tensor) or len(hx) != 2:
        return False
    (h, c), dtype = hx, input.dtype
    *outer, hidden = states
    rows, features = groups[0].hh.shape
    vector, inputs = (rows,), input.shape[-1]
    if (
        rows != 4 * hidden
        or input.shape != (*leading, inputs)
        or c.shape != states
        or h.shape != (*outer, features)
        or not (h.dtype is c.dtype is dtype and h.is_cpu and c.is_cpu)
    ):
        return False
    for k, (ih, hh, bias_ih, bias_hh, hr) in enumerate(groups):
        if k == directions:
            inputs = directions * features
        if (
            ih.shape != (rows, inputs)
            or hh.shape != (rows, features)
            or not (ih.dtype is hh.dtype is dtype and ih.is_cpu and hh.is_cpu)
        ):
            return False
        for bias in (bias_ih, bias_hh):
            if bias is not None and (
                bias.shape != vector or bias.dtype is not dtype or not bias.is_cpu
            ):
                return False
        if hr is not None and (
            hr.shape != (features, hidden) or hr.dtype is not dtype or not hr.is_cpu
        ):
            return False
    return True


def check_weights(groups: list[DirectionWeights], input: Tensor, directions: int) -> None:
    """Raise unless every weight fits the input and the others: kernels get pointers."""
    rows, features = groups[0].hh.shape
    for k, own in enumerate(groups):
        inputs = input.shape[-1] if k < directions else directions * features
        shapes = ((rows, inputs), (rows, features), (rows,), (rows,), (features, rows // 4))
        for name, weight, shape in zip(own._fields, own, shapes, strict=True):
            if weight is None:
                continue
            if weight.shape != shape:
                raise RuntimeError(
                    f"Expected weight {name} of layer {k // directions} to have size "
                    f"{list(shape)}, got {list(weight.shape)}"
                )
            if weight.dtype != input.dtype or weight.device != input.device:
                raise RuntimeError(
                    f"Expected weight {name} of layer {k // directions} to have the dtype and "
                    f"device of the input, {input.dtype} on {input.device}, got {weight.dtype} on "
                    f"{weight.device}"
                )


def check_cell(
    input: Tensor, hx: tuple[Tensor, Tensor], weight_ih: Tensor, weight_hh: Tensor
) -> None:
    """Raise what PyTorch's cell raises, with its texts."""
    if isinstance(hx, Tensor):
        raise TypeError("lstm_cell(): argument 'hx' must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    if input.shape[1] != weight_ih.shape[1]:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[1]} expected {weight_ih.shape[1]}"
        )
    hidden_size = weight_hh.shape[1]
    autocast = autocast_is_on(input.device.type)
    for name, tensor in zip(("weight_hh", "hidden0", "hidden1"), (weight_hh, *hx), strict=True):
        if tensor.dtype != input.dtype and not autocast:
            raise RuntimeError(
                f"Expected {name} to have the dtype of the input, {input.dtype}, got {tensor.dtype}"
            )
    for k, state in enumerate(hx):
        if state.device != input.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, found input at {input.device} and "
                f"hidden{k} at {state.device}"
            )
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size "
                f"{state.shape[0]}"
            )
        if state.shape[1] != hidden_size:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, "
                f"expected {hidden_size}"
            )
