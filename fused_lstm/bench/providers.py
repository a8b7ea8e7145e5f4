"""Who runs a case: `torch.nn`'s layers, torch.compile's version of them, each backend of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

import fused_lstm
from fused_lstm.backends import ORDER
from fused_lstm.bench.cases import (
    MOST_STEPS_OF_CUDNN,
    Case,
    Data,
    Layer,
    LSTMInChunks,
    make_data,
    run_layer,
    torch_layer,
)

__all__ = [
    "BACKENDS",
    "COMPILED",
    "TORCH",
    "Call",
    "CompiledProvider",
    "OurProvider",
    "Prepared",
    "Provider",
    "UnavailableError",
    "provider_of_backend",
]

# Takes inputs and returns what `run_layer` does: with gradients enabled, gradients too.
Call = Callable[[Data], tuple[Tensor, ...]]
# Ours: what is chosen by itself, or a backend by its name.
BACKENDS = ("default", *ORDER)

# torch.compile writes out every step where there is a backward pass: 16 steps of 64 units took it
# 22 s on two cores of an EPYC.
_MOST_COMPILED_STEPS = 20
_MOST_STEPS_OF_GRAPH = 4096
# A millisecond or more, on any GPU.
_MOST_GRAPH_FLOPS = 10**12


class UnavailableError(RuntimeError):
    """A provider cannot run a case here; the message says why."""


@dataclass
class Prepared:
    """A provider that is ready to run a case.

    Attributes:
        call: runs it; this is what is timed.
        backend: what computes it.
        reason: why that.
    """

    call: Call
    backend: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Provider(ABC):
    """An implementation of the LSTM.

    Attributes:
        name: what it is called in records and tables.
        error_factor: how many times the budget of our own error its error may be, and it is timed.
            What it is stands in the record.
        graphs: whether it is timed in a CUDA graph, too.
        is_ours: whether its failures are our failures.
        own_threads: whether it runs on other threads of the CPU than torch's.
    """

    is_ours: ClassVar[bool] = False
    own_threads: ClassVar[bool] = False

    name: str
    error_factor: float = field(default=1.0, kw_only=True)
    graphs: bool = field(default=True, kw_only=True)

    @abstractmethod
    def prepare(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        """Build what runs a case.

        Args:
            case: what is to be run.
            parameters: by the names of `torch.nn.LSTM`, with its order of gates.
            device: where they are and where to run.
            mode: "inference", where the call returns output, h_n and c_n; or "training", where
                gradients of input, h_0, c_0 and of every parameter follow.

        Raises:
            UnavailableError: if it cannot be done here.
        """

    def launches(self, case: Case, mode: str, device: torch.device) -> tuple[str, ...]:
        """List how it runs a case: "eager", and on a GPU in a CUDA "graph" where that tells more.

        Where products take long the host is ahead anyway, and a graph holds all memory of a call;
        and those who launch something at each step would make graphs of millions of nodes.
        """
        tells_more = case.shape.T <= _MOST_STEPS_OF_GRAPH and case.flops(mode) <= _MOST_GRAPH_FLOPS
        if self.graphs and device.type == "cuda" and tells_more:
            return ("eager", "graph")
        return ("eager",)


def _layer(
    case: Case,
    parameters: dict[str, Tensor],
    device: torch.device,
    mode: str,
    lstm: Callable[..., Layer],
    cell: Callable[..., Layer],
) -> Layer:
    layer = case.build(lstm, cell, device)
    layer.load_state_dict(parameters)
    return layer.train(mode == "training")


class TorchProvider(Provider):
    """`torch.nn.LSTM` or `torch.nn.LSTMCell`: oneDNN, cuDNN, MIOpen or plain kernels."""

    def prepare(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        """Build the layer."""
        layer = torch_layer(case, parameters, device, case.dtype).train(mode == "training")
        reason = "the layer that the others are compared with"
        if isinstance(layer, LSTMInChunks):
            reason += f", in chunks of {MOST_STEPS_OF_CUDNN} steps, the most that cuDNN takes"
        return Prepared(partial(run_layer, layer), "torch", reason)


class CompiledProvider(Provider):
    """`torch.nn`'s layers, compiled by `torch.compile` with its default options."""

    def prepare(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        """Have the layer compiled."""
        T = case.shape.T
        # In inference on a CPU one call of oneDNN stays one.
        written_out = mode == "training" or device.type == "cuda"
        if written_out and T > _MOST_COMPILED_STEPS and not case.shape.cell:
            raise UnavailableError(
                f"T = {T}: torch.compile writes out every step of nn.LSTM here, which takes it "
                f"minutes; it is timed up to T = {_MOST_COMPILED_STEPS}"
            )
        if case.shape.packed:
            raise UnavailableError(
                "packed=True: torch.compile does not trace nn.LSTM's packed input"
            )
        layer = _layer(case, parameters, device, mode, nn.LSTM, nn.LSTMCell)
        torch.compiler.reset()
        compiled: nn.Module = torch.compile(layer, fullgraph=True, dynamic=False)  # type: ignore[assignment]
        # Without the first option the compiler stops at every RNN; without the second, processes
        # that it starts are still at work while others are timed.
        with (
            torch._dynamo.config.patch(allow_rnn=True),
            torch._inductor.config.patch(compile_threads=1),
            torch.set_grad_enabled(mode == "training"),
        ):
            run_layer(compiled, make_data(case, device))
        return Prepared(
            partial(run_layer, compiled),
            "torch.compile",
            "the default options, fullgraph, static shapes",
        )


@dataclass(frozen=True)
class OurProvider(Provider):
    """`fused_lstm.LSTM` or `LSTMCell`.

    Attributes:
        backend: a backend to insist on; None for the choice that users get.
    """

    is_ours: ClassVar[bool] = True

    backend: str | None = None

    def prepare(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        """Build the layer, and ask which backend it gets."""
        lstm, cell = (
            partial(kind, backend=self.backend) for kind in (fused_lstm.LSTM, fused_lstm.LSTMCell)
        )
        layer = _layer(case, parameters, device, mode, lstm, cell)
        assert isinstance(layer, fused_lstm.LSTM | fused_lstm.LSTMCell)
        with torch.set_grad_enabled(mode == "training"):
            explanation = fused_lstm.explain(layer, make_data(case, device).input)
        backend = explanation.backend
        return Prepared(partial(run_layer, layer), backend, explanation.reasons.get(backend, ""))


TORCH = TorchProvider("torch")
# Another order of the same operations: by luck, a result may be off by more than torch.nn's own.
COMPILED = CompiledProvider("torch.compile", error_factor=8.0, graphs=False)


def provider_of_backend(backend: str) -> OurProvider:
    """Name a provider after one of `BACKENDS`: "fused_lstm", or "fused_lstm[native]"."""
    if backend == "default":
        return OurProvider("fused_lstm")
    return OurProvider(f"fused_lstm[{backend}]", backend=backend)
