"""`recurrent_dropout`: one mask of h for a whole sequence.

A mask is recovered from the gradient of h_0, which is zero exactly where the mask drops a unit; it
depends on the seed and the shapes alone. The oracle then has to agree when it uses that mask,
scaled by 1/(1 - p), at every step.
"""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from .oracle import (
    B,
    P,
    T,
    assert_same,
    build,
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
    recovering = {k: v for k, v in arguments.items() if k != "resets"}
    kept, _ = masks_from_gradients(module, x, hx, seed, **recovering)
    order = getattr(x, "sorted_indices", None)
    masks = kept.to(hx[0].dtype) / (1 - p)
    if masks.dim() == 2:
        masks = masks.unsqueeze(1)
    if order is not None:
        masks = masks[:, order]
    expected = run_oracle(module, x, hx, recurrent_masks=masks.double(), **arguments)
    assert_same(run(module, x, hx, seed=seed, **arguments), expected)
    return kept


@options
@pytest.mark.parametrize("p", [0.4, 0.7])
def test_one_mask_at_all_steps(options, p):
    module = build(**options, recurrent_dropout=p)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    kept = check_with_recovered_mask(module, x, hx, p, 3, return_cells=True)
    assert kept.any()
    assert not kept.all()


@options
def test_float32(options):
    module = build(**options, recurrent_dropout=0.4, dtype=torch.float32)
    x = make_x(batch_first=module.batch_first, dtype=torch.float32)
    check_with_recovered_mask(module, x, make_hx(module, dtype=torch.float32), 0.4, 3)


@options
@pytest.mark.parametrize("lengths", [[2, 6, 1, 4], [6, 4, 4, 1]], ids=str)
def test_packed(options, lengths):
    module = build(**options, recurrent_dropout=0.4)
    x, hx = pack(make_x(), lengths), make_hx(module)
    kept = check_with_recovered_mask(module, x, hx, 0.4, 3, return_cells=True)
    assert not kept.all()


@options
def test_unbatched(options):
    module = build(**options, recurrent_dropout=0.4)
    x, hx = make_x(batch=None), make_hx(module, None)
    check_with_recovered_mask(module, x, hx, 0.4, 3, return_cells=True)


@options
def test_lengths(options):
    module = build(**options, recurrent_dropout=0.4)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    check_with_recovered_mask(module, x, hx, 0.4, 3, lengths=[2, 6, 1, 4], return_cells=True)


def test_resets_and_clip():
    module = build(num_layers=2, proj_size=P, recurrent_dropout=0.4, cell_clip=0.6)
    x, hx = make_x(), make_hx(module)
    resets = make_resets(T, B)
    recovering = build(num_layers=2, proj_size=P, recurrent_dropout=0.4)
    kept, _ = masks_from_gradients(recovering, x, hx, 3)
    arguments = {"resets": resets, "return_cells": True}
    expected = run_oracle(
        module, x, hx, recurrent_masks=kept.double() / 0.6, cell_clip=0.6, **arguments
    )
    assert_same(run(module, x, hx, seed=3, **arguments), expected)


def test_the_statistics_of_the_masks():
    """One of its own for every sequence, unit, layer and direction."""
    p, batch, hidden = 0.3, 64, 24
    module = build(3, hidden, num_layers=2, bidirectional=True, recurrent_dropout=p)
    x, hx = make_x(batch=batch, steps=2), make_hx(module, batch)
    kept = masks_from_gradients(module, x, hx, 3)[0].double()
    count = kept[0].numel()
    for mask in kept:
        assert mask.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / count) ** 0.5)
        # Sequences have masks of their own, and so have units.
        assert len(mask.unique(dim=0)) == batch
        assert len(mask.unique(dim=1).t()) == hidden
    correlation = torch.corrcoef(kept.flatten(1))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5 / count**0.5
    for mask in kept:
        correlation = torch.corrcoef(mask.t())
        correlation.fill_diagonal_(0)
        assert correlation.abs().max() < 6 / batch**0.5


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_off_is_off(training):
    """In evaluation, and with a probability of zero, it is the plain layer: no random numbers."""
    p = 0.0 if training else 0.5
    module = build(num_layers=2, bidirectional=True, recurrent_dropout=p).train(training)
    plain = build(num_layers=2, bidirectional=True).train(training)
    x, hx = make_x(), make_hx(module)
    before = torch.random.get_rng_state()
    output, _ = module(x, hx)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(output, plain(x, hx)[0])
    assert_same(run(module, x, hx), run(plain, x, hx))


def test_the_generator_decides():
    module = build(num_layers=2, recurrent_dropout=0.5)
    x, hx = make_x(), make_hx(module)

    def draw():
        return module(x, hx)[0]

    torch.manual_seed(5)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        assert torch.equal(draw(), first)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    state = torch.get_rng_state()
    third = draw()
    torch.set_rng_state(state)
    assert torch.equal(draw(), third)


def test_without_gradients_the_masks_are_the_same():
    module = build(num_layers=2, bidirectional=True, recurrent_dropout=0.5)
    x, hx = make_x(), make_hx(module)
    expected = run(module, x, hx, seed=5)["output"]
    for context in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(5)
        with context():
            torch.testing.assert_close(module(x, hx)[0], expected)


class Flat(nn.Module):
    """The layer with tensors only: reentrant checkpointing sees no others."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, *hx):
        output, states = self.rnn(x, hx)
        return output, *states


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing_repeats_the_masks(use_reentrant):
    module = build(num_layers=2, bidirectional=True, recurrent_dropout=0.5)
    x, hx = make_x(), make_hx(module)
    gradients = []
    for through_checkpoint in (False, True):
        data, states = leaf(x), tuple(leaf(state) for state in hx)
        module.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        if through_checkpoint:
            tensors = checkpoint(Flat(module), data, *states, use_reentrant=use_reentrant)
        else:
            tensors = Flat(module)(data, *states)
        torch.rand(3)  # the generator moves on before the masks are drawn again
        sum(t.square().sum() for t in tensors).backward()
        gradients.append([t.grad for t in (data, *states, *module.parameters())])
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(repeated, plain)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 1}], ids=str)
def test_numerical_derivatives(options):
    module = build(2, 3, recurrent_dropout=0.4, **options)
    names = [name for name, _ in module.named_parameters()]
    x, hx = make_x(steps=3, batch=2, size=2), make_hx(module, 2)

    def function(x, h0, c0, *weights):
        torch.manual_seed(5)
        weights = dict(zip(names, weights, strict=True))
        output, states = torch.func.functional_call(module, weights, (x, (h0, c0)))
        return output, *states

    inputs = [leaf(t) for t in (x, *hx, *module.parameters())]
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)


def test_the_expectation_of_the_recurrent_sum_is_that_of_evaluation():
    """Scaled by 1/(1 - p): with linear gates the mean over masks is the plain layer's."""
    module = build(1, 4, bias=False, recurrent_dropout=0.25)
    batch = 4000
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.mul_(1e-3)  # the gates are linear in such small sums
    h0 = make_hx(module, 1)[0].expand(1, batch, 4)
    hx = (h0, torch.zeros(1, batch, 4, dtype=torch.float64))
    x = torch.zeros(1, batch, 1, dtype=torch.float64)
    _, (_, c_n) = module(x, hx)
    _, (_, expected) = module.eval()(x, hx)
    error = (c_n.mean(1) - expected[:, 0]).abs()
    assert (error < 5 * c_n.std(1) / batch**0.5 + 1e-9).all()
    assert (c_n.std(1) > 0).all()
