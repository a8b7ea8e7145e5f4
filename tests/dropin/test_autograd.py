"""Gradients: every parameter gets one, in every mode, as often as torch gives it."""

import pytest
import torch
from torch import nn

from .helpers import (
    FORMS,
    OPTIONS,
    B,
    H,
    I,
    P,
    T,
    assert_same_results,
    build_pair,
    compare,
    data_of,
    leaf,
    make_hx,
    make_input,
    map_input,
    run,
    tolerances,
    values,
    weighted_sum,
)

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

# Small enough for numerical derivatives.
CHECKED = {
    "plain": {},
    "no-bias": {"bias": False},
    "projected": {"proj_size": 1},
    "two-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
}


def close(actual, expected, backend):
    torch.testing.assert_close(actual, expected, **tolerances(torch.float64, backend))


# Every parameter gets a gradient


@each_option
@pytest.mark.parametrize("loss_on", [("output",), ("h_n",), ("c_n",), ("h_n", "c_n")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_loss_on_some_results(options, loss_on, dtype, backend):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    x = make_input(dtype=dtype, batch_first=native.batch_first)
    hx = make_hx(native, dtype=dtype)
    compare(native, ours, x, hx, loss_on=loss_on, backend=backend)


PARTS = {
    "one-direction-of-the-output": lambda output, h_n, c_n: output[..., : output.shape[-1] // 2],
    "first-layer-state": lambda output, h_n, c_n: h_n[0],
    "last-cell-state": lambda output, h_n, c_n: c_n[-1],
    "one-element": lambda output, h_n, c_n: output[-1, 1, 0],
    "one-step": lambda output, h_n, c_n: output[0],
    "nothing-really": lambda output, h_n, c_n: (output * 0).sum(),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2}, {"num_layers": 2, "bidirectional": True, "proj_size": P}],
    ids=["two-layers", "all"],
)
def test_unused_parameters_get_zeros(part, steps, options, backend):
    """DistributedDataParallel waits for the gradient of every parameter."""
    native, ours = build_pair(dtype=torch.float64, backend=backend, **options)
    x = make_input(dtype=torch.float64, steps=steps)
    for module in (native, ours):
        output, states = module(x)
        part(output, *states).sum().backward()
    for name, parameter in ours.named_parameters():
        expected, actual = getattr(native, name).grad, parameter.grad
        if expected is None:
            # torch leaves out a projection that the loss does not depend on.
            assert name.startswith("weight_hr"), name
            assert actual is None or not actual.any(), name
        else:
            assert actual is not None, name
            close(actual, expected, backend)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_gradient_from_the_output_alone(form, backend):
    _, ours = build_pair(I, H, 2, bidirectional=True, backend=backend)
    output, _ = ours(make_input(form))
    data_of(output).sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.parametrize(
    "wanted", ["input", "h0", "c0", "weight_ih_l0", "weight_hh_l1", "bias_hh_l0"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_gradient_alone(wanted, dtype, backend):
    native, ours = build_pair(I, H, 2, dtype=dtype, backend=backend)
    gradients = []
    for module in (native, ours):
        module.requires_grad_(False)
        leaves = {"input": make_input(dtype=dtype), **dict(module.named_parameters())}
        leaves["h0"], leaves["c0"] = make_hx(module, dtype=dtype)
        leaves[wanted].requires_grad_()
        output, (h_n, c_n) = module(leaves["input"], (leaves["h0"], leaves["c0"]))
        weighted_sum([output, h_n, c_n]).backward()
        gradients.append(leaves[wanted].grad)
        assert [n for n, tensor in leaves.items() if tensor.grad is not None] == [wanted]
    torch.testing.assert_close(gradients[1], gradients[0], **tolerances(dtype, backend))


def test_nothing_requires_a_gradient(backend):
    _, ours = build_pair(backend=backend)
    ours.requires_grad_(False)
    output, (h_n, c_n) = ours(make_input())
    assert not output.requires_grad
    assert not h_n.requires_grad
    assert not c_n.requires_grad


def test_results_require_gradients_and_are_no_leaves(backend):
    _, ours = build_pair(backend=backend)
    output, (h_n, c_n) = ours(make_input())
    for tensor in (output, h_n, c_n):
        assert tensor.requires_grad
        assert not tensor.is_leaf


def test_gradients_accumulate(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    for module in (native, ours):
        for seed in range(3):
            module(values(T, B, I, seed=seed, dtype=torch.float64))[0].square().sum().backward()
    for name, parameter in native.named_parameters():
        close(getattr(ours, name).grad, parameter.grad, backend)


def test_autograd_grad_names_its_inputs(backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend)
    x = leaf(make_input(dtype=torch.float64))
    gradients = [
        torch.autograd.grad(module(x)[0].sum(), [x, module.weight_hh_l0])
        for module in (native, ours)
    ]
    close(gradients[1], gradients[0], backend)
    assert ours.weight_hh_l0.grad is None
    assert x.grad is None


def test_a_state_used_elsewhere_too(backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    gradients = []
    for module in (native, ours):
        h0, c0 = (leaf(state) for state in make_hx(module, dtype=torch.float64))
        output, (h_n, c_n) = module(x, (h0, c0))
        (output * h_n + h0 * c_n).sum().backward()
        gradients.append((h0.grad, c0.grad))
    close(gradients[1], gradients[0], backend)


def test_the_same_tensor_as_both_states(backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend)
    gradients = []
    for module in (native, ours):
        state = leaf(make_hx(module, dtype=torch.float64)[0])
        output, _ = module(make_input(dtype=torch.float64), (state, state))
        output.square().sum().backward()
        gradients.append(state.grad)
    close(gradients[1], gradients[0], backend)


def test_truncated_backpropagation_through_time(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    for module in (native, ours):
        states = None
        for chunk in x.split(2):
            output, states = module(chunk, states)
            output.square().sum().backward()
            states = tuple(state.detach() for state in states)
    for name, parameter in native.named_parameters():
        close(getattr(ours, name).grad, parameter.grad, backend)


def test_backpropagation_through_a_chain_of_calls(backend):
    _, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    whole = run(ours, x)
    ours.zero_grad()
    first, states = ours(x[:4])
    second, states = ours(x[4:], states)
    weighted_sum([torch.cat([first, second]), *states]).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[f"grad of {name}"], rtol=1e-9, atol=1e-12)


# Modes and repetition


@pytest.mark.parametrize("form", FORMS)
@each_option
def test_backward_in_evaluation_mode(options, form, backend):
    if options.get("num_layers") == 2:
        options = {**options, "dropout": 0.5}
    native, ours = build_pair(dtype=torch.float64, backend=backend, **options)
    x = make_input(form, dtype=torch.float64, batch_first=native.batch_first)
    compare(
        native.eval(), ours.eval(), x, make_hx(native, form, dtype=torch.float64), backend=backend
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_second_backward_without_retain_graph_raises(dtype, backend):
    _, ours = build_pair(I, H, 2, dtype=dtype, backend=backend)
    output, _ = ours(make_input(dtype=dtype))
    loss = output.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_second_backward_with_retain_graph_adds_the_same(form, dtype, backend):
    _, ours = build_pair(I, H, 2, bidirectional=True, dtype=dtype, backend=backend)
    x = map_input(leaf, make_input(form, dtype=dtype))
    output, (h_n, c_n) = ours(x)
    loss = weighted_sum([data_of(output), h_n, c_n])
    loss.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in (data_of(x), *ours.parameters())]
    loss.backward()
    for tensor, gradient in zip((data_of(x), *ours.parameters()), first, strict=True):
        assert torch.equal(tensor.grad, 2 * gradient)


def test_two_losses_share_one_graph(backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend)
    for module in (native, ours):
        output, (h_n, c_n) = module(make_input(dtype=torch.float64))
        output.square().sum().backward(retain_graph=True)
        (h_n * c_n).sum().backward()
    for name, parameter in native.named_parameters():
        close(getattr(ours, name).grad, parameter.grad, backend)


# Derivatives are right


def checked_function(module):
    names = [name for name, _ in module.named_parameters()]

    def function(x, h0, c0, *weights):
        weights = dict(zip(names, weights, strict=True))
        output, states = torch.func.functional_call(module, weights, (x, (h0, c0)))
        return output, *states

    return function


def checked_arguments(module):
    x = values(3, 2, 2, dtype=torch.float64)
    hx = make_hx(module, dtype=torch.float64, batch=2)
    return [leaf(tensor) for tensor in (x, *hx, *module.parameters())]


@pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
def test_gradients_are_those_of_finite_differences(options, backend):
    _, ours = build_pair(2, 2, dtype=torch.float64, backend=backend, **options)
    assert torch.autograd.gradcheck(checked_function(ours), checked_arguments(ours))


@pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
def test_second_derivatives_are_those_of_finite_differences(options, backend):
    _, ours = build_pair(2, 2, dtype=torch.float64, backend=backend, **options)
    arguments = checked_arguments(ours)
    assert torch.autograd.gradgradcheck(checked_function(ours), arguments, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.float64),
        ({"num_layers": 2, "bidirectional": True, "proj_size": P}, torch.float64),
    ],
    ids=["plain-float32", "plain-float64", "all-float64"],
)
def test_a_gradient_penalty(options, dtype, form, training, backend):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    penalties = []
    for module in (native.train(training), ours.train(training)):
        x = map_input(leaf, make_input(form, dtype=dtype))
        hx = tuple(leaf(state) for state in make_hx(module, form, dtype=dtype))
        output, (h_n, c_n) = module(x, hx)
        loss = weighted_sum([data_of(output), h_n, c_n])
        gradients = torch.autograd.grad(loss, [data_of(x), *hx], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        penalty.backward()
        penalties.append([penalty.detach(), data_of(x).grad, *(state.grad for state in hx)])
    tolerance = tolerances(dtype, backend)
    torch.testing.assert_close(penalties[1], penalties[0], **tolerance)
    for name, parameter in ours.named_parameters():
        expected = getattr(native, name).grad
        torch.testing.assert_close(parameter.grad, expected, **tolerance)


# Saved tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "changed", ["input", "h0", "c0", "weight_ih_l1", "weight_hh_l0", "weight_hh_l1"]
)
def test_a_changed_saved_tensor_is_noticed(changed, dtype, backend):
    _, ours = build_pair(I, H, 2, dtype=dtype, backend=backend)
    tensors = {"input": make_input(dtype=dtype), **dict(ours.named_parameters())}
    tensors["h0"], tensors["c0"] = make_hx(ours, dtype=dtype)
    output, (h_n, c_n) = ours(tensors["input"], (tensors["h0"], tensors["c0"]))
    loss = weighted_sum([output, h_n, c_n])
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("changed", ["output", "h_n", "c_n"])
def test_a_changed_result_is_noticed_or_does_not_matter(changed, dtype, backend):
    """Never a silently wrong gradient."""
    _, ours = build_pair(I, H, 2, dtype=dtype, backend=backend)
    x = make_input(dtype=dtype)
    expected = run(ours, x)
    ours.zero_grad()
    output, (h_n, c_n) = ours(x)
    loss = weighted_sum([output, h_n, c_n])
    with torch.no_grad():
        {"output": output, "h_n": h_n, "c_n": c_n}[changed].add_(1)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[f"grad of {name}"])


def test_an_in_place_operation_on_a_state_is_differentiated(backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend)
    for module in (native, ours):
        _, (h_n, c_n) = module(make_input(dtype=torch.float64))
        h_n.mul_(3.0)
        c_n[:, 0] = 0.0
        (h_n.square().sum() + c_n.sum()).backward()
    for name, parameter in native.named_parameters():
        close(getattr(ours, name).grad, parameter.grad, backend)


def test_saved_tensors_can_be_stored_elsewhere(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x, packed = make_input(dtype=torch.float64), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy(force=True).copy()

    expected = run(native, x)
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        actual = run(ours, x)
    assert packed
    assert_same_results(actual, expected, backend)


def test_anomaly_detection_names_no_anomaly(backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        actual = run(ours, make_input())
    assert_same_results(actual, run(native, make_input()), backend)


def test_hooks_on_tensors_change_the_gradient(backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend)
    for module in (native, ours):
        output, (h_n, _) = module(make_input(dtype=torch.float64))
        output.register_hook(lambda gradient: gradient * 2)
        h_n.register_hook(lambda gradient: gradient.clamp(max=0.1))
        module.weight_hh_l0.register_hook(lambda gradient: gradient - 1)
        weighted_sum([output, h_n]).backward()
    for name, parameter in native.named_parameters():
        close(getattr(ours, name).grad, parameter.grad, backend)


# Memory layouts

INPUTS = {
    "transposed": lambda: values(B, T, I, dtype=torch.float64).transpose(0, 1),
    "strided": lambda: values(2 * T, B, 2 * I, dtype=torch.float64)[::2, :, ::2],
    "expanded-batch": lambda: values(T, 1, I, dtype=torch.float64).expand(T, B, I),
    "expanded-time": lambda: values(1, B, I, dtype=torch.float64).expand(T, B, I),
    "expanded-features": lambda: values(T, B, 1, dtype=torch.float64).expand(T, B, I),
    "features-first": lambda: values(I, B, T, dtype=torch.float64).permute(2, 1, 0),
    "offset": lambda: values(T + 1, B, I + 1, dtype=torch.float64)[1:, :, 1:],
}


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_any_layout_of_the_input(make, batch_first, backend):
    native, ours = build_pair(
        I, H, 2, dtype=torch.float64, batch_first=batch_first, backend=backend
    )
    base = make().requires_grad_()
    x = base.transpose(0, 1) if batch_first else base
    gradients = []
    for module in (native, ours):
        output, states = module(x)
        gradient = torch.autograd.grad(weighted_sum([output, *states]), [x, *module.parameters()])
        gradients.append([output.detach(), *gradient])
    close(gradients[1], gradients[0], backend)


STATES = {
    "transposed": lambda: values(B, 2, H, dtype=torch.float64).transpose(0, 1),
    "expanded": lambda: values(2, 1, H, dtype=torch.float64).expand(2, B, H),
    "one-for-all": lambda: values(1, 1, H, dtype=torch.float64).expand(2, B, H),
    "strided": lambda: values(2, B, 2 * H, dtype=torch.float64)[:, :, ::2],
    "a-part": lambda: values(2, B, 2 * H, dtype=torch.float64)[:, :, H:],
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_any_layout_of_the_states(make, backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x, h0, c0 = make_input(dtype=torch.float64), make().requires_grad_(), make().requires_grad_()
    gradients = []
    for module in (native, ours):
        output, states = module(x, (h0, c0))
        loss = weighted_sum([output, *states])
        gradients.append([output.detach(), *torch.autograd.grad(loss, [h0, c0])])
    close(gradients[1], gradients[0], backend)


COTANGENTS = {
    "expanded": lambda like: torch.ones((), dtype=like.dtype).expand_as(like),
    "expanded-features": lambda like: values(*like.shape[:-1], 1, dtype=like.dtype).expand_as(like),
    "transposed": lambda like: values(*like.mT.shape, dtype=like.dtype).mT,
    "strided": lambda like: values(*like.shape, 2, dtype=like.dtype)[..., 0],
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("make", COTANGENTS.values(), ids=COTANGENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS["projected-everything"]], ids=["plain", "all"])
def test_any_layout_of_the_incoming_gradients(make, dtype, options, backend):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    x = leaf(make_input(dtype=dtype, batch_first=native.batch_first))
    gradients = []
    for module in (native, ours):
        output, states = module(x)
        results = [output, *states]
        cotangents = [make(result) for result in results]
        gradients.append(torch.autograd.grad(results, [x, *module.parameters()], cotangents))
    torch.testing.assert_close(gradients[1], gradients[0], **tolerances(dtype, backend))


def test_weights_of_any_layout(backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend)
    for module in (native, ours):
        module.weight_hh_l0 = nn.Parameter(values(H, 4 * H, dtype=torch.float64).t())
        module.weight_ih_l0 = nn.Parameter(values(4 * H, 2 * I, dtype=torch.float64)[:, ::2])
        module.bias_ih_l0 = nn.Parameter(values(8 * H, dtype=torch.float64)[::2])
    compare(native, ours, make_input(dtype=torch.float64), backend=backend)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_input_do_not_depend_on_frozen_weights(frozen, form, backend):
    _, ours = build_pair(I, H, 2, bidirectional=True, dtype=torch.float64, backend=backend)
    expected = run(ours, make_input(form, dtype=torch.float64))["grad of input"]
    ours.requires_grad_(not frozen)
    x = map_input(leaf, make_input(form, dtype=torch.float64))
    output, states = ours(x)
    weighted_sum([data_of(output), *states]).backward()
    torch.testing.assert_close(data_of(x).grad, expected)
