"""Several recurrences in one launch: both directions of a layer, or layers at different times.

A recurrence is one step after another, and a team of blocks that computes it leaves most of a GPU
idle when the batch is small. What is independent runs side by side: the directions of a layer, and,
cut into chunks of time, the layers of a stack. Chunk k of layer l needs chunk k of layer l−1 and
chunk k−1 of its own, so that all chunks with the same l + k may run together, and the work moves
through layers × chunks as a wavefront:

    launch   0   1   2   3   4
    layer 0  0   1   2            the numbers are chunks: L layers of K chunks take L + K − 1
    layer 1      0   1   2        launches of one chunk each instead of L · K
    layer 2          0   1   2

Here is what runs when, and whether it pays: functions of sizes. stack.py computes it.

Dimensions: `T` time steps, `L` layers, `D` directions, `K` chunks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fused_lstm import backends, ops
from fused_lstm.backends import Problem
from fused_lstm.backends.cuda import CudaBackend, kernel_flags, kernel_limits
from fused_lstm.devices import input_precision

__all__ = [
    "MAX_RECURRENCES",
    "TOGETHER",
    "Piece",
    "chunk_length",
    "chunk_lengths",
    "describe",
    "runs_together",
    "schedule",
]

# The backend that launches several recurrences at a time, and how many at most (parameters.h).
TOGETHER = CudaBackend.name
MAX_RECURRENCES = 8

# More chunks would shorten the ramps at both ends by little, and are more launches.
_MOST_CHUNKS = 8
# A chunk takes no less time than the program needs to prepare the next launch.
_SHORTEST_CHUNK_US = 150
# How much faster a wavefront must promise to be: chunks have costs that the formula leaves out.
_LEAST_GAIN = 1.25


class Piece(NamedTuple):
    """Some steps of one recurrence.

    Attributes:
        layer: from 0 to L−1.
        direction: 0, or 1 for the one that runs backwards in time.
        start: its first step.
        stop: the step behind its last one.
    """

    layer: int
    direction: int
    start: int
    stop: int


def schedule(layers: int, directions: int, steps: int, chunk: int) -> list[list[Piece]]:
    """List the launches of a stack, each with pieces that do not depend on each other.

    Args:
        layers: L.
        directions: 2 gives one launch a layer: a direction needs all of the layer below.
        steps: T.
        chunk: steps of a piece; the last one of a layer may have fewer. T: one layer after another.
    """
    if directions == 2:
        return [[Piece(layer, d, 0, steps) for d in range(2)] for layer in range(layers)]
    chunks = -(-steps // chunk)
    lists = []
    for diagonal in range(layers + chunks - 1):
        pieces = [
            Piece(layer, 0, k * chunk, min(steps, (k + 1) * chunk))
            for layer in range(layers)
            if 0 <= (k := diagonal - layer) < chunks
        ]
        lists += [pieces[n : n + MAX_RECURRENCES] for n in range(0, len(pieces), MAX_RECURRENCES)]
    return lists


@functools.lru_cache(maxsize=4096)
def chunk_length(layers: int, steps: int, alone: float, costs: tuple[float, ...]) -> int:
    """Choose how many steps a piece of a one-directional stack has; `steps`: no wavefront.

    With n recurrences side by side a step takes `costs[n − 1]`: about as long as alone while all
    find room on the GPU, n times as long where one fills it. In the plain order K chunks of L
    layers take L·K·alone, as a wavefront Σ costs[w − 1] over its launches, which hold
    w ≤ min(L, K, 8) pieces. Where there is room for all, that is L·K / (L + K − 1) times as fast:
    with K = 8 three layers are 2.4 times as fast, and with ever more chunks 3 times.

    Args:
        layers: L.
        steps: T.
        alone: microseconds of a step of the kernel that is best for one recurrence.
        costs: the same of the wavefront's one kernel, with 1, 2, ... min(L, MAX_RECURRENCES)
            recurrences in a launch.
    """
    chunks = min(_MOST_CHUNKS, int(steps * costs[-1] / _SHORTEST_CHUNK_US), steps)
    if layers == 1 or chunks < 2:
        return steps
    chunk = -(-steps // chunks)
    widths = [len(pieces) for pieces in schedule(layers, 1, steps, chunk)]
    plain = layers * -(-steps // chunk) * alone
    return chunk if plain >= _LEAST_GAIN * sum(costs[width - 1] for width in widths) else steps


def chunk_lengths(problem: Problem, layers: int, directions: int) -> tuple[int, int]:
    """Choose the steps of a piece, forward and backward.

    Args:
        problem: one of the recurrences.
        layers: L.
        directions: D.
    """
    if directions == 2 or layers == 1:
        return problem.steps, problem.steps
    costs = _costs(problem._replace(steps=0), min(layers, MAX_RECURRENCES))
    forward, backward = (
        # Where there is no plan the launch will say why.
        chunk_length(layers, problem.steps, *own) if own else problem.steps
        for own in costs
    )
    return forward, backward


@functools.lru_cache(maxsize=4096)
def _costs(problem: Problem, most: int) -> tuple[tuple[float, tuple[float, ...]] | None, ...]:
    """What `chunk_length` asks for, forward and backward; None where there is no kernel.

    Args:
        problem: one of the recurrences.
        most: recurrences of the largest launch that it can have, for which its kernel is chosen.
    """
    from fused_lstm.kernels.cuda import config

    limits = kernel_limits(problem.device)
    options = {
        "hidden": problem.hidden_size,
        "dtype": problem.dtype,
        "terms": config.terms_of(problem.dtype, problem.precision or input_precision()),
        "flags": kernel_flags(problem),
    }
    sizes = {"batch": problem.batch, "limits": limits}
    costs: list[tuple[float, tuple[float, ...]] | None] = []
    for direction in config.DIRECTIONS:
        alone, together = (
            config.plan(direction, recurrences=recurrences, **sizes, **options)
            for recurrences in (1, most)
        )
        if not (alone and together):
            costs.append(None)
            continue
        kernel = together[0].config
        several = (config.cost_us(kernel, recurrences=n + 1, **sizes) for n in range(most))
        costs.append((alone[0].cost_us, tuple(several)))
    return tuple(costs)


def runs_together(problem: Problem, name: str | None, layers: int, directions: int) -> bool:
    """Whether a stack's recurrences are to share launches.

    Args:
        problem: one of the recurrences.
        name: a backend's name, or None for the default choice.
        layers: L.
        directions: D.

    Raises:
        BackendUnavailableError: if the named backend cannot run the problem.
    """
    if layers * directions == 1 or (name is not None and name != TOGETHER):
        return False
    if problem.transform or problem.proj_size or "layer_norm" in problem.additions:
        return False
    if backends.select_backend(problem, name) != TOGETHER:
        return False
    if ops.failed_kernels(TOGETHER, problem):
        return False
    if directions == 2:
        return True
    return not problem.packed and chunk_lengths(problem, layers, 1)[0] < problem.steps


def describe(problem: Problem, layers: int, directions: int) -> str:
    """Say in words what shares launches, where `runs_together` says that something does."""
    if directions == 2:
        return "both directions in one launch"
    chunk = chunk_lengths(problem, layers, directions)[0]
    return f"{layers} layers as a wavefront over {-(-problem.steps // chunk)} chunks"
