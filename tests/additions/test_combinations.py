"""Everything together: random layers with random options, and what PyTorch does with them."""

import functools
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fused_lstm

from .oracle import (
    B,
    H,
    I,
    P,
    T,
    assert_results_within_budget,
    assert_same,
    build,
    compare,
    leaf,
    loss_of,
    make_hx,
    make_resets,
    make_x,
    masks_from_gradients,
    pack,
    run,
    run_oracle,
    zoneout_in_evaluation,
)

CASES = 70


def draw(seed):
    """One case: constructor options, form of the input, and what forward is given."""
    rng = random.Random(seed)
    hidden = rng.randint(1, 7)
    form = rng.choice(["batched", "batched", "lengths", "lengths", "unbatched", "packed"])
    bidirectional = rng.random() < 0.4
    zoneout = rng.choice([0.0, 0.3, (0.2, 0.6), (0.0, 0.5), (0.5, 0.0)])
    return {
        "sizes": (rng.randint(1, 5), hidden),
        "options": {
            "num_layers": rng.randint(1, 3),
            "bias": rng.random() < 0.7,
            "batch_first": rng.random() < 0.5,
            "bidirectional": bidirectional,
            "proj_size": rng.randint(1, hidden - 1) if hidden > 1 and rng.random() < 0.4 else 0,
            "dtype": rng.choice([torch.float64, torch.float64, torch.float32]),
        },
        "zoneout": zoneout,
        "cell_clip": rng.choice([None, None, 0.3, 1.0]),
        "recurrent_dropout": rng.choice([0.0, 0.0, 0.4]),
        "weight_dropout": rng.choice([0.0, 0.0, 0.3]),
        "form": form,
        "resets": not bidirectional and rng.random() < 0.6,
        "return_cells": rng.random() < 0.6,
        "with_hx": rng.random() < 0.7,
        "steps": rng.randint(1, 8),
        "batch": rng.randint(1, 5),
        "lengths": [rng.randint(0, 8) for _ in range(5)],
        "loss_on": rng.choice([None, None, ("output",), ("h_n", "c_n"), ("c_n",)]),
    }


def arguments_of(case, seed):
    """The input, and the arguments of forward by name."""
    options = case["options"]
    steps, batch, dtype = case["steps"], case["batch"], options["dtype"]
    first, form = options["batch_first"], case["form"]
    size, arguments = case["sizes"][0], {"return_cells": case["return_cells"]}
    resets = make_resets(steps, batch, seed=seed)
    if form == "unbatched":
        x, resets = make_x(seed=seed, steps=steps, batch=None, size=size, dtype=dtype), resets[:, 0]
        if case["lengths"][0] % 2:
            arguments["lengths"] = min(steps, case["lengths"][0])
    elif form == "packed":
        lengths = [max(1, min(steps, n)) for n in case["lengths"][:batch]]
        lengths[-1] = steps
        x = pack(make_x(seed=seed, steps=steps, batch=batch, size=size, dtype=dtype), lengths)
        if seed % 2:
            resets = pack(resets, lengths)
        elif first:
            resets = resets.t()
    else:
        x = make_x(seed=seed, steps=steps, batch=batch, size=size, batch_first=first, dtype=dtype)
        resets = resets.t() if first else resets
        if form == "lengths":
            lengths = [min(steps, n) for n in case["lengths"][:batch]]
            arguments["lengths"] = torch.tensor(lengths) if seed % 2 else lengths
    if case["resets"]:
        arguments["resets"] = resets
    if case["loss_on"]:
        arguments["loss_on"] = case["loss_on"]
    return x, arguments


def layer_of(case, seed, **regularization):
    return build(*case["sizes"], seed=seed, **case["options"], **regularization)


def states_of(case, module):
    batch = None if case["form"] == "unbatched" else case["batch"]
    return make_hx(module, batch, dtype=case["options"]["dtype"])


@functools.cache
def evaluated(seed):
    """What a case is to give in evaluation, in float64."""
    case = draw(seed)
    module = layer_of(case, seed)
    x, arguments = arguments_of(case, seed)
    hx = states_of(case, module) if case["with_hx"] else None
    modifiers = zoneout_in_evaluation(module, case["zoneout"])
    return run_oracle(module, x, hx, cell_clip=case["cell_clip"], **arguments, **modifiers)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_layer_in_evaluation(seed):
    case = draw(seed)
    names = ("zoneout", "cell_clip", "recurrent_dropout", "weight_dropout")
    module = layer_of(case, seed, **{name: case[name] for name in names}).eval()
    x, arguments = arguments_of(case, seed)
    hx = states_of(case, module) if case["with_hx"] else None
    actual = run(module, x, hx, **arguments)
    assert_same(actual, evaluated(seed))
    # Without gradients the same numbers come from other kernels.
    arguments.pop("loss_on", None)
    with torch.no_grad():
        returned = module(x, hx, **arguments)
    again = {"output": getattr(returned[0], "data", returned[0])}
    again.update(zip(("h_n", "c_n"), returned[1], strict=True))
    if case["return_cells"]:
        again["cells"] = getattr(returned[2], "data", returned[2])
    assert_same(again, {name: actual[name] for name in again})


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("seed", range(CASES // 2))
def test_a_random_layer_in_training(seed):
    """The masks of the two dropouts by their gradients, then everything by the oracle."""
    case = draw(1000 + seed)
    dropouts = {"recurrent_dropout": 0.4, "weight_dropout": 0.3 if seed % 2 else 0.0}
    module = layer_of(case, seed, **dropouts, cell_clip=case["cell_clip"])
    x, arguments = arguments_of(case, seed)
    hx = states_of(case, module)
    plain = {k: v for k, v in arguments.items() if k not in ("resets", "loss_on")}
    h_kept, w_kept = masks_from_gradients(layer_of(case, seed, **dropouts), x, hx, seed, **plain)
    if h_kept.dim() == 2:
        h_kept = h_kept.unsqueeze(1)
    if case["form"] == "packed":
        h_kept = h_kept[:, x.sorted_indices]
    modifiers = {"recurrent_masks": h_kept.double() / 0.6, "cell_clip": case["cell_clip"]}
    if dropouts["weight_dropout"]:
        # One that no state ever met has no gradient either; then it does not matter.
        modifiers["weight_masks"] = [mask.double() / 0.7 for mask in w_kept]
    expected = run_oracle(module, x, hx, **arguments, **modifiers)
    assert_same(run(module, x, hx, seed=seed, **arguments), expected)


def test_the_cases_are_various():
    cases = [draw(seed) for seed in range(CASES)]
    for name, count in [("form", 4), ("resets", 2), ("return_cells", 2), ("zoneout", 5)]:
        assert len({case[name] for case in cases}) == count
    for name in ("bias", "batch_first", "bidirectional", "dtype"):
        assert len({case["options"][name] for case in cases}) == 2
    together = [c for c in cases if c["form"] == "lengths" and c["resets"] and c["zoneout"]]
    assert len(together) >= 3
    assert sum(case["options"]["proj_size"] > 0 for case in cases) > CASES // 10


EVERYTHING = {"num_layers": 2, "zoneout": (0.2, 0.5), "cell_clip": 0.4, "batch_first": True}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("proj_size", "training", "bidirectional"),
    [(1, True, False), (0, False, True)],
    ids=["projected-training", "bidirectional-evaluation"],
)
def test_numerical_derivatives_of_first_and_second_order(proj_size, training, bidirectional):
    options = {**EVERYTHING, "proj_size": proj_size, "bidirectional": bidirectional}
    options |= {"recurrent_dropout": 0.3, "weight_dropout": 0.3}
    options["num_layers"] = 1 if bidirectional else 2
    module = build(2, 2, **options).train(training)
    names = [name for name, _ in module.named_parameters()]
    x, hx = make_x(steps=2, batch=3, size=2, batch_first=True), make_hx(module, 3)
    arguments = {"lengths": [2, 0, 1], "return_cells": True}
    if not bidirectional:
        arguments["resets"] = torch.tensor([[0, 1], [0, 0], [0, 1]]).bool()

    def function(x, h0, c0, *weights):
        torch.manual_seed(5)
        weights = dict(zip(names, weights, strict=True))
        output, states, cells = torch.func.functional_call(
            module, weights, (x, (h0, c0)), arguments
        )
        return output, *states, cells

    inputs = [leaf(t) for t in (x, *hx, *module.parameters())]
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    module = build(**EVERYTHING, proj_size=P, dtype=dtype).eval()
    x, hx = make_x(batch_first=True, dtype=dtype), make_hx(module, dtype=dtype)
    arguments = {"lengths": [2, 6, 0, 4], "resets": make_resets(B, T), "return_cells": True}
    modifiers = {**zoneout_in_evaluation(module, (0.2, 0.5)), "cell_clip": 0.4}
    actual = run(module, x, hx, **arguments)
    # float32 masks and clips may be exact where those of half precision are rounded.
    for name in ("output", "h_n", "c_n", "cells"):
        assert actual[name].dtype == dtype
    native = run_oracle(module, x, hx, dtype=dtype, **arguments, **modifiers)
    exact = run_oracle(module, x, hx, **arguments, **modifiers)
    assert_results_within_budget(actual, native, exact)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_autocast(training):
    options = {
        **EVERYTHING,
        "recurrent_dropout": 0.3,
        "weight_dropout": 0.3,
        "dtype": torch.float32,
    }
    module = build(**options).train(training)
    x, hx = make_x(batch_first=True, dtype=torch.float32), make_hx(module, dtype=torch.float32)
    arguments = {"lengths": [2, 6, 0, 4], "resets": make_resets(B, T), "return_cells": True}
    expected = run(module, x, hx, seed=5, **arguments)
    data, states = leaf(x), tuple(leaf(state) for state in hx)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n), cells = module(data, states, **arguments)
    results = {"output": output, "h_n": h_n, "c_n": c_n, "cells": cells}
    sum(t.float().square().sum() for t in results.values()).backward()
    assert {t.dtype for t in results.values()} == {torch.bfloat16}
    if training:
        # The masks may be drawn in another dtype, and then with other results.
        for tensor in (*results.values(), data.grad, *(p.grad for p in module.parameters())):
            assert tensor.isfinite().all()
    else:
        for name, tensor in results.items():
            torch.testing.assert_close(tensor.float(), expected[name], rtol=0.03, atol=0.03)
    assert not output[0, 2:].any()
    assert data.grad.dtype == torch.float32
    assert not data.grad[0, 2:].any()


@pytest.mark.usefixtures("backend")
def test_inference_mode():
    module = build(**EVERYTHING).eval()
    x, hx = make_x(batch_first=True), make_hx(module)
    arguments = {"lengths": [2, 6, 0, 4], "resets": make_resets(B, T), "return_cells": True}
    expected = run(module, x, hx, **arguments)
    with torch.inference_mode():
        output, states, cells = module(x, hx, **arguments)
    results = dict(zip(("output", "h_n", "c_n", "cells"), (output, *states, cells), strict=True))
    assert_same(results, {name: expected[name] for name in results})


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("what", ["input", "hx", "weights", "one-bias"])
def test_gradients_of_some_tensors_only(what):
    """What nobody wants the gradient of need not be computed, and changes nothing."""
    module = build(**EVERYTHING, proj_size=P).eval()
    x, hx = make_x(batch_first=True), make_hx(module)
    arguments = {"lengths": [2, 6, 0, 4], "resets": make_resets(B, T), "return_cells": True}
    expected = run(module, x, hx, **arguments)
    module.requires_grad_(what == "weights")
    if what == "one-bias":
        module.bias_hh_l0.requires_grad_()
    data = leaf(x) if what == "input" else x
    states = tuple(leaf(s) for s in hx) if what == "hx" else hx
    output, (h_n, c_n), cells = module(data, states, **arguments)
    results = {"output": output, "h_n": h_n, "c_n": c_n, "cells": cells}
    loss_of(results).backward()
    if what == "input":
        torch.testing.assert_close(data.grad, expected["grad of input"])
    elif what == "hx":
        torch.testing.assert_close(states[0].grad, expected["grad of h0"])
        torch.testing.assert_close(states[1].grad, expected["grad of c0"])
    else:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[f"grad of {name}"])


@pytest.mark.usefixtures("backend")
def test_a_batch_of_none():
    module = build(**EVERYTHING).eval()
    x = torch.zeros(0, T, I, dtype=torch.float64, requires_grad=True)
    output, (h_n, c_n), cells = module(
        x,
        lengths=torch.zeros(0, dtype=torch.int64),
        resets=torch.zeros(0, T, dtype=torch.bool),
        return_cells=True,
    )
    assert output.shape == cells.shape == (0, T, H)
    assert h_n.shape == c_n.shape == (2, 0, H)
    (output.sum() + cells.sum()).backward()
    assert not module.weight_hh_l1.grad.any()


@pytest.mark.usefixtures("backend")
def test_two_calls_in_turn():
    """Nothing is remembered from one call to the next."""
    module = build(num_layers=2, cell_clip=0.5)
    hx = make_hx(module)
    for lengths, resets in [([2, 6, 0, 4], None), (None, make_resets(T, B)), (None, None)] * 2:
        arguments = {"lengths": lengths, "resets": resets, "return_cells": lengths is None}
        compare(module, make_x(), hx, modifiers={"cell_clip": 0.5}, **arguments)


def test_what_pytorchs_own_layers_do_not_have():
    """Asked for by name, they refuse what they lack and say what it is."""
    x = make_x()
    calls = {
        "resets": (build(), {"resets": make_resets(T, B)}),
        "return_cells": (build(), {"return_cells": True}),
        "zoneout": (build(zoneout=0.2), {}),
        "cell_clip": (build(cell_clip=0.3), {}),
        "recurrent_dropout": (build(recurrent_dropout=0.3), {}),
    }
    for name, (module, arguments) in calls.items():
        with (
            fused_lstm.use_backend("aten"),
            pytest.raises(fused_lstm.BackendUnavailableError, match=name),
        ):
            module(x, **arguments)
        module(x, **arguments)
