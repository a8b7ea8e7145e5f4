"""Measure how long the exchange of h within one time step takes: of a block, clusters, the grid.

The kernels (exchange.cu) exchange exactly as the CUDA LSTM kernels do and compute next to nothing.
A step takes what a launch of many steps takes more than one of few, divided by the steps that it
has more. Every launch's result is compared with what it must be, so an exchange that does not take
place is an error, never a figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fused_lstm.kernels.cuda import launch
from fused_lstm.kernels.cuda.compiler import KernelUnavailableError
from fused_lstm.kernels.cuda.driver import Kernel
from fused_lstm.kernels.cuda.instance import ForwardConfig, Scope
from fused_lstm.kernels.cuda.limits import DeviceLimits
from fused_lstm.kernels.cuda.parameters import ForwardParameters
from torch import Tensor

from fused_lstm.bench import timing

SOURCE = Path(__file__).with_suffix(".cu")
CLUSTERS = (2, 4, 8, 16)
# Of a grid besides all multiprocessors: blocks of one too old for clusters, and larger teams.
GRIDS = (2, 4, 8, 16, 32, 64)
# Few and many steps, and launches of each that are timed.
STEPS = (1024, 9216)
SAMPLES = 7
# The constants and the numbers of chunks and words of exchange.cu.
MULTIPLIER, INCREMENT = 1664525, 1013904223
CHUNKS, WORDS = 8, 4


class ExchangeError(RuntimeError):
    """Blocks did not hear from each other what they should have."""


class ExchangeConfig(ForwardConfig):
    """One of the kernels: a block alone, a cluster of blocks, or blocks of a grid."""

    @classmethod
    def of(cls, scope: Scope, team: int) -> ExchangeConfig:
        """The kernel of a scope and a number of blocks."""
        config = cls(
            TYPE="bfloat16", SCOPE=scope, HIDDEN=8 * team, TEAM=team, COLUMNS=8,
            UNIT_WARPS=1, GROUPS=1, K_WARPS=4, REGISTER_TILES=0,
        )  # fmt: skip
        # There are no weights: none take room in shared memory.
        return dataclasses.replace(config, REGISTER_TILES=config.k_tiles)

    @property
    def kernel_name(self) -> str:
        """See `Config`."""
        return f"exchange_{self.SCOPE}_{self.TEAM}"

    def source(self) -> str:
        """See `Config`."""
        return SOURCE.read_text(encoding="utf-8") + self.instance()

    def instance(self) -> str:
        """What follows the text of exchange.cu."""
        constants = "\n".join(
            f"  static constexpr {self._declared(name)};" for name in self._fields()
        )
        configuration = f"{self.kernel_name}_configuration"
        layout = f"ForwardLayout<{configuration}>"
        return f"""
struct {configuration} {{
{constants}
}};
static_assert({layout}::THREADS == {self.threads}, "");
static_assert({layout}::SHARED_BYTES == {self.shared_bytes}, "");
static_assert({layout}::EXCHANGE_BYTES == {self.exchange_bytes}, "");
EXCHANGE_KERNEL({self.kernel_name}, {configuration})
"""


def list_configs(limits: DeviceLimits) -> tuple[dict[str, ExchangeConfig], dict[str, str]]:
    """List what a device can be asked to run, by name, and why not the rest.

    Args:
        limits: of the device.
    """
    configs = {"block": ExchangeConfig.of("block", 1)}
    reasons = {}
    for team in CLUSTERS:
        if team <= limits.max_cluster:
            configs[f"cluster-{team}"] = ExchangeConfig.of("cluster", team)
        else:
            largest = "no clusters" if limits.max_cluster == 1 else f"at most {limits.max_cluster}"
            reasons[f"cluster-{team}"] = f"{limits.arch} has {largest}"
    for team in GRIDS:
        if team < limits.multiprocessors:
            configs[f"grid-{team}"] = ExchangeConfig.of("grid", team)
        else:
            reasons[f"grid-{team}"] = f"there are {limits.multiprocessors} multiprocessors"
    configs["grid"] = ExchangeConfig.of("grid", limits.multiprocessors)
    return configs, reasons


def expected_counters(team: int, steps: int) -> Tensor:
    """Compute what a team's chunks hold after some steps: int32 [team, CHUNKS, WORDS].

    Args:
        team: blocks.
        steps: how many.
    """
    v = np.arange(team * CHUNKS * WORDS, dtype=np.uint32).reshape(team, CHUNKS, WORDS)
    ranks, chunks = np.arange(team)[:, None], np.arange(CHUNKS)
    multiplier, increment = np.uint32(MULTIPLIER), np.uint32(INCREMENT)
    for s in range(steps):
        # Unsigned arithmetic wraps around, as the kernel's does.
        v = v[(ranks + s + chunks) % team, (chunks + 2) % CHUNKS] * multiplier + increment
    return torch.from_numpy(v.view(np.int32))


class Exchange:
    """A kernel with its memory on a device.

    Args:
        config: which one.
        kernel: the same, loaded.
        device: where it runs.
    """

    def __init__(self, config: ExchangeConfig, kernel: Kernel, device: torch.device) -> None:
        self._config, self._kernel = config, kernel
        self.counters = torch.empty(config.TEAM, CHUNKS, WORDS, dtype=torch.int32, device=device)
        self.flags = torch.empty(config.TEAM, dtype=torch.int32, device=device)
        self.buffers = torch.empty(config.exchange_bytes, dtype=torch.uint8, device=device)
        self._parameters = ForwardParameters(
            exchange=self.buffers.data_ptr(), flags=self.flags.data_ptr()
        )
        self._parameters.recurrence[0].h_n = self.counters.data_ptr()

    def prepare(self, steps: int) -> None:
        """Make the next launch one of so many steps, which finds nothing of those before it."""
        self.counters.fill_(-1)
        self.buffers.fill_(0xFF)
        self.flags.zero_()
        self._parameters.recurrence[0].steps = steps

    def launch(self) -> None:
        """Put the launch on the device's current stream."""
        self._kernel.launch(1, self._parameters)

    def check(self, expected: Tensor) -> None:
        """Compare what the last launch has left with what it must be.

        Raises:
            ExchangeError: if it differs.
        """
        wrong = (self.counters.cpu() != expected).any(2).sum()
        if wrong:
            raise ExchangeError(
                f"{self._config.kernel_name}: {wrong} of {expected.shape[:2].numel()} counters are "
                "wrong: the blocks did not exchange them"
            )


def seconds_per_exchange(exchange: Exchange, team: int, device: torch.device) -> float:
    """Time one exchange.

    Args:
        exchange: the kernel.
        team: its blocks.
        device: where it runs.

    Raises:
        ExchangeError: if a launch leaves wrong counters, or more steps take no longer.
    """
    least = []
    for steps in STEPS:
        expected = expected_counters(team, steps)
        samples = timing.Samples()
        for turn in range(timing.WARM_UP + SAMPLES):
            into = samples if turn >= timing.WARM_UP else timing.Samples()
            exchange.prepare(steps)
            timing.take_sample(lambda _: exchange.launch(), 0, device, device.type == "cuda", into)
            exchange.check(expected)
        least.append(min(samples.seconds))
    seconds = (least[1] - least[0]) / (STEPS[1] - STEPS[0])
    if seconds <= 0:
        raise ExchangeError(f"{STEPS[1]} steps took no longer than {STEPS[0]}: {least} seconds")
    return seconds


def measure_exchange(device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Measure the exchange of every scope that a device has.

    Args:
        device: the GPU.

    Returns:
        Seconds of one exchange by scope: "block", "cluster-N", "grid-N" and "grid", which has a
        block on each multiprocessor; and for scopes that cannot run here, why not.

    Raises:
        ExchangeError: if blocks did not hear from each other.
    """
    executor = launch.executor_for(device)
    configs, reasons = list_configs(launch.limits_of(device))
    seconds = {}
    for name, config in configs.items():
        try:
            kernel = executor.load(config, device)
        except KernelUnavailableError as error:
            reasons[name] = str(error)
            continue
        seconds[name] = seconds_per_exchange(Exchange(config, kernel, device), config.TEAM, device)
    return seconds, reasons


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda")
    device = parser.parse_args(arguments).device
    if device.type != "cuda" or not torch.cuda.is_available():
        parser.error(f"argument --device: expected an NVIDIA GPU, got {str(device)!r}")
    seconds, reasons = measure_exchange(device)
    for name, each in seconds.items():
        print(f"{name:12}{each * 1e9:8.0f} ns")
    for name, reason in reasons.items():
        print(f"{name:12}not measured: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
