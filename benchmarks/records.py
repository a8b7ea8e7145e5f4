"""What is kept of a run: JSON records that say all that a number depends on, and a table."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.timing import Percentiles

__all__ = [
    "Environment",
    "Headline",
    "Result",
    "describe_environment",
    "list_headlines",
    "print_table",
    "write_case",
    "write_json",
]

# Raised when a field changes its meaning.
SCHEMA = 1
_REPOSITORY = Path(__file__).resolve().parents[1]
# A log file has no width of its own; the table fits in this many characters.
_LOG_WIDTH = 150

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
        fp32_precision: torch's settings, by their names below `torch.backends`.
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
    fp32_precision: dict[str, str]
    commit: str | None
    dirty: bool | None
    date: str


@dataclass
class Result:
    """One provider in one mode.

    Attributes:
        provider: "torch", "fused_lstm", or "fused_lstm[backend]" for a backend asked for by name.
        mode: "inference" or "training" (forward and backward pass).
        launch: "eager", or "graph" for the replay of a CUDA graph.
        status: "timed"; "wrong" (and not timed); "unavailable" (cannot run here); "failed".
        detail: why it was not timed.
        backend: what computes it, and `reason`: why that one.
        errors: for each result, its largest absolute error against float64 and the budget of it.
        error_over_budget: the largest ratio of the two; at most 1 is right.
        seconds: percentiles of the time of a call; on a GPU the device's, by CUDA events.
        host_seconds: percentiles of the time until the call returns to the program; None on a CPU.
        repetitions: number of samples; the record's `calls_per_sample` says what one is a mean of.
        ratio: median time of torch.nn.LSTM, launched likewise, over the median time of this; above
            1 this is the faster.
        ratio_of_pairs: median of the same ratio within each round.
        flops: floating-point operations of the matrix products.
        flops_per_second: by the median time.
        fraction_of_gemm: of the rate of a large matrix product in the same dtype and run, the best
            measured so far.
        peak_memory_bytes: GPU memory of a training call beyond inputs and parameters.
    """

    provider: str
    mode: str
    launch: str
    flops: int
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
    flops_per_second: float | None = None
    fraction_of_gemm: float | None = None
    peak_memory_bytes: int | None = None


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
        fp32_precision={
            "cudnn.rnn": torch.backends.cudnn.rnn.fp32_precision,
            "cuda.matmul": torch.backends.cuda.matmul.fp32_precision,
        },
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
            command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is, at every moment, the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        # mkstemp's files are for their owner alone.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _plain(value: Any) -> Any:
    """Replace what JSON has no word for: NaN and infinities by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_case(
    folder: Path,
    case: Case,
    environment: Environment,
    results: Iterable[Result],
    *,
    gemm_flops_per_second: float,
    input_sets: int,
    seconds_per_mode: float,
) -> Path:
    """Write the record of one case; a later run of the case overwrites it.

    Args:
        folder: where the device's records are.
        case: what was run.
        environment: where and with what.
        results: of every provider, mode and launch.
        gemm_flops_per_second: the measured limit, in the case's dtype.
        input_sets: sets of inputs that were rotated over.
        seconds_per_mode: time given to each mode.

    Returns:
        The file's path.
    """
    path = folder / f"{case.name}.json"
    content = {
        "schema": SCHEMA,
        "case": {"name": case.name, "dtype": case.dtype_name, **asdict(case.shape)},
        "environment": asdict(environment),
        "gemm_flops_per_second": gemm_flops_per_second,
        "input_sets": input_sets,
        "calls_per_sample": case.calls_per_sample,
        "seconds_per_mode": seconds_per_mode,
        "results": [asdict(result) for result in results],
    }
    write_json(path, content)
    return path


@dataclass(frozen=True)
class Headline:
    """A provider's figure for one mode.

    Attributes:
        provider: not "torch".
        mode: "inference" or "training".
        geometric_mean_of_ratio: over `shapes`, in float32.
        shapes: names of those of `cases.HEADLINE_SHAPES` that were timed.
    """

    provider: str
    mode: str
    geometric_mean_of_ratio: float
    shapes: tuple[str, ...]


def list_headlines(results: Sequence[tuple[Case, list[Result]]]) -> list[Headline]:
    """Summarise what was timed of `cases.HEADLINE_SHAPES` in float32."""
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for case, of_case in results:
        if case.shape not in cases.HEADLINE_SHAPES or case.dtype_name != "float32":
            continue
        for result in of_case:
            if result.provider != "torch" and result.launch == "eager" and result.ratio is not None:
                of_mode = ratios.setdefault((result.provider, result.mode), {})
                of_mode[case.shape.name] = result.ratio
    return [
        Headline(provider, mode, statistics.geometric_mean(of_mode.values()), tuple(of_mode))
        for (provider, mode), of_mode in ratios.items()
    ]


_COLUMNS = (
    "case",
    "mode",
    "launch",
    "layer",
    "torch ms",
    "ours ms",
    "ratio",
    "(pairs)",
    "of GEMM",
    "error",
)


def print_table(results: Sequence[tuple[Case, list[Result]]]) -> None:
    """Print our layers' times beside those of `torch.nn.LSTM`, with rich if it is installed."""
    rows = [row for case, of_case in results for row in _rows(case, of_case)]
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        for row in (_COLUMNS, *rows):
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(_COLUMNS):
        # What cannot be timed says why in the layer's column, on as many lines as that takes.
        justify: Literal["left", "right"] = "left" if number < 4 else "right"
        table.add_column(name, justify=justify, no_wrap=number != 3)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else _LOG_WIDTH).print(table)


def _rows(case: Case, results: Sequence[Result]) -> list[tuple[str, ...]]:
    torch_seconds = {
        (result.mode, result.launch): result.seconds
        for result in results
        if result.provider == "torch"
    }
    rows = []
    for result in results:
        if result.provider == "torch" and result.status == "timed":
            continue
        layer = result.provider
        if result.backend not in ("", result.provider) and f"[{result.backend}]" not in layer:
            layer += f" ({result.backend})"
        error = "" if result.error_over_budget is None else f"{result.error_over_budget:.2f}"
        beginning = (case.name, result.mode, result.launch)
        theirs = torch_seconds.get((result.mode, result.launch))
        if result.seconds is None:
            rows.append((*beginning, f"{layer} {_reason_in_short(result)}", *[""] * 5, error))
            continue
        rows.append(
            (
                *beginning,
                layer,
                "" if theirs is None else _milliseconds(theirs),
                _milliseconds(result.seconds),
                "" if result.ratio is None else f"{result.ratio:.2f}",
                "" if result.ratio_of_pairs is None else f"{result.ratio_of_pairs:.2f}",
                f"{result.fraction_of_gemm:.1%}",
                error,
            )
        )
    return rows


def _milliseconds(times: Percentiles) -> str:
    milliseconds = times.p50 * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:#.3g}"


def _reason_in_short(result: Result) -> str:
    detail = result.detail.strip().partition("\n")[0]
    return f"{result.status.upper()}: {detail if len(detail) < 100 else detail[:97] + '...'}"
