"""`cell_clip` and `forget_bias`."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import fused_lstm

from .oracle import (
    B,
    H,
    I,
    P,
    T,
    assert_same,
    build,
    compare,
    leaf,
    make_hx,
    make_resets,
    make_x,
    pack,
    run,
)

OPTIONS = {
    "plain": {},
    "two-layers": {"num_layers": 2, "bias": False, "batch_first": True},
    "bidirectional": {"bidirectional": True},
    "projected": {"proj_size": P},
    "everything": {"num_layers": 3, "bidirectional": True, "proj_size": P, "batch_first": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
backends = pytest.mark.usefixtures("backend")


@backends
@options
@pytest.mark.parametrize(("clip", "training"), [(0.1, True), (0.5, False), (3, True)])
def test_results_and_gradients(options, clip, training):
    module = build(**options, cell_clip=clip).train(training)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    results = compare(module, x, hx, modifiers={"cell_clip": clip}, return_cells=True)
    assert results["cells"].abs().max() <= clip
    assert results["c_n"].abs().max() <= clip
    if clip < 1:
        # It does clip, on both sides, and not everything.
        assert (results["cells"] == clip).any()
        assert (results["cells"] == -clip).any()
        assert (results["cells"].abs() < clip).any()


@backends
@options
def test_float32(options):
    module = build(**options, cell_clip=0.3, dtype=torch.float32)
    x = make_x(batch_first=module.batch_first, dtype=torch.float32)
    hx = make_hx(module, dtype=torch.float32)
    results = compare(module, x, hx, modifiers={"cell_clip": 0.3}, return_cells=True)
    assert results["cells"].abs().max() <= torch.tensor(0.3)


@backends
@options
@pytest.mark.parametrize("form", ["packed", "unbatched", "lengths", "no-hx"])
def test_forms(options, form):
    module = build(**options, cell_clip=0.4)
    x, hx, arguments = make_x(batch_first=module.batch_first), make_hx(module), {}
    if form == "packed":
        x = pack(make_x(), [2, 6, 1, 4])
    elif form == "unbatched":
        x, hx = make_x(batch=None), make_hx(module, None)
    elif form == "lengths":
        arguments["lengths"] = [2, 6, 0, 4]
    else:
        hx = None
    compare(module, x, hx, modifiers={"cell_clip": 0.4}, return_cells=True, **arguments)


@backends
def test_an_initial_state_beyond_the_clip_is_not_touched_before_its_first_step():
    module = build(cell_clip=0.4)
    h0, c0 = make_hx(module)
    c0 = c0.sign() * 2
    _, (h_n, c_n) = module(make_x(), (h0, c0), lengths=[0, 1, 6, 0])
    assert torch.equal(c_n[:, 0], c0[:, 0])
    assert c_n[:, 1:3].abs().max() <= 0.4
    assert torch.equal(h_n[:, 3], h0[:, 3])
    compare(module, make_x(), (h0, c0), modifiers={"cell_clip": 0.4}, return_cells=True)


@backends
def test_no_gradient_passes_a_clipped_cell():
    module = build(cell_clip=0.2)
    with torch.no_grad():
        module.bias_ih_l0[:H] = 20  # i = 1
        module.bias_ih_l0[2 * H : 3 * H] = 20  # g = 1
    h0, c0 = make_hx(module)
    x, hx = leaf(make_x()), (leaf(h0), leaf(c0.abs()))
    output, (_, c_n), cells = module(x, hx, return_cells=True)
    assert (cells == 0.2).all()
    for gradient in torch.autograd.grad(c_n.sum() + cells.sum(), (x, *hx), retain_graph=True):
        assert not gradient.any()
    # The output gate is not clipped.
    assert all(g.any() for g in torch.autograd.grad(output.sum(), (x, hx[0])))


@backends
def test_a_clip_that_is_never_reached_changes_nothing():
    module, plain = build(num_layers=2, cell_clip=1e6), build(num_layers=2)
    x, hx = make_x(), make_hx(module)
    assert_same(run(module, x, hx), run(plain, x, hx))
    unlimited = build(num_layers=2, cell_clip=None)
    assert_same(run(unlimited, x, hx), run(plain, x, hx), rtol=0, atol=0)


@backends
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 1}], ids=str)
def test_numerical_derivatives(options):
    module = build(2, 3, cell_clip=0.3, **options)
    names = [name for name, _ in module.named_parameters()]
    x, hx = make_x(steps=3, batch=2, size=2), make_hx(module, 2)

    def function(x, h0, c0, *weights):
        weights = dict(zip(names, weights, strict=True))
        output, states = torch.func.functional_call(module, weights, (x, (h0, c0)))
        return output, *states

    inputs = [leaf(t) for t in (x, *hx, *module.parameters())]
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)


@backends
@pytest.mark.parametrize("hidden", [1, 8, 17, 40])
def test_sizes_around_the_width_of_a_vector(hidden):
    batch = 19
    options = {"num_layers": 2, "bidirectional": True, "zoneout": (0.2, 0.3), "cell_clip": 0.25}
    module = build(11, hidden, **options, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.div_(hidden**0.5)
    x = make_x(batch=batch, size=11, dtype=torch.float32)
    hx = make_hx(module, batch, dtype=torch.float32)
    lengths = [(5 * b) % (T + 1) for b in range(batch)]
    modifiers = {"cell_clip": 0.25, "zoneout_h": [0.2] * 4, "zoneout_c": [0.3] * 4}
    compare(module, x, hx, modifiers=modifiers, lengths=lengths, return_cells=True)


@backends
def test_clip_with_resets():
    module = build(num_layers=2, proj_size=P, cell_clip=0.3)
    arguments = {"resets": make_resets(T, B), "return_cells": True}
    compare(module, make_x(), make_hx(module), modifiers={"cell_clip": 0.3}, **arguments)


# The initial bias of the forget gate


@pytest.mark.parametrize("value", [1.0, -0.5, 0.0, 2], ids=str)
@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if o.get("bias", True)], ids=str)
def test_forget_bias(value, options):
    torch.manual_seed(0)
    module = fused_lstm.LSTM(I, H, **options, forget_bias=value)
    drawn_next = torch.rand(3)
    torch.manual_seed(0)
    plain = nn.LSTM(I, H, **options)
    assert torch.equal(torch.rand(3), drawn_next)
    forget = slice(H, 2 * H)
    count = 0
    for (name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert ours.requires_grad
        wanted = theirs.detach().clone()
        if name.startswith("bias_ih"):
            wanted[forget] = value
            count += 1
        elif name.startswith("bias_hh"):
            wanted[forget] = 0
        assert torch.equal(ours, wanted), name
    assert count == module.num_layers * (2 if module.bidirectional else 1)


def test_forget_bias_is_set_again_by_reset_parameters():
    module = fused_lstm.LSTM(I, H, 2, bidirectional=True, forget_bias=1.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    torch.manual_seed(1)
    module.reset_parameters()
    for name, parameter in module.named_parameters():
        assert (parameter != 7).all()
        if name.startswith("bias"):
            value = 1.5 if name.startswith("bias_ih") else 0.0
            assert (parameter[H : 2 * H] == value).all()
            assert (parameter[:H].abs() <= 1 / math.sqrt(H)).all()
            assert (parameter[2 * H :].abs() <= 1 / math.sqrt(H)).all()
            assert len(parameter[2 * H :].unique()) == 2 * H


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_forget_bias_in_other_dtypes(dtype):
    module = fused_lstm.LSTM(I, H, forget_bias=0.3, dtype=dtype)
    assert torch.equal(module.bias_ih_l0[H : 2 * H], torch.full((H,), 0.3, dtype=dtype))
    assert not module.bias_hh_l0[H : 2 * H].any()


def test_forget_bias_on_the_meta_device():
    module = fused_lstm.LSTM(I, H, forget_bias=1.0, device="meta")
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert (module.bias_ih_l0[H : 2 * H] == 1).all()


def test_forget_bias_is_initialisation_only():
    """The layer computes with its parameters, whatever they were set to at first."""
    module = fused_lstm.LSTM(I, H, forget_bias=5.0, dtype=torch.float64)
    other = build()
    module.load_state_dict(other.state_dict())
    x = make_x()
    assert torch.equal(module(x)[0], other(x)[0])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_forget_bias_needs_a_bias(value):
    with pytest.raises(ValueError, match="forget_bias") as raised:
        fused_lstm.LSTM(I, H, bias=False, forget_bias=value)
    assert "bias" in str(raised.value).replace("forget_bias", "")
    assert str(value) in str(raised.value)
    fused_lstm.LSTM(I, H, bias=False, forget_bias=None)
