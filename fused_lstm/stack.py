"""A whole stack of layers whose recurrences share launches, as wavefront.py arranges them.

Only for the backend that launches several recurrences at a time ("cuda"); should it fail, the next
one computes the same stack in plain order. While a launch runs, the gates of layer 0's next chunk,
which wait for nothing, are computed beside it, on a second stream.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `L` layers, `D`
directions, `S` = L·D recurrences (layer by layer), `N` rows of a packed batch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_lstm import ops
from fused_lstm.backends import (
    Backend,
    BackwardArguments,
    ForwardArguments,
    Problem,
    RecurrenceGradients,
)
from fused_lstm.devices import input_precision
from fused_lstm.layer import DirectionWeights, composed_layer, grouped, within_lengths
from fused_lstm.modifiers import NO_MODIFIERS, Modifiers
from fused_lstm.ops import autocast_off
from fused_lstm.recurrence import differentiable_gradients, weight_hh_gradient
from fused_lstm.reference import RecurrenceForward, state_dtype
from fused_lstm.transforms import readable
from fused_lstm.wavefront import TOGETHER, Piece, chunk_lengths, schedule

__all__ = ["LSTMStackFunction", "Stack", "kept_by_dropout", "launches", "run_stack"]


# ---- what runs beside the launches


class _Stream(Protocol):
    """What is used of `torch.cuda.Stream`."""

    def wait_stream(self, stream: Any) -> None: ...


class _Beside:
    """A second stream, ordered with the current one by events alone; or, on a CPU, no second one.

    Nothing is allocated on it: memory freed by the current stream would have to wait for it.

    Args:
        current: the stream that launches are on; None for a device without streams.
        side: the second one.
        on: makes a stream the current one.
    """

    def __init__(
        self,
        current: _Stream | None = None,
        side: _Stream | None = None,
        on: Callable[[Any], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._current, self._side, self._on = current, side, on
        self._forked = False

    def fork(self) -> None:
        """Let what is put on the second stream from now on begin: it sees all work so far."""
        if self._side is not None:
            self._side.wait_stream(self._current)
            self._forked = True

    def run(self) -> AbstractContextManager[Any]:
        """Put what is launched in this context on the second stream."""
        return self._on(self._side)

    def join(self) -> None:
        """Let what is launched from now on see all work of the second stream.

        A stream that has not been forked is no part of a CUDA graph that may be being captured.
        """
        if self._current is not None and self._forked:
            self._current.wait_stream(self._side)
            self._forked = False

    def __enter__(self) -> _Beside:
        return self

    def __exit__(self, *exception: object) -> None:
        # After an error, too: what the second stream reads is about to be freed.
        self.join()


def _beside(device: torch.device) -> _Beside:
    """The stream beside a device's current one."""
    if device.type != "cuda":
        return _Beside()
    current = torch.cuda.current_stream(device)
    return _Beside(current, _side_stream(device, current.cuda_stream), torch.cuda.stream)


@functools.lru_cache(maxsize=64)
def _side_stream(device: torch.device, current: int) -> torch.cuda.Stream:
    """One for each stream, always the same: cuBLAS keeps a workspace for every stream it sees."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


# ---- launches


class Cut(NamedTuple):
    """What a launch has to know of the sequences that its pieces were cut from.

    Attributes:
        wide: whether c0 and c_n, grad_h_n, grad_c_n, grad_h0 and grad_c0 are in the state's dtype:
            cutting a sequence into chunks rounds nothing.
        width: pieces of the largest launch of all, for which the kernel is chosen.
        rooms: of each piece, where its h, c and activations go, or its grad_gates: parts of whole
            sequences' tensors, empty where nothing is saved. None for new tensors.
    """

    wide: bool
    width: int
    rooms: Sequence[tuple[Tensor | None, ...]]


class Launches(NamedTuple):
    """How a backend computes pieces that do not depend on each other.

    Attributes:
        forward: computes a list of pieces, given how they are cut.
        backward: differentiates a list of pieces, likewise.
        several: whether it computes them side by side. Only such a backend is given pieces that are
            cut in time.
    """

    forward: Callable[[Sequence[ForwardArguments], Cut], list[RecurrenceForward]]
    backward: Callable[[Sequence[BackwardArguments], Cut], list[RecurrenceGradients]]
    several: bool


def launches(backend: Backend) -> Launches:
    """How `backend` computes several recurrences."""
    if backend.name == TOGETHER:
        return Launches(_forward_together, _backward_together, several=True)
    return Launches(
        lambda pieces, cut: [backend.forward(piece) for piece in pieces],
        lambda pieces, cut: [backend.backward(piece) for piece in pieces],
        several=False,
    )


def _forward_together(pieces: Sequence[ForwardArguments], cut: Cut) -> list[RecurrenceForward]:
    """Compute pieces in one launch of the CUDA kernels."""
    from fused_lstm.kernels import cuda as kernels

    results = kernels.lstm_forward_many(
        [
            kernels.ForwardProblem(
                *piece[:4], piece.batch_sizes, *piece.modifiers, piece.reverse, *room
            )
            for piece, room in zip(pieces, cut.rooms, strict=True)
        ],
        save_activations=pieces[0].save_activations,
        save_cells=pieces[0].save_cells,
        input_precision=input_precision(),
        wide_states=cut.wide,
        planned=cut.width,
    )
    return [RecurrenceForward(*result) for result in results]


def _backward_together(pieces: Sequence[BackwardArguments], cut: Cut) -> list[RecurrenceGradients]:
    """Differentiate pieces in one launch of the CUDA kernels."""
    from fused_lstm.kernels import cuda as kernels

    results = kernels.lstm_backward_many(
        [
            kernels.BackwardProblem(
                *piece[:8], piece.batch_sizes, *piece.modifiers, piece.reverse, *room
            )
            for piece, room in zip(pieces, cut.rooms, strict=True)
        ],
        input_precision=input_precision(),
        wide_states=cut.wide,
        planned=cut.width,
    )
    return [RecurrenceGradients(gates, h0, c0, None) for gates, h0, c0 in results]


# ---- a stack


class Stack(NamedTuple):
    """What a stack computes with, next to its input, states and weights.

    Attributes:
        layers: L.
        directions: D.
        problem: one of its recurrences.
        backend: a backend's name, or None for the default choice.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: S of them, with the same lengths, resets and cell_clip.
        kept: of each layer but the last, [T, B, D·H] or [N, D·H] bool: what dropout leaves; empty
            without dropout.
        dropout: the probability behind `kept`.
        return_cells: whether the last layer's cell states are wanted.
    """

    layers: int
    directions: int
    problem: Problem
    backend: str | None
    batch_sizes: Tensor | None
    modifiers: Sequence[Modifiers]
    kept: Sequence[Tensor] = ()
    dropout: float = 0.0
    return_cells: bool = False

    def own(self, layer: int) -> slice:
        """A layer's recurrences among all."""
        return slice(layer * self.directions, (layer + 1) * self.directions)

    def number(self, piece: Piece) -> int:
        """A piece's recurrence among all."""
        return piece.layer * self.directions + piece.direction

    @property
    def dropout_scale(self) -> float:
        """The factor of what dropout leaves."""
        return 0.0 if self.dropout == 1 else 1 / (1 - self.dropout)

    def after_dropout(self, x: Tensor, layer: int, rows: slice, out: Tensor) -> None:
        """Write to `out` what dropout makes of some rows of a layer's output, or their gradient."""
        torch.mul(x, self.kept[layer][rows], out=out).mul_(self.dropout_scale)


def kept_by_dropout(like: Tensor, features: int, p: float) -> Tensor:
    """Draw what dropout of [..., features] keeps, by the random numbers of `torch.dropout`.

    Args:
        like: [..., I], a tensor whose leading dimensions, dtype and device it takes.
        features: of the layer's output.
        p: probability of zeroing.
    """
    ones = torch.ones((*like.shape[:-1], features), dtype=like.dtype, device=like.device)
    return torch.dropout(ones, p, True) != 0


class _Saved(NamedTuple):
    """What the backward pass needs.

    Attributes:
        c: S tensors [T, B, H] or [N, H], in the state's dtype.
        activations: S tensors [T, B, 4H] or [N, 4H].
        outputs: L tensors [T, B, D·H] or [N, D·H].
        dropped: L − 1 tensors, what dropout made of the outputs; none without dropout.
    """

    c: list[Tensor]
    activations: list[Tensor]
    outputs: list[Tensor]
    dropped: list[Tensor]


class _Outputs(NamedTuple):
    """What a stack computes: output, h_n, c_n, cell states of the last layer, and what is saved."""

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    cells: Tensor | None
    saved: _Saved


def run_stack(
    stack: Stack, x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[DirectionWeights]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute a stack whose recurrences share launches.

    Args:
        stack: what to compute with.
        x: [T, B, I], any strides, or [N, I].
        h_0: [S, B, H].
        c_0: [S, B, H].
        weights: S of them, without projections.

    Returns:
        output [T, B, D·H] or [N, D·H], h_n and c_n [S, B, H], and, if wanted, the cell states of
        the last layer, like output; all in the dtype of x.
    """
    lengths = stack.modifiers[0].lengths
    if lengths is not None:
        x = within_lengths(x, lengths, batch_first=False)
    # Rows below each other, as the products take them.
    x = x.contiguous()
    flat = [weight for own in weights for weight in own[:_WEIGHTS]]
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h_0, c_0, *flat)
    ):
        tensors = [t for own in stack.modifiers for t in own[2:5]]
        first = stack.modifiers[0]
        outputs: tuple[Tensor, ...] = LSTMStackFunction.apply(  # type: ignore[no-untyped-call]
            stack._replace(batch_sizes=None, modifiers=(), kept=()),
            first.cell_clip,
            x,
            h_0,
            c_0,
            *flat,
            stack.batch_sizes,
            first.lengths,
            first.resets,
            *tensors,
            *stack.kept,
        )
        output, h_n, c_n, *cells = outputs
        return output, h_n, c_n, cells[0] if cells else None
    return _forward(stack, x, h_0, c_0, weights, save=False)[:4]


def _forward(
    stack: Stack,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[DirectionWeights],
    save: bool,
) -> _Outputs:
    """Compute a stack on the chosen backend, or the next one."""

    def launch(backend: Backend) -> _Outputs:
        how = launches(backend)
        steps = stack.problem.steps
        chunk = steps
        if how.several:
            chunk = chunk_lengths(stack.problem, stack.layers, stack.directions)[0]
        return _ForwardRun(stack, x, h_0, c_0, weights, how, chunk, save).outputs()

    return ops.run_on_backend("forward", stack.problem, stack.backend, launch)


def _modifiers_of(stack: Stack, piece: Piece) -> Modifiers:
    """What changes the steps of a piece."""
    modifiers = stack.modifiers[stack.number(piece)]
    start, stop = piece.start, piece.stop
    if modifiers is NO_MODIFIERS or (start == 0 and stop == stack.problem.steps):
        return modifiers

    def steps(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[start:stop]

    lengths = modifiers.lengths
    return modifiers._replace(
        lengths=None if lengths is None else (lengths - start).clamp_(0, stop - start),
        resets=steps(modifiers.resets),
        zoneout_h=steps(modifiers.zoneout_h),
        zoneout_c=steps(modifiers.zoneout_c),
    )


class _Run:
    """What a forward and a backward pass over the schedule have in common."""

    def __init__(self, stack: Stack, x: Tensor, how: Launches, chunk: int) -> None:
        self.stack = stack
        self.how = how
        self.chunk = chunk
        self.rows = len(x)
        self.is_cut = chunk < stack.problem.steps
        self.lists = schedule(stack.layers, stack.directions, stack.problem.steps, chunk)
        # Between chunks a cell state or a gradient is not rounded.
        self.states_in = state_dtype(x.dtype) if self.is_cut else x.dtype
        self._wide = self.states_in != x.dtype
        self._width = max(map(len, self.lists))

    def rows_of(self, piece: Piece) -> slice:
        """Where the rows of a piece are among all; packed ones are never cut."""
        if self.stack.batch_sizes is not None:
            return slice(0, self.rows)
        return slice(piece.start, piece.stop)

    def cut(self, rooms: Sequence[tuple[Tensor | None, ...]]) -> Cut:
        """What a launch is told, next to its pieces' arguments; see `Cut`."""
        return Cut(self._wide, self._width, rooms)


class _ForwardRun(_Run):
    """A forward pass over the schedule."""

    def __init__(
        self,
        stack: Stack,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weights: Sequence[DirectionWeights],
        how: Launches,
        chunk: int,
        save: bool,
    ) -> None:
        super().__init__(stack, x, how, chunk)
        self.weights = weights
        self.save = save
        # By recurrence.
        self.h: dict[int, Tensor] = {}
        self.c: dict[int, Tensor] = {}
        self.activations: dict[int, Tensor] = {}
        self.states = [(h, c.to(self.states_in)) for h, c in zip(h_0, c_0, strict=True)]
        # By layer.
        self.inputs = {0: x}
        self.layer_outputs: dict[int, Tensor] = {}
        self.projections = [self._projection(layer) for layer in range(stack.layers)]
        self.gates: dict[int, list[Tensor]] = {}

    def _projection(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Weights [I, D·4H] and biases [D·4H] of a layer's gates."""
        own = self.weights[self.stack.own(layer)]
        biases = [
            w.bias_ih + w.bias_hh for w in own if w.bias_ih is not None and w.bias_hh is not None
        ]
        if len(own) == 1:
            return own[0].ih.t(), biases[0] if biases else None
        return torch.cat([w.ih for w in own]).t(), torch.cat(biases) if biases else None

    def _room_for_gates(self, layer: int) -> list[Tensor]:
        """Where a layer's gates are: of one chunk, and, computed meanwhile, of layer 0's next."""
        x, (weight, _) = self.inputs[layer], self.projections[layer]
        chunks = 2 if layer == 0 and self.is_cut else 1
        rows = self.chunk if self.is_cut else self.rows
        return [x.new_empty((rows, *x.shape[1:-1], weight.shape[1])) for _ in range(chunks)]

    def _gates_of(self, piece: Piece) -> Tensor:
        """Room for the gates of all directions at the steps of a piece."""
        if piece.layer not in self.gates:
            self.gates[piece.layer] = self._room_for_gates(piece.layer)
        room, rows = self.gates[piece.layer], self.rows_of(piece)
        return room[piece.start // self.chunk % len(room)][: rows.stop - rows.start]

    def _project(self, piece: Piece) -> None:
        """Compute x·W_ihᵀ + b of all directions for the steps of a piece, in one product."""
        weight, bias = self.projections[piece.layer]
        x = self.inputs[piece.layer][self.rows_of(piece)].flatten(0, -2)
        out = self._gates_of(piece).flatten(0, -2)
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)

    def _arguments(self, piece: Piece) -> ForwardArguments:
        """A piece as the backend takes it."""
        number = self.stack.number(piece)
        gates = self._gates_of(piece)
        if self.stack.directions == 2:
            gates = gates.chunk(2, -1)[piece.direction]
        return ForwardArguments(
            gates,
            self.weights[number].hh,
            *self.states[number],
            None,
            self.stack.batch_sizes,
            _modifiers_of(self.stack, piece),
            piece.direction == 1,
            self.save,
            self.save or self.stack.return_cells,
        )

    def _room(self, piece: Piece) -> tuple[Tensor | None, ...]:
        """Where a piece's h, c and activations go: into what its recurrence has of all steps."""
        if not self.is_cut:
            return None, None, None
        number, rows = self.stack.number(piece), self.rows_of(piece)
        if number not in self.h:
            x, hidden = self.inputs[0], self.stack.problem.hidden_size
            leading, nothing = x.shape[:-1], (0,)
            cells = self.save or self.stack.return_cells
            self.h[number] = x.new_empty((*leading, hidden))
            self.c[number] = x.new_empty(
                (*leading, hidden) if cells else nothing, dtype=self.states_in
            )
            self.activations[number] = x.new_empty((*leading, 4 * hidden) if self.save else nothing)
        return self.h[number][rows], self.c[number][rows], self.activations[number][rows]

    def _keep(self, piece: Piece, out: RecurrenceForward) -> None:
        """Remember a piece's results; parts are where they belong already."""
        number = self.stack.number(piece)
        if not self.is_cut:
            self.h[number], self.c[number] = out.h, out.c
            self.activations[number] = out.activations
        self.states[number] = out.h_n, out.c_n

    def _pass_on(self, piece: Piece) -> None:
        """Give the layer above what it reads of a finished piece, of all directions."""
        layer, rows, stack = piece.layer, self.rows_of(piece), self.stack
        if stack.directions == 2:
            output = torch.cat([self.h.pop(2 * layer), self.h.pop(2 * layer + 1)], -1)
        else:
            output = self.h[layer]
        self.layer_outputs[layer] = output
        if layer == stack.layers - 1:
            return
        if stack.kept:
            if layer + 1 not in self.inputs:
                self.inputs[layer + 1] = torch.empty_like(output)
            stack.after_dropout(output[rows], layer, rows, self.inputs[layer + 1][rows])
        else:
            self.inputs[layer + 1] = output

    def _run(self) -> None:
        """Go through the schedule."""
        first = [p for pieces in self.lists for p in pieces if p.layer == p.direction == 0]
        following = dict(itertools.pairwise(first))
        self._project(first[0])
        with _beside(self.inputs[0].device) as beside:
            for pieces in self.lists:
                layers = [piece for piece in pieces if piece.direction == 0]
                for piece in layers:
                    if piece.layer > 0:
                        self._project(piece)
                ahead = following.get(pieces[0])
                beside.join()
                if ahead:
                    # Here, where the room for its gates has been read by the launch before.
                    beside.fork()
                results = self.how.forward(
                    [self._arguments(p) for p in pieces],
                    self.cut([self._room(p) for p in pieces]),
                )
                if ahead:
                    # Behind the launch, which is to find its multiprocessors free.
                    with beside.run():
                        self._project(ahead)
                for piece, out in zip(pieces, results, strict=True):
                    self._keep(piece, out)
                for piece in layers:
                    self._pass_on(piece)
                    if piece.stop == self.stack.problem.steps:
                        del self.gates[piece.layer]

    def outputs(self) -> _Outputs:
        """Compute the stack."""
        self._run()
        h_n, c_n = (torch.stack(states) for states in zip(*self.states, strict=True))
        stack = self.stack
        layers = range(stack.layers)
        c = [self.c[number] for number in range(len(self.states))]
        outputs = [self.layer_outputs[layer] for layer in layers]
        dtype, cells = outputs[-1].dtype, None
        if stack.return_cells:
            last = c[stack.own(stack.layers - 1)]
            cells = (last[0] if len(last) == 1 else torch.cat(last, -1)).to(dtype)
        saved = _Saved(
            c,
            [self.activations[number] for number in range(len(self.states))],
            outputs,
            [self.inputs[layer] for layer in layers[1:]] if stack.kept else [],
        )
        return _Outputs(outputs[-1], h_n, c_n.to(dtype), cells, saved)


class _Gradients(NamedTuple):
    """Gradients of a stack's arguments; None where they are not wanted.

    Attributes:
        x: like x.
        h_0: [S, B, H].
        c_0: [S, B, H].
        weights: of each recurrence, in the order of `DirectionWeights`, without the projection.
    """

    x: Tensor | None
    h_0: Tensor | None
    c_0: Tensor | None
    weights: list[Tensor | None]


class _BackwardRun(_Run):
    """A backward pass: the schedule in reverse; at a layer's end its weights, over all steps."""

    def __init__(
        self,
        stack: Stack,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weights: Sequence[DirectionWeights],
        saved: _Saved,
        grads: Sequence[Tensor | None],
        needed: Sequence[bool],
        how: Launches,
        chunk: int,
    ) -> None:
        super().__init__(stack, x, how, chunk)
        self.x, self.h_0, self.c_0 = x, h_0, c_0
        self.weights = weights
        self.saved = saved
        self.needed = needed
        self.lowest = self._lowest()
        grad_output, grad_h_n, grad_c_n, *grad_cells = grads
        count = stack.layers * stack.directions
        # Gradients of the states behind the piece that comes next.
        self.carried: list[tuple[Tensor | None, Tensor | None]] = [
            tuple(None if g is None else g[s].to(self.states_in) for g in (grad_h_n, grad_c_n))  # type: ignore[misc]
            for s in range(count)
        ]
        # By layer, and by recurrence.
        self.grad_outputs: dict[int, Tensor | None] = {stack.layers - 1: grad_output}
        self.grad_gates: dict[int, Tensor] = {}
        self.grad_weights: dict[int, list[Tensor | None]] = {}
        self.grad_x: Tensor | None = None
        self.grad_cells = grad_cells[0] if grad_cells else None
        if self.grad_cells is not None:
            self.grad_cells = self.grad_cells.to(state_dtype(x.dtype))

    def _lowest(self) -> int:
        """The lowest layer that has something to give."""
        if any(self.needed[:3]):
            return 0
        first = self.needed[3:].index(True)
        return first // (_WEIGHTS * self.stack.directions)

    def _part(self, grad: Tensor | None, piece: Piece) -> Tensor | None:
        """A piece's rows and features of a gradient of a layer's output."""
        if grad is None:
            return None
        return grad[self.rows_of(piece)].chunk(self.stack.directions, -1)[piece.direction]

    def _arguments(self, piece: Piece) -> BackwardArguments:
        """A piece as the backend takes it."""
        number, rows = self.stack.number(piece), self.rows_of(piece)
        last = piece.layer == self.stack.layers - 1
        c = self.saved.c[number]
        # Of rows that end before a piece the state is not saved, and not read either.
        c_0 = c[piece.start - 1] if piece.start else self.c_0[number].to(self.states_in)
        return BackwardArguments(
            self._part(self.grad_outputs[piece.layer], piece),
            self._part(self.grad_cells, piece) if last else None,
            *self.carried[number],
            self.saved.activations[number][rows],
            c[rows],
            self.weights[number].hh,
            c_0,
            None,
            self.stack.batch_sizes,
            _modifiers_of(self.stack, piece),
            piece.direction == 1,
        )

    def _room(self, piece: Piece) -> tuple[Tensor | None, ...]:
        """Where a piece's δa go: into those of all steps of its recurrence."""
        if not self.is_cut:
            return (None,)
        number = self.stack.number(piece)
        if number not in self.grad_gates:
            self.grad_gates[number] = self.saved.activations[number].new_empty(
                self.saved.activations[number].shape
            )
        return (self.grad_gates[number][self.rows_of(piece)],)

    def _pass_down(self, piece: Piece) -> None:
        """Give the layer below the gradient of its output at the steps of a piece."""
        layer, rows = piece.layer, self.rows_of(piece)
        whole = self.grad_outputs.get(layer - 1)
        if whole is None:
            whole = self.grad_outputs[layer - 1] = torch.empty_like(self.saved.outputs[layer - 1])
        below = whole[rows]
        self._input_gradient(layer, rows, below)
        if self.stack.kept:
            self.stack.after_dropout(below, layer - 1, rows, below)

    def _input_gradient(self, layer: int, rows: slice, out: Tensor) -> None:
        """Write Σ δa·W_ih over a layer's directions to `out`."""
        out = out.flatten(0, -2)
        for direction in range(self.stack.directions):
            number = self.stack.directions * layer + direction
            grad_gates = self.grad_gates[number][rows].flatten(0, -2)
            if direction == 0:
                torch.mm(grad_gates, self.weights[number].ih, out=out)
            else:
                out.addmm_(grad_gates, self.weights[number].ih)

    def _run(self) -> None:
        """Go through the schedule in reverse."""
        for every in reversed(self.lists):
            pieces = [piece for piece in every if piece.layer >= self.lowest]
            if not pieces:
                continue
            results = self.how.backward(
                [self._arguments(p) for p in pieces],
                self.cut([self._room(p) for p in pieces]),
            )
            for piece, out in zip(pieces, results, strict=True):
                number = self.stack.number(piece)
                if not self.is_cut:
                    self.grad_gates[number] = out.gates
                self.carried[number] = out.h0, out.c0
            for piece in pieces:
                if piece.layer > self.lowest and piece.direction == 0:
                    self._pass_down(piece)
            for piece in pieces:
                if piece.start == 0 and piece.direction == 0:
                    self._finish(piece.layer)

    def _finish(self, layer: int) -> None:
        """Compute what needs all of a layer's δa, and forget these."""
        if layer == 0 and self.needed[0]:
            self.grad_x = torch.empty_like(self.x)
            self._input_gradient(0, slice(0, self.rows), self.grad_x)
        for number in range(len(self.carried))[self.stack.own(layer)]:
            self.grad_weights[number] = self._weight_gradients(number)
            del self.grad_gates[number]
        del self.grad_outputs[layer]

    def _weight_gradients(self, number: int) -> list[Tensor | None]:
        """Gradients of one recurrence's weights and biases, over all steps."""
        ih, hh, *biases = self.needed[3 + _WEIGHTS * number : 3 + _WEIGHTS * (number + 1)]
        layer, direction = divmod(number, self.stack.directions)
        x = self.x if layer == 0 else (self.saved.dropped or self.saved.outputs)[layer - 1]
        h = self.saved.outputs[layer].chunk(self.stack.directions, -1)[direction]
        grad_gates = self.grad_gates[number]
        rows = grad_gates.flatten(0, -2)
        grad_bias = rows.sum(0) if any(biases) else None
        grad_hh = None
        if hh:
            grad_hh = weight_hh_gradient(
                grad_gates,
                h,
                self.h_0[number],
                self.stack.batch_sizes,
                self.stack.modifiers[number],
                direction == 1,
            )
        return [
            rows.t() @ x.flatten(0, -2) if ih else None,
            grad_hh,
            *(grad_bias if need else None for need in biases),
        ]

    def gradients(self) -> _Gradients:
        """Compute all that is needed."""
        self._run()
        grad_h_0, grad_c_0 = (
            torch.stack([states[k] for states in self.carried]).to(self.x.dtype) if need else None  # type: ignore[misc]
            for k, need in enumerate(self.needed[1:3])
        )
        nothing: list[Tensor | None] = [None] * _WEIGHTS
        weights = [
            grad
            for number in range(len(self.carried))
            for grad in self.grad_weights.get(number, nothing)
        ]
        return _Gradients(self.grad_x, grad_h_0, grad_c_0, weights)


# Weights of one recurrence: all but the projection.
_WEIGHTS = 4


class LSTMStackFunction(torch.autograd.Function):
    """A stack of layers whose recurrences share launches.

    What is saved is what single recurrences would save. δx of a piece is computed as soon as its δa
    is there, a layer's weights' gradients at its end, over all steps: δW_ih = Σ δaᵀ·x,
    δW_hh = Σ δaᵀ·h_{t−1}, δb = Σ δa. A second derivative goes through `composed_layer`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        cell_clip: float | None,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Compute output, h_n, c_n and maybe cells; see `run_stack`.

        `tensors` are four weights of each recurrence, batch_sizes, lengths, resets, three masks of
        each recurrence, and what dropout keeps. `stack` comes without those that it has.
        """
        ctx.stack, ctx.cell_clip = stack, cell_clip
        stack, weights = _with_tensors(stack, cell_clip, tensors)
        output, h_n, c_n, cells, saved = _forward(stack, x, h_0, c_0, weights, save=True)
        ctx.save_for_backward(x, h_0, c_0, *tensors, *(t for part in saved for t in part))
        ctx.set_materialize_grads(False)
        return (output, h_n, c_n) if cells is None else (output, h_n, c_n, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the schedule in reverse."""
        every = ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * len(every)
        x, h_0, c_0, *tensors = ctx.saved_tensors
        count = ctx.stack.layers * ctx.stack.directions
        # Behind the arguments; see `_Saved`.
        end = len(every) - _LEADING
        parts, layers = tensors[end:], ctx.stack.layers
        outputs = parts[2 * count :]
        saved = _Saved(parts[:count], parts[count : 2 * count], outputs[:layers], outputs[layers:])
        stack, weights = _with_tensors(ctx.stack, ctx.cell_clip, tensors[:end])
        needed = every[_LEADING - 3 : _LEADING + _WEIGHTS * count]
        rest = (None,) * (end - _WEIGHTS * count)
        if torch.is_grad_enabled() or not readable(grads):
            inputs = (x, h_0, c_0, *tensors[: _WEIGHTS * count])
            return (None, None, *_differentiable(stack, inputs, grads, needed), *rest)

        def launch(backend: Backend) -> _Gradients:
            how = launches(backend)
            chunk = stack.problem.steps
            if how.several:
                chunk = chunk_lengths(stack.problem, stack.layers, stack.directions)[1]
            run = _BackwardRun(stack, x, h_0, c_0, weights, saved, grads, needed, how, chunk)
            return run.gradients()

        grad_x, grad_h_0, grad_c_0, grad_weights = ops.run_on_backend(
            "backward", stack.problem, stack.backend, launch
        )
        return (None, None, grad_x, grad_h_0, grad_c_0, *grad_weights, *rest)


# Arguments of `LSTMStackFunction.forward` before the weights.
_LEADING = 5


def _with_tensors(
    stack: Stack, cell_clip: float | None, tensors: Sequence[Tensor | None]
) -> tuple[Stack, list[DirectionWeights]]:
    """The stack and the weights that `LSTMStackFunction` was given as one list."""
    count = stack.layers * stack.directions
    weights = grouped(tensors[: _WEIGHTS * count], _WEIGHTS)
    batch_sizes, lengths, resets, *rest = tensors[_WEIGHTS * count :]
    masks, kept = rest[: 3 * count], rest[3 * count :]
    modifiers = [
        Modifiers(lengths, resets, *own, cell_clip)
        for own in zip(masks[::3], masks[1::3], masks[2::3], strict=True)
    ]
    return (
        stack._replace(batch_sizes=batch_sizes, modifiers=modifiers, kept=kept),  # type: ignore[arg-type]
        weights,
    )


def _differentiable(
    stack: Stack,
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and the weights, by operations that can be differentiated."""

    def composed(
        x: Tensor, h_0: Tensor, c_0: Tensor, *flat: Tensor | None
    ) -> Sequence[Tensor | None]:
        weights = grouped(flat, _WEIGHTS)
        h_n, c_n = [], []
        for layer in range(stack.layers):
            own = stack.own(layer)
            last = layer == stack.layers - 1
            x, h_last, c_last, cells = composed_layer(
                x,
                h_0[own],
                c_0[own],
                weights[own],
                stack.batch_sizes,
                stack.modifiers[own],
                return_cells=stack.return_cells and last,
                backend=stack.backend,
            )
            h_n.append(h_last)
            c_n.append(c_last)
            if stack.kept and not last:
                x = x * stack.kept[layer] * stack.dropout_scale
        return [x, torch.cat(h_n), torch.cat(c_n), cells][: len(grads)]

    # Autocast has chosen the dtypes before the stack was called.
    with autocast_off(stack.problem.device.type):
        return differentiable_gradients(composed, inputs, grads, needed)
