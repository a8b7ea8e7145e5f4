"""Where and with what a run is made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.units import ROOT, hash_of

__all__ = ["TUNED_ALLOCATOR", "Environment", "allocator_is_tuned", "describe_environment"]

# With these in the environment, glibc takes blocks of up to 4 GiB from memory that the process has,
# and keeps what is freed: the pages of a large tensor are not asked for and cleared at each call.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}


@dataclass(frozen=True)
class Environment:
    """Where and with what a run was made.

    Attributes:
        device: name of the GPU, or of the processor.
        device_type: "cuda" or "cpu".
        slug: the device as a folder's name.
        driver: version of the GPU's driver; None on a CPU.
        compute_capability: such as "9.0"; None on a CPU.
        processor: name of the CPU.
        cpu_count: processors that this process may use.
        threads: threads of an operator on the CPU.
        allocator: of memory on the CPU: "default", or "glibc, 4 GiB thresholds".
        load_average: processes that were running or waiting, over the minute before the run; times
            taken beside other work are worth less. None where the system does not say.
        python: version.
        torch: version.
        triton: version; None if it is not installed.
        cuda: version torch was built for; None without.
        cudnn: version; None without.
        peers: versions of the other packages that are there, by their names.
        sources: digest of the package, its kernels and the benchmarks.
        commit: git commit of the benchmarked tree; None outside a git checkout.
        dirty: whether files differ from the commit, results aside.
        date: start of the run, UTC.
    """

    device: str
    device_type: str
    slug: str
    driver: str | None
    compute_capability: str | None
    processor: str
    cpu_count: int
    threads: int
    allocator: str
    load_average: float | None
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    cudnn: int | None
    peers: dict[str, str]
    sources: str
    commit: str | None
    dirty: bool | None
    date: str


def describe_environment(device: torch.device) -> Environment:
    """Collect what the numbers depend on."""
    threads = torch.get_num_threads()
    processor = _processor_name()
    on_gpu = device.type == "cuda"
    if on_gpu:
        name = torch.cuda.get_device_name(device)
        slug = _slug(name)
    else:
        name = processor
        slug = _slug(f"{name} {threads} thread{'s' * (threads > 1)}")
    status = _output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return Environment(
        device=name,
        device_type=device.type,
        slug=slug,
        driver=_driver_version() if on_gpu else None,
        compute_capability=(
            "{}.{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else None
        ),
        processor=processor,
        cpu_count=_usable_processors(),
        threads=threads,
        allocator="glibc, 4 GiB thresholds" if allocator_is_tuned() else "default",
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version_of("triton"),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        peers=peers.versions(),
        sources=hash_of(
            ("fused_lstm/**/", "kernels/**/", "benchmarks/**/"),
            ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "measured.json"),
        ),
        commit=_output_of("git", "rev-parse", "HEAD") or None,
        dirty=None if status is None else bool(status),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def allocator_is_tuned() -> bool:
    """Tell whether this process was started with TUNED_ALLOCATOR in its environment."""
    return TUNED_ALLOCATOR.items() <= os.environ.items()


def _slug(text: str) -> str:
    plain = re.sub(r"\((r|tm)\)|@.*(?= \d+ thread)", " ", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-.")


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    versions = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _output_of(*command: str) -> str | None:
    """What a command prints, or None if it cannot."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
