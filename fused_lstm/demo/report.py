"""What the demo shows: progress while it runs, a table, a sample of text and a picture.

rich and matplotlib come with the extra ``bench`` and are imported where they are used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fused_lstm.demo.training import Settings, Trainee

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

# A log file has no width of its own; the table's columns fit in this many characters.
LOG_WIDTH = 116
MEBIBYTE = 2**20
_COLORS = ("#e8825a", "#17406d")


def require_extras() -> None:
    """Check that rich and matplotlib are installed.

    Raises:
        ModuleNotFoundError: one of them is not; the message says how to install it.
    """
    for package in ("rich", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"the demo prints with rich and draws with matplotlib, and {package} is not "
                'installed; expected the extra "bench": pip install "fused-lstm[bench]"',
                name=package,
            )


@dataclass(frozen=True)
class LayerReport:
    """What came out for one of the two layers.

    Attributes:
        name: the layer's name.
        losses: the training loss of each step, in nats per character.
        step_seconds: the time of each step, in seconds.
        training_loss: mean of the last tenth of `losses`, in nats per character.
        validation_loss: after the last step, in nats per character.
        characters_per_second: training speed, by the median time of a step.
        step_memory: peak memory of one training step, in bytes above what was held before it.
        backend: what computed the layer.
        reason: why that one.
    """

    name: str
    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    training_loss: float
    validation_loss: float
    characters_per_second: float
    step_memory: int
    backend: str
    reason: str

    @property
    def validation_bits(self) -> float:
        """`validation_loss` in bits per character."""
        return self.validation_loss / math.log(2)


def make_console() -> Console:
    """Make the console to print to; a log file gets a width that the table fits in."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, LOG_WIDTH))


@contextlib.contextmanager
def show_progress(
    console: Console, trainees: tuple[Trainee, Trainee], total: int
) -> Iterator[Callable[[int], None]]:
    """Show how training goes: a live bar on a terminal, a line every tenth in a log.

    Args:
        console: where it is printed.
        trainees: the two sides, whose losses and speeds are shown.
        total: the steps each will do.

    Yields:
        A function to call with the number of steps done.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    def describe() -> str:
        losses = " | ".join(f"{trainee.losses[-1]:.3f}" for trainee in trainees)
        speeds = " | ".join(f"{trainee.recent_characters_per_second:,.0f}" for trainee in trainees)
        return f"loss {losses}, {speeds} characters/s"

    console.print(f"live: {trainees[0].name} | {trainees[1].name}", highlight=False)
    if not console.is_terminal:
        shown_tenths = 0

        def log(done: int) -> None:
            nonlocal shown_tenths
            if done * 10 // total > shown_tenths:
                shown_tenths = done * 10 // total
                console.print(f"step {done:>5}/{total}: {describe()}", highlight=False)

        yield log
        return

    with Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("training", total=total, status="")

        def update(done: int) -> None:
            progress.update(task, completed=done, status=describe())

        yield update


def make_table(
    baseline: LayerReport, fused: LayerReport, settings: Settings, *, device_type: str
) -> Table:
    """Lay out the comparison, one row per layer.

    Args:
        baseline: `torch.nn.LSTM`'s report.
        fused: `fused_lstm.LSTM`'s report.
        settings: what was trained.
        device_type: "cpu" or "cuda"; says how memory was measured.

    Returns:
        A table of eight columns.
    """
    from rich.markup import escape
    from rich.table import Table

    measure = {"cuda": "torch.cuda.max_memory_allocated", "cpu": "torch.profiler"}[device_type]
    table = Table(
        title="The same training, with either layer",
        caption=(
            f"Train loss: mean of the last {tail_length(settings.steps)} steps. "
            "Training speed: by the median step, the two layers taking turns. "
            f"Peak MiB: held above weights and optimizer state, by {measure}."
        ),
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    table.add_column("train loss\nnats/char", justify="right")
    table.add_column("val. loss\nnats/char", justify="right")
    table.add_column("val. loss\nbits/char", justify="right")
    table.add_column("training\nchars/s", justify="right")
    table.add_column("speed\nratio", justify="right")
    table.add_column("peak MiB\nof a step", justify="right")
    table.add_column("backend and why")
    for report in (baseline, fused):
        ratio = report.characters_per_second / baseline.characters_per_second
        table.add_row(
            report.name,
            f"{report.training_loss:.4f}",
            f"{report.validation_loss:.4f}",
            f"{report.validation_bits:.4f}",
            f"{report.characters_per_second:,.0f}",
            f"{ratio:.2f}x",
            f"{report.step_memory / MEBIBYTE:.1f}",
            escape(f"{report.backend}: {report.reason}" if report.reason else report.backend),
        )
    return table


def tail_length(steps: int) -> int:
    """The number of last steps that the final training loss is the mean of: a tenth of them."""
    return max(1, steps // 10)


def printable(text: str, console: Console) -> str:
    """Replace what the console's encoding cannot write, so that an ASCII log is no error.

    Args:
        text: any text.
        console: where it is to be printed.

    Returns:
        The text, with "?" for such characters.
    """
    return text.encode(console.encoding, "replace").decode(console.encoding)


def draw_figure(
    baseline: LayerReport, fused: LayerReport, path: Path, *, title: str, tolerance: float
) -> None:
    """Draw both loss curves, their difference, and the training speeds.

    Args:
        baseline: `torch.nn.LSTM`'s report.
        fused: `fused_lstm.LSTM`'s report.
        path: the PNG to write.
        title: the line above.
        tolerance: the difference up to which the curves count as one, in nats per character.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # A figure of its own, without pyplot: nothing global is set and no window can open. PNGs are
    # drawn by Agg.
    figure = Figure(
        figsize=(11, 5.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    panels = figure.add_gridspec(2, 2, width_ratios=(2.2, 1), height_ratios=(2.4, 1))
    loss_panel = figure.add_subplot(panels[0, 0])
    difference_panel = figure.add_subplot(panels[1, 0], sharex=loss_panel)
    speed_panel = figure.add_subplot(panels[:, 1])
    _draw_losses(loss_panel, baseline, fused)
    _draw_difference(difference_panel, baseline, fused, tolerance)
    _draw_speeds(speed_panel, baseline, fused)
    for panel in (loss_panel, difference_panel, speed_panel):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _draw_losses(panel: Axes, baseline: LayerReport, fused: LayerReport) -> None:
    steps = range(1, len(baseline.losses) + 1)
    # The wide line stays visible around the narrow one as long as the two coincide.
    panel.plot(steps, baseline.losses, color=_COLORS[0], linewidth=4, label=baseline.name)
    panel.plot(steps, fused.losses, color=_COLORS[1], linewidth=1, label=fused.name)
    panel.set_title("Training loss", fontsize=10, loc="left")
    panel.set_ylabel("nats per character")
    panel.tick_params(labelbottom=False)
    panel.grid(alpha=0.25)
    panel.legend(frameon=False)


def _draw_difference(
    panel: Axes, baseline: LayerReport, fused: LayerReport, tolerance: float
) -> None:
    differences = [abs(a - b) for a, b in zip(baseline.losses, fused.losses, strict=True)]
    panel.set_title("Distance between the two curves", fontsize=10, loc="left")
    panel.set_xlabel("step")
    panel.set_ylabel("nats per character")
    panel.set_yscale("log")
    panel.axhline(tolerance, color="0.5", linewidth=1, linestyle="--", label="tolerance")
    panel.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    # A logarithmic axis has no place for 0: equal losses leave a gap.
    points = [(step, value) for step, value in enumerate(differences, start=1) if value > 0]
    if points:
        panel.plot(*zip(*points, strict=True), ".", color=_COLORS[1], markersize=2.5)
        values = [value for _, value in points]
        panel.set_ylim(min(values) / 3, max(*values, tolerance) * 3)
    else:
        panel.set_ylim(tolerance / 1e5, tolerance * 3)
        panel.text(0.5, 0.4, "0 at every step", ha="center", transform=panel.transAxes)
    panel.grid(alpha=0.25)


def _draw_speeds(panel: Axes, baseline: LayerReport, fused: LayerReport) -> None:
    characters_per_step = baseline.characters_per_second * statistics.median(baseline.step_seconds)
    for position, report in enumerate((baseline, fused)):
        speed = report.characters_per_second
        slow, fast = _spread([characters_per_step / s for s in report.step_seconds])
        panel.bar(
            position,
            speed,
            width=0.62,
            color=_COLORS[position],
            yerr=[[max(0.0, speed - slow)], [max(0.0, fast - speed)]],
            ecolor="0.35",
            capsize=4,
        )
        ratio = speed / baseline.characters_per_second
        panel.annotate(
            f"{speed:,.0f}\n{ratio:.2f}x",
            (position, 0),
            xytext=(0, 12),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color="white",
            fontsize=11,
            fontweight="bold",
        )
    panel.set_title("Training speed", fontsize=10, loc="left")
    panel.set_xlabel("median step; lines: 20th to 80th percentile", fontsize=8, color="0.35")
    panel.set_ylabel("characters per second")
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.set_xticks((0, 1), [f"{report.name}\n{report.backend}" for report in (baseline, fused)])
    panel.set_xlim(-0.55, 1.55)


def _spread(values: list[float]) -> tuple[float, float]:
    """The 20th and 80th percentiles."""
    if len(values) < 2:
        return values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[-1]
