"""What `torch.nn.LSTM` cannot do and `fused_lstm.LSTM` can.

The oracle is still `torch.nn.LSTM`, applied in a loop or differentiated another way.
"""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations

import fused_lstm

from .helpers import (
    OPTIONS,
    B,
    H,
    I,
    P,
    T,
    assert_within_budget,
    build_cells,
    build_pair,
    compare,
    data_of,
    leaf,
    make_hx,
    make_input,
    run,
    values,
    weighted_sum,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SOME_OPTIONS = {
    name: OPTIONS[name]
    for name in ["plain", "no-bias", "batch-first", "projected", "two-layers-bidirectional"]
}
each_option = pytest.mark.parametrize("options", SOME_OPTIONS.values(), ids=SOME_OPTIONS)


@pytest.fixture(params=[None, "reference"], ids=["default", "reference"])
def backend(request):
    """Not PyTorch's own layers, which can do next to nothing of this."""
    return request.param


def build(backend, *args, **options):
    return build_pair(*args, dtype=torch.float64, backend=backend, **options)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


# Signature and construction


def test_the_signature_is_explicit():
    parameters = inspect.signature(fused_lstm.LSTM).parameters
    expected = {
        "input_size": inspect.Parameter.empty,
        "hidden_size": inspect.Parameter.empty,
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
        "proj_size": 0,
        "device": None,
        "dtype": None,
    }
    assert list(parameters)[: len(expected)] == list(expected)
    for name, default in expected.items():
        assert parameters[name].default == default
        assert parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    for name in list(parameters)[len(expected) :]:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["backend"].default is None


def test_the_signature_of_the_cell_is_torchs_and_a_backend():
    expected = inspect.signature(nn.LSTMCell).parameters
    actual = inspect.signature(fused_lstm.LSTMCell).parameters
    assert list(actual) == [*expected, "backend"]
    for name, parameter in expected.items():
        assert actual[name].default == parameter.default
        assert actual[name].kind is parameter.kind
    assert actual["backend"].kind is inspect.Parameter.KEYWORD_ONLY


def test_skip_init(backend):
    native, _ = build_pair(I, H, 2, proj_size=P)
    before = torch.get_rng_state()
    ours = nn.utils.skip_init(fused_lstm.LSTM, I, H, num_layers=2, proj_size=P, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    assert not ours.weight_hh_l1.is_meta
    ours.load_state_dict(native.state_dict())
    compare(native, ours, make_input(), backend=backend)


def test_autocast_to_float16_on_a_cpu(backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    x, hx = make_input(), make_hx(native)
    exact = run(copy.deepcopy(native).double(), x.double(), tuple(t.double() for t in hx))
    # What torch computes in float16 throughout, since not every CPU has its autocast.
    expected = run(copy.deepcopy(native).half(), x.half(), tuple(t.half() for t in hx))
    with torch.autocast("cpu", dtype=torch.float16):
        actual = run(ours, x, hx)
    for name in ["output", "h_n", "c_n"]:
        assert actual[name].dtype == torch.float16
        assert_within_budget(actual[name], expected[name], exact[name], name)
    for name in (name for name in exact if name.startswith("grad")):
        assert actual[name].dtype == torch.float32
        assert_within_budget(actual[name].half(), expected[name], exact[name], name)


def test_a_projection_without_use_gets_zeros_too():
    """With one step the cells do not depend on the projection; torch leaves its gradient out."""
    _, ours = build("reference", proj_size=P)
    _, (_, c_n) = ours(make_input(dtype=torch.float64, steps=1))
    c_n.sum().backward()
    assert ours.weight_hr_l0.grad is not None
    assert not ours.weight_hr_l0.grad.any()


# Copies and checkpoints


def normalised(module):
    parametrizations.weight_norm(module, "weight_hh_l0")


def orthogonal(module):
    parametrizations.orthogonal(module, "weight_hh_l0")


@pytest.mark.parametrize("change", [normalised, orthogonal], ids=lambda f: f.__name__)
def test_deepcopy_of_a_parametrised_layer_in_use(change, backend):
    native, ours = build(backend, num_layers=2)
    for module in (native, ours):
        torch.manual_seed(1)
        change(module)
    x = make_input(dtype=torch.float64)
    ours(x)[0].sum().backward()
    other = copy.deepcopy(ours)
    compare(native, other, x, backend=backend)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    compare(native, ours, x, backend=backend)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
def test_swapping_load_state_dict(backend):
    native, _ = build_pair(I, H, 2, seed=1)
    _, ours = build_pair(I, H, 2, seed=2, backend=backend)
    x = make_input()
    with torch.no_grad():
        ours(x)
    before = ours.weight_hh_l0
    ours.load_state_dict(native.state_dict())
    assert ours.weight_hh_l0 is before
    compare(native, ours, x, backend=backend)


@pytest.mark.usefixtures("swapping")
def test_swapping_conversion(backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    with torch.no_grad():
        ours(make_input())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.double()
    assert optimizer.param_groups[0]["params"][0] is ours.weight_ih_l0
    compare(native.double(), ours, make_input(dtype=torch.float64), backend=backend)


# vmap


@each_option
@pytest.mark.parametrize("in_dim", [0, 1, 3])
def test_vmap_over_inputs(options, in_dim, backend):
    native, ours = build(backend, **options)
    x = torch.stack([make_input(dtype=torch.float64) * (k + 1) for k in range(4)])
    if native.batch_first:
        x = x.transpose(1, 2)
    expected = [
        torch.stack(results) for results in zip(*(flat(native(row)) for row in x), strict=True)
    ]
    moved = x.movedim(0, in_dim)
    assert_close(vmap(lambda x: flat(ours(x)), in_dims=in_dim)(moved), tuple(expected))


def flat(result):
    output, states = result
    return data_of(output), *states


def test_vmap_over_states_only(backend):
    native, ours = build(backend, num_layers=2)
    x = make_input(dtype=torch.float64)
    h0, c0 = (torch.stack([s, 2 * s, -s]) for s in make_hx(native, dtype=torch.float64))
    actual = vmap(lambda h, c: flat(ours(x, (h, c))))(h0, c0)
    expected = [flat(native(x, (h, c))) for h, c in zip(h0, c0, strict=True)]
    assert_close(actual, tuple(torch.stack(results) for results in zip(*expected, strict=True)))


def test_nested_vmap(backend):
    native, ours = build(backend)
    x = values(2, 3, T, B, I, dtype=torch.float64)
    actual = vmap(vmap(lambda x: ours(x)[0]))(x)
    expected = torch.stack([torch.stack([native(row)[0] for row in rows]) for rows in x])
    assert_close(actual, expected)


def test_vmap_over_unbatched_sequences(backend):
    native, ours = build(backend, num_layers=2, bidirectional=True)
    x = make_input(dtype=torch.float64)
    actual = vmap(lambda sequence: ours(sequence)[0], in_dims=1, out_dims=1)(x)
    assert_close(actual, native(x)[0])


@each_option
@pytest.mark.parametrize("shared_input", [True, False], ids=["one-input", "input-each"])
def test_an_ensemble_of_stacked_weights(options, shared_input, backend):
    models = [build(backend, seed=k, **options) for k in range(3)]
    weights, buffers = stack_module_state([ours for _, ours in models])
    base = copy.deepcopy(models[0][1]).to("meta")
    batch_first = base.batch_first
    x = torch.stack([make_input(dtype=torch.float64, batch_first=batch_first)] * 3)
    if not shared_input:
        x = x * torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64).reshape(3, 1, 1, 1)

    def call(weights, buffers, x):
        return flat(functional_call(base, (weights, buffers), (x,)))

    in_dims = (0, 0, None if shared_input else 0)
    actual = vmap(call, in_dims)(weights, buffers, x[0] if shared_input else x)
    expected = [flat(native(row)) for (native, _), row in zip(models, x, strict=True)]
    assert_close(actual, tuple(torch.stack(results) for results in zip(*expected, strict=True)))
    # The ensemble trains: each member gets the gradient it would get alone.
    weighted_sum([actual[0].square()]).backward()
    cotangent = values(*actual[0].shape, seed=40, dtype=torch.float64)
    for k, (native, _) in enumerate(models):
        (native(x[k])[0].square() * cotangent[k]).sum().backward()
        for name, parameter in native.named_parameters():
            assert_close(weights[name].grad[k], parameter.grad)


# Per-sample and batched gradients


@each_option
def test_per_sample_gradients(options, backend):
    native, ours = build(backend, **options)
    samples = values(5, T, I, dtype=torch.float64)
    weights = {name: parameter.detach() for name, parameter in ours.named_parameters()}

    def loss(weights, sample):
        return functional_call(ours, weights, (sample,))[0].square().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(weights, samples)
    for k, sample in enumerate(samples):
        native.zero_grad()
        native(sample)[0].square().sum().backward()
        for name, parameter in native.named_parameters():
            assert_close(actual[name][k], parameter.grad)


@each_option
def test_batched_gradients(options, backend):
    native, ours = build(backend, **options)
    x = leaf(make_input(dtype=torch.float64, batch_first=native.batch_first))
    output = ours(x)[0]
    cotangents = values(4, *output.shape, dtype=torch.float64)
    inputs = [x, *ours.parameters()]
    actual = torch.autograd.grad(output, inputs, cotangents, is_grads_batched=True)
    output = native(x)[0]
    inputs = [x, *native.parameters()]
    expected = [
        torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
        for cotangent in cotangents
    ]
    assert_close(actual, tuple(torch.stack(rows) for rows in zip(*expected, strict=True)))


def test_vectorised_jacobian(backend):
    native, ours = build(backend)
    x = make_input(dtype=torch.float64, steps=3)
    jacobians = [
        torch.autograd.functional.jacobian(lambda x, m=module: m(x)[0], x, vectorize=vectorize)
        for module, vectorize in [(native, False), (ours, True)]
    ]
    assert_close(jacobians[1], jacobians[0])


# Forward-mode derivatives


def tangents_by_reverse_mode(function, arguments, tangents):
    """Jacobian-vector products by two reverse passes: what reverse mode alone can do."""
    return torch.autograd.functional.jvp(function, arguments, tangents)


@each_option
@pytest.mark.parametrize("form", ["batched", "unbatched"])
def test_jvp(options, form, backend):
    native, ours = build(backend, **options)
    x = make_input(form, dtype=torch.float64, batch_first=native.batch_first)
    arguments = (x, *make_hx(native, form, dtype=torch.float64))
    tangents = tuple(values(*t.shape, seed=9 + i, dtype=t.dtype) for i, t in enumerate(arguments))

    def function(module):
        return lambda x, h, c: flat(module(x, (h, c)))

    expected = tangents_by_reverse_mode(function(native), arguments, tangents)
    assert_close(jvp(function(ours), arguments, tangents), expected)


@each_option
def test_jvp_of_the_weights(options, backend):
    native, ours = build(backend, **options)
    x = make_input(dtype=torch.float64, batch_first=native.batch_first)
    names = [name for name, _ in ours.named_parameters()]
    weights = tuple(parameter.detach() for parameter in ours.parameters())
    tangents = tuple(values(*w.shape, seed=i, dtype=w.dtype) for i, w in enumerate(weights))

    def function(module):
        def call(*weights):
            return flat(functional_call(module, dict(zip(names, weights, strict=True)), (x,)))

        return call

    expected = tangents_by_reverse_mode(function(native), weights, tangents)
    assert_close(jvp(function(ours), weights, tangents), expected)


def test_dual_numbers(backend):
    native, ours = build(backend, num_layers=2)
    x, tangent = make_input(dtype=torch.float64), values(T, B, I, seed=5, dtype=torch.float64)
    with forward_ad.dual_level():
        output, (h_n, c_n) = ours(forward_ad.make_dual(x, tangent))
        actual = tuple(forward_ad.unpack_dual(t) for t in (output, h_n, c_n))
    expected = tangents_by_reverse_mode(lambda x: flat(native(x)), x, tangent)
    assert_close(tuple(dual.primal for dual in actual), expected[0])
    assert_close(tuple(dual.tangent for dual in actual), expected[1])


def tangent_of_gradients(module, x):
    """Forward over reverse, with no dual number before the backward pass."""
    x = leaf(x)
    (output, *_), inputs = flat(module(x)), [x, *module.parameters()]
    with forward_ad.dual_level():
        tangent = values(*output.shape, seed=7, dtype=output.dtype)
        grad_output = forward_ad.make_dual(torch.ones_like(output), tangent)
        gradients = torch.autograd.grad(output, inputs, grad_output)
        return tuple(forward_ad.unpack_dual(gradient).tangent for gradient in gradients)


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"proj_size": 1}], ids=["stack", "proj"])
def test_dual_numbers_of_a_backward_pass_alone(options, backend):
    native, ours = build(backend, **options)
    x = make_input(dtype=torch.float64)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = tangent_of_gradients(native, x)
    assert_close(tangent_of_gradients(ours, x), expected)


def test_jacobians_of_both_modes_agree(backend):
    _, ours = build(backend, 2, 2, num_layers=2)
    x = values(3, 2, 2, dtype=torch.float64)
    forward, reverse = (mode(lambda x: flat(ours(x)))(x) for mode in (jacfwd, jacrev))
    assert_close(forward, reverse)


def test_hessian(backend):
    native, ours = build(backend, 2, 2)
    x = values(3, 2, dtype=torch.float64)

    def loss(module):
        return lambda x: module(x)[0].square().sum()

    expected = torch.autograd.functional.hessian(loss(native), x)
    assert_close(hessian(loss(ours))(x), expected)
    assert_close(jacrev(jacrev(loss(ours)))(x), expected)


def test_hessian_vector_product(backend):
    native, ours = build(backend, num_layers=2)
    x, v = make_input(dtype=torch.float64), values(T, B, I, seed=5, dtype=torch.float64)

    def loss(module):
        return lambda x: module(x)[0].square().sum()

    _, expected = torch.autograd.functional.hvp(loss(native), x, v)
    _, actual = jvp(grad(loss(ours)), (x,), (v,))
    assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"proj_size": 1}], ids=["plain", "projected"])
def test_forward_mode_derivatives_are_those_of_finite_differences(options, backend):
    _, ours = build(backend, 2, 2, **options)
    arguments = [leaf(values(3, 2, 2, dtype=torch.float64))]
    arguments += [leaf(state) for state in make_hx(ours, dtype=torch.float64, batch=2)]
    assert torch.autograd.gradcheck(
        lambda x, h, c: flat(ours(x, (h, c))),
        arguments,
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
        check_undefined_grad=False,
    )


def test_third_derivatives(backend):
    native, ours = build(backend, 2, 2)
    results = []
    for module in (native, ours):
        x = leaf(values(3, 2, 2, dtype=torch.float64))
        value = module(x)[0].sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        results.append(gradient)
    assert_close(results[1], results[0])


# The cell


def test_transforms_of_the_cell(backend):
    native, ours = build_cells(dtype=torch.float64, backend=backend)
    x = values(4, B, I, dtype=torch.float64)
    assert_close(vmap(ours)(x), tuple(map(torch.stack, zip(*map(native, x), strict=True))))
    v = values(B, I, seed=3, dtype=torch.float64)
    assert_close(jvp(ours, (x[0],), (v,)), torch.autograd.functional.jvp(native, (x[0],), (v,)))
    assert_close(tangent_of_gradients(ours, x[0]), tangent_of_gradients(native, x[0]))


# Compilers


class Encoder(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        output, states = self.rnn(x)
        return output * 2 + states[0].sum()


def test_fx_tracing_keeps_the_layer_whole(backend):
    native, ours = build(backend)
    traces = [torch.fx.symbolic_trace(Encoder(rnn)) for rnn in (native, ours)]
    nodes = [[(node.op, str(node.target)) for node in trace.graph.nodes] for trace in traces]
    assert nodes[1] == nodes[0]
    assert ("call_module", "rnn") in nodes[1]
    x = make_input(dtype=torch.float64)
    assert_close(traces[1](x), Encoder(native)(x))


def test_fx_tracing_with_states(backend):
    native, ours = build(backend)

    class WithStates(nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn = rnn

        def forward(self, x, h, c):
            return self.rnn(x, (h, c))[0], self.rnn(x, hx=(h, c))[1][0]

    traces = [torch.fx.symbolic_trace(WithStates(rnn)) for rnn in (native, ours)]
    assert [node.op for node in traces[1].graph.nodes].count("call_module") == 2
    arguments = make_input(dtype=torch.float64), *make_hx(native, dtype=torch.float64)
    assert_close(traces[1](*arguments), traces[0](*arguments))


def test_fx_tracing_of_the_cell(backend):
    native, ours = build_cells(dtype=torch.float64, backend=backend)

    class Step(nn.Module):
        def __init__(self, cell):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            return self.cell(x)[0]

    trace = torch.fx.symbolic_trace(Step(ours))
    assert "call_module" in [node.op for node in trace.graph.nodes]
    x = values(B, I, dtype=torch.float64)
    assert_close(trace(x), native(x)[0])


@pytest.fixture
def compiler():
    """Compiles a layer in place, without a graph break."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield lambda module, **options: module.compile(
            fullgraph=True, backend="aot_eager", **options
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, OPTIONS["projected-everything"]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_graph_compilation(options, dtype, backend, compiler):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    compiler(ours)
    x = make_input(dtype=dtype, batch_first=native.batch_first)
    compare(native, ours, x, make_hx(native, dtype=dtype), backend=backend)
    native.eval()
    ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), native(x))


def test_full_graph_compilation_for_any_length(backend, compiler):
    native, ours = build(backend, num_layers=2)
    compiler(ours, dynamic=True)
    for steps, batch in [(6, 3), (9, 4), (4, 2)]:
        x = make_input(dtype=torch.float64, steps=steps, batch=batch)
        assert_close(ours(x), native(x))


def test_full_graph_compilation_sees_new_weights(backend, compiler):
    native, ours = build(backend)
    compiler(ours)
    x = make_input(dtype=torch.float64)
    ours(x)
    with torch.no_grad():
        for module in (native, ours):
            module.weight_hh_l0.mul_(0.5)
    assert_close(ours(x), native(x))


@pytest.mark.parametrize("options", [{}, OPTIONS["projected-everything"]], ids=["plain", "all"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
def test_export_for_any_length(options, strict, backend):
    native, ours = build(backend, **options)
    time = 1 if native.batch_first else 0
    example = make_input(dtype=torch.float64, batch_first=native.batch_first)
    with torch._dynamo.config.patch(allow_rnn=True):
        exported = torch.export.export(
            Encoder(ours).eval(),
            (example,),
            dynamic_shapes=({time: torch.export.Dim("T", min=2, max=64)},),
            strict=strict,
        )
    model = exported.module()
    for steps in [2, 6, 17]:
        x = make_input(dtype=torch.float64, steps=steps, batch_first=native.batch_first)
        assert_close(model(x), Encoder(native)(x))
