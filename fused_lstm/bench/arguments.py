"""Types of command-line arguments: what they accept, and what they say of anything else."""

from __future__ import annotations

import argparse
import math

import torch

__all__ = ["device_argument", "positive_count", "positive_number", "select_device"]


def device_argument(text: str) -> torch.device:
    """Read the name of a CPU or CUDA device."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return device


def select_device(device: torch.device) -> torch.device:
    """Make a CPU or CUDA device the current one, and return it with its number.

    Raises:
        LookupError: if it is not there.
    """
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise LookupError(f"torch {torch.__version__} sees {count} CUDA GPUs")
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device


def positive_number(text: str) -> float:
    """Read a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


def positive_count(text: str) -> int:
    """Read a positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)
