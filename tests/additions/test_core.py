"""`lstm_recurrence` with every modifier, one direction at a time."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fused_lstm import lstm_recurrence

from ..budget import assert_within_budget
from ..dropin.helpers import leaf, values
from .oracle import CLOSE, cotangent, lengths_of, make_resets, recurrence_oracle, to_padded, to_rows

T, B, H, P = 5, 4, 3, 2
BATCH_SIZES = torch.tensor([4, 4, 3, 1, 1])
LENGTHS = [5, 0, 2, 4]
NAMES = ["lengths", "resets", "recurrent_mask", "zoneout_h", "zoneout_c", "cell_clip"]
CLIP = 0.5

pytestmark = pytest.mark.usefixtures("backend")


def make_arguments(projected=False, packed=False, dtype=torch.float64, t=T, b=B, h=H, p=P):
    """Tensors with a gradient, by name; `packed` has the batch sizes above."""
    features = p if projected else h
    leading = (int(BATCH_SIZES.sum()),) if packed else (t, b)
    shapes = {
        "gates": (*leading, 4 * h),
        "weight_hh": (4 * h, features),
        "h0": (b, features),
        "c0": (b, h),
    }
    if projected:
        shapes["weight_hr"] = (p, h)
    return {
        name: values(*shape, seed=20 + k, dtype=dtype)
        for k, (name, shape) in enumerate(shapes.items())
    }


def make_modifiers(names, arguments, packed=False, seed=0, lengths=None):
    """The modifiers called so; masks of fractions, which zeros and ones are a case of."""
    generator = torch.Generator().manual_seed(seed)
    gates, h0, c0 = arguments["gates"], arguments["h0"], arguments["c0"]
    leading = gates.shape[:-1]

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(gates.dtype)

    every = {
        "lengths": torch.tensor(LENGTHS if lengths is None else lengths),
        "resets": make_resets(*leading, seed=seed),
        "recurrent_mask": 2 * rand(*h0.shape),
        "zoneout_h": rand(*leading, h0.shape[-1]),
        "zoneout_c": rand(*leading, c0.shape[-1]),
        "cell_clip": CLIP,
    }
    return {name: every[name] for name in names if not (packed and name == "lengths")}


def expected_of(arguments, modifiers, batch_sizes=None, reverse=False):
    """The oracle, in the form of `lstm_recurrence`."""
    arguments, modifiers = dict(arguments), dict(modifiers)
    if "lengths" in modifiers:
        modifiers["lengths"] = modifiers["lengths"].tolist()
    if batch_sizes is None:
        return recurrence_oracle(**arguments, **modifiers, reverse=reverse)
    for name in ("resets", "zoneout_h", "zoneout_c"):
        if name in modifiers:
            modifiers[name] = to_padded(modifiers[name], batch_sizes)
    arguments["gates"] = to_padded(arguments["gates"], batch_sizes)
    lengths = lengths_of(batch_sizes)
    h, c, h_n, c_n = recurrence_oracle(**arguments, **modifiers, lengths=lengths, reverse=reverse)
    return to_rows(h, batch_sizes), to_rows(c, batch_sizes), h_n, c_n


def with_gradients(function, arguments, used=None):
    """What `function` returns, and the gradients of a sum of it."""
    leaves = {name: leaf(tensor) for name, tensor in arguments.items()}
    outputs = tuple(function(leaves))
    chosen = outputs if used is None else [outputs[k] for k in used]
    loss = sum((out * cotangent(out, 50 + k)).sum() for k, out in enumerate(chosen))
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [out.detach() for out in outputs] + [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(leaves.values(), gradients, strict=True)
    ]


def check(arguments, modifiers, batch_sizes=None, reverse=False, used=None, **options):
    actual = with_gradients(
        lambda leaves: lstm_recurrence(
            **leaves, **modifiers, **options, batch_sizes=batch_sizes, reverse=reverse
        ),
        arguments,
        used,
    )
    expected = with_gradients(
        lambda leaves: expected_of(leaves, modifiers, batch_sizes, reverse), arguments, used
    )
    names = ["h", "c", "h_n", "c_n", *(f"grad of {name}" for name in arguments)]
    for name, got, wanted in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(
            got, wanted, **CLOSE[torch.float64], msg=lambda text, n=name: f"{n}: {text}"
        )
    return dict(zip(names, actual, strict=True))


SUBSETS = [names for n in range(len(NAMES) + 1) for names in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_subset_of_the_modifiers(reverse, projected, packed):
    arguments = make_arguments(projected, packed)
    for seed, names in enumerate(SUBSETS):
        if (packed and "lengths" in names) or seed % 3 == (0 if projected else 1):
            continue
        modifiers = make_modifiers(names, arguments, packed, seed)
        check(arguments, modifiers, BATCH_SIZES if packed else None, reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 3)], ids=str)
@pytest.mark.parametrize("names", [NAMES, NAMES[:2]], ids=str)
def test_gradients_of_some_outputs_only(reverse, used, names):
    arguments = make_arguments(True)
    check(arguments, make_modifiers(names, arguments), reverse=reverse, used=used)


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    "lengths", [[5, 5, 5, 5], [0, 0, 0, 0], [1, 2, 3, 4], [0, 5, 0, 1]], ids=str
)
def test_lengths(reverse, lengths):
    arguments = make_arguments(True)
    for names in (["lengths"], NAMES):
        modifiers = make_modifiers(names, arguments, lengths=lengths)
        results = check(arguments, modifiers, reverse=reverse)
        for b, length in enumerate(lengths):
            for name in ("h", "c", "grad of gates"):
                assert not results[name][length:, b].any(), name
            if length == 0:
                assert torch.equal(results["h_n"][b], arguments["h0"][b])
                assert torch.equal(results["c_n"][b], arguments["c0"][b])


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("names", [["lengths"], NAMES], ids=["lengths", "everything"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_padding_that_is_not_a_number(reverse, names, projected):
    arguments = make_arguments(projected)
    modifiers = make_modifiers(names, arguments)
    expected = check(arguments, modifiers, reverse=reverse)
    padding = torch.arange(T)[:, None] >= modifiers["lengths"]
    for fill in (math.nan, math.inf, -math.inf):
        spoilt = dict(arguments, gates=arguments["gates"].clone())
        spoilt["gates"][padding] = fill
        leaves = {name: leaf(tensor) for name, tensor in spoilt.items()}
        out = lstm_recurrence(**leaves, **modifiers, reverse=reverse)
        cotangents = [cotangent(o, 50 + k) for k, o in enumerate(out)]
        for for_steps in cotangents[:2]:
            for_steps[padding] = fill
        gradients = torch.autograd.grad(tuple(out), list(leaves.values()), cotangents)
        for got, wanted in zip((*out, *gradients), expected.values(), strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE[torch.float64])


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_masks_that_are_not_a_number_in_the_padding(reverse):
    """Nor does what the masks hold there reach anything."""
    arguments = make_arguments()
    modifiers = make_modifiers(NAMES, arguments)
    expected = check(arguments, modifiers, reverse=reverse)
    padding = torch.arange(T)[:, None] >= modifiers["lengths"]
    for name in ("zoneout_h", "zoneout_c"):
        modifiers[name] = modifiers[name].clone()
        modifiers[name][padding] = math.nan
    actual = with_gradients(
        lambda leaves: lstm_recurrence(**leaves, **modifiers, reverse=reverse), arguments
    )
    for got, wanted in zip(actual, expected.values(), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE[torch.float64])


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_a_state_that_is_not_a_number_does_not_cross_a_reset(reverse, projected):
    """The first state to be computed with is that of the reset; no gradient sees the other."""
    arguments = make_arguments(projected)
    modifiers = make_modifiers(["resets", "recurrent_mask", "zoneout_h", "zoneout_c"], arguments)
    modifiers["resets"][T - 1 if reverse else 0] = True
    expected = check(arguments, modifiers, reverse=reverse)
    for fill in (math.nan, math.inf):
        spoilt = {**arguments}
        for name in ("h0", "c0"):
            spoilt[name] = torch.full_like(arguments[name], fill)
        actual = with_gradients(
            lambda leaves: lstm_recurrence(**leaves, **modifiers, reverse=reverse), spoilt
        )
        for got, wanted in zip(actual, expected.values(), strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE[torch.float64])


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_resets_when_time_runs_backwards(reverse):
    """A reset zeroes the state that enters its step, from whichever side."""
    arguments = make_arguments()
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2] = True
    results = check(arguments, {"resets": resets}, reverse=reverse)
    part = slice(0, 3) if reverse else slice(2, T)
    zeros = {name: torch.zeros_like(arguments[name]) for name in ("h0", "c0")}
    alone = lstm_recurrence(
        arguments["gates"][part], arguments["weight_hh"], **zeros, reverse=reverse
    )
    torch.testing.assert_close(results["h"][part], alone.h)
    torch.testing.assert_close(results["h_n"], alone.h_n)


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_zoneout_of_zeros_and_ones(reverse, packed):
    arguments = make_arguments(True, packed)
    modifiers = make_modifiers(NAMES, arguments, packed)
    for name in ("zoneout_h", "zoneout_c"):
        modifiers[name] = (modifiers[name] < 0.5).to(torch.float64)
    check(arguments, modifiers, BATCH_SIZES if packed else None, reverse)


@pytest.mark.parametrize("layout", ["row", "per-step", "per-sequence", "transposed", "strided"])
def test_memory_layouts_of_the_masks(layout):
    arguments = make_arguments(True)
    modifiers = make_modifiers(NAMES, arguments)
    for name in ("zoneout_h", "zoneout_c", "resets"):
        mask = modifiers[name]
        features = mask.shape[2:]
        if layout == "row":
            mask = mask[:1, :1].expand(T, B, *features)
        elif layout == "per-step":
            mask = mask[:, :1].expand(T, B, *features)
        elif layout == "per-sequence":
            mask = mask[:1].expand(T, B, *features)
        elif layout == "transposed":
            mask = mask.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            mask = torch.stack([mask, mask], 1)[:, 0]
        modifiers[name] = mask
    modifiers["recurrent_mask"] = modifiers["recurrent_mask"].t().contiguous().t()
    modifiers["lengths"] = torch.stack([modifiers["lengths"]] * 2, 1)[:, 0]
    for reverse in (False, True):
        check(arguments, modifiers, reverse=reverse)


def test_a_constant_row_for_packed_rows():
    arguments = make_arguments(True, packed=True)
    rows = len(arguments["gates"])
    modifiers = {
        "zoneout_h": torch.full((P,), 0.3, dtype=torch.float64).expand(rows, P),
        "zoneout_c": torch.full((H,), 0.6, dtype=torch.float64).expand(rows, H),
    }
    for reverse in (False, True):
        check(arguments, modifiers, BATCH_SIZES, reverse)


def test_gates_of_any_strides():
    arguments = make_arguments()
    modifiers = make_modifiers(NAMES, arguments)
    gates = arguments["gates"].transpose(0, 1).contiguous().transpose(0, 1)
    arguments["gates"] = gates
    for reverse in (False, True):
        function = expected_of(arguments, modifiers, None, reverse)
        with torch.no_grad():
            out = lstm_recurrence(**arguments, **modifiers, reverse=reverse)
        for got, wanted in zip(out, function, strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE[torch.float64])


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_numerical_derivatives_of_first_and_second_order(reverse, projected, packed):
    arguments = make_arguments(projected, packed)
    leaves = [leaf(tensor) for tensor in arguments.values()]
    twice = reverse and projected != packed
    for names in (NAMES, NAMES[:2]):
        modifiers = make_modifiers(names, arguments, packed)

        def function(*tensors, modifiers=modifiers):
            return tuple(
                lstm_recurrence(
                    **dict(zip(arguments, tensors, strict=True)),
                    **modifiers,
                    batch_sizes=BATCH_SIZES if packed else None,
                    reverse=reverse,
                )
            )

        assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
        if twice and names is NAMES:
            assert gradgradcheck(function, leaves, fast_mode=True, check_fwd_over_rev=True)


def test_every_entry_of_the_jacobians():
    arguments = make_arguments(True, t=3, b=2, h=2, p=1)
    leaves = [leaf(tensor) for tensor in arguments.values()]
    modifiers = make_modifiers(NAMES, arguments, lengths=[3, 2])
    for reverse in (False, True):

        def function(*tensors, reverse=reverse):
            tensors = dict(zip(arguments, tensors, strict=True))
            return tuple(lstm_recurrence(**tensors, **modifiers, reverse=reverse))

        assert gradcheck(function, leaves, check_forward_ad=True)


def test_forward_mode_sees_nothing_of_the_padding():
    arguments = make_arguments()
    modifiers = make_modifiers(NAMES, arguments)
    padding = torch.arange(T)[:, None] >= modifiers["lengths"]
    tangents = tuple(values(*t.shape, seed=60 + k) for k, t in enumerate(arguments.values()))
    tangents = tuple(t.double() for t in tangents)
    results = []
    for fill in (0.0, math.nan):
        gates = arguments["gates"].clone()
        gates[padding] = fill
        tensors = (gates, *list(arguments.values())[1:])
        moving = tangents[0].clone()
        moving[padding] = fill
        results.append(
            torch.func.jvp(
                lambda *t: tuple(
                    lstm_recurrence(**dict(zip(arguments, t, strict=True)), **modifiers)
                ),
                tensors,
                (moving, *tangents[1:]),
            )
        )
    for clean, spoilt in zip(*(r[0] + r[1] for r in results), strict=True):
        torch.testing.assert_close(spoilt, clean, **CLOSE[torch.float64])


def test_third_derivative():
    arguments = make_arguments(t=3)
    modifiers = make_modifiers(NAMES, arguments, lengths=[3, 0, 2, 1])

    def third(function):
        gates = leaf(arguments["gates"])
        value = function({**arguments, "gates": gates}, modifiers)[0].square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, gates, create_graph=True)
            value = gradient.square().sum()
        return value

    ours = third(lambda tensors, modifiers: lstm_recurrence(**tensors, **modifiers))
    torch.testing.assert_close(ours, third(expected_of), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("masks", ["own-dtype", "float32"])
def test_other_dtypes(dtype, reverse, masks):
    arguments = make_arguments(True, dtype=dtype)
    modifiers = make_modifiers(NAMES, arguments)
    if masks == "float32":
        for name in ("zoneout_h", "zoneout_c"):
            modifiers[name] = modifiers[name].float()
    actual = with_gradients(
        lambda leaves: lstm_recurrence(**leaves, **modifiers, reverse=reverse), arguments
    )
    assert [t.dtype for t in actual[:4]] == [dtype, torch.float32, dtype, dtype]
    wide = {
        name: m.double() if isinstance(m, torch.Tensor) and m.is_floating_point() else m
        for name, m in modifiers.items()
    }
    exact = with_gradients(
        lambda leaves: expected_of(leaves, wide, None, reverse),
        {name: tensor.double() for name, tensor in arguments.items()},
    )
    own = {
        name: m.to(dtype) if isinstance(m, torch.Tensor) and m.is_floating_point() else m
        for name, m in modifiers.items()
    }
    native = with_gradients(lambda leaves: expected_of(leaves, own, None, reverse), arguments)
    for name, got, plain, wanted in zip(
        ["h", "c", "h_n", "c_n", *arguments], actual, native, exact, strict=True
    ):
        assert_within_budget(got, plain.to(got.dtype), wanted, name)


# A recurrence of weights as these are at first, not one that magnifies what it rounds.
WEIGHTS = ("weight_hh", "weight_hr")


@pytest.mark.parametrize("hidden", [1, 7, 8, 16, 33, 64])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_sizes_around_the_width_of_a_vector(hidden, projected):
    projection = max(1, hidden - 3)
    for batch, dtype in itertools.product((1, 5, 18), (torch.float32, torch.float64)):
        arguments = make_arguments(projected, dtype=dtype, t=3, b=batch, h=hidden, p=projection)
        for name in WEIGHTS[: 1 + projected]:
            arguments[name] /= hidden**0.5
        lengths = [(2 * b) % 4 for b in range(batch)]
        for reverse in (False, True):
            modifiers = make_modifiers(NAMES, arguments, lengths=lengths, seed=batch)
            actual = with_gradients(
                lambda leaves, m=modifiers, r=reverse: lstm_recurrence(**leaves, **m, reverse=r),
                arguments,
            )
            expected = with_gradients(
                lambda leaves, m=modifiers, r=reverse: expected_of(leaves, m, None, r), arguments
            )
            for got, wanted in zip(actual, expected, strict=True):
                torch.testing.assert_close(got, wanted, **CLOSE[dtype])


@pytest.fixture
def several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize(
    ("reverse", "projected"), [(False, True), (True, False)], ids=["projected", "backwards"]
)
@pytest.mark.parametrize("names", [["lengths"], ["lengths", "resets"], NAMES], ids=str)
def test_sizes_that_are_worth_several_threads(reverse, projected, names):
    steps, batch, hidden = 9, 70, 96
    sizes = {"t": steps, "b": batch, "h": hidden, "p": 40}
    lengths = [(7 * b) % (steps + 1) for b in range(batch)]
    arguments = make_arguments(projected, dtype=torch.float32, **sizes)
    for name in WEIGHTS[: 1 + projected]:
        arguments[name] /= hidden**0.5
    modifiers = make_modifiers(names, arguments, lengths=lengths)

    def ours(leaves):
        return lstm_recurrence(**leaves, **modifiers, reverse=reverse)

    def oracle(leaves):
        return expected_of(leaves, modifiers, None, reverse)

    actual, native = with_gradients(ours, arguments), with_gradients(oracle, arguments)
    for name, mask in modifiers.items():
        if isinstance(mask, torch.Tensor) and mask.is_floating_point():
            modifiers[name] = mask.double()
    exact = with_gradients(oracle, {name: t.double() for name, t in arguments.items()})
    for name, *results in zip(
        ["h", "c", "h_n", "c_n", *arguments], actual, native, exact, strict=True
    ):
        got, native_result, wanted = results
        # The oracle adds up 70 rows at a time, a product of all steps 630: some roundings more.
        budget = 2 * (native_result.double() - wanted).abs().max()
        budget += 8 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert (got.double() - wanted).abs().max() <= budget, name


def test_without_gradients():
    for packed in (False, True):
        arguments = make_arguments(True, packed)
        modifiers = make_modifiers(NAMES, arguments, packed)
        for reverse in (False, True):
            with torch.no_grad():
                actual = lstm_recurrence(
                    **arguments,
                    **modifiers,
                    batch_sizes=BATCH_SIZES if packed else None,
                    reverse=reverse,
                )
            expected = expected_of(arguments, modifiers, BATCH_SIZES if packed else None, reverse)
            for got, wanted in zip(actual, expected, strict=True):
                torch.testing.assert_close(got, wanted, **CLOSE[torch.float64])


def test_masks_that_ask_for_a_gradient_are_refused():
    """They have none: better an error than a parameter that never learns."""
    arguments = make_arguments()
    for name in ("recurrent_mask", "zoneout_h", "zoneout_c"):
        modifiers = make_modifiers([name], arguments)
        modifiers[name].requires_grad_()
        with pytest.raises(ValueError, match=f"{name}: .* gradient"):
            lstm_recurrence(**arguments, **modifiers)


# Transforms


def test_vmap_over_everything():
    arguments = make_arguments(True)
    tensors = {name: torch.stack([t, t.flip(0), -t]) for name, t in arguments.items()}
    seeds = [make_modifiers(NAMES[:5], arguments, seed=s) for s in range(3)]
    seeds[1]["lengths"] = torch.tensor([0, 1, 5, 3])
    modifiers = {name: torch.stack([m[name] for m in seeds]) for name in NAMES[:5]}
    names = [*tensors, *modifiers]
    for reverse in (False, True):

        def function(*values_, reverse=reverse):
            return tuple(
                lstm_recurrence(
                    **dict(zip(names, values_, strict=True)), cell_clip=CLIP, reverse=reverse
                )
            )

        actual = torch.vmap(function)(*tensors.values(), *modifiers.values())
        one_by_one = [
            expected_of(
                {name: t[v] for name, t in tensors.items()},
                {**{name: m[v] for name, m in modifiers.items()}, "cell_clip": CLIP},
                None,
                reverse,
            )
            for v in range(3)
        ]
        for got, wanted in zip(actual, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(wanted), **CLOSE[torch.float64])


@pytest.mark.parametrize(
    ("packed", "mapped"), [(False, name) for name in NAMES[:5]] + [(True, n) for n in NAMES[1:5]]
)
def test_vmap_over_gates_and_one_modifier(packed, mapped):
    """The weights are shared: the mapped dimension joins the batch."""
    arguments = make_arguments(packed=packed)
    gates = torch.stack([arguments["gates"], -arguments["gates"]], 1)
    several = [make_modifiers(NAMES, arguments, packed, seed=s) for s in range(2)]
    if mapped == "lengths":
        several[1]["lengths"] = torch.tensor([0, 1, 5, 3])
    rest = {name: m for name, m in several[0].items() if name != mapped}
    sizes = BATCH_SIZES if packed else None

    def function(gates, modifier):
        tensors = {**arguments, "gates": gates}
        return tuple(lstm_recurrence(**tensors, **{**rest, mapped: modifier}, batch_sizes=sizes))

    stacked = torch.stack([m[mapped] for m in several], -1)
    for in_dims in ((1, -1), (None, -1), (1, None)):
        each = [
            (
                gates[:, v] if in_dims[0] is not None else arguments["gates"],
                several[v][mapped] if in_dims[1] is not None else several[0][mapped],
            )
            for v in range(2)
        ]
        given = (
            gates if in_dims[0] is not None else arguments["gates"],
            stacked if in_dims[1] is not None else several[0][mapped],
        )
        actual = torch.vmap(function, in_dims=in_dims)(*given)
        one_by_one = [
            expected_of({**arguments, "gates": g}, {**rest, mapped: m}, sizes) for g, m in each
        ]
        for got, wanted in zip(actual, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(wanted), **CLOSE[torch.float64])


def test_per_sample_gradients():
    arguments = make_arguments(True)
    gates = torch.stack([arguments["gates"], -arguments["gates"]])
    several = [make_modifiers(NAMES, arguments, seed=s) for s in range(2)]
    several[1]["lengths"] = torch.tensor([0, 1, 5, 3])
    names = NAMES[:5]

    def loss(function, weight, gates, *modifiers):
        tensors = {**arguments, "gates": gates, "weight_hh": weight}
        named = dict(zip(names, modifiers, strict=True))
        out = function(tensors, {**named, "cell_clip": CLIP})
        return out[0].square().sum() + out[3].sum()

    def ours(*args):
        return loss(lambda t, m: lstm_recurrence(**t, **m), *args)

    in_dims = (None, *[0] * 6)
    stacked = [torch.stack([m[name] for m in several]) for name in names]
    weight = arguments["weight_hh"]
    actual = torch.vmap(torch.func.grad(ours), in_dims)(weight, gates, *stacked)
    for v in range(2):
        own = leaf(weight)
        value = loss(expected_of, own, gates[v], *(m[v] for m in stacked))
        (expected,) = torch.autograd.grad(value, own)
        torch.testing.assert_close(actual[v], expected, **CLOSE[torch.float64])


def test_jacobians_by_both_modes():
    arguments = make_arguments(t=3)
    modifiers = make_modifiers(NAMES, arguments, lengths=[3, 0, 2, 1])

    def of_h0(function):
        return lambda h0: function({**arguments, "h0": h0}, modifiers)[0]

    expected = torch.func.jacrev(of_h0(expected_of))(arguments["h0"])
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        ours = transform(of_h0(lambda t, m: lstm_recurrence(**t, **m)))(arguments["h0"])
        torch.testing.assert_close(ours, expected, **CLOSE[torch.float64])
