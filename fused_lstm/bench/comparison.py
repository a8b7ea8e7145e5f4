"""Checks every contender of a case against float64, and times those that are right."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import fused_lstm
from fused_lstm import ops
from fused_lstm.bench import cases, timing
from fused_lstm.bench.cases import Case, Data
from fused_lstm.bench.limits import Limits, compulsory_bytes, least_seconds
from fused_lstm.bench.memory import peak_of_call, peak_of_provider
from fused_lstm.bench.providers import TORCH, Provider, UnavailableError
from fused_lstm.bench.timing import Percentiles

# On a GPU, calls of a single step run as in a stream.
_CALLS_OF_ONE_STEP = 20

__all__ = ["Measured", "Result", "measure"]


@dataclass
class Result:
    """One provider in one mode and launch.

    Attributes:
        provider: its name.
        mode: "inference" or "training" (forward and backward pass).
        launch: "eager", or "graph" for the replay of a CUDA graph.
        status: "timed"; "wrong" (and not timed); "unavailable" (cannot run here); "failed"; "not
            run" (no time was left for it).
        detail: why it was not timed.
        backend: what computes it, and `reason`: why that one.
        errors: for each result, its largest absolute error against float64 and the budget of it.
        error_over_budget: the largest ratio of the two; at most 1 is right (for other packages, at
            most their `Provider.error_factor`).
        seconds: percentiles of the time of a call; on a GPU the device's, by CUDA events.
        host_seconds: percentiles of the time until the call returns to the program; None on a CPU.
        repetitions: number of samples.
        ratio: median time of torch.nn's layer, launched likewise, over the median time of this;
            above 1 this is the faster.
        ratio_of_pairs: median of the same ratio within each round.
        flops: floating-point operations of the matrix products.
        bytes: what has to be read and written; see `limits.compulsory_bytes`.
        limit_seconds: the least time that this machine could take; see `limits.least_seconds`.
        limited_by: "products", "memory" or "exchange".
        fraction_of_limit: `limit_seconds` over the median time.
        peak_memory_bytes: of a call, beyond inputs and parameters; None if not measured.
        memory_ratio: of that, over torch.nn's.
    """

    provider: str
    mode: str
    launch: str
    status: str = "failed"
    detail: str = ""
    backend: str = ""
    reason: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    error_over_budget: float | None = None
    seconds: Percentiles | None = None
    host_seconds: Percentiles | None = None
    repetitions: int = 0
    ratio: float | None = None
    ratio_of_pairs: float | None = None
    flops: int | None = None
    bytes: int | None = None
    limit_seconds: float | None = None
    limited_by: str | None = None
    fraction_of_limit: float | None = None
    peak_memory_bytes: int | None = None
    memory_ratio: float | None = None

    def compare_with(self, limits: Limits, case: Case) -> None:
        """Say how near to a machine's limits the case came, if it was timed."""
        if self.seconds is None:
            return
        least = least_seconds(case, self.mode, limits)
        self.flops = case.flops(self.mode)
        self.bytes = compulsory_bytes(case, self.mode)
        self.limit_seconds, self.limited_by = least.seconds, least.limited_by
        self.fraction_of_limit = least.seconds / self.seconds.p50


@dataclass(frozen=True)
class Measured:
    """What is known of a case in one mode.

    Attributes:
        results: of every provider and launch.
        samples: times of those that were timed, by provider and launch.
        sets: number of sets of inputs that were rotated over.
        calls_per_sample: calls that a sample is the mean of.
    """

    results: list[Result]
    samples: dict[tuple[str, str], timing.Samples]
    sets: int
    calls_per_sample: int = 1


def measure(
    case: Case,
    mode: str,
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    limits: Limits,
    *,
    memory: bool = False,
) -> Measured:
    """Check every provider in every launch, and time those that are right, in turns.

    Args:
        case: what to run.
        mode: "inference" or "training".
        providers: `providers.TORCH` first.
        device: where to run.
        seconds: how long to take samples.
        limits: of the device, in the case's dtype.
        memory: measure the peak memory of each; on a CPU torch's layer's and ours, which takes a
            process each.
    """
    parameters = cases.make_parameters(case, device)
    first = cases.make_data(case, device)
    sets = timing.sets_to_rotate(first.inputs[0].nbytes, device)
    data = [first, *(cases.make_data(case, device, seed) for seed in range(1, sets))]
    comparison = _Comparison(case, mode, device, parameters, data)
    with (
        torch.set_grad_enabled(mode == "training"),
        cases.products_of(case),
        warnings.catch_warnings(),
    ):
        # What falls back to another backend would be timed under a wrong name.
        warnings.simplefilter("error", fused_lstm.KernelFallbackWarning)
        results = [
            comparison.check(provider, launch)
            for provider in providers
            for launch in provider.launches(case, mode, device)
        ]
        samples = comparison.time(seconds, limits)
        if memory:
            comparison.measure_memory(providers)
    return Measured(results, samples, sets, comparison.calls_per_sample)


class _Comparison:
    """The contenders of one case in one mode."""

    def __init__(
        self,
        case: Case,
        mode: str,
        device: torch.device,
        parameters: dict[str, Tensor],
        data: list[Data],
    ) -> None:
        self.case, self.mode, self.device = case, mode, device
        self.parameters, self.data = parameters, data
        with torch.set_grad_enabled(mode == "training"):
            layer = cases.torch_layer(case, parameters, device, torch.float64)
            self.exact = [t.detach() for t in cases.run_layer(layer, data[0].to(torch.float64))]
        self.names = cases.result_names(case, mode, parameters)
        self.budgets: list[float] = []
        self.calls: dict[tuple[str, str], timing.Call] = {}
        self.results: dict[tuple[str, str], Result] = {}
        self.with_own_threads: set[str] = set()
        self.calls_per_sample = 1

    def check(self, provider: Provider, launch: str) -> Result:
        """Compare a provider's results with float64; it is a contender if they are right."""
        result = Result(provider.name, self.mode, launch)
        # Another package's failure, and what torch cannot do, is no failure of ours.
        status_of_failure = "failed" if provider.is_ours else "unavailable"
        try:
            # A kernel that failed before is tried again: otherwise it falls back in silence.
            ops._failed.clear()
            self._check(provider, launch, result)
        except (UnavailableError, fused_lstm.BackendUnavailableError) as error:
            result.status, result.detail = "unavailable", str(error)
        except torch.OutOfMemoryError as error:
            result.status, result.detail = "unavailable", f"out of memory: {error}"
        except Exception as error:
            # Whatever a compiler or a library raises belongs in the record.
            result.status = status_of_failure
            result.detail = f"{type(error).__name__}: {error}"
        return result

    def _check(self, provider: Provider, launch: str, result: Result) -> None:
        case, device = self.case, self.device
        prepared = provider.prepare(case, self.parameters, device, self.mode)
        result.backend, result.reason = prepared.backend, prepared.reason

        def eager(index: int) -> tuple[Tensor, ...]:
            return prepared.call(self.data[index])

        call: timing.Call = eager
        if launch == "graph":
            call = timing.capture(eager, len(self.data))
        results = call(0)
        for name, tensor in zip(self.names, results, strict=False):
            if tensor.dtype != case.dtype:
                raise TypeError(f"{name} is of {tensor.dtype}, not of {case.dtype}")
        errors = cases.largest_errors(results, self.exact)
        del results
        if not self.budgets:
            if provider != TORCH:
                raise UnavailableError(
                    "torch.nn's layer, whose error would be the measure, could not run"
                )
            native_errors = self._float64_errors() if case.dtype == torch.float64 else errors
            self.budgets = cases.error_budgets(native_errors, self.exact, case.eps)
        result.errors = {
            name: {"error": error, "budget": budget}
            for name, error, budget in zip(self.names, errors, self.budgets, strict=True)
        }
        ratios = dict(zip(self.names, cases.over_budget(errors, self.budgets), strict=True))
        # The maximum of a list with NaN in it depends on the order.
        worst = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
        result.error_over_budget = ratios[worst]
        if not ratios[worst] <= provider.error_factor:
            result.status = "wrong"
            result.detail = (
                f"{worst}: an error of {result.errors[worst]['error']:.3g} against float64, "
                f"budget {result.errors[worst]['budget']:.3g}"
            )
            if provider.error_factor != 1:
                result.detail += f" (times {provider.error_factor:g} for another package)"
            return
        result.status = "timed"
        if provider.own_threads:
            self.with_own_threads.add(provider.name)
        self.calls[provider.name, launch] = call
        self.results[provider.name, launch] = result

    def _float64_errors(self) -> list[float]:
        """Errors to expect in float64: four times those of torch.nn's layer in float32, scaled.

        Its own cannot be seen, for its results are what all are compared with, and errors of both
        meet there: against extended precision (T 100, B 16, I and H 64, two cores of an EPYC) the
        gradient of W_ih was off by 7.5e-14 in torch.nn.LSTM and by 2.3e-14 in ours.
        """
        layer = cases.torch_layer(self.case, self.parameters, self.device, torch.float32)
        results = cases.run_layer(layer, self.data[0].to(torch.float32))
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return [4 * scale * error for error in cases.largest_errors(results, self.exact)]

    def time(self, seconds: float, limits: Limits) -> dict[tuple[str, str], timing.Samples]:
        """Time the contenders in turns."""
        if not self.calls:
            return {}
        if self.device.type == "cpu":
            # The first is torch's, if that can run: blocks are as long for everyone.
            self.calls_per_sample = timing.calls_of_block(next(iter(self.calls.values())))
        elif self.case.shape.T == 1:
            self.calls_per_sample = _CALLS_OF_ONE_STEP
        # What failed in a graph is tried again: eager calls would fall back in silence.
        ops._failed.clear()
        samples = timing.time_in_turns(
            self.calls,
            self.device,
            seconds,
            sets=len(self.data),
            calls_per_sample=self.calls_per_sample,
            queued=lambda key: key[1] == "graph",
            # Of short calls on a CPU, the first after another's turn is not like the rest.
            settles=lambda key: (
                self.device.type == "cpu"
                and (key[0] in self.with_own_threads or self.calls_per_sample > 1)
            ),
        )
        for (provider, launch), taken in samples.items():
            result = self.results[provider, launch]
            result.repetitions = len(taken.seconds)
            result.seconds = timing.percentiles(taken.seconds)
            result.host_seconds = timing.percentiles(taken.host) if taken.host else None
            result.compare_with(limits, self.case)
            baseline = samples.get((TORCH.name, launch))
            if baseline is not None:
                result.ratio = statistics.median(baseline.seconds) / result.seconds.p50
                result.ratio_of_pairs = timing.ratio_of_pairs(baseline.seconds, taken.seconds)
        return samples

    def measure_memory(self, providers: Sequence[Provider]) -> None:
        """Measure the memory of what was timed, launched eagerly."""
        for provider in providers:
            result = self.results.get((provider.name, "eager"))
            if result is None:
                continue
            try:
                if self.device.type == "cuda":
                    call = self.calls[provider.name, "eager"]
                    result.peak_memory_bytes = peak_of_call(partial(call, 0), self.device)
                else:
                    result.peak_memory_bytes = peak_of_provider(provider, self.case, self.mode)
            except RuntimeError as error:
                # The times stand.
                result.detail = f"peak memory not measured: {error}"
            theirs = self.results.get((TORCH.name, "eager"))
            if result.peak_memory_bytes is not None and theirs and theirs.peak_memory_bytes:
                result.memory_ratio = result.peak_memory_bytes / theirs.peak_memory_bytes
