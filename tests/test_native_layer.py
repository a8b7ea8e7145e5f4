"""The native CPU kernels behind the public API: derivatives, transforms, errors, nothing stale."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from fused_lstm.kernels import cpu as kernels
from fused_lstm.kernels.cpu import LibraryUnavailableError, load
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fused_lstm
from fused_lstm import functional

from .budget import assert_within_budget

try:
    load()
except LibraryUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

T, B, I, H, P = 5, 3, 4, 6, 2  # noqa: E741  (the field's name for the input size)

OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "two-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "batch-first": {"batch_first": True},
    "projected": {"proj_size": P},
    "everything": {"num_layers": 2, "bidirectional": True, "proj_size": P, "batch_first": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
backends = pytest.mark.parametrize("backend", [None, "native"], ids=["default", "native"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_layer(dtype=torch.float64, backend="native", size=(I, H), **options):
    return fused_lstm.LSTM(*size, dtype=dtype, backend=backend, **options)


def twin(layer):
    """torch.nn.LSTM with the same weights, as another module's own."""
    return copy.deepcopy(layer).to_torch()


def make_input(layer, packed=False, batch=B, steps=T):
    dtype = next(layer.parameters()).dtype
    x = torch.randn(steps, batch, layer.input_size, dtype=dtype)
    if packed:
        return pack_padded_sequence(x, [steps, steps - 1, 1][:batch])
    return x.transpose(0, 1).contiguous() if layer.batch_first else x


def make_states(layer, batch=B):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = next(layer.parameters()).dtype
    return (
        torch.randn(rows, batch, layer.proj_size or layer.hidden_size, dtype=dtype),
        torch.randn(rows, batch, layer.hidden_size, dtype=dtype),
    )


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


def as_function(layer, x):
    """The layer as a function of its input, states and weights, and these."""
    names = [name for name, _ in layer.named_parameters()]
    data = data_of(x)

    def run(data, h_0, c_0, *weights):
        value = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
        weights = dict(zip(names, weights, strict=True))
        output, (h_n, c_n) = torch.func.functional_call(layer, weights, (value, (h_0, c_0)))
        return data_of(output), h_n, c_n

    batch = int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else B
    leaves = [data, *make_states(layer, batch), *layer.parameters()]
    return run, [leaf.detach().clone().requires_grad_() for leaf in leaves]


def losses(outputs):
    return sum((out.sin() * (k + 1)).sum() for k, out in enumerate(outputs))


def assert_same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)


def script(code, timeout=200, **environment):
    """Standard output of a script in another process, which may crash."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout


# Which kernel


def test_the_default_on_a_cpu_is_native():
    for dtype in (torch.float32, torch.float64):
        layer = make_layer(dtype, backend=None)
        for x in (make_input(layer), make_input(layer, packed=True)):
            explanation = fused_lstm.explain(layer, x)
            assert explanation.backend == "native"
            assert "native kernels for" in explanation.reasons["native"]
            assert explanation.problem.packed == isinstance(x, PackedSequence)
        cell = fused_lstm.LSTMCell(I, H, dtype=dtype)
        assert fused_lstm.explain(cell).backend == "native"
    half = make_layer(torch.float16, backend=None)
    explanation = fused_lstm.explain(half, make_input(half))
    assert explanation.backend == "aten"
    assert explanation.reasons["native"] == (
        "cannot run it: torch.float16 is not one of float32, float64, bfloat16"
    )
    named = fused_lstm.LSTM(I, H, dtype=torch.float16, backend="native")
    with pytest.raises(fused_lstm.BackendUnavailableError, match="float16 is not one of"):
        named(make_input(named))


@backends
def test_the_kernels_run_and_not_torchs_operator(backend, monkeypatch):
    """PyTorch's operator and the composed layer are out of order."""

    def broken(*args, **kwargs):
        raise AssertionError("another route")

    monkeypatch.setattr(torch._VF, "lstm", broken)
    monkeypatch.setattr(torch._VF, "lstm_cell", broken)
    monkeypatch.setattr(functional, "composed_layer", broken)
    monkeypatch.setattr("fused_lstm.layer.composed_layer", broken)
    for each in OPTIONS.values():
        layer = make_layer(torch.float32, backend, **each)
        for packed in (False, True):
            data_of(layer(make_input(layer, packed))[0]).sum().backward()
    cell = fused_lstm.LSTMCell(I, H, backend=backend)
    cell(torch.randn(B, I))[0].sum().backward()
    cell(torch.randn(I))[0].sum().backward()


@backends
@options
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_values_and_gradients_are_torchs(backend, options, packed, dtype):
    layer = make_layer(dtype, backend, size=(5, 17), **options)
    run, leaves = as_function(layer, make_input(layer, packed))
    theirs, _ = as_function(twin(layer), make_input(layer, packed))
    results = []
    for function in (run, theirs):
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad(losses(outputs), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype == dtype
        assert_same(actual, expected)


# bfloat16


@pytest.fixture
def computed_in(monkeypatch):
    """The dtypes that layers are computed in, as they are called."""
    seen, run, run_plain = [], kernels.layer_forward, kernels.PlainLayers.forward

    def layer_forward(x, *rest):
        seen.append(x.dtype)
        return run(x, *rest)

    def plain(self, *arguments):
        results = run_plain(self, *arguments)
        seen.append(results[1].dtype)
        return results

    monkeypatch.setattr(kernels, "layer_forward", layer_forward)
    monkeypatch.setattr(kernels.PlainLayers, "forward", plain)
    return seen


# What the kernels have not in bfloat16: options of the layer and of its call.
WIDE = {
    "projected": ({"proj_size": P}, {}),
    "zoneout": ({"zoneout": 0.3}, {}),
    "recurrent-dropout": ({"recurrent_dropout": 0.3}, {}),
    "cells": ({}, {"return_cells": True}),
}


@pytest.mark.parametrize(("options", "call"), WIDE.values(), ids=WIDE)
def test_bfloat16_is_widened_where_the_kernels_have_only_that(options, call, computed_in):
    layer = make_layer(torch.bfloat16, **options)
    wide = copy.deepcopy(layer).float()
    x, hx = make_input(layer), make_states(layer)
    results = []
    with torch.no_grad():
        for each in (layer, wide):
            torch.manual_seed(1)
            inputs = [t.to(each.weight_hh_l0.dtype) for t in (x, *hx)]
            output, states, *cells = each(inputs[0], tuple(inputs[1:]), **call)
            results.append([output, *states, *cells])
    assert set(computed_in) == {torch.float32}
    for actual, expected in zip(*results, strict=True):
        if "recurrent_dropout" not in options:
            assert torch.equal(actual, expected.bfloat16())


@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_is_widened_where_gradients_are_needed(frozen, computed_in):
    layer = make_layer(torch.bfloat16)
    wide = copy.deepcopy(layer).float()
    layer.requires_grad_(not frozen)
    x = make_input(layer).requires_grad_(frozen)
    outputs = [layer(x)[0], wide(x.float())[0]]
    assert set(computed_in) == {torch.float32}
    assert torch.equal(outputs[0], outputs[1].bfloat16())
    inputs = [x] if frozen else list(layer.parameters())
    others = [x] if frozen else list(wide.parameters())
    gradient = torch.randn_like(outputs[0])
    pairs = zip(
        torch.autograd.grad(outputs[0], inputs, gradient),
        torch.autograd.grad(outputs[1], others, gradient.float()),
        strict=True,
    )
    assert all(torch.equal(a, b.bfloat16()) for a, b in pairs)
    # A frozen layer needs none, whatever the mode.
    layer.requires_grad_(False)
    computed_in.clear()
    layer(x.detach())
    assert computed_in == [kernels_dtype()]


def kernels_dtype():
    """What the kernels compute layers in that are given in bfloat16."""
    return torch.bfloat16 if kernels.multiplies_bfloat16() else torch.float32


@backends
@options
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_inference_in_bfloat16(backend, options, packed):
    torch.manual_seed(2)
    layer = make_layer(torch.bfloat16, backend, size=(5, 17), **options)
    theirs, exact = twin(layer), twin(layer).double()
    x = make_input(layer, packed)
    hx = make_states(layer, B)
    wide = x._replace(data=x.data.double()) if packed else x.double()
    with torch.no_grad():
        outputs = [f(x, hx) for f in (layer, theirs)]
        outputs.append(exact(wide, tuple(t.double() for t in hx)))
    names = ("output", "h_n", "c_n")
    results = [(data_of(output), *states) for output, states in outputs]
    for name, *three in zip(names, *results, strict=True):
        assert_within_budget(*three, name)


def test_modified_inference_in_bfloat16(computed_in):
    """Lengths, resets and a clip: as far from float64 as without them, in torch."""
    layer = make_layer(torch.bfloat16, size=(5, 17), cell_clip=0.4)
    theirs = nn.LSTM(5, 17, dtype=torch.bfloat16)
    theirs.load_state_dict(layer.state_dict())
    x, hx = make_input(layer), make_states(layer)
    exact = copy.deepcopy(layer).double()
    more = {"lengths": torch.tensor([5, 0, 2]), "resets": torch.rand(T, B) < 0.4}
    with torch.no_grad():
        outputs = [layer(x, hx, **more), exact(x.double(), tuple(t.double() for t in hx), **more)]
        error = theirs(x, hx)[0] - theirs.double()(x.double(), tuple(t.double() for t in hx))[0]
    assert computed_in[0] == kernels_dtype()
    (output, states), (expected, _) = outputs
    assert_within_budget(output, expected + error, expected)
    assert not output[:, 1].any()
    assert torch.equal(states[0][:, 1], hx[0][:, 1])


def test_cells_in_bfloat16(computed_in):
    cell = fused_lstm.LSTMCell(5, 17, dtype=torch.bfloat16, backend="native")
    theirs = nn.LSTMCell(5, 17, dtype=torch.bfloat16)
    theirs.load_state_dict(cell.state_dict())
    exact = copy.deepcopy(theirs).double()
    x, h, c = (torch.randn(3, n, dtype=torch.bfloat16) for n in (5, 17, 17))
    with torch.no_grad():
        results = [f(x, (h, c)) for f in (cell, theirs)]
        results.append(exact(x.double(), (h.double(), c.double())))
    assert computed_in == [kernels_dtype()]
    for three in zip(*results, strict=True):
        assert_within_budget(*three)


# Derivatives


@options
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_numerical_derivatives(options, packed):
    layer = make_layer(size=(3, 3), **options)
    layer.backend = None if packed else "native"
    run, leaves = as_function(layer, make_input(layer, packed, steps=3))
    assert gradcheck(run, leaves, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


def test_numerical_derivatives_of_every_element():
    layer = make_layer(size=(2, 2), bidirectional=True)
    run, leaves = as_function(layer, make_input(layer, steps=2))
    assert gradcheck(run, leaves, check_batched_grad=True)
    assert gradgradcheck(run, leaves, check_batched_grad=True)


@pytest.mark.parametrize("bias", [False, True])
def test_numerical_derivatives_of_a_cell(bias):
    cell = fused_lstm.LSTMCell(3, 4, bias=bias, dtype=torch.float64, backend="native")
    names = [name for name, _ in cell.named_parameters()]

    def run(x, h, c, *weights):
        return torch.func.functional_call(cell, dict(zip(names, weights, strict=True)), (x, (h, c)))

    shapes = ((B, 3), (B, 4), (B, 4))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    leaves += [p.detach().clone().requires_grad_() for p in cell.parameters()]
    assert gradcheck(run, leaves, check_batched_grad=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


def test_the_second_derivative_where_a_state_was_computed_from_the_input():
    """Nothing is counted twice, and nothing is forgotten."""
    layer = make_layer(num_layers=1)
    plain = make_layer(backend="reference")
    plain.load_state_dict(layer.state_dict())
    mix = torch.randn(I, H, dtype=torch.float64)
    x = make_input(layer)
    results = []
    for each in (layer, plain):
        leaf = x.clone().requires_grad_()
        h_0 = (leaf[0] @ mix).tanh().unsqueeze(0)
        output, (_, c_n) = each(leaf, (h_0, h_0 * 2))
        (grad,) = torch.autograd.grad(output.square().sum() + c_n.sum(), leaf, create_graph=True)
        weights = list(each.parameters())
        results.append([grad, *torch.autograd.grad(grad.square().sum(), [leaf, *weights])])
    assert_same(results[0], results[1])
    # The output of a layer as the state of the next one, and a state given twice.
    results = []
    for each in (layer, plain):
        leaf = x.clone().requires_grad_()
        _, (h_1, c_1) = each(leaf)
        output, _ = each(leaf * 2, (h_1, h_1))
        (grad,) = torch.autograd.grad((output.sum() * c_1).sum(), leaf, create_graph=True)
        weights = list(each.parameters())
        results.append([grad, *torch.autograd.grad(grad.square().sum(), [leaf, *weights])])
    assert_same(results[0], results[1])


def test_third_derivative():
    results = []
    for backend in ("native", "reference"):
        torch.manual_seed(1)
        layer = make_layer(backend=backend)
        x = make_input(layer).requires_grad_()
        value = layer(x)[0].square().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.square().sum()
        results.append(value)
    assert_same(results[0], results[1])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_batched_gradients(packed):
    layer = make_layer(num_layers=2)
    run, leaves = as_function(layer, make_input(layer, packed))
    outputs = run(*leaves)
    vectors = [torch.randn(4, *out.shape, dtype=torch.float64) for out in outputs]
    batched = torch.autograd.grad(
        outputs, leaves, vectors, is_grads_batched=True, retain_graph=True
    )
    for k in range(4):
        one = torch.autograd.grad(outputs, leaves, [v[k] for v in vectors], retain_graph=True)
        assert_same([b[k] for b in batched], list(one))


def test_backward_twice():
    layer = make_layer()
    x = make_input(layer).requires_grad_()
    loss = losses(layer(x)[1])
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in (x, *layer.parameters())]
    loss.backward(retain_graph=True)
    for t, grad in zip((x, *layer.parameters()), first, strict=True):
        assert_same(t.grad, 2 * grad)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"])
def test_frozen_weights(frozen):
    layer = make_layer(num_layers=2, bidirectional=True, proj_size=P)
    theirs = twin(layer)
    x = make_input(layer)
    for each in (layer, theirs):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        losses(each(x)[1]).backward()
    for (name, ours), expected in zip(layer.named_parameters(), theirs.parameters(), strict=True):
        if name.startswith(frozen):
            assert ours.grad is None
        else:
            assert_same(ours.grad, expected.grad)


@pytest.mark.parametrize("only", range(3), ids=["input", "h_0", "c_0"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_only_one_of_the_inputs_requires_a_gradient(only, create_graph):
    layer = make_layer(bidirectional=True).requires_grad_(False)
    run, leaves = as_function(layer, make_input(layer))
    theirs, _ = as_function(twin(layer), make_input(layer))
    leaves = [t.detach() for t in leaves]
    leaves[only].requires_grad_()
    ours, expected = (
        torch.autograd.grad(losses(f(*leaves)), leaves[only], create_graph=create_graph)
        for f in (run, theirs)
    )
    assert_same(ours, expected)
    for other in leaves[:only] + leaves[only + 1 :]:
        assert other.grad is None


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_through_some_of_the_results(used, packed):
    layer = make_layer(num_layers=2, bidirectional=True, proj_size=P)
    run, leaves = as_function(layer, make_input(layer, packed))
    theirs, _ = as_function(twin(layer), make_input(layer, packed))
    ours, expected = (
        torch.autograd.grad(
            losses([f(*leaves)[k] for k in used]), leaves, allow_unused=True, materialize_grads=True
        )
        for f in (run, theirs)
    )
    assert_same(ours, expected)


def test_gradients_of_expanded_and_sliced_results():
    layer = make_layer(torch.float32, size=(I, 20), num_layers=2, batch_first=True)
    theirs = twin(layer)
    x = make_input(layer)
    for loss in (
        lambda y, s: y.sum(),
        lambda y, s: y[:, -1].sum(),
        lambda y, s: y[:, :, ::2].sum() + s[1].mean(),
        lambda y, s: y.transpose(0, 1)[1:3].prod(),
        lambda y, s: s[0][0].sum(),
    ):
        ours, expected = (
            torch.autograd.grad(
                loss(*each(x)), list(each.parameters()), allow_unused=True, materialize_grads=True
            )
            for each in (layer, theirs)
        )
        assert_same(ours, expected, rtol=1e-4, atol=1e-6)


# Nothing stale


@backends
def test_changed_weights_are_seen(backend, tmp_path):
    layer = make_layer(torch.float32, backend)
    x = make_input(layer)
    with torch.no_grad():

        def check():
            assert_same(layer(x)[0], twin(layer)(x)[0])
            return layer(x)[0].clone()

        before = [check()]

        def changed():
            before.append(check())
            assert not torch.equal(before[-1], before[-2])

        layer.weight_hh_l0.data[3] += 0.5
        changed()
        layer.weight_ih_l0.copy_(torch.randn(4 * H, I))
        changed()
        layer.bias_hh_l0.data = torch.randn(4 * H)
        changed()
        layer.weight_hh_l0.numpy()[:] *= 0.5
        changed()
        layer.weight_ih_l0 = nn.Parameter(torch.randn(I, 4 * H).t())
        changed()
        layer.share_memory()
        layer.weight_ih_l0.untyped_storage()[:] = 62
        changed()
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    layer(x)[0].sum().backward()
    optimizer.step()
    assert_same(layer(x)[0], twin(layer)(x)[0])
    path = tmp_path / "layer.pickle"
    path.write_bytes(pickle.dumps(layer.double()))
    assert_same(pickle.loads(path.read_bytes())(x.double())[0], layer(x.double())[0])


def test_weights_that_another_process_changes_are_seen():
    out = script(
        """
import torch, fused_lstm
from torch import multiprocessing

def change(layer):
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
        layer.bias_ih_l0.add_(1)

if __name__ == "__main__":
    layer = fused_lstm.LSTM(3, 8, backend="native").share_memory()
    x = torch.randn(4, 2, 3)
    before = layer(x)[0].detach()
    process = multiprocessing.get_context("fork").Process(target=change, args=(layer,))
    process.start()
    process.join()
    after = layer(x)[0].detach()
    print(torch.equal(before, after), torch.allclose(after, layer.to_torch()(x)[0], atol=1e-6))
"""
    )
    assert out.split() == ["False", "True"]


# Modes and transforms


def test_without_gradients():
    layer = make_layer(torch.float32)
    x = make_input(layer)
    expected = layer(x)
    with torch.no_grad():
        output, states = layer(x)
    assert not output.requires_grad
    assert_same((output, states), expected)
    with torch.inference_mode():
        output, states = layer(x)
        assert output.is_inference()
        assert_same(output.clone(), expected[0].detach())
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        layer(output[..., :I])[0].sum().backward()
    assert not layer.requires_grad_(False)(x)[0].requires_grad


def test_saved_tensor_hooks_and_checkpoints():
    layer = make_layer(num_layers=2)
    x = make_input(layer).requires_grad_()
    weights = [x, *layer.parameters()]
    expected = torch.autograd.grad(losses(layer(x)[1]), weights)
    seen = []

    def pack(tensor):
        seen.append(tensor.shape)
        return tensor.clone().numpy(force=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        loss = losses(layer(x)[1])
    assert_same(torch.autograd.grad(loss, weights), expected)
    assert seen
    for reentrant in (False, True):
        layer.zero_grad()
        x.grad = None
        loss = losses(checkpoint(lambda x: layer(x)[1], x, use_reentrant=reentrant))
        loss.backward()
        assert_same([t.grad for t in weights], list(expected))
    with torch.autograd.graph.save_on_cpu():
        loss = losses(layer(x)[1])
    assert_same(torch.autograd.grad(loss, weights), expected)


# How layers come to a kernel: for each way a layer, and what a call of it is given.
WAYS = {
    "plain": lambda: (make_layer(), {}),
    "stacked": lambda: (make_layer(num_layers=2, bidirectional=True), {}),
    "modified": lambda: (make_layer(), {"resets": torch.rand(T, B) < 0.3}),
    "normalized": lambda: (
        fused_lstm.LayerNormLSTM(I, H, dtype=torch.float64, backend="native"),
        {},
    ),
    "cell": lambda: (fused_lstm.LSTMCell(I, H, dtype=torch.float64, backend="native"), {}),
}
WEIGHTS = ("weight_ih", "weight_hh")


def call(layer, options, x):
    """The output, of a cell h_1."""
    return layer(x[0])[0] if isinstance(layer, fused_lstm.LSTMCell) else layer(x, **options)[0]


@pytest.mark.parametrize(
    ("way", "weight"),
    # PyTorch's operator projects the input of the normalized layer, and keeps the old memory.
    [(name, w) for name in WAYS for w in WEIGHTS if (name, w) != ("normalized", "weight_ih")],
)
def test_memory_replaced_before_the_backward_pass(way, weight):
    """A weight that has become smaller is not read beyond its end; one as large is read anew."""
    layer, options = WAYS[way]()
    x = torch.randn(T, B, I, dtype=torch.float64)
    name = weight if isinstance(layer, fused_lstm.LSTMCell) else f"{weight}_l0"
    parameter = getattr(layer, name)
    output, own = call(layer, options, x), parameter.data
    parameter.data = torch.ones(4, 1, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError)):
        output.sum().backward()
    parameter.data = own
    layer.zero_grad()
    call(layer, options, x).sum().backward()
    expected = parameter.grad.clone()
    layer.zero_grad()
    output = call(layer, options, x)
    parameter.data = parameter.data.clone()
    output.sum().backward()
    assert torch.equal(parameter.grad, expected)


# Not the normalized layer: PyTorch's layer_norm takes what it saved for contiguous, unseen.
@pytest.mark.parametrize("way", [name for name in WAYS if name != "normalized"])
def test_hooks_that_bring_back_other_memory(way):
    layer, options = WAYS[way]()
    x = torch.randn(T, B, I, dtype=torch.float64)
    call(layer, options, x).sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0]
    ):
        output = call(layer, options, x)
    output.sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        assert_same(parameter.grad, gradient)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.flatten()[:1]):
        output = call(layer, options, x)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        output.sum().backward()


@pytest.mark.parametrize("dense", [False, True], ids=["strided", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_results_of_a_cell_may_be_changed_in_place(dtype, dense):
    """As torch's: a state is masked in place where an episode ends."""
    cell = fused_lstm.LSTMCell(I, H, dtype=dtype)
    if not dense:
        cell.weight_hh.data = cell.weight_hh.data.t().contiguous().t()
    x, hx = torch.randn(B, I, dtype=dtype), torch.randn(2, B, H, dtype=dtype)
    results = []
    for each in (cell, cell.to_torch()):
        each.zero_grad()
        h, c = each(x, tuple(hx))
        h.mul_(0.5)
        c.mul_(2)
        h, c = each(x, (h, c))
        (h.mul_(3).sum() + c.exp_().sum()).backward()
        results.append([p.grad.clone() for p in each.parameters()])
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
    assert_same(*results, **tolerance)


# Tensors whose memory does not hold their numbers, or is gone


@pytest.mark.parametrize("way", WAYS)
def test_zeros_without_memory(way):
    """As `torch._efficientzerotensor` makes them, for derivatives that are zero."""
    layer, options = WAYS[way]()
    zeros = torch._efficientzerotensor((T, B, I), dtype=torch.float64)
    expected = call(layer, options, torch.zeros(T, B, I, dtype=torch.float64))
    assert_same(call(layer, options, zeros), expected)
    output = call(layer, options, torch.randn(T, B, I, dtype=torch.float64))
    gradient = torch._efficientzerotensor(output.shape, dtype=torch.float64)
    weights = list(layer.parameters())
    for each in torch.autograd.grad(output, weights, gradient, allow_unused=True):
        assert each is None or not each.any()


@pytest.mark.filterwarnings("ignore::fused_lstm.KernelFallbackWarning")
@pytest.mark.parametrize("way", WAYS)
def test_memory_that_is_gone(way):
    layer, options = WAYS[way]()
    x = torch.randn(T, B, I, dtype=torch.float64)
    output = call(layer, options, x)
    weight = next(p for name, p in layer.named_parameters() if name.startswith("weight_hh"))
    weight.data.untyped_storage().resize_(0)
    for run in (lambda: output.sum().backward(), lambda: call(layer, options, x)):
        with pytest.raises(RuntimeError):
            run()
    layer, options = WAYS[way]()
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        call(layer, options, x)


@pytest.mark.parametrize("way", [name for name in WAYS if name != "normalized"])
def test_hooks_that_bring_back_lazy_negations_and_fakes(way):
    layer, options = WAYS[way]()
    x = torch.randn(T, B, I, dtype=torch.float64)
    weights = list(layer.parameters())
    expected = torch.autograd.grad(call(layer, options, x).sum(), weights)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.neg() if t.is_floating_point() else t,
        lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    ):
        output = call(layer, options, x)
    assert_same(torch.autograd.grad(output.sum(), weights), expected)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, mode.from_tensor):
        output = call(layer, options, x)
    # What comes of it is PyTorch's affair; it must not be read.
    with contextlib.suppress(Exception):
        output.sum().backward()


# What modules are told, and what is remembered of it


def test_attributes_that_are_not_what_they_should_be():
    """Nothing of a call that fails is remembered for the next."""
    x = torch.zeros(7, 2, 3)
    for name, value in (
        ("hidden_size", 4.0),
        ("hidden_size", None),
        ("hidden_size", [4]),
        ("backend", ["native"]),
        ("bias", False),
        ("num_layers", 2),
        ("bidirectional", True),
    ):
        layer = fused_lstm.LSTM(3, 4)
        setattr(layer, name, value)
        with pytest.raises((TypeError, RuntimeError, ValueError, IndexError)):
            layer(x)
        good = fused_lstm.LSTM(3, 4)
        assert_same(good(x)[0], twin(good)(x)[0])
    layer = fused_lstm.LSTM(3, 4, bias=False)
    layer.bias = True
    with pytest.raises(RuntimeError, match="weights"):
        layer(x)


def test_saved_tensor_changed_in_place_is_noticed():
    layer = make_layer()
    x = make_input(layer)
    for change in (
        lambda out: layer.weight_hh_l0.data.add_(0) is None,
        lambda out: layer.weight_ih_l0.add_(1),
        lambda out: x.add_(1),
        lambda out: out.mul_(2),
    ):
        output, _ = layer(x)
        loss = output.sin().sum()
        with torch.no_grad():
            noticed = change(output) is not False
        if noticed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


def test_func_transforms():
    layer = make_layer(bidirectional=True)
    plain = make_layer(backend="reference", bidirectional=True)
    plain.load_state_dict(layer.state_dict())
    layer.backend = None
    x = make_input(layer)
    stacked = torch.stack([x, -x, 2 * x])
    assert_same(
        torch.vmap(lambda v: layer(v)[0])(stacked), torch.stack([layer(v)[0] for v in stacked])
    )

    def loss(module, weights, x):
        return losses(torch.func.functional_call(module, weights, (x,))[1])

    weights = dict(layer.named_parameters())
    expected = torch.autograd.grad(loss(layer, weights, x), list(weights.values()))
    assert_same(list(torch.func.grad(loss, 1)(layer, weights, x).values()), list(expected))
    per_sample = torch.vmap(torch.func.grad(loss, 1), (None, None, 0))(layer, weights, stacked)
    assert_same([g[0] for g in per_sample.values()], list(expected))
    tangent = torch.randn_like(x)
    ours, theirs = (
        torch.func.jvp(lambda v, m=m: m(v)[0], (x,), (tangent,)) for m in (layer, plain)
    )
    assert_same(ours, theirs)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = torch.autograd.forward_ad.unpack_dual(layer(dual)[0])
    assert_same(tuple(out), theirs)


@pytest.mark.parametrize("name", [None, "native"])
def test_transforms_around_a_call_and_around_its_gradient(name):
    """A transform may also begin between the forward and the backward pass."""
    layer = make_layer(backend=name)
    x = make_input(layer).requires_grad_()
    output = layer(x)[0]
    eye = torch.eye(4, dtype=torch.float64)
    vectors = torch.zeros(4, *output.shape, dtype=torch.float64)
    vectors[:, 0, 0, :4] = eye

    def pull(v):
        return torch.autograd.grad(output, x, v, retain_graph=True)[0]

    assert_same(torch.vmap(pull)(vectors), torch.stack([pull(v) for v in vectors]))
    hessian = torch.autograd.functional.hessian(lambda v: layer(v)[0].sin().sum(), x[:2, :1])
    assert_same(hessian, hessian.permute(3, 4, 5, 0, 1, 2))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiled_equals_eager(packed):
    layer = make_layer(torch.float32, backend=None, num_layers=2)
    x = make_input(layer, packed)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(lambda x: layer(x), backend="aot_eager")
        results = []
        for function in (layer, compiled):
            output, states = function(x)
            results.append(
                (
                    output.data,
                    *states,
                    *torch.autograd.grad(
                        losses((data_of(output), *states)), list(layer.parameters())
                    ),
                )
            )
    torch._dynamo.reset()
    assert_same(results[1], results[0])


def test_traces_hold_torchs_operator():
    layer = make_layer(torch.float32, backend=None)
    x = make_input(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
    assert "aten::lstm" in str(traced.inlined_graph)
    for steps, batch in ((T, B), (9, 2), (1, 1)):
        other = torch.randn(steps, batch, I)
        assert_same(traced(other), layer(other))


def test_dispatch_modes_see_torchs_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    layer = make_layer(torch.float32, backend=None)
    x = make_input(layer)
    graph = make_fx(lambda x: layer(x)[0])(x)
    assert_same(graph(-x), layer(-x)[0])
    operators = ("aten.lstm", "aten.mkldnn_rnn_layer", "aten.mm", "aten.addmm", "aten.linear")
    targets = {str(node.target) for node in graph.graph.nodes}
    assert any(t.startswith(operators) for t in targets), targets
    flops = []
    for each in (projected := make_layer(torch.float32, None, proj_size=P), twin(projected)):
        with FlopCounterMode(display=False) as counter:
            each(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output, (h_n, c_n) = layer(mode.from_tensor(x))
    assert (output.shape, h_n.shape, c_n.shape) == ((T, B, H), (1, B, H), (1, B, H))
    meta = make_layer(torch.float32, backend=None).to("meta")
    assert meta(x.to("meta"))[0].shape == (T, B, H)
    with pytest.raises(fused_lstm.BackendUnavailableError, match="it runs on CPUs"):
        make_layer(torch.float32).to("meta")(x.to("meta"))


@backends
def test_tensor_subclasses(backend):
    calls = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    class Wrapper(torch.Tensor):
        """Without memory of its own: reading its address would crash or give nonsense."""

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.held = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            def unwrap(x):
                return x.held if isinstance(x, Wrapper) else x

            tree = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
            result = function(*tree[0], **tree[1])
            return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapper, result)

    layer = make_layer(torch.float32, backend)
    x = make_input(layer)
    expected = layer(x)[0]
    assert_same(layer(x.as_subclass(Logged))[0].as_subclass(torch.Tensor), expected)
    with torch.no_grad():
        expected = expected.detach()
        assert_same(layer(Wrapper(x))[0].held, expected)
        layer.weight_hh_l0 = nn.Parameter(Wrapper(layer.weight_hh_l0.detach()))
        assert_same(layer(x)[0].held, expected)
        layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.held)
        states = tuple(Wrapper(s) for s in make_states(layer))
        assert_same(layer(x, states)[0].held, layer(x, tuple(s.held for s in states))[0])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_autocast(packed):
    layer = make_layer(torch.float32, backend=None)
    x = make_input(layer, packed)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(x)
        expected, _ = twin(layer)(x)
        # Torch's packed path mixes dtypes under autocast, and is left to torch.
        assert fused_lstm.explain(layer, x).backend == ("aten" if packed else "native")
    assert output.data.dtype == expected.data.dtype
    exact = twin(layer).double()(x.to(torch.float64))[0].data
    assert_within_budget(output.data, expected.data, exact)
    data_of(output).float().sum().backward()
    with torch.autocast("cpu", torch.float16), pytest.raises(fused_lstm.BackendUnavailableError):
        make_layer(torch.float32)(x)
    # Autocast around the backward pass alone changes nothing.
    grads = []
    for on in (False, True):
        loss = data_of(layer(x)[0]).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            grads.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert_same(grads[0], grads[1], rtol=0, atol=0)


# Errors


def outcome(call):
    try:
        call()
    except Exception as error:  # its type and text are what is compared
        return type(error), str(error)
    return None, ""


BAD_CALLS = {
    "features": lambda x, h, c: (x[..., :-1], (h, c)),
    "batch of states": lambda x, h, c: (x, (h[:, 1:], c[:, 1:])),
    "batch of c_0": lambda x, h, c: (x, (h, c[:, 1:])),
    "size of h_0": lambda x, h, c: (x, (h[..., 1:], c)),
    "size of c_0": lambda x, h, c: (x, (h, c[..., 1:])),
    "layers of states": lambda x, h, c: (x, (h[:1], c[:1])),
    "dtype of the input": lambda x, h, c: (x.double(), (h.double(), c.double())),
    "dtype of h_0": lambda x, h, c: (x, (h.double(), c)),
    "dtype of c_0": lambda x, h, c: (x, (h, c.double())),
    "integers": lambda x, h, c: (x.long(), None),
    "no steps": lambda x, h, c: (x[:0], (h, c)),
    "dimensions": lambda x, h, c: (x[None], (h, c)),
    "one state": lambda x, h, c: (x, (h,)),
    "a tensor as states": lambda x, h, c: (x, h),
    "unbatched states": lambda x, h, c: (x, (h[:, 0], c[:, 0])),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@backends
def test_bad_calls_raise_what_torch_raises(case, backend):
    layer = make_layer(torch.float32, backend, num_layers=2)
    theirs = twin(layer)
    x, (h, c) = make_input(layer), make_states(layer)
    arguments = BAD_CALLS[case](x, h, c)
    ours, expected = (outcome(lambda m=m: m(*arguments)) for m in (layer, theirs))
    assert expected[0] is not None
    assert ours[0] is not None
    if "dtype" not in case and case != "integers":
        assert ours[0] is expected[0], (ours, expected)
    # What was wrong does not last.
    assert_same(layer(x, (h, c)), theirs(x, (h, c)))


def test_errors_name_what_was_wrong():
    x, states = torch.randn(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H))
    weights = [torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H)]

    def call(change, backend="native", **options):
        arguments = {"input": x, "hx": states, "weights": list(weights)} | options
        change(arguments)
        return functional.lstm(**arguments, backend=backend)

    def put(k, value):
        return lambda arguments: arguments["weights"].__setitem__(k, value)

    for k, name in enumerate(("ih", "hh", "bias_ih", "bias_hh")):
        wide = torch.cat([weights[k]] * 2)
        if k != 1:
            with pytest.raises(RuntimeError, match=rf"weight {name} of layer 0 .* got \["):
                call(put(k, wide))
        with pytest.raises(RuntimeError, match=r"dtype of the input, torch\.float32"):
            call(put(k, weights[k].double()))
        with pytest.raises(RuntimeError, match="same device, found input tensor at cpu"):
            call(put(k, weights[k].to("meta")))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        call(lambda a: a.update(hx=(states[0][:, 1:], states[1])))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
        call(lambda a: a.update(hx=(states[0], states[1][..., 1:])))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        call(lambda a: a.update(input=x[:0]))
    rows = x.flatten(0, 1)
    for sizes in ([3, 3, 4, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3, 3, 0], [-1, 3], []):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            call(
                lambda a, sizes=sizes: a.update(
                    input=rows, batch_sizes=torch.tensor(sizes, dtype=torch.int64)
                )
            )
    for sizes in (torch.tensor([3.0] * 5), torch.tensor([[3] * 5]), torch.tensor([3] * 5).int()):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            call(lambda a, sizes=sizes: a.update(input=rows, batch_sizes=sizes))


def test_wrong_tensors_never_crash():
    """In a process of their own: every tensor is replaced by each of many wrong ones."""
    out = script(
        """
import itertools, torch
from fused_lstm import functional

T, B, I, H, P = 3, 2, 5, 6, 4
raised = passed = 0

def wrong(t):
    '''Everything that a tensor may be confused with.'''
    yield t[:-1]
    yield t[:0]
    yield torch.cat([t, t])
    yield t.unsqueeze(0)
    yield t.double()
    yield t.half()
    yield t.long()
    yield t.to("meta")
    yield t.to_sparse()
    yield t.to(torch.complex64)
    yield t.flatten()[0]
    if t.dim() > 1:
        yield t[..., :-1]
        yield t[..., :0]
        yield t.transpose(-1, -2) if t.shape[-1] != t.shape[-2] else t[0]
        yield t[0]
        yield t.flatten()

def attempt(call, what):
    global raised, passed
    try:
        call()
    except Exception as error:
        assert str(error), what
        raised += 1
    else:
        passed += 1
        print("accepted:", what)

def stack(bias, projected, directions, layers, packed):
    features = P if projected else H
    weights = []
    for layer in range(layers):
        for _ in range(directions):
            weights += [torch.randn(4 * H, I if layer == 0 else directions * features)]
            weights += [torch.randn(4 * H, features)]
            weights += [torch.randn(4 * H), torch.randn(4 * H)] * bias
            weights += [torch.randn(P, H)] * projected
    x = torch.randn(T * B, I) if packed else torch.randn(T, B, I)
    states = [torch.zeros(layers * directions, B, f) for f in (features, H)]
    sizes = torch.tensor([B] * T) if packed else None
    return [x, *states, *weights], sizes

kinds = itertools.product((True, False), (True, False), (1, 2), (1, 2), (False, True))
for bias, projected, directions, layers, packed in kinds:
    tensors, sizes = stack(bias, projected, directions, layers, packed)
    def call(tensors, sizes=sizes, bias=bias, layers=layers, directions=directions):
        x, h, c, *weights = tensors
        functional.lstm(
            x, (h, c), weights, batch_sizes=sizes, bias=bias, num_layers=layers,
            bidirectional=directions == 2, backend="native",
        )
    call(tensors)
    for k, tensor in enumerate(tensors):
        for n, other in enumerate(wrong(tensor)):
            if k == 0 and not packed and n in (0, 2):
                continue  # another number of steps
            bad = [*tensors[:k], other, *tensors[k + 1:]]
            attempt(lambda: call(bad), (bias, projected, directions, layers, packed, k, n))
    x, h, c, *weights = tensors
    for count in range(len(weights)):
        attempt(lambda: call([x, h, c, *weights[:count]]), ("weights", count, len(weights)))
    attempt(lambda: call([x, h, c, *weights, weights[-1]]), "one weight more")

cell = [torch.randn(B, I), torch.zeros(B, H), torch.zeros(B, H), torch.randn(4 * H, I),
        torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H)]
def call_cell(tensors):
    x, h, c, *weights = tensors
    functional.lstm_cell(x, (h, c), *weights, backend="native")
call_cell(cell)
for k, tensor in enumerate(cell):
    for n, other in enumerate(wrong(tensor)):
        bad = [*cell[:k], other, *cell[k + 1:]]
        attempt(lambda: call_cell(bad), ("cell", k, n))
call_cell(cell)
print("raised:", raised > 1000)
"""
    )
    assert out.splitlines() == ["raised: True"], out


def test_bad_batch_sizes_never_crash():
    out = script(
        """
import torch, fused_lstm
from torch.nn.utils.rnn import PackedSequence

layer = fused_lstm.LSTM(3, 4, backend="native")
rows = torch.randn(6, 3)
for sizes in ([3, 2, 1, 1], [3, 2], [1, 2, 3], [6, 0], [7], [3, 3, -1, 1], [2**62, 2], [-6], []):
    try:
        layer(PackedSequence(rows, torch.tensor(sizes, dtype=torch.int64)))
    except Exception as error:
        assert str(error), sizes
    else:
        raise AssertionError(f"{sizes} was accepted")
layer(PackedSequence(rows, torch.tensor([3, 2, 1])))
print("ok")
"""
    )
    assert out == "ok\n"


def test_without_the_library():
    """The reason is shown, the result is right, and the name raises it."""
    out = script(
        """
import torch, fused_lstm
layer = fused_lstm.LSTM(3, 4, 2)
x = torch.randn(5, 2, 3)
explanation = fused_lstm.explain(layer, x)
assert explanation.backend == "aten", explanation
print(explanation.reasons["native"])
output, states = layer(x)
torch.testing.assert_close(output, layer.to_torch()(x)[0])
output.sum().backward()
named = fused_lstm.LSTM(3, 4, backend="native")
for call in (lambda: named(x), lambda: fused_lstm.LSTMCell(3, 4, backend="native")(x[0])):
    try:
        call()
    except fused_lstm.BackendUnavailableError as error:
        assert "/nonexistent does not exist" in str(error)
    else:
        raise AssertionError
""",
        FUSED_LSTM_NATIVE_LIBRARY="/nonexistent",
    )
    assert out.strip() == "cannot run it: /nonexistent does not exist"


# One recurrence on these kernels


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_recurrence_equals_the_reference(projected, reverse):
    features = P if projected else H
    shapes = [(T, B, 4 * H), (4 * H, features), (B, features), (B, H)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    weight_hr = torch.randn(P, H, dtype=torch.float64, requires_grad=True) if projected else None
    every = [*leaves, weight_hr][: 5 if projected else 4]
    results = []
    for backend in ("native", "reference"):
        out = fused_lstm.lstm_recurrence(
            *leaves, weight_hr=weight_hr, reverse=reverse, backend=backend
        )
        results.append([*out, *torch.autograd.grad(losses(out), every)])
    assert_same(results[0], results[1])


# Found by review


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("first", [514, 600, 1200])
def test_groups_of_rows_that_end_early(first, bidirectional):
    """A thread's rows may be over long before the sequence is, and be more than a chunk holds."""
    layer = fused_lstm.LSTM(I, H, bidirectional=bidirectional, backend="native")
    packed = PackedSequence(torch.randn(first + 3, I), torch.tensor([first, 1, 1, 1]))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        grads = [
            torch.autograd.grad(m(packed)[0].data.square().sum(), list(m.parameters()))
            for m in (layer, twin(layer))
        ]
    finally:
        torch.set_num_threads(threads)
    assert_same(*grads, rtol=1e-4, atol=1e-3)


def test_an_input_without_features():
    x, (h, c) = torch.zeros(B, 0), (torch.randn(B, H), torch.randn(B, H))
    cell = fused_lstm.LSTMCell(0, H, backend="native")
    assert_same(cell(x, (h, c)), cell.to_torch()(x, (h, c)))


def test_a_lazily_negated_input():
    z = torch.randn(5, B, 1, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    for backend in (None, "native"):
        layer = fused_lstm.LSTM(1, H, backend=backend)
        assert_same(layer(x)[0], layer(x.resolve_neg())[0])


def test_gradients_of_the_biases_are_tensors_of_their_own():
    layer = fused_lstm.LSTM(I, H, backend="native")
    biases = [layer.bias_ih_l0, layer.bias_hh_l0]
    one, other = torch.autograd.grad(layer(torch.randn(3, B, I))[0].sum(), biases)
    assert one.data_ptr() != other.data_ptr()
    assert_same(one, other)


# x fused into the step and staged over steps, and gates that are given to the recurrence alone.
@pytest.mark.parametrize(("batch", "inputs"), [(1, 5), (32, 5), (32, 64)])
def test_many_steps_are_as_exact_as_torchs(batch, inputs):
    layer = nn.LSTM(inputs, 128)
    x = torch.randn(100, batch, inputs)
    h, c = torch.zeros(2, batch, 128)
    with torch.no_grad():
        exact, _ = copy.deepcopy(layer).double()(x.double())
        torchs, _ = layer(x)
        same = fused_lstm.LSTM(inputs, 128, backend="native")
        same.load_state_dict(layer.state_dict())
        ours, _ = same(x)
        gates = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.bias_hh_l0
        with fused_lstm.use_backend("native"):
            alone, *_ = fused_lstm.lstm_recurrence(gates, layer.weight_hh_l0, h, c)

    def error(actual):
        return float((actual.double() - exact).square().mean().sqrt())

    # Of this many numbers the mean is no matter of luck.
    assert error(ours) <= 1.25 * error(torchs)
    assert error(alone) <= 1.25 * error(torchs)
