"""`zoneout`: units that keep their previous value, in training by chance, in evaluation in part."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from .oracle import (
    CLOSE,
    B,
    H,
    I,
    P,
    T,
    assert_same,
    build,
    compare,
    finish,
    leaf,
    loss_of,
    lstm_oracle,
    make_hx,
    make_resets,
    make_x,
    options,
    pack,
    run,
    run_oracle,
    zoneout_in_evaluation,
)

pytestmark = pytest.mark.usefixtures("backend")

PROBABILITIES = [0.3, (0.2, 0.6), (0.4, 0.0), (0.0, 0.4)]
probabilities = pytest.mark.parametrize("p", PROBABILITIES, ids=str)


# Evaluation


@options
@probabilities
def test_evaluation_takes_the_expectation(options, p):
    module = build(**options, zoneout=p).eval()
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    modifiers = zoneout_in_evaluation(module, p)
    before = torch.random.get_rng_state()
    compare(module, x, hx, modifiers=modifiers, return_cells=True)
    assert torch.equal(torch.random.get_rng_state(), before)


@options
def test_evaluation_in_float32(options):
    module = build(**options, zoneout=(0.2, 0.6), dtype=torch.float32).eval()
    x = make_x(batch_first=module.batch_first, dtype=torch.float32)
    hx = make_hx(module, dtype=torch.float32)
    compare(module, x, hx, modifiers=zoneout_in_evaluation(module, (0.2, 0.6)), return_cells=True)


@options
@pytest.mark.parametrize("form", ["packed", "packed-sorted", "unbatched", "lengths", "no-hx"])
def test_evaluation_of_every_form(options, form):
    module = build(**options, zoneout=(0.2, 0.6)).eval()
    modifiers = zoneout_in_evaluation(module, (0.2, 0.6))
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    arguments = {}
    if form.startswith("packed"):
        x = pack(make_x(), [2, 6, 1, 4] if form == "packed" else [6, 4, 4, 1])
    elif form == "unbatched":
        x, hx = make_x(batch=None), make_hx(module, None)
    elif form == "lengths":
        arguments["lengths"] = [2, 6, 0, 4]
    else:
        hx = None
    compare(module, x, hx, modifiers=modifiers, return_cells=True, **arguments)


def test_evaluation_with_resets_and_clip():
    module = build(num_layers=2, proj_size=P, zoneout=(0.2, 0.6), cell_clip=0.5).eval()
    modifiers = {**zoneout_in_evaluation(module, (0.2, 0.6)), "cell_clip": 0.5}
    arguments = {"resets": make_resets(T, B), "lengths": [2, 6, 0, 4], "return_cells": True}
    compare(module, make_x(), make_hx(module), modifiers=modifiers, **arguments)


# Training


def masks_of(module, x, hx, seed, **arguments):
    """Masks of one layer by direction, [T, B, P] of h, [T, B, H] of c: 1 where a value stays."""
    with torch.no_grad():
        torch.manual_seed(seed)
        output, _, cells = module(x, hx, return_cells=True, **arguments)
    masks = []
    for tensor, states in ((output, hx[0]), (cells, hx[1])):
        parts = []
        for direction, part in enumerate(tensor.chunk(len(states), -1)):
            first = states[direction].unsqueeze(0)
            before = torch.cat([part[1:], first] if direction else [first, part[:-1]])
            parts.append((part == before).to(part.dtype))
        masks.append(parts)
    return masks


@pytest.mark.parametrize("proj_size", [0, P], ids=["plain", "projected"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
@probabilities
def test_a_unit_keeps_its_value_or_takes_the_new_one(proj_size, bidirectional, p):
    module = build(bidirectional=bidirectional, proj_size=proj_size, zoneout=p)
    x, hx = make_x(), make_hx(module)
    z_h, z_c = masks_of(module, x, hx, 3)
    for parts, probability in zip((z_h, z_c), p if isinstance(p, tuple) else (p, p), strict=True):
        for mask in parts:
            assert mask.any() == (probability > 0)
            assert not mask.all()
    modifiers = {"zoneout_h": z_h, "zoneout_c": z_c}
    expected = run_oracle(module, x, hx, return_cells=True, **modifiers)
    assert_same(run(module, x, hx, seed=3, return_cells=True), expected)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
def test_training_in_float32(bidirectional):
    module = build(bidirectional=bidirectional, zoneout=0.3, dtype=torch.float32)
    x, hx = make_x(dtype=torch.float32), make_hx(module, dtype=torch.float32)
    z_h, z_c = masks_of(module, x, hx, 3)
    expected = run_oracle(module, x, hx, return_cells=True, zoneout_h=z_h, zoneout_c=z_c)
    assert_same(run(module, x, hx, seed=3, return_cells=True), expected)


def test_training_with_resets_and_clip():
    module = build(proj_size=P, zoneout=(0.2, 0.6), cell_clip=0.5)
    x, hx, resets = make_x(), make_hx(module), make_resets(T, B)
    # The masks depend on the seed and the shapes alone: recovered without resets, where a state
    # that was zeroed would hide them, and without clipping, at which two values may be equal.
    plain = build(proj_size=P, zoneout=(0.2, 0.6))
    z_h, z_c = masks_of(plain, x, hx, 3)
    arguments = {"resets": resets, "return_cells": True}
    modifiers = {"zoneout_h": z_h, "zoneout_c": z_c, "cell_clip": 0.5}
    expected = run_oracle(module, x, hx, **arguments, **modifiers)
    assert_same(run(module, x, hx, seed=3, **arguments), expected)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
def test_training_with_lengths(bidirectional):
    module = build(bidirectional=bidirectional, zoneout=0.4)
    x, hx, lengths = make_x(), make_hx(module), [2, 6, 0, 4]
    torch.manual_seed(3)
    output, (h_n, c_n), cells = module(x, hx, lengths=lengths, return_cells=True)
    # From the values of the steps that are there.
    masks = []
    for tensor, states in ((output, hx[0]), (cells, hx[1])):
        parts = []
        for direction, part in enumerate(tensor.detach().chunk(len(states), -1)):
            mask = torch.zeros_like(part)
            for b, length in enumerate(lengths):
                first, own = states[direction, b].unsqueeze(0), part[:length, b]
                before = torch.cat([own[1:], first] if direction else [first, own[:-1]])[:length]
                mask[:length, b] = (own == before).to(mask.dtype)
            parts.append(mask)
        masks.append(parts)
    assert any(mask.any() for mask in masks[0] + masks[1])
    assert torch.equal(h_n[:, 2], hx[0][:, 2])
    assert torch.equal(c_n[:, 2], hx[1][:, 2])
    modifiers = {"zoneout_h": masks[0], "zoneout_c": masks[1]}
    arguments = {"lengths": lengths, "return_cells": True}
    expected = run_oracle(module, x, hx, **arguments, **modifiers)
    assert_same(run(module, x, hx, seed=3, **arguments), expected)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
def test_training_with_packed_sequences(bidirectional):
    module = build(bidirectional=bidirectional, zoneout=0.4)
    x, hx = pack(make_x(), [2, 6, 1, 4]), make_hx(module)
    order, sizes = x.sorted_indices, x.batch_sizes.tolist()
    torch.manual_seed(3)
    output, _, cells = module(x, hx, return_cells=True)
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    masks = []
    for tensor, states in ((output.data, hx[0]), (cells.data, hx[1])):
        parts = []
        for direction, part in enumerate(tensor.detach().chunk(len(states), -1)):
            mask = torch.zeros(T, B, part.shape[-1], dtype=part.dtype)
            for t, size in enumerate(sizes):
                for b in range(size):
                    before = states[direction, order[b]]
                    if direction == 0 and t > 0:
                        before = part[starts[t - 1] + b]
                    elif direction == 1 and t + 1 < T and b < sizes[t + 1]:
                        before = part[starts[t + 1] + b]
                    mask[t, b] = (part[starts[t] + b] == before).to(mask.dtype)
            parts.append(mask)
        masks.append(parts)
    assert any(mask.any() for mask in masks[0] + masks[1])
    modifiers = {"zoneout_h": masks[0], "zoneout_c": masks[1]}
    expected = run_oracle(module, x, hx, return_cells=True, **modifiers)
    assert_same(run(module, x, hx, seed=3, return_cells=True), expected)


def test_training_unbatched():
    module = build(zoneout=0.4, batch_first=True)
    x, hx = make_x(batch=None), make_hx(module, None)
    batched = masks_of_unbatched(module, x, hx)
    expected = run_oracle(
        module, x, hx, return_cells=True, zoneout_h=batched[0], zoneout_c=batched[1]
    )
    assert_same(run(module, x, hx, seed=3, return_cells=True), expected)


def masks_of_unbatched(module, x, hx):
    torch.manual_seed(3)
    output, _, cells = module(x, hx, return_cells=True)
    return [
        [(t == torch.cat([state, t[:-1]])).to(t.dtype).unsqueeze(1)]
        for t, state in ((output.detach(), hx[0]), (cells.detach(), hx[1]))
    ]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_layers": 2}, 2),
        ({"num_layers": 2, "bidirectional": True}, 1),
        ({"num_layers": 4}, 1),
        ({"bidirectional": True}, 2),
    ],
    ids=str,
)
def test_every_layer_and_direction(options, steps):
    """One unit, whose few masks can all be tried: exactly one way of keeping values explains it."""
    module = build(2, 1, zoneout=(0.5, 0.5), **options)
    count = module.num_layers * (2 if module.bidirectional else 1)
    h0, c0 = make_hx(module, 1)
    x = make_x(steps=steps, batch=1, size=2)
    ways = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2 * steps * count)))
    ways = ways.double().t().reshape(2, count, steps, -1, 1)
    number = ways.shape[3]
    with torch.no_grad():
        possible = lstm_oracle(
            dict(module.named_parameters()),
            x.expand(steps, number, 2),
            h0.expand(count, number, 1),
            c0.expand(count, number, 1),
            num_layers=module.num_layers,
            bidirectional=module.bidirectional,
            zoneout_h=ways[0],
            zoneout_c=ways[1],
        )
    found = []
    for seed in range(20):
        results = run(module, x, (h0, c0), seed=seed, return_cells=True)
        explains = torch.ones(number, dtype=torch.bool)
        for name, wanted in zip(("output", "h_n", "c_n", "cells"), possible, strict=True):
            near = (wanted - results[name]).abs() < 1e-12
            explains &= near.transpose(0, 1).flatten(1).all(1)
        # Ways that differ in a mask that no result depends on explain it as well.
        chosen = explains.nonzero().flatten()
        assert len(chosen), f"no mask of zeros and ones explains seed {seed}"
        way = chosen[0]
        found.append(ways[:, :, :, way, 0])
        modifiers = {"zoneout_h": ways[0][:, :, way, None], "zoneout_c": ways[1][:, :, way, None]}
        expected = run_oracle(module, x, (h0, c0), return_cells=True, **modifiers)
        assert_same(results, expected)
    # No two masks are always the same, of whatever state, layer, direction or step.
    masks = torch.stack(found).flatten(1).t()
    assert len(masks.unique(dim=0)) == len(masks)


def test_the_frequencies():
    p_h, p_c, steps, batch, hidden = 0.2, 0.6, 12, 24, 16
    module = build(I, hidden, bidirectional=True, zoneout=(p_h, p_c))
    x, hx = make_x(steps=steps, batch=batch), make_hx(module, batch)
    every = []
    for parts, p in zip(masks_of(module, x, hx, 3), (p_h, p_c), strict=True):
        for mask in parts:
            error = 5 * (p * (1 - p) / mask.numel()) ** 0.5
            assert mask.mean().item() == pytest.approx(p, abs=error)
            # Fresh at every step, for every sequence and for every unit.
            for dim in range(3):
                features = mask.transpose(0, dim).flatten(1)
                correlation = torch.corrcoef(features)
                correlation.fill_diagonal_(0)
                assert correlation.abs().max() < 6 / features.shape[1] ** 0.5
            every.append(mask.flatten())
    correlation = torch.corrcoef(torch.stack(every))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5 / every[0].numel() ** 0.5


def test_h_and_c_separately():
    x = make_x()
    for p, kept_h, kept_c in (((0.5, 0.0), True, False), ((0.0, 0.5), False, True)):
        module = build(zoneout=p)
        z_h, z_c = masks_of(module, x, make_hx(module), 3)
        assert z_h[0].any() == kept_h
        assert z_c[0].any() == kept_c


def test_a_single_number_stands_for_both():
    single, pair = build(zoneout=0.3, num_layers=2), build(zoneout=(0.3, 0.3), num_layers=2)
    x, hx = make_x(), make_hx(single)
    for training in (True, False):
        single.train(training)
        pair.train(training)
        expected = run(pair, x, hx, seed=5)
        assert_same(run(single, x, hx, seed=5), expected, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.0, (0.0, 0.0), 0], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_off_is_off(p, training):
    module = build(num_layers=2, bidirectional=True, zoneout=p).train(training)
    plain = build(num_layers=2, bidirectional=True).train(training)
    x, hx = make_x(), make_hx(module)
    before = torch.random.get_rng_state()
    output, _ = module(x, hx)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(output, plain(x, hx)[0])


def test_the_generator_decides():
    module = build(num_layers=2, zoneout=0.5)
    x, hx = make_x(), make_hx(module)
    torch.manual_seed(5)
    first, second = module(x, hx)[0], module(x, hx)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        assert torch.equal(module(x, hx)[0], first)
    assert torch.equal(module(x, hx)[0], first)
    assert torch.equal(module(x, hx)[0], second)
    with torch.no_grad():
        torch.manual_seed(5)
        torch.testing.assert_close(module(x, hx)[0], first, **CLOSE[x.dtype])


def test_checkpointing_repeats_the_masks():
    module = build(num_layers=2, zoneout=0.5)
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


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({}, True),
        ({"proj_size": 1}, False),
        ({"bidirectional": True}, True),
    ],
    ids=str,
)
def test_numerical_derivatives(options, training):
    module = build(2, 3, zoneout=(0.3, 0.4), **options).train(training)
    names = [name for name, _ in module.named_parameters()]
    x, hx = make_x(steps=3, batch=2, size=2), make_hx(module, 2)

    def function(x, h0, c0, *weights):
        torch.manual_seed(5)
        weights = dict(zip(names, weights, strict=True))
        output, states, cells = torch.func.functional_call(
            module, weights, (x, (h0, c0)), {"return_cells": True}
        )
        return output, *states, cells

    inputs = [leaf(t) for t in (x, *hx, *module.parameters())]
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)


def test_a_unit_that_keeps_its_value_passes_its_gradient_on():
    module = build(zoneout=(0.0, 0.5))
    hx = make_hx(module)
    x = make_x(steps=1)
    torch.manual_seed(3)
    h0, c0 = (leaf(state) for state in hx)
    _, (h_n, c_n) = module(x, (h0, c0))
    kept = (c_n == c0).squeeze(0)
    assert kept.any()
    assert not kept.all()
    (gradient,) = torch.autograd.grad(c_n.sum(), c0, retain_graph=True)
    assert torch.equal(gradient[0][kept], torch.ones_like(gradient[0][kept]))
    assert (gradient[0][~kept] < 1).all()
    loss_of({"h_n": h_n}).backward()
    assert c0.grad[0].ne(0).all()
    assert h0.shape[-1] == H
