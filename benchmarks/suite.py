"""Runs the chosen cases one after the other, within a budget, and keeps what it finds."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks import shapes
from benchmarks.exchange import measure_exchange
from benchmarks.peers import PEERS
from benchmarks.records import Recorder
from fused_lstm.bench import comparison
from fused_lstm.bench.cases import Case
from fused_lstm.bench.comparison import Measured
from fused_lstm.bench.limits import (
    Limits,
    cache_bytes,
    measure_copy,
    measure_gemm,
    multiprocessor_bytes,
)
from fused_lstm.bench.providers import BACKENDS, COMPILED, TORCH, Provider, provider_of_backend

__all__ = ["PROVIDERS", "NotRunError", "Plan", "Suite", "list_plans"]

# By name, in the order in which they are checked and shown.
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (TORCH, COMPILED, *map(provider_of_backend, BACKENDS), *PEERS)
}


# Cases that tell how long the next one may take.
_RECENT = 6
# Seconds after which the rate of products is measured again.
_GEMM_AGAIN = 30.0


class NotRunError(Exception):
    """A case was not begun; the message says why."""


@dataclass(frozen=True)
class Plan:
    """A case in one mode, with those who run it.

    Attributes:
        case: what is run.
        mode: "inference" or "training".
        providers: torch's first.
        groups: those that the case is in.
        memory: whether peak memory is measured.
    """

    case: Case
    mode: str
    providers: tuple[Provider, ...]
    groups: tuple[str, ...]
    memory: bool

    @property
    def name(self) -> str:
        return f"{self.case.name}-{self.mode}"

    def contenders(self, device: torch.device) -> Iterator[tuple[Provider, str]]:
        """List each provider in each of its launches."""
        for provider in self.providers:
            for launch in provider.launches(self.case, self.mode, device):
                yield provider, launch


def list_plans(
    device_type: str,
    modes: Sequence[str],
    *,
    groups: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    providers: Sequence[str] = (),
) -> list[Plan]:
    """List what is to be run, each case once.

    Args:
        device_type: "cpu" or "cuda".
        modes: "inference", "training".
        groups: names of the groups to run; all of them by default.
        dtypes: those to run; all by default.
        providers: names of those to run, instead of each group's own.
    """
    wanted: dict[Case, tuple[dict[str, None], bool]] = {}
    for group in shapes.list_groups(device_type):
        if groups and group.name not in groups:
            continue
        for case in group.cases:
            if dtypes and case.dtype_name not in dtypes:
                continue
            names, memory = wanted.get(case, ({}, False))
            names |= dict.fromkeys(providers or group.providers)
            wanted[case] = names, memory or group.memory
    return [
        Plan(
            case,
            mode,
            tuple(
                provider
                for name, provider in PROVIDERS.items()
                if provider is TORCH or name in names
            ),
            shapes.groups_of(case, device_type),
            memory,
        )
        for case, (names, memory) in wanted.items()
        for mode in modes
    ]


@dataclass
class Suite:
    """A run.

    Attributes:
        device: where the cases run.
        seconds: for the samples of each case and mode.
        recorder: keeps the results.
    """

    device: torch.device
    seconds: float
    recorder: Recorder
    # By dtype: when it was measured, and the best so far.
    _gemm: dict[str, tuple[float, float]] = field(default_factory=dict)
    _machine: Limits | None = None
    _durations: list[float] = field(default_factory=list)
    _lost: str = ""

    def run(self, plan: Plan) -> Measured:
        """Check and time everyone in a case, unless there is no time left for it.

        Raises:
            NotRunError: if it was not begun.
            BaseException: whatever broke the case off: no memory for the inputs, a kernel that
                failed while it was timed.
        """
        recorder = self.recorder
        contenders = [(each.name, launch) for each, launch in plan.contenders(self.device)]
        earlier = recorder.resumed(plan.case, plan.mode, contenders)
        if earlier is not None:
            return Measured(earlier, {}, 0)
        # A case is taken to last as long as the longest of those just before it.
        expected = max(self._durations[-_RECENT:], default=0.0)
        reason = self._lost
        if recorder.elapsed + expected > recorder.budget:
            reason = reason or f"beyond the budget of {recorder.budget:g} s"
        if reason:
            recorder.not_run[plan.name] = reason
            raise NotRunError(reason)
        begun = time.monotonic()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        try:
            limits = self.limits(plan.case.dtype_name)
            measured = comparison.measure(
                plan.case,
                plan.mode,
                plan.providers,
                self.device,
                self.seconds,
                limits,
                memory=plan.memory,
            )
        except BaseException as error:
            # A timeout of pytest's is no Exception.
            recorder.failed.append(f"{plan.name}: {type(error).__name__}: {error}")
            self._lost = self._why_lost(plan)
            # pytest keeps the error, and its frames would keep tensors and graphs.
            traceback.clear_frames(error.__traceback__)
            raise
        recorder.add(plan.case, plan.groups, limits, self.seconds, measured)
        self._durations.append(time.monotonic() - begun)
        return measured

    def limits(self, dtype: str) -> Limits:
        """Measure the machine: its products again and again, for once may meet other work."""
        if self._machine is None:
            self._machine = Limits(
                0.0,
                measure_copy(self.device),
                self._exchange_seconds(),
                cache_bytes(self.device),
                multiprocessor_bytes(self.device),
            )
        when, rate = self._gemm.get(dtype, (-math.inf, 0.0))
        if self.recorder.elapsed - when > _GEMM_AGAIN:
            rate = max(rate, measure_gemm(dtype, self.device))
            self._gemm[dtype] = self.recorder.elapsed, rate
        return self.known_limits()[dtype]

    def _exchange_seconds(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        try:
            seconds, reasons = measure_exchange(self.device)
        except RuntimeError as error:
            # An exchange that did not happen, or a driver that refuses: cases run all the same.
            self.recorder.failed.append(f"exchange latency: {error}")
            return {}
        for name, reason in reasons.items():
            self.recorder.not_run[f"exchange of a {name}"] = reason
        return seconds

    def known_limits(self) -> dict[str, Limits]:
        """The limits of each dtype that was run, the best of what was measured."""
        machine = self._machine or Limits(0.0)
        return {
            dtype: replace(machine, gemm_flops_per_second=rate)
            for dtype, (_, rate) in self._gemm.items()
        }

    def _why_lost(self, plan: Plan) -> str:
        """Say why nothing more can run on the device; "" if something can."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                return f"the device was lost in {plan.name}: {error}"
        return ""
