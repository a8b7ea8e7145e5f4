"""`lengths`: padded sequences of several lengths, equal to packing without packing."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence

import fused_lstm

from .oracle import (
    CLOSE,
    B,
    H,
    P,
    T,
    assert_results_within_budget,
    assert_same,
    build,
    compare,
    cotangent,
    leaf,
    loss_of,
    make_hx,
    make_x,
    pack,
    run,
    run_oracle,
    values,
)

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = {
    "plain": {},
    "two-layers": {"num_layers": 2, "bias": False, "batch_first": True},
    "bidirectional": {"bidirectional": True},
    "projected": {"proj_size": P},
    "everything": {"num_layers": 3, "bidirectional": True, "proj_size": P, "batch_first": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
LENGTHS = {
    "unsorted": [2, 6, 1, 4],
    "some-zero": [0, 3, 6, 0],
    "all-zero": [0, 0, 0, 0],
    "all-whole": [6, 6, 6, 6],
    "none-whole": [3, 1, 5, 5],
}


def test_the_shapes_are_those_of_the_cases():
    assert all(len(lengths) == B and max(lengths) <= T for lengths in LENGTHS.values())


@options
@pytest.mark.parametrize(
    ("lengths", "with_hx"),
    [*((name, True) for name in LENGTHS), ("all-zero", False), ("some-zero", False)],
)
def test_results_and_gradients(options, lengths, with_hx):
    module, lengths = build(**options), LENGTHS[lengths]
    x = make_x(batch_first=module.batch_first)
    hx = make_hx(module) if with_hx else None
    results = compare(module, x, hx, lengths=torch.tensor(lengths), return_cells=True)
    for name in ("output", "cells", "grad of input"):
        whole = results[name].transpose(0, 1) if module.batch_first else results[name]
        for b, length in enumerate(lengths):
            assert torch.equal(whole[length:, b], torch.zeros_like(whole[length:, b])), name


@options
@pytest.mark.parametrize("lengths", [LENGTHS["unsorted"], LENGTHS["some-zero"]], ids=str)
def test_float32(options, lengths):
    module = build(**options, dtype=torch.float32)
    x = make_x(batch_first=module.batch_first, dtype=torch.float32)
    compare(module, x, make_hx(module, dtype=torch.float32), lengths=torch.tensor(lengths))


@options
def test_equal_to_packing(options):
    """`torch.nn.LSTM` on the packed sequences, padded again, and this layer on them."""
    lengths = [2, 6, 1, 4]
    module = build(**options)
    native = nn.LSTM(module.input_size, H, **options, dtype=torch.float64)
    native.load_state_dict(module.state_dict())
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    actual = run(module, x, hx, lengths=lengths)
    for layer in (native, module):
        data, states = leaf(x), tuple(leaf(state) for state in hx)
        layer.zero_grad(set_to_none=True)
        output, (h_n, c_n) = layer(pack(data, lengths, layer.batch_first), states)
        output, _ = pad_packed_sequence(output, layer.batch_first, total_length=T)
        results = {"output": output, "h_n": h_n, "c_n": c_n}
        loss_of(results).backward()
        results["grad of input"] = data.grad
        results["grad of h0"], results["grad of c0"] = states[0].grad, states[1].grad
        for name, parameter in layer.named_parameters():
            results[f"grad of {name}"] = parameter.grad
        assert_same(actual, results)


@options
def test_all_whole_is_no_lengths_at_all(options):
    module = build(**options)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    assert_same(run(module, x, hx, lengths=[T] * B), run(module, x, hx))


@options
@pytest.mark.parametrize("length", [0, 3, 6])
def test_unbatched(options, length):
    module = build(**options)
    x, hx = make_x(batch=None), make_hx(module, None)
    expected = compare(module, x, hx, lengths=torch.tensor([length]), return_cells=True)
    for form in (length, torch.tensor(length), [length], (length,), torch.tensor(length).int()):
        assert_same(run(module, x, hx, lengths=form, return_cells=True), expected)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
INTEGERS += [torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_dtype(dtype):
    module, x = build(bidirectional=True), make_x()
    hx = make_hx(module)
    expected = run(module, x, hx, lengths=torch.tensor([2, 6, 0, 4]))
    lengths = torch.tensor([2, 6, 0, 4], dtype=dtype)
    assert_same(run(module, x, hx, lengths=lengths), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "lengths",
    [
        [2, 6, 0, 4],
        (2, 6, 0, 4),
        torch.Size([2, 6, 0, 4]),
        torch.tensor([2, 9, 6, 9, 0, 9, 4, 9])[::2],
        torch.tensor([4, 0, 6, 2]).flip(0),
        torch.tensor([[2, 9], [6, 9], [0, 9], [4, 9]])[:, 0],
    ],
    ids=["list", "tuple", "size", "strided", "flipped", "column"],
)
def test_every_form(lengths):
    module, x = build(), make_x()
    expected = run(module, x, lengths=torch.tensor([2, 6, 0, 4]))
    assert_same(run(module, x, lengths=lengths), expected, rtol=0, atol=0)


def test_lengths_are_left_as_they_are_and_may_change_afterwards():
    module, x = build(), leaf(make_x())
    expected = run(module, x, lengths=[2, 6, 0, 4])
    lengths = torch.tensor([2, 6, 0, 4], dtype=torch.int32)
    output, (h_n, c_n) = module(x, lengths=lengths)
    assert lengths.tolist() == [2, 6, 0, 4]
    module.zero_grad()
    loss_of({"output": output, "h_n": h_n, "c_n": c_n}).backward()
    torch.testing.assert_close(x.grad, expected["grad of input"])


@options
def test_a_length_of_zero_returns_the_initial_state(options):
    module = build(**options, dtype=torch.float32)
    x = make_x(batch_first=module.batch_first, dtype=torch.float32)
    h0, c0 = make_hx(module, dtype=torch.float32)
    lengths = [0, 3, 6, 0]
    results = run(module, x, (h0, c0), lengths=lengths)
    for b in (0, 3):
        assert torch.equal(results["h_n"][:, b], h0[:, b])
        assert torch.equal(results["c_n"][:, b], c0[:, b])
        # The derivative of the loss with respect to h_n and c_n themselves.
        for name, seed in (("h", 41), ("c", 42)):
            wanted = cotangent(results[f"{name}_n"], seed)
            assert torch.equal(results[f"grad of {name}0"][:, b], wanted[:, b])


def spoil(tensor, lengths, batch_first, fill):
    """A copy whose padding is `fill`."""
    tensor = tensor.clone()
    leading = tensor.transpose(0, 1) if batch_first else tensor
    for b, length in enumerate(lengths):
        leading[length:, b] = fill
    return tensor


@options
@pytest.mark.parametrize(
    ("fill", "lengths"),
    [
        (math.nan, [2, 6, 1, 4]),
        (math.nan, [0, 0, 0, 0]),
        (math.inf, [0, 3, 6, 0]),
        (-1e300, [0, 3, 6, 0]),
    ],
    ids=str,
)
def test_what_the_padding_holds_reaches_nothing(options, fill, lengths):
    module = build(**options)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    clean = spoil(x, lengths, module.batch_first, 0.0)
    expected = run(module, clean, hx, lengths=lengths, return_cells=True)
    spoilt = spoil(x, lengths, module.batch_first, fill)
    actual = run(module, spoilt, hx, lengths=lengths, return_cells=True)
    assert all(t is None or t.isfinite().all() for t in actual.values())
    assert_same(actual, expected)
    padding = spoil(torch.zeros_like(x), lengths, module.batch_first, 1.0).bool()
    assert not actual["grad of input"][padding].any()
    with torch.no_grad():
        output, (h_n, c_n) = module(spoilt, hx, lengths=lengths)
    for name, got in (("output", output), ("h_n", h_n), ("c_n", c_n)):
        torch.testing.assert_close(got, expected[name], **CLOSE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_not_a_number_in_the_padding_in_other_dtypes(dtype):
    module = build(num_layers=2, bidirectional=True, dtype=dtype)
    x, hx, lengths = make_x(dtype=dtype), make_hx(module, dtype=dtype), [2, 6, 0, 4]
    expected = run(module, spoil(x, lengths, False, 0.0), hx, lengths=lengths, return_cells=True)
    actual = run(module, spoil(x, lengths, False, math.nan), hx, lengths=lengths, return_cells=True)
    assert_same(actual, expected)


@options
@pytest.mark.parametrize("fill", [math.nan, math.inf], ids=str)
def test_the_gradient_of_a_padded_output_reaches_nothing(options, fill):
    lengths = [2, 6, 0, 4]
    module = build(**options)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    gradients = []
    for value in (0.0, fill):
        data, states = leaf(x), tuple(leaf(state) for state in hx)
        output, _, cells = module(data, states, lengths=lengths, return_cells=True)
        cotangents = [
            spoil(values(*t.shape, seed=9, dtype=t.dtype), lengths, module.batch_first, value)
            for t in (output, cells)
        ]
        inputs = (data, *states, *module.parameters())
        gradients.append(torch.autograd.grad((output, cells), inputs, cotangents))
    for clean, spoilt in zip(*gradients, strict=True):
        assert spoilt.isfinite().all()
        torch.testing.assert_close(spoilt, clean, **CLOSE[torch.float64])


def test_second_derivatives_see_nothing_of_the_padding():
    lengths = [2, 6, 0, 4]
    module = build(bidirectional=True)
    x = make_x()
    results = []
    for fill in (0.0, math.nan):
        data = leaf(spoil(x, lengths, False, fill))
        output, _ = module(data, lengths=lengths)
        inputs = (data, *module.parameters())
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for clean, spoilt in zip(*results, strict=True):
        assert clean.any()
        torch.testing.assert_close(spoilt, clean, **CLOSE[torch.float64])


@pytest.mark.parametrize("used", ["output", "h_n", "c_n", "cells"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
def test_gradient_of_one_result_alone(used, bidirectional):
    module = build(bidirectional=bidirectional, proj_size=P)
    x, hx = make_x(), make_hx(module)
    arguments = {"lengths": [2, 6, 0, 4], "return_cells": True, "loss_on": (used,)}
    compare(module, x, hx, **arguments)


def test_a_long_sequence():
    """Far more steps than any kernel unrolls, most of them past the end of most sequences."""
    steps, lengths = 203, [0, 203, 1, 64, 65, 130, 202]
    for dtype in (torch.float64, torch.float32):
        module = build(bidirectional=True, dtype=dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)
        x = make_x(steps=steps, batch=len(lengths), dtype=dtype)
        hx = make_hx(module, len(lengths), dtype=dtype)
        tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {}
        expected = run_oracle(module, x, hx, lengths=lengths)
        assert_same(run(module, x, hx, lengths=lengths), expected, **tolerance)


@pytest.mark.parametrize("hidden", [1, 8, 16, 17, 40])
def test_sizes_around_the_width_of_a_vector(hidden):
    batch = 19
    lengths = [(5 * b) % (T + 1) for b in range(batch)]
    module = build(11, hidden, num_layers=2, bidirectional=True, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.div_(hidden**0.5)
    x = make_x(batch=batch, size=11, dtype=torch.float32)
    hx = make_hx(module, batch, dtype=torch.float32)
    compare(module, x, hx, lengths=lengths, return_cells=True)


def test_inputs_in_other_memory_layouts():
    module = build(num_layers=2)
    x, hx = make_x(), make_hx(module)
    expected = run(module, x, hx, lengths=[2, 6, 0, 4])
    wide = torch.stack([x, -x], -1)
    assert not wide[..., 0].is_contiguous()
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (wide[..., 0], transposed, x.flip(0).flip(0)):
        data = other.detach()
        data.requires_grad_()
        output, (h_n, c_n) = module(data, hx, lengths=[2, 6, 0, 4])
        results = {"output": output, "h_n": h_n, "c_n": c_n}
        (gradient,) = torch.autograd.grad(loss_of(results), data)
        torch.testing.assert_close(gradient, expected["grad of input"], **CLOSE[x.dtype])
        torch.testing.assert_close(output, expected["output"], **CLOSE[x.dtype])


def test_dropout_between_layers():
    """It drops outputs of every layer but the last; with a probability of one, all of them."""
    lengths = [2, 6, 0, 4]
    module = build(num_layers=3, dropout=0.5)
    x, hx = make_x(), make_hx(module)
    results = run(module, x, hx, seed=3, lengths=lengths)
    assert_same(run(module, x, hx, seed=3, lengths=lengths), results, rtol=0, atol=0)
    assert not torch.equal(results["output"], run(module, x, hx, seed=4, lengths=lengths)["output"])
    assert not results["output"][2:, 0].any()
    module.dropout = 1.0
    actual = run(module, x, hx, lengths=lengths)
    with torch.no_grad():
        module.weight_ih_l1.zero_()
        module.weight_ih_l2.zero_()
    expected = run_oracle(module, x, hx, lengths=lengths)
    for name in ("output", "h_n", "c_n", "grad of weight_hh_l2", "grad of h0", "grad of input"):
        torch.testing.assert_close(actual[name], expected[name], **CLOSE[x.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    module = build(num_layers=2, bidirectional=True, dtype=dtype)
    x, hx = make_x(dtype=dtype), make_hx(module, dtype=dtype)
    arguments = {"lengths": [2, 6, 0, 4], "return_cells": True}
    native = run_oracle(module, x, hx, dtype=dtype, **arguments)
    actual = run(module, x, hx, **arguments)
    assert_results_within_budget(actual, native, run_oracle(module, x, hx, **arguments))


@options
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_pytorchs_own_layers_too(options, lengths):
    """Asked for by name, they run what they can of it: nothing in the padding reaches anything."""
    module = build(**options)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    expected = run_oracle(module, x, hx, lengths=lengths)
    with fused_lstm.use_backend("aten"):
        actual = run(module, spoil(x, lengths, module.batch_first, math.nan), hx, lengths=lengths)
    assert_same(actual, expected)
