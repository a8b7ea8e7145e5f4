"""Constructor checks: the same errors and warnings as torch, in the same order."""

import decimal
import fractions
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fused_lstm

from .helpers import OPTIONS, H, I, P, build_pair, outcome

VALID = {"input_size": 3, "hidden_size": 4, "num_layers": 2}


def outcomes(*args, **kwargs):
    native = outcome(lambda: nn.LSTM(*args, **kwargs))
    ours = outcome(lambda: fused_lstm.LSTM(*args, **kwargs))
    return native, ours


# What each wrong value raises, in torch's order of checks.
WRONG = [
    ({"dropout": "a"}, ValueError),
    ({"dropout": None}, TypeError),
    ({"dropout": [0.5]}, TypeError),
    ({"dropout": 0.5j}, TypeError),
    ({"dropout": "0.5"}, ValueError),
    ({"dropout": -0.1}, ValueError),
    ({"dropout": 1.1}, ValueError),
    ({"dropout": True}, ValueError),
    ({"dropout": False}, ValueError),
    ({"dropout": float("nan")}, ValueError),
    ({"dropout": float("inf")}, ValueError),
    ({"dropout": torch.tensor(0.5)}, ValueError),
    ({"bias": 1}, TypeError),
    ({"bias": None}, TypeError),
    ({"bias": "True"}, TypeError),
    ({"bias": np.bool_(True)}, TypeError),
    ({"batch_first": 0}, TypeError),
    ({"batch_first": None}, TypeError),
    ({"batch_first": torch.tensor(True)}, TypeError),
    ({"input_size": 3.0}, TypeError),
    ({"input_size": "3"}, TypeError),
    ({"input_size": None}, TypeError),
    ({"input_size": np.int64(3)}, TypeError),
    ({"input_size": torch.tensor(3)}, TypeError),
    ({"input_size": 0}, ValueError),
    ({"input_size": -1}, ValueError),
    ({"input_size": False}, ValueError),
    ({"hidden_size": 4.0}, TypeError),
    ({"hidden_size": "4"}, TypeError),
    ({"hidden_size": None}, TypeError),
    ({"hidden_size": np.int64(4)}, TypeError),
    ({"hidden_size": 0}, ValueError),
    ({"hidden_size": -2}, ValueError),
    ({"hidden_size": False}, ValueError),
    ({"num_layers": 0}, ValueError),
    ({"num_layers": -1}, ValueError),
    ({"proj_size": -1}, ValueError),
    ({"proj_size": 4}, ValueError),
    ({"proj_size": 9}, ValueError),
]


@pytest.mark.parametrize(("wrong", "error"), WRONG, ids=lambda value: str(value))
def test_a_wrong_argument_raises_what_torch_raises(wrong, error):
    native, ours = outcomes(**{**VALID, **wrong})
    assert native.error is error
    assert ours == native


# One representative of every check, in the order in which torch makes them.
CHECKS = [
    {"dropout": "a"},
    {"dropout": 2.0},
    {"bias": 1},
    {"batch_first": 1},
    {"input_size": 3.0},
    {"input_size": 0},
    {"hidden_size": 4.0},
    {"hidden_size": 0},
    {"num_layers": 0},
    {"proj_size": -1},
    {"proj_size": 4},
]
PAIRS = [
    (first, second)
    for first, second in itertools.combinations(CHECKS, 2)
    if first.keys() != second.keys()
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_of_two_wrong_arguments_the_same_one_is_reported(first, second):
    native, ours = outcomes(**{**VALID, **first, **second})
    assert native.error is not None
    # A projection is compared with a hidden size that passed its own checks.
    assert native.message == outcomes(**{**VALID, **first})[0].message
    assert ours == native


def test_all_wrong_arguments_are_reported_in_turn():
    arguments = {name: value for check in reversed(CHECKS) for name, value in check.items()}
    for name in ["dropout", "bias", "batch_first", "input_size", "hidden_size", "num_layers"]:
        native, ours = outcomes(**arguments)
        assert native.error is not None
        assert ours == native
        arguments[name] = VALID.get(name, {"dropout": 0.0}.get(name, False))
    native, ours = outcomes(**arguments)
    assert native.error is ValueError
    assert ours == native


@pytest.mark.parametrize(
    "wrong",
    [{"num_layers": "2"}, {"num_layers": None}, {"num_layers": 1.5}, {"proj_size": None}],
    ids=str,
)
def test_sizes_of_a_wrong_type_raise_a_type_error(wrong):
    native, ours = outcomes(**{**VALID, **wrong})
    assert native.error is TypeError
    assert ours.error is TypeError


@pytest.mark.parametrize("p", [0.5, 1, 1.0, 1e-9])
def test_dropout_with_one_layer_warns(p):
    native, ours = outcomes(3, 4, dropout=p)
    assert native.error is None
    assert [category for category, _ in native.warnings] == [UserWarning]
    assert ours == native


@pytest.mark.parametrize(
    "later", [{"bias": 1}, {"input_size": 0}, {"hidden_size": 2.5}, {"proj_size": 7}], ids=str
)
def test_the_dropout_warning_comes_before_later_errors(later):
    native, ours = outcomes(**{**VALID, "num_layers": 1, "dropout": 0.5, **later})
    assert native.error is not None
    assert len(native.warnings) == 1
    assert ours == native


@pytest.mark.parametrize("p", ["a", 2.0, True])
def test_a_wrong_dropout_raises_without_a_warning(p):
    native, ours = outcomes(3, 4, dropout=p)
    assert native.error is not None
    assert native.warnings == ()
    assert ours == native


@pytest.mark.parametrize("kwargs", [{}, {"dropout": 0}, {"num_layers": 2, "dropout": 0.5}], ids=str)
def test_no_warning_without_reason(kwargs):
    native, ours = outcomes(3, 4, **kwargs)
    assert native.error is None
    assert native.warnings == ()
    assert ours == native


@pytest.mark.parametrize(
    "p",
    [
        0,
        1,
        0.25,
        -0.0,
        fractions.Fraction(1, 4),
        decimal.Decimal("0.25"),
        np.float32(0.25),
        np.float64(0.25),
        np.int64(1),
    ],
    ids=repr,
)
def test_every_kind_of_number_is_a_dropout(p):
    native, ours = build_pair(3, 4, 2, dropout=p)
    assert type(ours.dropout) is float
    assert ours.dropout == native.dropout == float(p)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_size": True},
        {"hidden_size": True},
        {"num_layers": True},
        {"proj_size": False},
        {"bidirectional": 1},
        {"bidirectional": 0},
        {"bidirectional": "yes"},
        {"bidirectional": None},
        {"dtype": torch.float64},
        {"device": "cpu"},
        {"device": torch.device("meta")},
        {"device": "meta", "dtype": torch.float16},
    ],
    ids=str,
)
def test_accepted_values_make_the_same_layer(arguments):
    native = nn.LSTM(**{**VALID, **arguments})
    ours = fused_lstm.LSTM(**{**VALID, **arguments})
    expected = [(name, p.shape, p.dtype, p.device) for name, p in native.named_parameters()]
    assert [(n, p.shape, p.dtype, p.device) for n, p in ours.named_parameters()] == expected
    assert repr(ours) == repr(native)


def test_all_arguments_can_be_positional():
    arguments = (I, H, 2, False, True, 0.25, True, P, "cpu", torch.float64)
    native, ours = build_pair(*arguments)
    for name in ["num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"]:
        assert getattr(ours, name) == getattr(native, name)
    assert ours.weight_ih_l0.dtype == torch.float64
    assert repr(ours) == repr(native)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((3,), {}),
        ((3, 4), {"hidden_size": 4}),
        ((3, 4), {"nonlinearity": "tanh"}),
        ((3, 4, 1, True, False, 0.0, False, 0, None, None, None), {}),
    ],
    ids=["nothing", "one-size", "twice", "unknown", "too-many"],
)
def test_a_wrong_call_is_a_type_error(args, kwargs):
    native, ours = outcomes(*args, **kwargs)
    assert native.error is TypeError
    assert ours.error is TypeError


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "float32"], ids=str)
def test_a_dtype_without_gradients_is_an_error(dtype):
    native, ours = outcomes(3, 4, dtype=dtype)
    assert native.error is not None
    assert ours.error is native.error


@pytest.mark.parametrize("wrong", [{"bias": 1}, {"proj_size": 4}, {"dropout": 2.0}], ids=str)
def test_a_refused_call_consumes_no_random_numbers(wrong):
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)):
        fused_lstm.LSTM(**{**VALID, **wrong})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_a_torch_lstm(options):
    ours = fused_lstm.LSTM(I, H, **options)
    assert isinstance(ours, nn.LSTM)
    assert isinstance(ours, nn.RNNBase)
    assert ours.training
    assert issubclass(fused_lstm.LSTM, nn.LSTM)


def test_the_default_dtype_and_device_are_followed():
    torch.set_default_dtype(torch.float64)
    try:
        assert fused_lstm.LSTM(3, 4).weight_hh_l0.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert fused_lstm.LSTM(3, 4).weight_hh_l0.is_meta


def test_a_subclass_with_its_own_arguments():
    class Encoder(fused_lstm.LSTM):
        def __init__(self, size, *args, scale=1.0, **kwargs):
            super().__init__(size, size, *args, **kwargs)
            self.scale = scale

        def forward(self, input, hx=None):
            output, states = super().forward(input, hx)
            return output * self.scale, states

    torch.manual_seed(0)
    encoder = Encoder(4, 2, scale=3.0, bidirectional=True)
    native, _ = build_pair(4, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(encoder(x)[0], native(x)[0] * 3.0)
