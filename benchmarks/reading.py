"""What records say of devices, cases and runs, for those who write about them.

Schema 1, of earlier versions, is read, too: what its records lack is None. Neither PyTorch nor the
packages that were measured are needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = [
    "SCHEMAS",
    "Device",
    "Record",
    "ReportError",
    "Result",
    "number",
    "read_additions",
    "read_devices",
    "read_records",
]

SCHEMAS = (1, 2)


class ReportError(Exception):
    """Records or a README that no report can be made of; the message names the file."""


@dataclass(frozen=True)
class Result:
    """What a record says of one provider in one mode; None is what was not measured.

    Attributes:
        seconds: median time of a call.
        ratio: median time of torch.nn.LSTM, launched likewise, over this one's.
        limit_seconds: the least time that the machine allows.
        memory_ratio: peak memory over that of torch.nn.LSTM.
    """

    provider: str
    mode: str
    launch: str
    status: str
    detail: str
    backend: str
    error_over_budget: float | None
    seconds: float | None
    ratio: float | None
    limit_seconds: float | None
    fraction_of_limit: float | None
    peak_memory_bytes: float | None
    memory_ratio: float | None


@dataclass(frozen=True)
class Record:
    """One case on one device."""

    path: Path
    case: dict[str, Any]
    groups: tuple[str, ...]
    environment: dict[str, Any]
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        return str(self.case["name"])

    @property
    def dtype(self) -> str:
        return str(self.case["dtype"])

    def find(self, provider: str, mode: str, launch: str) -> Result | None:
        wanted = (provider, mode, launch)
        return next((x for x in self.results if (x.provider, x.mode, x.launch) == wanted), None)


@dataclass(frozen=True)
class Device:
    """All that is recorded of a device.

    Attributes:
        folder: where its records are.
        environment: of the run, or of the newest record where no run is recorded.
        records: cases in the order of the run, those of earlier runs last.
        run: summary of the run; None where it was not finished.
        other_runs: summaries of runs with another allocator.
    """

    folder: Path
    environment: dict[str, Any]
    records: tuple[Record, ...]
    run: dict[str, Any] | None
    other_runs: tuple[dict[str, Any], ...]

    def slopes(self, group: str, mode: str, launch: str, dtype: str) -> dict[str, float]:
        """Slopes of a sweep by provider, none where the run has none."""
        wanted = (group, mode, launch, dtype)
        return {
            x["provider"]: x["slope"]
            for x in ([] if self.run is None else self.run["slopes"])
            if (x["group"], x["mode"], x["launch"], x["dtype"]) == wanted
            and number(x["slope"]) is not None
        }


def read_records(folder: Path) -> list[Record]:
    """Read the records of the cases in a device's folder.

    Raises:
        ReportError: one is no record, or of another schema.
    """
    return [_read(path, _parse_record) for path in sorted(folder.glob("*.json")) if _is_case(path)]


def read_devices(folder: Path) -> list[Device]:
    """Read all devices' records, the device with the latest run first.

    Raises:
        ReportError: there are none, or one is no record, or of another schema.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    devices = [device for path in folders if (device := _read_device(path)) is not None]
    if not devices:
        raise ReportError(f"{folder}: no records; expected folders of them, as make bench writes")
    return sorted(devices, key=lambda device: device.environment["date"], reverse=True)


def read_additions(folder: Path) -> dict[Path, dict[str, Any]]:
    """Read what all devices' records say of additions, by their files.

    Raises:
        ReportError: one is no record, or of another schema.
    """
    return {path: _read(path, _parse_additions) for path in folder.glob("*/additions.json")}


def _is_case(path: Path) -> bool:
    return path.name != "additions.json" and not _is_run(path)


def _is_run(path: Path) -> bool:
    return re.fullmatch(r"run(-.*)?\.json", path.name) is not None


def _read_device(folder: Path) -> Device | None:
    records = read_records(folder)
    if not records:
        return None
    runs = [_read(path, _parse_run) for path in sorted(folder.glob("*.json")) if _is_run(path)]
    # Times with another allocator are other times: they are not shown in one table.
    allocators = [record.environment["allocator"] for record in records]
    allocator = "default" if "default" in allocators else allocators[0]
    records = [r for r in records if r.environment["allocator"] == allocator]
    of_allocator = [run for run in runs if run["environment"]["allocator"] == allocator]
    run = max(of_allocator, key=lambda run: run["environment"]["date"], default=None)
    records = [_with_groups(record, [] if run is None else run["headlines"]) for record in records]
    if run is not None:
        environment, order = run["environment"], list(run["cases"])
    else:
        newest = max(records, key=lambda r: r.environment["date"])
        environment, order = newest.environment, []
    position = {name: number for number, name in enumerate(order)}
    records.sort(key=lambda r: position.get(r.name, len(order)))
    others = tuple(run for run in runs if run["environment"]["allocator"] != allocator)
    return Device(folder, environment, tuple(records), run, others)


def _read(path: Path, parse: Callable[[Path, dict[str, Any]], Any]) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: not JSON: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in SCHEMAS:
        known = " or ".join(map(str, SCHEMAS))
        raise ReportError(f"{path}: expected a record of schema {known}, got {schema}")
    try:
        return parse(path, content)
    except (AttributeError, KeyError, TypeError) as error:
        message = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ReportError(f"{path}: not a record: {message}") from error


def _parse_record(path: Path, content: dict[str, Any]) -> Record:
    case = content["case"]
    for key in ("name", "dtype", *"TBIH", "num_layers", "bidirectional", "batch_first"):
        case[key]
    _check_environment(content["environment"])
    return Record(
        path,
        {"proj_size": 0, "packed": False, "cell": False, **case},
        tuple(content.get("groups") or ()),
        content["environment"],
        tuple(_parse_result(result) for result in content["results"]),
    )


def _check_environment(environment: dict[str, Any]) -> None:
    for key in ("device", "device_type", "threads", "allocator", "torch", "commit", "date"):
        environment[key]


def _parse_result(result: dict[str, Any]) -> Result:
    timed = result["status"] == "timed"
    seconds = result.get("seconds") or {}
    return Result(
        provider=result["provider"],
        mode=result["mode"],
        launch=result["launch"],
        status=result["status"],
        detail=result.get("detail") or "",
        backend=result.get("backend") or "",
        error_over_budget=number(result.get("error_over_budget")),
        seconds=number(seconds.get("p50")) if timed else None,
        ratio=number(result.get("ratio")) if timed else None,
        limit_seconds=number(result.get("limit_seconds")),
        fraction_of_limit=number(result.get("fraction_of_limit")) if timed else None,
        peak_memory_bytes=number(result.get("peak_memory_bytes")),
        memory_ratio=number(result.get("memory_ratio")),
    )


def number(value: Any) -> float | None:
    """A finite number, or None: records write NaN and infinities as words."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _parse_run(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    _check_environment(content["environment"])
    for key in ("cases", "not_run"):
        content[key]
    for headline in content["headlines"]:
        for key in ("provider", "mode", "geometric_mean_of_ratio", "shapes"):
            headline[key]
    for slope in content.get("slopes") or ():
        for key in ("group", "provider", "mode", "launch", "dtype", "slope"):
            slope[key]
    return {**content, "slopes": content.get("slopes") or []}


def _parse_additions(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    _check_environment(content["environment"])
    for result in content["additions"]:
        for key in ("addition", "sizes", "mode", "status"):
            result[key]
    return content


def _with_groups(record: Record, headlines: Iterable[dict[str, Any]]) -> Record:
    """Give a record that names no groups, as older ones do not, the one that it would be in."""
    if record.groups:
        return record
    shapes = {shape for headline in headlines for shape in headline["shapes"]}
    if record.name.removesuffix("-float32") in shapes:
        group = "small"
    else:
        group = "streaming" if record.case["T"] == 1 else "variants"
    return replace(record, groups=(group,))
