"""What changes the recurrence of the native CPU kernels, against the equations.

Dimensions: `T` time steps, `B` batch, `I` input features, `H` hidden units, `P` features of h (H,
or the size of the projection), `D` directions, `N` rows of a packed batch. Gate order i, f, g, o.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import pytest
import torch
from fused_lstm.kernels.cpu import layer_backward, layer_forward, load, lstm_backward, lstm_forward

from .test_native import (
    BACKWARD_FIELDS,
    FORWARD_FIELDS,
    INF,
    INSTRUCTION_SETS,
    NAN,
    WEIGHTS,
    Guarded,
    Layer,
    Recurrence,
    assert_accurate,
    convert,
    dtypes,
    every_setting,
    launch,
    layer_inputs,
    nan_like,
    normals,
    recurrence_inputs,
    scattered,
    setting,
    settings,  # noqa: F401  (a fixture)
    structure,
    transposed,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "settings")

THREADS = (1, 2)


class Modifiers(NamedTuple):
    lengths: torch.Tensor | None = None
    resets: torch.Tensor | None = None
    recurrent_mask: torch.Tensor | None = None
    zoneout_h: torch.Tensor | None = None
    zoneout_c: torch.Tensor | None = None
    cell_clip: float | None = None


NAMES = Modifiers._fields
# What a packed batch may have.
PACKED_NAMES = NAMES[1:]


def modifiers_of(case, names=None, seed=0, lengths="mixed", zoneout="masks"):
    """Modifiers for a case, in values that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    leading = (case.T, case.B) if case.sizes is None else (sum(case.sizes),)
    H, P = case.H, case.P or case.H

    def zoneouts(width):
        if zoneout == "constant":
            return torch.full((width,), 0.25, dtype=torch.float64).expand(*leading, width)
        chance = torch.rand(*leading, width, generator=generator)
        return (chance if zoneout == "any" else (chance < 0.3).float()).double()

    every = Modifiers(
        {
            "mixed": torch.randint(0, case.T + 1, (case.B,), generator=generator),
            "none": torch.zeros(case.B, dtype=torch.int64),
            "all": torch.full((case.B,), case.T),
        }[lengths],
        torch.rand(*leading, generator=generator) < 0.3,
        normals(seed + 1)(case.B, P),
        zoneouts(P),
        zoneouts(H),
        0.4,
    )
    if names is None:
        names = NAMES if case.sizes is None else PACKED_NAMES
    return Modifiers(**{name: getattr(every, name) for name in names})


def typed(modifiers, dtype):
    """Modifiers for a computation in a dtype."""
    return modifiers._replace(
        **{
            name: None if (value := getattr(modifiers, name)) is None else value.to(dtype)
            for name in ("recurrent_mask", "zoneout_h", "zoneout_c")
        }
    )


def steps_of(rows, case):
    return list(rows) if case.sizes is None else list(rows.split(case.sizes))


def valid(case, modifiers):
    """[T, B], which steps a sequence has."""
    counts = torch.full((case.B,), case.T)
    if case.sizes is not None:
        counts = torch.tensor([sum(n > b for n in case.sizes) for b in range(case.B)])
    elif modifiers.lengths is not None:
        counts = modifiers.lengths
    return torch.arange(case.T)[:, None] < counts


def spoiled(rows, case, modifiers, value=NAN):
    """The same rows, with something else at steps that the sequences do not have."""
    if rows is None or case.sizes is not None:
        return rows
    return torch.where(valid(case, modifiers)[..., None], rows, value)


def recurrence(case, gates, weight_hh, h0, c0, weight_hr, modifiers, reverse):
    """The equations, step by step: h, c, activations, h_n, c_n, and ĥ of each step."""
    dtype, mods, exists = gates.dtype, typed(modifiers, gates.dtype), valid(case, modifiers)
    given = {
        name: None if getattr(mods, name) is None else steps_of(getattr(mods, name), case)
        for name in ("resets", "zoneout_h", "zoneout_c")
    }
    gates = steps_of(gates, case)
    h, c, fresh = h0, c0, []
    rows: list = [None] * case.T
    for t in reversed(range(case.T)) if reverse else range(case.T):
        at = exists[t].nonzero()[:, 0]
        hp, cp = h[at], c[at]
        if given["resets"] is not None:
            reset = given["resets"][t][at][:, None]
            hp, cp = (torch.where(reset, torch.zeros((), dtype=dtype), s) for s in (hp, cp))
        entering = hp if mods.recurrent_mask is None else hp * mods.recurrent_mask[at]
        i, f, g, o = (gates[t][at] + entering @ weight_hh.T).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * cp + i * g
        if mods.cell_clip is not None:
            limit = min(mods.cell_clip, torch.finfo(dtype).max)
            c_t = torch.where(c_t.abs() < limit, c_t, c_t.detach().clamp(-limit, limit))
        h_t = o * c_t.tanh()
        if weight_hr is not None:
            h_t = h_t @ weight_hr.T
        h_t = h_t.clone()
        if h_t.requires_grad:
            h_t.retain_grad()
        fresh.append((t, at, h_t))
        if given["zoneout_c"] is not None:
            z = given["zoneout_c"][t][at]
            c_t = z * cp + (1 - z) * c_t
        if given["zoneout_h"] is not None:
            z = given["zoneout_h"][t][at]
            h_t = z * hp + (1 - z) * h_t
        h, c = h.index_copy(0, at, h_t), c.index_copy(0, at, c_t)
        n = case.B if case.sizes is None else case.sizes[t]
        rows[t] = [
            torch.zeros(n, y.shape[-1], dtype=dtype).index_copy(0, at, y)
            for y in (h_t, c_t, torch.cat([i, f, g, o], -1))
        ]
    join = torch.stack if case.sizes is None else torch.cat
    return *(join(kind) for kind in zip(*rows, strict=True)), h, c, fresh


def equations(case, inputs, grads, modifiers, dtype):
    """One recurrence: results and gradients by name."""
    inputs = [x if x is None else x.requires_grad_() for x in convert(inputs, dtype)]
    gates, weight_hh, h0, c0, weight_hr = inputs
    *outputs, fresh = recurrence(case, gates, weight_hh, h0, c0, weight_hr, modifiers, case.reverse)
    results = dict(zip(("h", "c", "activations", "h_n", "c_n"), outputs, strict=True))
    pairs = [
        (results[name], grad.to(dtype))
        for name, grad in zip(("h", "c", "h_n", "c_n"), grads, strict=True)
        if grad is not None
    ]
    sum((y * g).sum() for y, g in pairs).backward()
    for name, x in (("dgates", gates), ("dh0", h0), ("dc0", c0)):
        results[name] = torch.zeros_like(x) if x.grad is None else x.grad
    if weight_hr is not None:
        results["whole dh"] = torch.zeros_like(results["h"])
        for (t, at, h), rows in itertools.product(fresh, [steps_of(results["whole dh"], case)]):
            if h.grad is not None:
                rows[t][at] = h.grad
    return {name: y.detach() for name, y in results.items()}


def run_recurrence(case, inputs, grads, modifiers):
    _, weight_hh, _, c0, weight_hr = inputs
    rest = (case.batch_sizes, modifiers, case.reverse)
    h, c, activations, h_n, c_n = lstm_forward(*inputs, *rest, True, True)
    results = {"h": h, "c": c, "activations": activations, "h_n": h_n, "c_n": c_n}
    gradients = lstm_backward(*grads, activations, c, weight_hh, c0, weight_hr, *rest)
    results.update(zip(("dgates", "dh0", "dc0", "whole dh"), gradients, strict=True))
    if weight_hr is None:
        assert results.pop("whole dh") is None
    unsaved = lstm_forward(*inputs, *rest, False, False)
    for name, value in zip(("h", None, None, "h_n", "c_n"), unsaved, strict=True):
        if name:
            results[f"{name} unsaved"] = value
    return results


def assert_idle_steps_are_zero(rows, case, modifiers, name):
    if case.sizes is None:
        idle = rows[~valid(case, modifiers)]
        assert torch.equal(idle, torch.zeros_like(idle)), f"{name}: not zero behind the lengths"


def check_recurrence(case, modifiers, seed=0, threads=THREADS, layout=None, grads=None):
    """Every dtype, instruction set and number of threads against the equations."""
    inputs, given_grads = recurrence_inputs(case, seed)
    grads = given_grads if grads is None else grads
    native, exact = (
        equations(case, inputs, grads, modifiers, d) for d in (torch.float32, torch.float64)
    )
    # What is behind the lengths reaches nothing.
    inputs = [spoiled(inputs[0], case, modifiers, INF if seed % 2 else NAN), *inputs[1:]]
    grads = [*(spoiled(g, case, modifiers) for g in grads[:2]), *grads[2:]]
    for dtype in (torch.float32, torch.float64):
        tensors, gradients = convert(inputs, dtype), convert(grads, dtype)
        changes = typed(modifiers, dtype)
        if layout:
            tensors, gradients = layout(tensors), layout(gradients)
            changes = Modifiers(*(layout(t) if isinstance(t, torch.Tensor) else t for t in changes))
        for context in every_setting(threads):
            with context as how:
                run_recurrence(case, nan_like(tensors), nan_like(gradients), changes)
                results = run_recurrence(case, tensors, gradients, changes)
            assert {name.removesuffix(" unsaved") for name in results} == exact.keys()
            for name, value in results.items():
                title = f"{name}, {dtype}, {how}"
                key = name.removesuffix(" unsaved")
                assert value.dtype == dtype
                assert_accurate(value, native[key], exact[key], title)
                if key in ("h", "c", "activations", "dgates", "whole dh"):
                    assert_idle_steps_are_zero(value, case, modifiers, title)


CASES = [
    Recurrence(1, 1, 1),
    Recurrence(1, 1, 17, 5),
    Recurrence(1, 3, 5, reverse=True),
    Recurrence(1, 9, 20, 3),
    Recurrence(3, 1, 33),
    Recurrence(7, 2, 3, reverse=True),
    Recurrence(5, 7, 16),
    Recurrence(6, 5, 9, 4, reverse=True),
    # Two groups of rows, and of hidden units.
    Recurrence(12, 25, 33, reverse=True),
    Recurrence(12, 26, 33, 18),
    Recurrence(20, 3, 48),
    Recurrence(20, 3, 50, 34, reverse=True),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
PACKED_CASES = [
    Recurrence(1, 3, 5, 0, (3,)),
    Recurrence(5, 5, 17, 3, (5, 5, 3, 3, 1), True),
    Recurrence(12, 25, 33, 0, (25,) * 4 + (16,) * 3 + (9, 4, 1, 1, 1)),
    Recurrence(12, 25, 33, 18, (25,) * 4 + (16,) * 3 + (9, 4, 1, 1, 1), True),
]
packed_cases = pytest.mark.parametrize(
    "case", PACKED_CASES, ids=lambda c: "-".join(map(str, c[:4]))
)


@cases
def test_all_together(case):
    check_recurrence(case, modifiers_of(case, zoneout="any"))


@packed_cases
def test_all_together_in_a_packed_batch(case):
    check_recurrence(case, modifiers_of(case))


@pytest.mark.parametrize("P", [0, 6], ids=["plain", "projected"])
@pytest.mark.parametrize("name", NAMES)
def test_each_alone(name, P):
    for case in (Recurrence(6, 7, 19, P), Recurrence(1, 2, 19, P, reverse=True)):
        check_recurrence(case, modifiers_of(case, [name]), threads=(1,))
    if name in PACKED_NAMES:
        case = Recurrence(4, 7, 19, P, (7, 5, 5, 1), True)
        check_recurrence(case, modifiers_of(case, [name]), threads=(1,))


@pytest.mark.parametrize("pair", list(itertools.combinations(NAMES, 2)), ids="-".join)
def test_every_pair(pair):
    case = Recurrence(5, 6, 18, 5 if "resets" in pair else 0, None, "lengths" in pair)
    check_recurrence(case, modifiers_of(case, pair), threads=(1,))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", ["none", "mixed", "all"])
@pytest.mark.parametrize(("T", "B", "P"), [(1, 4, 0), (6, 9, 4), (12, 25, 0)])
def test_lengths(lengths, reverse, T, B, P):
    case = Recurrence(T, B, 33, P, reverse=reverse)
    check_recurrence(case, modifiers_of(case, ["lengths"], lengths=lengths))
    check_recurrence(case, modifiers_of(case, lengths=lengths), seed=1)


def test_many_threads_and_few_long_sequences():
    """Groups of rows of which some have no step at all, and four members."""
    case = Recurrence(30, 16, 40, 8)
    for long in (0, 1, 2, 5):
        lengths = torch.zeros(16, dtype=torch.int64)
        lengths[-long:] = torch.arange(30, 30 - long, -1) if long else 0
        modifiers = modifiers_of(case)._replace(lengths=lengths)
        check_recurrence(case, modifiers, threads=(2, 4))


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_of_gradients(given):
    case = Recurrence(4, 5, 6, 2 if given[1] else 0, None, given[0])
    _, grads = recurrence_inputs(case)
    grads = [g if on else None for g, on in zip(grads, given, strict=True)]
    if any(given):
        check_recurrence(case, modifiers_of(case), threads=(1,), grads=grads)


@pytest.mark.parametrize("zoneout", ["masks", "any", "constant"])
@pytest.mark.parametrize("P", [0, 4])
def test_zoneout(zoneout, P):
    """Masks of zeros and ones, and an expanded row."""
    case = Recurrence(5, 6, 18, P)
    names = ["zoneout_h", "zoneout_c"]
    modifiers = modifiers_of(case, names, zoneout=zoneout)
    check_recurrence(case, modifiers, threads=(1,))
    if zoneout == "constant":
        (_, _, _, h, c, _), (inputs, _) = modifiers, recurrence_inputs(case)
        expanded = typed(modifiers, torch.float64)
        assert h.stride() == c.stride() == expanded.zoneout_h.stride() == (0, 0, 1)
        dense = expanded._replace(zoneout_h=h.contiguous(), zoneout_c=c.contiguous())
        for a, b in zip(
            lstm_forward(*inputs, None, expanded, False, True, True),
            lstm_forward(*inputs, None, dense, False, True, True),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [scattered, transposed])
@pytest.mark.parametrize("sizes", [None, (4, 4, 2, 1)], ids=["dense", "packed"])
def test_strided(layout, sizes):
    case = Recurrence(4, 4, 7, 3, sizes)
    modifiers = modifiers_of(case)

    def lay_out(tensors):
        if isinstance(tensors, torch.Tensor) and tensors.dtype == torch.bool:
            return tensors.T.contiguous().T if sizes is None else spread(tensors)
        return tensors if getattr(tensors, "dtype", None) == torch.int64 else layout(tensors)

    check_recurrence(case, modifiers, layout=lay_out, threads=(1,))


def spread(flags):
    """The same flags with the others between them."""
    return torch.stack([flags, ~flags], -1)[:, 0]


@dtypes
def test_modifiers_of_other_dtypes(dtype):
    """Masks narrower or wider than the computation, resets in bytes, lengths in another memory."""
    case = Recurrence(5, 6, 18, 4)
    inputs, grads = (convert(every, dtype) for every in recurrence_inputs(case))
    modifiers = modifiers_of(case)
    expected = run_recurrence(case, inputs, grads, typed(modifiers, dtype))
    other = torch.float64 if dtype == torch.float32 else torch.float32
    changed = typed(modifiers, other)._replace(
        resets=modifiers.resets.to(torch.uint8),
        lengths=torch.stack([modifiers.lengths, modifiers.lengths], -1)[:, 0],
    )
    for name, value in run_recurrence(case, inputs, grads, changed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("lengths", [[5, 2, -1], [5, 2, 6]], ids=["negative", "beyond"])
def test_lengths_beyond_the_batch_are_refused(lengths):
    case = Recurrence(5, 3, 4)
    inputs, _ = recurrence_inputs(case)
    modifiers = Modifiers(torch.tensor(lengths))
    with pytest.raises(RuntimeError, match="refused its arguments"):
        lstm_forward(*inputs, None, modifiers, False, True, True)


@dtypes
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("P", [0, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_does_not_cross_a_reset(dtype, bad, P, reverse):
    case = Recurrence(6, 5, 17, P, None, reverse)
    inputs, grads = (convert(every, dtype) for every in recurrence_inputs(case))
    modifiers = modifiers_of(case, [name for name in NAMES if name != "lengths"])
    modifiers = typed(modifiers, dtype)
    resets = torch.zeros(6, 5, dtype=torch.bool)
    # All sequences start again at the third step that is computed.
    third = 3 if reverse else 2
    resets[third] = True
    modifiers = modifiers._replace(resets=resets)
    before = slice(4, 6) if reverse else slice(0, 2)
    after = slice(0, 4) if reverse else slice(2, 6)
    for context in every_setting():
        with context as how:
            clean = run_recurrence(case, inputs, grads, modifiers)
            gates, h0, c0 = inputs[0].clone(), inputs[2].clone(), inputs[3].clone()
            gates[before], h0[:], c0[:] = bad, bad, bad
            spoilt = [gates, inputs[1], h0, c0, inputs[4]]
            found = run_recurrence(case, spoilt, grads, modifiers)
            # Nothing comes back over a reset either.
            gradients = [None if g is None else g.clone() for g in grads]
            for grad in gradients[:2]:
                grad[after] = bad
            for grad in gradients[2:]:
                grad[:] = bad
            back = run_recurrence(case, inputs, gradients, modifiers)
        for name in ("h", "c", "activations", "dgates"):
            assert torch.equal(found[name][after], clean[name][after]), f"{name}: {how}"
        for name in ("h_n", "c_n"):
            assert torch.equal(found[name], clean[name]), f"{name}: {how}"
        assert torch.equal(back["dgates"][before], clean["dgates"][before]), how
        for name in ("dh0", "dc0"):
            assert torch.equal(back[name], clean[name]), f"{name}: {how}"


@pytest.mark.parametrize("clip", [1e-3, 0.1, 1e30, 1e300])
def test_cell_clip(clip):
    case = Recurrence(5, 6, 18)
    check_recurrence(case, Modifiers(cell_clip=clip), threads=(1,))


# Layers


def layer_equations(case, inputs, grads, modifiers, dtype):
    """A layer: results and gradients by name."""
    x, h0, c0, weights = convert(inputs, dtype)
    leaves = [t.requires_grad_() for t in (x, h0, c0)]
    leaves += [w.requires_grad_() for own in weights for w in own if w is not None]
    outputs = []
    for d, (ih, hh, bias_ih, bias_hh, hr) in enumerate(weights):
        rows = x[valid(case, modifiers[d])] if case.sizes is None else x
        gates = rows @ ih.T + (0 if bias_ih is None else bias_ih + bias_hh)
        if case.sizes is None:
            padded = torch.zeros(case.T, case.B, 4 * case.H, dtype=dtype)
            gates = padded.index_put((valid(case, modifiers[d]),), gates)
        h, c, _, h_n, c_n, _ = recurrence(case, gates, hh, h0[d], c0[d], hr, modifiers[d], d == 1)
        outputs.append((h, c, h_n, c_n))
    h, c, h_n, c_n = zip(*outputs, strict=True)
    results = {
        "output": torch.cat(h, -1),
        "h_n": torch.stack(h_n),
        "c_n": torch.stack(c_n),
        "cells": torch.cat(c, -1),
    }
    sum(
        (results[name] * grad.to(dtype)).sum()
        for name, grad in zip(results, grads, strict=True)
        if grad is not None
    ).backward()
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


def run_layer(case, inputs, grads, modifiers):
    x, h0, c0, weights = inputs
    batch_first = case.batch_first and case.sizes is None
    if batch_first:
        x = x.transpose(0, 1).contiguous()
    rest = (case.batch_sizes, batch_first, modifiers)
    out = layer_forward(x, h0, c0, weights, *rest, True, False)
    gradients = layer_backward(
        *grads, x, h0, c0, weights, *rest, out.output, out.c, out.activations, True, True
    )
    results = {"output": out.output, "h_n": out.h_n, "c_n": out.c_n, "cells": out.c}
    dx = gradients.input
    results |= {"dx": dx.transpose(0, 1) if batch_first else dx}
    results |= {"dh0": gradients.h0, "dc0": gradients.c0}
    for d, own in enumerate(gradients.weights):
        for name, w in zip(WEIGHTS, own, strict=True):
            if w is not None:
                results[f"d{name}[{d}]"] = w
    for save_cells in (False, True):
        plain = layer_forward(x, h0, c0, weights, *rest, False, save_cells)
        assert plain.activations is None
        assert (plain.c is not None) == save_cells
        found = {"output": plain.output, "h_n": plain.h_n, "c_n": plain.c_n, "cells": plain.c}
        results |= {
            f"{name} unsaved {save_cells}": value
            for name, value in found.items()
            if value is not None
        }
    return results


def layer_modifiers(case, names=None, seed=0, **options):
    """One for each direction; lengths and resets are the same in all."""
    first, *others = (modifiers_of(case, names, seed + 10 * d, **options) for d in range(case.D))
    return [first, *(m._replace(lengths=first.lengths, resets=first.resets) for m in others)]


def check_layer(case, modifiers, seed=0, threads=THREADS, grads_given=(True,) * 4):
    inputs, grads = layer_inputs(case, seed)
    grads.append(normals(seed + 5)(*inputs[0].shape[:-1], case.D * case.H))
    grads = [g if on else None for g, on in zip(grads, grads_given, strict=True)]
    native, exact = (
        layer_equations(case, inputs, grads, modifiers, d) for d in (torch.float32, torch.float64)
    )
    inputs = [spoiled(inputs[0], case, modifiers[0]), *inputs[1:]]
    grads = [spoiled(g, case, modifiers[0], INF) if k in (0, 3) else g for k, g in enumerate(grads)]
    for dtype in (torch.float32, torch.float64):
        tensors, gradients = convert(inputs, dtype), convert(grads, dtype)
        changes = [typed(m, dtype) for m in modifiers]
        for context in every_setting(threads):
            with context as how:
                run_layer(case, nan_like(tensors), nan_like(gradients), changes)
                results = run_layer(case, tensors, gradients, changes)
                again = run_layer(case, tensors, gradients, changes)
            assert results.keys() >= exact.keys()
            for name, value in results.items():
                title, key = f"{name}, {dtype}, {how}", name.split(" unsaved")[0]
                assert value.dtype == dtype
                assert_accurate(value, native[key], exact[key], title)
                assert torch.equal(value, again[name]), f"{title}: other bits"
                if key in ("output", "cells", "dx"):
                    assert_idle_steps_are_zero(value, case, modifiers[0], title)


LAYERS = [
    Layer(1, 1, 3, 5),
    Layer(1, 7, 3, 17, 4, D=2),
    Layer(5, 3, 4, 9, D=2, batch_first=True),
    Layer(30, 2, 3, 17, bias=False),
    Layer(12, 25, 7, 33, D=2),
    Layer(12, 26, 5, 33, 18, batch_first=True),
    Layer(20, 3, 20, 48),
    # More rows than a chunk of the backward pass, and a stage of the forward pass.
    Layer(9, 70, 3, 8, 3, D=2),
    Layer(150, 2, 3, 5),
    Layer(4, 7, 3, 17, 4, 2, sizes=(7, 7, 3, 1)),
    Layer(4, 70, 3, 17, sizes=(70, 70, 46, 46)),
]


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: "-".join(map(str, c[:-1])))
def test_layer(case):
    check_layer(case, layer_modifiers(case))


@pytest.mark.parametrize("name", NAMES)
def test_each_alone_in_a_layer(name):
    case = Layer(6, 9, 4, 18, D=2)
    check_layer(case, layer_modifiers(case, [name]), threads=(2,))


@pytest.mark.parametrize("lengths", ["none", "mixed", "all"])
def test_lengths_of_a_layer(lengths):
    for case in (Layer(6, 9, 4, 18, 5, D=2), Layer(12, 25, 7, 33), Layer(40, 2, 3, 17, D=2)):
        check_layer(case, layer_modifiers(case, ["lengths"], lengths=lengths))


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)), ids=str)
def test_what_is_given_to_a_layer(given):
    case = Layer(4, 5, 3, 9, 2 if given[0] else 0, 2)
    if any(given):
        check_layer(case, layer_modifiers(case), threads=(1,), grads_given=given)


def test_lengths_are_like_packing():
    """The same numbers in a packed batch, in the order of its lengths."""
    case = Layer(12, 25, 7, 33, 18, 2)
    (x, h0, c0, weights), grads = layer_inputs(case)
    lengths = torch.randint(1, 13, (25,), generator=torch.Generator().manual_seed(3))
    lengths[7] = 12
    results = run_layer(
        case, [x, h0, c0, weights], [*grads, None], [Modifiers(lengths=lengths)] * 2
    )
    order = lengths.argsort(descending=True)
    pack = lambda t: torch.cat([t[k, order[: (lengths > k).sum()]] for k in range(12)])  # noqa: E731
    sizes = tuple(int((lengths > k).sum()) for k in range(12))
    packed = run_layer(
        case._replace(sizes=sizes),
        [pack(x), h0[:, order], c0[:, order], weights],
        [pack(grads[0]), grads[1][:, order], grads[2][:, order], None],
        [Modifiers()] * 2,
    )
    for name in ("output", "cells", "dx"):
        torch.testing.assert_close(pack(results[name]), packed[name])
    for name in ("h_n", "c_n", "dh0", "dc0"):
        torch.testing.assert_close(results[name][:, order], packed[name])
    for d, name in itertools.product(range(2), WEIGHTS):
        torch.testing.assert_close(results[f"d{name}[{d}]"], packed[f"d{name}[{d}]"])


@dtypes
def test_a_step_without_a_layer(dtype):
    """One step of [B, I] and [B, H], as a cell computes it."""
    case = Layer(1, 3, 5, 17)
    (x, h0, c0, weights), _ = convert(layer_inputs(case), dtype)
    modifiers = [typed(m, dtype) for m in layer_modifiers(case, ["recurrent_mask", "cell_clip"])]
    rest = (weights, None, False, modifiers)
    out = layer_forward(x[0], h0[0], c0[0], *rest, True, True)
    whole = layer_forward(x, h0, c0, *rest, True, True)
    assert torch.equal(out.h_n, whole.h_n[0])
    assert torch.equal(out.c, whole.c[0])
    # Users may change c_n in place, and differentiate.
    assert torch.equal(out.c, out.c_n)
    assert out.c.data_ptr() != out.c_n.data_ptr()


@pytest.mark.parametrize("seed", range(3))
def test_fuzz(seed):
    choice = random.Random(seed)
    for k in range(6):
        T, B = choice.choice([(choice.randint(1, 30), choice.randint(1, 9)), (3, 70), (9, 31)])
        H = choice.choice([1, 2, 7, 8, 15, 16, 17, 31, 32, 47, 65])
        P = choice.randint(1, H - 1) if H > 1 and choice.random() < 0.4 else 0
        sizes = None
        if choice.random() < 0.4:
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
        names = [n for n in (PACKED_NAMES if sizes else NAMES) if choice.random() < 0.5]
        modifiers = layer_modifiers(
            case,
            names,
            seed=k,
            lengths=choice.choice(["mixed", "mixed", "all", "none"]),
            zoneout=choice.choice(["masks", "any", "constant"]),
        )
        try:
            check_layer(case, modifiers, seed=100 * seed + k, threads=(choice.choice((1, 2, 3)),))
        except AssertionError as error:
            raise AssertionError(f"{case}, {names}: {error}") from error


# The C interface itself


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        Layer(1, 2, 5, 7),
        Layer(3, 2, 5, 7, 3),
        Layer(6, 5, 3, 17),
        Layer(9, 26, 7, 33, 5),
        Layer(30, 1, 66, 65),
        Layer(5, 9, 3, 19, 2, sizes=(9, 6, 6, 2, 1)),
    ],
    ids=lambda c: "-".join(map(str, c[:5])) + "-packed" * bool(c.sizes),
)
def test_outputs_of_any_stride_and_nothing_beside_them(dtype, case):
    """All that is to be written is, and nothing else; by numbers, the rest of this file."""
    (x, h0, c0, weights), grads = layer_inputs(case)
    x, h0, c0 = (t.to(dtype) for t in (x, h0[0], c0[0]))
    ih, hh, bias_ih, bias_hh, hr = convert(weights[0], dtype)
    grad_h, grad_h_n, grad_c_n = (convert(grads[0], dtype), *(g[0].to(dtype) for g in grads[1:]))
    H, P, B, N = case.H, case.P or case.H, case.B, x.shape[:-1]
    modifiers = typed(modifiers_of(case), dtype)
    x, grad_h = (spoiled(t, case, modifiers) for t in (x, grad_h))
    # With a last dimension, by which the strides are known.
    changes = modifiers._replace(resets=modifiers.resets.view(torch.uint8)[..., None])._asdict()
    # As eight bytes, like every field.
    changes["cell_clip"] = torch.tensor(0.4, dtype=torch.float64).view(torch.int64).item()
    common = {
        "steps": case.T,
        "batch": B,
        "input_size": case.I,
        "hidden_size": H,
        "features": P,
        "batch_sizes": case.batch_sizes,
        "weight_ih": ih,
        "weight_hh": hh,
        "weight_hr": hr,
        "x": x,
        "h0": h0,
        "c0": c0,
    } | changes
    library, kind = load(), launch.DTYPES[dtype]
    for instruction_set, threads, reverse in itertools.product(
        range(len(INSTRUCTION_SETS)), (1, 2, 4), (False, True)
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


def test_inputs_are_left_alone():
    case = Layer(5, 6, 3, 17, 4, 2)
    inputs, grads = layer_inputs(case)
    inputs, grads = convert(inputs, torch.float32), [*convert(grads, torch.float32), None]
    modifiers = [typed(m, torch.float32) for m in layer_modifiers(case)]
    flat = torch.utils._pytree.tree_leaves([inputs, grads, modifiers])
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in flat]
    with setting(0, 2):
        run_layer(case, inputs, grads, modifiers)
    for a, b in zip(flat, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
