"""What is run and what is right: shapes, inputs, layers, and the error each result may have.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of the
projection (`H` without one), `L` layers, `D` directions, `N` rows of all sequences together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

MODES = ("inference", "training")
# "float32" has IEEE products on every device; "tf32" is float32 whose products may be TF32's.
DTYPES = ("bfloat16", "float16", "float32", "tf32", "float64")

# What a layer's call returns, and in training besides the gradient of each parameter.
OUTPUTS = ("output", "h_n", "c_n")
CELL_OUTPUTS = ("h_1", "c_1")
INPUTS = ("input", "h_0", "c_0")

# Of steps, or it refuses: https://github.com/pytorch/pytorch/issues/133751
MOST_STEPS_OF_CUDNN = 65535

Layer = nn.LSTM | nn.LSTMCell


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
        """D: 1 or 2."""
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


def dtype_of_tensors(name: str) -> torch.dtype:
    """Look up one of `DTYPES`: TF32 is a way to multiply float32."""
    dtype: torch.dtype = getattr(torch, "float32" if name == "tf32" else name)
    return dtype


@dataclass(frozen=True)
class Case:
    """A shape in a dtype, one of `DTYPES`."""

    shape: Shape
    dtype_name: str

    @property
    def name(self) -> str:
        """The shape's name, then the dtype's."""
        return f"{self.shape.name}-{self.dtype_name}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        return dtype_of_tensors(self.dtype_name)

    @property
    def eps(self) -> float:
        """Spacing of the numbers that products are made of, relative to 1."""
        # TF32 has ten bits behind the point.
        return 2.0**-10 if self.dtype_name == "tf32" else torch.finfo(self.dtype).eps

    def build(
        self,
        lstm: Callable[..., Layer],
        cell: Callable[..., Layer],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> Layer:
        """Build the layer, in the case's dtype or another.

        Args:
            lstm: takes the arguments of `torch.nn.LSTM`, by keyword.
            cell: takes the arguments of `torch.nn.LSTMCell`, by keyword.
            device: of the parameters.
            dtype: of the parameters.
        """
        kind = cell if self.shape.cell else lstm
        return kind(**self.arguments(), device=device, dtype=dtype or self.dtype)

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
        """Copy it in another dtype."""
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
        return case.build(nn.LSTM, nn.LSTMCell, device).state_dict()


class LSTMInChunks(nn.LSTM):
    """`torch.nn.LSTM`, of one layer and direction, for more steps than cuDNN takes at once."""

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run it over input [T, B, I]."""
        outputs = []
        for chunk in torch.split(input, MOST_STEPS_OF_CUDNN):
            output, hx = super().forward(chunk, hx)
            outputs.append(output)
        return torch.cat(outputs), hx


def torch_layer(
    case: Case, parameters: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Layer:
    """Build `torch.nn`'s layer with the given parameters."""
    in_chunks = device.type == "cuda" and case.shape.T > MOST_STEPS_OF_CUDNN
    layer = case.build(LSTMInChunks if in_chunks else nn.LSTM, nn.LSTMCell, device, dtype)
    layer.load_state_dict(parameters)
    return layer


@contextlib.contextmanager
def products_of(case: Case) -> Iterator[None]:
    """Have the GPU multiply float32 as the case says: in IEEE arithmetic, or in TF32."""
    if case.dtype != torch.float32:
        yield
        return
    settings: list[Any] = [torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = "tf32" if case.dtype_name == "tf32" else "ieee"
        yield
    finally:
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


def run_layer(layer: nn.Module, data: Data) -> tuple[Tensor, ...]:
    """Call a layer; with gradients enabled, run the backward pass too. This is what is timed.

    Returns:
        output (a packed one's rows), h_n and c_n, or a cell's h_1 and c_1; with gradients enabled,
        besides them the gradients of the inputs and of the parameters.
    """
    _, h_0, c_0 = data.inputs
    results: tuple[Tensor, ...]
    if len(data.gradients) == len(CELL_OUTPUTS):
        results = layer(data.input, (h_0, c_0))
    else:
        output, states = layer(data.input, (h_0, c_0))
        results = (output if data.batch_sizes is None else output.data, *states)
    if not torch.is_grad_enabled():
        return results
    # Nothing is accumulated, so there is nothing to clear between calls.
    variables = (*data.inputs, *layer.parameters())
    return (*results, *torch.autograd.grad(results, variables, data.gradients))


def result_names(case: Case, mode: str, parameters: Iterable[str]) -> list[str]:
    """Name what `run_layer` returns of a layer with these parameters."""
    names = list(CELL_OUTPUTS if case.shape.cell else OUTPUTS)
    if mode == "training":
        names += [f"gradient of {name}" for name in (*INPUTS, *parameters)]
    return names


def largest_errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Largest absolute difference of each result from the float64 one."""
    if len(actual) != len(exact):
        raise ValueError(f"there are {len(actual)} results, not {len(exact)}")
    for a, e in zip(actual, exact, strict=True):
        if a.shape != e.shape:
            raise ValueError(f"a result has the shape {list(a.shape)}, not {list(e.shape)}")
    pairs = zip(actual, exact, strict=True)
    return [float((a.detach().double() - e).abs().max()) for a, e in pairs]


def error_budgets(
    native_errors: Sequence[float], exact: Sequence[Tensor], eps: float
) -> list[float]:
    """How far each result may be from float64.

    Twice as far as `torch.nn.LSTM` in the same dtype, and one rounding of the result's scale.

    Args:
        native_errors: what `largest_errors` says of `torch.nn.LSTM` in the same dtype.
        exact: the results in float64.
        eps: of that dtype, as `Case.eps`.
    """
    return [
        2 * error + eps * float(e.abs().max())
        for error, e in zip(native_errors, exact, strict=True)
    ]


def over_budget(errors: Sequence[float], budgets: Sequence[float]) -> list[float]:
    """Divide errors by their budgets; a result that is zero throughout may have a budget of 0."""
    return [
        0.0 if error == 0 else error / budget if budget else math.inf
        for error, budget in zip(errors, budgets, strict=True)
    ]
