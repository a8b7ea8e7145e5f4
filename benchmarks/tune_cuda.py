"""Measure what a time step costs in each configuration of the CUDA kernels that may be the best.

For a grid of problems the plans that promise to be the fastest are compiled, run over sequences of
two lengths, and timed; a step is what the longer one takes more, divided by the steps that it has
more. The result is a table in the format of kernels/cuda/measured.json, which the plan is corrected
by (kernels/cuda/costs.py): to use it, add its measurements there. The exit status is 0; 1 if no
configuration could be measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fused_lstm.kernels.cuda import config as planning
from fused_lstm.kernels.cuda import launch
from fused_lstm.kernels.cuda.compiler import KernelUnavailableError
from fused_lstm.kernels.cuda.config import Config, Flags
from rich.console import Console
from rich.table import Table

from benchmarks import records, timing
from benchmarks.compare import device_argument, positive_number

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HIDDEN = (128, 256, 512, 64, 1024, 768, 384, 32, 192, 2048)
BATCHES = (8, 64, 256)
# Plans of a problem that are measured, and the two numbers of steps.
CANDIDATES = 4
STEPS = (64, 320)
SAMPLES = 7
DEFAULT_BUDGET = 300.0


@dataclass(frozen=True)
class Candidate:
    """A configuration to measure.

    Attributes:
        config: the configuration, with the flags of training.
        dtype: of the gates.
        batch: rows of the problem that it is for.
        modelled: microseconds of a step as the plan has them.
    """

    config: Config
    dtype: torch.dtype
    batch: int
    modelled: float


def list_candidates(
    dtypes: Sequence[torch.dtype], limits: planning.DeviceLimits
) -> Iterator[Candidate]:
    """List what is to be measured, the problems that most people have first; nothing twice."""
    seen = set()
    for hidden in HIDDEN:
        for dtype in dtypes:
            for batch in BATCHES:
                for direction in planning.DIRECTIONS:
                    plans = planning.plan(
                        direction,
                        batch=batch,
                        hidden=hidden,
                        dtype=dtype,
                        limits=limits,
                        flags=Flags(),
                    )
                    for plan in plans[:CANDIDATES]:
                        if plan.config not in seen:
                            seen.add(plan.config)
                            yield Candidate(plan.config, dtype, batch, plan.cost_us)


def us_per_step(candidate: Candidate, device: torch.device) -> float:
    """Measure one configuration, with as many teams as the problem has and find room at once.

    Raises:
        KernelUnavailableError: if it cannot be compiled or finds no room.
    """
    config, H = candidate.config, candidate.config.HIDDEN
    kernel = launch.executor_for(device).load(config, device)
    tiles = min(-(-candidate.batch // config.COLUMNS), kernel.resident_teams)
    if tiles < 1:
        raise KernelUnavailableError(f"no room for a team of {config.TEAM} blocks")
    B = min(candidate.batch, tiles * config.COLUMNS)
    medians = []
    for T in STEPS:
        call = _call(config, T, B, H, candidate.dtype, device)
        samples = timing.Samples()
        for turn in range(SAMPLES + timing.WARM_UP):
            into = samples if turn >= timing.WARM_UP else timing.Samples()
            timing.take_sample(call, 0, device, device.type == "cuda", into)
        medians.append(statistics.median(samples.seconds))
    return (medians[1] - medians[0]) / (STEPS[1] - STEPS[0]) * 1e6


def _call(
    config: Config, T: int, B: int, H: int, dtype: torch.dtype, device: torch.device
) -> timing.Call:
    """A call of the kernel on random numbers."""

    def random(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).to(of)

    weight, state, cell = random(4 * H, H, scale=H**-0.5), random(B, H), random(B, H)
    if config.direction == "forward":
        gates = random(T, B, 4 * H)
        return lambda index: launch.lstm_forward(
            gates, weight, state, cell, input_precision="tf32", config=config
        )
    grad, c = random(T, B, H), random(T, B, H, of=torch.float32)
    activations = random(T, B, 4 * H).sigmoid()
    return lambda index: launch.lstm_backward(
        grad, None, state, cell, activations, c, weight, cell,
        input_precision="tf32", config=config,
    )  # fmt: skip


def run(
    dtypes: Sequence[torch.dtype], device: torch.device, out: Path, budget: float
) -> dict[str, Any]:
    """Measure until the budget is spent; write measured.json and return what it holds."""
    start = time.monotonic()
    environment = records.describe_environment(device)
    limits = launch.limits_of(device)
    console = Console()
    table = Table("direction", "type", "H", "B", "scope", "team", "columns", "model µs", "µs")
    measurements, refused, left = [], {}, 0
    for candidate in list_candidates(dtypes, limits):
        if time.monotonic() - start > budget:
            left += 1
            continue
        config = candidate.config
        try:
            us = us_per_step(candidate, device)
        except (KernelUnavailableError, RuntimeError) as error:
            refused[str(config)] = str(error)
            continue
        if us <= 0:
            refused[str(config)] = f"measured {us:g} µs: beyond what the clock tells apart"
            continue
        measurements.append(
            {
                "arch": limits.arch,
                "direction": config.direction,
                "config": config.shape,
                "us_per_step": round(us, 4),
            }
        )
        table.add_row(
            config.direction, config.TYPE, str(config.HIDDEN), str(candidate.batch), config.SCOPE,
            str(config.TEAM), str(config.COLUMNS), f"{candidate.modelled:.2f}", f"{us:.2f}",
        )  # fmt: skip
    content = {"schema": 1, "measurements": measurements}
    records.write_json(out / environment.slug / "measured.json", content)
    console.print(table)
    for config, reason in refused.items():
        console.print(f"not measured: {config}: {reason}", style="yellow")
    console.print(
        f"{len(measurements)} measured, {len(refused)} refused, {left} left when the budget of "
        f"{budget:g} s was spent"
    )
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=device_argument, default="cuda")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="may be given again; all by default"
    )
    parser.add_argument("--budget", type=positive_number, default=DEFAULT_BUDGET, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.device.type != "cuda" or not torch.cuda.is_available():
        parser.error(f"argument --device: expected an NVIDIA GPU, got {str(options.device)!r}")
    dtypes = [DTYPES[name] for name in options.dtype or DTYPES]
    content = run(dtypes, options.device, options.out, options.budget)
    return 0 if content["measurements"] else 1


if __name__ == "__main__":
    sys.exit(main())
