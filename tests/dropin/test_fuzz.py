"""Random layers on random inputs, compared with torch's."""

import random

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from .helpers import build_pair, compare, make_hx, values

CASES = 80


def draw(seed):
    """One case: constructor options, form of the input and of the states, dtype and mode."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16])
    hidden_size = rng.randint(1, 9)
    options = {
        "num_layers": rng.randint(1, 3),
        "bias": rng.random() < 0.7,
        "batch_first": rng.random() < 0.5,
        "bidirectional": rng.random() < 0.4,
        "proj_size": rng.randint(1, hidden_size - 1)
        if hidden_size > 1 and rng.random() < 0.4
        else 0,
        "dtype": dtype,
    }
    # A float64 reference of a half-precision layer would draw other masks.
    if options["num_layers"] > 1 and dtype in (torch.float32, torch.float64):
        options["dropout"] = rng.choice([0.0, 0.3, 0.8, 1.0])
    return {
        "sizes": (rng.randint(1, 7), hidden_size),
        "options": options,
        "form": rng.choice(["batched", "batched", "unbatched", "packed", "packed-unsorted"]),
        "states": rng.choice([None, tuple, list]),
        "steps": rng.randint(1, 12),
        "batch": rng.randint(1, 5),
        "training": rng.random() < 0.7,
        "loss_on": rng.choice([("output", "h_n", "c_n"), ("output",), ("h_n", "c_n"), ("c_n",)]),
        "lengths": [rng.randint(1, 12) for _ in range(5)],
    }


def draw_input(case, seed):
    options = case["options"]
    size, dtype = case["sizes"][0], options["dtype"]
    if case["form"].startswith("packed"):
        lengths = case["lengths"][: case["batch"]]
        if case["form"] == "packed":
            lengths.sort(reverse=True)
        sequences = [values(n, size, seed=seed + b, dtype=dtype) for b, n in enumerate(lengths)]
        return pack_sequence(sequences, enforce_sorted=case["form"] == "packed")
    shape = [case["steps"], case["batch"], size]
    if case["form"] == "unbatched":
        shape.pop(1)
    elif options["batch_first"]:
        shape[:2] = shape[1::-1]
    return values(*shape, seed=seed, dtype=dtype)


@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_layer(seed, backend):
    case = draw(seed)
    native, ours = build_pair(*case["sizes"], seed=seed, backend=backend, **case["options"])
    native.train(case["training"])
    ours.train(case["training"])
    hx = None
    if case["states"]:
        dtype, form = case["options"]["dtype"], case["form"]
        hx = make_hx(native, form, dtype=dtype, batch=case["batch"], container=case["states"])
    x = draw_input(case, seed)
    compare(native, ours, x, hx, loss_on=case["loss_on"], backend=backend)


def test_the_cases_are_various():
    cases = [draw(seed) for seed in range(CASES)]
    for name, count in [("form", 4), ("states", 3), ("training", 2), ("loss_on", 4)]:
        assert len({case[name] for case in cases}) == count
    for name in ["bias", "batch_first", "bidirectional"]:
        assert {case["options"][name] for case in cases} == {True, False}
    assert {case["options"]["dtype"] for case in cases} == {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
    assert sum(case["options"]["proj_size"] > 0 for case in cases) > CASES // 10
    assert sum(case["options"].get("dropout", 0) > 0 for case in cases) > CASES // 10
