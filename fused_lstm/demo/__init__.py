"""A language model trained twice, with `torch.nn.LSTM` and with `fused_lstm.LSTM` in its place.

``python -m fused_lstm demo`` calls `run`. The text is the Python language reference that ships
with the standard library: no download, no data files.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import fused_lstm
from fused_lstm.demo.data import Corpus, load_python_reference
from fused_lstm.demo.model import CharacterModel, stream_characters
from fused_lstm.demo.report import (
    LayerReport,
    draw_figure,
    make_console,
    make_table,
    printable,
    require_extras,
    show_progress,
    tail_length,
)
from fused_lstm.demo.training import (
    Settings,
    Trainee,
    build_model,
    draw_steps,
    measure_step_memory,
    train_side_by_side,
    validate,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DemoResult", "LayerReport", "run"]

_PROMPT = "The "

# Two right layers round differently, and training lets rounding grow: on a CPU to some thousandths
# of a nat after 600 steps, on a GPU to more where products are rounded to TF32. A wrong gate, mask
# or gradient shows as tenths of a nat.
_TOLERANCE = {"cpu": 0.02, "cuda": 0.05}


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        baseline: `torch.nn.LSTM`'s report.
        fused: `fused_lstm.LSTM`'s report.
        largest_difference: between the two training loss curves, in nats per character.
        step_of_largest_difference: where, counted from 1.
        tolerance: the difference up to which the curves count as one, in nats per character.
        sample: the text that the model with `fused_lstm.LSTM` wrote, its prompt included.
        figure: the PNG.
        device: where the models were trained.
        seconds: how long the whole demo took.
    """

    baseline: LayerReport
    fused: LayerReport
    largest_difference: float
    step_of_largest_difference: int
    tolerance: float
    sample: str
    figure: Path
    device: torch.device
    seconds: float

    @property
    def curves_coincide(self) -> bool:
        """Whether the two loss curves are the same to within `tolerance`."""
        return self.largest_difference <= self.tolerance

    @property
    def speed_ratio(self) -> float:
        """Training speed of `fused_lstm.LSTM` over that of `torch.nn.LSTM`."""
        return self.fused.characters_per_second / self.baseline.characters_per_second


def run(
    out: str | os.PathLike[str] = "out",
    *,
    device: str | torch.device | None = None,
    seed: int = Settings.seed,
    steps: int = Settings.steps,
    time_steps: int = Settings.time_steps,
    streams: int = Settings.streams,
    embedding_size: int = Settings.embedding_size,
    hidden_size: int = Settings.hidden_size,
    layers: int = Settings.layers,
    dropout: float = Settings.dropout,
    learning_rate: float = Settings.learning_rate,
    sample_characters: int = 600,
    temperature: float = 0.6,
    console: Console | None = None,
) -> DemoResult:
    """Train a character-level language model with both layers, and compare.

    The two trainings start from the same parameters and see the same batches and dropout masks,
    so their loss curves must coincide; what may differ is speed and memory. Prints progress, a
    table, why the backend was chosen and a text that the model writes, and draws ``demo.png``.
    Global random state is left as it was.

    Args:
        out: the folder for ``demo.png``; made if there is none.
        device: a CPU or CUDA device; by default CUDA if there is any, else the CPU.
        seed: of parameters, text offsets, dropout masks and the sample.
        steps: optimizer steps of each model.
        time_steps: characters read between two optimizer steps, per stream.
        streams: texts read side by side (the batch size).
        embedding_size: features of a character.
        hidden_size: units of the LSTM.
        layers: layers of the LSTM.
        dropout: on the LSTM's input and output, in [0, 1).
        learning_rate: Adam's, at its peak.
        sample_characters: length of the text written in the end; 0 for none.
        temperature: divides the logits when writing; above 0.
        console: where to print; by default the standard output.

    Returns:
        The numbers behind what was printed.

    Raises:
        ModuleNotFoundError: rich or matplotlib is missing.
        NotADirectoryError: `out` is a file.
        ValueError: an argument is out of its range, or the device is not there.
        FloatingPointError: training did not stay finite.
    """
    require_extras()
    settings = Settings(
        steps=steps,
        time_steps=time_steps,
        streams=streams,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        layers=layers,
        dropout=dropout,
        learning_rate=learning_rate,
        seed=seed,
    )
    if sample_characters < 0:
        raise ValueError(f"sample_characters is {sample_characters!r}; expected 0 or more")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; expected a number above 0")
    chosen_device = _choose_device(device)
    folder = _make_folder(Path(out))
    console = console or make_console()

    started = time.perf_counter()
    corpus = load_python_reference()
    names = ("torch.nn.LSTM", "fused_lstm.LSTM")
    layer_classes: tuple[type[nn.LSTM], type[nn.LSTM]] = (nn.LSTM, fused_lstm.LSTM)

    def make_trainee(side: int) -> Trainee:
        model = build_model(layer_classes[side], corpus, settings, chosen_device)
        return Trainee(name=names[side], model=model, settings=settings)

    trainees = (make_trainee(0), make_trainee(1))
    # The layers share their state_dict; with this, equal parameters are a fact, not a hope.
    trainees[1].model.load_state_dict(trainees[0].model.state_dict())
    parameters = sum(parameter.numel() for parameter in trainees[0].model.parameters())
    console.print(
        f"Learning {len(corpus.training):,} characters of the Python reference "
        f"({len(corpus.alphabet)} different ones) on {_describe_device(chosen_device)}: "
        f"{parameters:,} parameters, {settings.layers} x {settings.hidden_size} hidden units, "
        f"{settings.streams} streams of {settings.time_steps} characters per step, float32.",
        highlight=False,
        soft_wrap=True,
    )

    # Throw-away copies: this also compiles and warms up what the timed steps will run.
    probe = next(draw_steps(corpus, settings, chosen_device))
    step_memory = [measure_step_memory(make_trainee(side), probe) for side in (0, 1)]
    with show_progress(console, trainees, settings.steps) as after_block:
        train_side_by_side(
            trainees, draw_steps(corpus, settings, chosen_device), after_block=after_block
        )

    features = trainees[1].model.embedding(probe.batch.inputs)
    explanation = fused_lstm.explain(trainees[1].model.lstm, features)
    backends = (
        _name_torch_backend(trainees[0].model.lstm(features)[0]),
        (
            explanation.backend,
            printable(explanation.reasons.get(explanation.backend, ""), console),
        ),
    )
    baseline, fused = (
        _report(trainee, corpus, memory, backend)
        for trainee, memory, backend in zip(trainees, step_memory, backends, strict=True)
    )
    console.print(make_table(baseline, fused, settings, device_type=chosen_device.type))
    why = f"\nWhy this backend:\n{explanation}"
    console.print(printable(why, console), markup=False, highlight=False, soft_wrap=True)

    differences = [abs(a - b) for a, b in zip(baseline.losses, fused.losses, strict=True)]
    largest = max(differences)
    tolerance = _TOLERANCE[chosen_device.type]
    step_of_largest = differences.index(largest) + 1
    verdict = (
        "[green]The loss curves coincide[/green]"
        if largest <= tolerance
        else "[bold red]The loss curves do not coincide[/bold red]"
    )
    distance = (
        f"they differ by {largest:.1e} nats per character at most, at step {step_of_largest} "
        f"(tolerance {tolerance:g})"
        if largest
        else "they are equal to the last bit, at every step"
    )
    console.print(f"\n{verdict}: {distance}.", highlight=False, soft_wrap=True)

    sample = _write_sample(
        trainees[1].model, corpus, console, sample_characters, temperature, seed=seed
    )
    figure = folder / "demo.png"
    draw_figure(
        baseline,
        fused,
        figure,
        title=f"One character model, either layer, on {_describe_device(chosen_device)}",
        tolerance=tolerance,
    )
    seconds = time.perf_counter() - started
    console.print(f"\nPicture: {figure}, {seconds:.0f} s in all", highlight=False, soft_wrap=True)
    return DemoResult(
        baseline=baseline,
        fused=fused,
        largest_difference=largest,
        step_of_largest_difference=step_of_largest,
        tolerance=tolerance,
        sample=sample,
        figure=figure,
        device=chosen_device,
        seconds=seconds,
    )


def _choose_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = 'expected None, "cpu", "cuda" or "cuda:<index>" of a device that is there'
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; {expected}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; {expected}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device is {device!r}, and there are {count} CUDA devices; {expected}")
    return chosen


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"out is {str(folder)!r}, which is or lies under a file; expected a folder, or a "
            "path where one can be made"
        ) from error
    return folder


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''})"


def _name_torch_backend(output: Tensor) -> tuple[str, str]:
    """Read from the autograd graph what computed `torch.nn.LSTM`: its name, and how it is known.

    Args:
        output: [T, B, H], the layer's output, with gradients enabled.

    Returns:
        The library's name, and where it shows.
    """
    libraries = {"Mkldnn": "oneDNN", "Cudnn": "cuDNN", "Miopen": "MIOpen"}
    node = output.grad_fn
    while node is not None:
        for prefix, library in libraries.items():
            if node.name().startswith(prefix):
                return library, "PyTorch's choice"
        node = node.next_functions[0][0] if node.next_functions else None
    return "ATen", "PyTorch's choice"


def _report(
    trainee: Trainee, corpus: Corpus, step_memory: int, backend: tuple[str, str]
) -> LayerReport:
    tail = trainee.losses[-tail_length(trainee.settings.steps) :]
    return LayerReport(
        name=trainee.name,
        losses=tuple(trainee.losses),
        step_seconds=tuple(trainee.step_seconds),
        training_loss=statistics.fmean(tail),
        validation_loss=validate(trainee.model, corpus, trainee.settings),
        characters_per_second=trainee.characters_per_second,
        step_memory=step_memory,
        backend=backend[0],
        reason=backend[1],
    )


def _write_sample(
    model: CharacterModel,
    corpus: Corpus,
    console: Console,
    characters: int,
    temperature: float,
    *,
    seed: int,
) -> str:
    """Print text as the model writes it, one time step at a time; return it with its prompt."""
    device = next(model.parameters()).device
    stream = stream_characters(
        model,
        corpus.encode(_PROMPT).to(device),
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    console.print()
    console.rule("What it writes, one step at a time", align="left")

    def show(text: str, style: str = "") -> None:
        console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)

    show(_PROMPT, "bold")
    written = [_PROMPT]
    for index in itertools.islice(stream, characters):
        written.append(corpus.alphabet[index])
        show(written[-1])
    console.print()
    return "".join(written)
