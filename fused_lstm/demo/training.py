"""Train two models side by side, so that they differ in nothing but their LSTM layer.

Both start from the same parameters and are given the same batches and the same dropout masks, and
each keeps its own optimizer and its own carried state. The two take turns, a block of steps each,
in alternating order, so that a busy moment of the machine slows both alike; speeds are medians of
the time per step.

Dimensions: `T` time steps, `B` streams, `V` characters, `E` embedding features, `H` hidden units.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_lstm.demo.data import Batch, Corpus, read_streams, read_streams_forever
from fused_lstm.demo.model import CharacterModel, State

STEPS_PER_BLOCK = 10
WARMUP_STEPS = 20
FINAL_LEARNING_RATE_FRACTION = 0.05
GRADIENT_NORM_LIMIT = 1.0
# Adam divides a gradient by its usual size plus this. Its default of 1e-8 would turn the rounding
# error of a gradient that is all but zero into a step as large as any.
ADAM_EPSILON = 1e-6


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long; the defaults are made for two CPU cores.

    Attributes:
        steps: optimizer steps of each model.
        time_steps: `T`, characters read between two optimizer steps, per stream.
        streams: `B`, texts read side by side.
        embedding_size: `E`.
        hidden_size: `H`.
        layers: LSTM layers.
        dropout: probability of dropping an input or an output of the LSTM, in [0, 1).
        learning_rate: Adam's, at its peak.
        seed: of parameters, text offsets and dropout masks.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1), or a learning rate not above 0.
    """

    steps: int = 450
    time_steps: int = 64
    streams: int = 32
    embedding_size: int = 64
    hidden_size: int = 256
    layers: int = 1
    dropout: float = 0.1
    learning_rate: float = 8e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("steps", "time_steps", "streams", "embedding_size", "hidden_size", "layers")
        for name in sizes:
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}; expected an integer of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; expected a number in [0, 1)")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate is {self.learning_rate!r}; expected a finite number above 0"
            )

    @property
    def characters_per_step(self) -> int:
        """`T·B`, the characters learnt from in one step."""
        return self.time_steps * self.streams

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then half a cosine."""
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        floor = FINAL_LEARNING_RATE_FRACTION
        return self.learning_rate * warmup * (floor + (1 - floor) * cosine)


@dataclass(frozen=True)
class StepData:
    """What both models are given in one step.

    Attributes:
        batch: the characters.
        embedding_mask: [T, B, E], 0 or 1/(1 - p), on the LSTM's input.
        hidden_mask: [T, B, H], the same on its output.
    """

    batch: Batch
    embedding_mask: Tensor
    hidden_mask: Tensor


def draw_steps(corpus: Corpus, settings: Settings, device: torch.device) -> Iterator[StepData]:
    """Draw batches and dropout masks without end.

    One CPU generator draws everything, so that every device sees the same training.

    Args:
        corpus: the text.
        settings: sizes, dropout and seed.
        device: where the tensors are put.

    Yields:
        One step's data after the other.

    Raises:
        ValueError: the text is too short for one batch.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    keep = 1 - settings.dropout

    def draw_mask(features: int) -> Tensor:
        mask = torch.empty(settings.time_steps, settings.streams, features)
        return mask.bernoulli_(keep, generator=generator).div_(keep).to(device)

    for batch in read_streams_forever(
        corpus.encode(corpus.training),
        steps=settings.time_steps,
        streams=settings.streams,
        generator=generator,
    ):
        yield StepData(
            batch=Batch(batch.inputs.to(device), batch.targets.to(device), batch.continues),
            embedding_mask=draw_mask(settings.embedding_size),
            hidden_mask=draw_mask(settings.hidden_size),
        )


@dataclass
class Trainee:
    """A model in training: everything that belongs to one of the two sides.

    Attributes:
        name: the layer's name, for people.
        model: the model.
        settings: what is trained, and for how long.
        losses: the training loss of each step so far, in nats per character.
        step_seconds: the time each of them took.
    """

    name: str
    model: CharacterModel
    settings: Settings
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.Adam(self.model.parameters(), eps=ADAM_EPSILON)
        self._state: State | None = None

    @property
    def characters_per_second(self) -> float:
        """Characters learnt from per second, by the median time of a step."""
        return self.settings.characters_per_step / statistics.median(self.step_seconds)

    @property
    def recent_characters_per_second(self) -> float:
        """The same, of the last block alone."""
        recent = self.step_seconds[-STEPS_PER_BLOCK:]
        return self.settings.characters_per_step / statistics.median(recent)

    def train_step(self, data: StepData) -> None:
        """Learn from one batch; its loss and its time are added to the lists.

        The time covers forward, backward, clipping and the optimizer, to the end of the device's
        work.

        Args:
            data: the characters and the masks.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the parameters are left
                as they were.
        """
        step = len(self.losses)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        device = data.batch.inputs.device
        _synchronize(device)
        started = time.perf_counter()
        logits, state = self.model(
            data.batch.inputs,
            self._state if data.batch.continues else None,
            embedding_mask=data.embedding_mask,
            hidden_mask=data.hidden_mask,
        )
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data.batch.targets.flatten())
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM_LIMIT)
        loss_value, norm_value = loss.item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._optimizer.zero_grad()
            raise FloatingPointError(
                f"{self.name}, step {step}: loss is {loss_value} and the gradient's norm is "
                f"{norm_value}; expected finite numbers (learning_rate is "
                f"{self.settings.learning_rate})"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        _synchronize(device)
        self.step_seconds.append(time.perf_counter() - started)
        self.losses.append(loss_value)
        # What is carried on is a value, not a way back: gradients stop at the batch's beginning.
        self._state = (state[0].detach(), state[1].detach())


def build_model(
    lstm: type[nn.LSTM], corpus: Corpus, settings: Settings, device: torch.device
) -> CharacterModel:
    """Make a model whose parameters depend on the seed alone.

    Args:
        lstm: `torch.nn.LSTM` or a drop-in for it.
        corpus: gives the alphabet.
        settings: gives the sizes and the seed.
        device: where the model is put.

    Returns:
        The model; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = CharacterModel(
            lstm,
            characters=len(corpus.alphabet),
            embedding_size=settings.embedding_size,
            hidden_size=settings.hidden_size,
            layers=settings.layers,
        )
    return model.to(device)


def train_side_by_side(
    trainees: tuple[Trainee, Trainee],
    steps: Iterator[StepData],
    *,
    after_block: Callable[[int], None],
) -> None:
    """Train both models to the end, taking turns.

    Args:
        trainees: the two sides, with the same settings.
        steps: the data; each side is given all of it.
        after_block: called with the number of steps done so far whenever both have done a block.

    Raises:
        FloatingPointError: a loss or a gradient is not finite.
    """
    total = trainees[0].settings.steps
    for first in range(0, total, STEPS_PER_BLOCK):
        block = [next(steps) for _ in range(min(STEPS_PER_BLOCK, total - first))]
        goes_second = (first // STEPS_PER_BLOCK) % 2
        for trainee in (trainees[goes_second], trainees[1 - goes_second]):
            for data in block:
                trainee.train_step(data)
        after_block(first + len(block))


@torch.no_grad()
def validate(model: CharacterModel, corpus: Corpus, settings: Settings) -> float:
    """Measure a model on the validation text, read once with carried state and no dropout.

    Args:
        model: the model.
        corpus: gives the text.
        settings: gives T and B.

    Returns:
        The mean loss in nats per character.

    Raises:
        ValueError: the validation text is too short for `B` streams.
    """
    device = next(model.parameters()).device
    text = corpus.encode(corpus.validation)
    state: State | None = None
    total, characters = 0.0, 0
    for batch in read_streams(text, steps=settings.time_steps, streams=settings.streams):
        logits, state = model(batch.inputs.to(device), state)
        targets = batch.targets.to(device).flatten()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        total += loss.item()
        characters += targets.numel()
    return total / characters


def measure_step_memory(trainee: Trainee, data: StepData) -> int:
    """Measure the most memory one training step holds above what was there when it began.

    Weights and Adam's moments are there before the step and not counted; activations saved for
    the backward pass, the layer's work space, gradients and temporaries are. The step measured is
    the second: the first makes Adam's moments, compiles kernels and fills caches.

    On CUDA this is `torch.cuda.max_memory_allocated` minus what was allocated at the beginning.
    On a CPU it is the peak of the running sum of PyTorch's own allocations and releases, recorded
    by `torch.profiler`; resident memory would tell more about the allocator's caches than about
    the layer. What a kernel takes past PyTorch's allocator is not seen.

    Args:
        trainee: a model that will not be used afterwards: it learns from `data` twice.
        data: the characters and the masks.

    Returns:
        The peak in bytes.
    """
    trainee.train_step(data)
    device = data.batch.inputs.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        trainee.train_step(data)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _muted_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        trainee.train_step(data)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (float(event["ts"]), int(event["args"]["Bytes"]))
        for event in events
        if event.get("name") == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Keep the profiler's native library from writing notices into the middle of the report."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
