"""`explain`: which backend runs a layer, how, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_lstm import backends, ops, wavefront
from fused_lstm.backends import Problem
from fused_lstm.devices import DeviceDescription, autocast_is_on, describe_device, precision_of
from fused_lstm.errors import BackendUnavailableError
from fused_lstm.functional import input_dtype
from fused_lstm.module import LSTM

__all__ = ["Explanation", "explain"]

# The input that is explained when none is given.
_NOMINAL_STEPS = 100
_NOMINAL_BATCH = 32


@dataclass(frozen=True)
class Explanation:
    """The choice of a backend; printable.

    Attributes:
        backend: name of the backend that runs the problem; "" if the one asked for cannot.
        reasons: for each backend, in order of preference, how it would run the problem or why
            it cannot or does not.
        problem: what the choice depended on.
        description: the problem in words.
    """

    backend: str
    reasons: dict[str, str]
    problem: Problem
    description: str

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = [self.description]
        for name, reason in self.reasons.items():
            mark = "->" if name == self.backend else "  "
            lines.append(f"{mark} {name:<{width}}  {reason}")
        return "\n".join(lines)


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence | None = None,
    hx: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    return_cells: bool = False,
    device: str | torch.device | DeviceDescription | None = None,
) -> Explanation:
    """Tell which backend runs a layer, how, and why the others do not.

    Nothing is computed or compiled.

    Args:
        module: an `LSTM` or `LSTMCell`, torch's or fused.
        input: what the layer would be called with; if None, 100 steps of a batch of 32.
        hx: what the layer would be called with; the choice does not depend on it.
        lengths: what the layer would be called with; the choice depends on whether it is given.
        resets: likewise.
        return_cells: likewise.
        device: where to run, instead of where the module is: a torch device, or a GPU that need
            not be at hand, such as "sm_90" (NVIDIA Hopper) or "gfx942" (AMD MI300).

    Returns:
        An Explanation: `.backend`, `.reasons`, and a table as its text.

    Raises:
        TypeError: if module is not an LSTM or LSTMCell.
        ValueError: if device is neither a torch device nor a GPU architecture.
    """
    if not isinstance(module, (nn.LSTM, nn.LSTMCell)):
        raise TypeError(f"module should be an LSTM or LSTMCell, got: {type(module).__name__}")
    demands = {"resets": resets is not None, "lengths": lengths is not None}
    demands |= dict.fromkeys(_own_additions(module), True) | {"return_cells": return_cells}
    additions = tuple(name for name, wanted in demands.items() if wanted)
    problem = _problem(module, input, device, additions)
    own = backends.check_name(getattr(module, "backend", None))
    asked_for = backends.requested_name(own)
    try:
        chosen = backends.select_backend(problem, asked_for)
    except BackendUnavailableError:
        chosen = ""
    reasons = {name: _reason(name, problem, chosen, asked_for) for name in backends.ORDER}
    if chosen and isinstance(module, nn.LSTM):
        sizes = module.num_layers, 2 if module.bidirectional else 1
        if wavefront.runs_together(problem, asked_for, *sizes):
            reasons[chosen] += f"; {wavefront.describe(problem, *sizes)}"
    return Explanation(chosen, reasons, problem, _describe(module, problem))


def _problem(
    module: nn.LSTM | nn.LSTMCell,
    input: Tensor | PackedSequence | None,
    device: str | torch.device | DeviceDescription | None,
    additions: tuple[str, ...],
) -> Problem:
    """Describe what calling `module` with `input` would ask of the backends."""
    cell = isinstance(module, nn.LSTMCell)
    weight = cast(Tensor, module.weight_ih if cell else module.weight_ih_l0)
    packed = isinstance(input, PackedSequence)
    data = input.data if isinstance(input, PackedSequence) else input
    steps, batch = _NOMINAL_STEPS, _NOMINAL_BATCH
    if isinstance(input, PackedSequence):
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
    elif cell:
        steps = 1
        if data is not None:
            batch = data.shape[0] if data.dim() == 2 else 1
    elif data is not None:
        leading = data.shape[:2] if data.dim() == 3 else (data.shape[0], 1)
        batch_first = data.dim() == 3 and bool(module.batch_first)
        steps, batch = leading[::-1] if batch_first else leading
    where = device if device is not None else (weight if data is None else data).device
    description = describe_device(where)
    dtype = input_dtype(weight if data is None else data, description.type)
    return Problem(
        device=description,
        dtype=dtype,
        steps=steps,
        batch=batch,
        hidden_size=module.hidden_size,
        proj_size=module.proj_size if isinstance(module, nn.LSTM) else 0,
        packed=packed,
        training=torch.is_grad_enabled(),
        autocast=autocast_is_on(description.type),
        whole_layers=True,
        cell=cell,
        additions=additions,
        precision=precision_of(dtype, description.type),
    )


def _own_additions(module: nn.Module) -> tuple[str, ...]:
    """Name the options of a module that its backend has to have."""
    if not isinstance(module, LSTM):
        return ()
    names = module._regularization().names(module.training)
    return names if module._normalization() is None else ("layer_norm", *names)


def _reason(name: str, problem: Problem, chosen: str, asked_for: str | None) -> str:
    support = backends.supports(name, problem)
    failed = ops.failed_kernels(name, problem)
    if failed:
        return f"its {' and '.join(failed)} kernel failed here, the next backend runs instead"
    if name == chosen:
        how = "asked for by name" if asked_for else "the first that can run it"
        return f"{how}: {support.reason}"
    if not support.ok:
        return f"cannot run it: {support.reason}"
    if not support.default:
        return f"not chosen by default: {support.reason}"
    if asked_for:
        return f"{asked_for} was asked for by name: {support.reason}"
    return f"not needed: {support.reason}"


def _describe(module: nn.Module, problem: Problem) -> str:
    """One line: the layer, the input, the device."""
    kind = "packed input" if problem.packed else "input"
    purpose = "training" if problem.training else "inference"
    if problem.additions:
        purpose += f", with {', '.join(problem.additions)}"
    return (
        f"{type(module).__name__}({module.extra_repr()}) on {problem.device}: {kind} of "
        f"{problem.steps} steps × {problem.batch} sequences, {str(problem.dtype)[6:]}, {purpose}"
    )
