"""What is looking at the computation, besides autograd: compilers, transforms, recordings.

Kernels read memory. These want to see PyTorch's operators instead, or come with tensors whose
memory does not hold their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "PLAIN_TENSORS",
    "dual_numbers_under_way",
    "hidden_observer",
    "no_entry_for_compilers",
    "readable",
    "recording_under_way",
    "transform_under_way",
]

Function = TypeVar("Function", bound=Callable[..., object])


def no_entry_for_compilers(function: Function) -> Function:
    """Keep `torch.compile` from starting at `function`; it may still go through it.

    The compiler stops at every RNN module (unless `torch._dynamo.config.allow_rnn`), runs it
    uncompiled, and would begin again at the first plain function below it. Run uncompiled, that
    function has PyTorch's fused operator to choose from; compiled, it has not.
    `torch.compiler.disable` would do more: it stops the compiler in a whole program, too.
    """
    eval_frame = torch._C._dynamo.eval_frame
    try:
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except AttributeError:
        # A torch that has no such thing is only slower, in models compiled around the layer.
        return function
    return function


def dual_numbers_under_way() -> bool:
    """Whether forward-mode differentiation is, outside of `torch.func`: tensors have tangents."""
    return forward_ad._current_level >= 0


def transform_under_way() -> str:
    """Name what is looking at the computation: "compile", "vmap", "jvp", or "" for nothing."""
    if torch.compiler.is_compiling():
        return "compile"
    if torch._C._are_functorch_transforms_active():
        return "vmap"
    if dual_numbers_under_way():
        return "jvp"
    return ""


def hidden_observer() -> bool:
    """Whether something looks on that is not seen by a look at tensors (`alike.tensors_like`)."""
    # The compiler follows this far, and no further.
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or dual_numbers_under_way()


# A kernel can read the memory of these classes alone.
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def recording_under_way(tensors: Iterable[Tensor | None]) -> str:
    """Name what wants to see PyTorch's operators: "trace", "modes" or "" for nothing.

    Modes are of `torch.utils._python_dispatch` (fake tensors, counters, `make_fx`); subclasses of
    Tensor count as one, because they may have no memory of their own, and so do lazy negations and
    zeros without memory.
    """
    if torch._C._is_tracing():
        return "trace"
    if torch._C._len_torch_dispatch_stack():
        return "modes"
    # A loop: a generator expression takes half as long again, at every call of every layer.
    for t in tensors:
        if t is not None and (type(t) not in PLAIN_TENSORS or t.is_neg() or t._is_zerotensor()):
            return "modes"
    return ""


def readable(grads: Iterable[Tensor | None]) -> bool:
    """Whether a kernel can read gradients: not where one stands for a batch of them, or others."""
    for grad in grads:
        if grad is not None and (
            type(grad) is not Tensor
            or grad.is_neg()
            or grad._is_zerotensor()
            or torch._C._functorch.is_legacy_batchedtensor(grad)
        ):
            return False
    # Gradients may have tangents, though nothing had any in the forward pass.
    return not (torch._C._are_functorch_transforms_active() or dual_numbers_under_way())
