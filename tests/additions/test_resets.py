"""`resets`: episodes that follow each other in one sequence."""

import math

import pytest
import torch
from torch import nn

from .oracle import (
    CLOSE,
    B,
    H,
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
    run_oracle,
    values,
)

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = {
    "plain": {},
    "two-layers": {"num_layers": 2, "bias": False},
    "batch-first": {"num_layers": 3, "batch_first": True},
    "projected": {"proj_size": P},
    "everything": {"num_layers": 2, "proj_size": P, "batch_first": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def single(*steps):
    """Resets of all sequences at these steps."""
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[list(steps)] = True
    return resets


RESETS = {
    "random": make_resets(T, B),
    "other-random": make_resets(T, B, seed=6, probability=0.6),
    "none": single(),
    "all": single(*range(T)),
    "first-step": single(0),
    "last-step": single(T - 1),
    "one-sequence": torch.arange(B).eq(2) & single(1, 4),
}


@options
@pytest.mark.parametrize(
    ("resets", "with_hx"), [*((name, True) for name in RESETS), ("random", False)]
)
def test_results_and_gradients(options, resets, with_hx):
    module = build(**options)
    x = make_x(batch_first=module.batch_first)
    hx = make_hx(module) if with_hx else None
    resets = RESETS[resets].t() if module.batch_first else RESETS[resets]
    compare(module, x, hx, resets=resets, return_cells=True)
    # The memory layout of the mask does not matter.
    with torch.no_grad():
        outputs = [module(x, hx, resets=r)[0] for r in (resets, resets.contiguous())]
    assert torch.equal(*outputs)


@options
def test_float32(options):
    module = build(**options, dtype=torch.float32)
    x = make_x(batch_first=module.batch_first, dtype=torch.float32)
    resets = RESETS["random"].t() if module.batch_first else RESETS["random"]
    compare(module, x, make_hx(module, dtype=torch.float32), resets=resets)


@options
def test_equal_to_running_the_episodes_one_by_one(options):
    """`torch.nn.LSTM` on every episode by itself: results, and all gradients."""
    module = build(**options)
    native = nn.LSTM(module.input_size, H, **options, dtype=torch.float64)
    native.load_state_dict(module.state_dict())
    native.batch_first = False
    resets = RESETS["random"]
    x, hx = make_x(), make_hx(module)
    data, states = leaf(x), tuple(leaf(state) for state in hx)
    outputs, h_n, c_n = [], [], []
    for b in range(B):
        starts = sorted({0, *resets[:, b].nonzero().flatten().tolist()})
        pieces = []
        for start, end in zip(starts, [*starts[1:], T], strict=True):
            state = None
            if start == 0 and not resets[0, b]:
                state = tuple(s[:, b] for s in states)
            piece, state = native(data[start:end, b], state)
            pieces.append(piece)
        outputs.append(torch.cat(pieces))
        h_n.append(state[0])
        c_n.append(state[1])
    results = [torch.stack(outputs, 1), torch.stack(h_n, 1), torch.stack(c_n, 1)]
    cotangents = [values(*t.shape, seed=40 + k, dtype=t.dtype) for k, t in enumerate(results)]
    inputs = (data, *states, *native.parameters())
    expected = torch.autograd.grad(results, inputs, cotangents)

    first = module.batch_first
    data, states = leaf(x.transpose(0, 1) if first else x), tuple(leaf(s) for s in hx)
    output, (h, c) = module(data, states, resets=resets.t() if first else resets)
    ours = [output.transpose(0, 1) if first else output, h, c]
    inputs = (data, *states, *module.parameters())
    actual = list(torch.autograd.grad(ours, inputs, cotangents))
    actual[0] = actual[0].transpose(0, 1) if first else actual[0]
    for got, wanted in zip((*ours, *actual), (*results, *expected), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE[torch.float64])


@options
@pytest.mark.parametrize("step", [0, 3])
def test_no_gradient_crosses_a_reset(options, step):
    module = build(**options)
    x, hx = leaf(make_x()), tuple(leaf(state) for state in make_hx(module))

    def swap(tensor):
        return tensor.transpose(0, 1) if module.batch_first else tensor

    output, states, cells = module(swap(x), hx, resets=swap(single(step)), return_cells=True)
    after = (swap(output)[step:], swap(cells)[step:], *states)
    loss = sum(t.square().sum() for t in after)
    for_x, for_h0, for_c0 = torch.autograd.grad(loss, (x, *hx), retain_graph=True)
    assert not for_x[:step].any()
    assert not for_h0.any()
    assert not for_c0.any()
    assert for_x[step:].all()
    # Within the first episode it does flow.
    if step:
        loss = swap(output)[step - 1].square().sum()
        for gradient in torch.autograd.grad(loss, (x, *hx)):
            assert gradient[: step - 1].any()


@options
@pytest.mark.parametrize("fill", [math.nan, math.inf], ids=str)
def test_a_state_that_is_not_a_number_does_not_cross(options, fill):
    step = 3
    module = build(**options)
    first = module.batch_first
    x, hx = make_x(), make_hx(module)
    resets = single(step)
    resets[step, 1] = False
    spoilt = x.clone()
    spoilt[step - 2 : step, 0] = fill
    for data in (x, spoilt):
        data.requires_grad_()
    results = []
    for data in (x, spoilt):
        output, (h_n, c_n), cells = module(
            data.transpose(0, 1) if first else data,
            hx,
            resets=resets.t() if first else resets,
            return_cells=True,
        )
        output, cells = ((t.transpose(0, 1) if first else t) for t in (output, cells))
        tensors = [output[step:], h_n, c_n, cells[step:]]
        loss = sum((t * t).sum() for t in tensors)
        (gradient,) = torch.autograd.grad(loss, data)
        results.append([*tensors, gradient[step:]])
        if data is spoilt:
            assert output[step - 1, 0].isnan().any() or fill == math.inf
    for clean, crossed in zip(*results, strict=True):
        assert crossed.isfinite().all()
        torch.testing.assert_close(crossed, clean, **CLOSE[torch.float64])


@options
def test_an_initial_state_that_is_not_a_number_is_reset_away(options):
    """Neither the results nor any gradient, that of W_hh included, see it."""
    module = build(**options)
    x = make_x(batch_first=module.batch_first)
    resets = single(0).t() if module.batch_first else single(0)
    hx = make_hx(module)
    expected = run(module, x, hx, resets=resets, return_cells=True)
    for fill in (math.nan, math.inf):
        spoilt = tuple(torch.full_like(state, fill) for state in hx)
        actual = run(module, x, spoilt, resets=resets, return_cells=True)
        assert_same(actual, expected)
        assert not actual["grad of h0"].any()
        assert not actual["grad of c0"].any()


@options
def test_none_true_is_no_resets_at_all(options):
    module = build(**options)
    x, hx = make_x(batch_first=module.batch_first), make_hx(module)
    resets = single().t() if module.batch_first else single()
    assert_same(run(module, x, hx, resets=resets), run(module, x, hx))


@options
def test_all_true_is_every_step_by_itself(options):
    module = build(**options)
    first = module.batch_first
    x = make_x(batch_first=first)
    output, _ = module(x, make_hx(module), resets=torch.ones(x.shape[:2], dtype=torch.bool))
    for t in range(T):
        step = slice(t, t + 1)
        alone, _ = module(x[:, step] if first else x[step])
        torch.testing.assert_close(output[:, step] if first else output[step], alone)


@options
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "no-hx"])
def test_unbatched(options, with_hx):
    module = build(**options)
    x = make_x(batch=None)
    hx = make_hx(module, None) if with_hx else None
    for resets in (RESETS["random"][:, 1], torch.ones(T, dtype=torch.bool), single()[:, 0]):
        compare(module, x, hx, resets=resets, return_cells=True)


LENGTHS = {"unsorted": [2, 6, 1, 4], "sorted": [6, 4, 4, 1]}


@options
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_packed_sequences(options, lengths, form):
    module = build(**options)
    first = module.batch_first
    resets = RESETS["other-random"]
    x, hx = pack(make_x(), lengths), make_hx(module)
    expected = run_oracle(module, x, hx, resets=resets.t() if first else resets, return_cells=True)
    given = pack(resets, lengths) if form == "packed" else resets.t() if first else resets
    assert_same(run(module, x, hx, resets=given, return_cells=True), expected)
    # Equal to the padded batch.
    padded = make_x(batch_first=first)
    states = run(module, padded, hx, lengths=lengths, resets=resets.t() if first else resets)
    torch.testing.assert_close(states["h_n"], expected["h_n"], **CLOSE[torch.float64])


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_packed_sequences_sorted_by_the_caller(form):
    """A `PackedSequence` without an order of its own."""
    lengths = [6, 4, 4, 1]
    x = torch.nn.utils.rnn.pack_padded_sequence(make_x(), torch.tensor(lengths))
    assert x.sorted_indices is None
    resets = RESETS["other-random"]
    module = build(num_layers=2)
    given = resets
    if form == "packed":
        given = torch.nn.utils.rnn.pack_padded_sequence(resets, torch.tensor(lengths))
    expected = run_oracle(module, x, make_hx(module), resets=resets)
    assert_same(run(module, x, make_hx(module), resets=given), expected)


def test_packed_resets_sorted_by_another_hand():
    """An order that changes nothing is no order at all."""
    lengths = torch.tensor([6, 4, 3, 1])
    resets = RESETS["other-random"]
    by_hand = torch.nn.utils.rnn.pack_padded_sequence(make_x(), lengths)
    by_torch = pack(make_x(), lengths)
    assert by_torch.sorted_indices.tolist() == [0, 1, 2, 3]
    module = build()
    expected = run_oracle(module, by_hand, resets=resets)
    packed = torch.nn.utils.rnn.pack_padded_sequence(resets, lengths)
    assert_same(run(module, by_hand, resets=pack(resets, lengths)), expected)
    assert_same(run(module, by_torch, resets=packed), expected)


def test_resets_with_lengths():
    lengths = torch.tensor([2, 6, 0, 4])
    for options in OPTIONS.values():
        module = build(**options)
        x, hx = make_x(batch_first=module.batch_first), make_hx(module)
        resets = RESETS["other-random"]
        # One beyond the end changes nothing.
        assert resets[2:, 0].any()
        resets = resets.t() if module.batch_first else resets
        results = compare(module, x, hx, lengths=lengths, resets=resets, return_cells=True)
        assert torch.equal(results["h_n"][:, 2], hx[0][:, 2])
        assert torch.equal(results["c_n"][:, 2], hx[1][:, 2])


@pytest.mark.parametrize("used", ["output", "h_n", "c_n", "cells"])
def test_gradient_of_one_result_alone(used):
    module = build(num_layers=2, proj_size=P)
    compare(
        module,
        make_x(),
        make_hx(module),
        resets=RESETS["random"],
        return_cells=True,
        loss_on=(used,),
    )


def test_the_mask_may_have_any_strides():
    module = build()
    x, hx, resets = make_x(), make_hx(module), RESETS["random"]
    expected = run(module, x, hx, resets=resets)
    column = single(2)[:, :1].expand(T, B)
    forms = {
        "strided": torch.stack([resets, ~resets], -1)[..., 0],
        "transposed": resets.t().contiguous().t(),
        "offset": torch.cat([~resets, resets])[T:],
    }
    for name, form in forms.items():
        assert_same(run(module, x, hx, resets=form), expected), name
    assert_same(run(module, x, hx, resets=column), run(module, x, hx, resets=single(2)))
    row = torch.tensor([True, False, True, False]).expand(T, B)
    assert_same(run(module, x, hx, resets=row), run(module, x, hx, resets=row.contiguous()))


@pytest.mark.parametrize("hidden", [1, 8, 17, 40])
def test_sizes_around_the_width_of_a_vector(hidden):
    batch = 19
    module = build(11, hidden, num_layers=2, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.div_(hidden**0.5)
    x = make_x(batch=batch, size=11, dtype=torch.float32)
    hx = make_hx(module, batch, dtype=torch.float32)
    compare(module, x, hx, resets=make_resets(T, batch), return_cells=True)


def test_many_short_episodes():
    steps = 150
    module = build(dtype=torch.float64)
    x, hx = make_x(steps=steps), make_hx(module)
    compare(module, x, hx, resets=make_resets(steps, B, probability=0.2))
