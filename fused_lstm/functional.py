"""Stacks of LSTM layers around the recurrence: projections, biases, directions, dropout, packing.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of h (H,
or proj_size), `L` layers, `D` directions, `N` rows of a packed batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fused_lstm import backends, wavefront
from fused_lstm.backends import Problem
from fused_lstm.backends.aten import UNTRACEABLE, AtenBackend
from fused_lstm.backends.native import NativeBackend
from fused_lstm.checks import check_cell, check_sequences, check_tensors, check_weights, fit
from fused_lstm.devices import autocast_is_on, device_of, precision_of
from fused_lstm.errors import BackendUnavailableError
from fused_lstm.layer import (
    PLAIN,
    DirectionNorms,
    DirectionWeights,
    LayerOutput,
    composed_layer,
    native_layer,
)
from fused_lstm.modifiers import (
    Modifiers,
    check_length_values,
)
from fused_lstm.reference import check_batch_sizes
from fused_lstm.regularization import NO_REGULARIZATION, Regularization
from fused_lstm.stack import Stack, kept_by_dropout, run_stack
from fused_lstm.transforms import no_entry_for_compilers, recording_under_way, transform_under_way

__all__ = ["Normalization", "input_dtype", "layers_problem", "lstm", "lstm_cell"]


@no_entry_for_compilers
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_cells: bool = False,
    regularization: Regularization = NO_REGULARIZATION,
    normalization: Normalization | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Run a stack of LSTM layers; the functional form of `fused_lstm.LSTM`.

    Args:
        input: [T, B, I], [B, T, I] with batch_first, or packed rows [N, I] with batch_sizes.
        hx: h_0 [L·D, B, P] and c_0 [L·D, B, H].
        weights: for each layer and direction weight_ih, weight_hh, bias_ih and bias_hh (with
            bias), weight_hr (with a projection), in torch's order.
        batch_sizes: [T] int64 on the CPU for packed rows, as in `PackedSequence`; else None.
        bias: whether `weights` holds biases.
        num_layers: L.
        dropout: probability of zeroing an output of every layer but the last, in training.
        training: whether dropout and other masks are random.
        bidirectional: whether D is 2.
        batch_first: whether input and output are [B, T, ...]; packed rows are neither.
        lengths: [B] int64, steps of each sequence, or None; not with batch_sizes.
        resets: [T, B] (whatever batch_first says) or [N] bool, or None.
        return_cells: whether the cell states of the last layer are wanted.
        regularization: what else changes the recurrence.
        normalization: gains and biases of layer normalization, or None.
        backend: a backend's name, or None for the default choice.

    Returns:
        output, shaped as input with D·P features, h_n [L·D, B, P] and c_n [L·D, B, H]; with
        return_cells the cell states as well, shaped as output with D·H features.

    Raises:
        RuntimeError: if T is 0, or tensors lie on different devices, with torch's text.
        ValueError: if the backend is unknown, or a length is not between 0 and T.
        BackendUnavailableError: if the named backend cannot run the problem.
    """
    name = backends.check_name(backend)
    transform = transform_under_way()
    if transform != "compile":
        # A compiled program makes its choice when it runs, inside the operator.
        name = backends.requested_name(name)
    elif name == AtenBackend.name:
        raise BackendUnavailableError(f"backend={name!r} cannot run here: {UNTRACEABLE}")
    additions: tuple[str, ...] = ()
    if not (lengths is resets is None and regularization is NO_REGULARIZATION):
        additions = _additions(lengths, resets, regularization, training)
    if return_cells:
        additions = (*additions, "return_cells")
    if lengths is not None or resets is not None:
        check_sequences(input, hx, weights, lengths, resets, batch_sizes is not None, batch_first)
    if normalization is not None:
        additions = ("layer_norm", *additions)
    if training and regularization.weight_dropout:
        # In torch's order each layer and direction has its recurrent weights second.
        count = len(weights) // (num_layers * (2 if bidirectional else 1))
        weights = [
            torch.dropout(weight, regularization.weight_dropout, True) if k % count == 1 else weight
            for k, weight in enumerate(weights)
        ]
    native = False
    if transform != "compile" and name in _WHOLE_LAYERS:
        transform = transform or recording_under_way((input, *hx, *weights))
        problem = layers_problem(input, hx, weights, batch_sizes, batch_first, transform, additions)
        chosen = backends.select_backend(problem, name)
        # A normalized layer is composed of projections and a recurrence, which may be native.
        native = chosen == NativeBackend.name and not transform and normalization is None
        if chosen == AtenBackend.name:
            check_length_values(lengths, problem.steps)
            aten = cast(AtenBackend, backends.get_backend(AtenBackend.name))
            return aten.layers(
                input,
                hx,
                weights,
                batch_sizes=batch_sizes,
                bias=bias,
                num_layers=num_layers,
                dropout=dropout,
                training=training,
                bidirectional=bidirectional,
                batch_first=batch_first,
                lengths=lengths,
            )
    directions = 2 if bidirectional else 1
    states = num_layers * directions
    x = input
    if native:
        check_length_values(lengths, problem.steps)
        x, hx, groups = _prepare_for_native(
            problem, input, hx, weights, batch_sizes, batch_first, bias, states, directions
        )
    else:
        check_tensors(input, hx, weights, batch_sizes, batch_first, states)
        groups = _by_direction(weights, bias, states)
    first = batch_first and batch_sizes is None
    stack = _Stack(num_layers, directions, dropout, training, regularization, lengths, resets)
    if states > 1 and not native and transform != "compile":
        transform = transform or recording_under_way((input, *hx, *weights))
        problem = layers_problem(input, hx, weights, batch_sizes, batch_first, transform, additions)
        problem = problem._replace(whole_layers=False)
        if wavefront.runs_together(problem, name, num_layers, directions):
            return _stack_together(
                stack, problem, name, x, hx, weights, batch_sizes, bias, first, return_cells
            )
    if native:
        run = functools.partial(native_layer, batch_sizes=batch_sizes)
    else:
        run = functools.partial(composed_layer, batch_sizes=batch_sizes, backend=name)
    return _stack_of_layers(run, stack, x, hx, groups, normalization, first, return_cells)


def _additions(
    lengths: Tensor | None,
    resets: Tensor | None,
    regularization: Regularization,
    training: bool,
) -> tuple[str, ...]:
    """Name what no `torch.nn.LSTM` does; see `Problem.additions`."""
    names = regularization.names(training)
    if lengths is not None:
        names = ("lengths", *names)
    return names if resets is None else ("resets", *names)


# Backends that compute whole layers, and None: the choice may fall on one of them.
_WHOLE_LAYERS = (None, NativeBackend.name, AtenBackend.name)


def input_dtype(input: Tensor, device_type: str) -> torch.dtype:
    """Dtype in which the layers compute: the input's, or the one autocast chooses."""
    return torch.get_autocast_dtype(device_type) if autocast_is_on(device_type) else input.dtype


def layers_problem(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    batch_first: bool,
    transform: str,
    additions: tuple[str, ...],
) -> Problem:
    """Describe a stack of layers to the backends."""
    rows, features = weights[1].shape
    if torch._C._is_tracing():
        # Sizes are tensors here; a traced program chooses once, for every length and batch.
        steps = batch = 0
        rows, features = int(rows), int(features)
    elif batch_sizes is not None:
        steps, batch = batch_sizes.shape[0], hx[0].shape[1]
    else:
        batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    device = device_of(input)
    autocast = autocast_is_on(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else input.dtype
    # By position: this runs at every call of every layer.
    return Problem(
        device,
        dtype,
        steps,
        batch,
        rows // 4,
        0 if 4 * features == rows else features,
        batch_sizes is not None,
        torch.is_grad_enabled(),
        autocast,
        True,
        transform,
        False,
        additions,
        precision_of(dtype, device.type),
    )


def _by_direction(weights: list[Tensor], bias: bool, states: int) -> list[DirectionWeights]:
    """Group the flat weights by layer and direction, `states` groups of them."""
    hidden_size, features = weights[1].shape[0] // 4, weights[1].shape[1]
    projected = features != hidden_size
    count = 2 + 2 * bias + projected
    if len(weights) != states * count:
        raise RuntimeError(
            f"Expected {states * count} weights, {count} for each layer and direction, got "
            f"{len(weights)}"
        )
    groups = []
    for start in range(0, len(weights), count):
        group = weights[start : start + count]
        groups.append(
            DirectionWeights(
                group[0],
                group[1],
                group[2] if bias else None,
                group[3] if bias else None,
                group[-1] if projected else None,
            )
        )
    return groups


class Normalization(NamedTuple):
    """Layer normalization of a stack.

    Attributes:
        directions: for each layer and direction, in the order of the weights.
        eps: added to the variances.
    """

    directions: list[DirectionNorms]
    eps: float


class _Stack(NamedTuple):
    """What the layers of a stack have in common; see `lstm`."""

    num_layers: int
    directions: int
    dropout: float
    training: bool
    regularization: Regularization
    lengths: Tensor | None
    resets: Tensor | None

    def modifiers(
        self, x: Tensor, batch_first: bool, h_0: Tensor, c_0: Tensor
    ) -> Sequence[Modifiers]:
        """What changes the recurrence of one layer, in each direction: masks are drawn here."""
        plain = self.regularization is NO_REGULARIZATION
        if plain and self.lengths is None and self.resets is None:
            return PLAIN
        leading = tuple(x.shape[:-1])
        dtype = input_dtype(x, x.device.type)
        batch, features = h_0.shape[-2:]
        return [
            self.regularization.draw(
                leading[::-1] if batch_first else leading,
                batch,
                features,
                c_0.shape[-1],
                x.device,
                dtype,
                self.training,
            )._replace(lengths=self.lengths, resets=self.resets)
            for _ in range(self.directions)
        ]


def _stack_of_layers(
    run: Callable[..., LayerOutput],
    stack: _Stack,
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    groups: list[DirectionWeights],
    normalization: Normalization | None,
    batch_first: bool,
    return_cells: bool,
) -> tuple[Tensor, ...]:
    """Run the layers one after another: `run` is `native_layer` or `composed_layer`."""
    num_layers, directions, dropout, training, *_ = stack
    x, cells = input, None
    h_n, c_n = [], []
    for layer in range(num_layers):
        own = slice(layer * directions, (layer + 1) * directions)
        first, last = batch_first and layer == 0, layer == num_layers - 1
        h_0, c_0 = hx if num_layers == 1 else (hx[0][own], hx[1][own])
        modifiers = stack.modifiers(x, first, h_0, c_0)
        norms = {}
        if normalization is not None:
            norms = {"norms": normalization.directions[own], "eps": normalization.eps}
        x, h_last, c_last, cells = run(
            x,
            h_0,
            c_0,
            groups[own],
            modifiers=modifiers,
            batch_first=first,
            return_cells=return_cells and last,
            **norms,
        )
        h_n.append(h_last)
        c_n.append(c_last)
        if dropout != 0 and training and not last:
            x = torch.dropout(x, dropout, True)
    outputs = [x] if cells is None else [x, cells]
    if batch_first:
        outputs = [each.transpose(0, 1) for each in outputs]
    states = (h_n[0], c_n[0]) if num_layers == 1 else (torch.cat(h_n), torch.cat(c_n))
    return outputs[0], *states, *outputs[1:]


def _stack_together(
    stack: _Stack,
    problem: Problem,
    name: str | None,
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    batch_first: bool,
    return_cells: bool,
) -> tuple[Tensor, ...]:
    """Run all layers in one go: their recurrences share launches (wavefront.py).

    Random numbers are drawn in the order of `_stack_of_layers`.
    """
    num_layers, directions, dropout, training, _, lengths, _ = stack
    check_length_values(lengths, problem.steps)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, x.shape[0], "input")
    if problem.autocast:
        x, hx, weights = _cast(problem.dtype, x, hx, weights)
    groups = _by_direction(weights, bias, num_layers * directions)
    check_weights(groups, x, directions)
    if batch_first:
        x = x.transpose(0, 1)
    modifiers: list[Modifiers] = []
    kept = []
    for layer in range(num_layers):
        own = slice(layer * directions, (layer + 1) * directions)
        modifiers += stack.modifiers(x, False, hx[0][own], hx[1][own])[:directions]
        if dropout != 0 and training and layer < num_layers - 1:
            kept.append(kept_by_dropout(x, directions * problem.hidden_size, dropout))
    whole = Stack(
        num_layers, directions, problem, name, batch_sizes, modifiers, kept, dropout, return_cells
    )
    output, h_n, c_n, cells = run_stack(whole, x, *hx, groups)
    outputs = [output] if cells is None else [output, cells]
    if batch_first:
        outputs = [each.transpose(0, 1) for each in outputs]
    return outputs[0], h_n, c_n, *outputs[1:]


def _prepare_for_native(
    problem: Problem,
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    batch_first: bool,
    bias: bool,
    states: int,
    directions: int,
) -> tuple[Tensor, tuple[Tensor, Tensor], list[DirectionWeights]]:
    """Return input, states and grouped weights as the native kernels may have them, or raise."""
    x = input
    if problem.autocast:
        # As torch's operator does: all in one dtype, and so the results.
        x, hx, weights = _cast(problem.dtype, input, hx, weights)
    groups = _by_direction(weights, bias, states)
    steps, batch = problem.steps, problem.batch
    leading: tuple[int, ...] = (batch, steps) if batch_first else (steps, batch)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, input.shape[0], "input")
        batch = int(batch_sizes[0])
        leading = (input.shape[0],)
    shape = (states, batch, problem.hidden_size)
    if not (steps and fit(groups, x, hx, leading, shape, directions)):
        check_tensors(x, hx, weights, batch_sizes, batch_first, states)
        check_weights(groups, x, directions)
        # Nothing has a pointer taken of it that `fit` has not passed.
        raise RuntimeError("Expected input, states and weights that fit each other")
    return x, hx, groups


def _cast(
    dtype: torch.dtype, input: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """Everything in one dtype, differentiably."""
    h, c = hx
    return input.to(dtype), (h.to(dtype), c.to(dtype)), [weight.to(dtype) for weight in weights]


@no_entry_for_compilers
def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one step of an LSTM; the functional form of `fused_lstm.LSTMCell`.

    Args:
        input: [B, I].
        hx: h [B, H] and c [B, H].
        weight_ih: [4H, I].
        weight_hh: [4H, H].
        bias_ih: [4H] or None.
        bias_hh: [4H] or None.
        backend: a backend's name, or None for the default choice.

    Returns:
        h [B, H] and c [B, H] after the step.

    Raises:
        ValueError: if the backend is unknown.
        RuntimeError: for sizes that do not fit, with torch's text.
        BackendUnavailableError: if the named backend cannot run the problem.
    """
    name = backends.check_name(backend)
    # A compiler takes PyTorch's cell apart; the other transforms have no rule for it.
    transform = transform_under_way()
    weights = DirectionWeights(weight_ih, weight_hh, bias_ih, bias_hh, None)
    if transform == "compile":
        if name in (None, AtenBackend.name):
            return torch._VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    else:
        name = backends.requested_name(name)
        if name in _WHOLE_LAYERS:
            transform = transform or recording_under_way((input, *hx, *weights))
            device = device_of(input)
            autocast = autocast_is_on(device.type)
            problem = Problem(
                device,
                torch.get_autocast_dtype(device.type) if autocast else input.dtype,
                1,
                input.shape[0],
                weight_hh.shape[1],
                training=torch.is_grad_enabled(),
                autocast=autocast,
                whole_layers=True,
                transform=transform,
                cell=True,
            )
            chosen = backends.select_backend(problem, name)
            if chosen == AtenBackend.name:
                return torch._VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
            if chosen == NativeBackend.name and not transform:
                x = input
                if autocast:
                    dtype = torch.get_autocast_dtype(device.type)
                    x, hx, _ = _cast(dtype, input, hx, [])
                    weights = DirectionWeights(
                        *(w if w is None else w.to(dtype) for w in weights)  # type: ignore[arg-type]
                    )
                states = (x.shape[0], weight_hh.shape[1])
                if not fit([weights], x, hx, states[:1], states, 1):
                    check_cell(x, hx, weights.ih, weights.hh)
                    check_weights([weights], x, 1)
                    raise RuntimeError("Expected input, states and weights that fit each other")
                h, c = native_layer(x, *hx, [weights])[1:3]
                return h, c
    check_cell(input, hx, weight_ih, weight_hh)
    x, h_0, c_0 = (tensor.unsqueeze(0) for tensor in (input, *hx))
    h, c = composed_layer(x, h_0, c_0, [weights], backend=name)[1:3]
    return h[0], c[0]
