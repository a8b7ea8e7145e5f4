"""The native CPU kernels against torch.nn.LSTM and the equations: every flag, shape and layout.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of h (H,
or the size of the projection), `D` directions, `N` rows of a packed batch. Gate order i, f, g, o.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import random
import subprocess
import sys
import threading
from typing import NamedTuple

import pytest
import torch
from fused_lstm.kernels.cpu import (
    LibraryUnavailableError,
    PlainLayers,
    launch,
    layer_backward,
    layer_forward,
    load,
    lstm_backward,
    lstm_forward,
)

try:
    INSTRUCTION_SETS = load().instruction_sets
except LibraryUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "settings")

THREADS = (1, 2, 3)
NO_MODIFIERS = launch.NO_MODIFIERS
UNMODIFIED = [NO_MODIFIERS] * 2
NAN, INF = float("nan"), float("inf")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
# A sanitized build is several times slower.
FUZZ_ROUNDS = 4
# Of so few results the largest error says little.
FEW = 300


@pytest.fixture
def settings():
    """Restores what the tests set: the instruction set and the number of threads."""
    chosen, threads = launch._instruction_set, torch.get_num_threads()
    yield
    launch._instruction_set = chosen
    torch.set_num_threads(threads)


@contextlib.contextmanager
def setting(instruction_set: int = 0, threads: int = 1):
    launch._instruction_set = instruction_set
    torch.set_num_threads(threads)
    yield f"{INSTRUCTION_SETS[instruction_set]}, {threads} threads"


def every_setting(threads=THREADS):
    """Every instruction set with one thread and with several: contexts, one after another.

    The best instruction set takes every number of threads, the others one thread or the most.
    """
    for k, n in itertools.product(range(len(INSTRUCTION_SETS)), threads):
        if k == 0 or n in (min(threads), max(threads)):
            yield setting(k, n)


def assert_accurate(actual, native32, exact, name):
    """Asserts that the error is at most twice that of PyTorch in the same dtype.

    That is the root of the mean square. The largest error of a few hundred results is a matter of
    luck, PyTorch's as well as ours: it may be eight times as large.

    Args:
        actual: float32 or float64, the tensor under test.
        native32: by PyTorch in float32, from the same inputs, which float32 holds exactly.
        exact: by PyTorch in float64.
        name: what to call it in the message.
    """
    assert actual.shape == exact.shape, f"{name}: {actual.shape}, not {exact.shape}"
    if not actual.numel():
        return
    eps = torch.finfo(actual.dtype).eps
    # The error of PyTorch in float64 is that in float32, scaled; `exact` itself has it once.
    scale = 1.0
    if actual.dtype == torch.float64:
        scale = 1.5 * eps / torch.finfo(torch.float32).eps
    error, allowed = actual.double() - exact, scale * (native32.double() - exact)
    largest = exact.abs().max().item()
    # A rounding of the result; and of so few that PyTorch may have been lucky with each, some
    # roundings of terms that are about one.
    few = 4 * eps * max(1.0, largest) if actual.numel() < FEW else 0.0
    for kind, size, factor in (
        ("root of the mean square", lambda x: x.square().mean().sqrt().item(), 2),
        ("largest", lambda x: x.abs().max().item(), 8),
    ):
        found, budget = size(error), factor * size(allowed) + eps * size(exact) + few
        # Written so that a NaN fails.
        assert found <= budget, f"{name}: {kind} error {found:.3g} above its budget of {budget:.3g}"


def normals(seed):
    """A source of normal values that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, scale=1.0: (torch.randn(*shape, generator=generator) * scale).double()


def convert(values, dtype):
    """Tensors, None and tuples of them in a dtype, as new tensors."""
    if isinstance(values, (list, tuple)):
        return [convert(value, dtype) for value in values]
    return None if values is None else values.to(dtype, copy=True)


def nan_like(values):
    if isinstance(values, (list, tuple)):
        return [nan_like(value) for value in values]
    return None if values is None else torch.full_like(values, NAN)


# One recurrence


class Recurrence(NamedTuple):
    T: int
    B: int
    H: int
    P: int = 0
    sizes: tuple[int, ...] | None = None
    reverse: bool = False

    @property
    def batch_sizes(self):
        return None if self.sizes is None else torch.tensor(self.sizes)


def recurrence_inputs(case, seed=0):
    """(gates, weight_hh, h0, c0, weight_hr) and gradients of (h, c, h_n, c_n)."""
    normal = normals(seed)
    leading = (case.T, case.B) if case.sizes is None else (sum(case.sizes),)
    H, P = case.H, case.P or case.H
    inputs = [
        normal(*leading, 4 * H),
        normal(4 * H, P, scale=P**-0.5),
        normal(case.B, P),
        normal(case.B, H),
        normal(P, H, scale=H**-0.5) if case.P else None,
    ]
    grads = [normal(*leading, P), normal(*leading, H), normal(case.B, P), normal(case.B, H)]
    return inputs, grads


def equations(case, inputs, grads, dtype):
    """The recurrence, step by step: results and gradients by name."""
    inputs = [x if x is None else x.requires_grad_() for x in convert(inputs, dtype)]
    gates, weight_hh, h0, c0, weight_hr = inputs
    steps = list(gates if case.sizes is None else gates.split(case.sizes))
    h, c = h0, c0
    rows: list = [None] * len(steps)
    for t in reversed(range(len(steps))) if case.reverse else range(len(steps)):
        n = len(steps[t])
        i, f, g, o = (steps[t] + h[:n] @ weight_hh.T).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c[:n] + i * g
        h_t = o * c_t.tanh()
        if weight_hr is not None:
            h_t = h_t @ weight_hr.T
        # An identity: the gradient of h_t in all its uses.
        h_t = h_t.clone()
        h_t.retain_grad()
        rows[t] = h_t, c_t, torch.cat([i, f, g, o], -1)
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    join = torch.stack if case.sizes is None else torch.cat
    outputs = [join(kind) for kind in zip(*rows, strict=True)]
    results = dict(zip(("h", "c", "activations"), outputs, strict=True), h_n=h, c_n=c)
    pairs = [
        (results[name], grad.to(dtype))
        for name, grad in zip(("h", "c", "h_n", "c_n"), grads, strict=True)
        if grad is not None
    ]
    if pairs:
        sum((y * g).sum() for y, g in pairs).backward()
    for name, x in (("dgates", gates), ("dh0", h0), ("dc0", c0)):
        results[name] = torch.zeros_like(x) if x.grad is None else x.grad
    if weight_hr is not None:
        results["whole dh"] = join(
            [torch.zeros_like(h) if h.grad is None else h.grad for h, _, _ in rows]
        )
    return {name: y.detach() for name, y in results.items()}


def run_recurrence(case, inputs, grads, save_activations=True, save_cells=True):
    _, weight_hh, _, c0, weight_hr = inputs
    batch_sizes, reverse = case.batch_sizes, case.reverse
    h, c, activations, h_n, c_n = lstm_forward(
        *inputs, batch_sizes, NO_MODIFIERS, reverse, save_activations, save_cells
    )
    results = {"h": h, "c": c, "activations": activations, "h_n": h_n, "c_n": c_n}
    if save_activations and save_cells:
        saved = (activations, c, weight_hh, c0, weight_hr, batch_sizes, NO_MODIFIERS, reverse)
        gradients = lstm_backward(*grads, *saved)
        results.update(zip(("dgates", "dh0", "dc0", "whole dh"), gradients, strict=True))
        if weight_hr is None:
            assert results.pop("whole dh") is None
    return results


def check_recurrence(case, seed=0, inputs=None, grads=None, threads=THREADS, layout=None):
    """Every dtype, instruction set and number of threads against the equations."""
    given, given_grads = recurrence_inputs(case, seed)
    inputs, grads = inputs or given, given_grads if grads is None else grads
    native, exact = (equations(case, inputs, grads, d) for d in (torch.float32, torch.float64))
    for dtype in (torch.float32, torch.float64):
        tensors, gradients = convert(inputs, dtype), convert(grads, dtype)
        if layout:
            tensors, gradients = layout(tensors), layout(gradients)
        for context in every_setting(threads):
            with context as how:
                # What the scratch memory still holds must not matter.
                run_recurrence(case, nan_like(tensors), nan_like(gradients))
                results = run_recurrence(case, tensors, gradients)
                unsaved = run_recurrence(case, tensors, gradients, False, False)
            assert list(results) == list(exact)
            for name, expected in exact.items():
                assert results[name].dtype == dtype
                title = f"{name}, {dtype}, {how}"
                assert_accurate(results[name], native[name], expected, title)
            assert unsaved["c"].shape == unsaved["activations"].shape == (0,)
            for name in ("h", "h_n", "c_n"):
                title = f"{name} unsaved, {dtype}, {how}"
                assert_accurate(unsaved[name], native[name], exact[name], title)


RECURRENCES = [
    Recurrence(1, 1, 1),
    Recurrence(1, 3, 5),
    Recurrence(7, 2, 3),
    Recurrence(23, 1, 16, reverse=True),
    Recurrence(24, 1, 17),
    Recurrence(4, 6, 20, reverse=True),
    Recurrence(5, 5, 33),
    Recurrence(3, 7, 48, reverse=True),
    Recurrence(6, 12, 64),
    Recurrence(4, 13, 100),
    Recurrence(3, 70, 16, reverse=True),
    Recurrence(40, 1, 130),
    Recurrence(300, 1, 5),
    Recurrence(5, 53, 3),
    Recurrence(6, 4, 9, 1),
    Recurrence(2, 3, 17, 5, reverse=True),
    Recurrence(5, 7, 33, 20),
    Recurrence(40, 2, 20, 17),
    Recurrence(4, 70, 16, 3, reverse=True),
    # A projection that does not shrink h.
    Recurrence(5, 6, 5, 5),
    Recurrence(5, 6, 7, 18, reverse=True),
]


@pytest.mark.parametrize("case", RECURRENCES, ids=lambda c: "-".join(map(str, c)))
def test_recurrence(case):
    check_recurrence(case)


PACKED = [
    (1,),
    (3,),
    (1,) * 10,
    (5, 5, 3, 3, 1),
    (18, 2, 1),
    (13, 12, 7, 6, 1),
    (4, 4, 4, 4, 4, 4),
    (24, 1, 1, 1),
    (70, 69, 3),
]
packed = pytest.mark.parametrize("sizes", PACKED, ids=lambda s: "-".join(map(str, s)))
# More rows than a chunk of the backward pass, and chunks that end at and within steps.
CHUNKS = [
    (256,),
    (257,),
    (300, 2),
    (128, 128, 1),
    (257, 256, 255),
    (100, 100, 56, 50, 50),
    (70, 70, 70, 46, 46, 1),
    (90, 1, *(1,) * 40),
    (9,) * 28 + (5,),
]
chunks = pytest.mark.parametrize("sizes", CHUNKS, ids=lambda s: "-".join(map(str, s[:6])))


@packed
@pytest.mark.parametrize("P", [0, 4])
def test_packed_recurrence(sizes, P):
    for reverse in (False, True):
        check_recurrence(Recurrence(len(sizes), sizes[0], 9, P, sizes, reverse), threads=(1, 3))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_of_gradients(given, packed):
    sizes = (3, 3, 2, 1) if packed else None
    case = Recurrence(4, 3, 6, 2 if given[1] else 0, sizes, given[0])
    inputs, grads = recurrence_inputs(case)
    grads = [g if on else None for g, on in zip(grads, given, strict=True)]
    check_recurrence(case, inputs=inputs, grads=grads, threads=(1,))


@dtypes
@pytest.mark.parametrize("save_activations", [False, True])
@pytest.mark.parametrize("save_cells", [False, True])
def test_what_is_not_saved_is_empty(dtype, save_activations, save_cells):
    case = Recurrence(7, 5, 9, 4)
    inputs, _ = recurrence_inputs(case)
    inputs = convert(inputs, dtype)
    for context in every_setting():
        with context:
            full = lstm_forward(*inputs, None, NO_MODIFIERS, False, True, True)
            some = lstm_forward(*inputs, None, NO_MODIFIERS, False, save_activations, save_cells)
        wanted = (True, save_cells, save_activations, True, True)
        for x, y, on in zip(full, some, wanted, strict=True):
            if on:
                torch.testing.assert_close(x, y)
            else:
                assert y.shape == (0,)


def scattered(tensors):
    """The same values in other memory: transposed, wide, with gaps."""
    if tensors is None:
        return None
    if isinstance(tensors, list):
        return [scattered(t) for t in tensors]
    if tensors.dim() == 3:
        return tensors.transpose(0, 1).contiguous().transpose(0, 1)
    if tensors.dim() == 2:
        wide = tensors.new_full((tensors.shape[0], tensors.shape[1] + 3), NAN)
        wide[:, 1:-2] = tensors
        return wide[:, 1:-2]
    spaced = tensors.new_full((tensors.shape[0], 2), NAN)
    spaced[:, 0] = tensors
    return spaced[:, 0]


def transposed(tensors):
    """The same values with the last dimension not contiguous."""
    if tensors is None:
        return None
    if isinstance(tensors, list):
        return [transposed(t) for t in tensors]
    if tensors.dim() == 1:
        return scattered(tensors)
    return tensors.transpose(-1, -2).contiguous().transpose(-1, -2)


layouts = pytest.mark.parametrize("layout", [scattered, transposed])


@layouts
@pytest.mark.parametrize("sizes", [None, (4, 4, 2, 1)], ids=["dense", "packed"])
def test_strided_recurrence(layout, sizes):
    case = Recurrence(4, 4, 7, 3, sizes)
    check_recurrence(case, layout=layout, threads=(1,))
    if sizes is None:
        check_recurrence(case._replace(T=30), layout=layout, threads=(1,))


def test_expanded_recurrence():
    """Strides of zero, as the gradient of a sum has them."""
    case = Recurrence(9, 5, 6)
    tensors, grads = (convert(every, torch.float32) for every in recurrence_inputs(case))
    (gates, weight_hh, h0, *_), one = tensors, torch.ones(())
    wide = [gates[:1, :1].expand(9, 5, -1), weight_hh, h0[:1].expand(5, -1), one.expand(5, 6), None]
    wide_grads = [one.expand(g.shape) for g in grads]
    dense, dense_grads = (
        [None if t is None else t.contiguous() for t in kind] for kind in (wide, wide_grads)
    )
    for context in every_setting():
        with context as how:
            actual, expected = (
                run_recurrence(case, wide, wide_grads),
                run_recurrence(case, dense, dense_grads),
            )
        for name, value in expected.items():
            assert torch.equal(actual[name], value), f"{name}: {how}"


# Layers


class Layer(NamedTuple):
    T: int
    B: int
    I: int  # noqa: E741  (the field's name for the input size)
    H: int
    P: int = 0
    D: int = 1
    bias: bool = True
    batch_first: bool = False
    sizes: tuple[int, ...] | None = None

    @property
    def batch_sizes(self):
        return None if self.sizes is None else torch.tensor(self.sizes)


def layer_inputs(case, seed=0):
    """x (time first), h0, c0, weights, and gradients of (output, h_n, c_n)."""
    normal = normals(seed)
    T, B, I, H, D = case.T, case.B, case.I, case.H, case.D  # noqa: E741
    P = case.P or H
    leading = (T, B) if case.sizes is None else (sum(case.sizes),)
    x, h0, c0 = normal(*leading, I), normal(D, B, P), normal(D, B, H)
    weights = [
        [
            normal(4 * H, I, scale=I**-0.5),
            normal(4 * H, P, scale=P**-0.5),
            normal(4 * H) if case.bias else None,
            normal(4 * H) if case.bias else None,
            normal(P, H, scale=H**-0.5) if case.P else None,
        ]
        for _ in range(D)
    ]
    grads = [normal(*leading, D * P), normal(D, B, P), normal(D, B, H)]
    return [x, h0, c0, weights], grads


WEIGHTS = ("ih", "hh", "bias_ih", "bias_hh", "hr")


def torch_layer(case, inputs, grads, dtype):
    """torch.nn.LSTM's operator: results and gradients by name."""
    x, h0, c0, weights = convert(inputs, dtype)
    flat = [w for own in weights for w in own if w is not None]
    leaves = [t.requires_grad_() for t in (x, h0, c0, *flat)]
    options = (case.bias, 1, 0.0, True, case.D == 2)
    if case.sizes is None:
        outputs = torch._VF.lstm(x, (h0, c0), flat, *options, False)
    else:
        outputs = torch._VF.lstm(x, case.batch_sizes, (h0, c0), flat, *options)
    results = dict(zip(("output", "h_n", "c_n"), outputs, strict=True))
    pairs = [(y, g.to(dtype)) for y, g in zip(outputs, grads, strict=True) if g is not None]
    if pairs:
        sum((y * g).sum() for y, g in pairs).backward()
    names = ["dx", "dh0", "dc0"]
    names += [
        f"d{name}[{d}]"
        for d, own in enumerate(weights)
        for name, w in zip(WEIGHTS, own, strict=True)
        if w is not None
    ]
    for name, leaf in zip(names, leaves, strict=True):
        results[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: y.detach() for name, y in results.items()}


def run_layer(case, inputs, grads, want_input=True, want_weights=True):
    x, h0, c0, weights = inputs
    batch_first = case.batch_first and case.sizes is None
    if batch_first:
        x = x.transpose(0, 1).contiguous()
    rest = (case.batch_sizes, batch_first, UNMODIFIED)
    out = layer_forward(x, h0, c0, weights, *rest, True, False)
    gradients = layer_backward(
        *grads,
        None,
        x,
        h0,
        c0,
        weights,
        *rest,
        out.output,
        out.c,
        out.activations,
        want_input,
        want_weights,
    )
    results = {"output": out.output, "h_n": out.h_n, "c_n": out.c_n}
    if want_input:
        dx = gradients.input
        assert dx.shape == x.shape
        results["dx"] = dx.transpose(0, 1) if batch_first else dx
    else:
        assert gradients.input is None
    results |= {"dh0": gradients.h0, "dc0": gradients.c0}
    for d, own in enumerate(gradients.weights):
        for name, w, given in zip(WEIGHTS, own, weights[d], strict=True):
            if given is not None and want_weights:
                results[f"d{name}[{d}]"] = w
            else:
                assert w is None, name
    plain = layer_forward(x, h0, c0, weights, *rest, False, False)
    assert plain.c is None
    assert plain.activations is None
    results |= {f"{name} unsaved": getattr(plain, name) for name in ("output", "h_n", "c_n")}
    return results


def check_layer(case, seed=0, inputs=None, grads=None, threads=THREADS, layout=None, **wanted):
    """Every dtype, instruction set and number of threads against torch.nn.LSTM."""
    given, given_grads = layer_inputs(case, seed)
    inputs, grads = inputs or given, given_grads if grads is None else grads
    native, exact = (torch_layer(case, inputs, grads, d) for d in (torch.float32, torch.float64))
    for dtype in (torch.float32, torch.float64):
        tensors, gradients = convert(inputs, dtype), convert(grads, dtype)
        if layout:
            tensors, gradients = layout(tensors), layout(gradients)
        for context in every_setting(threads):
            with context as how:
                run_layer(case, nan_like(tensors), nan_like(gradients), **wanted)
                results = run_layer(case, tensors, gradients, **wanted)
            for name, actual in results.items():
                key = name.removesuffix(" unsaved")
                assert actual.dtype == dtype
                assert_accurate(actual, native[key], exact[key], f"{name}, {dtype}, {how}")
            if all(wanted.values()):
                assert results.keys() >= exact.keys()


LAYERS = [
    Layer(1, 1, 1, 1),
    Layer(1, 7, 3, 5, D=2),
    Layer(1, 9, 7, 21, D=2),
    Layer(2, 3, 1, 3, bias=False),
    Layer(3, 8, 5, 16, D=2, batch_first=True),
    Layer(23, 1, 4, 17),
    Layer(24, 1, 4, 17, D=2),
    Layer(25, 1, 4, 17, batch_first=True),
    Layer(5, 5, 7, 20, D=2),
    Layer(40, 2, 3, 33),
    Layer(6, 4, 9, 48, batch_first=True, D=2),
    Layer(4, 13, 9, 48),
    Layer(6, 12, 11, 64, bias=False, D=2),
    Layer(3, 6, 2, 100, batch_first=True),
    Layer(2, 71, 5, 33, D=2),
    Layer(5, 53, 3, 16),
    Layer(300, 1, 2, 20),
    Layer(3, 70, 17, 130),
    Layer(1, 300, 3, 5),
    Layer(2, 129, 3, 3, D=2, batch_first=True),
    # Hidden units are shared out where there are few rows.
    Layer(12, 1, 64, 100),
    Layer(12, 3, 48, 130),
    # Weights that do not fit into a cache.
    Layer(3, 5, 400, 130),
    Layer(1, 100, 300, 100),
    Layer(3, 9, 8, 260),
    Layer(7, 5, 3, 20, 3),
    Layer(2, 3, 5, 33, 32, D=2),
    Layer(4, 13, 6, 33, 17, batch_first=True),
    Layer(40, 8, 5, 63, 1, D=2, bias=False),
    Layer(5, 70, 9, 16, 5),
    Layer(12, 2, 31, 130, 48),
]


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: "-".join(map(str, c[:-1])))
def test_layer(case):
    # Threads cost most where processes compete for the cores.
    check_layer(case, threads=THREADS if case.H < 64 else (1, 2))


@pytest.mark.parametrize("B", range(1, 14))
def test_every_height_of_a_tile(B):
    check_layer(Layer(3, B, 5, 17), threads=(1,))
    check_layer(Layer(8, B, 5, 17, 6, D=2), threads=(2,))


# Too few rows to rearrange the weights for, in a single step and in two, and just enough.
FEW_ROWS = (1, 2, 3, 4, 7, 11, 12, 13, 15, 16, 17, 23, 31, 32, 33)
few_rows = pytest.mark.parametrize("B", FEW_ROWS)
few_steps = pytest.mark.parametrize("T", [1, 2])


@few_steps
@few_rows
def test_few_rows(T, B):
    check_layer(Layer(T, B, 5, 17, D=2), threads=(1,))
    check_layer(Layer(T, B, 33, 16, bias=False), threads=(1,))
    check_layer(Layer(T, B, 1, 7), threads=(1,))
    check_layer(Layer(T, B, 6, 50, 7, batch_first=True), threads=(2,))
    check_recurrence(Recurrence(T, B, 18), threads=(1,))


@pytest.mark.parametrize(
    ("T", "B"), [(1, 40), (1, 53), (1, 54), (2, 35), (2, 36), (4, 16), (7, 11)]
)
def test_few_rows_for_long_sums(T, B):
    """The longer the sums are, the more rows read the weights as they are: here 54 or 72 in all."""
    check_layer(Layer(T, B, 70, 258), threads=(1, 2))


@dtypes
@few_steps
def test_few_rows_are_computed_each_for_itself(dtype, T):
    """As in other batches, and what is not finite stays in its row."""
    most = max(FEW_ROWS)
    inputs = convert(layer_inputs(Layer(T, most, 5, 19))[0], dtype)
    x, h0, c0, weights = inputs
    rest = (weights, None, False, UNMODIFIED, False, False)
    for context in every_setting((1,)):
        with context as how:
            for B in FEW_ROWS:
                whole = layer_forward(x[:, :B], h0[:, :B], c0[:, :B], *rest)
                for row in {0, 1, B // 2, B - 1} & set(range(B)):
                    one = slice(row, row + 1)
                    alone = layer_forward(x[:, one], h0[:, one], c0[:, one], *rest)
                    torch.testing.assert_close(whole.output[:, one], alone.output, msg=how)
                    bad = x[:, :B].clone()
                    bad[0, row, -1] = NAN
                    found = layer_forward(bad, h0[:, :B], c0[:, :B], *rest).output
                    others = [b for b in range(B) if b != row]
                    assert torch.equal(found[:, others], whole.output[:, others]), how
                    assert found[:, row].isnan().all(), how


@packed
@pytest.mark.parametrize("P", [0, 4])
def test_packed_layer(sizes, P):
    case = Layer(len(sizes), sizes[0], 5, 17, P, 2, bias=not P, sizes=sizes)
    check_layer(case, threads=(1, 3))


@chunks
def test_chunks(sizes):
    check_layer(Layer(len(sizes), sizes[0], 5, 8, 3, 2, sizes=sizes), threads=(1, 2))
    check_layer(Layer(len(sizes), sizes[0], 6, 20, sizes=sizes), threads=(3,))


@layouts
@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("sizes", [None, (4, 4, 2, 1), (9, 9, 8)], ids=str)
def test_strided_layer(layout, P, sizes):
    case = Layer(4, 4, 5, 7, P, 2) if sizes is None else Layer(3, sizes[0], 5, 7, P, 2, sizes=sizes)
    case = case._replace(T=len(sizes) if sizes else 4)
    check_layer(case, layout=layout, threads=(1, 2))


@dtypes
@pytest.mark.parametrize("sizes", [(5, 5), (5,) * 20 + (4, 3, 3)], ids=["few", "many"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_expanded_layer(dtype, sizes, packed):
    """Strides of zero in every input: the bits are those of memory without gaps."""
    case = Layer(len(sizes), 5, 3, 17, 6, D=2, sizes=sizes if packed else None)
    (x, h0, c0, weights), grads = layer_inputs(case)
    first = [t[(slice(0, 1),) * (t.dim() - 1)].to(dtype) for t in (x, h0, c0)]
    last = [t.flatten()[0].to(dtype) for t in grads]
    weights[0][2] = weights[0][2][:1].expand(68)
    weights[1][1] = weights[1][1][:1].expand(68, 6)
    inputs = [t.expand(full.shape) for t, full in zip(first, (x, h0, c0), strict=True)]
    grads = [t.expand(full.shape) for t, full in zip(last, grads, strict=True)]
    weights = [[w.to(dtype) for w in own] for own in weights]
    dense = [[t.contiguous() for t in kind] for kind in (inputs, grads)]
    for context in every_setting((1, 2)):
        with context as how:
            actual = run_layer(case, [*inputs, weights], grads)
            expected = run_layer(case, [*dense[0], weights], dense[1])
        for name, value in expected.items():
            assert torch.equal(actual[name], value), f"{name}: {how}"


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)), ids=str)
def test_what_is_given_and_what_is_wanted(given, wanted):
    for case in (Layer(3, 2, 4, 6, D=2), Layer(9, 4, 4, 9, 3), Layer(4, 3, 2, 5, sizes=(3, 2))):
        case = case._replace(T=len(case.sizes) if case.sizes else case.T)
        _, grads = layer_inputs(case)
        grads = [g if on else None for g, on in zip(grads, given, strict=True)]
        check_layer(case, grads=grads, threads=(2,), want_input=wanted[0], want_weights=wanted[1])


@pytest.mark.parametrize("seed", range(FUZZ_ROUNDS))
def test_fuzz(seed):
    choice = random.Random(seed)
    for k in range(8):
        T, B = choice.choice([(choice.randint(1, 40), choice.randint(1, 9)), (3, 70), (9, 31)])
        H = choice.choice([1, 2, 7, 8, 15, 16, 17, 31, 32, 47, 65])
        P = choice.randint(1, H - 1) if H > 1 and choice.random() < 0.4 else 0
        sizes = None
        if choice.random() < 0.5:
            sizes = tuple(sorted((choice.randint(1, B) for _ in range(T)), reverse=True))
            B = sizes[0]
        case = Layer(
            T,
            B,
            choice.choice([1, 2, 3, 8, 13, 33]),
            H,
            P,
            choice.randint(1, 2),
            choice.random() < 0.7,
            choice.random() < 0.5,
            sizes,
        )
        try:
            check_layer(case, seed=100 * seed + k, threads=(choice.choice(THREADS),))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (3, 5, 17), (70, 4, 33), (2, 100, 100)])
def test_cell(dtype, bias, B, I, H):  # noqa: E741
    """[B, I] and [B, H] in, one step, as a sequence of one."""
    (x, h0, c0, weights), grads = layer_inputs(Layer(1, B, I, H, bias=bias))
    x, h0, c0 = (t.to(dtype) for t in (x, h0, c0))
    weights, (_, *grads) = convert(weights, dtype), convert(grads, dtype)
    for context in every_setting():
        with context:
            rest = (weights, None, False, UNMODIFIED)
            arguments = (x[0], h0[0], c0[0], *rest)
            out = layer_forward(*arguments, True, False)
            assert out.output.data_ptr() == out.h_n.data_ptr()
            gradients = layer_backward(
                None, grads[0][0], grads[1][0], None, *arguments, *(out[0], *out[3:]), True, True
            )
            whole = layer_forward(x, h0, c0, *rest, True, False)
            expected = layer_backward(
                None, *grads, None, x, h0, c0, *rest, *(whole[0], *whole[3:]), True, True
            )
        assert torch.equal(out.h_n, whole.h_n[0])
        assert torch.equal(out.c_n, whole.c_n[0])
        for a, b in zip(gradients[:3], expected[:3], strict=True):
            assert torch.equal(a, b[0])
        for a, b in zip(gradients.weights[0], expected.weights[0], strict=True):
            assert (a is b is None) or torch.equal(a, b)
    unsaved = layer_forward(*arguments, False, False)
    torch.testing.assert_close(unsaved.output, whole.h_n[0])


def strided(t):
    """The same numbers, not contiguous where there is more than one of them."""
    return t.repeat_interleave(2, -2)[..., ::2, :]


def plain_inputs(dtype, T, B, I, H, L=1, D=1, bias=True, **layout):  # noqa: E741
    """x, h0, c0, the weights of each layer and direction, and gradients of the results."""
    cases = [Layer(T, B, width, H, 0, D, bias) for width in (I, *[D * H] * (L - 1))]
    inputs, grads = layer_inputs(cases[0])
    x, _, _, weights = inputs
    for k, case in enumerate(cases[1:]):
        weights = weights + layer_inputs(case, seed=k + 1)[0][3]
    h0, c0, *states = (torch.randn(L * D, B, H) for _ in range(4))
    x, h0, c0, weights, grads = convert((x, h0, c0, weights, [grads[0], *states]), dtype)
    if layout.get("batch_first"):
        x = x.transpose(0, 1).contiguous()
    if layout.get("cell"):
        x, h0, c0, grads = x[0], h0[0], c0[0], [None, grads[1][0], grads[2][0]]
    return strided(x) if layout.get("strided") else x, h0, c0, weights, grads


def general_layers(x, h0, c0, weights, grads, D, batch_first, want_input=True):
    """Results and gradients of a stack, by one general call for each layer."""
    layers, tapes = [weights[k : k + D] for k in range(0, len(weights), D)], []
    cell = x.dim() == 2
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    grad_h0, grad_c0 = torch.empty_like(h0), torch.empty_like(c0)
    for k, own in enumerate(layers):
        part = ... if cell else slice(k * D, (k + 1) * D)
        arguments = (x, h0[part], c0[part], own, None, batch_first and k == 0, UNMODIFIED)
        out = layer_forward(*arguments, True, False)
        tapes.append((part, arguments, (out.output, out.c, out.activations)))
        x, h_n[part], c_n[part] = out[:3]
    grad, of_h_n, of_c_n = grads
    of_weights = []
    for k in reversed(range(len(layers))):
        part, arguments, saved = tapes[k]
        states = [None if g is None else g[part] for g in (of_h_n, of_c_n)]
        out = layer_backward(grad, *states, None, *arguments, *saved, want_input or k > 0, True)
        grad, grad_h0[part], grad_c0[part], own = out
        of_weights = [w for each in own for w in each[:4]] + of_weights
    return (x, h_n, c_n), (grad, grad_h0, grad_c0, *of_weights)


def addresses(tensors):
    return [t.data_ptr() for t in tensors]


KINDS = {
    "layer": {},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "cell": {"cell": True},
    "cell-no-bias": {"cell": True, "bias": False},
    "bidirectional": {"D": 2},
    "stacked": {"L": 3},
    "strided": {"strided": True},
    "strided-cell": {"strided": True, "cell": True},
    "everything": {"L": 2, "D": 2, "batch_first": True, "strided": True},
}


@dtypes
@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("T", "B", "I", "H"), [(1, 1, 1, 1), (7, 3, 5, 17), (12, 6, 33, 64)])
def test_plain_layers_are_the_general_ones(dtype, states, kind, T, B, I, H):  # noqa: E741
    L, D, batch_first = kind.get("L", 1), kind.get("D", 1), kind.get("batch_first", False)
    T = 1 if kind.get("cell") else T
    x, h0, c0, weights, grads = plain_inputs(dtype, T, B, I, H, **kind)
    if not states:
        h0, c0 = torch.zeros_like(h0), torch.zeros_like(c0)
    given = (h0, c0) if states else ()
    weights_given = [w for own in weights for w in own[:4] if w is not None]
    tensors = [x, *given, *weights_given]
    sizes = (H, L, D, kind.get("bias", True), batch_first, states, dtype)
    layers = PlainLayers(x.shape, x.stride(), *sizes)
    assert tuple(t.shape for t in tensors) == layers.shapes
    assert layers.state == h0.shape
    for context in every_setting():
        with context:
            results, gradients = general_layers(x, h0, c0, weights, grads, D, batch_first)
            h_n, c_n, *kept = layers.forward(addresses(tensors), True)
            unsaved = layers.forward(addresses(tensors), False)
            cell = kind.get("cell")
            for actual in (
                (h_n if cell else kept[-1], h_n, c_n),
                (unsaved[0] if cell else unsaved[-1], *unsaved[:2]),
            ):
                for a, b in zip(actual, results, strict=True):
                    assert torch.equal(a, b)
            assert len(unsaved) == (2 if cell else 2 + min(L, 2))
            kept = [*tensors, *kept]
            assert layers.fits(*kept)
            expected = [
                g for k, g in enumerate(gradients) if g is not None and (states or k not in (1, 2))
            ]
            for of_x, of_h0, of_c0 in itertools.product([False, True], repeat=3):
                needed = (of_x, *([of_h0, of_c0] if states else []), *[True] * len(weights_given))
                for arrange in (list, lambda ts: [t if t is None else strided(t) for t in ts]):
                    actual = layers.backward(*arrange(grads), addresses(kept), needed)
                    for want, a, b in zip(needed, actual, expected, strict=True):
                        assert torch.equal(a, b) if want else a is None
    if kind.get("bias", True):
        assert actual[-1].data_ptr() != actual[-2].data_ptr()


@dtypes
@pytest.mark.parametrize("D", [1, 2])
def test_plain_layers_without_some_gradients(dtype, D):
    """Of the results, and of what lies below the lowest weights that want one."""
    x, h0, c0, weights, grads = plain_inputs(dtype, 5, 3, 4, 6, L=3, D=D)
    flat = [w for own in weights for w in own[:4]]
    layers = PlainLayers(x.shape, x.stride(), 6, 3, D, True, False, True, dtype)
    tensors = [x, h0, c0, *flat]
    saved = layers.forward(addresses(tensors), True)[2:]
    kept = addresses([*tensors, *saved])
    everything = (True,) * (3 + len(flat))
    for given in itertools.product([False, True], repeat=3):
        some = [g if keep else None for g, keep in zip(grads, given, strict=True)]
        actual = layers.backward(*some, kept, everything)
        expected = general_layers(x, h0, c0, weights, some, D, False)[1]
        assert all(map(torch.equal, actual, expected))
    for lowest in range(3):
        needed = (False,) * 3 + tuple(k >= 4 * D * lowest for k in range(len(flat)))
        some = layers.backward(*grads, kept, needed)
        for want, a, b in zip(needed, some, actual, strict=True):
            assert torch.equal(a, b) if want else a is None


@dtypes
def test_plain_layers_know_tensors_that_do_not_fit(dtype):
    x, h0, c0, weights, _ = plain_inputs(dtype, 5, 3, 4, 6, L=2)
    flat = [w for own in weights for w in own[:4]]
    layers = PlainLayers(x.shape, x.stride(), 6, 2, 1, True, False, True, dtype)
    right = [x, h0, c0, *flat]
    right += layers.forward(addresses(right), True)[2:]
    assert layers.fits(*right)
    for k, tensor in enumerate(right):
        if k < 3 + len(flat) and tensor.dim() == 1:
            continue  # a bias, which no gradient depends on
        for wrong in (
            tensor[..., :-1],
            tensor.half(),
            torch.stack([tensor, tensor], -1)[..., 0],
            tensor.to("meta"),
        ):
            assert not layers.fits(*right[:k], wrong, *right[k + 1 :])


@dtypes
def test_no_sequences_at_all(dtype):
    case = Layer(3, 0, 4, 5, 2, 2)
    inputs, grads = layer_inputs(case)
    results = run_layer(case, convert(inputs, dtype), convert(grads, dtype))
    assert results["output"].shape == (3, 0, 4)
    for name in (f"d{w}[{d}]" for w in WEIGHTS for d in range(2)):
        assert not results[name].any(), name
    case = Recurrence(3, 0, 5)
    inputs, grads = recurrence_inputs(case)
    results = run_recurrence(case, convert(inputs, dtype), convert(grads, dtype))
    assert results["dgates"].shape == (3, 0, 20)


def test_inputs_are_left_alone():
    for case in (Layer(5, 6, 3, 17, 4, 2), Layer(2, 2, 3, 5), Layer(3, 9, 3, 8, sizes=(9, 8, 1))):
        inputs, grads = layer_inputs(case)
        inputs, grads = convert(inputs, torch.float32), convert(grads, torch.float32)
        before = convert([inputs, grads], torch.float32)
        with setting(0, 2):
            run_layer(case, inputs, grads)
        flat = torch.utils._pytree.tree_leaves([inputs, grads])
        for a, b in zip(flat, torch.utils._pytree.tree_leaves(before), strict=True):
            assert (a is b is None) or torch.equal(a, b)


# The C interface itself: outputs of any strides, and nothing written beside them

MODIFIER_FIELDS = " lengths resets@ recurrent_mask+ zoneout_h@ zoneout_c@ cell_clip"
FORWARD_FIELDS = """steps batch input_size hidden_size features reverse batch_sizes gates@ x@
weight_ih bias_ih bias_hh weight_hh weight_hr h0+ c0+ h@ c@ activations@ h_n+ c_n+"""
FORWARD_FIELDS += MODIFIER_FIELDS
BACKWARD_FIELDS = """steps batch input_size hidden_size features reverse batch_sizes activations@ c@
x@ h@ weight_ih weight_hh weight_hr h0+ c0+ grad_h@ grad_c@ grad_h_n+ grad_c_n+ grad_gates@
whole_grad_h@ grad_x@ grad_weight_ih grad_weight_hh grad_bias_ih grad_bias_hh grad_weight_hr
grad_h0+ grad_c0+"""
BACKWARD_FIELDS += MODIFIER_FIELDS


def structure(fields, **values):
    """The bytes of a structure of lstm.h; @ marks an LstmSequence, + an LstmState."""
    numbers = []
    for field in fields.split():
        name, kind = field.rstrip("@+"), field[-1]
        value = values.pop(name, None)
        if kind == "@":
            strides = (0, 0)
            if value is not None:
                packed = value.dim() == 2
                strides = (0, value.stride(0)) if packed else (value.stride(0), value.stride(1))
            numbers += [0 if value is None else value.data_ptr(), *strides]
        elif kind == "+":
            numbers += [0, 0] if value is None else [value.data_ptr(), value.stride(0)]
        elif isinstance(value, torch.Tensor):
            numbers.append(value.data_ptr())
        else:
            numbers.append(int(value or 0))
    assert not values, values
    return bytes((ctypes.c_int64 * len(numbers))(*numbers))


class Guarded:
    """Tensors with gaps between their rows and a border around, filled with a canary."""

    CANARY = -12345.0

    def __init__(self, dtype):
        self.dtype, self.stores = dtype, []

    def __call__(self, *shape, dense=False):
        rows = 1
        for n in shape[:-1]:
            rows *= n
        width = shape[-1] if not dense else shape[-1] * rows
        gap = 0 if dense else 3
        store = torch.full(((1 if dense else rows) * (width + gap) + 41,), self.CANARY).to(
            self.dtype
        )
        strides = [1]
        for k in range(len(shape) - 1):
            strides.append(shape[-1] + gap if k == 0 else strides[-1] * shape[len(shape) - 1 - k])
        view = store.as_strided(shape, strides[::-1], 19)
        view.fill_(NAN)
        self.stores.append((store, view))
        return view

    def check(self):
        for store, view in self.stores:
            assert not view.isnan().any(), f"{list(view.shape)}: not all was written"
            rest = store.clone()
            rest.as_strided(view.shape, view.stride(), 19).fill_(self.CANARY)
            assert (rest == self.CANARY).all(), f"{list(view.shape)}: written beside"


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        Layer(2, 3, 5, 7),
        Layer(3, 2, 5, 7, 3),
        Layer(6, 5, 3, 17),
        Layer(5, 9, 7, 33, 5),
        Layer(9, 70, 2, 20),
        Layer(30, 1, 66, 65),
        Layer(5, 9, 3, 19, 0, sizes=(9, 6, 6, 2, 1)),
        Layer(3, 4, 3, 5, 2, sizes=(4, 3, 1)),
        Layer(3, 130, 3, 5, 2, sizes=(130, 126, 7)),
    ],
    ids=lambda c: "-".join(map(str, c[:5])) + "-packed" * bool(c.sizes),
)
def test_outputs_of_any_stride_and_nothing_beside_them(dtype, case):
    (x, h0, c0, weights), grads = layer_inputs(case)
    x, h0, c0 = (t.to(dtype) for t in (x, h0[0], c0[0]))
    ih, hh, bias_ih, bias_hh, hr = convert(weights[0], dtype)
    grad_h, grad_h_n, grad_c_n = (convert(grads[0], dtype), *(g[0].to(dtype) for g in grads[1:]))
    H, P, B, N = case.H, case.P or case.H, case.B, x.shape[:-1]
    sizes = case.batch_sizes
    common = {
        "steps": case.T,
        "batch": B,
        "input_size": case.I,
        "hidden_size": H,
        "features": P,
        "batch_sizes": sizes,
        "weight_ih": ih,
        "weight_hh": hh,
        "weight_hr": hr,
        "x": x,
        "h0": h0,
        "c0": c0,
    }
    library, kind = load(), launch.DTYPES[dtype]
    for instruction_set, threads, reverse in itertools.product(
        range(len(INSTRUCTION_SETS)), THREADS, (False, True)
    ):
        new = Guarded(dtype)
        saved = {"h": new(*N, P), "c": new(*N, H), "activations": new(*N, 4 * H)}
        outputs = {**saved, "h_n": new(B, P), "c_n": new(B, H)}
        run = structure(
            FORWARD_FIELDS, reverse=reverse, bias_ih=bias_ih, bias_hh=bias_hh, **common, **outputs
        )
        assert library.forward(run, 1, kind, threads, instruction_set) == 0
        new.check()
        gradients = {
            "grad_gates": new(*N, 4 * H),
            "whole_grad_h": new(*N, P) if hr is not None else None,
            "grad_x": new(*N, case.I),
            "grad_weight_ih": new(4 * H, case.I, dense=True),
            "grad_weight_hh": new(4 * H, P, dense=True),
            "grad_bias_ih": new(4 * H, dense=True),
            "grad_bias_hh": new(4 * H, dense=True),
            "grad_weight_hr": new(P, H, dense=True) if hr is not None else None,
            "grad_h0": new(B, P),
            "grad_c0": new(B, H),
        }
        given = {"grad_h": grad_h, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n}
        run = structure(BACKWARD_FIELDS, reverse=reverse, **common, **saved, **given, **gradients)
        assert library.backward(run, 1, kind, threads, instruction_set) == 0
        new.check()
        # The same numbers as where everything is dense.
        gates = torch.nn.functional.linear(x.double(), ih.double(), (bias_ih + bias_hh).double())
        plain = Recurrence(case.T, B, H, case.P, case.sizes, reverse)
        exact = equations(
            plain,
            [gates, *(t if t is None else t.double() for t in (hh, h0, c0, hr))],
            [grad_h.double(), None, grad_h_n.double(), grad_c_n.double()],
            torch.float64,
        )
        names = ("h", "c", "activations", "h_n", "c_n", "dgates", "whole dh", "dh0", "dc0")
        keys = (*outputs, "grad_gates", "whole_grad_h", "grad_h0", "grad_c0")
        every = {**outputs, **gradients}
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
        for name, key in zip(names, keys, strict=True):
            if every[key] is not None:
                torch.testing.assert_close(every[key].double(), exact[name], **tolerance)
        da = exact["dgates"]
        torch.testing.assert_close(gradients["grad_x"].double(), da @ ih.double(), **tolerance)
        torch.testing.assert_close(
            gradients["grad_bias_ih"].double(), da.flatten(0, -2).sum(0), **tolerance
        )
        assert torch.equal(gradients["grad_bias_hh"], gradients["grad_bias_ih"])
        torch.testing.assert_close(
            gradients["grad_weight_ih"].double(),
            da.flatten(0, -2).T @ x.double().flatten(0, -2),
            **tolerance,
        )


@dtypes
def test_states_that_are_not_given_are_zero(dtype):
    """Null pointers for h0, c0 and incoming gradients."""
    case = Layer(4, 5, 3, 9)
    (x, _, _, ((ih, hh, b, _, _),)), _ = convert(layer_inputs(case), dtype)
    library, kind = load(), launch.DTYPES[dtype]
    sizes = {"steps": 4, "batch": 5, "input_size": 3, "hidden_size": 9, "features": 9}
    zeros = {name: torch.zeros(5, 9, dtype=dtype) for name in ("h0", "c0")}
    found = []
    for states in ({}, zeros):
        new = Guarded(dtype)
        saved = {"h": new(4, 5, 9), "c": new(4, 5, 9), "activations": new(4, 5, 36)}
        common = {**sizes, **states, "x": x, "weight_ih": ih, "weight_hh": hh}
        run = structure(FORWARD_FIELDS, **common, **saved, h_n=new(5, 9), c_n=new(5, 9))
        assert library.forward(run, 1, kind, 1, 0) == 0
        run = structure(
            BACKWARD_FIELDS,
            **common,
            **saved,
            grad_h=b[:9].expand(4, 5, 9),
            grad_x=new(4, 5, 3),
            grad_weight_ih=new(36, 3, dense=True),
            grad_weight_hh=new(36, 9, dense=True),
            grad_h0=new(5, 9),
            grad_c0=new(5, 9),
        )
        assert library.backward(run, 1, kind, 1, 0) == 0
        new.check()
        found.append([view for _, view in new.stores])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Numerics


@pytest.fixture
def every_way():
    """Runs a layer in every setting: yields the setting's name and the results."""

    def run(case, inputs, grads):
        for context in every_setting((1, 3)):
            with context as how:
                yield how, run_layer(case, inputs, grads)

    return run


@dtypes
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("H", [5, 17])
@pytest.mark.parametrize("where", ["x", "h0", "c0", "grad_output"])
@pytest.mark.parametrize(("T", "B"), [(4, 4), (3, 14)])
def test_what_is_not_finite_stays_in_its_sequence(every_way, dtype, bad, H, where, T, B):
    case = Layer(T, B, 5, H, 3 if H == 17 else 0)
    clean, grads = layer_inputs(case)
    clean, grads = convert(clean, dtype), convert(grads, dtype)
    inputs, bad_grads = convert(clean, dtype), convert(grads, dtype)
    row = 2
    target = {"x": inputs[0], "h0": inputs[1], "c0": inputs[2], "grad_output": bad_grads[0]}[where]
    target[-1 if where == "grad_output" else 0, row, 1] = bad
    others = [b for b in range(B) if b != row]
    native = torch_layer(case, inputs, bad_grads, dtype)
    for how, expected in list(every_way(case, clean, grads)):
        k = INSTRUCTION_SETS.index(how.split(",")[0])
        with setting(k, int(how.split()[1])):
            actual = run_layer(case, inputs, bad_grads)
        for name in ("output", "h_n", "c_n", "dx", "dh0", "dc0"):
            a, e, n = actual[name], expected[name], native[name]
            assert torch.equal(a[:, others], e[:, others]), f"{name}: {how}"
            assert torch.equal(a.isnan(), n.isnan()), f"{name}: {how}"
            finite = n.isfinite()
            torch.testing.assert_close(a[finite], n[finite], rtol=1e-4, atol=1e-5)
            assert torch.equal(a.isinf() & ~finite, n.isinf()), f"{name}: {how}"
        for name in ("output", "h_n", "c_n"):
            got = actual[f"{name} unsaved"]
            assert torch.equal(got.isnan(), native[name].isnan()), f"{name}: {how}"


def in_another_order(inputs, order, order_of_x):
    """The same with hidden units, and the features of x, in another order."""
    x, h0, c0, weights = inputs
    rows = torch.cat([gate * len(order) + order for gate in range(4)])
    columns = {0: order_of_x, 1: order}
    reordered = [
        [
            w if w is None else w[rows][:, columns[k]] if k in columns else w[rows]
            for k, w in enumerate(own)
        ]
        for own in weights
    ]
    return x[..., order_of_x], h0[..., order], c0[..., order], reordered


def torchs_worst(case, inputs, exact, orders=20):
    """PyTorch's results in float32, each as it is furthest off over orders of units and features.

    Where one gate of many does not saturate, the order in which its sum is added up decides.
    """
    generator = torch.Generator().manual_seed(0)
    worst = {}
    for _ in range(orders):
        order = torch.randperm(case.H, generator=generator)
        order_of_x = torch.randperm(case.I, generator=generator)
        no_grads = (None,) * 3
        found = torch_layer(
            case, in_another_order(inputs, order, order_of_x), no_grads, torch.float32
        )
        for name in ("output", "h_n", "c_n"):
            result = found[name][..., order.argsort()]
            error = (result.double() - exact[name]).square().mean().item()
            if name not in worst or not error <= worst[name][0]:
                worst[name] = (error, result)
    return {name: result for name, (_, result) in worst.items()}


@dtypes
@pytest.mark.parametrize("scale", [1e30, 1e4, 1e2, 1e-12, 1e-40, 0.0])
@pytest.mark.parametrize("where", ["x", "h0", "c0", "all"])
@pytest.mark.parametrize("B", [7, 12])
def test_huge_and_tiny_values(every_way, dtype, B, scale, where):
    case = Layer(4, B, 5, 17)
    (x, h0, c0, weights), grads = layer_inputs(case)
    inputs = [x, h0, c0]
    for k, name in enumerate(("x", "h0", "c0")):
        if where in (name, "all"):
            inputs[k] = inputs[k] * scale
    inputs = convert([*inputs, weights], torch.float32)
    native, exact = (torch_layer(case, inputs, grads, d) for d in (torch.float32, torch.float64))
    worst = torchs_worst(case, inputs, exact)
    inputs, grads = convert(inputs, dtype), convert(grads, dtype)
    for how, actual in every_way(case, inputs, grads):
        for name, e in exact.items():
            assert not actual[name].isnan().any(), f"{name}: {how}"
            if name in worst:
                assert_accurate(actual[name], worst[name], e, f"{name}: {how}")
            elif native[name].isfinite().all():
                # A gate near one is a rounding away from it or not. The gates saturate at the
                # smallest number, PyTorch's at zero.
                slack = 16 * torch.finfo(dtype).eps * max(1.0, scale)
                slack += 1e-35 * scale**2 if scale > 1 else 0.0
                error = (actual[name].double() - e).abs().max()
                slack += 2 * (native[name].double() - e).abs().max()
                assert error <= 1e-3 * e.abs().max() + slack, f"{name}: {how}"


@dtypes
def test_saturated_gates_of_all_signs(dtype):
    """Every combination of signs of the four gates and the cell, at every size."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
    sizes = [5.0, 20.0, 87.0, 88.0, 89.0, 104.0, 200.0, 700.0, 709.0, 750.0, 1e4, 1e30, INF]
    H = len(signs)
    gates = torch.stack([(signs[:, :4] * size).T.flatten() for size in sizes]).unsqueeze(0)
    B = len(sizes)
    zeros, c0 = torch.zeros(B, H, dtype=torch.float64), signs[:, 4].expand(B, H) * 3
    inputs = [gates, torch.zeros(4 * H, H, dtype=torch.float64), zeros, c0, None]
    grads = recurrence_inputs(Recurrence(1, B, H))[1]
    case = Recurrence(1, B, H)
    native, exact = (equations(case, inputs, grads, d) for d in (torch.float32, torch.float64))
    for context in every_setting((1,)):
        with context as how:
            results = run_recurrence(case, convert(inputs, dtype), convert(grads, dtype))
        for name in exact:
            assert_accurate(results[name], native[name], exact[name], f"{name}: {how}")
        for kind, gate in zip("ifgo", results["activations"].chunk(4, -1), strict=True):
            lowest = -1 if kind == "g" else 0
            assert gate.min() >= lowest, kind
            assert gate.max() <= 1, kind


@dtypes
def test_activations_are_accurate_everywhere(dtype):
    """Relative to their value, by float64 and by the spacing of the results."""
    magnitudes = torch.cat([torch.logspace(-37, 2, 1500), torch.linspace(0, 20, 3000)])
    values = torch.cat([magnitudes, -magnitudes]).double()
    H = len(values) // 20
    values = values[: 20 * H].reshape(1, 20, H)
    gates = values.repeat(1, 1, 4).to(dtype)
    zeros = torch.zeros(20, H, dtype=dtype)
    exact = values.to(dtype).double()
    eps = torch.finfo(dtype).eps
    # Below this the result in float64 is no better than the one under test.
    weight = torch.zeros(4 * H, 1, dtype=dtype)
    for context in every_setting((1,)):
        with context as how:
            _, _, activations, _, _ = lstm_forward(
                gates,
                weight,
                zeros[:, :1],
                zeros,
                torch.zeros(1, H, dtype=dtype),
                None,
                NO_MODIFIERS,
                False,
                True,
                True,
            )
        i, f, g, o = activations.double().chunk(4, -1)
        assert torch.equal(i, f)
        assert torch.equal(i, o)
        tiny = torch.finfo(torch.float32).tiny
        error = ((g - exact.tanh()).abs() / exact.tanh().abs().clamp_min(tiny)).max() / eps
        assert error <= 6, f"tanh, {how}: {error:.1f} eps"
        normal = exact > -85
        error = ((i - exact.sigmoid()).abs() / exact.sigmoid())[normal].max() / eps
        assert error <= 6, f"sigmoid, {how}: {error:.1f} eps"
        assert i[~normal].max() <= 1e-36


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3])
def test_small_values_keep_their_relative_accuracy(every_way, scale):
    """All signs are positive, so that no sum cancels."""
    case = Layer(3, 9, 1, 20, bias=False)
    (x, h0, c0, weights), grads = layer_inputs(case)
    inputs = [x.abs() * scale, h0.abs() * scale, c0.abs() * scale]
    inputs = convert([*inputs, [[w if w is None else w.abs() for w in weights[0]]]], torch.float32)
    exact = torch_layer(case, inputs, grads, torch.float64)
    for how, actual in every_way(case, inputs, convert(grads, torch.float32)):
        for name in ("output", "h_n", "c_n"):
            error = ((actual[name] - exact[name]) / exact[name]).abs().max()
            assert error < 1e-5, f"{name}, {how}: {error}"


@pytest.mark.parametrize("size", [10.0, 1e4])
def test_large_cells(size):
    case = Layer(6, 9, 4, 17)
    (x, h0, c0, weights), grads = layer_inputs(case)
    check_layer(case, inputs=[x, h0, c0 * size, weights], grads=grads, threads=(1,))


@pytest.mark.parametrize(
    "case",
    [
        Layer(4, 16, 1024, 1024),
        Layer(3, 8, 700, 350, 200),
        Layer(40, 32, 6, 80),
        Layer(40, 32, 6, 80, 8),
        Layer(40, 32, 6, 80, sizes=(32,) * 40),
    ],
    ids=["long products", "long products projected", "many rows", "projected", "packed"],
)
def test_large_sums_are_as_accurate_as_torchs(case):
    inputs, grads = layer_inputs(case)
    native, exact = (torch_layer(case, inputs, grads, d) for d in (torch.float32, torch.float64))
    actual = run_layer(case, convert(inputs, torch.float32), convert(grads, torch.float32))
    for name, e in exact.items():
        assert_accurate(actual[name], native[name], e, name)


@pytest.mark.parametrize(("T", "B", "H"), [(2000, 1, 8), (2000, 2, 5)])
def test_long_sequences_do_not_drift(T, B, H):
    case = Layer(T, B, 3, H)
    inputs, grads = layer_inputs(case)
    native, exact = (torch_layer(case, inputs, grads, d) for d in (torch.float32, torch.float64))
    actual = run_layer(case, convert(inputs, torch.float32), convert(grads, torch.float32))
    for name, e in exact.items():
        assert_accurate(actual[name], native[name], e, name)


# The same bits


BITS = [
    Layer(30, 12, 17, 33, 0, 2),
    Layer(40, 1, 64, 100),
    Layer(4, 3, 5, 7, 2, 2),
    Layer(20, 30, 9, 48, 5, 2, sizes=tuple(range(30, 10, -1))),
]


@dtypes
@pytest.mark.parametrize("case", BITS, ids=["rows", "units", "few rows", "packed"])
def test_the_same_bits_every_time(dtype, case):
    inputs, grads = layer_inputs(case)
    inputs, grads = convert(inputs, dtype), convert(grads, dtype)
    for context in every_setting():
        with context as how:
            first = run_layer(case, inputs, grads)
            # With something else in between, in the scratch memory.
            run_layer(case, nan_like(inputs), nan_like(grads))
            again = run_layer(case, inputs, grads)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name}: {how}"


@pytest.mark.parametrize("threads", THREADS)
def test_concurrent_calls(threads):
    """Four Python threads at once, with different layers, get what each gets alone."""
    jobs = []
    for k, case in enumerate(BITS):
        inputs, grads = layer_inputs(case, seed=k)
        dtype = (torch.float32, torch.float64)[k % 2]
        jobs.append((case, convert(inputs, dtype), convert(grads, dtype)))
    torch.set_num_threads(threads)
    expected = [run_layer(*job) for job in jobs]
    start, failures, done = threading.Barrier(len(jobs)), [], []

    def work(k):
        torch.set_num_threads(threads)
        start.wait()
        for turn in range(4):
            n = (k + turn) % len(jobs)
            for name, value in run_layer(*jobs[n]).items():
                if not torch.equal(value, expected[n][name]):
                    failures.append((k, jobs[n][0], name))
        done.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert len(done) == len(jobs)


# In processes of their own


def python(script, timeout=120):
    """Standard output of a script in a new interpreter; its error is the failure."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout


COMPUTE = """
import os, signal, sys, time, torch
from fused_lstm.kernels.cpu import layer_forward, load

load()
torch.manual_seed(0)
T, B, I, H = 30, 16, 32, 64
weights = [(torch.randn(4 * H, I) / 8, torch.randn(4 * H, H) / 8, None, None, None)]
x, h0, c0 = torch.randn(T, B, I), torch.zeros(1, B, H), torch.zeros(1, B, H)
compute = lambda: layer_forward(
    x, h0, c0, weights, None, False, [(None,) * 6], False, False
).output
"""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@on_linux
@pytest.mark.parametrize("before", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("after", [1, 2], ids=["then 1", "then 2"])
def test_a_forked_child_computes(before, after):
    out = python(
        COMPUTE
        + f"""
torch.set_num_threads({before})
expected = compute()
children = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        torch.set_num_threads({after})
        right = all(torch.allclose(compute(), expected, atol=1e-6) for _ in range(3))
        os._exit(0 if right else 1)
    children.append(pid)
print([os.waitpid(pid, 0)[1] for pid in children], torch.equal(compute(), expected))
"""
    )
    assert out.strip() == "[0, 0] True"


@on_linux
def test_one_thread_is_one_thread():
    out = python(
        COMPUTE
        + """
torch.set_num_threads(1)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
for _ in range(3):
    compute()
assert threads() == before, (before, threads())
torch.set_num_threads(2)
compute()
assert threads() <= before + 1
print("ok")
"""
    )
    assert out == "ok\n"


@on_linux
def test_few_rows_read_nothing_beyond_their_tensors():
    """Each begins or ends where its pages do, and those around may not be read."""
    out = python(
        """
import ctypes, itertools, mmap, torch
from fused_lstm.kernels.cpu import launch, layer_forward, load

maps, c, page = [], ctypes.CDLL(None), mmap.PAGESIZE
modifiers = [launch.NO_MODIFIERS]

def guarded(dtype, shape, ends):
    values = torch.randn(shape).to(dtype)
    size = values.numel() * values.itemsize
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + 2 * page)
    maps.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = page + (pages - size if ends else 0)
    tensor = torch.frombuffer(memory, dtype=dtype, count=values.numel(), offset=offset)
    tensor = tensor.view(shape).copy_(values)
    for guard in (0, pages + page):
        assert c.mprotect(ctypes.c_void_p(address + guard), page, 0) == 0
    return tensor

for T, B, I, H, ends in itertools.product((1, 2), (1, 3, 23), (1, 5, 33), (1, 7, 17), (0, 1)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        shapes = (T, B, I), (1, B, H), (1, B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)
        x, h0, c0, *weights = [guarded(dtype, shape, ends) for shape in shapes]
        for k, takes in enumerate(load().multiply_bfloat16):
            if takes or dtype != torch.bfloat16:
                launch._instruction_set = k
                more = ([(*weights, None)], None, False, modifiers, False, False)
                assert layer_forward(x, h0, c0, *more).output.isfinite().all()
print("ok")
"""
    )
    assert out == "ok\n"


# Inference in bfloat16

BFLOAT16_SETS = [k for k, takes in enumerate(load().multiply_bfloat16) if takes]
in_bfloat16 = pytest.mark.skipif(not BFLOAT16_SETS, reason="needs instructions for bfloat16")


def bfloat16_inputs(case, seed=0):
    """x, h0, c0 and weights that bfloat16 holds exactly, in float64."""
    return convert(convert(layer_inputs(case, seed)[0], torch.bfloat16), torch.float64)


def infer(case, inputs, dtype, modifiers=NO_MODIFIERS, layout=None):
    """Results of a layer by name, in time-first order."""
    x, h0, c0, weights = convert(inputs, dtype)
    batch_first = case.batch_first and case.sizes is None
    if batch_first:
        x = x.transpose(0, 1).contiguous()
    if layout:
        x, h0, c0, weights = layout([x, h0, c0, weights])
    rest = (case.batch_sizes, batch_first, [modifiers] * case.D, False, False)
    out = layer_forward(x, h0, c0, weights, *rest)
    assert out.c is out.activations is None
    return {"output": out.output, "h_n": out.h_n, "c_n": out.c_n}


def check_bfloat16(case, seed=0, modifiers=NO_MODIFIERS, layout=None, threads=(1, 2)):
    """Against float64, with twice the error of torch.nn.LSTM in bfloat16, and a rounding."""
    inputs = bfloat16_inputs(case, seed)
    none = [None] * 3
    with torch.no_grad():
        narrow, wide = (torch_layer(case, inputs, none, d) for d in (torch.bfloat16, torch.float64))
    with setting():
        exact = infer(case, inputs, torch.float64, modifiers)
    for k, n in itertools.product(BFLOAT16_SETS, threads):
        with setting(k, n) as how:
            infer(case, nan_like(inputs), torch.bfloat16, modifiers, layout)
            results = infer(case, inputs, torch.bfloat16, modifiers, layout)
        for name, actual in results.items():
            assert actual.dtype == torch.bfloat16
            allowed = (narrow[name].double() - wide[name]).abs().max().item()
            budget = 2 * allowed + torch.finfo(torch.bfloat16).eps * wide[name].abs().max().item()
            error = (actual.double() - exact[name]).abs().max().item()
            assert error <= budget, f"{name}, {how}: error {error:.3g} above {budget:.3g}"


@in_bfloat16
@pytest.mark.parametrize("B", range(1, 14))
def test_bfloat16_every_height_of_a_tile(B):
    for T, I, H in ((1, 3, 5), (2, 4, 7), (5, 7, 16), (4, 33, 18), (3, 6, 33)):  # noqa: E741
        check_bfloat16(Layer(T, B, I, H, D=2))


@in_bfloat16
@few_steps
@few_rows
def test_bfloat16_few_rows(T, B):
    for I, H in ((5, 17), (33, 16), (1, 7)):  # noqa: E741
        check_bfloat16(Layer(T, B, I, H, D=2, bias=I > 1), threads=(1,))


@in_bfloat16
@pytest.mark.parametrize(
    "case",
    [
        Layer(1, 1, 1, 1),
        Layer(3, 1, 1, 1, bias=False),
        Layer(40, 1, 64, 65),
        Layer(1, 300, 3, 5),
        Layer(1, 2, 63, 100, D=2),
        Layer(30, 8, 5, 16, batch_first=True, D=2),
        Layer(6, 129, 33, 20),
        Layer(3, 40, 131, 130, batch_first=True),
        # Sums longer than a chain, and weights that do not fit into a cache.
        Layer(2, 5, 601, 300),
        Layer(5, 9, 3, 19, D=2, sizes=(9, 6, 6, 2, 1)),
        Layer(1, 3, 3, 5, sizes=(3,)),
        Layer(40, 11, 8, 33, sizes=tuple(max(1, 11 - t // 3) for t in range(40))),
    ],
    ids=lambda c: "-".join(map(str, c[:4])) + "-packed" * bool(c.sizes),
)
def test_bfloat16_layer(case):
    check_bfloat16(case)


@in_bfloat16
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("case", [Layer(7, 6, 5, 17, D=2), Layer(1, 9, 4, 16), Layer(9, 70, 3, 33)])
def test_bfloat16_lengths_resets_and_clipping(case, clip):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, case.T + 1, (case.B,), generator=generator)
    resets = torch.rand(case.T, case.B, 1, generator=generator) < 0.3
    for modifiers in ((lengths, None), (None, resets), (lengths, resets)):
        check_bfloat16(case, modifiers=(*modifiers, None, None, None, clip))


@in_bfloat16
@pytest.mark.parametrize("case", [Layer(5, 9, 7, 33, D=2), Layer(3, 2, 5, 7, batch_first=True)])
def test_bfloat16_strided_inputs(case):
    def apart(values):
        """The same with gaps of NaN between and behind the rows, of odd width."""
        if values is None or isinstance(values, list):
            return values
        wide = values.new_full((*values.shape[:-1], values.shape[-1] + 3), NAN)
        wide[..., 1:-2] = values
        return wide[..., 1:-2]

    check_bfloat16(case, layout=lambda tensors: [apart(t) for t in tensors])


@in_bfloat16
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["x", "h0", "c0"])
@pytest.mark.parametrize(("T", "B", "H"), [(4, 4, 5), (3, 14, 17)])
def test_bfloat16_what_is_not_finite_stays_in_its_sequence(bad, where, T, B, H):
    case = Layer(T, B, 5, H)
    clean, row = bfloat16_inputs(case), 2
    inputs = convert(clean, torch.float64)
    # The last of an odd number of features has no neighbour in a product.
    inputs[where][0, row, -1] = bad
    others = [b for b in range(B) if b != row]
    for k, n in itertools.product(BFLOAT16_SETS, (1, 2)):
        with setting(k, n):
            expected = infer(case, clean, torch.bfloat16)
            actual = infer(case, inputs, torch.bfloat16)
            exact = infer(case, inputs, torch.float32)
        for name, a in actual.items():
            assert torch.equal(a[:, others], expected[name][:, others]), name
            assert torch.equal(a.isnan(), exact[name].isnan()), name
            assert torch.equal(a.isinf(), exact[name].isinf()), name


@in_bfloat16
def test_bfloat16_states_of_sequences_without_steps():
    """Every number there is: what enters wide comes out as it was, but for what is denormal."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    h0 = numbers.view(1, 256, 256)
    case = Layer(1, 256, 1, 256)
    x, _, _, weights = bfloat16_inputs(case)
    lengths = torch.zeros(256, dtype=torch.int64)
    modifiers = (lengths, None, None, None, None, None)
    for k in BFLOAT16_SETS:
        with setting(k, 2):
            out = infer(case, [x, h0, h0, weights], torch.bfloat16, modifiers)
        assert torch.equal(out["h_n"].view(torch.int16), h0.view(torch.int16))
        normal = numbers.abs() >= torch.finfo(torch.bfloat16).tiny
        c_n = out["c_n"].flatten()
        assert torch.equal(c_n[normal], numbers[normal])
        assert torch.equal(c_n.isnan(), numbers.isnan())
        assert not c_n[numbers.abs() < torch.finfo(torch.bfloat16).tiny].any()


@in_bfloat16
@pytest.mark.parametrize("case", [case._replace(P=0) for case in BITS])
def test_bfloat16_the_same_bits_every_time(case):
    inputs = bfloat16_inputs(case)
    for k, n in itertools.product(BFLOAT16_SETS, (1, 2)):
        with setting(k, n):
            first = infer(case, inputs, torch.bfloat16)
            infer(case, nan_like(inputs), torch.bfloat16)
            again = infer(case, inputs, torch.bfloat16)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


def bfloat16_structure(case, **more):
    """A recurrence in bfloat16 through the C interface: guards, results, and its structure."""
    x, h0, c0, ((ih, hh, *biases, _),) = convert(bfloat16_inputs(case), torch.bfloat16)
    new, N = Guarded(torch.bfloat16), x.shape[:-1]
    outputs = {
        "h": new(*N, case.H),
        "h_n": new(case.B, case.H),
        "c_n": new(case.B, case.H),
    }
    values = {
        "steps": case.T,
        "batch": case.B,
        "input_size": case.I,
        "hidden_size": case.H,
        "features": case.H,
        "batch_sizes": case.batch_sizes,
        "x": x,
        "weight_ih": ih,
        "weight_hh": hh,
        "bias_ih": biases[0],
        "bias_hh": biases[1],
        "h0": h0[0],
        "c0": c0[0],
        **outputs,
        **more,
    }
    # What it points to has to live as long as it does.
    return new, outputs, values, structure(FORWARD_FIELDS, **values)


@in_bfloat16
@pytest.mark.parametrize(
    "case", [Layer(2, 3, 5, 7), Layer(1, 1, 3, 5), Layer(5, 9, 3, 19, sizes=(9, 6, 6, 2, 1))]
)
def test_bfloat16_outputs_of_any_stride_and_nothing_beside_them(case):
    with setting():
        expected = infer(case, bfloat16_inputs(case), torch.bfloat16)
    for k, threads in itertools.product(BFLOAT16_SETS, THREADS):
        new, outputs, _alive, run = bfloat16_structure(case)
        assert load().forward(run, 1, launch.DTYPES[torch.bfloat16], threads, k) == 0
        new.check()
        assert torch.equal(outputs["h"], expected["output"])
        assert torch.equal(outputs["h_n"], expected["h_n"][0])
        assert torch.equal(outputs["c_n"], expected["c_n"][0])


def test_bfloat16_what_there_is_not_is_refused():
    case, refused = Layer(2, 3, 4, 6), 2
    T, B, H = case.T, case.B, case.H
    library, kind = load(), launch.DTYPES[torch.bfloat16]
    new = torch.zeros(T, B, 4 * H, dtype=torch.bfloat16)
    rows, states = new[..., :H], new[0, :, :H]
    for more in (
        {"gates": new},
        {"x": None},
        {"weight_ih": None},
        {"weight_hr": torch.zeros(H, H, dtype=torch.bfloat16)},
        {"features": H - 1},
        {"c": rows},
        {"activations": new},
        {"recurrent_mask": states},
        {"zoneout_h": rows},
        {"zoneout_c": rows},
    ):
        *_, alive, run = bfloat16_structure(case, **more)
        for k in range(len(INSTRUCTION_SETS)):
            assert library.forward(run, 1, kind, 1, k) == refused, more
    *_, alive, run = bfloat16_structure(case)
    for k, takes in enumerate(library.multiply_bfloat16):
        assert library.forward(run, 1, kind, 1, k) == (0 if takes else refused)
    assert library.backward(bytes(8 * len(BACKWARD_FIELDS)), 1, kind, 1, 0) == refused
    assert alive
