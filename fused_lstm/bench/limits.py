"""What a machine can do at most, and the least time that a case can take on it.

The least time is a bound, not a prediction: the longest of what each limit by itself would take,
as if all the others were free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fused_lstm.bench import timing
from fused_lstm.bench.cases import DTYPES, Case, dtype_of_tensors

__all__ = [
    "Least",
    "Limits",
    "cache_bytes",
    "compulsory_bytes",
    "least_seconds",
    "measure_copy",
    "measure_gemm",
    "multiprocessor_bytes",
]

LimitedBy = Literal["products", "memory", "exchange"]

# Sizes of the square products: doubled from the first to the last, or to the first that takes long
# enough. In a dtype that a processor has no instructions for, larger ones would take minutes.
_GEMM_SIZES = {"cpu": (256, 2048), "cuda": (1024, 8192)}
_LARGEST_FLOAT64_GEMM = {"cpu": 1024, "cuda": 4096}
_LONG_GEMM_SECONDS = 0.02
# Of each of the two buffers.
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_SECONDS = 0.05

_CACHES_OF_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Limits:
    """Limits of a machine, for cases of one dtype.

    Attributes:
        gemm_flops_per_second: of a large matrix product in the dtype; see `measure_gemm`.
        copy_bytes_per_second: of a large copy, read and written bytes; see `measure_copy`. None
            where it is not known: then memory limits nothing.
        exchange_seconds: of a GPU, what the exchange of h within a time step takes, by who takes
            part: "block" (a block alone), "cluster-N", "grid-N" (N blocks of a grid) and "grid"
            (a block on each multiprocessor). Empty where nothing was measured, as on a CPU.
        cache_bytes: what the caches hold from one call to the next; see `cache_bytes`. None where
            it is not known: then memory limits nothing.
        multiprocessor_bytes: what a block can keep on chip; see `multiprocessor_bytes`. None where
            it is not known: then whoever exchanges fastest counts.
    """

    gemm_flops_per_second: float
    copy_bytes_per_second: float | None = None
    exchange_seconds: Mapping[str, float] = field(default_factory=dict)
    cache_bytes: int | None = 0
    multiprocessor_bytes: int | None = None


@dataclass(frozen=True)
class Least:
    """The least time that a case can take.

    Attributes:
        seconds: the time.
        limited_by: which limit it is: "products", "memory" or "exchange".
    """

    seconds: float
    limited_by: LimitedBy


def measure_gemm(dtype_name: str, device: torch.device) -> float:
    """Measure a large square matrix product: the most floating-point operations a second.

    A product of two n x n matrices counts 2 n^3 of them. The best of several runs and sizes.

    Args:
        dtype_name: a case's dtype: "float32" is IEEE arithmetic, "tf32" is float32 whose products a
            GPU makes of TF32.
        device: where to run.

    Raises:
        ValueError: if the device has no such products.
    """
    if dtype_name not in DTYPES:
        raise ValueError(f"dtype_name must be one of {DTYPES}, got {dtype_name!r}")
    if dtype_name == "tf32" and device.type != "cuda":
        raise ValueError(f"products in TF32 need a GPU, got device {device}")
    dtype = dtype_of_tensors(dtype_name)
    size, largest = _GEMM_SIZES[device.type]
    if dtype == torch.float64:
        largest = min(largest, _LARGEST_FLOAT64_GEMM[device.type])
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    best, seconds = 0.0, 0.0
    try:
        matmul.fp32_precision = "tf32" if dtype_name == "tf32" else "ieee"
        while size <= largest and seconds < _LONG_GEMM_SECONDS:
            seconds = _seconds_of_product(size, dtype, device)
            best = max(best, 2 * size**3 / seconds)
            size *= 2
    finally:
        matmul.fp32_precision = before
    return best


@torch.no_grad()
def _seconds_of_product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """The least time of a square product."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    calls = {"gemm": lambda index: torch.mm(left, right, out=out)}
    return min(timing.time_in_turns(calls, device, _SECONDS)["gemm"].seconds)


@torch.no_grad()
def measure_copy(device: torch.device) -> float:
    """Measure a large copy: the most bytes a second, each counted when read and when written.

    The buffers are well beyond the caches, and on a CPU all of torch's threads copy. What a CPU
    reads only to overwrite it is not counted. The best of several runs.

    Args:
        device: where to run.
    """
    numbers = _COPY_BYTES[device.type] // 4
    # Written, so that every page is there.
    source, target = (torch.ones(numbers, device=device) for _ in range(2))
    calls = {"copy": lambda index: target.copy_(source)}
    seconds = min(timing.time_in_turns(calls, device, _SECONDS)["copy"].seconds)
    return 2 * source.nbytes / seconds


def cache_bytes(device: torch.device) -> int | None:
    """Find out how much all caches of a device hold together; None where nobody says.

    Args:
        device: of a CPU, the caches of the processors that this process may use.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        # One that several processors share is listed for each of them.
        return sum(dict(_caches_of_cpus()).values()) or None
    except FileNotFoundError:
        return None  # Virtual machines may list caches without their sizes.


def _caches_of_cpus() -> Iterator[tuple[str, int]]:
    """List caches of data, as Linux describes them: who they are, and their bytes."""
    if not hasattr(os, "sched_getaffinity"):
        return
    for cpu in os.sched_getaffinity(0):
        for folder in _CACHES_OF_CPUS.glob(f"cpu{cpu}/cache/index*"):
            level, kind, cpus, size = (
                (folder / name).read_text().strip()
                for name in ("level", "type", "shared_cpu_list", "size")
            )
            if kind != "Instruction":
                yield f"L{level} of {cpus}", int(size.removesuffix("K")) << 10


def multiprocessor_bytes(device: torch.device) -> int | None:
    """Find out what one block can keep on chip; None on a CPU.

    That is all registers of a multiprocessor, and the shared memory that a block may ask for.

    Args:
        device: the GPU.
    """
    if device.type != "cuda":
        return None
    # Not before: CPUs need none of the kernels for GPUs.
    from fused_lstm.kernels.cuda.costs import REGISTERS
    from fused_lstm.kernels.cuda.driver import describe

    return int(describe(device).shared_bytes + 4 * REGISTERS)


def compulsory_bytes(case: Case, mode: str) -> int:
    """Count the bytes that a case has to read or write, whatever computes it.

    Every input, initial state and parameter is read once, and every result written once:

        input N I + output N D P + (h_0, c_0, h_n, c_n) 2 L D B (P + H) + parameters

    elements, with N the rows of all sequences (T B, unless they are packed) and for each layer and
    direction parameters W_ih 4 H I', W_hh 4 H P, biases 8 H and W_hr P H, where I' is I in the
    first layer and D P in the others, and W_hr is there only with a projection. Training adds as
    much again: the gradients of all results are read, those of everything else are written. What
    the forward pass saves for the backward pass is a choice, and not counted.

    Args:
        case: the case.
        mode: "inference" or "training".
    """
    s = case.shape
    rows, recurrences = int(s.lengths.sum()), s.num_layers * s.directions
    features = s.I + s.directions * s.output_size
    # A cell has its h_1 for output.
    sequences = rows * (s.I if s.cell else features)
    states = 2 * recurrences * s.B * (s.output_size + s.H)
    widths = [s.I] + [s.directions * s.output_size] * (s.num_layers - 1)
    parameters = s.directions * sum(
        4 * s.H * (width + s.output_size + 2) + s.proj_size * s.H for width in widths
    )
    forward = (sequences + states + parameters) * case.dtype.itemsize
    return forward if mode == "inference" else 2 * forward


def least_seconds(case: Case, mode: str, limits: Limits) -> Least:
    """Bound the time of a case from below: the longest of three times.

    - products: `case.flops(mode)` / gemm_flops_per_second
    - memory: (`compulsory_bytes(case, mode)` - cache_bytes) / copy_bytes_per_second. Calls that are
      repeated find in the caches what these hold; 0 cache_bytes is for calls that find nothing.
    - exchange: E t, on a GPU. h of a step is made by all units and needed by all. Layers overlap,
      so in one direction T + L - 1 steps wait for each other; with two, no layer can begin before
      the one below has ended in both, and there are T L. Between n steps there are n - 1
      exchanges, E of them; in training E of them twice, for the backward pass has as many.
      t is the least of the exchange_seconds of those whose blocks can keep the recurrent weights,
      W_hh and W_hr, on chip:

          elements of these * bytes of one <= blocks * multiprocessor_bytes

      of which "grid" always is one: where even a whole GPU cannot, they come from memory. T is the
      longest length of packed sequences, and 1 for a cell, which exchanges nothing.

    Args:
        case: the case.
        mode: "inference" or "training".
        limits: of the machine, in the case's dtype.
    """
    times: dict[LimitedBy, float] = {
        "products": case.flops(mode) / limits.gemm_flops_per_second,
        "memory": _memory_seconds(case, mode, limits),
        "exchange": _exchanges(case, mode) * _seconds_of_exchange(case, limits),
    }
    limited_by = max(times, key=times.__getitem__)
    return Least(times[limited_by], limited_by)


def _memory_seconds(case: Case, mode: str, limits: Limits) -> float:
    """The least time of what memory has to deliver and to take."""
    if limits.copy_bytes_per_second is None or limits.cache_bytes is None:
        return 0.0
    beyond_caches = compulsory_bytes(case, mode) - limits.cache_bytes
    return max(0, beyond_caches) / limits.copy_bytes_per_second


def _exchanges(case: Case, mode: str) -> int:
    """How many exchanges wait for each other."""
    s = case.shape
    longest = int(s.lengths.max())
    steps = longest * s.num_layers if s.bidirectional else longest + s.num_layers - 1
    return (steps - 1) * (1 if mode == "inference" else 2)


def _seconds_of_exchange(case: Case, limits: Limits) -> float:
    """The least time of one exchange; 0 where nothing is known of exchanges."""
    s = case.shape
    weights = (4 * s.output_size + s.proj_size) * s.H * case.dtype.itemsize
    room = limits.multiprocessor_bytes
    return min(
        (
            seconds
            for name, seconds in limits.exchange_seconds.items()
            if name == "grid" or room is None or weights <= _blocks_of(name) * room
        ),
        default=0.0,
    )


def _blocks_of(name: str) -> int:
    """How many blocks exchange, of a key of `Limits.exchange_seconds` other than "grid"."""
    return 1 if name == "block" else int(name.rpartition("-")[2])
