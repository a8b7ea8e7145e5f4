"""The recurrence as two operators of `torch.library`, and the fallback between backends.

`torch.compile` and `torch.export` see opaque, well-typed operators that mutate nothing. Backends
are chosen inside, by the sizes of the moment; shapes and dtypes never depend on the backend.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h, `N` packed rows, `V` a
dimension mapped by `vmap`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_lstm import backends
from fused_lstm.backends import BackwardArguments, ForwardArguments, Problem
from fused_lstm.devices import autocast_is_on, describe_device, precision_of
from fused_lstm.errors import KernelFallbackWarning
from fused_lstm.modifiers import Modifiers, check_length_values, check_modifiers
from fused_lstm.reference import state_dtype

__all__ = [
    "autocast_off",
    "checked_lengths",
    "failed_kernels",
    "lstm_backward",
    "lstm_forward",
    "recurrence_problem",
    "run_on_backend",
]

Result = TypeVar("Result")

# Kernels that failed, as `_kernel` names them: they are not tried again.
_failed: set[tuple[object, ...]] = set()


def _kernel(backend: str, direction: str, problem: Problem) -> tuple[object, ...]:
    """Name a kernel by all that its code depends on."""
    additions = set(problem.additions) - {"return_cells"}
    normalized = "layer_norm" in additions
    modified = bool(additions - {"layer_norm"})
    sizes = (problem.device, problem.dtype, problem.precision, problem.hidden_size)
    return backend, direction, *sizes, normalized, modified


def failed_kernels(backend: str, problem: Problem) -> list[str]:
    """List the directions in which a backend's kernel has failed for such a problem."""
    return [d for d in ("forward", "backward") if _kernel(backend, d, problem) in _failed]


def recurrence_problem(
    gates: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    batch: int,
    packed: bool,
    modifiers: Modifiers,
    train: bool,
) -> Problem:
    """Describe one recurrence to the backends."""
    device = describe_device(gates.device)
    return Problem(
        device=device,
        dtype=gates.dtype,
        steps=gates.shape[0],
        batch=batch,
        hidden_size=gates.shape[-1] // 4,
        proj_size=0 if weight_hr is None else weight_hh.shape[1],
        packed=packed,
        training=train,
        additions=modifiers.names(),
        precision=precision_of(gates.dtype, device.type),
    )


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Keep autocast from rounding the sums of code that has chosen its dtypes itself."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def run_on_backend(
    direction: str,
    problem: Problem,
    name: str | None,
    launch: Callable[[backends.Backend], Result],
) -> Result:
    """Run `launch` on the chosen backend, and after a failure on the next one, with one warning."""
    chosen = backends.select_backend(problem, name)
    *faster, always_right = backends.ORDER[backends.ORDER.index(chosen) :]
    with autocast_off(problem.device.type):
        for candidate in faster:
            key = _kernel(candidate, direction, problem)
            support = backends.supports(candidate, problem)
            usable = support.ok and (support.default or candidate == chosen)
            if key in _failed or not usable:
                continue
            try:
                return launch(backends.get_backend(candidate))
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                # Whatever a compiler, driver or launcher raises: the result is still to be right.
                _failed.add(key)
                warnings.warn(
                    f"the {direction} kernel of the backend {candidate!r} failed for "
                    f"hidden_size={problem.hidden_size}, {problem.dtype} on {problem.device} and "
                    f"is not used again for it; the next backend runs. "
                    f"{type(error).__name__}: {error}",
                    KernelFallbackWarning,
                    stacklevel=2,
                )
        return launch(backends.get_backend(always_right))


def check_saved(
    activations: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    modifiers: Modifiers,
) -> None:
    """Raise unless what was saved for a backward pass still fits together: kernels get pointers.

    It need not: a parameter may have been given other memory (`.data`) since the forward pass, and
    hooks on saved tensors bring back what they like. Shapes are those of `lstm_backward`.

    Raises:
        RuntimeError: naming the tensor that does not fit the activations.
        ValueError: likewise, for a modifier.
    """
    *leading, rows = activations.shape
    hidden, batch = rows // 4, c0.shape[0]
    features = hidden if weight_hr is None else weight_hr.shape[0]
    own, device = activations.dtype, activations.device
    for name, tensor, shape, dtype in (
        ("weight_hh", weight_hh, (rows, features), own),
        ("weight_hr", weight_hr, (features, hidden), own),
        ("c0", c0, (batch, hidden), own),
        # Its dtype is the backend's own choice.
        ("c", c, (*leading, hidden), c.dtype),
    ):
        if tensor is not None and not (
            tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
        ):
            raise RuntimeError(
                f"{name}: expected {list(shape)} {dtype} on {device} in the backward pass, as in "
                f"the forward pass, got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if any(modifier is not None for modifier in modifiers):
        check_modifiers(modifiers, tuple(leading), batch, features, hidden, own, device)


@torch.library.custom_op("fused_lstm::checked_lengths", mutates_args=())
def checked_lengths(lengths: Tensor, steps: int) -> Tensor:
    """A copy of the lengths [B], once `check_length_values` has passed them.

    For programs that are recorded, and run later or on a batch of them.
    """
    check_length_values(lengths, steps)
    return lengths.clone()


@checked_lengths.register_fake
def _(lengths: Tensor, steps: int) -> Tensor:
    return torch.empty_like(lengths)


@checked_lengths.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], lengths: Tensor, steps: int) -> Any:
    return checked_lengths(lengths, steps), in_dims[0]


@torch.library.custom_op("fused_lstm::lstm_forward", mutates_args=())
def lstm_forward(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    cell_clip: float | None,
    reverse: bool,
    save_activations: bool,
    save_cells: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the recurrence.

    Args:
        gates: [T, B, 4H] or [N, 4H].
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] int64 on the CPU, or None.
        lengths: [B] int64 or None, and so for the other fields of `Modifiers`.
        resets: [T, B] or [N] bool.
        recurrent_mask: [B, P].
        zoneout_h: [T, B, P] or [N, P].
        zoneout_c: [T, B, H] or [N, H].
        cell_clip: above 0.
        reverse: whether time runs from T-1 to 0.
        save_activations: whether the activated gates are wanted.
        save_cells: whether the cell states are wanted.
        backend: a backend's name, or None.

    Returns:
        h, c, activations, h_n, c_n; see `reference.RecurrenceForward`. What is not saved is an
        empty tensor of shape [0].
    """
    modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip)
    if modifiers.names():
        # Compiled programs come unchecked, and kernels get pointers.
        features, (batch, hidden) = weight_hh.shape[1], c0.shape
        leading = tuple(gates.shape[:-1])
        check_modifiers(modifiers, leading, batch, features, hidden, gates.dtype, gates.device)
        check_length_values(lengths, gates.shape[0])
    problem = recurrence_problem(
        gates,
        weight_hh,
        weight_hr,
        h0.shape[0],
        batch_sizes is not None,
        modifiers,
        save_activations,
    )
    arguments = ForwardArguments(
        gates,
        weight_hh,
        h0,
        c0,
        weight_hr,
        batch_sizes,
        modifiers,
        reverse,
        save_activations,
        save_cells,
    )
    out = run_on_backend(
        "forward",
        problem,
        backends.requested_name(backend),
        lambda chosen: chosen.forward(arguments),
    )
    return out.h, out.c, out.activations, out.h_n, out.c_n


@lstm_forward.register_fake
def _(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    cell_clip: float | None,
    reverse: bool,
    save_activations: bool,
    save_cells: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    leading = gates.shape[:-1]
    return (
        gates.new_empty((*leading, weight_hh.shape[1])),
        gates.new_empty(
            (*leading, c0.shape[1]) if save_cells else (0,), dtype=state_dtype(gates.dtype)
        ),
        gates.new_empty(gates.shape if save_activations else (0,)),
        gates.new_empty(h0.shape),
        gates.new_empty(c0.shape),
    )


@torch.library.custom_op("fused_lstm::lstm_backward", mutates_args=())
def lstm_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    activations: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    cell_clip: float | None,
    reverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the recurrence's gradients; see `reference.recurrence_backward` for the equations.

    Returns:
        Gradients of gates, h0 and c0, and with a projection δĥ of all rows (else an empty tensor).
    """
    modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip)
    check_saved(activations, c, weight_hh, c0, weight_hr, modifiers)
    problem = recurrence_problem(
        activations,
        weight_hh,
        weight_hr,
        c0.shape[0],
        batch_sizes is not None,
        modifiers,
        True,
    )
    arguments = BackwardArguments(
        grad_h,
        grad_c,
        grad_h_n,
        grad_c_n,
        activations,
        c,
        weight_hh,
        c0,
        weight_hr,
        batch_sizes,
        modifiers,
        reverse,
    )
    grads = run_on_backend("backward", problem, backend, lambda chosen: chosen.backward(arguments))
    whole = activations.new_empty(0) if grads.h is None else grads.h
    return grads.gates, grads.h0, grads.c0, whole


@lstm_backward.register_fake
def _(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    activations: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    cell_clip: float | None,
    reverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = weight_hh.shape[1]
    whole = (0,) if weight_hr is None else (*activations.shape[:-1], features)
    return (
        activations.new_empty(activations.shape),
        activations.new_empty((c0.shape[0], features)),
        activations.new_empty(c0.shape),
        activations.new_empty(whole),
    )


# vmap: a mapped dimension of the activations becomes part of the batch, innermost, so that packed
# rows stay sorted by length. Mapped weights are different recurrences: they run one after another.


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[..., B, F] with a mapped dimension, or none yet, to [..., B·V, F]."""
    if dim is None:
        mapped = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], size, tensor.shape[-1])
    else:
        mapped = tensor.movedim(dim, -2)
    return mapped.flatten(-3, -2)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    """[..., B·V, F] to [..., B, V, F]."""
    *leading, rows, features = tensor.shape
    return tensor.reshape(*leading, rows // size, size, features)


def _fold_column(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[..., B] with a mapped dimension, or none yet, to [..., B·V]."""
    mapped = (
        tensor.unsqueeze(-1).expand(*tensor.shape, size)
        if dim is None
        else (tensor.movedim(dim, -1))
    )
    return mapped.flatten(-2, -1)


class _Positions(NamedTuple):
    """Where an operator's arguments are that a batching rule treats in a way of their own."""

    weights: tuple[int, ...]
    batch_sizes: int

    @property
    def columns(self) -> tuple[int, int]:
        """Of lengths and resets, which have no features."""
        return self.batch_sizes + 1, self.batch_sizes + 2


def _vmap_rule(
    operator: Callable[..., tuple[Tensor, ...]],
    info: Any,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
    positions: _Positions,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Fold, run and unfold."""
    size, weights = info.batch_size, positions.weights
    if in_dims[positions.batch_sizes] is not None:
        raise NotImplementedError(
            "vmap over batch_sizes: packed sequences must share their lengths"
        )
    if any(in_dims[k] is not None for k in weights):
        results = [
            operator(
                *(
                    arg if dim is None else arg.select(dim, v)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for v in range(size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(
            results[0]
        )
    folded = list(args)
    for k, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if k in weights or arg is None:
            continue
        if k == positions.batch_sizes:
            folded[k] = arg * size
        elif k in positions.columns:
            folded[k] = _fold_column(arg, dim, size)
        elif isinstance(arg, Tensor):
            folded[k] = _fold(arg, dim, size)
    outputs = operator(*folded)
    # What was not saved is empty, and the same for all.
    return (
        tuple(out if out.dim() == 1 else _unfold(out, size) for out in outputs),
        tuple(None if out.dim() == 1 else out.dim() - 1 for out in outputs),
    )


@lstm_forward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    return _vmap_rule(lstm_forward, info, in_dims, args, _Positions((1, 4), batch_sizes=5))


@lstm_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    return _vmap_rule(lstm_backward, info, in_dims, args, _Positions((6, 8), batch_sizes=9))
