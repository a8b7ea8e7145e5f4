"""What modifies the recurrence in the Triton kernels: lengths, resets, dropout, zoneout, clipping.

The oracle is the equations in plain PyTorch, differentiated by autograd, in float64.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from fused_lstm.kernels.triton import lstm_backward, lstm_forward

from ..budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")

scopes = pytest.mark.parametrize("scope", ["sequence", "step"])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"]
)

# Those of one value a step, or a row's, or all the recurrence's.
PER_STEP = ["resets", "zoneout_h", "zoneout_c"]
MODIFIERS = ["lengths", *PER_STEP, "recurrent_mask", "cell_clip"]
NAMES = ["h", "c", "h_n", "c_n", "dgates", "dh0", "dc0"]
NAN, INF = float("nan"), float("inf")


def recurrence(gates, weight_hh, h0, c0, valid, modifiers, reverse, excess):
    """h, c [T, B, H], zero where there is no step, and h_n, c_n, from padded [T, B, ...] inputs.

    To the list `excess` goes by how much each cell is too large for the clip.
    """
    resets, zoneout_h, zoneout_c, mask, clip = (modifiers.get(name) for name in MODIFIERS[1:])
    T = len(gates)
    h, c = h0, c0
    hs, cs = [h] * T, [c] * T
    for t in reversed(range(T)) if reverse else range(T):
        h_prev, c_prev = h, c
        if resets is not None:
            h_prev = torch.where(resets[t][:, None], 0, h)
            c_prev = torch.where(resets[t][:, None], 0, c)
        operand = h_prev if mask is None else h_prev * mask
        a_i, a_f, a_g, a_o = (gates[t] + operand @ weight_hh.T).chunk(4, dim=-1)
        c_t = a_f.sigmoid() * c_prev + a_i.sigmoid() * a_g.tanh()
        if clip is not None:
            excess.append(c_t.detach().abs() - clip)
            c_t = c_t.clamp(-clip, clip)
        h_t = a_o.sigmoid() * c_t.tanh()
        if zoneout_c is not None:
            c_t = zoneout_c[t] * c_prev + (1 - zoneout_c[t]) * c_t
        if zoneout_h is not None:
            h_t = zoneout_h[t] * h_prev + (1 - zoneout_h[t]) * h_t
        here = valid[t][:, None]
        hs[t], cs[t] = torch.where(here, h_t, 0), torch.where(here, c_t, 0)
        h, c = torch.where(here, h_t, h), torch.where(here, c_t, c)
    return torch.stack(hs), torch.stack(cs), h, c


def valid_steps(inputs, modifiers, batch_sizes=None):
    """[T, B]: where there is a step."""
    gates, _, h0, _ = inputs
    if batch_sizes is not None:
        return torch.arange(len(h0)) < batch_sizes[:, None]
    lengths = modifiers.get("lengths", torch.full((len(h0),), len(gates))).cpu()
    return torch.arange(len(gates))[:, None] < lengths


def plain(inputs, grads, modifiers, batch_sizes, reverse, dtype, excess=None):
    """Outputs and input gradients (gates, h0, c0) by `recurrence` and autograd, in `dtype`."""
    excess = [] if excess is None else excess
    valid = valid_steps(inputs, modifiers, batch_sizes)

    def converted(x):
        is_float = torch.is_tensor(x) and x.is_floating_point()
        return x.detach().cpu().to(dtype) if is_float else x.cpu() if torch.is_tensor(x) else x

    def padded(x):
        """[T, B, ...] of what there is at each step, zero where there is none."""
        if batch_sizes is not None:
            return x.new_zeros(*valid.shape, *x.shape[1:]).index_put(torch.where(valid), x)
        return torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), x, x.new_zeros(()))

    gates, weight_hh, h0, c0 = [converted(x).requires_grad_() for x in inputs]
    modifiers = {name: converted(x) for name, x in modifiers.items()}
    modifiers.update({name: padded(modifiers[name]) for name in PER_STEP if name in modifiers})
    h, c, h_n, c_n = recurrence(padded(gates), weight_hh, h0, c0, valid, modifiers, reverse, excess)
    if batch_sizes is not None:
        h, c = h[valid], c[valid]
    grads = [None if g is None else converted(g) for g in grads]
    if batch_sizes is None:
        grads[:2] = [None if g is None else padded(g) for g in grads[:2]]
    outputs = h, c, h_n, c_n
    loss = sum((y * g).sum() for y, g in zip(outputs, grads, strict=True) if g is not None)
    gradients = torch.autograd.grad(loss, [gates, h0, c0], materialize_grads=True)
    return [*outputs, *gradients]


def ours(inputs, grads, modifiers, batch_sizes=None, reverse=False, scope=None):
    options = {"batch_sizes": batch_sizes, "reverse": reverse, "scope": scope, **modifiers}
    h, c, activations, h_n, c_n = lstm_forward(*inputs, **options)
    _, weight_hh, _, c0 = inputs
    return [h, c, h_n, c_n, *lstm_backward(*grads, activations, c, weight_hh, c0, **options)]


def make_inputs(T, B, H, dtype, device, batch_sizes=None, seed=0):
    """Gates, weight_hh, h0, c0; gradients of h, c, h_n, c_n; every modifier but cell_clip."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, dtype=dtype):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).to(device)

    def bernoulli(p, *shape):
        return torch.rand(*shape, generator=generator).lt(p).to(device)

    leading = (T, B) if batch_sizes is None else (int(batch_sizes.sum()),)
    inputs = [normal(*leading, 4 * H), normal(4 * H, H, scale=H**-0.5), normal(B, H), normal(B, H)]
    grads = [normal(*leading, H), normal(*leading, H, dtype=torch.float32)]
    grads += [normal(B, H), normal(B, H)]
    modifiers = {
        "resets": bernoulli(0.3, *leading),
        # Masks, as in training, of the gates' dtype; and all of [0, 1] in the state's.
        "zoneout_h": bernoulli(0.4, *leading, H).to(dtype),
        "zoneout_c": torch.rand(*leading, H, generator=generator).to(device),
        "recurrent_mask": bernoulli(0.7, B, H).to(dtype) / 0.7,
    }
    if batch_sizes is None:
        # None, all and a part of the steps, in no order.
        lengths = torch.randint(T + 1, (B,), generator=generator)
        lengths[torch.arange(B) % 3 == 0] = T
        lengths[torch.arange(B) % 3 == 1] = 0
        modifiers["lengths"] = lengths.to(device)
    return inputs, grads, modifiers


def clear_clip(inputs, grads, modifiers, batch_sizes, reverse):
    """A clip that holds some cells, and that none comes so near that rounding would decide."""
    margins = {}
    for clip in (0.3 + 0.05 * k for k in range(15)):
        excess = []
        clipped = {**modifiers, "cell_clip": clip}
        plain(inputs, grads, clipped, batch_sizes, reverse, torch.float64, excess)
        if torch.stack(excess).gt(0).any():
            margins[clip] = torch.stack(excess).abs().min().item()
    return max(margins, key=margins.get)


def chosen(names, inputs, grads, modifiers, batch_sizes=None, reverse=False):
    """Those modifiers that are named."""
    picked = {name: x for name, x in modifiers.items() if name in names}
    if "cell_clip" in names:
        picked["cell_clip"] = clear_clip(inputs, grads, picked, batch_sizes, reverse)
    return picked


def check(inputs, grads, modifiers, batch_sizes=None, reverse=False, scope=None):
    dtype = inputs[0].dtype
    actual = ours(inputs, grads, modifiers, batch_sizes, reverse, scope)
    native = plain(inputs, grads, modifiers, batch_sizes, reverse, dtype)
    exact = plain(inputs, grads, modifiers, batch_sizes, reverse, torch.float64)
    for name, a, n, e in zip(NAMES, actual, native, exact, strict=True):
        assert a.dtype == (torch.float32 if name == "c" else dtype), name
        assert a.is_contiguous(), name
        assert_within_budget(a, n, e, name)
    if batch_sizes is None:
        nothing = ~valid_steps(inputs, modifiers)
        for name, a in zip(NAMES, actual, strict=True):
            if name in ("h", "c", "dgates"):
                assert not a.cpu()[nothing].any(), name
    return actual


@scopes
@directions
@pytest.mark.parametrize("name", [*MODIFIERS, "all"])
def test_padded(device, scope, reverse, name):
    inputs, grads, modifiers = make_inputs(4, 3, 5, torch.float32, device)
    names = MODIFIERS if name == "all" else [name]
    modifiers = chosen(names, inputs, grads, modifiers, None, reverse)
    check(inputs, grads, modifiers, None, reverse, scope)


@scopes
@directions
@pytest.mark.parametrize("name", [*MODIFIERS[1:], "all"])
def test_packed(device, scope, reverse, name):
    sizes = torch.tensor([4, 3, 3, 1])
    inputs, grads, modifiers = make_inputs(4, 4, 5, torch.float32, device, sizes)
    names = MODIFIERS if name == "all" else [name]
    modifiers = chosen(names, inputs, grads, modifiers, sizes, reverse)
    check(inputs, grads, modifiers, sizes, reverse, scope)


@scopes
@half_dtypes
@layouts
@pytest.mark.parametrize("name", [*MODIFIERS, "all"])
def test_half_precision(device, scope, dtype, packed, name):
    if packed and name == "lengths":
        pytest.skip("a packed sequence has its lengths")
    sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    inputs, grads, modifiers = make_inputs(4, 3, 20, dtype, device, sizes)
    names = MODIFIERS if name == "all" else [name]
    reverse = MODIFIERS.index(names[-1]) % 2 == 1
    modifiers = chosen(names, inputs, grads, modifiers, sizes, reverse)
    check(inputs, grads, modifiers, sizes, reverse, scope)


@scopes
@layouts
@pytest.mark.parametrize(("B", "H"), [(1, 1), (17, 16), (18, 24)], ids=str)
def test_tails(device, scope, packed, B, H):
    """One row and one unit; more rows than a tile has; units that do not fill theirs."""
    sizes = torch.tensor([B, B, (B + 1) // 2]) if packed else None
    inputs, grads, modifiers = make_inputs(3, B, H, torch.float32, device, sizes)
    modifiers["cell_clip"] = 0.7
    check(inputs, grads, modifiers, sizes, packed, scope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_tiles_of_the_step_kernel(device, dtype):
    """Several inner tiles, and columns, for the recurrent mask and the zoneout to follow."""
    inputs, grads, modifiers = make_inputs(2, 3, 72, dtype, device)
    modifiers["lengths"].copy_(torch.tensor([2, 1, 0]))
    check(inputs, grads, modifiers, None, False, "step")


@scopes
@directions
@pytest.mark.parametrize("lengths", [[0, 0, 0], [4, 4, 4], [1, 4, 0]], ids=str)
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with the others"])
def test_lengths(device, scope, reverse, lengths, others):
    inputs, grads, modifiers = make_inputs(4, 3, 5, torch.float32, device)
    names = MODIFIERS[:-1] if others else ["lengths"]
    modifiers = chosen(names, inputs, grads, modifiers, None, reverse)
    modifiers["lengths"] = torch.tensor(lengths, device=device)
    _, _, h_n, c_n, _, dh0, dc0 = check(inputs, grads, modifiers, None, reverse, scope)
    absent = [b for b, length in enumerate(lengths) if length == 0]
    for actual, expected in (h_n, inputs[2]), (c_n, inputs[3]), (dh0, grads[2]), (dc0, grads[3]):
        assert torch.equal(actual[absent], expected[absent])


@scopes
@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lengths_equal_packing(device, scope, reverse, dtype):
    sizes = torch.tensor([4, 3, 1])
    inputs, grads, modifiers = make_inputs(3, 4, 5, dtype, device, sizes)
    modifiers["cell_clip"] = 0.5
    packed = ours(inputs, grads, modifiers, sizes, reverse, scope)
    valid = valid_steps(inputs, modifiers, sizes)

    def padded(x):
        return x.new_full((3, 4, *x.shape[1:]), NAN if x.is_floating_point() else True).index_put(
            torch.where(valid.to(device)), x
        )

    dense = {n: padded(x) if n in PER_STEP else x for n, x in modifiers.items()}
    dense["lengths"] = torch.tensor([3, 2, 2, 1], device=device)
    inputs[0] = padded(inputs[0])
    grads[:2] = [padded(g) for g in grads[:2]]
    dense = ours(inputs, grads, dense, None, reverse, scope)
    for name, p, d in zip(NAMES, packed, dense, strict=True):
        d = d[valid.to(device)] if name in ("h", "c", "dgates") else d
        assert torch.equal(p, d), name


@scopes
@directions
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with the others"])
def test_nothing_past_a_length_is_read(device, scope, reverse, bad, others):
    inputs, grads, modifiers = make_inputs(4, 3, 5, torch.float32, device)
    modifiers = chosen(MODIFIERS[:-1] if others else ["lengths"], inputs, grads, modifiers)
    clean = ours(inputs, grads, modifiers, None, reverse, scope)
    nothing = ~valid_steps(inputs, modifiers).to(device)
    for x in (inputs[0], *grads[:2], *(modifiers[n] for n in PER_STEP if n in modifiers)):
        x[nothing] = bad if x.is_floating_point() else True
    dirty = ours(inputs, grads, modifiers, None, reverse, scope)
    for name, a, b in zip(NAMES, clean, dirty, strict=True):
        assert torch.equal(a, b), name
    activations = lstm_forward(*inputs, **modifiers, reverse=reverse, scope=scope)[2]
    assert activations.isfinite().all()
    assert not activations[nothing].any()
    assert activations[~nothing].all()


@scopes
@directions
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with the others"])
def test_a_state_does_not_cross_a_reset(device, scope, reverse, others):
    names = ["zoneout_h", "zoneout_c", "recurrent_mask"] if others else []
    inputs, grads, modifiers = make_inputs(4, 3, 5, torch.float32, device)
    modifiers = chosen(names, inputs, grads, modifiers)
    modifiers["resets"] = torch.zeros(4, 3, dtype=torch.bool, device=device)
    reset = 1 if reverse else 2
    modifiers["resets"][reset] = True
    after = slice(None, reset + 1) if reverse else slice(reset, None)
    clean = ours(inputs, grads, modifiers, None, reverse, scope)
    gates, _, h0, c0 = inputs
    # One row each: NaN in the initial state, in the gates before the reset, and none at all.
    h0[0], c0[0] = NAN, NAN
    gates[3 if reverse else 0, 1] = NAN
    dirty = ours(inputs, grads, modifiers, None, reverse, scope)
    for name, a, b in zip(NAMES, clean, dirty, strict=True):
        if name in ("h", "c", "dgates"):
            assert torch.equal(a[after], b[after]), name
            assert torch.equal(a[:, 2], b[:, 2]), name
    assert torch.equal(clean[2], dirty[2])
    assert torch.equal(clean[3], dirty[3])
    assert dirty[0][3 if reverse else 0, :2].isnan().all()


@scopes
@directions
def test_nothing_of_a_gradient_goes_back_past_a_reset(device, scope, reverse):
    inputs, grads, modifiers = make_inputs(3, 3, 5, torch.float32, device)
    del modifiers["lengths"]
    modifiers["resets"][:] = True
    *_, dh0, dc0 = ours(inputs, grads, modifiers, None, reverse, scope)
    assert not dh0.any()
    assert not dc0.any()
    grads = [None, None, torch.full_like(grads[2], NAN), None]
    *_, dgates, dh0, dc0 = ours(inputs, grads, modifiers, None, reverse, scope)
    last = 0 if reverse else 2
    assert dgates[last].isnan().any()
    dgates[last] = 0
    assert not dgates.any()
    assert not dh0.any()
    assert not dc0.any()


@scopes
@directions
def test_modifiers_that_change_nothing(device, scope, reverse):
    T, B, H = 3, 3, 5
    inputs, grads, _ = make_inputs(T, B, H, torch.float32, device)
    modifiers = {
        "lengths": torch.full((B,), T, device=device),
        "resets": torch.zeros(T, B, dtype=torch.bool, device=device),
        "recurrent_mask": torch.ones(B, H, device=device),
        "zoneout_h": torch.zeros(H, device=device).expand(T, B, H),
        "zoneout_c": torch.zeros(H, device=device).expand(T, B, H),
        "cell_clip": 1e30,
    }
    actual = ours(inputs, grads, modifiers, None, reverse, scope)
    unmodified = ours(inputs, grads, {}, None, reverse, scope)
    for name, a, b in zip(NAMES, actual, unmodified, strict=True):
        assert torch.equal(a, b), name


@scopes
@layouts
def test_strides(device, scope, packed):
    sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    H = 6
    inputs, grads, modifiers = make_inputs(4, 3, H, torch.float32, device, sizes)
    leading = inputs[0].shape[:-1]
    resets = modifiers["resets"]
    turned = torch.stack([resets, ~resets], dim=-1).movedim(0, -2)
    modifiers["resets"] = turned[..., 0].movedim(-1, 0)
    modifiers["zoneout_h"] = modifiers["zoneout_h"].flatten()[:H].expand(*leading, H)
    modifiers["zoneout_c"] = torch.cat([modifiers["zoneout_c"]] * 2, dim=-1)[..., H:]
    modifiers["recurrent_mask"] = modifiers["recurrent_mask"][:1].expand(3, H)
    if not packed:
        lengths = modifiers["lengths"]
        modifiers["lengths"] = torch.stack([lengths, lengths - 1], dim=-1)[:, 0]
    assert not any(x.is_contiguous() for x in modifiers.values())
    assert torch.equal(modifiers["resets"], resets)
    check(inputs, grads, modifiers, sizes, False, scope)


@scopes
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_every_combination_of_gradients(device, scope, given):
    inputs, grads, modifiers = make_inputs(3, 3, 4, torch.float32, device)
    grads = [g if on else None for g, on in zip(grads, given, strict=True)]
    check(inputs, grads, modifiers, None, given[0], scope)


@scopes
def test_without_a_gradient_a_row_without_a_step_has_none(device, scope):
    inputs, grads, modifiers = make_inputs(3, 3, 4, torch.float32, device)
    modifiers["lengths"].zero_()
    dgates, dh0, dc0 = ours(inputs, [*grads[:2], None, None], modifiers, scope=scope)[4:]
    assert not dgates.any()
    assert not dh0.any()
    assert not dc0.any()


@scopes
@layouts
def test_clip(device, scope, packed):
    """Cells stay within the clip, those held there pass no gradient on, and NaN stays NaN."""
    sizes = torch.tensor([3, 3]) if packed else None
    inputs, grads, _ = make_inputs(2, 3, 5, torch.float32, device, sizes)
    gates = inputs[0]
    gates[..., :] = 30.0
    gates.view(2, 3, 20)[1, 2] = NAN
    h, c, _, c_n, dgates, _, dc0 = ours(inputs, grads, {"cell_clip": 0.1}, sizes, False, scope)
    h, c, dgates = h.view(2, 3, 5), c.view(2, 3, 5), dgates.view(2, 3, 20)
    assert (c[:, :2] == torch.tensor(0.1)).all()
    assert c[1, 2].isnan().all()
    assert h[1, 2].isnan().all()
    assert c_n[2].isnan().all()
    assert not dgates[:, :2, :15].any()
    assert not dc0[:2].any()


@scopes
@layouts
@pytest.mark.parametrize("name", ["zoneout_h", "recurrent_mask"])
@pytest.mark.parametrize("H", [5, 24])
def test_an_infinity_that_stays_in_h_stays_in_its_row(device, scope, packed, name, H):
    """Beyond the hidden units a tile holds zeros, and infinity times zero is NaN."""
    sizes = torch.tensor([3, 3, 2]) if packed else None
    inputs, _, modifiers = make_inputs(3, 3, H, torch.float32, device, sizes)
    modifiers = {name: modifiers[name]}
    if name == "zoneout_h":
        inputs[2][0, 0] = INF
        modifiers[name].fill_(0.5)
    else:
        modifiers[name][0, 0] = INF
    options = {"batch_sizes": sizes, "scope": scope, **modifiers}
    h = lstm_forward(*inputs, **options)[0]
    grads = [torch.zeros_like(h), None, None, None]
    expected = plain(inputs, grads, modifiers, sizes, False, torch.float32)[0]
    assert torch.equal(h.cpu().isfinite(), expected.isfinite())
    assert h.isfinite().any()


@scopes
def test_what_is_not_saved_is_empty(device, scope):
    inputs, _, modifiers = make_inputs(3, 3, 5, torch.float16, device)
    full = lstm_forward(*inputs, **modifiers, scope=scope)
    bare = lstm_forward(*inputs, **modifiers, scope=scope, save_activations=False, save_cells=False)
    assert bare[1].shape == bare[2].shape == (0,)
    for k in (0, 3, 4):
        assert torch.equal(full[k], bare[k])


@scopes
def test_inputs_are_left_alone(device, scope):
    inputs, grads, modifiers = make_inputs(2, 3, 4, torch.float32, device)
    given = [*inputs, *grads, *modifiers.values()]
    before = [x.clone() for x in given]
    ours(inputs, grads, {**modifiers, "cell_clip": 0.5}, scope=scope)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@scopes
@pytest.mark.parametrize(("T", "B"), [(0, 2), (2, 0)], ids=str)
def test_nothing_to_do(device, scope, T, B):
    inputs, grads, modifiers = make_inputs(T, B, 3, torch.float32, device)
    h, _, h_n, c_n, dgates, dh0, dc0 = ours(inputs, grads, modifiers, scope=scope)
    assert h.shape == (T, B, 3)
    assert dgates.shape == inputs[0].shape
    for actual, expected in (h_n, inputs[2]), (c_n, inputs[3]), (dh0, grads[2]), (dc0, grads[3]):
        assert torch.equal(actual, expected)


@scopes
def test_lengths_do_not_come_with_batch_sizes(device, scope):
    sizes = torch.tensor([2, 1])
    inputs, grads, _ = make_inputs(2, 2, 3, torch.float32, device, sizes)
    lengths = torch.tensor([2, 1], device=device)
    with pytest.raises(ValueError, match=r"lengths .* batch_sizes"):
        ours(inputs, grads, {"lengths": lengths}, sizes, scope=scope)
