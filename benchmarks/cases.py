"""What is run and what is right: shapes, inputs, layers, and the error each result may have.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of the
projection (`H` without one), `L` layers, `D` directions, `N` rows of all sequences together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_lstm

MODES = ("inference", "training")
TUNED_ALLOCATOR_SUFFIX = "-tuned-allocator"
DTYPES = ("bfloat16", "float16", "float32", "float64")
DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}

# A call of a cell is too short to be timed by itself: a block runs as in a stream, on warm caches.
CALLS_PER_SAMPLE_OF_CELL = 20

# What a layer's call returns, and in training besides the gradient of each parameter.
OUTPUTS = ("output", "h_n", "c_n")
CELL_OUTPUTS = ("h_1", "c_1")
INPUTS = ("input", "h_0", "c_0")


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of its input.

    Attributes:
        packed: the input is a `PackedSequence`; T is the length that its longest may have.
        cell: the layer is an `LSTMCell`, and T is 1.
    """

    T: int
    B: int
    I: int  # noqa: E741 - the field's name for this dimension
    H: int
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    proj_size: int = 0
    packed: bool = False
    cell: bool = False

    @property
    def name(self) -> str:
        """Sizes, then what is unusual.

        That is a projection (p32), layers (l2), bidirectional (bi), batch first (bf), packed.
        """
        words = ["cell" if self.cell else f"t{self.T}", f"b{self.B}-i{self.I}-h{self.H}"]
        if self.proj_size:
            words.append(f"p{self.proj_size}")
        if self.num_layers > 1:
            words.append(f"l{self.num_layers}")
        if self.bidirectional:
            words.append("bi")
        if self.batch_first:
            words.append("bf")
        if self.packed:
            words.append("packed")
        return "-".join(words)

    @property
    def output_size(self) -> int:
        """Features of h in one direction: P."""
        return self.proj_size or self.H

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def lengths(self) -> Tensor:
        """Lengths of the sequences [B], falling; T unless packed, else drawn from T/4 to T."""
        if not self.packed:
            return torch.full((self.B,), self.T)
        generator = torch.Generator().manual_seed(0)
        # Rounded up: no sequence is empty.
        drawn = torch.randint(-(-self.T // 4), self.T + 1, (self.B,), generator=generator)
        return drawn.sort(descending=True).values


@dataclass(frozen=True)
class Case:
    """A shape in a dtype; its name is that of its record.

    Attributes:
        tuned_allocator: it runs in a process whose allocator keeps large blocks, training alone.
    """

    shape: Shape
    dtype_name: str
    tuned_allocator: bool = False

    @property
    def name(self) -> str:
        suffix = TUNED_ALLOCATOR_SUFFIX if self.tuned_allocator else ""
        return f"{self.shape.name}-{self.dtype_name}{suffix}"

    @property
    def modes(self) -> tuple[str, ...]:
        return ("training",) if self.tuned_allocator else MODES

    @property
    def calls_per_sample(self) -> int:
        return CALLS_PER_SAMPLE_OF_CELL if self.shape.cell else 1

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def flops(self, mode: str) -> int:
        """Floating-point operations of the matrix products; the pointwise part is left out.

        The backward pass has two products, for the operand and for the weights, for each of the
        forward pass.
        """
        s = self.shape
        widths = [s.I] + [s.output_size * s.directions] * (s.num_layers - 1)
        # Of one row, in one direction.
        products = sum(4 * s.H * (width + s.output_size) + s.H * s.proj_size for width in widths)
        forward = 2 * int(s.lengths.sum()) * s.directions * products
        return forward if mode == "inference" else 3 * forward

    def arguments(self) -> dict[str, int | bool]:
        """Arguments of the layer."""
        s = self.shape
        sizes: dict[str, int | bool] = {"input_size": s.I, "hidden_size": s.H}
        if s.cell:
            return sizes
        return {
            **sizes,
            "num_layers": s.num_layers,
            "bidirectional": s.bidirectional,
            "batch_first": s.batch_first,
            "proj_size": s.proj_size,
        }


# What the summary of a run on a CPU is over, in float32.
HEADLINE_SHAPES = (
    Shape(1000, 1, 16, 32),
    Shape(100, 1, 64, 64),
    Shape(200, 8, 32, 32),
    Shape(100, 16, 64, 64),
    Shape(50, 128, 16, 64),
    Shape(20, 256, 64, 64),
    Shape(100, 64, 64, 128),
    Shape(100, 64, 128, 256),
    Shape(100, 1, 512, 512),
    Shape(100, 32, 512, 512),
    Shape(50, 64, 1024, 1024),
)

CPU_SHAPES = (
    *HEADLINE_SHAPES,
    Shape(1, 1, 64, 64),  # streaming: one step of one sequence a call
    Shape(1, 16, 64, 256),
    Shape(100, 32, 64, 128, num_layers=2, bidirectional=True, batch_first=True),
    Shape(100, 16, 64, 64, proj_size=32),
    Shape(100, 64, 128, 256, proj_size=128),
    Shape(100, 16, 64, 64, packed=True),
    Shape(100, 64, 128, 256, packed=True),
    Shape(1, 1, 64, 64, cell=True),
    Shape(1, 16, 64, 256, cell=True),
    Shape(1, 1, 512, 512, cell=True),
)

CPU_CASES = (
    *(Case(shape, "float32") for shape in CPU_SHAPES),
    Case(Shape(100, 16, 64, 64), "float64"),
    Case(Shape(100, 64, 128, 256), "float64"),
    Case(Shape(100, 16, 64, 64), "bfloat16"),
    Case(Shape(100, 64, 128, 256), "bfloat16"),
    Case(Shape(100, 1, 512, 512), "bfloat16"),
    Case(Shape(100, 32, 512, 512), "bfloat16"),
)

# In groups: every dtype of a group runs before the next group, for a budget ends the run anywhere.
GPU_SHAPES = (
    (
        Shape(512, 64, 256, 256),
        Shape(512, 64, 512, 512),
        Shape(512, 16, 64, 64),
        Shape(512, 64, 128, 128),
        Shape(1024, 16, 768, 768),
    ),
    (
        Shape(128, 1, 64, 64),
        Shape(512, 16, 1024, 1024),
        Shape(512, 256, 256, 256),
        Shape(1024, 1, 256, 256),
        Shape(128, 64, 256, 256, num_layers=2, bidirectional=True, batch_first=True),
    ),
    (
        Shape(128, 64, 512, 512),
        Shape(128, 16, 128, 128),
        Shape(512, 1, 512, 512),
        Shape(1024, 64, 64, 64),
        Shape(512, 256, 512, 512),
    ),
    (
        Shape(128, 256, 64, 64),
        Shape(1024, 16, 256, 256),
        Shape(1024, 1, 1024, 1024),
        Shape(128, 256, 1024, 1024),
        Shape(1024, 64, 1024, 1024),
        Shape(1024, 256, 768, 768),
    ),
)


def list_cases(
    device_type: str, dtypes: Iterable[str] = (), shapes: Iterable[Shape] = ()
) -> list[Case]:
    """List the cases in the order in which they run, the most informative first.

    Args:
        device_type: "cpu" or "cuda".
        dtypes: names of dtypes instead of the device's default ones; on a CPU every shape then
            runs in each of them.
        shapes: shapes instead of the device's default ones.
    """
    dtypes, shapes = tuple(dtypes), tuple(shapes)
    if device_type == "cpu" and not dtypes and not shapes:
        return list(CPU_CASES)
    default = GPU_SHAPES if device_type == "cuda" else (CPU_SHAPES,)
    groups = (shapes,) if shapes else default
    names = dtypes or DEFAULT_DTYPES[device_type]
    return [Case(shape, name) for group in groups for shape, name in product(group, names)]


Layer = nn.LSTM | nn.LSTMCell


@dataclass(frozen=True)
class Provider:
    """A maker of layers.

    Attributes:
        name: what it is called in records and tables.
        lstm: takes the arguments of `torch.nn.LSTM`, by keyword.
        cell: takes the arguments of `torch.nn.LSTMCell`, by keyword.
    """

    name: str
    lstm: Callable[..., nn.LSTM]
    cell: Callable[..., nn.LSTMCell]

    def build(self, case: Case, device: torch.device, dtype: torch.dtype) -> Layer:
        """Build a case's layer, in the case's dtype or another."""
        build = self.cell if case.shape.cell else self.lstm
        return build(**case.arguments(), device=device, dtype=dtype)


TORCH = Provider("torch", nn.LSTM, nn.LSTMCell)


def list_providers(backends: Sequence[str]) -> list[Provider]:
    """List `torch.nn`'s layers, then `fused_lstm`'s by each backend ("default" for its choice)."""
    providers = [TORCH]
    for backend in backends:
        name, options = "fused_lstm", {}
        if backend != "default":
            name, options = f"fused_lstm[{backend}]", {"backend": backend}
        lstm, cell = (partial(kind, **options) for kind in (fused_lstm.LSTM, fused_lstm.LSTMCell))
        providers.append(Provider(name, lstm, cell))
    return providers


@dataclass(frozen=True)
class Data:
    """One set of inputs of a call and of gradients of its results.

    Attributes:
        inputs: input [T, B, I] ([B, T, I] batch first, [N, I] packed), h_0 [L·D, B, P] and c_0
            [L·D, B, H]; of a cell [B, I], [B, H] and [B, H].
        gradients: of output [T, B, D·P] ([B, T, D·P] batch first, [N, D·P] packed), h_n
            [L·D, B, P] and c_n [L·D, B, H]; of a cell's h_1 [B, H] and c_1 [B, H].
        batch_sizes: of a packed input [T], how many sequences have each step; else None.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    gradients: tuple[Tensor, ...]
    batch_sizes: Tensor | None = None

    @property
    def input(self) -> Tensor | PackedSequence:
        """The input as a layer takes it."""
        if self.batch_sizes is None:
            return self.inputs[0]
        return PackedSequence(self.inputs[0], self.batch_sizes)

    def to(self, dtype: torch.dtype) -> Data:
        x, h_0, c_0 = (t.detach().to(dtype).requires_grad_() for t in self.inputs)
        gradients = tuple(t.to(dtype) for t in self.gradients)
        return replace(self, inputs=(x, h_0, c_0), gradients=gradients)


def make_data(case: Case, device: torch.device, seed: int = 0) -> Data:
    """Draw inputs and gradients."""
    s = case.shape
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=case.dtype)

    leading: tuple[int, ...] = (s.B, s.T) if s.batch_first else (s.T, s.B)
    states: tuple[int, ...] = (s.num_layers * s.directions, s.B)
    batch_sizes = None
    if s.packed:
        lengths = s.lengths
        batch_sizes = (lengths > torch.arange(int(lengths[0])).unsqueeze(1)).sum(1)
        leading = (int(lengths.sum()),)
    if s.cell:
        leading = states = (s.B,)
    h, c = (*states, s.output_size), (*states, s.H)
    x, h_0, c_0 = (draw(*size).requires_grad_() for size in ((*leading, s.I), h, c))
    results = (h, c) if s.cell else ((*leading, s.directions * s.output_size), h, c)
    return Data((x, h_0, c_0), tuple(draw(*size) for size in results), batch_sizes)


def make_parameters(case: Case, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Draw the parameters, in the case's dtype, as `torch.nn.LSTM` initialises them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return TORCH.build(case, device, case.dtype).state_dict()


def make_layer(
    provider: Provider,
    case: Case,
    parameters: dict[str, Tensor],
    device: torch.device,
    mode: str,
    dtype: torch.dtype | None = None,
) -> Layer:
    """Build a provider's layer with the given parameters, in the case's dtype or another."""
    layer = provider.build(case, device, dtype or case.dtype)
    layer.load_state_dict(parameters)
    return layer.train(mode == "training")


def run_layer(layer: Layer, data: Data) -> tuple[Tensor, ...]:
    """Call a layer; with gradients enabled, run the backward pass too. This is what is timed.

    Returns:
        output (a packed one's rows), h_n and c_n, or a cell's h_1 and c_1; with gradients enabled,
        besides them the gradients of the inputs and of the parameters.
    """
    _, h_0, c_0 = data.inputs
    results: tuple[Tensor, ...]
    if isinstance(layer, nn.LSTMCell):
        results = layer(data.input, (h_0, c_0))
    else:
        output, states = layer(data.input, (h_0, c_0))
        results = (output if data.batch_sizes is None else output.data, *states)
    if not torch.is_grad_enabled():
        return results
    # Nothing is accumulated, so there is nothing to clear between calls.
    variables = (*data.inputs, *layer.parameters())
    return (*results, *torch.autograd.grad(results, variables, data.gradients))


def result_names(layer: Layer, mode: str) -> list[str]:
    """Name what `run_layer` returns."""
    names = list(CELL_OUTPUTS if isinstance(layer, nn.LSTMCell) else OUTPUTS)
    if mode == "training":
        parameters = [name for name, _ in layer.named_parameters()]
        names += [f"gradient of {name}" for name in (*INPUTS, *parameters)]
    return names


def largest_errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Largest absolute difference of each result from the float64 one."""
    for a, e in zip(actual, exact, strict=True):
        if a.shape != e.shape:
            raise ValueError(f"a result has the shape {list(a.shape)}, not {list(e.shape)}")
    pairs = zip(actual, exact, strict=True)
    return [float((a.detach().double() - e).abs().max()) for a, e in pairs]


def error_budgets(
    native_errors: Sequence[float], exact: Sequence[Tensor], dtype: torch.dtype
) -> list[float]:
    """How far each result may be from float64.

    Twice as far as `torch.nn.LSTM` in the same dtype, and one rounding of the result's scale.

    Args:
        native_errors: what `largest_errors` says of `torch.nn.LSTM` in `dtype`.
        exact: the results in float64.
        dtype: the dtype computed in.
    """
    eps = torch.finfo(dtype).eps
    return [
        2 * error + eps * float(e.abs().max())
        for error, e in zip(native_errors, exact, strict=True)
    ]
