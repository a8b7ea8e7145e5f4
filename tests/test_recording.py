"""Programs that record the layer: torch.jit, torch.fx, torch.export; and copies of it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm import LSTM, LSTMCell

backends = pytest.mark.parametrize("backend", [None, "reference"], ids=["default", "reference"])


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Doubled(LSTM):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return 2 * output, states


class DoubledCell(LSTMCell):
    def forward(self, input, hx=None):
        h, c = super().forward(input, hx)
        return 2 * h, c


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 2, 3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@backends
def test_trace(backend, x) -> None:
    for layer, example in (
        (LSTM(3, 4, 2, backend=backend), x),
        (LSTMCell(3, 4, backend=backend), x[0]),
    ):
        traced = torch.jit.trace(layer, example)
        torch.testing.assert_close(traced(-example)[0], layer(-example)[0])
        y = example.clone().requires_grad_()
        (grad,) = torch.autograd.grad(traced(y)[0].sum(), y)
        (expected,) = torch.autograd.grad(layer(y)[0].sum(), y)
        torch.testing.assert_close(grad, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_never_loses_a_hook_a_weight_or_a_forward(x) -> None:
    hooked = Wrapper(LSTM(3, 4))
    hooked.layer.register_forward_hook(lambda *_: None)
    computed = Wrapper(nn.utils.parametrizations.weight_norm(LSTM(3, 4), "weight_hh_l0"))
    for model in (hooked, computed, Wrapper(Doubled(3, 4)), Wrapper(DoubledCell(3, 4))):
        layer, parameters = model.layer, len(list(model.parameters()))
        with pytest.raises((RuntimeError, ValueError)):
            torch.jit.script(model)
        assert model.layer is layer
        assert len(list(model.parameters())) == parameters


@pytest.mark.parametrize("layer", [Doubled(3, 4), DoubledCell(3, 4)], ids=["layer", "cell"])
def test_fx_does_not_apply_a_subclass_twice(layer) -> None:
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(Wrapper(layer))


@pytest.mark.parametrize("layer", [LSTM(3, 4), LSTMCell(3, 4)], ids=["layer", "cell"])
def test_fx_of_the_layer_itself_is_refused(layer) -> None:
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(layer)


def test_a_cell_compiles_and_exports_in_one_graph(x) -> None:
    cell = LSTMCell(3, 4)
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0]), cell(x[0]))
    exported = torch.export.export(cell, (x[0],), strict=True).module()
    torch.testing.assert_close(exported(x[0]), cell(x[0]))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_without_gradients_and_differentiated_later(strict: bool, x) -> None:
    layer = LSTM(3, 4).requires_grad_(False)
    module = torch.export.export(layer, (x,), strict=strict).module()
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(module(y)[0].sum(), y)
    (expected,) = torch.autograd.grad(layer(y)[0].sum(), y)
    torch.testing.assert_close(grad, expected)


def test_backward_runs_on_the_backend_of_the_forward(x) -> None:
    layer = LSTM(3, 4)
    output = torch.func.vmap(lambda v: layer(v)[0])(x[None])
    with fused_lstm.use_backend("aten"):
        output.sum().backward()
    assert layer.weight_hh_l0.grad is not None


def test_deepcopy_goes_through_a_subclass_own_state(x) -> None:
    class Locked(LSTM):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.lock = threading.Lock()

        def __getstate__(self):
            state = super().__getstate__()
            del state["lock"]
            return state

        def __setstate__(self, state) -> None:
            super().__setstate__(state)
            self.lock = threading.Lock()

    layer = Locked(3, 4)
    copied = copy.deepcopy(layer)
    assert copied.lock is not layer.lock
    torch.testing.assert_close(copied(x), layer(x))


def test_float16_autocast_keeps_torchs_operator_where_that_can_train(x) -> None:
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3])
    layer = LSTM(3, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        assert fused_lstm.explain(layer, packed).backend == "aten"
        assert fused_lstm.explain(layer, x).backend == "reference"
        assert layer(packed)[0].data.dtype == layer.to_torch()(packed)[0].data.dtype


def test_results_may_be_written_into() -> None:
    output, _ = LSTM(3, 4, backend="reference")(torch.randn(5, 2, 3))
    with torch.no_grad():
        output.detach().zero_()
    output, _ = LSTM(3, 4, backend="reference")(torch.randn(5, 2, 3))
    output[1] = 0


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_cells_state_that_is_no_pair(backend) -> None:
    with pytest.raises((TypeError, RuntimeError)):
        LSTMCell(3, 4, backend=backend)(torch.randn(2, 3), torch.zeros(2, 2, 4))
