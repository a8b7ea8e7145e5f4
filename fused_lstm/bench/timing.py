"""How time is taken: a call or a block of calls, the contenders in turns, medians, percentiles."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")
# Takes the number of the set of inputs to run on.
Call = Callable[[int], Any]

MIN_REPETITIONS = 7
MAX_REPETITIONS = 1000
# On a CPU, short calls are timed in blocks that take about so long: after another contender's turn
# the first of them finds cold caches and sleeping threads, and in a stream of calls they do not.
_BLOCK_SECONDS = 5e-3
_MOST_CALLS_OF_BLOCK = 20
# Calls of each contender before time is taken, besides the one that was checked.
WARM_UP = 1
# Inputs are rotated over this many sets at most.
MAX_SETS = 4

# The device waits so long before the clock starts, that the host can put its work into the queue:
# half as much again as the host needs, and at least some 50 µs. At 2 GHz, the most of any GPU.
_CYCLES_PER_SECOND = 2e9
_LEAST_HEAD_START = 5e-5


@dataclass
class Samples:
    """Times of a call of one contender, in seconds; entry k is from round k.

    Attributes:
        seconds: from the start of a call to the end of its work.
        host: until the call returned to the program; empty on a CPU, where it is the same.
    """

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Percentiles:
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def percentiles(values: list[float]) -> Percentiles:
    """Summarise at least two values."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Percentiles(deciles[1], statistics.median(values), deciles[7])


def take_sample(
    call: Call,
    index: int,
    device: torch.device,
    queued: bool,
    into: Samples,
    calls: int = 1,
    host: float = 0.0,
) -> None:
    """Time a call, or a block of calls one after the other, which starts on an idle device.

    Args:
        call: what to time.
        index: the set of inputs.
        device: where it runs.
        queued: on a GPU, start the clock when the host has had time to put the work into the
            queue, so that the device's time alone is taken (for graphs).
        into: where the times are added, divided by the number of calls.
        calls: how many.
        host: seconds that the host is known to need for one.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            result = call(index)
        into.seconds.append((time.perf_counter() - start) / calls)
        del result  # The last is freed outside of the timed region.
        return
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    torch.cuda.synchronize(device)
    if queued:
        head_start = max(_LEAST_HEAD_START, 1.5 * host * calls)
        torch.cuda._sleep(int(head_start * _CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
    begin.record()
    start = time.perf_counter()
    for _ in range(calls):
        result = call(index)
    taken = time.perf_counter() - start
    end.record()
    end.synchronize()
    del result
    into.host.append(taken / calls)
    into.seconds.append(begin.elapsed_time(end) / 1e3 / calls)


def calls_of_block(call: Call) -> int:
    """Choose how many calls on a CPU are timed together, by how long one takes."""
    samples = Samples()
    for _ in range(3):
        take_sample(call, 0, torch.device("cpu"), False, samples)
    return max(1, min(_MOST_CALLS_OF_BLOCK, round(_BLOCK_SECONDS / min(samples.seconds))))


def time_in_turns(
    calls: Mapping[Key, Call],
    device: torch.device,
    seconds: float,
    *,
    sets: int = 1,
    calls_per_sample: int = 1,
    queued: Callable[[Key], bool] = lambda key: False,
    settles: Callable[[Key], bool] = lambda key: False,
) -> dict[Key, Samples]:
    """Time several contenders in turns (A B, B A, A B, ...), so that drift meets all alike.

    Args:
        calls: the contenders.
        device: where they run.
        seconds: time to spend; every contender has at least MIN_REPETITIONS samples.
        sets: number of sets of inputs to rotate over.
        calls_per_sample: calls in a contender's turn; a sample is their mean.
        queued: for each contender, as for `take_sample`.
        settles: for each contender, whether its turn begins with a call that is not timed: where
            caches are cold, or threads of the contender before still wait for work.
    """
    samples = {key: Samples() for key in calls}
    warm_up = {key: Samples() for key in calls}
    for index in range(WARM_UP):
        for key, call in calls.items():
            take_sample(call, index % sets, device, False, warm_up[key], calls_per_sample)
    host = {key: max(taken.host, default=0.0) for key, taken in warm_up.items()}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        turn = 0
        while turn < MIN_REPETITIONS or (
            turn < MAX_REPETITIONS and time.perf_counter() - start < seconds
        ):
            for key in calls if turn % 2 == 0 else reversed(list(calls)):
                if settles(key):
                    calls[key](turn % sets)
                take_sample(
                    calls[key],
                    turn % sets,
                    device,
                    queued(key),
                    samples[key],
                    calls_per_sample,
                    host[key],
                )
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def ratio_of_pairs(first: list[float], second: list[float]) -> float:
    """Median over the rounds of the ratio of the two times of a round."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def sets_to_rotate(bytes_of_a_set: int, device: torch.device) -> int:
    """How many sets of inputs exceed the GPU's L2 cache together, within reason; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(2, cache // bytes_of_a_set + 1), MAX_SETS)


def capture(call: Call, sets: int) -> Call:
    """Capture a call in CUDA graphs, one for each set of inputs.

    The capture follows torch's recipe: a first run on a side stream, then the capture. The graphs
    share their memory, but for the results, which stay where they are from replay to replay.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    pool = torch.cuda.graph_pool_handle()
    graphs: list[torch.cuda.CUDAGraph] = []
    results: list[tuple[Tensor, ...]] = []
    # A capture that fails would leave its own stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()):
        for index in range(sets):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = call(index)
            graphs.append(graph)
            # Without the autograd graph, whose nodes would tie later calls to the capture's stream.
            results.append(tuple(tensor.detach() for tensor in result))
            del result
    for tensors in results:
        for tensor in tensors:
            # What the first run has left there is no result of a replay.
            tensor.fill_(math.nan)

    def replay(index: int) -> tuple[Tensor, ...]:
        graphs[index].replay()
        return results[index]

    return replay
