"""`weight_dropout`: DropConnect on W_hh.

A mask is recovered from the gradient of W_hh, which is zero exactly where a weight is dropped. The
oracle then has to agree when it multiplies W_hh by that mask and 1/(1 - p).
"""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from .oracle import (
    B,
    T,
    assert_same,
    build,
    finish,
    leaf,
    make_hx,
    make_resets,
    make_x,
    masks_from_gradients,
    options,
    pack,
    run,
    run_oracle,
)

pytestmark = pytest.mark.usefixtures("backend")


def check_with_recovered_mask(module, x, hx, p, seed, **arguments):
    _, kept = masks_from_gradients(module, x, hx, seed, **arguments)
    masks = [mask.double() / (1 - p) for mask in kept]
    expected = run_oracle(module, x, hx, weight_masks=masks, **arguments)
    actual = run(module, x, hx, seed=seed, **arguments)
    assert_same(actual, expected)
    names = [name for name in actual if name.startswith("grad of weight_hh")]
    for name, mask in zip(names, kept, strict=True):
        assert torch.equal(actual[name] != 0, mask)
    return kept


@options
@pytest.mark.parametrize("p", [0.4, 0.7])
def test_one_mask_for_all_steps_and_sequences(options, p):
    module = build(**options, weight_dropout=p)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    kept = check_with_recovered_mask(module, x, hx, p, 3, return_cells=True)
    for mask in kept:
        assert mask.any()
        assert not mask.all()


@options
def test_float32(options):
    module = build(**options, weight_dropout=0.4, dtype=torch.float32)
    x = make_x(batch_first=module.batch_first, dtype=torch.float32)
    check_with_recovered_mask(module, x, make_hx(module, dtype=torch.float32), 0.4, 3)


@options
@pytest.mark.parametrize("form", ["packed", "unbatched", "lengths"])
def test_forms(options, form):
    module = build(**options, weight_dropout=0.4)
    if form == "unbatched":
        check_with_recovered_mask(module, make_x(batch=None), make_hx(module, None), 0.4, 3)
    elif form == "packed":
        x = pack(make_x(), [2, 6, 1, 4])
        check_with_recovered_mask(module, x, make_hx(module), 0.4, 3, return_cells=True)
    else:
        x, hx = make_x(batch_first=module.batch_first), make_hx(module)
        check_with_recovered_mask(module, x, hx, 0.4, 3, lengths=[2, 6, 0, 4], return_cells=True)


def test_resets_clip_and_recurrent_dropout():
    options = {"num_layers": 2, "weight_dropout": 0.3, "recurrent_dropout": 0.4}
    module = build(**options, cell_clip=0.6)
    x, hx = make_x(), make_hx(module)
    resets = make_resets(T, B)
    resets[0] = False  # or h_0 would have no gradient at all
    h_kept, w_kept = masks_from_gradients(build(**options), x, hx, 3)
    arguments = {"resets": resets, "return_cells": True}
    expected = run_oracle(
        module,
        x,
        hx,
        recurrent_masks=h_kept.double() / 0.6,
        weight_masks=[mask.double() / 0.7 for mask in w_kept],
        cell_clip=0.6,
        **arguments,
    )
    assert_same(run(module, x, hx, seed=3, **arguments), expected)


def test_the_statistics_of_the_masks():
    p, hidden = 0.3, 24
    module = build(3, hidden, num_layers=2, bidirectional=True, weight_dropout=p)
    x, hx = make_x(steps=2), make_hx(module)
    kept = torch.stack(masks_from_gradients(module, x, hx, 3)[1]).double()
    count = kept[0].numel()
    for mask in kept:
        assert mask.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / count) ** 0.5)
        for gate in mask.chunk(4):
            assert len(gate.unique(dim=0)) == len(gate.unique(dim=1).t()) == hidden
    correlation = torch.corrcoef(torch.cat([mask.reshape(4, -1) for mask in kept]))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / hidden
    # Another forward pass, other masks.
    other = torch.stack(masks_from_gradients(module, x, hx, 4)[1]).double()
    assert torch.corrcoef(torch.stack([kept.flatten(), other.flatten()]))[0, 1].abs() < 0.1


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_off_is_off(training):
    p = 0.0 if training else 0.5
    module = build(num_layers=2, bidirectional=True, weight_dropout=p).train(training)
    plain = build(num_layers=2, bidirectional=True).train(training)
    x, hx = make_x(), make_hx(module)
    before = torch.random.get_rng_state()
    output, _ = module(x, hx)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(output, plain(x, hx)[0])
    assert_same(run(module, x, hx), run(plain, x, hx))


def test_the_weights_themselves_stay():
    module = build(num_layers=2, weight_dropout=0.5)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    kept = list(module.parameters())
    run(module, make_x(), make_hx(module))
    assert list(module.state_dict()) == list(before)
    for (name, parameter), same in zip(module.named_parameters(), kept, strict=True):
        assert parameter is same
        assert torch.equal(parameter, before[name])


def test_the_generator_decides():
    module = build(num_layers=2, weight_dropout=0.5)
    x, hx = make_x(), make_hx(module)
    torch.manual_seed(5)
    first, second = module(x, hx)[0], module(x, hx)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        assert torch.equal(module(x, hx)[0], first)
    assert torch.equal(module(x, hx)[0], first)
    assert torch.equal(module(x, hx)[0], second)


def test_checkpointing_repeats_the_masks():
    module = build(num_layers=2, weight_dropout=0.5)
    x, hx = make_x(), make_hx(module)
    expected = run(module, x, hx, seed=5)
    data, states = leaf(x), tuple(leaf(state) for state in hx)
    module.zero_grad()
    torch.manual_seed(5)
    output, (h_n, c_n) = checkpoint(module, data, states, use_reentrant=False)
    torch.rand(3)
    weights = dict(module.named_parameters())
    results = finish({"output": output, "h_n": h_n, "c_n": c_n}, data, states, weights, None)
    assert_same(results, expected)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 1}], ids=str)
def test_numerical_derivatives(options):
    module = build(2, 3, weight_dropout=0.4, **options)
    names = [name for name, _ in module.named_parameters()]
    x, hx = make_x(steps=3, batch=2, size=2), make_hx(module, 2)

    def function(x, h0, c0, *weights):
        torch.manual_seed(5)
        weights = dict(zip(names, weights, strict=True))
        output, states = torch.func.functional_call(module, weights, (x, (h0, c0)))
        return output, *states

    inputs = [leaf(t) for t in (x, *hx, *module.parameters())]
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)


def test_the_expectation_is_the_plain_layers():
    module = build(1, 4, bias=False, weight_dropout=0.25)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.mul_(1e-3)  # the gates are linear in such small sums
    hx = make_hx(module, 1)[0], torch.zeros(1, 1, 4, dtype=torch.float64)
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        draws = torch.stack([module(x, hx)[1][1] for _ in range(600)])
        expected = module.eval()(x, hx)[1][1]
    error = (draws.mean(0) - expected).abs()
    assert (error < 5 * draws.std(0) / len(draws) ** 0.5 + 1e-9).all()
    assert (draws.std(0) > 0).all()
