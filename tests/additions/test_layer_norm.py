"""`LayerNormLSTM` against its equations in float64, one sequence at a time, and as a module."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_lstm
from fused_lstm import LayerNormLSTM

T, B, I, H, P = 6, 4, 3, 5, 2  # noqa: E741  (the field's name for the input size)
EPS = 1e-5
LENGTHS = [4, 0, 6, 1]
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3
RESETS[0] = torch.tensor([True, False, False, False])

GRADIENTS = ("input", "h_0", "c_0")


def normalized(z):
    return (z - z.mean()) / ((z - z.mean()).square().mean() + EPS).sqrt()


def one_sequence(own, x, h, c, resets, zoneout, clip):
    """One direction over the steps of one sequence x [length, I]; h [P], c [H]."""
    hs, cs = [], []
    z_h, z_c = zoneout
    for x_t, reset in zip(x, resets, strict=True):
        if reset:
            h, c = torch.zeros_like(h), torch.zeros_like(c)
        a = own["gain_ih"] * normalized(own["weight_ih"] @ x_t)
        a = a + own["gain_hh"] * normalized(own["weight_hh"] @ h)
        a = a + own.get("bias_ih", 0) + own.get("bias_hh", 0)
        i, f, g, o = a.chunk(4)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if clip is not None:
            new_c = new_c.clamp(-clip, clip)
        new_h = own["gain_c"] * normalized(new_c) + own.get("bias_c", 0)
        new_h = o.sigmoid() * new_h.tanh()
        if "weight_hr" in own:
            new_h = own["weight_hr"] @ new_h
        h, c = z_h * h + (1 - z_h) * new_h, z_c * c + (1 - z_c) * new_c
        hs.append(h)
        cs.append(c)
    return hs, cs, h, c


def oracle(module, weights, x, h_0, c_0, lengths=None, resets=None):
    """The whole stack, [T, B, ...], in the dtype of the weights."""
    steps, batch = x.shape[:2]
    lengths = [steps] * batch if lengths is None else lengths
    flags = torch.zeros(steps, batch, dtype=torch.bool) if resets is None else resets
    zoneout = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout,) * 2
    directions = 2 if module.bidirectional else 1
    h_n, c_n = [], []
    for layer, direction in itertools.product(range(module.num_layers), range(directions)):
        suffix = f"_l{layer}" + "_reverse" * direction
        own = {n.removesuffix(suffix): w for n, w in weights.items() if n.endswith(suffix)}
        if direction == 0:
            outputs, cells = [], []
        k = layer * directions + direction
        of_h, of_c, last_h, last_c = [], [], [], []
        for b, length in enumerate(lengths):
            order = list(range(length))[:: -1 if direction else 1]
            hs, cs, h, c = one_sequence(
                own, [x[t, b] for t in order], h_0[k, b], c_0[k, b], flags[:length, b],
                zoneout, module.cell_clip,
            )  # fmt: skip
            padding = range(steps - length)
            h_zeros, c_zeros = torch.zeros_like(h_0[0, 0]), torch.zeros_like(c_0[0, 0])
            if direction:
                hs, cs = hs[::-1], cs[::-1]
            of_h.append(torch.stack([*hs, *(h_zeros for _ in padding)]))
            of_c.append(torch.stack([*cs, *(c_zeros for _ in padding)]))
            last_h.append(h)
            last_c.append(c)
        outputs.append(torch.stack(of_h, 1))
        cells.append(torch.stack(of_c, 1))
        h_n.append(torch.stack(last_h))
        c_n.append(torch.stack(last_c))
        if direction == directions - 1:
            x = torch.cat(outputs, -1)
    return x, torch.stack(h_n), torch.stack(c_n), torch.cat(cells, -1)


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = LayerNormLSTM(I, H, dtype=torch.float64, **options)
    with torch.no_grad():
        # What a trained layer has: neither gains of 1 nor biases of 0.
        for name, parameter in module.named_parameters():
            if name.startswith(("gain", "bias")):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return module.eval().to(dtype)


def make_inputs(module, dtype=torch.float64):
    states = module.num_layers * (2 if module.bidirectional else 1)
    sizes = ((T, B, I), (states, B, module.proj_size or H), (states, B, H))
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
    return [t.to(dtype).requires_grad_() for t in draw]


def results(function, weights, inputs):
    """Outputs, and gradients of the inputs and of the weights."""
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(2)
    # In float32 first, so that every dtype gets the same ones.
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    variables = [*inputs, *weights.values()]
    grads = torch.autograd.grad(outputs, variables, cotangents)
    names = ["output", "h_n", "c_n", "cells", *GRADIENTS, *weights]
    return dict(zip(names, [*outputs, *grads], strict=True))


def compare(module, inputs, dtype, **sequence):
    weights = dict(module.named_parameters())

    def ours(x, h_0, c_0):
        output, (h_n, c_n), cells = module(x, (h_0, c_0), return_cells=True, **sequence)
        return output, h_n, c_n, cells

    def expected(wide, moved=None):
        def copy_of(t):
            t = t.detach().to(wide)
            if moved is not None:
                # By about a rounding: as good an input as the other.
                noise = torch.randn(t.shape, generator=moved, dtype=wide)
                t = t * (1 + torch.finfo(wide).eps * noise)
            return t.requires_grad_()

        own = {name: copy_of(weight) for name, weight in weights.items()}
        own_inputs = [copy_of(t) for t in inputs]
        return results(lambda *t: oracle(module, own, *t, **sequence), own, own_inputs)

    actual, exact = results(ours, weights, inputs), expected(torch.float64)
    if dtype == torch.float64:
        for name, value in actual.items():
            torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-11)
        return
    # Rows of little variance magnify what is rounded: of so few values the error of one evaluation
    # is a matter of luck.
    several = [expected(dtype, torch.Generator().manual_seed(seed)) for seed in range(4)]
    for name, value in actual.items():
        errors = [(each[name].double() - exact[name]).abs().max() for each in several]
        budget = 2 * max(errors) + torch.finfo(dtype).eps * exact[name].abs().max()
        assert (value.double() - exact[name]).abs().max() <= budget, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("options", "sequence"),
    [
        ({}, {}),
        ({"num_layers": 2, "bidirectional": True}, {}),
        ({"bias": False, "proj_size": P}, {}),
        ({"num_layers": 2, "bidirectional": True, "proj_size": P}, {"lengths": LENGTHS}),
        ({"num_layers": 2}, {"resets": RESETS}),
        ({"zoneout": (0.2, 0.4), "cell_clip": 0.5}, {}),
        (
            {"num_layers": 2, "zoneout": 0.3, "cell_clip": 0.6, "proj_size": P},
            {"lengths": LENGTHS, "resets": RESETS},
        ),
    ],
    ids=["plain", "two-layers-both-ways", "projected", "lengths", "resets", "zoneout-clip", "all"],
)
def test_forward_and_all_gradients(backend, dtype, options, sequence):
    module = make(dtype, **options)
    compare(module, make_inputs(module, dtype), dtype, **sequence)


def test_a_single_unit(backend):
    """Its cell state has no variance: what is normalized is 0, and eps keeps gradients finite."""
    module = LayerNormLSTM(I, 1, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    output, _ = module(x)
    torch.testing.assert_close(output, torch.zeros_like(output))
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_padding_may_hold_nan(backend):
    module = make(num_layers=2, bidirectional=True)
    inputs = make_inputs(module)
    clean = results(
        lambda x, h, c: (module(x, (h, c), lengths=LENGTHS)[0], h, c, c),
        dict(module.named_parameters()), inputs,
    )  # fmt: skip
    dirty_x = inputs[0].detach().clone()
    for b, length in enumerate(LENGTHS):
        dirty_x[length:, b] = float("nan")
    dirty = results(
        lambda x, h, c: (module(x, (h, c), lengths=LENGTHS)[0], h, c, c),
        dict(module.named_parameters()), [dirty_x.requires_grad_(), *inputs[1:]],
    )  # fmt: skip
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_equals_lengths(backend, batch_first):
    module = make(num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(B, T, I, dtype=torch.float64)
    lengths = [4, 2, 6, 1]
    x = x if batch_first else x.transpose(0, 1)
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    rows, states, cells = module(packed, return_cells=True)
    assert isinstance(rows, PackedSequence)
    expected, expected_states, expected_cells = module(x, lengths=lengths, return_cells=True)
    for actual, padded in ((rows, expected), (cells, expected_cells)):
        back = pad_packed_sequence(actual, batch_first=batch_first, total_length=T)[0]
        torch.testing.assert_close(back, padded)
    torch.testing.assert_close(states, expected_states)


def test_without_a_batch(backend):
    module = make(num_layers=2)
    x = torch.randn(T, I, dtype=torch.float64)
    output, (h_n, c_n) = module(x)
    batched, (h_b, c_b) = module(x.unsqueeze(1))
    torch.testing.assert_close((output, h_n, c_n), (batched[:, 0], h_b[:, 0], c_b[:, 0]))


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3, "cell_clip": 0.5}])
def test_second_derivatives_and_forward_mode(backend, options):
    module = make(proj_size=P, **options)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    weight = module.weight_hh_l0

    def call(x, weight, gain):
        parameters = {"weight_hh_l0": weight, "gain_hh_l0": gain}
        return torch.func.functional_call(module, parameters, (x,))[0]

    arguments = (x, weight, module.gain_hh_l0)
    assert torch.autograd.gradcheck(call, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, arguments, check_batched_grad=True)


def test_vmap(backend):
    if backend == "native":
        pytest.skip("a transform takes plain PyTorch; test_second_derivatives has the kernels")
    module = make()
    x = torch.randn(3, T, B, I, dtype=torch.float64)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: module(x)[0])(x)
        torch.testing.assert_close(mapped, torch.stack([module(each)[0] for each in x]))


def test_training_draws_masks_and_evaluation_none(backend):
    module = make(recurrent_dropout=0.4, weight_dropout=0.4, zoneout=0.3).train()
    x = torch.randn(T, B, I, dtype=torch.float64)

    def call(seed):
        torch.manual_seed(seed)
        return module(x)[0]

    assert torch.equal(call(0), call(0))
    assert not torch.equal(call(0), call(1))
    module.eval()
    assert torch.equal(call(0), call(1))
    output = module.train()(x)[0]
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [8, 32])
def test_gradients_under_autocast_are_finite_and_near(backend, dtype, hidden):
    """From states of zero: their product has no variance, and 1 / √eps is large for 16 bits."""
    module = LayerNormLSTM(I, hidden)
    x = torch.randn(T, B, I)
    gradients = []
    for enabled in (True, False):
        module.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = module(x)[0]
        output.float().square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        error = (gradient - gradients[1][name]).norm() / gradients[1][name].norm()
        assert error < 0.1, name


@pytest.mark.parametrize("name", ["gain_ih_l0", "gain_hh_l0", "gain_c_l0", "bias_c_l0"])
@pytest.mark.parametrize("bad", ["short", "float64"])
def test_gains_that_do_not_fit_are_refused(backend, name, bad):
    module = LayerNormLSTM(I, H)
    value = torch.ones(1) if bad == "short" else getattr(module, name).detach().double()
    setattr(module, name, nn.Parameter(value))
    with pytest.raises(RuntimeError, match=name.removesuffix("_l0")):
        module(torch.randn(T, B, I))


def test_lengths_of_a_recorded_program_are_checked_when_it_runs():
    module = make(torch.float32)
    x = torch.randn(3, 2, I)
    compiled = torch.compile(lambda x, n: module(x, lengths=n)[0], backend="aot_eager")
    lengths = torch.tensor([1, 3])
    torch.testing.assert_close(compiled(x, lengths), module(x, lengths=lengths)[0])
    with pytest.raises(ValueError, match="lengths"):
        compiled(x, torch.tensor([9, 1]))
    several = torch.tensor([[1, 3], [2, 0]])
    mapped = torch.func.vmap(lambda n: module(x, lengths=n)[0])(several)
    torch.testing.assert_close(mapped, torch.stack([module(x, lengths=n)[0] for n in several]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    module = make(torch.float32, num_layers=2)
    x = torch.randn(T, B, I)
    expected = module(x)[0]
    with torch.autocast("cpu", dtype=dtype):
        assert module(x)[0].dtype == dtype
        assert (module(x)[0].float() - expected).square().mean().sqrt() < 0.03
    own = module.to(dtype)(x.to(dtype))[0]
    assert own.dtype == dtype
    assert (own.float() - expected).square().mean().sqrt() < 0.03


def test_parameters_and_their_first_values():
    module = LayerNormLSTM(I, H, 2, bidirectional=True, forget_bias=1.0)
    plain = nn.LSTM(I, H, 2, bidirectional=True)
    own = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert own[name] == tuple(parameter.shape)
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        for name, size in (("gain_ih", 4 * H), ("gain_hh", 4 * H), ("gain_c", H)):
            gain = getattr(module, name + suffix)
            assert torch.equal(gain, torch.ones(size))
        assert torch.equal(getattr(module, "bias_c" + suffix), torch.zeros(H))
        assert torch.equal(getattr(module, "bias_hh" + suffix), torch.zeros(4 * H))
        bias = getattr(module, "bias_ih" + suffix)
        assert torch.equal(bias[H : 2 * H], torch.ones(H))
        assert bias.sum() == H
        bound = H**-0.5
        weight = getattr(module, "weight_hh" + suffix)
        assert weight.std() > 0
        assert weight.abs().max() <= bound
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    module.reset_parameters()
    assert torch.equal(module.gain_c_l1, torch.ones(H))
    assert module.bias_ih_l0.sum() == H
    without = dict(LayerNormLSTM(I, H, bias=False).named_parameters())
    assert not any("bias" in name for name in without)


def test_copies_and_checkpoints_keep_everything():
    module = make(zoneout=0.1)
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected = module(x)[0]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x)[0], expected)
        assert copied.zoneout == 0.1
    other = LayerNormLSTM(I, H, zoneout=0.1, dtype=torch.float64).eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], expected)


def test_what_torch_cannot_express_is_not_passed_off_as_its_own():
    module = make()
    with pytest.raises(ValueError, match="layer normalization"):
        module.to_torch()
    model = nn.Sequential(module)
    fused_lstm.restore_lstm(model)
    assert type(model[0]) is LayerNormLSTM


def test_explains_itself_and_refuses_backends_without_it():
    module = make()
    explanation = fused_lstm.explain(module)
    assert explanation.backend in ("native", "reference")
    assert "layer_norm" in str(explanation)
    assert "layer_norm" in explanation.reasons["aten"]
    refused = make(backend="aten")
    with pytest.raises(fused_lstm.BackendUnavailableError, match="layer_norm"):
        refused(torch.randn(T, B, I, dtype=torch.float64))


def test_a_compiled_model():
    module = make(torch.float32)
    x = torch.randn(3, 2, I)
    compiled = torch.compile(lambda x: module(x)[0], backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x)[0])


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan")])
def test_a_bad_eps_is_refused(eps):
    with pytest.raises(ValueError, match="eps"):
        LayerNormLSTM(I, H, eps=eps)
