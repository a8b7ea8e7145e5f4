"""Measure what a time step costs in each configuration of the CUDA kernels that may be the best.

For a grid of problems the plans that promise to be the fastest are compiled, run over sequences of
two lengths, and timed; a step is what the longer one takes more, divided by the steps that it has
more. OUT/measured.json has every measurement as soon as it is made. Run again with the same OUT, on
the same GPU and with the same kernels, what is there is not measured again.

The plan is corrected by a table (kernels/cuda/costs.py): `--install OUT/measured.json` puts the
measurements into it. The exit status is 0; 1 if a kernel failed, if no configuration could be
measured, or if the file to install cannot be; 2 for arguments that cannot be.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fused_lstm.kernels.cuda import config as planning
from fused_lstm.kernels.cuda import costs, launch
from fused_lstm.kernels.cuda.compiler import KernelUnavailableError
from fused_lstm.kernels.cuda.config import Config, Flags

from benchmarks.units import hash_of, write_json, write_text
from fused_lstm.bench import timing
from fused_lstm.bench.arguments import device_argument, positive_number

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HIDDEN = (128, 256, 512, 64, 1024, 768, 384, 32, 192, 2048)
BATCHES = (8, 64, 256)
# Plans of a problem that are measured, and the two numbers of steps.
CANDIDATES = 4
STEPS = (64, 320)
SAMPLES = 7


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


def hash_of_kernels() -> str:
    """A digest of what a measurement depends on: device code, and what compiles and launches it."""
    return hash_of(["kernels/cuda/"], ["*.cuh", "*.h", "compiler.py", "driver.py", "launch.py"])


def key_of(measurement: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a measurement is of, and where it goes in a table: architecture and configuration."""
    config = json.dumps(measurement["config"], sort_keys=True)
    return measurement["arch"], measurement["direction"], config


def resume(path: Path, device: str, kernels: str) -> dict[str, Any]:
    """What has been measured before, on this device and with these kernels; else an empty record.

    The record has these, besides the `schema` and the `measurements` of kernels/cuda/measured.json:
    `device`; `kernels`, a digest; `refused`, what cannot run here and why; `failed`, what went
    wrong in the last run; `left`, how many configurations are still to be measured, those that
    failed among them.
    """
    if path.exists():
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (content.get("device"), content.get("kernels")) == (device, kernels):
            print(f"{path}: {len(content['measurements'])} measured before", flush=True)
            return content
        print(f"{path}: of another device or other kernels, measuring anew", flush=True)
    content = {"schema": costs.SCHEMA, "device": device, "kernels": kernels}
    return {**content, "left": 0, "refused": [], "failed": [], "measurements": []}


def run(
    dtypes: Sequence[torch.dtype], device: torch.device, out: Path, budget: float
) -> dict[str, Any]:
    """Measure until the budget is spent; keep OUT/measured.json, and return what it holds."""
    start = time.monotonic()
    limits = launch.limits_of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    path = out / "measured.json"
    content = resume(path, name, hash_of_kernels())
    measurements, refused = content["measurements"], content["refused"]
    known = {key_of(each) for each in measurements} | {tuple(each["key"]) for each in refused}
    waiting = []
    for candidate in list_candidates(dtypes, limits):
        config = candidate.config
        measurement = {
            "arch": limits.arch,
            "direction": config.direction,
            "config": config.shape,
            "us_per_step": 0.0,
        }
        if key_of(measurement) not in known:
            waiting.append((candidate, measurement))
    content |= {"left": len(waiting), "failed": []}
    write_json(path, content)
    for candidate, measurement in waiting:
        if time.monotonic() - start > budget:
            break
        try:
            us = us_per_step(candidate, device)
        except KernelUnavailableError as error:
            refused.append({"key": key_of(measurement), "reason": str(error)})
            print(f"refused: {candidate.config}: {error}", flush=True)
        except RuntimeError as error:
            content["failed"].append({"key": key_of(measurement), "reason": str(error)})
            print(f"FAILED: {candidate.config}: {error}", flush=True)
            if is_lost(device):
                break
            continue
        else:
            print(describe(candidate, us), flush=True)
            if us <= 0:
                print("not kept: beyond what the clock tells apart", flush=True)
                continue
            measurement["us_per_step"] = round(us, 4)
            measurements.append(measurement)
        content["left"] -= 1
        write_json(path, content)
    write_json(path, content)
    print(
        f"{len(measurements)} measured, {len(refused)} refused, {len(content['failed'])} failed, "
        f"{content['left']} left after {time.monotonic() - start:.0f} s"
    )
    return content


def is_lost(device: torch.device) -> bool:
    """Whether a kernel has left the device so that nothing more runs on it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def describe(candidate: Candidate, us: float) -> str:
    """A line about a measurement."""
    config = candidate.config
    return (
        f"{config.direction:<8} {config.TYPE:<8} H {config.HIDDEN:<4} B {candidate.batch:<3} "
        f"{config.SCOPE:<7} team {config.TEAM:<3} columns {config.COLUMNS:<3} "
        f"model {candidate.modelled:6.2f} µs, measured {us:6.2f} µs"
    )


def install(file: Path, table: Path) -> int:
    """Put a file's measurements into a table, in place of those of the same configuration.

    Returns:
        How many the table then has.

    Raises:
        ValueError: if the file, or the table, is not as kernels/cuda/costs.py says; the table stays
            as it is.
    """
    merged: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for path in (table, file):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected an object, got {content!r}")
        part = {name: content.get(name) for name in ("schema", "measurements")}
        costs.Measurements(part)
        merged |= {key_of(each): each for each in part["measurements"]}
        if content.get("kernels", hash_of_kernels()) != hash_of_kernels():
            print(f"{path}: measured with other kernels than those that are here", file=sys.stderr)
    # A line for each, in one order: what changes is what a comparison shows.
    lines = [f"    {json.dumps(merged[key], sort_keys=True)}" for key in sorted(merged)]
    entries = "\n" + ",\n".join(lines) + "\n  " if lines else ""
    write_text(table, f'{{\n  "schema": {costs.SCHEMA},\n  "measurements": [{entries}]\n}}\n')
    return len(merged)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=device_argument, default="cuda")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="may be given again; all by default"
    )
    parser.add_argument(
        "--budget", type=positive_number, default=math.inf, help="seconds (default: no end)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/tune"))
    parser.add_argument(
        "--install", type=Path, metavar="FILE", help="measure nothing, but put FILE into the table"
    )
    options = parser.parse_args(arguments)
    if options.install is not None:
        try:
            number = install(options.install, costs.MEASURED_FILE)
        except (OSError, ValueError) as error:
            print(f"{options.install} cannot be installed: {error}", file=sys.stderr)
            return 1
        print(f"{costs.MEASURED_FILE}: {number} measurements")
        return 0
    if options.device.type != "cuda" or not torch.cuda.is_available():
        parser.error(f"argument --device: expected an NVIDIA GPU, got {str(options.device)!r}")
    dtypes = [DTYPES[name] for name in options.dtype or DTYPES]
    content = run(dtypes, options.device, options.out, options.budget)
    return 1 if content["failed"] or not content["measurements"] else 0


if __name__ == "__main__":
    sys.exit(main())
