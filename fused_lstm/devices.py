"""What the rest needs to know of a device, whether or not it is at hand."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DeviceDescription",
    "autocast_is_on",
    "describe_device",
    "device_of",
    "input_precision",
    "precision_of",
    "upload",
]


class DeviceDescription(NamedTuple):
    """A device, real or described.

    Attributes:
        type: torch's device type: "cpu", "cuda" (NVIDIA and AMD GPUs), "meta", ...
        arch: instruction set of a GPU, such as "sm_90" or "gfx942"; empty for other devices.
        name: what to call it in print.
    """

    type: str
    arch: str = ""
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.arch or self.type


def describe_device(device: str | torch.device | DeviceDescription) -> DeviceDescription:
    """Describe a torch device, or a GPU that need not be there.

    Args:
        device: a `torch.device`, its name ("cpu", "cuda:1"), or a GPU architecture: "sm_80",
            "sm_90", "sm_100", "gfx942".

    Raises:
        ValueError: for a name that is neither.
    """
    if isinstance(device, torch.device):
        if device.type == "cuda" and device.index is None:
            # The current one: not for the cache.
            device = torch.device("cuda", torch.cuda.current_device())
        return _describe_torch_device(device)
    if isinstance(device, DeviceDescription):
        return device
    if isinstance(device, str) and re.fullmatch(r"sm_\d+[af]?|gfx[0-9a-f]+", device):
        arch = device.rstrip("af") if device.startswith("sm_") else device
        return DeviceDescription("cuda", arch, f"{device} GPU")
    try:
        return describe_device(torch.device(device))
    except (AssertionError, RuntimeError, TypeError):
        raise ValueError(
            f"device={device!r}: expected a torch device such as 'cpu' or 'cuda:0', or a GPU "
            "architecture such as 'sm_90' or 'gfx942'"
        ) from None


@functools.cache
def _describe_torch_device(device: torch.device) -> DeviceDescription:
    if device.type != "cuda":
        return DeviceDescription(device.type, name="CPU" if device.type == "cpu" else device.type)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return DeviceDescription("cuda", arch, properties.name)


_CPU = describe_device("cpu")


def device_of(tensor: Tensor) -> DeviceDescription:
    """Describe the device of a tensor; at every call of a layer, and quickly on CPUs."""
    return _CPU if tensor.is_cpu else describe_device(tensor.device)


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast chooses the dtype of what is computed on devices of this type."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type)


def input_precision() -> str:
    """How float32 operands enter the tensor cores: as cuDNN's recurrent layers do."""
    precision: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"


def precision_of(dtype: torch.dtype, device_type: str) -> str:
    """What a `Problem` says of its products: empty where `input_precision` changes nothing."""
    return input_precision() if dtype is torch.float32 and device_type == "cuda" else ""


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting for it; a CUDA graph copies it at each replay.

    Pageable memory is read before the call returns, but when a graph is captured: there it would be
    read at the replay, when it is no more.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_available():
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            from fused_lstm.kernels.cuda import driver

            copied: Tensor = driver.upload(x, device)
            return copied
    return x.to(device, non_blocking=True)
