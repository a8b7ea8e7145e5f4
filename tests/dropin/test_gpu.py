"""The layer on a GPU against torch's cuDNN layer."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from .helpers import (
    OPTIONS,
    assert_same_results,
    assert_within_budget,
    build_cells,
    build_pair,
    data_of,
    make_hx,
    make_input,
    map_input,
    run,
    values,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # What this layer spares its users.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def full_float32_precision():
    """Both layers multiply in float32 when they are given float32."""
    saved = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = saved


def on_cpu(results):
    return {name: tensor.cpu() for name, tensor in results.items()}


def train(module, x, hx=None):
    """As `helpers.run`, on the GPU, in one call of `backward`."""
    x = map_input(lambda t: t.to(DEVICE).requires_grad_(), x)
    hx = hx if hx is None else tuple(state.to(DEVICE).requires_grad_() for state in hx)
    module.zero_grad(set_to_none=True)
    output, states = module(x, hx)
    results = {"output": data_of(output), "h_n": states[0], "c_n": states[1]}
    cotangents = [
        values(*tensor.shape, seed=40 + i, dtype=tensor.dtype).to(DEVICE)
        for i, tensor in enumerate(results.values())
    ]
    torch.autograd.backward(list(results.values()), cotangents)
    results = {name: tensor.detach() for name, tensor in results.items()}
    results["grad of input"] = data_of(x).grad
    if hx is not None:
        results["grad of h0"], results["grad of c0"] = hx[0].grad, hx[1].grad
    for name, parameter in module.named_parameters():
        results[f"grad of {name}"] = parameter.grad
    return on_cpu(results)


def exact(native, x, hx=None):
    """The same step in float64 on the CPU."""
    wide = copy.deepcopy(native).to("cpu", torch.float64)
    hx = hx if hx is None else tuple(state.double() for state in hx)
    return run(wide, map_input(torch.Tensor.double, x), hx)


def compare_on_gpu(native, ours, x, hx=None):
    # float32 is compared directly, half precision by its error against float64.
    half = native.weight_ih_l0.dtype in (torch.float16, torch.bfloat16)
    reference64 = exact(native, x, hx) if half else None
    native, ours = native.to(DEVICE), ours.to(DEVICE)
    assert_same_results(train(ours, x, hx), train(native, x, hx), reference64=reference64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed-sorted", "packed-unsorted"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_results_and_gradients(options, form, dtype, backend):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    x = make_input(form, dtype=dtype, batch_first=native.batch_first)
    compare_on_gpu(native, ours, x, make_hx(native, form, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden_size", "batch", "steps"), [(64, 16, 30), (128, 3, 12), (200, 5, 9)]
)
def test_larger_layers(hidden_size, batch, steps, dtype):
    native, ours = build_pair(48, hidden_size, 2, dtype=dtype)
    x = make_input(dtype=dtype, steps=steps, batch=batch, size=48)
    compare_on_gpu(native, ours, x, make_hx(native, dtype=dtype, batch=batch))


@pytest.mark.parametrize("form", ["batched", "packed-unsorted"])
def test_float64(form, backend):
    options = {"num_layers": 2, "bidirectional": True}
    native, ours = build_pair(dtype=torch.float64, backend=backend, **options)
    x, hx = make_input(form, dtype=torch.float64), make_hx(native, form, dtype=torch.float64)
    expected = exact(native, x, hx)
    actual = train(ours.to(DEVICE), x, hx)
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["batched", "packed-unsorted"])
def test_backward_in_evaluation_mode(form, dtype, backend):
    """cuDNN itself refuses: evaluation gives the gradients of training without dropout."""
    native, ours = build_pair(num_layers=2, dropout=0.5, dtype=dtype, backend=backend)
    x, hx = make_input(form, dtype=dtype), make_hx(native, form, dtype=dtype)
    native.dropout = 0.0
    reference64 = None if dtype == torch.float32 else exact(native, x, hx)
    expected = train(native.to(DEVICE), x, hx)
    actual = train(ours.to(DEVICE).eval(), x, hx)
    assert_same_results(actual, expected, reference64=reference64)


def test_double_backward(backend):
    native, ours = build_pair(num_layers=2, dtype=torch.float64, backend=backend)
    penalties = []
    for module, device in [(native, "cpu"), (ours, DEVICE)]:
        module.to(device)
        x = make_input(dtype=torch.float64).to(device).requires_grad_()
        (gradient,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        penalties.append(
            [x.grad.cpu(), *(parameter.grad.cpu() for parameter in module.parameters())]
        )
    torch.testing.assert_close(penalties[1], penalties[0], rtol=1e-9, atol=1e-11)


def test_dropout_repeats_with_the_seed(backend):
    _, ours = build_pair(num_layers=2, dropout=0.5, backend=backend)
    ours.to(DEVICE)
    x = make_input().to(DEVICE)
    outputs = []
    for seed in [1, 1, 2]:
        torch.manual_seed(seed)
        outputs.append(ours(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, backend):
    native, ours = build_pair(num_layers=2, backend=backend)
    x, hx = make_input(), make_hx(native)
    reference64 = exact(native, x, hx)
    with torch.autocast(DEVICE, dtype=dtype):
        expected, actual = train(native.to(DEVICE), x, hx), train(ours.to(DEVICE), x, hx)
    assert actual["output"].dtype == expected["output"].dtype == dtype
    for name, wanted in expected.items():
        assert_within_budget(actual[name].to(dtype), wanted.to(dtype), reference64[name], name)


@pytest.mark.filterwarnings("error:RNN module weights")
def test_scattered_weights_give_no_warning(backend):
    _, ours = build_pair(num_layers=2, backend=backend)
    ours.to(DEVICE)
    for name, parameter in list(ours.named_parameters()):
        setattr(ours, name, torch.nn.Parameter(parameter.detach().clone()))
    output, _ = ours(make_input().to(DEVICE))
    output.sum().backward()


def test_results_repeat_bit_for_bit(backend):
    _, ours = build_pair(16, 32, 2, bidirectional=True, backend=backend)
    ours.to(DEVICE)
    x, hx = make_input(size=16, steps=20), make_hx(ours)
    first, second = train(ours, x, hx), train(ours, x, hx)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_packed_results_stay_on_the_gpu(backend):
    _, ours = build_pair(backend=backend)
    ours.to(DEVICE)
    packed = make_input("packed-unsorted").to(DEVICE)
    output, (h_n, c_n) = ours(packed)
    assert type(output) is PackedSequence
    assert output.data.is_cuda
    assert not output.batch_sizes.is_cuda
    assert output.unsorted_indices.is_cuda
    assert h_n.is_cuda
    assert c_n.is_cuda


@pytest.mark.parametrize("place", ["input", "states"])
def test_tensors_elsewhere_are_an_error(place, backend):
    native, ours = build_pair(backend=backend)
    for module in (native.to(DEVICE), ours.to(DEVICE)):
        x, hx = make_input(), make_hx(native)
        if place == "states":
            x = x.to(DEVICE)
        else:
            hx = tuple(state.to(DEVICE) for state in hx)
        with pytest.raises(RuntimeError, match="not at the same device"):
            module(x, hx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cell(dtype, backend):
    native, ours = build_cells(dtype=dtype, backend=backend)
    x, h, c = (values(3, size, seed=i, dtype=dtype) for i, size in enumerate([4, 5, 5]))
    reference64 = None
    if dtype != torch.float32:
        wide = copy.deepcopy(native).double()
        reference64 = cell_step(wide, x.double(), h.double(), c.double())
    tensors = [tensor.to(DEVICE) for tensor in (x, h, c)]
    expected = cell_step(native.to(DEVICE), *tensors)
    actual = cell_step(ours.to(DEVICE), *tensors)
    assert_same_results(actual, expected, reference64=reference64)


def cell_step(cell, x, h, c):
    tensors = [tensor.clone().requires_grad_() for tensor in (x, h, c)]
    results = cell(tensors[0], tuple(tensors[1:]))
    cotangents = [
        values(*t.shape, seed=i, dtype=t.dtype).to(x.device) for i, t in enumerate(results)
    ]
    torch.autograd.backward(results, cotangents)
    named = {"h": results[0].detach(), "c": results[1].detach()}
    for name, tensor in zip(["input", "h0", "c0"], tensors, strict=True):
        named[f"grad of {name}"] = tensor.grad
    for name, parameter in cell.named_parameters():
        named[f"grad of {name}"] = parameter.grad
    return on_cpu(named)
