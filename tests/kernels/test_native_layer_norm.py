"""The native CPU kernels of the recurrence with layer normalization, against the equations.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch. Gate order i, f, g, o.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import pytest
import torch
from fused_lstm.kernels.cpu import (
    launch,
    layer_norm_backward,
    layer_norm_forward,
    load,
    lstm_forward,
)

from .test_native import (
    BACKWARD_FIELDS,
    FORWARD_FIELDS,
    INF,
    INSTRUCTION_SETS,
    NAN,
    NO_MODIFIERS,
    Guarded,
    Recurrence,
    assert_accurate,
    convert,
    dtypes,
    every_setting,
    nan_like,
    normals,
    recurrence_inputs,
    scattered,
    setting,
    settings,  # noqa: F401  (a fixture)
    structure,
    transposed,
)
from .test_native_modifiers import (
    NAMES,
    PACKED_NAMES,
    THREADS,
    Modifiers,
    assert_idle_steps_are_zero,
    modifiers_of,
    spoiled,
    spread,
    steps_of,
    typed,
    valid,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "settings")

OUTPUTS = ("h", "c", "activations", "normalized", "rstd", "h_n", "c_n")
GRADIENTS = ("dgates", "dproduct", "dz", "dh0", "dc0", "whole dh")
# What has a row for every step.
ROWS = (*OUTPUTS[:5], *GRADIENTS[:3], "whole dh")


class Norm(NamedTuple):
    gain_hh: torch.Tensor
    gain_c: torch.Tensor
    bias_c: torch.Tensor | None
    eps: float


def norm_of(case, bias=True, eps=1e-5, seed=0):
    normal = normals(seed + 2)
    gain_hh, gain_c = 1 + normal(4 * case.H, scale=0.5), 1 + normal(case.H, scale=0.5)
    return Norm(
        *(t.float().double() for t in (gain_hh, gain_c)), normal(case.H) if bias else None, eps
    )


def converted(norm, dtype):
    return Norm(*convert(norm[:3], dtype), norm.eps)


def standardized(x, eps):
    """(x - mean) / √(var + eps), and 1 / √(var + eps)."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = 1 / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred * rstd, rstd[:, 0]


def equations(case, inputs, grads, modifiers, norm, dtype):
    """The recurrence, step by step: results and gradients by name."""
    inputs = [x if x is None else x.requires_grad_() for x in convert(inputs, dtype)]
    gates, weight_hh, h0, c0, weight_hr = inputs
    mods, norm, exists = typed(modifiers, dtype), converted(norm, dtype), valid(case, modifiers)
    given = {
        name: None if getattr(mods, name) is None else steps_of(getattr(mods, name), case)
        for name in ("resets", "zoneout_h", "zoneout_c")
    }
    steps = steps_of(gates, case)
    h, c, inner = h0, c0, []
    rows: list = [None] * case.T
    for t in reversed(range(case.T)) if case.reverse else range(case.T):
        at = exists[t].nonzero()[:, 0]
        hp, cp = h[at], c[at]
        if given["resets"] is not None:
            reset = given["resets"][t][at][:, None]
            hp, cp = (torch.where(reset, torch.zeros((), dtype=dtype), s) for s in (hp, cp))
        entering = hp if mods.recurrent_mask is None else hp * mods.recurrent_mask[at]
        product = entering @ weight_hh.T
        n, rstd = standardized(product, norm.eps)
        i, f, g, o = (steps[t][at] + norm.gain_hh * n).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * cp + i * g
        if mods.cell_clip is not None:
            limit = min(mods.cell_clip, torch.finfo(dtype).max)
            c_t = torch.where(c_t.abs() < limit, c_t, c_t.detach().clamp(-limit, limit))
        z = norm.gain_c * standardized(c_t, norm.eps)[0]
        z = z.clone() if norm.bias_c is None else z + norm.bias_c
        h_t = o * z.tanh()
        h_t = h_t.clone() if weight_hr is None else h_t @ weight_hr.T
        for value in (product, z, h_t):
            value.retain_grad()
        inner.append((t, at, {"dproduct": product, "dz": z, "whole dh": h_t}))
        if given["zoneout_c"] is not None:
            kept = given["zoneout_c"][t][at]
            c_t = kept * cp + (1 - kept) * c_t
        if given["zoneout_h"] is not None:
            kept = given["zoneout_h"][t][at]
            h_t = kept * hp + (1 - kept) * h_t
        h, c = h.index_copy(0, at, h_t), c.index_copy(0, at, c_t)
        count = case.B if case.sizes is None else case.sizes[t]
        rows[t] = [
            torch.zeros(count, *y.shape[1:], dtype=dtype).index_copy(0, at, y)
            for y in (h_t, c_t, torch.cat([i, f, g, o], -1), n, rstd)
        ]
    join = torch.stack if case.sizes is None else torch.cat
    outputs = [*(join(kind) for kind in zip(*rows, strict=True)), h, c]
    results = dict(zip(OUTPUTS, outputs, strict=True))
    pairs = [
        (results[name], grad.to(dtype))
        for name, grad in zip(("h", "c", "h_n", "c_n"), grads, strict=True)
        if grad is not None
    ]
    if pairs:
        sum((y * g).sum() for y, g in pairs).backward()
    for name, x in (("dgates", gates), ("dh0", h0), ("dc0", c0)):
        results[name] = torch.zeros_like(x) if x.grad is None else x.grad
    for name, like in (("dproduct", gates), ("dz", results["c"]), ("whole dh", results["h"])):
        results[name] = torch.zeros_like(like)
        for t, at, values in inner:
            if values[name].grad is not None:
                steps_of(results[name], case)[t][at] = values[name].grad
    if weight_hr is None:
        del results["whole dh"]
    return {name: y.detach() for name, y in results.items()}


def expectations(case, inputs, grads, modifiers, norm):
    """The equations in float32, as far from the truth as they get, and in float64.

    A row of little variance makes much of a rounding, and whose rounding is a matter of luck: each
    number is the worst of several runs, from inputs a rounding apart.
    """
    exact = equations(case, inputs, grads, modifiers, norm, torch.float64)
    errors = {name: torch.zeros_like(value) for name, value in exact.items()}
    for k in range(4):
        generator = torch.Generator().manual_seed(k)
        signs = lambda t: torch.randint(-1, 2, t.shape, generator=generator)  # noqa: B023, E731
        nudged = [
            t if t is None or k == 0 else t * (1 + torch.finfo(torch.float32).eps * signs(t))
            for t in inputs
        ]
        found = equations(case, nudged, grads, modifiers, norm, torch.float32)
        for name, value in found.items():
            errors[name] = errors[name].maximum((value - exact[name]).abs())
    return {name: exact[name] + errors[name] for name in exact}, exact


def saved_of(outputs):
    """What `layer_norm_backward` takes of what `layer_norm_forward` returned."""
    _, c, activations, normalized, rstd, _, _ = outputs
    return [activations, c, normalized, rstd]


def run(case, inputs, grads, modifiers, norm):
    _, weight_hh, _, c0, weight_hr = inputs
    rest = (case.batch_sizes, modifiers, case.reverse, *norm)
    outputs = layer_norm_forward(*inputs, *rest, True)
    gradients = layer_norm_backward(*grads, *saved_of(outputs), weight_hh, c0, weight_hr, *rest)
    results = dict(zip(OUTPUTS + GRADIENTS, outputs + gradients, strict=True))
    if weight_hr is None:
        assert results.pop("whole dh") is None
    unsaved = layer_norm_forward(*inputs, *rest, False)
    for name, value in zip(OUTPUTS, unsaved, strict=True):
        if name in ("activations", "normalized", "rstd"):
            assert value.shape == (0,)
        else:
            assert torch.equal(value, results[name]), f"{name} unsaved"
    return results


def check(case, modifiers=None, norm=None, seed=0, threads=THREADS, layout=None, grads=None):
    """Every dtype, instruction set and number of threads against the equations."""
    modifiers, norm = modifiers or Modifiers(), norm or norm_of(case, seed=seed)
    inputs, given_grads = recurrence_inputs(case, seed)
    grads = given_grads if grads is None else grads
    native, exact = expectations(case, inputs, grads, modifiers, norm)
    # What is behind the lengths reaches nothing.
    inputs = [spoiled(inputs[0], case, modifiers, INF if seed % 2 else NAN), *inputs[1:]]
    grads = [*(spoiled(g, case, modifiers) for g in grads[:2]), *grads[2:]]
    for dtype in (torch.float32, torch.float64):
        tensors, gradients = convert(inputs, dtype), convert(grads, dtype)
        changes, normalizes = typed(modifiers, dtype), converted(norm, dtype)
        if layout:
            tensors, gradients = layout(tensors), layout(gradients)
            changes = Modifiers(*(layout(t) if isinstance(t, torch.Tensor) else t for t in changes))
            normalizes = Norm(*layout(list(normalizes[:3])), norm.eps)
        for context in every_setting(threads):
            with context as how:
                # What the scratch memory still holds must not matter.
                run_with_nan(case, tensors, gradients, changes, normalizes)
                results = run(case, tensors, gradients, changes, normalizes)
                again = run(case, tensors, gradients, changes, normalizes)
            assert results.keys() == exact.keys()
            for name, value in results.items():
                title = f"{name}, {dtype}, {how}"
                assert value.dtype == dtype
                assert_accurate(value, native[name], exact[name], title)
                assert torch.equal(value, again[name]), f"{title}: other bits"
                if name in ROWS:
                    assert_idle_steps_are_zero(value, case, modifiers, title)


def run_with_nan(case, inputs, grads, modifiers, norm):
    _, weight_hh, _, c0, weight_hr = inputs = nan_like(inputs)
    rest = (case.batch_sizes, modifiers, case.reverse, *norm)
    outputs = layer_norm_forward(*inputs, *rest, True)
    layer_norm_backward(*nan_like(grads), *saved_of(outputs), weight_hh, c0, weight_hr, *rest)


CASES = [
    Recurrence(1, 1, 1),
    Recurrence(4, 3, 1),
    Recurrence(4, 3, 1, 1, reverse=True),
    Recurrence(1, 1, 17, 5),
    Recurrence(1, 3, 5, reverse=True),
    Recurrence(1, 9, 20, 3),
    Recurrence(3, 1, 33),
    Recurrence(7, 2, 3, reverse=True),
    Recurrence(5, 7, 16),
    Recurrence(6, 5, 9, 4, reverse=True),
    # Four vectors and some more.
    Recurrence(3, 5, 71),
    Recurrence(3, 3, 130, 5),
    # Two groups of rows, and of hidden units.
    Recurrence(12, 25, 33, reverse=True),
    Recurrence(12, 26, 33, 18),
    Recurrence(20, 3, 48),
    Recurrence(20, 3, 50, 34, reverse=True),
    # One row and two members.
    Recurrence(40, 1, 64),
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
def test_alone(case):
    check(case)


@cases
def test_all_together(case):
    check(case, modifiers_of(case, zoneout="any"))


@packed_cases
def test_packed(case):
    check(case)
    check(case, modifiers_of(case), seed=1)


@pytest.mark.parametrize("P", [0, 6], ids=["plain", "projected"])
@pytest.mark.parametrize("name", NAMES)
def test_each_alone(name, P):
    for case in (Recurrence(6, 7, 19, P), Recurrence(1, 2, 19, P, reverse=True)):
        check(case, modifiers_of(case, [name]), threads=(1,))
    if name in PACKED_NAMES:
        case = Recurrence(4, 7, 19, P, (7, 5, 5, 1), True)
        check(case, modifiers_of(case, [name]), threads=(1,))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", ["none", "mixed", "all"])
@pytest.mark.parametrize(("T", "B", "P"), [(1, 4, 0), (6, 9, 4), (12, 25, 0)])
def test_lengths(lengths, reverse, T, B, P):
    case = Recurrence(T, B, 33, P, reverse=reverse)
    check(case, modifiers_of(case, ["lengths"], lengths=lengths))
    check(case, modifiers_of(case, lengths=lengths), seed=1)


def test_many_threads_and_few_long_sequences():
    """Groups of rows of which some have no step at all, and four members."""
    case = Recurrence(30, 16, 40, 8)
    for long in (0, 1, 5):
        lengths = torch.zeros(16, dtype=torch.int64)
        lengths[-long:] = torch.arange(30, 30 - long, -1) if long else 0
        check(case, modifiers_of(case)._replace(lengths=lengths), threads=(2, 4))


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_of_gradients(given):
    case = Recurrence(4, 5, 6, 2 if given[1] else 0, None, given[0])
    _, grads = recurrence_inputs(case)
    grads = [g if on else None for g, on in zip(grads, given, strict=True)]
    check(case, threads=(1,), grads=grads)
    check(case, modifiers_of(case), threads=(1,), grads=grads)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-5, 0.5])
def test_bias_and_eps(bias, eps):
    case = Recurrence(5, 6, 18)
    check(case, norm=norm_of(case, bias, eps), threads=(1,))


@dtypes
def test_rows_without_variance(dtype):
    """Zeros enter the first step, and nothing but the bias leaves a cell of one unit."""
    eps = 1e-5
    case = Recurrence(3, 4, 1)
    (gates, weight_hh, h0, c0, _), grads = (convert(k, dtype) for k in recurrence_inputs(case))
    norm = converted(norm_of(case, eps=eps), dtype)
    for context in every_setting():
        with context as how:
            results = run(case, [gates, weight_hh, h0 * 0, c0, None], grads, NO_MODIFIERS, norm)
        assert torch.equal(results["normalized"][0], torch.zeros(4, 4, dtype=dtype)), how
        expected = torch.full((4,), eps, dtype=torch.float64).rsqrt().to(dtype)
        torch.testing.assert_close(results["rstd"][0], expected, rtol=1e-6, atol=0)
        expected = results["activations"][..., 3:] * norm.bias_c.tanh()
        torch.testing.assert_close(results["h"], expected)
        # A cell of one unit is its own mean: z does not change with it.
        torch.testing.assert_close(
            results["dc0"],
            (grads[3] + grads[1][2]) * results["activations"][..., 1:2].prod(0)
            + grads[1][1] * results["activations"][:2, :, 1:2].prod(0)
            + grads[1][0] * results["activations"][0, :, 1:2],
        )


@dtypes
def test_a_large_mean(dtype):
    """A mean of thousands of deviations: the squares must be of centred values."""
    case = Recurrence(2, 5, 40)
    (gates, weight_hh, h0, c0, _), grads = recurrence_inputs(case)
    weight_hh = weight_hh * 2.0**-10 + 1
    inputs = [gates, weight_hh.float().double(), h0.abs() + 1, c0, None]
    norm = norm_of(case)
    native, exact = expectations(case, inputs, grads, Modifiers(), norm)
    for context in every_setting():
        with context as how:
            results = run(
                case,
                convert(inputs, dtype),
                convert(grads, dtype),
                NO_MODIFIERS,
                converted(norm, dtype),
            )
        for name in ("h", "normalized", "rstd"):
            assert_accurate(results[name], native[name], exact[name], f"{name}, {how}")


@pytest.mark.parametrize("layout", [scattered, transposed])
@pytest.mark.parametrize("sizes", [None, (4, 4, 2, 1)], ids=["dense", "packed"])
def test_strided(layout, sizes):
    case = Recurrence(4, 4, 7, 3, sizes)

    def lay_out(tensors):
        if isinstance(tensors, torch.Tensor) and tensors.dtype == torch.bool:
            return tensors.T.contiguous().T if sizes is None else spread(tensors)
        return tensors if getattr(tensors, "dtype", None) == torch.int64 else layout(tensors)

    check(case, modifiers_of(case), layout=lay_out, threads=(1,))


@dtypes
def test_strided_saved_tensors(dtype):
    """What the forward pass left, in other memory."""
    case = Recurrence(4, 5, 7, 3)
    inputs, grads = (convert(every, dtype) for every in recurrence_inputs(case))
    _, weight_hh, _, c0, weight_hr = inputs
    rest = (None, NO_MODIFIERS, False, *converted(norm_of(case), dtype))
    saved = saved_of(layer_norm_forward(*inputs, *rest, True))
    expected = layer_norm_backward(*grads, *saved, weight_hh, c0, weight_hr, *rest)
    for layout in (scattered, transposed):
        actual = layer_norm_backward(*grads, *layout(saved), weight_hh, c0, weight_hr, *rest)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_expanded_gradients():
    """Strides of zero, as the gradient of a sum has them."""
    case = Recurrence(9, 5, 6)
    inputs, grads = (convert(every, torch.float32) for every in recurrence_inputs(case))
    norm = converted(norm_of(case), torch.float32)
    wide = [torch.ones(()).expand(g.shape) for g in grads]
    expected = run(case, inputs, [g.contiguous() for g in wide], NO_MODIFIERS, norm)
    for name, value in run(case, inputs, wide, NO_MODIFIERS, norm).items():
        assert torch.equal(value, expected[name]), name


@dtypes
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("P", [0, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_does_not_cross_a_reset(dtype, bad, P, reverse):
    case = Recurrence(6, 5, 17, P, None, reverse)
    inputs, grads = (convert(every, dtype) for every in recurrence_inputs(case))
    norm = converted(norm_of(case), dtype)
    modifiers = modifiers_of(case, [name for name in NAMES if name != "lengths"])
    resets = torch.zeros(6, 5, dtype=torch.bool)
    # All sequences start again at the third step that is computed.
    resets[3 if reverse else 2] = True
    modifiers = typed(modifiers, dtype)._replace(resets=resets)
    before = slice(4, 6) if reverse else slice(0, 2)
    after = slice(0, 4) if reverse else slice(2, 6)
    for context in every_setting():
        with context as how:
            clean = run(case, inputs, grads, modifiers, norm)
            gates, h0, c0 = inputs[0].clone(), inputs[2].clone(), inputs[3].clone()
            gates[before], h0[:], c0[:] = bad, bad, bad
            _, weight_hh, _, _, weight_hr = inputs
            rest = (None, modifiers, reverse, *norm)
            found = layer_norm_forward(gates, weight_hh, h0, c0, weight_hr, *rest, True)
            found_back = layer_norm_backward(
                *grads, *saved_of(found), weight_hh, c0, weight_hr, *rest
            )
            found = dict(zip(OUTPUTS + GRADIENTS, found + found_back, strict=True))
            # Nothing comes back over a reset either.
            gradients = [g.clone() for g in grads]
            for grad in gradients[:2]:
                grad[after] = bad
            for grad in gradients[2:]:
                grad[:] = bad
            back = run(case, inputs, gradients, modifiers, norm)
        for name in ROWS if P else ROWS[:-1]:
            assert torch.equal(found[name][after], clean[name][after]), f"{name}: {how}"
        for name in ("h_n", "c_n"):
            assert torch.equal(found[name], clean[name]), f"{name}: {how}"
        for name in ("dgates", "dproduct", "dz"):
            assert torch.equal(back[name][before], clean[name][before]), f"{name}: {how}"
        for name in ("dh0", "dc0"):
            assert torch.equal(back[name], clean[name]), f"{name}: {how}"


def test_a_bad_sequence_is_alone():
    """What is not a number in one sequence reaches no other."""
    case = Recurrence(5, 9, 20, 6)
    inputs, grads = (convert(every, torch.float32) for every in recurrence_inputs(case))
    modifiers = typed(modifiers_of(case), torch.float32)
    norm = converted(norm_of(case), torch.float32)
    others = [b for b in range(9) if b != 4]
    for context in every_setting():
        with context as how:
            clean = run(case, inputs, grads, modifiers, norm)
            inputs[0][:, 4] = NAN
            _, weight_hh, _, c0, weight_hr = inputs
            rest = (None, modifiers, False, *norm)
            found = layer_norm_forward(*inputs, *rest, True)
            back = layer_norm_backward(*grads, *saved_of(found), weight_hh, c0, weight_hr, *rest)
            inputs[0][:, 4] = 0.5
        for name, value in zip(OUTPUTS + GRADIENTS, found + back, strict=True):
            dim = 1 if name in ROWS else 0
            index = torch.tensor(others)
            assert torch.equal(
                value.index_select(dim, index), clean[name].index_select(dim, index)
            ), f"{name}: {how}"


@pytest.mark.parametrize("clip", [1e-3, 0.1, 1e30, 1e300])
def test_cell_clip(clip):
    case = Recurrence(5, 6, 18)
    check(case, Modifiers(cell_clip=clip), threads=(1,))


@pytest.mark.parametrize("lengths", [[5, 2, -1], [5, 2, 6]], ids=["negative", "beyond"])
def test_lengths_beyond_the_batch_are_refused(lengths):
    case = Recurrence(5, 3, 4)
    inputs, _ = recurrence_inputs(case)
    modifiers = Modifiers(torch.tensor(lengths))
    with pytest.raises(RuntimeError, match="refused its arguments"):
        layer_norm_forward(*inputs, None, modifiers, False, *norm_of(case), True)


@dtypes
@pytest.mark.parametrize("sizes", [None, ()], ids=["dense", "packed"])
def test_an_empty_batch(dtype, sizes):
    case = Recurrence(3, 0, 4, 2)
    inputs, grads = (convert(every, dtype) for every in recurrence_inputs(case))
    results = run(case, inputs, grads, NO_MODIFIERS, converted(norm_of(case), dtype))
    assert results["h"].shape == (3, 0, 2)
    assert results["rstd"].shape == (3, 0)


def test_scratch_is_shared_with_the_plain_recurrence():
    """One kind after the other, in the same memory."""
    case = Recurrence(6, 9, 20)
    inputs, grads = (convert(every, torch.float32) for every in recurrence_inputs(case))
    norm = converted(norm_of(case), torch.float32)
    plain = lstm_forward(*inputs, None, NO_MODIFIERS, False, True, True)
    normalized = run(case, inputs, grads, NO_MODIFIERS, norm)
    for a, b in zip(
        lstm_forward(*inputs, None, NO_MODIFIERS, False, True, True), plain, strict=True
    ):
        assert torch.equal(a, b)
    for name, value in run(case, inputs, grads, NO_MODIFIERS, norm).items():
        assert torch.equal(value, normalized[name])


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
        case = Recurrence(T, B, H, P, sizes, choice.random() < 0.5)
        names = [n for n in (PACKED_NAMES if sizes else NAMES) if choice.random() < 0.5]
        modifiers = modifiers_of(
            case,
            names,
            seed=k,
            lengths=choice.choice(["mixed", "mixed", "all", "none"]),
            zoneout=choice.choice(["masks", "any", "constant"]),
        )
        norm = norm_of(case, choice.random() < 0.5, choice.choice([1e-5, 1e-3]), k)
        try:
            check(case, modifiers, norm, 100 * seed + k, (choice.choice((1, 2, 3)),))
        except AssertionError as error:
            raise AssertionError(f"{case}, {names}: {error}") from error


# The C interface itself

NORM_FIELDS = " gain_hh gain_c bias_c eps"


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        Recurrence(1, 2, 7),
        Recurrence(3, 2, 7, 3),
        Recurrence(6, 5, 17),
        Recurrence(9, 26, 33, 5),
        Recurrence(30, 1, 65),
        Recurrence(5, 9, 19, 2, (9, 6, 6, 2, 1)),
    ],
    ids=lambda c: "-".join(map(str, c[:4])) + "-packed" * bool(c.sizes),
)
def test_outputs_of_any_stride_and_nothing_beside_them(dtype, case):
    """All that is to be written is, and nothing else; by numbers, the rest of this file."""
    (gates, weight_hh, h0, c0, weight_hr), grads = (
        convert(every, dtype) for every in recurrence_inputs(case)
    )
    H, P, B, N = case.H, case.P or case.H, case.B, gates.shape[:-1]
    modifiers = typed(modifiers_of(case), dtype)
    gates, *row_grads = (spoiled(t, case, modifiers) for t in (gates, *grads[:2]))
    flags = modifiers.resets.view(torch.uint8)
    changes = modifiers._replace(resets=flags[..., None])._asdict()
    # As eight bytes, like every field.
    number = lambda x: torch.tensor(x, dtype=torch.float64).view(torch.int64).item()  # noqa: E731
    norm = converted(norm_of(case), dtype)._asdict() | {"eps": number(1e-5)}
    changes["cell_clip"] = number(0.4)
    common = {
        "steps": case.T,
        "batch": B,
        "hidden_size": H,
        "features": P,
        "batch_sizes": case.batch_sizes,
        "weight_hh": weight_hh,
        "weight_hr": weight_hr,
        "c0": c0,
    }
    common |= changes | norm
    given = dict(
        zip(("grad_h", "grad_c", "grad_h_n", "grad_c_n"), [*row_grads, *grads[2:]], strict=True)
    )
    library, kind = load(), launch.DTYPES[dtype]
    for instruction_set, threads, reverse in itertools.product(
        range(len(INSTRUCTION_SETS)), (1, 2, 4), (False, True)
    ):
        new, common["reverse"] = Guarded(dtype), reverse
        saved = {
            "c": new(*N, H),
            "activations": new(*N, 4 * H),
            "normalized": new(*N, 4 * H),
            "rstd": new(*N, 1),
        }
        outputs = {**saved, "h": new(*N, P), "h_n": new(B, P), "c_n": new(B, H)}
        arguments = structure(
            FORWARD_FIELDS + " normalized@ rstd@" + NORM_FIELDS,
            gates=gates,
            h0=h0,
            **common,
            **outputs,
        )
        assert library.layer_norm_forward(arguments, 1, kind, threads, instruction_set) == 0
        new.check()
        gradients = {
            "grad_gates": new(*N, 4 * H),
            "grad_product": new(*N, 4 * H),
            "grad_z": new(*N, H),
            "whole_grad_h": new(*N, P) if case.P else None,
            "grad_h0": new(B, P),
            "grad_c0": new(B, H),
        }
        arguments = structure(
            BACKWARD_FIELDS + " normalized@ rstd@ grad_product@ grad_z@" + NORM_FIELDS,
            **common,
            **saved,
            **given,
            **gradients,
        )
        assert library.layer_norm_backward(arguments, 1, kind, threads, instruction_set) == 0
        new.check()


def test_inputs_are_left_alone():
    case = Recurrence(5, 6, 17, 4)
    inputs, grads = (convert(every, torch.float32) for every in recurrence_inputs(case))
    modifiers = typed(modifiers_of(case), torch.float32)
    norm = converted(norm_of(case), torch.float32)
    flat = torch.utils._pytree.tree_leaves([inputs, grads, modifiers, norm])
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in flat]
    with setting(0, 2):
        run(case, inputs, grads, modifiers, norm)
    for a, b in zip(flat, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
