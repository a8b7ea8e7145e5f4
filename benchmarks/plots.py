"""Pictures of a device's records: sweeps, ratios, memory, and how near to the limit a case is.

Which pictures there are follows from the records alone and needs no matplotlib; drawing does. The
same records give the same bytes with the same matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.reading import Device, Record, Result

__all__ = [
    "CPU_DTYPE",
    "GROUPS",
    "MODES",
    "OURS",
    "TORCH",
    "Picture",
    "describe_case",
    "describe_device",
    "group_of",
    "launches_of",
    "list_pictures",
    "name_of_group",
    "name_of_provider",
    "providers_of",
    "sorted_by_group",
]

TORCH, OURS = "torch", "fused_lstm"
# The dtype that the names of cases on a CPU leave out.
CPU_DTYPE = "float32"
MODES = ("inference", "training")
LAUNCHES = ("eager", "graph")
# In the order of tables and pictures. A case of several groups is shown in the first of them.
GROUPS = {
    "small": "usual sizes",
    "grid": "grid of sizes",
    "reinforcement-learning": "reinforcement learning",
    "time-series": "time series",
    "speech": "speech",
    "language": "language",
    "streaming": "streaming",
    "compiled": "compiled",
    "flashrnn": "FlashRNN's published shape",
    "variants": "variants",
}
_SWEPT = {"T": "steps", "B": "batch", "H": "hidden units"}
_SIZES = {"T": "{} steps", "B": "batch {}", "H": "{} hidden units"}
_PEERS = {"onnxruntime": "ONNX Runtime", "flashrnn": "FlashRNN", "torchrl": "TorchRL"}
# PyTorch's own layers by another way, and plain PyTorch: after what is ours.
_LAST_OF_OURS = (f"{OURS}[aten]", f"{OURS}[reference]")

# Okabe and Ito's colours, which the colour-blind can tell apart; markers tell lines apart, too.
_STYLES = {
    TORCH: ("#4d4d4d", "s"),
    OURS: ("#0072b2", "o"),
    f"{OURS}[native]": ("#56b4e9", "v"),
    f"{OURS}[cuda]": ("#56b4e9", "v"),
    f"{OURS}[triton]": ("#cc79a7", "^"),
    f"{OURS}[aten]": ("#999999", "x"),
    f"{OURS}[reference]": ("#e0c341", "+"),
    "onnxruntime": ("#e69f00", "D"),
    "torch.compile": ("#009e73", "P"),
    "flashrnn": ("#d55e00", "*"),
    "torchrl": ("#009e73", "X"),
}
_OTHER_STYLE = ("#000000", "1")
_DPI = 100
_SMALL, _MEDIUM, _LARGE = 9, 10, 11.5
# Ratios beyond this, or its inverse, have the strongest colour.
_STRONGEST_RATIO = 4.0
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Picture:
    """A picture that a device's records are enough for.

    Attributes:
        file_name: in the device's folder.
        title: what it shows.
        part: of which dtype or provider; "" if there is one such picture alone.
        figure: draws it.
    """

    file_name: str
    title: str
    part: str
    figure: Callable[[], Figure]

    def write(self, folder: Path) -> None:
        """Draw it into a folder, as a PNG without a date or a version in it."""
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        # What a user's own settings say would change the picture.
        with style.context("default", after_reset=True):
            figure = self.figure()
            figure.set_dpi(_DPI)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pixels = bytes(canvas.buffer_rgba())
            image = Image.frombytes("RGBA", canvas.get_width_height(), pixels).convert("RGB")
        # A palette makes a third of the size, and these few colours lose nothing.
        image = image.quantize(256, dither=Image.Dither.NONE)
        image.save(folder / self.file_name, format="png", optimize=True, dpi=(_DPI, _DPI))


def list_pictures(device: Device) -> list[Picture]:
    """List the pictures that there are records for."""
    pictures = []
    dtypes = list(dict.fromkeys(record.dtype for record in device.records))
    for swept in _SWEPT:
        swept_records = [r for r in device.records if f"sweep-{swept}" in r.groups]
        swept_dtypes = list(dict.fromkeys(record.dtype for record in swept_records))
        for dtype in swept_dtypes:
            rows = _sweep_rows([r for r in swept_records if r.dtype == dtype], swept)
            if rows:
                pictures.append(
                    Picture(
                        f"sweep-{swept.lower()}-{dtype}.png",
                        f"{'time' if swept == 'T' else 'time per step'} over {_SWEPT[swept]}",
                        dtype if len(swept_dtypes) > 1 else "",
                        partial(_draw_sweep, device, swept, dtype, rows),
                    )
                )
    shown = sorted_by_group(device.records)
    pictures += _ratio_pictures(device, shown)
    # A GPU runs every shape in every dtype: too many rows for one picture.
    split: list[tuple[str, list[Record]]] = [("", shown)]
    if device.environment["device_type"] != "cpu":
        split = [(dtype, [r for r in shown if r.dtype == dtype]) for dtype in dtypes]
    for dtype, records in split:
        suffix = f"-{dtype}" if dtype else ""
        limited = [r for r in records if any(_fractions(r, mode) for mode in MODES)]
        if limited:
            pictures.append(
                Picture(
                    f"limit{suffix}.png",
                    "fraction of the limit",
                    dtype,
                    partial(_draw_limit, device, limited, dtype),
                )
            )
        measured = [r for r in records if any(_memory(r, mode) for mode in MODES)]
        if measured:
            pictures.append(
                Picture(
                    f"memory{suffix}.png",
                    "memory",
                    dtype,
                    partial(_draw_memory, device, measured, dtype),
                )
            )
    return pictures


def _ratio_pictures(device: Device, shown: Sequence[Record]) -> list[Picture]:
    """One map of all providers on a CPU; on a GPU one for each, over dtypes and launches."""
    compared = [p for p in providers_of(device.records) if p != TORCH]
    if device.environment["device_type"] == "cpu":
        maps = [("ratios.png", "", compared)]
    else:
        maps = [
            (f"ratios-{_file_name(p)}.png", name_of_provider(p), [p])
            for p in compared
            if p not in _LAST_OF_OURS
        ]
    pictures = []
    for file_name, part, providers in maps:
        rows = [r for r in shown if any(x.provider in providers and x.ratio for x in r.results)]
        if rows:
            draw = partial(_draw_ratios, device, rows, providers)
            pictures.append(Picture(file_name, "ratios", part, draw))
    return pictures


def name_of_group(group: str | None) -> str:
    return "sweeps" if group is None else GROUPS.get(group, group.replace("-", " "))


def name_of_provider(provider: str) -> str:
    return _PEERS.get(provider, provider)


def _file_name(provider: str) -> str:
    return provider.replace("_", "-").replace("[", "-").replace("]", "").replace(".", "-")


def describe_device(environment: dict[str, Any]) -> str:
    """Name a device as a title does."""
    if environment["device_type"] != "cpu":
        return str(environment["device"])
    threads = environment["threads"]
    return f"{environment['device']}, {threads} thread{'s' * (threads > 1)}"


def describe_case(case: dict[str, Any], *, dtype: str = "") -> str:
    """Say a case's sizes, then what is unusual; its dtype unless it is `dtype`."""
    lead = f"cell × {case['B']}" if case["cell"] else f"{case['T']} × {case['B']}"
    words = [f"{lead}, {case['I']} → {case['H']}"]
    if case["proj_size"]:
        words.append(f"projected to {case['proj_size']}")
    if case["num_layers"] > 1:
        words.append(f"{case['num_layers']} layers")
    for unusual in ("bidirectional", "packed"):
        if case[unusual]:
            words.append(unusual)
    if case["batch_first"]:
        words.append("batch first")
    if case["dtype"] != dtype:
        words.append(case["dtype"])
    return ", ".join(words)


def providers_of(records: Iterable[Record]) -> list[str]:
    """List who was timed: PyTorch, ours, our backends by name, other packages."""
    timed = {x.provider for record in records for x in record.results if x.status == "timed"}

    def position(provider: str) -> tuple[bool, bool, bool, bool, str]:
        return (
            provider != TORCH,
            provider != OURS,
            not provider.startswith(OURS),
            provider in _LAST_OF_OURS,
            provider,
        )

    return sorted(timed, key=position)


def launches_of(records: Iterable[Record]) -> list[str]:
    launches = {x.launch for record in records for x in record.results if x.status == "timed"}
    return [*(x for x in LAUNCHES if x in launches), *sorted(launches - set(LAUNCHES))]


def group_of(record: Record) -> str | None:
    """The group in which a case is shown; None if it is of sweeps alone."""
    own = [group for group in record.groups if not group.startswith("sweep-")]
    known = [group for group in GROUPS if group in own]
    return next(iter([*known, *own]), None)


def sorted_by_group(records: Iterable[Record]) -> list[Record]:
    """Those that are of some group beside the sweeps, group by group."""
    order = list(GROUPS)

    def position(record: Record) -> tuple[int, str]:
        group = group_of(record) or ""
        return (order.index(group), "") if group in order else (len(order), group)

    return sorted((r for r in records if group_of(r) is not None), key=position)


def _title(device: Device, subject: str, dtype: str) -> str:
    """What is shown, and below it on what."""
    environment = device.environment
    words = [describe_device(environment), dtype, f"torch {environment['torch']}"]
    return f"{subject}\n{', '.join(filter(None, words))}"


def _title_of_cases(device: Device, subject: str, dtype: str) -> str:
    """The same, and what the names of the rows mean."""
    if not dtype and device.environment["device_type"] == "cpu":
        dtype = f"{CPU_DTYPE} where no other is named"
    return f"{_title(device, subject, dtype)}\nrows: steps × batch, input → hidden"


def _new_figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # A figure of its own, without pyplot: no window can open. PNGs are drawn by Agg.
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    figure.suptitle(title, fontsize=_LARGE, fontweight="bold")
    return figure


# ---- sweeps


@dataclass(frozen=True)
class _SweepRow:
    """A row of a sweep's panels: cases that differ in the swept size alone, launched one way."""

    launch: str
    description: str
    records: tuple[Record, ...]


def _sweep_rows(records: Sequence[Record], swept: str) -> list[_SweepRow]:
    series: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        fixed = (value for key, value in record.case.items() if key not in ("name", swept, "I"))
        series.setdefault(tuple(fixed), []).append(record)
    rows = []
    for of_series in series.values():
        for inputs, same in _split_by_input(of_series, swept):
            ordered = tuple(sorted(same, key=lambda r: r.case[swept]))
            case = ordered[0].case
            words = [_SIZES[size].format(case[size]) for size in "TBH" if size != swept]
            description = ", ".join([*words, inputs])
            for launch in launches_of(ordered):
                # A line needs two points.
                timed = [r for r in ordered if any(_time(r, OURS, m, launch) for m in MODES)]
                if len({r.case[swept] for r in timed}) > 1:
                    rows.append(_SweepRow(launch, description, ordered))
    return rows


def _split_by_input(records: list[Record], swept: str) -> list[tuple[str, list[Record]]]:
    """The input's size may be one for all, or follow the swept size."""
    if all(r.case["I"] == r.case[swept] for r in records):
        return [(f"as many inputs as {_SWEPT[swept]}", records)]
    sizes = sorted({r.case["I"] for r in records})
    return [(f"{size} inputs", [r for r in records if r.case["I"] == size]) for size in sizes]


def _time(record: Record, provider: str, mode: str, launch: str) -> float | None:
    result = record.find(provider, mode, launch)
    return None if result is None else result.seconds


def _draw_sweep(device: Device, swept: str, dtype: str, rows: Sequence[_SweepRow]) -> Figure:
    whole = swept == "T"
    subject = f"{'Time of a call' if whole else 'Time of a step'} over {_SWEPT[swept]}"
    figure = _new_figure(10.5, 1.3 + 3.6 * len(rows), _title(device, subject, dtype))
    panels = figure.subplots(len(rows), len(MODES), squeeze=False, sharex="row")
    labels: dict[str, Any] = {}
    for row, of_row in zip(rows, panels, strict=True):
        for mode, panel in zip(MODES, of_row, strict=True):
            words = [mode, *([f"{row.launch} launch"] if len(launches_of(row.records)) > 1 else [])]
            panel.set_title(f"{', '.join(words)}\n{row.description}", fontsize=_MEDIUM, loc="left")
            slopes = device.slopes(f"sweep-{swept}", mode, row.launch, dtype) if whole else {}
            labels.update(_draw_lines(panel, row, mode, swept, slopes))
            panel.set_xlabel(_SWEPT[swept], fontsize=_SMALL)
        of_row[0].set_ylabel("milliseconds" if whole else "microseconds a step", fontsize=_SMALL)
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="outside lower center",
        ncols=min(4, len(labels)),
        fontsize=_SMALL,
        frameon=False,
    )
    return figure


def _draw_lines(
    panel: Axes, row: _SweepRow, mode: str, swept: str, slopes: dict[str, float]
) -> dict[str, Any]:
    """Draw a panel's lines; return those that the figure's legend names."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    def scaled(seconds: float, record: Record) -> float:
        return seconds * 1e3 if swept == "T" else seconds / record.case["T"] * 1e6

    lines, with_slopes = {}, []
    for provider in providers_of(row.records):
        points = [
            (record.case[swept], scaled(seconds, record))
            for record in row.records
            if (seconds := _time(record, provider, mode, row.launch)) is not None
        ]
        if not points:
            continue
        color, marker = _STYLES.get(provider, _OTHER_STYLE)
        # Ours above the others, and torch, which may coincide with it, wider below.
        (line,) = panel.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            markersize=6 if provider == TORCH else 5,
            linewidth=2.2 if provider in (TORCH, OURS) else 1.4,
            zorder=3 if provider == OURS else 2,
        )
        lines[name_of_provider(provider)] = line
        if provider in slopes:
            with_slopes.append((line, f"{name_of_provider(provider)}: {slopes[provider]:.2f}"))
    limits = [
        (record.case[swept], scaled(result.limit_seconds, record))
        for record in row.records
        if (result := record.find(OURS, mode, row.launch)) and result.limit_seconds
    ]
    if limits:
        (line,) = panel.plot(
            *zip(*limits, strict=True), color="#000000", linestyle="--", linewidth=1.2, zorder=1
        )
        lines["limit of the machine"] = line
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sorted({r.case[swept] for r in row.records})))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_major_locator(LogLocator(subs=_steps_of_decade(*panel.get_ylim())))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.tick_params(labelsize=_SMALL)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if with_slopes:
        legend = panel.legend(
            *zip(*with_slopes, strict=True),
            title="slope of the upper half",
            loc="lower right",
            fontsize=_SMALL,
            title_fontsize=_SMALL,
            framealpha=0.85,
            edgecolor="none",
        )
        legend.set_zorder(4)
    return lines


def _steps_of_decade(low: float, high: float) -> tuple[float, ...]:
    """Ticks of a logarithmic axis: enough of them where it spans little."""
    return (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)


# ---- ratios


def _draw_ratios(device: Device, records: Sequence[Record], providers: Sequence[str]) -> Figure:
    on_cpu = device.environment["device_type"] == "cpu"
    if on_cpu:
        rows = _rows_with_headings(
            [(group_of(r), describe_case(r.case, dtype=CPU_DTYPE), [r]) for r in records]
        )
        subject = "Time of torch.nn.LSTM over the time of each"
    else:
        # A row is a shape; its dtypes are columns.
        shapes: dict[tuple[str | None, str], list[Record]] = {}
        for record in records:
            label = describe_case(record.case, dtype=record.dtype)
            shapes.setdefault((group_of(record), label), []).append(record)
        rows = _rows_with_headings([(group, label, of) for (group, label), of in shapes.items()])
        subject = f"Time of torch.nn.LSTM over that of {name_of_provider(providers[0])}"
    columns = {mode: _ratio_columns(records, providers, mode, on_cpu) for mode in MODES}
    columns = {mode: of_mode for mode, of_mode in columns.items() if of_mode}
    widths = [len(of_mode) for of_mode in columns.values()]
    height = 2.8 + 0.235 * len(rows)
    title = _title_of_cases(device, f"{subject}: above 1, torch is slower", "")
    # As wide as the title, where there are few columns.
    figure = _new_figure(max(9.8, 3.2 + 0.62 * sum(widths)), height, title)
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True, width_ratios=widths)[0]
    for (mode, of_mode), panel in zip(columns.items(), panels, strict=True):
        image = _draw_map(panel, rows, mode, of_mode)
    panels[0].set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=_SMALL)
    for tick, (_, of_row) in zip(panels[0].get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if of_row else "bold")
    bar = figure.colorbar(
        image,
        ax=panels,
        location="bottom",
        extend="both",
        fraction=0.3 / height,
        aspect=40,
        pad=0.1 / height,
    )
    steps = [-2, -1, 0, 1, 2]
    bar.set_ticks(steps, labels=[f"{2.0**step:g}×" for step in steps], fontsize=_SMALL)
    return figure


def _rows_with_headings(
    labelled: Sequence[tuple[str | None, str, list[Record]]],
) -> list[tuple[str, list[Record]]]:
    rows: list[tuple[str, list[Record]]] = []
    last: str | None = ""
    for group, label, records in labelled:
        if group != last:
            rows.append((name_of_group(group), []))
            last = group
        rows.append((label, records))
    return rows


@dataclass(frozen=True)
class _Column:
    label: str
    provider: str
    launch: str
    dtype: str | None

    def result(self, records: Iterable[Record], mode: str) -> Result | None:
        for record in records:
            if self.dtype in (None, record.dtype):
                return record.find(self.provider, mode, self.launch)
        return None


def _ratio_columns(
    records: Sequence[Record], providers: Sequence[str], mode: str, on_cpu: bool
) -> list[_Column]:
    launches = launches_of(records)
    columns = []
    for dtype in [None] if on_cpu else list(dict.fromkeys(r.dtype for r in records)):
        for launch in launches:
            for provider in providers:
                what = name_of_provider(provider) if on_cpu else str(dtype)
                label = f"{what}, {launch}" if len(launches) > 1 else what
                columns.append(_Column(label, provider, launch, dtype))
    return [
        column
        for column in columns
        if any((x := column.result([r], mode)) and x.ratio for r in records)
    ]


def _draw_map(
    panel: Axes, rows: Sequence[tuple[str, list[Record]]], mode: str, columns: Sequence[_Column]
) -> Any:
    import numpy as np
    from matplotlib import colormaps

    strongest = math.log2(_STRONGEST_RATIO)
    values = np.full((len(rows), len(columns)), np.nan)
    panel.set_facecolor("#f4f4f4")
    for i, (_, records) in enumerate(rows):
        for j, column in enumerate(columns):
            result = column.result(records, mode)
            if result is None:
                continue
            if result.ratio is None:
                if result.status in ("wrong", "failed"):
                    panel.text(j, i, result.status, ha="center", va="center", fontsize=_SMALL)
                continue
            values[i, j] = math.log2(result.ratio)
            panel.text(
                j,
                i,
                f"{result.ratio:.0f}" if result.ratio >= 9.95 else f"{result.ratio:.2f}",
                ha="center",
                va="center",
                fontsize=_SMALL,
                color="white" if abs(values[i, j]) > 0.62 * strongest else "black",
            )
    # Blue and red, which the colour-blind can tell apart; white is as fast as torch. In few steps,
    # so that a palette has room for them.
    colors = colormaps["RdBu"].resampled(33)
    image = panel.imshow(values, cmap=colors, vmin=-strongest, vmax=strongest, aspect="auto")
    for i, (_, records) in enumerate(rows):
        if not records:
            panel.axhspan(i - 0.5, i + 0.5, color="white")
    panel.set_xticks(
        range(len(columns)),
        [column.label for column in columns],
        rotation=50,
        ha="left",
        rotation_mode="anchor",
        fontsize=_SMALL,
    )
    panel.xaxis.tick_top()
    panel.set_xlabel(mode, fontsize=_MEDIUM, fontweight="bold")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    panel.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    panel.grid(which="minor", color="white", linewidth=1)
    panel.tick_params(which="minor", length=0)
    return image


# ---- limit and memory, a row for each case


def _fractions(record: Record, mode: str) -> dict[str, float]:
    """Fraction of the limit by provider, of torch and our kernels, launched eagerly."""
    return {
        x.provider: x.fraction_of_limit
        for x in record.results
        if (x.mode, x.launch) == (mode, "eager")
        and (x.provider == TORCH or x.provider.startswith(OURS))
        and x.provider not in _LAST_OF_OURS
        and x.fraction_of_limit is not None
    }


def _draw_limit(device: Device, records: Sequence[Record], dtype: str) -> Figure:
    def nearness(record: Record) -> tuple[float, ...]:
        return tuple(_fractions(record, mode).get(OURS, -1.0) for mode in MODES)

    rows = sorted(records, key=nearness)
    title = _title_of_cases(
        device, "Least time that the machine allows, over the time taken", dtype
    )
    figure, panels = _case_rows(device, rows, title, dtype)
    handles: dict[str, Any] = {}
    highest = 1.0
    for mode, panel in zip(MODES, panels, strict=True):
        of_mode = [_fractions(record, mode) for record in rows]
        for y, fractions in enumerate(of_mode):
            if fractions:
                highest = max(highest, *fractions.values())
                ends = (min(fractions.values()), max(fractions.values()))
                panel.plot(ends, (y, y), color="#bbbbbb", linewidth=2, zorder=1)
        for provider in providers_of(records):
            points = [(x[provider], y) for y, x in enumerate(of_mode) if provider in x]
            if not points:
                continue
            color, marker = _STYLES.get(provider, _OTHER_STYLE)
            (handles[provider],) = panel.plot(
                *zip(*points, strict=True),
                marker=marker,
                color=color,
                # Where both are the same, torch is seen around ours.
                markersize=7.5 if provider == TORCH else 5,
                linestyle="none",
            )
        panel.axvline(1.0, color="black", linestyle="--", linewidth=1, zorder=0)
        panel.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    for panel in panels:
        panel.set_xlim(0, highest * 1.04)
    _legend_below(figure, handles)
    return figure


def _memory(record: Record, mode: str) -> tuple[float, float] | None:
    """Peak memory of torch and of ours, launched eagerly."""
    peaks = []
    for provider in (TORCH, OURS):
        result = record.find(provider, mode, "eager")
        # A logarithmic axis has no place for 0.
        if result is None or not result.peak_memory_bytes:
            return None
        peaks.append(result.peak_memory_bytes)
    return peaks[0], peaks[1]


def _draw_memory(device: Device, records: Sequence[Record], dtype: str) -> Figure:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = list(reversed(records))
    title = _title_of_cases(
        device, "Peak memory of a call beyond inputs and parameters, MiB", dtype
    )
    figure, panels = _case_rows(device, rows, title, dtype)
    handles: dict[str, Any] = {}
    for mode, panel in zip(MODES, panels, strict=True):
        panel.set_xscale("log")
        mebibytes: list[float] = []
        for y, record in enumerate(rows):
            peaks = _memory(record, mode)
            if peaks is None:
                continue
            theirs, ours = (peak / _MEBIBYTE for peak in peaks)
            mebibytes += [theirs, ours]
            for provider, peak, offset in ((TORCH, theirs, 0.19), (OURS, ours, -0.19)):
                handles[provider] = panel.barh(
                    y + offset, peak, height=0.36, color=_STYLES[provider][0]
                )
            panel.annotate(
                f"{ours / theirs:.2f}×",
                (max(theirs, ours), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=_SMALL,
            )
        if mebibytes:
            low = 10.0 ** math.floor(math.log10(min(mebibytes) / 1.05))
            highest = max(mebibytes)
            # Room for the numbers at the ends of the bars.
            panel.set_xlim(low, highest * (highest / low) ** 0.22)
            panel.xaxis.set_major_locator(LogLocator(subs=_steps_of_decade(low, highest)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend_below(figure, handles)
    return figure


def _case_rows(
    device: Device, records: Sequence[Record], title: str, dtype: str
) -> tuple[Figure, Sequence[Axes]]:
    """Make a panel for each mode, with a row for each case."""
    usual = CPU_DTYPE if device.environment["device_type"] == "cpu" else dtype
    figure = _new_figure(10.5, 1.7 + 0.27 * len(records), title)
    panels = figure.subplots(1, len(MODES), sharey=True)
    panels[0].set_yticks(
        range(len(records)), [describe_case(r.case, dtype=usual) for r in records], fontsize=_SMALL
    )
    panels[0].set_ylim(-0.7, len(records) - 0.3)
    for mode, panel in zip(MODES, panels, strict=True):
        panel.set_title(mode, fontsize=_MEDIUM, loc="left")
        panel.tick_params(labelsize=_SMALL)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
    return figure, panels


def _legend_below(figure: Figure, handles: dict[str, Any]) -> None:
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        fontsize=_SMALL,
        frameon=False,
    )
