"""Side-by-side comparison with torch's own layers.

The oracle of every test here is `torch.nn.LSTM` itself: the same constructor call under the same
seed, the same input, the same cotangents. T time, B batch, I input, H hidden, P projection,
L layers, D directions.
"""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_lstm

from ..budget import assert_within_budget

T, B, I, H, P = 6, 3, 4, 5, 3  # noqa: E741  (the field's name for the input size)

# Constructor options that between them reach every branch of the layer.
OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "two-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "batch-first": {"batch_first": True, "num_layers": 2},
    "projected": {"proj_size": P},
    "two-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
    "projected-everything": {
        "num_layers": 2,
        "bidirectional": True,
        "proj_size": P,
        "bias": False,
        "batch_first": True,
    },
}
FORMS = ["batched", "unbatched", "packed-sorted", "packed-unsorted"]
LENGTHS = {"packed-sorted": [6, 4, 4], "packed-unsorted": [2, 6, 4]}


def build_pair(*args, seed=0, backend=None, **kwargs):
    """`torch.nn.LSTM` and `fused_lstm.LSTM` from the same call and the same seed."""
    args = args or (I, H)
    torch.manual_seed(seed)
    native = nn.LSTM(*args, **kwargs)
    torch.manual_seed(seed)
    ours = fused_lstm.LSTM(*args, backend=backend, **kwargs)
    return native, ours


def build_cells(*args, seed=0, backend=None, **kwargs):
    args = args or (I, H)
    torch.manual_seed(seed)
    native = nn.LSTMCell(*args, **kwargs)
    torch.manual_seed(seed)
    ours = fused_lstm.LSTMCell(*args, backend=backend, **kwargs)
    return native, ours


def values(*shape, seed=0, dtype=torch.float32):
    """Normal values, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_input(form="batched", *, dtype=torch.float32, batch_first=False, steps=T, batch=B, size=I):
    if form == "unbatched":
        return values(steps, size, seed=1, dtype=dtype)
    if form == "batched":
        x = values(steps, batch, size, seed=1, dtype=dtype)
        return x.transpose(0, 1).contiguous() if batch_first else x
    sequences = [values(n, size, seed=n + i, dtype=dtype) for i, n in enumerate(LENGTHS[form])]
    return pack_sequence(sequences, enforce_sorted=form == "packed-sorted")


def make_hx(module, form="batched", *, dtype=torch.float32, batch=B, container=tuple):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    between = () if form == "unbatched" else (batch,)
    h0 = values(rows, *between, module.proj_size or module.hidden_size, seed=2, dtype=dtype)
    c0 = values(rows, *between, module.hidden_size, seed=3, dtype=dtype)
    return container([h0, c0])


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def map_input(function, x):
    if isinstance(x, PackedSequence):
        return PackedSequence(function(x.data), *x[1:])
    return function(x)


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


def weighted_sum(tensors):
    """A loss whose gradient differs from element to element."""
    return sum(
        (t * values(*t.shape, seed=40 + i, dtype=t.dtype)).sum() for i, t in enumerate(tensors)
    )


def named_results(output, states):
    return {"output": data_of(output), "h_n": states[0], "c_n": states[1]}


def run(module, x, hx=None, *, loss_on=("output", "h_n", "c_n"), seed=7):
    """One training step without the update: results and every gradient, by name."""
    x = map_input(leaf, x)
    if hx is not None:
        hx = type(hx)(leaf(state) for state in hx)
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output, states = module(x, hx)
    results = named_results(output, states)
    weighted_sum([results[name] for name in loss_on]).backward()
    results = {name: tensor.detach() for name, tensor in results.items()}
    results["grad of input"] = data_of(x).grad
    if hx is not None:
        results["grad of h0"], results["grad of c0"] = hx[0].grad, hx[1].grad
    for name, parameter in module.named_parameters():
        results[f"grad of {name}"] = parameter.grad
    return results


def tolerances(dtype, backend):
    """Keyword arguments for `torch.testing.assert_close`."""
    if dtype == torch.float64 and backend == "reference":
        # Another order of summation than torch's, a few dozen roundings of 1.1e-16 each.
        return {"rtol": 1e-10, "atol": 1e-12}
    return {}


def assert_same_results(actual, expected, backend=None, reference64=None):
    """Compares two dictionaries of `run`; with `reference64`, by error budget."""
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        got = actual[name]
        if wanted is None:
            # With one step, torch leaves out the projection that the cells do not depend on.
            assert name.startswith("grad of weight_hr"), f"torch gives no {name}"
            assert got is None or not got.any(), name
            continue
        assert got is not None, f"{name} is None"
        assert got.dtype == wanted.dtype, name
        if reference64 is not None:
            assert_within_budget(got, wanted, reference64[name], name)
        else:
            torch.testing.assert_close(
                got,
                wanted,
                **tolerances(wanted.dtype, backend),
                msg=lambda text, name=name: f"{name}: {text}",
            )


def compare(native, ours, x, hx=None, *, backend=None, **options):
    """One training step of both layers: equal results, equal gradients."""
    expected = run(native, x, hx, **options)
    actual = run(ours, x, hx, **options)
    reference64 = None
    if data_of(x).dtype in (torch.float16, torch.bfloat16):
        wide = type(hx)(state.double() for state in hx) if hx is not None else None
        exact = copy.deepcopy(native).double()
        reference64 = run(exact, map_input(torch.Tensor.double, x), wide, **options)
    assert_same_results(actual, expected, backend, reference64)
    return actual


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the error it raised, if any, and the warnings on the way."""

    error: type | None
    message: str
    warnings: tuple


def outcome(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error, message = None, ""
        try:
            call()
        except Exception as raised:  # its type and text are what the test compares
            error, message = type(raised), str(raised)
    return Outcome(error, message, tuple((w.category, str(w.message)) for w in caught))
