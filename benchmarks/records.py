"""What is kept of a run: JSON records that say all that a number depends on."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, shapes
from benchmarks.units import hash_of, write_text
from fused_lstm.bench.cases import Case
from fused_lstm.bench.comparison import Measured, Result
from fused_lstm.bench.limits import Limits
from fused_lstm.bench.timing import Percentiles

__all__ = [
    "Environment",
    "Headline",
    "Recorder",
    "Run",
    "Slope",
    "Summary",
    "allocator_is_tuned",
    "describe_environment",
    "list_headlines",
    "list_slopes",
    "list_summaries",
    "read_record",
    "write_json",
]

# Raised when a field changes its meaning.
SCHEMA = 2
_REPOSITORY = Path(__file__).resolve().parents[1]
TUNED_ALLOCATOR_SUFFIX = "-tuned-allocator"

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
            command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is, at every moment, the old one or the new one."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Replace what JSON has no word for: NaN and infinities by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class Recorder:
    """Keeps what a run measures, and writes it as it comes: a run that is cut off loses nothing.

    Args:
        folder: of all devices' records.
        environment: where and with what the run is made.
        budget: seconds for the run.
        resume: whether what records of the same sources and versions hold is not measured again.
        whole: whether it is a run of all cases; one of some leaves the last whole run's record.
    """

    def __init__(
        self,
        folder: Path,
        environment: Environment,
        *,
        budget: float,
        resume: bool,
        whole: bool = True,
    ) -> None:
        self.folder = folder / environment.slug
        self.environment, self.budget, self.resume = environment, budget, resume
        self.whole = whole
        self.done: dict[str, tuple[Case, list[Result]]] = {}
        # Of the cases that this run itself has measured.
        self._settings: dict[str, dict[str, Any]] = {}
        self.not_run: dict[str, str] = {}
        self.failed: list[str] = []
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def path_of(self, case: Case) -> Path:
        suffix = TUNED_ALLOCATOR_SUFFIX if allocator_is_tuned() else ""
        return self.folder / f"{case.name}{suffix}.json"

    def can_resume(self, path: Path) -> bool:
        """Whether a record holds what this run would measure again, and need not."""
        if not self.resume or not path.exists():
            return False
        record = read_record(path)
        return record["schema"] == SCHEMA and self._same(record["environment"])

    def _same(self, environment: dict[str, Any]) -> bool:
        """Whether what was measured there is what would be measured here."""
        ours = asdict(self.environment)
        varying = ("commit", "dirty", "date", "load_average")
        return all(
            environment.get(name) == value for name, value in ours.items() if name not in varying
        )

    def resumed(
        self, case: Case, mode: str, contenders: Iterable[tuple[str, str]]
    ) -> list[Result] | None:
        """What an earlier run has of a case, if this run resumes it.

        Args:
            case: the case.
            mode: "inference" or "training".
            contenders: provider and launch of all who would run it.
        """
        path = self.path_of(case)
        if not self.can_resume(path):
            return None
        record = read_record(path)
        results = [_result_of(result) for result in record["results"] if result["mode"] == mode]
        known = {
            (result.provider, result.launch)
            for result in results
            # What failed may not fail again.
            if result.status in ("timed", "unavailable")
        }
        if not set(contenders) <= known:
            return None
        self._keep(case, results)
        return results

    def _keep(self, case: Case, results: Sequence[Result]) -> None:
        _, of_case = self.done.setdefault(case.name, (case, []))
        of_case.extend(results)

    def _keep_recorded(self, case: Case, results: Sequence[Result]) -> None:
        """Keep what the case's record has of the same sources and machine, but these results."""
        path = self.path_of(case)
        if case.name in self.done or not path.exists():
            return
        record = read_record(path)
        if record["schema"] == SCHEMA and self._same(record["environment"]):
            measured = {(result.provider, result.mode, result.launch) for result in results}
            others = map(_result_of, record["results"])
            self._keep(case, [r for r in others if (r.provider, r.mode, r.launch) not in measured])

    def add(
        self,
        case: Case,
        groups: Sequence[str],
        limits: Limits,
        seconds: float,
        measured: Measured,
    ) -> None:
        """Add a case's results in one mode, and write the case's record.

        Args:
            case: what was run.
            groups: those that it belongs to.
            limits: of the device, in the case's dtype.
            seconds: time given to each mode.
            measured: of every provider and launch.
        """
        self._keep_recorded(case, measured.results)
        self._keep(case, measured.results)
        calls = self._settings.get(case.name, {}).get("calls_per_sample", {})
        mode = measured.results[0].mode
        self._settings[case.name] = {
            "groups": list(groups),
            "input_sets": measured.sets,
            "calls_per_sample": {**calls, mode: measured.calls_per_sample},
            "seconds_per_mode": seconds,
        }
        self._write(case, limits)

    def _write(self, case: Case, limits: Limits) -> None:
        content = {
            "schema": SCHEMA,
            "case": {"name": case.name, "dtype": case.dtype_name, **asdict(case.shape)},
            "environment": asdict(self.environment),
            "limits": asdict(limits),
            **self._settings[case.name],
            "results": [asdict(result) for result in self.done[case.name][1]],
        }
        write_json(self.path_of(case), content)

    def finish(self, limits: Mapping[str, Limits]) -> Run:
        """Compare all cases with the limits as they turned out, and write the record of the run.

        Args:
            limits: of the device, by dtype: the best of the whole run.
        """
        done = list(self.done.values())
        for case, results in done:
            if case.name in self._settings:
                for result in results:
                    result.compare_with(limits[case.dtype_name], case)
                self._write(case, limits[case.dtype_name])
        run = Run(
            list_headlines(done),
            list_summaries(done, self.environment.device_type),
            list_slopes(done, self.environment.device_type),
        )
        suffix = TUNED_ALLOCATOR_SUFFIX if allocator_is_tuned() else ""
        path = self.folder / f"run{suffix}.json"
        if path.exists() and not (done and self.whole):
            return run
        known = {dtype: asdict(each) for dtype, each in limits.items()}
        if self.can_resume(path):
            known = {**read_record(path)["limits"], **known}
        write_json(
            path,
            {
                "schema": SCHEMA,
                "environment": asdict(self.environment),
                "limits": known,
                "budget_seconds": None if math.isinf(self.budget) else self.budget,
                "elapsed_seconds": self.elapsed,
                **asdict(run),
                "cases": [case.name for case, _ in done],
                "not_run": self.not_run,
                "wrong": self.describe("wrong"),
                "failed": [*self.failed, *self.describe("failed")],
            },
        )
        return run

    def describe(self, status: str) -> list[str]:
        """Describe the results of one status."""
        return [
            f"{case.name} {result.provider} {result.mode} {result.launch}: {result.detail}"
            for case, results in self.done.values()
            for result in results
            if result.status == status
        ]


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: if it is not one, naming the file.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON record ({error})") from None
    return content


def _result_of(content: dict[str, Any]) -> Result:
    result = Result(**content)
    for name in ("seconds", "host_seconds"):
        if content[name] is not None:
            setattr(result, name, Percentiles(**content[name]))
    return result


@dataclass(frozen=True)
class Headline:
    """A provider's figure for one mode.

    Attributes:
        provider: not "torch".
        mode: "inference" or "training".
        geometric_mean_of_ratio: over `shapes`, in float32.
        shapes: names of those of `shapes.HEADLINE` that were timed.
    """

    provider: str
    mode: str
    geometric_mean_of_ratio: float
    shapes: tuple[str, ...]


def list_headlines(results: Sequence[tuple[Case, Sequence[Result]]]) -> list[Headline]:
    """Summarise what was timed of `shapes.HEADLINE` in float32, eagerly."""
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for case, of_case in results:
        if case.shape not in shapes.HEADLINE or case.dtype_name != "float32":
            continue
        for result in of_case:
            if result.provider != "torch" and result.launch == "eager" and result.ratio is not None:
                of_mode = ratios.setdefault((result.provider, result.mode), {})
                of_mode[case.shape.name] = result.ratio
    return [
        Headline(provider, mode, statistics.geometric_mean(of_mode.values()), tuple(of_mode))
        for (provider, mode), of_mode in ratios.items()
    ]


@dataclass(frozen=True)
class Slope:
    """How time grows along a sweep: k of time ~ size^k, by least squares of logarithms.

    Attributes:
        group: the sweep.
        provider: as in `Result`, and so `mode` and `launch`.
        dtype: of the cases.
        slope: k, over the upper half of the points: where the sweep is large.
        points: how many of them.
    """

    group: str
    provider: str
    mode: str
    launch: str
    dtype: str
    slope: float
    points: int


@dataclass(frozen=True)
class Summary:
    """A provider's ratios over all cases that were timed, sweeps aside.

    Attributes:
        provider: as in `Result`, and so `mode` and `launch`.
        dtype: of the cases.
        geometric_mean_of_ratio: over them.
        least: of the ratios, and the case that it is of.
        cases: how many.
    """

    provider: str
    mode: str
    launch: str
    dtype: str
    geometric_mean_of_ratio: float
    least: tuple[float, str]
    cases: int

    @property
    def text(self) -> str:
        """One line."""
        return (
            f"{self.provider}, {self.dtype} {self.mode} {self.launch}: "
            f"{self.geometric_mean_of_ratio:.2f} over {self.cases} cases, "
            f"at worst {self.least[0]:.2f} ({self.least[1]})"
        )


def list_summaries(
    results: Sequence[tuple[Case, Sequence[Result]]], device_type: str
) -> list[Summary]:
    """Summarise each provider in each mode, launch and dtype."""
    ratios: dict[tuple[str, str, str, str], list[tuple[float, str]]] = {}
    for case, of_case in results:
        if set(shapes.groups_of(case, device_type)) <= set(shapes.SWEEPS):
            continue
        for result in of_case:
            if result.provider != "torch" and result.ratio is not None:
                key = (result.provider, result.mode, result.launch, case.dtype_name)
                ratios.setdefault(key, []).append((result.ratio, case.name))
    return [
        Summary(*key, statistics.geometric_mean(ratio for ratio, _ in each), min(each), len(each))
        for key, each in ratios.items()
    ]


@dataclass(frozen=True)
class Run:
    """What a run comes to."""

    headlines: list[Headline]
    summaries: list[Summary]
    slopes: list[Slope]


def list_slopes(results: Sequence[tuple[Case, Sequence[Result]]], device_type: str) -> list[Slope]:
    """Fit a slope to each sweep that has at least three points of a provider."""
    slopes = []
    for group, size_of in shapes.SWEEPS.items():
        lines: dict[tuple[str, str, str, str], dict[int, float]] = {}
        for case, of_case in results:
            if group not in shapes.groups_of(case, device_type):
                continue
            for result in of_case:
                if result.seconds is not None:
                    key = (result.provider, result.mode, result.launch, case.dtype_name)
                    lines.setdefault(key, {})[size_of(case.shape)] = result.seconds.p50
        for (provider, mode, launch, dtype), times in lines.items():
            upper = sorted(times)[-max(3, -(-len(times) // 2)) :]
            if len(upper) < 3:
                continue
            fit = statistics.linear_regression(
                [math.log(size) for size in upper], [math.log(times[size]) for size in upper]
            )
            slopes.append(Slope(group, provider, mode, launch, dtype, fit.slope, len(upper)))
    return slopes
