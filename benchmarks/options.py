"""What the command line of the suite chooses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import shapes
from benchmarks.environment import allocator_is_tuned
from benchmarks.suite import PROVIDERS, Plan, list_plans
from fused_lstm.bench.arguments import device_argument, positive_count, positive_number
from fused_lstm.bench.cases import DTYPES, MODES

__all__ = [
    "DEFAULT_SECONDS",
    "add_options",
    "check_selection",
    "modes",
    "plans",
    "wants_addition",
    "whole",
]

DEFAULT_SECONDS = {"cpu": 0.8, "cuda": 0.3}
_CHOICES = {
    "group": (shapes.GROUPS, "cases"),
    "dtype": (DTYPES, "cases"),
    "mode": (MODES, "cases"),
    "provider": (tuple(PROVIDERS), "providers, instead of each group's own; torch's always runs"),
}


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_lstm", "benchmarks of fused_lstm")
    group.addoption(
        "--device", type=device_argument, default="cpu", help="cpu (default), cuda or cuda:N"
    )
    group.addoption(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder of all devices' records (default: benchmarks/results)",
    )
    group.addoption(
        "--seconds",
        type=positive_number,
        help="time for each case and mode (default: 0.8 on a CPU, 0.3 on a GPU)",
    )
    group.addoption(
        "--budget",
        type=positive_number,
        default=math.inf,
        help="seconds for the whole run; a case that would not fit is not begun (default: no end)",
    )
    group.addoption(
        "--resume",
        action="store_true",
        help="leave out what --out has of the same sources, versions and device",
    )
    group.addoption("--threads", type=positive_count, help="on a CPU (default: torch's own choice)")
    for name, (choices, what) in _CHOICES.items():
        group.addoption(
            f"--{name}",
            action="append",
            choices=choices,
            default=[],
            help=f"only these {what}; may be repeated",
        )


def modes(config: pytest.Config) -> list[str]:
    """List the modes to run: with a tuned allocator training alone, which takes large blocks."""
    possible = ("training",) if allocator_is_tuned() else MODES
    return [mode for mode in possible if mode in (config.getoption("--mode") or MODES)]


def plans(config: pytest.Config, device: torch.device) -> list[Plan]:
    """List the cases to run."""
    return list_plans(
        device.type,
        modes(config),
        groups=config.getoption("--group"),
        dtypes=config.getoption("--dtype"),
        providers=config.getoption("--provider"),
    )


def whole(config: pytest.Config) -> bool:
    """Tell whether no option leaves out anything."""
    return not any(config.getoption(f"--{name}") for name in _CHOICES)


def wants_addition(config: pytest.Config, mode: str) -> bool:
    """Tell whether benchmarks of additions are wanted, which are in float32, in this mode."""
    groups, dtypes = config.getoption("--group"), config.getoption("--dtype")
    return (
        (shapes.ADDITIONS in groups if groups else not config.getoption("--provider"))
        and (not dtypes or "float32" in dtypes)
        and not allocator_is_tuned()
        and mode in modes(config)
    )


def check_selection(config: pytest.Config, device: torch.device) -> None:
    """Refuse options that leave nothing to run.

    Raises:
        pytest.UsageError: naming them.
    """
    if plans(config, device) or any(wants_addition(config, mode) for mode in MODES):
        return
    given = [f"--{name} {value}" for name in _CHOICES for value in config.getoption(f"--{name}")]
    raise pytest.UsageError(f"{' '.join(given)}: no case of a {device.type} device is all of this")
