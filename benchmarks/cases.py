"""What is run and what is right: shapes, inputs, layers, and the error each result may have.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `L` layers, `D`
directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

import fused_lstm

MODES = ("inference", "training")
DTYPES = ("bfloat16", "float16", "float32", "float64")
DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}

# What a layer's call returns, and in training besides the gradient of each parameter.
OUTPUTS = ("output", "h_n", "c_n")
INPUTS = ("input", "h_0", "c_0")


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of its input."""

    T: int
    B: int
    I: int  # noqa: E741 - the field's name for this dimension
    H: int
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False

    @property
    def name(self) -> str:
        """Sizes, then what is unusual: layers (l2), bidirectional (bi), batch first (bf)."""
        words = [f"t{self.T}-b{self.B}-i{self.I}-h{self.H}"]
        if self.num_layers > 1:
            words.append(f"l{self.num_layers}")
        if self.bidirectional:
            words.append("bi")
        if self.batch_first:
            words.append("bf")
        return "-".join(words)


@dataclass(frozen=True)
class Case:
    """A shape in a dtype; its name is that of its record."""

    shape: Shape
    dtype_name: str

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.dtype_name}"

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
        directions = 2 if s.bidirectional else 1
        widths = [s.I] + [s.H * directions] * (s.num_layers - 1)
        forward = sum(2 * s.T * s.B * 4 * s.H * (width + s.H) * directions for width in widths)
        return forward if mode == "inference" else 3 * forward

    def arguments(self) -> dict[str, int | bool]:
        """Arguments of the layer."""
        s = self.shape
        return {
            "input_size": s.I,
            "hidden_size": s.H,
            "num_layers": s.num_layers,
            "bidirectional": s.bidirectional,
            "batch_first": s.batch_first,
        }


CPU_SHAPES = (
    Shape(100, 16, 64, 64),
    Shape(100, 64, 128, 256),
    Shape(100, 1, 64, 64),
    Shape(200, 8, 32, 32),
    Shape(1000, 1, 16, 32),
    Shape(1, 1, 64, 64),  # streaming: one step of one sequence a call
    Shape(50, 128, 16, 64),
    Shape(20, 256, 64, 64),
    Shape(100, 64, 64, 128),
    Shape(100, 32, 64, 128, num_layers=2, bidirectional=True, batch_first=True),
    Shape(100, 1, 512, 512),
    Shape(100, 32, 512, 512),
    Shape(50, 64, 1024, 1024),
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
        dtypes: names of dtypes instead of the device's default ones.
        shapes: shapes instead of the device's default ones.
    """
    default = GPU_SHAPES if device_type == "cuda" else (CPU_SHAPES,)
    groups = (tuple(shapes),) if shapes else default
    names = tuple(dtypes) or DEFAULT_DTYPES[device_type]
    return [Case(shape, name) for group in groups for shape, name in product(group, names)]


@dataclass(frozen=True)
class Provider:
    """A maker of layers.

    Attributes:
        name: what it is called in records and tables.
        build: takes the arguments of `torch.nn.LSTM`, by keyword.
    """

    name: str
    build: Callable[..., nn.LSTM]


def list_providers(backends: Sequence[str]) -> list[Provider]:
    """List `torch.nn.LSTM`, then `fused_lstm.LSTM` with each backend ("default" for its choice)."""
    providers = [Provider("torch", nn.LSTM)]
    for backend in backends:
        if backend == "default":
            providers.append(Provider("fused_lstm", fused_lstm.LSTM))
        else:

            def build(named: str = backend, **arguments: object) -> nn.LSTM:
                return fused_lstm.LSTM(**arguments, backend=named)

            providers.append(Provider(f"fused_lstm[{backend}]", build))
    return providers


@dataclass(frozen=True)
class Data:
    """One set of inputs of a call and of gradients of its results.

    Attributes:
        inputs: input [T, B, I] ([B, T, I] batch first), h_0 and c_0 [L·D, B, H].
        gradients: of output [T, B, D·H] ([B, T, D·H] batch first), h_n and c_n [L·D, B, H].
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    gradients: tuple[Tensor, Tensor, Tensor]

    def double(self) -> Data:
        x, h_0, c_0 = (t.detach().double().requires_grad_() for t in self.inputs)
        output, h_n, c_n = (t.double() for t in self.gradients)
        return Data((x, h_0, c_0), (output, h_n, c_n))


def make_data(case: Case, device: torch.device, seed: int = 0) -> Data:
    """Draw inputs and gradients."""
    s = case.shape
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=case.dtype)

    directions = 2 if s.bidirectional else 1
    leading = (s.B, s.T) if s.batch_first else (s.T, s.B)
    states = (s.num_layers * directions, s.B, s.H)
    x, h_0, c_0 = (t.requires_grad_() for t in (draw(*leading, s.I), draw(*states), draw(*states)))
    gradients = (draw(*leading, directions * s.H), draw(*states), draw(*states))
    return Data((x, h_0, c_0), gradients)


def make_parameters(case: Case, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Draw the parameters, in the case's dtype, as `torch.nn.LSTM` initialises them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        layer = nn.LSTM(**case.arguments(), device=device, dtype=case.dtype)
    return layer.state_dict()


def make_layer(
    provider: Provider,
    case: Case,
    parameters: dict[str, Tensor],
    device: torch.device,
    mode: str,
    dtype: torch.dtype | None = None,
) -> nn.LSTM:
    """Build a provider's layer with the given parameters, in the case's dtype or another."""
    layer = provider.build(**case.arguments(), device=device, dtype=dtype or case.dtype)
    layer.load_state_dict(parameters)
    return layer.train(mode == "training")


def run_layer(layer: nn.LSTM, data: Data) -> tuple[Tensor, ...]:
    """Call a layer; with gradients enabled, run the backward pass too. This is what is timed.

    Returns:
        output, h_n and c_n; with gradients enabled, besides them the gradients of the inputs and
        of the parameters.
    """
    x, h_0, c_0 = data.inputs
    output, (h_n, c_n) = layer(x, (h_0, c_0))
    results = (output, h_n, c_n)
    if not torch.is_grad_enabled():
        return results
    # Nothing is accumulated, so there is nothing to clear between calls.
    variables = (*data.inputs, *layer.parameters())
    return (*results, *torch.autograd.grad(results, variables, data.gradients))


def result_names(layer: nn.LSTM, mode: str) -> list[str]:
    """Name what `run_layer` returns."""
    names = list(OUTPUTS)
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
