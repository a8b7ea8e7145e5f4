"""Whether tensors are like others that were looked at before: one question instead of dozens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Alike", "tensors_like"]

Alike = Callable[..., bool]


def tensors_like(tensors: Sequence[Tensor]) -> Alike | None:
    """Return what tells whether as many other tensors are like these in all but their values.

    That is in class, dtype, device, sizes and strides, in whether a gradient is recorded, and in
    what PyTorch's dispatcher would do with them: lazy negations, zeros without memory and tensors
    of a transform differ from others, as do all while autocast, inference mode, tracing or a
    transform are on. Freed memory is not seen, and not every mode of
    `torch.utils._python_dispatch`.

    It is the question by which PyTorch's compiler knows what a graph was compiled for, here for
    0.1 microseconds a tensor. It is put with tensors, and keeps none of them. Where one of these is
    given more than once, one is in the same places of others that are like them, and nowhere else.

    Args:
        tensors: what others are to be like.

    Returns:
        The question; None where this PyTorch has no such thing.
    """
    first: dict[int, int] = {}
    same = [first.setdefault(id(tensor), k) for k, tensor in enumerate(tensors)]
    if len(first) < len(tensors):
        return _with_repetitions(tensors, same)
    try:
        guards: Any = torch._C._dynamo.guards.TensorGuards
        alike: Alike = guards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        ).check
        return alike if alike(*tensors) else None
    except (AttributeError, TypeError):
        return None


def _with_repetitions(tensors: Sequence[Tensor], same: list[int]) -> Alike | None:
    """Of tensors of which the first that is the same as the k-th is `same[k]`."""
    kept = sorted(set(same))
    question = tensors_like([tensors[k] for k in kept])
    if question is None:
        return None
    pairs = [(k, first) for k, first in enumerate(same) if k != first]

    def alike(*others: Tensor) -> bool:
        for k, first in pairs:
            if others[k] is not others[first]:
                return False
        return question(*[others[k] for k in kept])

    return alike
