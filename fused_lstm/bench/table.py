"""Results as a table, on a terminal or in a log."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from fused_lstm.bench.comparison import Result

__all__ = ["print_table"]

# A log file has no width of its own; the table fits in this many characters.
_LOG_WIDTH = 120
_COLUMNS = ("mode", "layer", "ms", "p20 to p80", "ratio", "host ms", "of limit", "error", "MB")


def print_table(results: Sequence[Result]) -> None:
    """Print the results of one case, with rich if it is installed."""
    rows = [_row(result) for result in results]
    used = [number for number in range(len(_COLUMNS)) if any(row[number] for row in rows)]
    columns = [_COLUMNS[number] for number in used]
    rows = [tuple(row[number] for number in used) for row in rows]
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        # What was not timed says why beside its name, on as many lines as that takes.
        is_text = name in ("mode", "layer")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "layer")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else _LOG_WIDTH).print(table)


def _row(result: Result) -> tuple[str, ...]:
    layer = "torch.nn" if result.provider == "torch" else result.provider
    if result.backend and result.backend not in layer:
        layer += f" ({result.backend})"
    if result.launch != "eager":
        layer += f", {result.launch}"
    if result.seconds is None:
        detail = " ".join(result.detail.split())
        return (result.mode, f"{layer} {result.status.upper()}: {detail}", *[""] * 7)
    times, host = result.seconds, result.host_seconds
    return (
        result.mode,
        layer,
        _milliseconds(times.p50),
        f"{_milliseconds(times.p20)} to {_milliseconds(times.p80)}",
        "" if result.ratio is None else f"{result.ratio:.2f}",
        "" if host is None else _milliseconds(host.p50),
        f"{result.fraction_of_limit:.1%}",
        f"{result.error_over_budget:.2f}",
        "" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 1e6:.1f}",
    )


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:#.3g}"
