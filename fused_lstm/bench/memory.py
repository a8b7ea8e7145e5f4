"""How much memory a call takes beyond its inputs and parameters."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fused_lstm.bench import cases
from fused_lstm.bench.cases import Case, Shape
from fused_lstm.bench.providers import TORCH, OurProvider, Provider, provider_of_backend

__all__ = ["peak_of_call", "peak_of_provider"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# Enough for a child to import torch and run what may be the largest case.
_SECONDS = 300


def peak_of_call(call: Callable[[], object], device: torch.device) -> int:
    """Measure the most memory that a call holds above what was held before it, in bytes.

    On a GPU by PyTorch's allocator. On a CPU by the process's resident memory, which sees whatever
    a library allocates: the process should be one in which the call has not run before, for it may
    keep its scratch memory, and libraries should have been loaded by a smaller call.

    Args:
        call: what to run; it may keep nothing alive but its result, which counts.
        device: where it runs.

    Raises:
        NotImplementedError: on a CPU, if this is not Linux.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _CLEAR.exists():
        raise NotImplementedError("the peak of resident memory is read from Linux's /proc")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        # What is free but resident would be taken again without a trace.
        libc.malloc_trim(0)
    # Linux's documentation of /proc, clear_refs: 5 resets the peak to what is resident now.
    _CLEAR.write_text("5")
    before = _resident_bytes("VmRSS")
    result = call()
    peak = _resident_bytes("VmHWM") - before
    del result
    return max(peak, 0)


def _resident_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise NotImplementedError(f"{_STATUS} has no {field}")


def peak_of_provider(provider: Provider, case: Case, mode: str) -> int | None:
    """Measure the first call of a provider on the CPU, in a process of its own.

    Args:
        provider: torch's or one of ours.
        case: what to run.
        mode: "inference" or "training".

    Returns:
        Bytes beyond inputs and parameters; None where they cannot be told (another provider, not
        Linux).

    Raises:
        RuntimeError: if the process failed.
    """
    if provider != TORCH and not isinstance(provider, OurProvider):
        return None
    if not _CLEAR.exists():
        return None
    order = {
        "backend": provider.backend or "default" if isinstance(provider, OurProvider) else None,
        "shape": asdict(case.shape),
        "dtype": case.dtype_name,
        "mode": mode,
        "threads": torch.get_num_threads(),
    }
    try:
        child = subprocess.run(
            [sys.executable, "-m", "fused_lstm.bench.memory", json.dumps(order)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(str(error)) from error
    if child.returncode != 0:
        raise RuntimeError(f"measuring the memory of {provider.name} failed:\n{child.stderr}")
    return int(child.stdout)


def _measure(order: dict[str, object]) -> int:
    """Do in a fresh process what `peak_of_provider` asks for."""
    backend, mode = order["backend"], str(order["mode"])
    torch.set_num_threads(int(str(order["threads"])))
    provider = TORCH if backend is None else provider_of_backend(str(backend))
    case = Case(Shape(**order["shape"]), str(order["dtype"]))  # type: ignore[arg-type]
    device = torch.device("cpu")
    # Sizes that the libraries' code is the same for, and their memory is not.
    small = replace(case, shape=replace(case.shape, T=min(case.shape.T, 2), B=1))
    with torch.set_grad_enabled(mode == "training"):
        for each in (small, case):
            data = cases.make_data(each, device)
            prepared = provider.prepare(each, cases.make_parameters(each, device), device, mode)
            if each is small:
                prepared.call(data)
        return peak_of_call(lambda: prepared.call(data), device)


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))
