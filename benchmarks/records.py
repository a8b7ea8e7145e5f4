"""What is kept of a run: JSON records that say all that a number depends on."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.environment import Environment, allocator_is_tuned
from benchmarks.units import write_text
from fused_lstm.bench.cases import Case
from fused_lstm.bench.comparison import Measured, Result
from fused_lstm.bench.limits import Limits
from fused_lstm.bench.timing import Percentiles

__all__ = [
    "Headline",
    "Recorder",
    "Run",
    "Slope",
    "Summary",
    "list_headlines",
    "list_slopes",
    "list_summaries",
    "read_record",
    "write_json",
]

# Raised when a field changes its meaning.
SCHEMA = 2
TUNED_ALLOCATOR_SUFFIX = "-tuned-allocator"


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
        return self._path(case.name)

    def _path(self, name: str) -> Path:
        suffix = TUNED_ALLOCATOR_SUFFIX if allocator_is_tuned() else ""
        return self.folder / f"{name}{suffix}.json"

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
        """Keep results instead of what there was of the same."""

        def key(result: Result) -> tuple[str, str, str]:
            return result.provider, result.mode, result.launch

        _, of_case = self.done.setdefault(case.name, (case, []))
        new = set(map(key, results))
        of_case[:] = [*(old for old in of_case if key(old) not in new), *results]

    def _keep_recorded(self, case: Case) -> None:
        """Keep what the case's record has of the same sources and machine."""
        path = self.path_of(case)
        if case.name in self.done or not path.exists():
            return
        record = read_record(path)
        if record["schema"] == SCHEMA and self._same(record["environment"]):
            self._keep(case, list(map(_result_of, record["results"])))

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
        self._keep_recorded(case)
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
        path = self._path("run")
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
