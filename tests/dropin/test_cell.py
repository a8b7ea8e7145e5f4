"""`fused_lstm.LSTMCell` against `torch.nn.LSTMCell`."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fused_lstm

from .helpers import (
    B,
    H,
    I,
    assert_same_results,
    assert_within_budget,
    build_cells,
    leaf,
    outcome,
    tolerances,
    values,
    weighted_sum,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def cell_input(batched=True, dtype=torch.float32, batch=B):
    return values(*((batch, I) if batched else (I,)), seed=1, dtype=dtype)


def cell_states(batched=True, dtype=torch.float32, batch=B, container=tuple):
    shape = (batch, H) if batched else (H,)
    return container([values(*shape, seed=2, dtype=dtype), values(*shape, seed=3, dtype=dtype)])


def step(cell, x, hx=None):
    x = leaf(x)
    hx = hx if hx is None else type(hx)(leaf(state) for state in hx)
    cell.zero_grad(set_to_none=True)
    h, c = cell(x, hx)
    weighted_sum([h, c]).backward()
    results = {"h": h.detach(), "c": c.detach(), "grad of input": x.grad}
    if hx is not None:
        results["grad of h0"], results["grad of c0"] = hx[0].grad, hx[1].grad
    for name, parameter in cell.named_parameters():
        results[f"grad of {name}"] = parameter.grad
    return results


def compare_cells(native, ours, x, hx=None, backend=None):
    expected = step(native, x, hx)
    actual = step(ours, x, hx)
    reference64 = None
    if x.dtype in (torch.float16, torch.bfloat16):
        wide = hx if hx is None else type(hx)(state.double() for state in hx)
        reference64 = step(copy.deepcopy(native).double(), x.double(), wide)
    assert_same_results(actual, expected, backend, reference64)
    return actual


# Constructor and weights


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((3,), {}),
        ((3, 4), {"num_layers": 2}),
        ((3.0, 4), {}),
        ((3, "4"), {}),
        ((-3, 4), {}),
        ((3, -4), {}),
        ((3, 4), {"dtype": torch.int64}),
    ],
    ids=str,
)
def test_a_wrong_call_raises_what_torch_raises(args, kwargs):
    expected = outcome(lambda: nn.LSTMCell(*args, **kwargs))
    assert expected.error is not None
    assert outcome(lambda: fused_lstm.LSTMCell(*args, **kwargs)).error is expected.error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_seed_same_parameters_and_generator_state(bias, dtype):
    torch.manual_seed(4)
    native = nn.LSTMCell(I, H, bias, "cpu", dtype)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    ours = fused_lstm.LSTMCell(I, H, bias, "cpu", dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(ours, nn.LSTMCell)
    assert list(ours.state_dict()) == list(native.state_dict())
    assert ours.state_dict()._metadata == native.state_dict()._metadata
    for name, value in native.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    for name in ["input_size", "hidden_size", "bias"]:
        assert getattr(ours, name) == getattr(native, name)
    assert repr(ours) == repr(native)
    assert (ours.bias_ih is None) == (not bias)
    torch.manual_seed(4)
    ours.reset_parameters()
    assert torch.equal(ours.weight_hh, native.weight_hh)


# Results and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("states", [None, tuple, list], ids=["none", "tuple", "list"])
def test_results_and_gradients(dtype, bias, batched, states, backend):
    native, ours = build_cells(I, H, bias, dtype=dtype, backend=backend)
    hx = states and cell_states(batched, dtype, container=states)
    compare_cells(native, ours, cell_input(batched, dtype), hx, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_loop_over_time(dtype, backend):
    native, ours = build_cells(dtype=dtype, backend=backend)
    x = values(12, B, I, dtype=dtype)
    for cell in (native, ours):
        states, total = None, 0
        for row in x:
            states = cell(row, states)
            total = total + weighted_sum(states)
        total.backward()
    for name, parameter in native.named_parameters():
        actual = getattr(ours, name).grad
        torch.testing.assert_close(actual, parameter.grad, **tolerances(dtype, backend))


def test_the_cell_is_one_step_of_the_layer(backend):
    cell = fused_lstm.LSTMCell(I, H, dtype=torch.float64, backend=backend)
    layer = fused_lstm.LSTM(I, H, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            getattr(layer, f"{name}_l0").copy_(parameter)
    x = values(4, B, I, dtype=torch.float64)
    states = None
    for row in x:
        states = cell(row, states)
    _, (h_n, c_n) = layer(x)
    torch.testing.assert_close(states, (h_n[0], c_n[0]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_types_and_memory_of_the_results(batched, backend):
    native, ours = build_cells(backend=backend)
    x, hx = cell_input(batched), cell_states(batched)
    result, expected = ours(x, hx), native(x, hx)
    assert type(result) is tuple
    assert len(result) == 2
    for actual, wanted in zip(result, expected, strict=True):
        assert actual.shape == wanted.shape
        assert actual.is_contiguous()
        assert actual.requires_grad
    storages = {tensor.untyped_storage().data_ptr() for tensor in (x, *hx, *result)}
    assert len(storages) == 5


@pytest.mark.parametrize("with_states", [True, False], ids=["states", "no-states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_empty_batch(with_states, dtype, backend):
    native, ours = build_cells(dtype=dtype, backend=backend)
    hx = cell_states(batch=0, dtype=dtype) if with_states else None
    results = compare_cells(native, ours, cell_input(batch=0, dtype=dtype), hx, backend)
    assert results["h"].shape == results["c"].shape == (0, H)
    assert not results["grad of weight_hh"].any()


def test_evaluation_mode_and_inference(backend):
    native, ours = build_cells(backend=backend)
    compare_cells(native.eval(), ours.eval(), cell_input(), cell_states(), backend)
    with torch.inference_mode():
        h, c = ours(cell_input())
        torch.testing.assert_close((h, c), native(cell_input()))
        assert h.is_inference()
        assert c.is_inference()


def test_no_random_numbers_are_consumed(backend):
    _, ours = build_cells(backend=backend)
    before = torch.get_rng_state()
    step(ours, cell_input())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend):
    if (backend, dtype) == ("aten", torch.float16):
        pytest.skip("oneDNN cannot train in float16 under autocast")
    native, ours = build_cells(backend=backend)
    x, hx = cell_input(), cell_states()
    exact = step(copy.deepcopy(native).double(), x.double(), tuple(t.double() for t in hx))
    with torch.autocast("cpu", dtype=dtype):
        expected, actual = step(native, x, hx), step(ours, x, hx)
    for name, wanted in expected.items():
        assert actual[name].dtype in (wanted.dtype, dtype)
        assert_within_budget(actual[name].to(dtype), wanted.to(dtype), exact[name], name)


# Errors


REFUSED = {
    "0-D": ((torch.tensor(1.0),), ValueError),
    "3-D": ((torch.zeros(1, B, I),), ValueError),
    "3-D-h0": ((torch.zeros(B, I), (torch.zeros(1, B, H), torch.zeros(B, H))), ValueError),
    "3-D-c0": ((torch.zeros(B, I), (torch.zeros(B, H), torch.zeros(1, B, H))), ValueError),
    "0-D-h0": ((torch.zeros(B, I), (torch.tensor(0.0), torch.zeros(B, H))), ValueError),
    "features": ((torch.zeros(B, I + 1),), RuntimeError),
    "unbatched-features": ((torch.zeros(I + 1),), RuntimeError),
    "h0-features": ((torch.zeros(B, I), (torch.zeros(B, H + 1), torch.zeros(B, H))), RuntimeError),
    "h0-batch": ((torch.zeros(B, I), (torch.zeros(B + 1, H), torch.zeros(B, H))), RuntimeError),
    "c0-batch": ((torch.zeros(B, I), (torch.zeros(B, H), torch.zeros(B + 1, H))), RuntimeError),
    "three-states": ((torch.zeros(B, I), [torch.zeros(B, H)] * 3), RuntimeError),
}


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_a_refused_call_has_torchs_error(arguments, error, backend):
    native, ours = build_cells(backend=backend)
    expected = outcome(lambda: native(*arguments))
    assert expected.error is error
    actual = outcome(lambda: ours(*arguments))
    assert (actual.error, actual.message) == (expected.error, expected.message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_input_of_another_dtype_is_an_error(dtype, backend):
    native, ours = build_cells(backend=backend)
    x = cell_input(dtype=dtype)
    assert outcome(lambda: native(x)).error is RuntimeError
    assert outcome(lambda: ours(x)).error in (RuntimeError, ValueError)


# Autograd


@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_are_those_of_finite_differences(bias, backend):
    ours = fused_lstm.LSTMCell(2, 2, bias, dtype=torch.float64, backend=backend)
    names = [name for name, _ in ours.named_parameters()]

    def function(x, h, c, *weights):
        return torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (x, (h, c)))

    arguments = [values(3, 2, seed=i, dtype=torch.float64).requires_grad_() for i in range(3)]
    arguments += [leaf(parameter) for parameter in ours.parameters()]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_a_second_backward_needs_retain_graph(backend):
    _, ours = build_cells(backend=backend)
    h, _ = ours(cell_input(), cell_states())
    loss = h.square().sum()
    loss.backward(retain_graph=True)
    first = ours.weight_hh.grad.clone()
    loss.backward()
    assert torch.equal(ours.weight_hh.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("result", [0, 1], ids=["h", "c"])
def test_every_parameter_gets_a_gradient(result, backend):
    native, ours = build_cells(dtype=torch.float64, backend=backend)
    for cell in (native, ours):
        cell(cell_input(dtype=torch.float64))[result].square().sum().backward()
    for name, parameter in native.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            getattr(ours, name).grad, parameter.grad, **tolerances(torch.float64, backend)
        )


@pytest.mark.parametrize("changed", ["input", "h0", "c0", "weight_hh"])
def test_a_changed_saved_tensor_is_noticed(changed, backend):
    _, ours = build_cells(backend=backend)
    tensors = {"input": leaf(cell_input()), "weight_hh": ours.weight_hh}
    tensors["h0"], tensors["c0"] = (leaf(state) for state in cell_states())
    h, c = ours(tensors["input"], (tensors["h0"], tensors["c0"]))
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (h.sum() + c.sum()).backward()


def test_any_layout(backend):
    native, ours = build_cells(dtype=torch.float64, backend=backend)
    x = values(I, B, dtype=torch.float64).t().requires_grad_()
    h0 = values(1, H, dtype=torch.float64).expand(B, H).requires_grad_()
    c0 = values(B, 2 * H, dtype=torch.float64)[:, ::2].requires_grad_()
    gradients = []
    for cell in (native, ours):
        h, c = cell(x, (h0, c0))
        cotangents = [torch.ones((), dtype=h.dtype).expand_as(h), values(H, B, dtype=c.dtype).t()]
        gradients.append(torch.autograd.grad([h, c], [x, h0, c0, *cell.parameters()], cotangents))
    torch.testing.assert_close(*gradients[::-1], **tolerances(torch.float64, backend))


# Ecosystem


def assign(cell):
    cell.weight_hh = nn.Parameter(values(4 * H, H, seed=5, dtype=torch.float64))


def assign_to_the_dictionary(cell):
    cell._parameters["bias_ih"] = nn.Parameter(values(4 * H, seed=5, dtype=torch.float64))


def weight_norm(cell):
    parametrizations.weight_norm(cell, "weight_hh")


def pruned(cell):
    prune.l1_unstructured(cell, "weight_ih", amount=0.5)


def through_float32(cell):
    cell.float().double()


def from_checkpoint(cell):
    torch.manual_seed(9)
    cell.load_state_dict(nn.LSTMCell(I, H, dtype=torch.float64).state_dict(), assign=True)


def without_biases(cell):
    cell.bias_ih = None
    cell.bias_hh = None


CHANGES = [
    assign,
    assign_to_the_dictionary,
    weight_norm,
    pruned,
    through_float32,
    from_checkpoint,
    without_biases,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_used_by_the_next_step(change, backend):
    native, ours = build_cells(dtype=torch.float64, backend=backend)
    x, hx = cell_input(dtype=torch.float64), cell_states(dtype=torch.float64)
    for cell in (native, ours):
        cell(x, hx)
        change(cell)
    compare_cells(native, ours, x, hx, backend)


def test_copies(backend):
    native, ours = build_cells(backend=backend)
    for other in [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]:
        assert type(other) is fused_lstm.LSTMCell
        compare_cells(native, other, cell_input(), cell_states(), backend)
    state = ours.state_dict()
    native.load_state_dict(state)
    ours.load_state_dict(native.state_dict())


def test_functional_call(backend):
    native, ours = build_cells(dtype=torch.float64, backend=backend)
    weights = {"weight_hh": values(4 * H, H, seed=8, dtype=torch.float64)}
    x = cell_input(dtype=torch.float64)
    expected, actual = (torch.func.functional_call(m, weights, (x,)) for m in (native, ours))
    torch.testing.assert_close(actual, expected)


def test_hooks(backend):
    _, ours = build_cells(backend=backend)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append(("pre", len(args))))
    ours.register_forward_hook(lambda module, args, result: seen.append(("post", len(result))))
    ours.register_full_backward_hook(lambda module, gi, go: seen.append(("backward", len(go))))
    step(ours, cell_input(), cell_states())
    assert seen == [("pre", 2), ("post", 2), ("backward", 2)]


def test_meta(backend):
    ours = fused_lstm.LSTMCell(I, H, device="meta", backend=backend)
    h, c = ours(torch.empty(B, I, device="meta"))
    assert h.is_meta
    assert c.shape == (B, H)
    native, _ = build_cells()
    ours.to_empty(device="cpu").load_state_dict(native.state_dict())
    compare_cells(native, ours, cell_input(), backend=backend)


def test_checkpointing(backend):
    native, ours = build_cells(dtype=torch.float64, backend=backend)
    x = leaf(cell_input(dtype=torch.float64))
    h, c = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    weighted_sum([h, c]).backward()
    expected = step(native, x)
    torch.testing.assert_close(ours.weight_hh.grad, expected["grad of weight_hh"])
    torch.testing.assert_close(x.grad, expected["grad of input"])


@pytest.mark.parametrize("training", [False, True])
def test_parameters_that_were_registered_in_another_order(training):
    """Equal sizes: what is taken for what does not show in their shapes."""
    cell = fused_lstm.LSTMCell(5, 5)
    reference = cell.to_torch()
    for name in ("weight_hh", "weight_ih", "bias_hh", "bias_ih"):
        weight = getattr(cell, name)
        delattr(cell, name)
        cell.register_parameter(name, weight)
    x, h, c = torch.randn(3, 2, 5)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(cell(x, (h, c)), reference(x, (h, c)))
