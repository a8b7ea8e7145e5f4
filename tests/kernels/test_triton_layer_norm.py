"""The layer-normalized recurrence in the Triton kernels, with everything that can modify it.

The oracle is the equations in plain PyTorch, differentiated by autograd, in float64. It knows rows
only: a padded batch is one of T * B rows, a packed one of those that there are.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fused_lstm.kernels.triton import layer_norm_backward, layer_norm_forward

from ..budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")

directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"]
)
alone_or_not = pytest.mark.parametrize("others", [False, True], ids=["alone", "with the others"])

# Not so small that what was reset, whose product is zero, has gradients far above all others.
EPS = 1e-2
NAN, INF = float("nan"), float("inf")
# In the order of the kernels' argument.
MODIFIERS = ["lengths", "resets", "recurrent_mask", "zoneout_h", "zoneout_c", "cell_clip"]
PER_STEP = ["resets", "zoneout_h", "zoneout_c"]
FORWARD = ["h", "c", "activations", "normalized", "rstd", "h_n", "c_n"]
BACKWARD = ["dgates", "dproduct", "dz", "dh0", "dc0"]
# Zero at steps past a length.
STORED = ["h", "c", "activations", "normalized", "rstd", "dgates", "dproduct", "dz"]
FLOAT32 = {"c", "rstd", "dz"}
PACKED = torch.tensor([4, 3, 3, 1])


def normalize(x, eps):
    """LN(x) and rstd(x)."""
    wide = x if x.dtype == torch.float64 else x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    if x.dtype == torch.float64:
        return centered * rstd, rstd
    # PyTorch's own: in 16 bits the square of rstd would be too large.
    return F.layer_norm(x, x.shape[-1:], eps=eps), rstd.detach()


def recurrence(inputs, valid, sizes, modifiers, reverse, eps, excess):
    """What the forward returns and, of every row, p, z, LN(c^) and what enters the product.

    To the list `excess` goes by how much each cell is too large for the clip.
    """
    gates, weight_hh, h, c, gain_hh, gain_c, bias_c = inputs
    resets, mask, zoneout_h, zoneout_c, clip = (modifiers.get(name) for name in MODIFIERS[1:])
    per_step = []
    steps = list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))
    for row, n in reversed(steps) if reverse else steps:
        here, step = valid[row : row + n, None], slice(row, row + n)
        h_prev, c_prev = h[:n], c[:n]
        if resets is not None:
            h_prev = torch.where(resets[step, None], 0, h_prev)
            c_prev = torch.where(resets[step, None], 0, c_prev)
        operand = h_prev if mask is None else h_prev * mask[:n]
        p = operand @ weight_hh.T
        normalized, rstd = normalize(p, eps)
        i, f, g, o = (gates[step] + gain_hh * normalized).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c_prev + i * g
        if clip is not None:
            excess.append((c_t.detach().abs() - clip)[here[:, 0]])
            c_t = c_t.clamp(-clip, clip)
        n_c, _ = normalize(c_t, eps)
        z = gain_c * n_c + (0 if bias_c is None else bias_c)
        h_t = o * z.tanh()
        if zoneout_c is not None:
            c_t = zoneout_c[step] * c_prev + (1 - zoneout_c[step]) * c_t
        if zoneout_h is not None:
            h_t = zoneout_h[step] * h_prev + (1 - zoneout_h[step]) * h_t
        h = torch.cat([torch.where(here, h_t, h[:n]), h[n:]])
        c = torch.cat([torch.where(here, c_t, c[:n]), c[n:]])
        saved = h_t, c_t, torch.cat([i, f, g, o], dim=-1), normalized, rstd, n_c, operand
        per_step.append([p, z, *(torch.where(here, x, 0) for x in saved)])
    if reverse:
        per_step.reverse()
    ps, zs, *saved = zip(*per_step, strict=True)
    h_t, c_t, activations, normalized, rstd, n_c, operand = (torch.cat(x) for x in saved)
    return {
        "h": h_t, "c": c_t, "activations": activations, "normalized": normalized,
        "rstd": rstd[:, 0], "h_n": h, "c_n": c, "n_c": n_c, "operand": operand, "p": ps, "z": zs,
    }  # fmt: skip


def sizes_of(inputs, batch_sizes):
    gates, _, h0 = inputs[:3]
    return [len(h0)] * len(gates) if batch_sizes is None else batch_sizes.tolist()


def valid_rows(inputs, modifiers, batch_sizes=None):
    """[N]: where a padded batch has a step; everywhere in a packed one."""
    if "lengths" not in modifiers:
        return torch.ones(sum(sizes_of(inputs, batch_sizes)), dtype=torch.bool)
    return (torch.arange(len(inputs[0]))[:, None] < modifiers["lengths"].cpu()).flatten()


def plain(inputs, grads, modifiers, batch_sizes, reverse, eps, dtype, excess=None):
    """Outputs and gradients by `recurrence` and autograd, in `dtype`."""
    valid = valid_rows(inputs, modifiers, batch_sizes)

    def converted(x):
        is_float = torch.is_tensor(x) and x.is_floating_point()
        return x.detach().cpu().to(dtype) if is_float else x.cpu() if torch.is_tensor(x) else x

    def rows(x):
        x = x if batch_sizes is not None else x.flatten(0, 1)
        return torch.where(valid.view(-1, *[1] * (x.dim() - 1)), x, x.new_zeros(()))

    leaves = [converted(x) for x in inputs]
    leaves[0] = rows(leaves[0])
    for x in leaves:
        if x is not None:
            x.requires_grad_()
    modifiers = {name: converted(x) for name, x in modifiers.items()}
    modifiers.update({name: rows(modifiers[name]) for name in PER_STEP if name in modifiers})
    excess = [] if excess is None else excess
    sizes = sizes_of(inputs, batch_sizes)
    out = recurrence(leaves, valid, sizes, modifiers, reverse, eps, excess)
    grads = [None if x is None else converted(x) for x in grads]
    grads[:2] = [None if x is None else rows(x) for x in grads[:2]]
    outputs = out["h"], out["c"], out["h_n"], out["c_n"]
    loss = sum((y * g).sum() for y, g in zip(outputs, grads, strict=True) if g is not None)
    gates, weight_hh, h0, c0, *norm = leaves
    wanted = {"dgates": gates, "dh0": h0, "dc0": c0, "dweight": weight_hh}
    wanted |= dict(zip(["dgain_hh", "dgain_c", "dbias_c"], norm, strict=True))
    wanted = {name: x for name, x in wanted.items() if x is not None}
    ps, zs = out.pop("p"), out.pop("z")
    found = torch.autograd.grad(loss, [*wanted.values(), *ps, *zs], materialize_grads=True)
    out |= dict(zip(wanted, found, strict=False))
    of_steps = found[len(wanted) :]
    out["dproduct"], out["dz"] = torch.cat(of_steps[: len(ps)]), torch.cat(of_steps[len(ps) :])
    return {name: x.detach() for name, x in out.items()}


def native(inputs, grads, modifiers, batch_sizes, reverse, eps, exact, orders=6):
    """Of every result, element by element, the worst of `plain` in several orders of the units.

    Each is as good an evaluation in the inputs' dtype as another; in tensors this small the error
    of a single one is a matter of luck.
    """
    H = inputs[2].shape[-1]
    generator = torch.Generator().manual_seed(0)
    results = []
    for order in (torch.randperm(H, generator=generator) for _ in range(orders)):

        def ordered(x, order=order):
            """The hidden units of x, or of each gate, in that order."""
            return x.unflatten(-1, (-1, H))[..., order.to(x.device)].flatten(-2)

        arguments = [None if x is None else ordered(x) for x in [*inputs, *grads]]
        arguments[1] = ordered(arguments[1].T).T
        others = {
            name: ordered(x) if name in ("recurrent_mask", "zoneout_h", "zoneout_c") else x
            for name, x in modifiers.items()
        }
        out = plain(
            arguments[:7], arguments[7:], others, batch_sizes, reverse, eps, inputs[0].dtype
        )
        back = order.argsort()
        out = {n: x if n == "rstd" else ordered(x, back) for n, x in out.items()}
        out["dweight"] = ordered(out["dweight"].T, back).T
        results.append(out)
    worst = {}
    for name, x in exact.items():
        all_of_it = torch.stack([out[name] for out in results])
        farthest = (all_of_it.double() - x).abs().argmax(0, keepdim=True)
        worst[name] = all_of_it.gather(0, farthest)[0]
    return worst


def ours(inputs, grads, modifiers, batch_sizes=None, reverse=False, eps=EPS, **options):
    """What the kernels return, rows flat; the gradients are left out where grads is None."""
    gates, weight_hh, h0, c0, *norm = inputs
    modifiers = tuple(modifiers.get(name) for name in MODIFIERS)
    recurrence_arguments = None, batch_sizes, modifiers, reverse, *norm, eps
    values = layer_norm_forward(gates, weight_hh, h0, c0, *recurrence_arguments, True, **options)
    out = dict(zip(FORWARD, values, strict=True))
    if grads is not None:
        saved = [out[name] for name in ("activations", "c", "normalized", "rstd")]
        *values, whole = layer_norm_backward(
            *grads, *saved, weight_hh, c0, *recurrence_arguments, **options
        )
        assert whole is None
        out |= dict(zip(BACKWARD, values, strict=True))
    for name, x in out.items():
        assert x.is_contiguous(), name
        assert x.dtype == (torch.float32 if name in FLOAT32 else gates.dtype), name
        if name in STORED and batch_sizes is None:
            out[name] = x.flatten(0, 1)
    return out


def make_inputs(T, B, H, dtype, device, batch_sizes=None, seed=0):
    """Gates, weight_hh, h0, c0, gains and bias; gradients; every modifier but cell_clip."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, mean=0.0, scale=1.0, dtype=dtype):
        x = mean + torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).to(device)

    def bernoulli(p, *shape):
        return torch.rand(*shape, generator=generator).lt(p).to(device)

    leading = (T, B) if batch_sizes is None else (int(batch_sizes.sum()),)
    inputs = [normal(*leading, 4 * H), normal(4 * H, H, scale=H**-0.5), normal(B, H), normal(B, H)]
    inputs += [normal(4 * H, mean=1, scale=0.3), normal(H, mean=1, scale=0.3), normal(H, scale=0.3)]
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
        plain(inputs, grads, clipped, batch_sizes, reverse, EPS, torch.float64, excess)
        if torch.cat(excess).gt(0).any():
            margins[clip] = torch.cat(excess).abs().min().item()
    return max(margins, key=margins.get)


def chosen(name, inputs, grads, modifiers, batch_sizes=None, reverse=False):
    """The named modifier; "all" of them, or "none"."""
    names = {"all": MODIFIERS, "none": []}.get(name, [name])
    picked = {name: x for name, x in modifiers.items() if name in names}
    if "cell_clip" in names:
        picked["cell_clip"] = clear_clip(inputs, grads, picked, batch_sizes, reverse)
    return picked


def check(inputs, grads, modifiers, batch_sizes=None, reverse=False, eps=EPS, **options):
    """All results within their budgets, and the gradients that are sums of them."""
    dtype = inputs[0].dtype
    actual = ours(inputs, grads, modifiers, batch_sizes, reverse, eps, **options)
    exact = plain(inputs, grads, modifiers, batch_sizes, reverse, eps, torch.float64)
    worst = native(inputs, grads, modifiers, batch_sizes, reverse, eps, exact)
    valid = valid_rows(inputs, modifiers, batch_sizes)
    stored = {name: actual[name].cpu() for name in STORED}
    assert not any(x[~valid].any() for x in stored.values())
    wide = {name: x.double() for name, x in stored.items()}
    sums = {
        "dweight": wide["dproduct"].T @ exact["operand"],
        "dgain_hh": (wide["dgates"] * wide["normalized"]).sum(0),
        "dgain_c": (wide["dz"] * exact["n_c"]).sum(0),
        "dbias_c": wide["dz"].sum(0),
    }
    results = {**actual, **{name: x.to(dtype) for name, x in sums.items() if name in exact}}
    for name, x in results.items():
        assert_within_budget(x, worst[name], exact[name], name)
    return actual


@directions
@pytest.mark.parametrize("name", ["none", *MODIFIERS, "all"])
def test_padded(device, reverse, name):
    inputs, grads, modifiers = make_inputs(4, 3, 5, torch.float32, device)
    modifiers = chosen(name, inputs, grads, modifiers, None, reverse)
    check(inputs, grads, modifiers, None, reverse)


@pytest.mark.parametrize(
    ("name", "reverse"),
    [("none", False), ("none", True), ("all", False), ("all", True)]
    + [(name, k % 2 == 0) for k, name in enumerate(MODIFIERS[1:])],
)
def test_packed(device, name, reverse):
    inputs, grads, modifiers = make_inputs(4, 4, 5, torch.float32, device, PACKED)
    modifiers = chosen(name, inputs, grads, modifiers, PACKED, reverse)
    check(inputs, grads, modifiers, PACKED, reverse)


@half_dtypes
@layouts
@pytest.mark.parametrize("name", ["none", "all"])
def test_half_precision(device, dtype, packed, name):
    sizes = PACKED if packed else None
    inputs, grads, modifiers = make_inputs(4, 4, 20, dtype, device, sizes)
    modifiers = chosen(name, inputs, grads, modifiers, sizes, packed)
    check(inputs, grads, modifiers, sizes, packed)


@pytest.mark.parametrize(
    ("B", "H", "packed"), [(1, 1, False), (1, 1, True), (17, 16, False), (18, 33, True)], ids=str
)
def test_tails(device, B, H, packed):
    """One row and one unit; more rows than a small batch has; units that do not fill a tile."""
    sizes = torch.tensor([B, B, (B + 1) // 2]) if packed else None
    inputs, grads, modifiers = make_inputs(3, B, H, torch.float32, device, sizes)
    check(inputs, grads, modifiers, sizes, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_tiles(device, dtype):
    """Several inner tiles, and columns."""
    inputs, grads, modifiers = make_inputs(2, 6, 72, dtype, device)
    check(inputs, grads, modifiers)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_without_a_bias(device, eps):
    inputs, grads, _ = make_inputs(3, 3, 6, torch.float32, device)
    inputs[-1] = None
    check(inputs, grads, {}, eps=eps)


def test_tf32(device):
    inputs, grads, _ = make_inputs(3, 3, 20, torch.float32, device)
    if device.type == "cpu":
        # The interpreter multiplies in float32 whatever the precision asked for.
        check(inputs, grads, {}, input_precision="tf32")
        return
    actual = ours(inputs, grads, {}, input_precision="tf32")
    exact = plain(inputs, grads, {}, None, False, EPS, torch.float64)
    # TF32 keeps ten bits of an operand, as float16 does.
    half = plain(inputs, grads, {}, None, False, EPS, torch.float16)
    for name, x in actual.items():
        assert_within_budget(x, half[name], exact[name], name)


@alone_or_not
@pytest.mark.parametrize("lengths", [[0, 0, 0], [4, 4, 4], [1, 4, 0]], ids=str)
def test_lengths(device, lengths, others):
    inputs, grads, modifiers = make_inputs(4, 3, 5, torch.float32, device)
    modifiers = modifiers if others else {}
    modifiers["lengths"] = torch.tensor(lengths, device=device)
    actual = check(inputs, grads, modifiers, None, others)
    absent = [b for b, length in enumerate(lengths) if length == 0]
    _, _, h0, c0, *_ = inputs
    _, _, grad_h_n, grad_c_n = grads
    for name, expected in ("h_n", h0), ("c_n", c0), ("dh0", grad_h_n), ("dc0", grad_c_n):
        assert torch.equal(actual[name][absent], expected[absent])


@directions
def test_lengths_equal_packing(device, reverse):
    sizes = torch.tensor([4, 3, 1])
    inputs, grads, modifiers = make_inputs(3, 4, 5, torch.bfloat16, device, sizes)
    modifiers["cell_clip"] = 0.5
    packed = ours(inputs, grads, modifiers, sizes, reverse)
    valid = (torch.arange(4) < sizes[:, None]).to(device)

    def padded(x):
        return x.new_full((3, 4, *x.shape[1:]), NAN if x.is_floating_point() else True).index_put(
            torch.where(valid), x
        )

    modifiers = {n: padded(x) if n in PER_STEP else x for n, x in modifiers.items()}
    modifiers["lengths"] = torch.tensor([3, 2, 2, 1], device=device)
    inputs[0] = padded(inputs[0])
    grads[:2] = [padded(g) for g in grads[:2]]
    dense = ours(inputs, grads, modifiers, None, reverse)
    for name, x in packed.items():
        y = dense[name][valid.flatten()] if name in STORED else dense[name]
        assert torch.equal(x, y), name


@alone_or_not
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nothing_past_a_length_is_read(device, bad, others):
    inputs, grads, modifiers = make_inputs(4, 3, 5, torch.float32, device)
    modifiers = modifiers if others else {"lengths": modifiers["lengths"]}
    clean = ours(inputs, grads, modifiers, None, others)
    nothing = ~valid_rows(inputs, modifiers).view(4, 3).to(device)
    for x in (inputs[0], *grads[:2], *(modifiers[n] for n in PER_STEP if n in modifiers)):
        x[nothing] = bad if x.is_floating_point() else True
    for name, x in ours(inputs, grads, modifiers, None, others).items():
        assert torch.equal(x, clean[name]), name
        if name in STORED:
            assert not x[nothing.flatten()].any(), name


@directions
def test_nan_in_a_final_gradient_of_one_row_stays_there(device, reverse):
    """Past its length a row carries it on; the steps before are those of its own."""
    inputs, grads, modifiers = make_inputs(3, 3, 5, torch.float32, device)
    modifiers = {"lengths": torch.tensor([3, 2, 0], device=device)}
    clean = ours(inputs, grads, modifiers, None, reverse)
    grads[2][2], grads[3][2] = NAN, NAN
    dirty = ours(inputs, grads, modifiers, None, reverse)
    assert dirty["dh0"][2].isnan().all()
    assert dirty["dc0"][2].isnan().all()
    for name in BACKWARD:
        rows = slice(2) if name in ("dh0", "dc0") else slice(None)
        assert torch.equal(dirty[name][rows], clean[name][rows]), name


@directions
@alone_or_not
def test_a_state_does_not_cross_a_reset(device, reverse, others):
    inputs, grads, modifiers = make_inputs(4, 3, 5, torch.float32, device)
    del modifiers["lengths"]
    modifiers = modifiers if others else {}
    modifiers["resets"] = torch.zeros(4, 3, dtype=torch.bool, device=device)
    reset, first = (1, 3) if reverse else (2, 0)
    modifiers["resets"][reset] = True
    after = slice(None, reset + 1) if reverse else slice(reset, None)
    clean = ours(inputs, grads, modifiers, None, reverse)
    gates, _, h0, c0, *_ = inputs
    # One row each: NaN in the initial state, in the gates before the reset, and none at all.
    h0[0], c0[0] = NAN, NAN
    gates[first, 1] = NAN
    dirty = ours(inputs, grads, modifiers, None, reverse)
    for name in STORED:
        a, b = (x[name].view(4, 3, -1) for x in (clean, dirty))
        assert torch.equal(a[after], b[after]), name
        assert torch.equal(a[:, 2], b[:, 2]), name
    assert torch.equal(clean["h_n"], dirty["h_n"])
    assert torch.equal(clean["c_n"], dirty["c_n"])
    assert dirty["h"].view(4, 3, 5)[first, :2].isnan().all()


@directions
def test_nothing_of_a_gradient_goes_back_past_a_reset(device, reverse):
    inputs, grads, modifiers = make_inputs(3, 3, 5, torch.float32, device)
    del modifiers["lengths"]
    modifiers["resets"][:] = True
    grads = [None, None, torch.full_like(grads[2], NAN), None]
    actual = ours(inputs, grads, modifiers, None, reverse)
    last = 0 if reverse else 2
    for name in ("dgates", "dproduct", "dz"):
        x = actual[name].view(3, 3, -1)
        assert x[last].isnan().any()
        assert not x[1 if reverse else slice(2)].any()
    assert not actual["dh0"].any()
    assert not actual["dc0"].any()


@directions
def test_modifiers_that_change_nothing(device, reverse):
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
    without = ours(inputs, grads, {}, None, reverse)
    for name, x in ours(inputs, grads, modifiers, None, reverse).items():
        assert torch.equal(x, without[name]), name


@layouts
def test_strides(device, packed):
    sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    H = 6
    inputs, grads, modifiers = make_inputs(4, 3, H, torch.float32, device, sizes)
    leading = inputs[0].shape[:-1]

    def wide(x):
        """The same numbers, in columns of a wider tensor."""
        return torch.cat([x, x.flip(0)], dim=-1)[..., : x.shape[-1]]

    def every_other(x):
        return torch.stack([x, x], dim=-1)[..., 0]

    gates, weight_hh, h0, c0, *norm = inputs
    if packed:
        gates, grad_c = wide(gates), wide(grads[1])
    else:
        gates, grad_c = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (gates, grads[1]))
        modifiers["lengths"] = every_other(modifiers["lengths"])
    state = h0[:1].expand(3, -1)
    inputs = [gates, weight_hh.T.contiguous().T, state, wide(c0), *map(every_other, norm)]
    grad_h = grads[0].flatten()[:H].expand(*leading, H)
    grads = [grad_h, grad_c, grads[2][:, :1].expand(-1, H), every_other(grads[3])]
    modifiers["resets"] = every_other(modifiers["resets"])
    modifiers["zoneout_h"] = modifiers["zoneout_h"].flatten()[:H].expand(*leading, H)
    modifiers["zoneout_c"] = wide(modifiers["zoneout_c"])
    modifiers["recurrent_mask"] = modifiers["recurrent_mask"][:1].expand(3, H)
    assert not any(x.is_contiguous() for x in [*inputs, *grads, *modifiers.values()])
    check(inputs, grads, modifiers, sizes)


@pytest.mark.parametrize(
    "given",
    [(True, False, False, True), (False, True, True, False), (False, False, True, False)],
    ids=str,
)
def test_some_gradients(device, given):
    inputs, grads, modifiers = make_inputs(3, 3, 4, torch.float32, device)
    grads = [g if on else None for g, on in zip(grads, given, strict=True)]
    check(inputs, grads, modifiers, None, given[0])


def test_without_a_gradient_there_is_none(device):
    inputs, _, modifiers = make_inputs(2, 3, 4, torch.float32, device)
    actual = ours(inputs, [None] * 4, modifiers)
    assert not any(actual[name].any() for name in BACKWARD)


def test_clip(device):
    """Cells stay within the clip, those held there pass no gradient on, and NaN stays NaN."""
    inputs, grads, _ = make_inputs(2, 3, 5, torch.float32, device)
    inputs[0].fill_(30.0)
    inputs[0][1, 2] = NAN
    actual = ours(inputs, grads, {"cell_clip": 0.1})
    c, dgates = (actual[name].view(2, 3, -1) for name in ("c", "dgates"))
    assert (c[:, :2] == torch.tensor(0.1)).all()
    assert c[1, 2].isnan().all()
    assert not dgates[:, :2, :15].any()
    assert not actual["dc0"][:2].any()


@layouts
@pytest.mark.parametrize("H", [5, 24])
def test_an_infinite_initial_state_stays_in_its_row(device, packed, H):
    """Beyond the hidden units a tile holds zeros, and infinity times zero is NaN."""
    sizes = torch.tensor([3, 2, 1]) if packed else None
    inputs, _, modifiers = make_inputs(3, 3, H, torch.float32, device, sizes)
    del modifiers["resets"]
    modifiers.pop("lengths", None)
    clean = ours(inputs, None, modifiers, sizes, packed)["h"]
    inputs[2][0, 0] = INF
    inputs[3][2, H - 1] = NAN
    h = ours(inputs, None, modifiers, sizes, packed)["h"]
    rows = sizes_of(inputs, sizes)
    of_1 = torch.cat([torch.arange(n) == 1 for n in rows]).to(device)
    of_0 = torch.cat([torch.arange(n) == 0 for n in rows]).to(device)
    assert torch.equal(h[of_1], clean[of_1])
    assert not h[of_0].isfinite().all()


def test_what_is_not_saved_is_empty(device):
    (gates, weight_hh, h0, c0, *norm), _, modifiers = make_inputs(3, 3, 5, torch.float16, device)
    arguments = None, None, tuple(modifiers.get(name) for name in MODIFIERS), False, *norm, EPS
    full = layer_norm_forward(gates, weight_hh, h0, c0, *arguments, True)
    bare = layer_norm_forward(gates, weight_hh, h0, c0, *arguments, False)
    for name, x, y in zip(FORWARD, full, bare, strict=True):
        if name in ("activations", "normalized", "rstd"):
            assert y.shape == (0,), name
            assert y.dtype == x.dtype, name
        else:
            assert torch.equal(x, y), name


def test_inputs_are_left_alone_and_bits_are_the_same_every_time(device):
    inputs, grads, modifiers = make_inputs(2, 3, 20, torch.bfloat16, device)
    given = [*inputs, *grads, *modifiers.values()]
    before = [x.clone() for x in given]
    first, second = (ours(inputs, grads, {**modifiers, "cell_clip": 0.5}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("T", "B"), [(0, 2), (2, 0)], ids=str)
def test_nothing_to_do(device, T, B):
    inputs, grads, modifiers = make_inputs(T, B, 3, torch.float32, device)
    actual = ours(inputs, grads, modifiers)
    assert actual["h"].shape == actual["dz"].shape == (0, 3)
    assert actual["dgates"].shape == actual["dproduct"].shape == (0, 12)
    _, _, h0, c0, *_ = inputs
    for name, expected in ("h_n", h0), ("c_n", c0), ("dh0", grads[2]), ("dc0", grads[3]):
        assert torch.equal(actual[name], expected)
        assert actual[name] is not expected


def test_refusals(device):
    (gates, weight_hh, h0, c0, *norm), _, _ = make_inputs(2, 2, 3, torch.float32, device)
    none = (None,) * 6

    def forward(dtype=torch.float32, weight_hr=None, batch_sizes=None, modifiers=none, **options):
        tensors = [x.to(dtype) for x in (gates, weight_hh, h0, c0)]
        layer_norm_forward(
            *tensors, weight_hr, batch_sizes, modifiers, False, *norm, EPS, True, **options
        )

    with pytest.raises(ValueError, match="dtype"):
        forward(torch.float64)
    with pytest.raises(ValueError, match="input_precision"):
        forward(input_precision="tf64")
    with pytest.raises(ValueError, match="projection, expected None"):
        forward(weight_hr=weight_hh)
    with pytest.raises(ValueError, match=r"lengths .* batch_sizes"):
        forward(batch_sizes=torch.tensor([2, 2]), modifiers=(torch.tensor([2, 1]), *none[1:]))


# In a process of its own: the interpreter, which the other tests run in, does not compile.
COMPILE = """
import json, sys
import torch, triton
from fused_lstm.kernels.triton import compile_ahead, layer_norm
from fused_lstm.kernels.triton.compile_ahead import source_of, target_of

compile_ahead.FLOAT32_POINTERS |= {"product_ptr", "rstd_ptr", "dz_ptr", "dh_ptr"}
compile_ahead.OTHER_TYPES |= {"eps": "fp32"}
arch, dtype, precision = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
hidden, batch = map(int, sys.argv[4:])
launches = [
    (
        getattr(layer_norm, f"layer_norm_{direction}_{kind}_kernel"),
        layer_norm.row_config(hidden, arch) if kind == "row" else
        layer_norm.product_config(direction, batch, hidden, dtype, arch, precision),
    )
    for direction in ("forward", "backward") for kind in ("product", "row")
]
for kernel, config in launches:
    for every_flag in (False, True):
        flags = {name: every_flag for name in kernel.arg_names if name.startswith(("HAS", "SAVE"))}
        constants = {**flags, **config._asdict(), "INPUT_PRECISION": precision}
        compiled = triton.compile(
            source_of(kernel, constants, dtype, hidden % 16 == 0),
            target=target_of(arch),
            options={name: x for name, x in config._asdict().items() if name.startswith("num_")},
        )
        registers, spill_bytes, matrix = compile_ahead._nvidia_usage(compiled.asm)
        print(json.dumps({
            "kernel": kernel.__name__, "every_flag": every_flag, "config": config._asdict(),
            "registers": registers, "spill_bytes": spill_bytes, "matrix": matrix,
            "shared_bytes": compiled.metadata.shared,
        }))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("dtype", "precision", "hidden", "batch"),
    [
        ("bfloat16", "ieee", 1024, 16),
        ("float16", "ieee", 1023, 64),
        ("float32", "tf32", 1024, 64),
        ("float32", "tf32", 50, 16),
        ("float32", "ieee", 2047, 64),
    ],
)
def test_every_kernel_compiles_without_spills(tmp_path, dtype, precision, hidden, batch):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, "sm_90", dtype, precision, str(hidden), str(batch)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) == 8
    for report in reports:
        assert report["spill_bytes"] == 0, report
        assert report["shared_bytes"] <= 227 * 1024, report
        if "product" in report["kernel"] and precision + dtype != "ieeefloat32":
            assert report["matrix"] > 0, report
