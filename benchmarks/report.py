"""Write what the README says of speed, and draw the pictures, from the records alone.

The README's text between the markers `<!-- performance: begin (make report) -->` and
`<!-- performance: end -->`, and between those of `additions`, is replaced; each device's pictures
go beside its records. With --check nothing is written: the exit status is 1 if the README says
anything but what the records say. It is 2 if records or markers are not what they have to be.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.plots import MODES, OURS, TORCH, describe_case, describe_device, name_of_provider
from benchmarks.reading import (
    SCHEMAS,
    Device,
    Record,
    ReportError,
    number,
    read_additions,
    read_devices,
)

__all__ = ["main", "write_additions", "write_performance"]

# Below this ratio ours is called slower; what is nearer to 1 another run may turn round.
SLOWER_BELOW = 0.97
# Rows that the first table gives to a group; all are in the table that unfolds.
_ROWS_OF_GROUP = {"small": 5, "grid": 5, "variants": 4}
_ROWS_OF_OTHER_GROUPS = 2
_WIDTH = 100
# PyTorch's own layers by another way, and plain PyTorch: in the pictures, not in the tables.
_NOT_IN_TABLES = (f"{OURS}[aten]", f"{OURS}[reference]")
_PICTURE_FILES = ("sweep-*.png", "ratios*.png", "limit*.png", "memory*.png")

# How the additions' rows are named, and today's way in a few words.
_ADDITIONS = {
    "resets": ("`resets`", "a loop over single steps of `nn.LSTM`"),
    "lengths": ("`lengths` (T/4 to T)", "packing, `nn.LSTM`, padding"),
    "return_cells": ("`return_cells`", "a loop over `nn.LSTMCell`"),
}
_SAME_WORK = ("resets", "lengths-all-T", "return_cells")
_REGULARIZERS = ("recurrent_dropout", "weight_dropout", "cell_clip", "zoneout")


# ---- performance


@dataclass(frozen=True)
class _Column:
    """Ratios of a provider, launched one way."""

    provider: str
    launch: str

    @property
    def title(self) -> str:
        name = name_of_provider(self.provider)
        if name == self.provider:
            name = f"`{name}`"
        return name if self.launch == "eager" else f"{name}, {_launch(self.launch)}"


def write_performance(devices: Sequence[Device], base: Path) -> str:
    """Write the README's section on speed.

    Args:
        devices: the most recent first.
        base: the README's folder, which its links start from.
    """
    parts = []
    seen: set[str] = set()
    explained = False
    for device in devices:
        kind = device.environment["device_type"]
        parts += _write_device(device, base, first=kind not in seen, explained=explained)
        explained = explained or kind not in seen
        seen.add(kind)
    if "cuda" not in seen:
        parts.append(
            "GPU figures are still to be measured: `make gpu` tests and times everything on an "
            "NVIDIA GPU."
        )
    return "\n\n".join(parts)


def _write_device(device: Device, base: Path, *, first: bool, explained: bool) -> list[str]:
    """Write a device's paragraphs.

    Args:
        device: what is written of.
        base: where links start from.
        first: the most recent of its type, whose table does not have to be unfolded.
        explained: whether an earlier device's table has been explained.
    """
    parts = [_fill(f"{_write_headline(device)} {_write_slower(device.records)}".strip())]
    shown = plots.sorted_by_group(device.records)
    if shown:
        columns = _list_columns(device.records)
        if first:
            parts += _embed(device, base)
        if not explained:
            parts.append(_fill(_explain_table(shown)))
        table = _write_table(_select(shown), [c for c in columns if _is_usual(c)])
        others = [record for record in device.records if plots.group_of(record) is None]
        everything = _write_times([*shown, *others], columns)
        summary = f"All {len(device.records)} cases, with times"
        parts += [table, _fold(summary, everything)] if first else [_fold(summary, everything)]
    bullets = [
        *_write_slopes(device),
        _write_memory(device.records),
        _write_errors(device.records),
        _write_missing(device),
        _write_earlier(device),
        _write_links(device, base),
    ]
    parts.append("\n".join(_fill(f"- {bullet}", indent="  ") for bullet in bullets if bullet))
    return parts


def _is_usual(column: _Column) -> bool:
    """Whether it stands in the first table, too: all as most people call them, ours in graphs."""
    return column.launch == "eager" or column.provider == OURS


def _write_headline(device: Device) -> str:
    environment = device.environment
    software = [f"torch {environment['torch']}"]
    software += [f"{name} {v}" for name, v in (environment.get("peers") or {}).items()]
    commit = (environment["commit"] or "")[:7]
    if commit:
        software.append(f"commit {commit}{' with changes' if environment.get('dirty') else ''}")
    load = number(environment.get("load_average"))
    if load is not None and load > 0.5 * environment.get("cpu_count", 1):
        software.append(f"beside other work (load average {load:g})")
    when = f"{environment['date'][:10]}, {', '.join(software)}"
    lead = f"**{describe_device(environment)}**"
    if device.run is not None and device.run["schema"] < max(SCHEMAS):
        lead += ", measured with an earlier version of the kernels and of this suite"
    means, over = _run_means(device.run), "usual sizes in float32"
    if OURS not in means:
        # Where the shapes of the headline are not run, as on GPUs.
        means, over = _record_means(device.records), "cases"
    if OURS not in means:
        return f"{lead} ({when})."
    count = max(mean.count for mean in means[OURS])
    text = (
        f"{lead}: over {count} {over} `{OURS}.LSTM` is "
        + " and ".join(f"{mean.ratio:.2f} times as fast in {mean.mode}" for mean in means[OURS])
        + f" as `torch.nn.LSTM` (geometric means; {when})"
    )
    also = []
    for provider, of_provider in means.items():
        # A mean over few of them would look like one over all.
        enough = [mean for mean in of_provider if 2 * mean.count >= count]
        if enough and provider not in (OURS, TORCH, *_NOT_IN_TABLES):
            words = [
                f"{mean.ratio:.2f} in {mean.mode}"
                + (f" over {mean.count} of them" if mean.count < count else "")
                for mean in enough
            ]
            also.append(f"{_Column(provider, 'eager').title} {' and '.join(words)}")
    for run in device.other_runs:
        words = [f"{mean.ratio:.2f} in {mean.mode}" for mean in _run_means(run).get(OURS, [])]
        if words:
            allocator = run["environment"]["allocator"]
            also.append(f"`{OURS}` {' and '.join(words)} with another allocator ({allocator})")
    return f"{text}; {'; '.join(also)}." if also else f"{text}."


@dataclass(frozen=True)
class _Mean:
    """Geometric mean of a provider's ratios in one mode."""

    mode: str
    ratio: float
    count: int


def _run_means(run: dict[str, Any] | None) -> dict[str, list[_Mean]]:
    """A run's headlines by provider."""
    means: dict[str, list[_Mean]] = {}
    for x in [] if run is None else run["headlines"]:
        mean = _Mean(x["mode"], x["geometric_mean_of_ratio"], len(x["shapes"]))
        means.setdefault(x["provider"], []).append(mean)
    return means


def _record_means(records: Sequence[Record]) -> dict[str, list[_Mean]]:
    """Means over all cases but those of sweeps alone, launched eagerly, by provider."""
    shown = plots.sorted_by_group(records)
    means: dict[str, list[_Mean]] = {}
    for provider in plots.providers_of(shown):
        for mode in MODES:
            results = [record.find(provider, mode, "eager") for record in shown]
            ratios = [x.ratio for x in results if x is not None and x.ratio is not None]
            if ratios:
                mean = _Mean(mode, statistics.geometric_mean(ratios), len(ratios))
                means.setdefault(provider, []).append(mean)
    return means


def _write_slower(records: Sequence[Record]) -> str:
    """Say how often ours is the slower one, and where it is slowest."""
    ratios = [
        (x.ratio, record, x)
        for record in records
        for x in record.results
        if x.provider == OURS and x.ratio is not None
    ]
    if not ratios:
        return ""
    slower = [ratio for ratio, _, _ in ratios if round(ratio, 2) < SLOWER_BELOW]
    counted = f"of the {len(ratios)} measurements (case × mode)"
    if not slower:
        return f"In none {counted} is `{OURS}` slower by more than {_percent(1 - SLOWER_BELOW)}."
    ratio, record, result = min(ratios, key=lambda item: item[0])
    launch = "" if result.launch == "eager" else f", {_launch(result.launch)}"
    return (
        f"In {len(slower)} {counted} `{OURS}` is slower (below {SLOWER_BELOW}×; **bold** in the "
        f"tables), at worst {_ratio(ratio)}: {_case(record)}, {result.mode}{launch}."
    )


def _launch(launch: str) -> str:
    return "CUDA graph" if launch == "graph" else launch


def _list_columns(records: Sequence[Record]) -> list[_Column]:
    """Ours; our backends by name where they are another than the chosen one; other packages."""
    providers = [
        provider
        for provider in plots.providers_of(records)
        if provider not in (TORCH, *_NOT_IN_TABLES)
        and (provider == OURS or not provider.startswith(OURS) or _differs(records, provider))
    ]
    launches = plots.launches_of(records)
    columns = [_Column(provider, launch) for provider in providers for launch in launches]
    return [column for column in columns if any(_has_ratio(r, column) for r in records)]


def _differs(records: Iterable[Record], provider: str) -> bool:
    return any(
        x.ratio is not None
        and (chosen := record.find(OURS, x.mode, x.launch)) is not None
        and chosen.backend != x.backend
        for record in records
        for x in record.results
        if x.provider == provider
    )


def _has_ratio(record: Record, column: _Column) -> bool:
    return any(ratio is not None for ratio in _ratios(record, column))


def _ratios(record: Record, column: _Column) -> list[float | None]:
    results = [record.find(column.provider, mode, column.launch) for mode in MODES]
    return [None if result is None else result.ratio for result in results]


def _select(records: Sequence[Record]) -> list[Record]:
    """The first shapes of each group and, whatever it is, the case where ours does worst."""
    groups: dict[str | None, list[Record]] = {}
    for record in records:
        groups.setdefault(plots.group_of(record), []).append(record)
    selected = []
    for group, of_group in groups.items():
        rows = _ROWS_OF_GROUP.get(group or "", _ROWS_OF_OTHER_GROUPS)
        worst = min(of_group, key=_smallest_ratio)
        # On a GPU a shape runs in several dtypes: one is enough. On a CPU a dtype is a case's own.
        shapes: dict[str, Record] = {_shape(worst): worst}
        for record in of_group:
            if len(shapes) < rows:
                shapes.setdefault(_shape(record), record)
        kept = list(shapes.values())
        selected += [record for record in of_group if any(record is one for one in kept)]
    return selected


def _shape(record: Record) -> str:
    on_cpu = record.environment["device_type"] == "cpu"
    return describe_case(record.case, dtype="" if on_cpu else record.dtype)


def _smallest_ratio(record: Record) -> float:
    ratios = [x.ratio for x in record.results if x.provider == OURS and x.ratio is not None]
    return min(ratios, default=math.inf)


def _explain_table(records: Sequence[Record]) -> str:
    text = (
        "Time of `torch.nn.LSTM` over the time of each, inference / training, medians, calls "
        "taking turns: above 1 it is the faster one. Of each group, the first cases and the one "
        "where ours does worst; blank is what was not run."
    )
    if _has_fractions(records):
        text += (
            " Of the limit: the least time that this machine's measured speeds allow for the "
            "case's products, memory and exchanges, over the time taken."
        )
    return text


def _has_fractions(records: Iterable[Record]) -> bool:
    return any(
        x.fraction_of_limit is not None for r in records for x in r.results if x.provider == OURS
    )


def _write_table(records: Sequence[Record], columns: Sequence[_Column]) -> str:
    with_fractions = _has_fractions(records)
    columns = [column for column in columns if any(_has_ratio(r, column) for r in records)]
    header = ["", "steps × batch, input → hidden", *_ratio_titles(records, columns)]
    if with_fractions:
        header.append(f"`{OURS}` of the limit")
    rows = []
    last: str | None = ""
    for record in records:
        group = plots.group_of(record)
        cells = ["" if group == last else plots.name_of_group(group)]
        last = group
        cells += [_case(record), *_ratio_cells(record, records, columns)]
        if with_fractions:
            fractions = _values(record, OURS, plots.launches_of(records)[0], "fraction_of_limit")
            cells.append(_pair(fractions, _share))
        rows.append(cells)
    return _markdown(header, rows, text_columns=2)


def _write_times(records: Sequence[Record], columns: Sequence[_Column]) -> str:
    """The table of all: milliseconds of both sides, all ratios, memory."""
    launches = plots.launches_of(records)
    timed = [_Column(provider, launch) for launch in launches for provider in (TORCH, OURS)]
    with_memory = any(
        x.memory_ratio is not None for r in records for x in r.results if x.provider == OURS
    )
    header = ["steps × batch, input → hidden"]
    header += [f"{column.title}, ms" for column in timed]
    header += _ratio_titles(records, columns)
    if with_memory:
        header.append("memory, ours over torch's")
    rows = []
    last: str | None = ""
    for record in records:
        group = plots.group_of(record)
        if group != last:
            title = plots.name_of_group(group)
            rows.append([f"*{title}*", *[""] * (len(header) - 1)])
            last = group
        cells = [_case(record)]
        for column in timed:
            values = _values(record, column.provider, column.launch, "seconds")
            cells.append(_pair(values, _milliseconds))
        cells += _ratio_cells(record, records, columns)
        if with_memory:
            cells.append(_pair(_values(record, OURS, launches[0], "memory_ratio"), _ratio))
        rows.append(cells)
    return _markdown(header, rows, text_columns=1)


def _values(record: Record, provider: str, launch: str, name: str) -> list[float | None]:
    results = [record.find(provider, mode, launch) for mode in MODES]
    return [None if result is None else getattr(result, name) for result in results]


def _ratio_titles(records: Sequence[Record], columns: Sequence[_Column]) -> list[str]:
    titles = []
    for column in columns:
        modes = _modes_of(records, column)
        # With one mode alone a cell has one number.
        titles.append(column.title if len(modes) > 1 else f"{column.title}, {modes[0]}")
    return titles


def _modes_of(records: Sequence[Record], column: _Column) -> list[str]:
    return [
        mode
        for number, mode in enumerate(MODES)
        if any(_ratios(record, column)[number] is not None for record in records)
    ]


def _ratio_cells(
    record: Record, records: Sequence[Record], columns: Sequence[_Column]
) -> list[str]:
    cells = []
    for column in columns:
        modes = _modes_of(records, column)
        ratios = [
            r for mode, r in zip(MODES, _ratios(record, column), strict=True) if mode in modes
        ]
        cells.append(_pair(ratios, _marked if column.provider == OURS else _ratio))
    return cells


def _marked(ratio: float) -> str:
    return f"**{_ratio(ratio)}**" if round(ratio, 2) < SLOWER_BELOW else _ratio(ratio)


def _pair(values: Sequence[float | None], write: Callable[[float], str]) -> str:
    if all(value is None for value in values):
        return ""
    return " / ".join("–" if value is None else write(value) for value in values)


def _case(record: Record) -> str:
    """On a GPU every dtype is named, for there several are usual."""
    on_cpu = record.environment["device_type"] == "cpu"
    return describe_case(record.case, dtype=plots.CPU_DTYPE if on_cpu else "")


def _ratio(ratio: float) -> str:
    """Two digits that count."""
    if ratio >= 9.95:
        return f"{ratio:.0f}×"
    return f"{ratio:.1f}×" if ratio >= 0.995 else f"{ratio:.2f}×"


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1e3
    if milliseconds >= 99.95:
        return f"{milliseconds:.0f}"
    return f"{milliseconds:#.3g}" if milliseconds >= 0.1 else f"{milliseconds:#.2g}"


def _write_slopes(device: Device) -> list[str]:
    """A line for each dtype: the powers of the swept sizes that the time grows with."""
    slopes = [
        x
        for x in ([] if device.run is None else device.run["slopes"])
        if x["provider"] in (TORCH, OURS)
        and number(x["slope"]) is not None
        # Graphs leave the launches out of the time, which is not how most people call a layer.
        and x["launch"] == "eager"
    ]
    lines = []
    for dtype in dict.fromkeys(x["dtype"] for x in slopes):
        words = []
        for swept, size in (("T", "steps"), ("B", "batch"), ("H", "hidden units")):
            found = {
                (x["provider"], x["mode"]): x["slope"]
                for x in slopes
                if (x["group"], x["dtype"]) == (f"sweep-{swept}", dtype)
            }
            ours, theirs = (
                _pair([found.get((provider, mode)) for mode in MODES], "{:.2f}".format)
                for provider in (OURS, TORCH)
            )
            if ours:
                words.append(f"{size} {ours}" + (f" (`torch.nn.LSTM` {theirs})" if theirs else ""))
        if words:
            lines.append(
                f"Time grows, in {dtype}, with these powers of the size (over the upper half of a "
                f"sweep; inference / training): {'; '.join(words)}."
            )
    return lines


def _write_memory(records: Iterable[Record]) -> str:
    words = []
    for mode in MODES:
        ratios = [
            x.memory_ratio
            for record in records
            for x in record.results
            if (x.provider, x.mode, x.launch) == (OURS, mode, "eager")
            and x.memory_ratio is not None
        ]
        if ratios:
            words.append(
                f"{mode} {_ratio(statistics.median(ratios))} ({_ratio(min(ratios))} to "
                f"{_ratio(max(ratios))} over {len(ratios)} cases)"
            )
    if not words:
        return ""
    return f"Peak memory of a call over that of `torch.nn.LSTM`, medians: {', '.join(words)}."


def _write_errors(records: Iterable[Record]) -> str:
    """Name the packages whose results are less exact than ours may be."""
    worst: dict[str, float] = {}
    for record in records:
        for x in record.results:
            if x.status == "timed" and x.error_over_budget is not None and x.error_over_budget > 1:
                worst[x.provider] = max(worst.get(x.provider, 0.0), x.error_over_budget)
    if not worst:
        return ""
    words = [f"{name_of_provider(p)} up to {error:.2f}×" for p, error in sorted(worst.items())]
    return (
        "Error against float64, over what we allow ourselves, where that is above 1: "
        f"{', '.join(words)}."
    )


def _write_missing(device: Device) -> str:
    """Say what was wrong, failed or not run."""
    reasons: dict[str, list[str]] = {}
    # As a run's record begins what it says of a result.
    known = set()
    for record in device.records:
        for x in record.results:
            launch = "" if x.launch == "eager" else f", {_launch(x.launch)}"
            what = f"{record.name} ({x.provider}, {x.mode}{launch})"
            known.add(f"{record.name} {x.provider} {x.mode} {x.launch}")
            if x.status in ("wrong", "failed"):
                reasons.setdefault(x.status, []).append(what)
            elif x.status == "not run":
                reasons.setdefault(f"not run, {_plain(x.detail)}", []).append(what)
    if device.run is not None:
        for line in device.run.get("failed") or ():
            if line.partition(":")[0] not in known:
                reasons.setdefault("failed", []).append(_plain(line))
        for name, reason in device.run["not_run"].items():
            reasons.setdefault(f"not run, {_plain(reason)}", []).append(name)
    order = sorted(reasons, key=lambda reason: (reason.startswith("not run"), reason))
    words = [
        f"{len(reasons[reason])} {reason.rstrip(' ,')}: {_some(reasons[reason])}"
        for reason in order
    ]
    return f"Without a time: {'; '.join(words)}." if words else ""


def _write_earlier(device: Device) -> str:
    """Say how many records are of other code than the run's."""

    def code(environment: dict[str, Any]) -> tuple[Any, ...]:
        return environment["commit"], environment["torch"]

    records = [r.environment for r in device.records]
    earlier = [x["date"][:10] for x in records if code(x) != code(device.environment)]
    if not earlier:
        return ""
    return (
        f"{len(earlier)} of the {len(records)} records are of another commit or PyTorch, the "
        f"oldest of {min(earlier)}."
    )


def _some(names: Sequence[str]) -> str:
    most = 3
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _plain(reason: str) -> str:
    """A reason's first line, short, and nothing that Markdown would take for its own."""
    line = reason.strip().partition("\n")[0]
    line = line if len(line) <= 80 else f"{line[:77]}..."
    return re.sub(r"([<>*_`\[\]|\\])", r"\\\1", line)


def _embed(device: Device, base: Path) -> list[str]:
    """The picture that tells most, in the page itself."""
    folder = _link(device.folder, base)
    return [
        f"![{picture.title}]({folder}/{picture.file_name})"
        for picture in plots.list_pictures(device)
        if picture.file_name.startswith("sweep-h-")
    ][:1]


def _write_links(device: Device, base: Path) -> str:
    folder = _link(device.folder, base)
    titles: dict[str, list[str]] = {}
    for picture in plots.list_pictures(device):
        link = f"[{picture.part or picture.title}]({folder}/{picture.file_name})"
        titles.setdefault(picture.title if picture.part else "", []).append(link)
    words = [*titles.pop("", []), *(f"{title}: {', '.join(x)}" for title, x in titles.items())]
    records = f"[every record]({folder})"
    return f"Pictures: {'; '.join(words)}; {records}." if words else f"{records}."


def _link(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()


# ---- additions


def write_additions(folder: Path, base: Path) -> str:
    """Write the README's table of what torch.nn.LSTM cannot do, from the newest record of it.

    Args:
        folder: of all devices' records.
        base: the README's folder, which its links start from.
    """
    records = read_additions(folder)
    if not records:
        return "No figures yet: `make bench` measures them."
    path = max(sorted(records), key=lambda path: records[path]["environment"]["date"])
    record = records[path]
    found: dict[tuple[str, tuple[int, ...], str], dict[str, Any]] = {}
    for result in record["additions"]:
        sizes = tuple(result["sizes"][size] for size in "TBIH")
        found[result["addition"], sizes, result["mode"]] = result
    all_sizes = sorted({sizes for _, sizes, _ in found}, key=math.prod)
    steps = " or ".join(str(T) for T in sorted({sizes[0] for sizes in all_sizes}))
    intro = (
        "How many times faster than what people write today, inference / training, "
        f"{steps} steps in {record.get('dtype', 'float32')} on "
        f"[{describe_device(record['environment'])}]({_link(path, base)}):"
    )
    header = ["", "instead of", *(f"batch {s[1]}, {s[2]} → {s[3]}" for s in all_sizes)]
    rows = []
    for addition in dict.fromkeys(name for name, _, _ in found):
        of_addition = [result for (name, _, _), result in found.items() if name == addition]
        todays = of_addition[0].get("todays_way")
        if not todays:
            continue
        label, way = _ADDITIONS.get(addition, (f"`{addition}`", todays))
        cells = [
            " / ".join(_addition_cell(found.get((addition, sizes, mode))) for mode in MODES)
            for sizes in all_sizes
        ]
        rows.append([label, way, *cells])
    after = " ".join(filter(None, [_write_most(found, all_sizes[-1]), _write_cost(found)]))
    return "\n\n".join([_fill(intro), _markdown(header, rows, text_columns=2), _fill(after)])


def _addition_cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    ratio = number(result.get("ratio"))
    return result["status"] if ratio is None else _ratio(ratio)


def _write_most(
    found: dict[tuple[str, tuple[int, ...], str], dict[str, Any]], sizes: tuple[int, ...]
) -> str:
    """What is possible at most where the products take most of the time."""
    results = [found.get(("resets", sizes, mode), {}) for mode in MODES]
    most = [number(result.get("largest_ratio")) for result in results]
    if None in most:
        return ""
    return (
        f"With {sizes[1]} sequences of {sizes[3]} units the time is matrix products on both sides: "
        f"nothing but those, at full speed, would make `resets` {_pair(most, _ratio)}."
    )


def _write_cost(found: dict[tuple[str, tuple[int, ...], str], dict[str, Any]]) -> str:
    """What the additions cost beside our own plain layer."""
    costs: dict[tuple[str, str], list[float]] = {}
    for (name, _, mode), result in found.items():
        over = number(result.get("over_plain"))
        if over is not None:
            costs.setdefault((name, mode), []).append(over - 1)

    def highest(names: Iterable[str], modes: Iterable[str] = MODES) -> float | None:
        of_names = [costs.get((name, mode), []) for name in names for mode in modes]
        return max((cost for one in of_names for cost in one), default=None)

    words = []
    same_work = highest(_SAME_WORK)
    if same_work is not None:
        words.append(f"resets, lengths and cells cost at most {_percent(same_work)} of its time")
    for name in _REGULARIZERS:
        cost = highest([name])
        if cost is None:
            continue
        if name == "zoneout" and (training := costs.get((name, "training"))):
            low, high = min(training), max(training)
            words.append(
                f"`{name}` in training {100 * max(low, 0):.0f} to {_percent(high)}, most of it the "
                "drawing of its masks"
            )
        else:
            words.append(f"`{name}` {_percent(cost)}")
    return f"Beside our own plain layer {', '.join(words)}." if words else ""


def _share(fraction: float) -> str:
    return "< 1 %" if fraction < 0.01 else f"{100 * fraction:.0f} %"


def _percent(cost: float) -> str:
    return f"{100 * max(cost, 0):.0f} %"


# ---- Markdown


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> str:
    """Write a table, numbers to the right."""
    numbers = len(header) - text_columns
    lines = [
        header,
        ["---"] * text_columns + ["---:"] * numbers,
        *([cell.replace("|", r"\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fold(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _replace(text: str, section: str, content: str, readme: Path) -> str:
    """Put a section's content between its markers."""
    begin, end = f"<!-- {section}: begin (make report) -->", f"<!-- {section}: end -->"
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ReportError(
                f"{readme}: expected the marker {marker} once, found it {text.count(marker)} times"
            )
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ReportError(f"{readme}: the marker {end} stands before {begin}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


# ---- command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder of the records (default: benchmarks/results)",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        default=Path("README.md"),
        help="file with the sections (default: README.md)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if the README is not what the records say",
    )
    options = parser.parse_args(arguments)
    try:
        return run(options.results, options.readme, check=options.check)
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2


def run(results: Path, readme: Path, *, check: bool = False) -> int:
    """Write the README's sections and draw the pictures, or see whether they are up to date.

    Args:
        results: folder of all devices' records.
        readme: the file with the markers.
        check: write nothing.

    Returns:
        0, or 1 if `check` found a difference, which it prints.

    Raises:
        ReportError: records or the README's markers are not what they have to be.
    """
    try:
        before = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{readme}: {error.strerror}") from error
    devices = read_devices(results)
    after = _replace(before, "performance", write_performance(devices, readme.parent), readme)
    after = _replace(after, "additions", write_additions(results, readme.parent), readme)
    if check:
        return _report_differences(before, after, devices, readme)
    if after != before:
        readme.write_text(after, encoding="utf-8")
    for device in devices:
        pictures = plots.list_pictures(device)
        kept = {picture.file_name for picture in pictures}
        for pattern in _PICTURE_FILES:
            for path in device.folder.glob(pattern):
                # Of records that are no longer there.
                if path.name not in kept:
                    path.unlink()
        for picture in pictures:
            picture.write(device.folder)
    count = sum(len(device.records) for device in devices)
    print(f"{readme}: {len(devices)} devices, {count} records")
    return 0


def _report_differences(before: str, after: str, devices: Sequence[Device], readme: Path) -> int:
    missing = [
        device.folder / picture.file_name
        for device in devices
        for picture in plots.list_pictures(device)
        if not (device.folder / picture.file_name).is_file()
    ]
    if before == after and not missing:
        return 0
    print(f"{readme} is not what the records say; make report writes it anew")
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "README", "records", lineterm="", n=0
    )
    for line in lines:
        print(line)
    for path in missing:
        print(f"no picture {path}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
