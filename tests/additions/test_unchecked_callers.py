"""What is called with tensors, not by the module: nothing wrong gets to a kernel."""

import pytest
import torch

from fused_lstm import functional
from fused_lstm.modifiers import NO_MODIFIERS

T, B, I, H = 5, 3, 2, 4  # noqa: E741  (the field's name for the input size)

BAD = [
    ("lengths", torch.tensor([2]), ValueError),
    ("lengths", torch.empty(0, dtype=torch.int64), ValueError),
    ("lengths", torch.ones(B), TypeError),
    ("lengths", torch.ones(B, dtype=torch.int32), TypeError),
    ("lengths", torch.tensor([1, 2, T + 1]), ValueError),
    ("lengths", torch.tensor([1, -2, T]), ValueError),
    ("resets", torch.zeros(1, B, dtype=torch.bool), ValueError),
    ("resets", torch.zeros(B, T, dtype=torch.bool), ValueError),
    ("resets", torch.zeros(T, B), TypeError),
    ("resets", torch.zeros(T, B, dtype=torch.uint8), TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_the_functional_form(backend, name, value, error, grad):
    weights = [torch.randn(4 * H, n).requires_grad_(grad) for n in (I, H)]
    states = torch.zeros(1, B, H)
    arguments = (torch.randn(T, B, I), (states, states), weights)
    with pytest.raises(error, match=name):
        functional.lstm(*arguments, bias=False, **{name: value})
    if name == "lengths":
        with pytest.raises(error, match=name):
            functional.lstm(*arguments, bias=False, lengths=value, backend="aten")


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_the_operator(backend, name, value, error):
    modifiers = NO_MODIFIERS._replace(**{name: value})
    tensors = (torch.randn(T, B, 4 * H), torch.randn(4 * H, H), *torch.zeros(2, B, H))
    with pytest.raises(error, match=name):
        torch.ops.fused_lstm.lstm_forward(*tensors, None, None, *modifiers, False, True, True, None)


def test_no_sequence_has_a_step():
    """PyTorch's own layers cannot say it; the zeros depend on the weights all the same."""
    for backend in ("aten", "native", "reference"):
        weights = [torch.randn(4 * H, n, requires_grad=True) for n in (I, H)]
        states = torch.randn(1, B, H)
        lengths = torch.zeros(B, dtype=torch.int64)
        output, h_n, c_n = functional.lstm(
            torch.randn(T, B, I), (states, states), weights, bias=False, lengths=lengths,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(output, torch.zeros(T, B, H))
        assert torch.equal(h_n, states)
        assert torch.equal(c_n, states)
        output.sum().backward()
        assert not weights[1].grad.any()
