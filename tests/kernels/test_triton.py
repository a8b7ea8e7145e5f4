"""The Triton kernels against the recurrence in float64, every flag, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from fused_lstm.kernels.triton import elementwise, lstm_backward, lstm_forward

from ..budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCOPES = ["sequence", "step"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
scopes = pytest.mark.parametrize("scope", SCOPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


def reference(gates, weight_hh, h0, c0, batch_sizes=None, reverse=False):
    """The recurrence in plain PyTorch: rows h, c and the final state h_n, c_n.

    gates: [T, B, 4H], or [N, 4H] with batch_sizes.
    """
    steps = list(gates if batch_sizes is None else gates.split(batch_sizes.tolist()))
    h, c = h0, c0
    outputs: list = [None] * len(steps)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        n = len(steps[t])
        i, f, g, o = (steps[t] + h[:n] @ weight_hh.T).chunk(4, dim=-1)
        c_t = f.sigmoid() * c[:n] + i.sigmoid() * g.tanh()
        h_t = o.sigmoid() * c_t.tanh()
        outputs[t] = h_t, c_t
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    join = torch.stack if batch_sizes is None else torch.cat
    return join([h_t for h_t, _ in outputs]), join([c_t for _, c_t in outputs]), h, c


def make_inputs(T, B, H, dtype, device, batch_sizes=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).to(device)

    leading = (T, B) if batch_sizes is None else (int(batch_sizes.sum()),)
    inputs = [normal(*leading, 4 * H), normal(4 * H, H, scale=H**-0.5), normal(B, H), normal(B, H)]
    grads = [normal(*leading, H), normal(*leading, H).float(), normal(B, H), normal(B, H)]
    return inputs, grads


def plain(inputs, grads, batch_sizes, reverse, dtype):
    """Outputs and input gradients (gates, h0, c0) of the recurrence in plain PyTorch."""
    inputs = [x.detach().cpu().to(dtype).requires_grad_() for x in inputs]
    outputs = reference(*inputs, batch_sizes, reverse)
    gradients = [None] * 3
    pairs = [(y, g.cpu().to(dtype)) for y, g in zip(outputs, grads, strict=True) if g is not None]
    if pairs:
        loss = sum((y * g).sum() for y, g in pairs)
        gates, _, h0, c0 = inputs
        gradients = torch.autograd.grad(loss, [gates, h0, c0], allow_unused=True)
    zeros = [torch.zeros_like(x) for x in (inputs[0], inputs[2], inputs[3])]
    gradients = [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
    return [*outputs, *gradients]


def in_some_order(inputs, grads, batch_sizes, reverse, orders=4):
    """What `plain` returns in the inputs' dtype, element by element the worst of several orders.

    The hidden units change places: each order is as good an evaluation as another, and in tensors
    this small the error of a single one is a matter of luck (and of the processor).
    """
    gates, weight_hh, h0, c0 = inputs
    H = h0.shape[-1]
    exact = plain(inputs, grads, batch_sizes, reverse, torch.float64)
    generator = torch.Generator().manual_seed(0)
    results = []
    for order in (torch.randperm(H, generator=generator) for _ in range(orders)):

        def ordered(x, order=order):
            """The hidden units of x, or of each of its gates, in that order."""
            if x is None:
                return None
            return x.unflatten(-1, (-1, H))[..., order.to(x.device)].flatten(-2)

        own = [ordered(gates), ordered(ordered(weight_hh).T).T, ordered(h0), ordered(c0)]
        out = plain(own, [ordered(g) for g in grads], batch_sizes, reverse, h0.dtype)
        results.append([ordered(x, order.argsort()) for x in out])
    worst = []
    for truth, *candidates in zip(exact, *results, strict=True):
        every = torch.stack(candidates)
        farthest = (every.double() - truth).abs().argmax(0, keepdim=True)
        worst.append(every.gather(0, farthest)[0])
    return worst


def ours(inputs, grads, batch_sizes=None, reverse=False, **options):
    gates, weight_hh, h0, c0 = inputs
    h, c, activations, h_n, c_n = lstm_forward(
        gates, weight_hh, h0, c0, batch_sizes=batch_sizes, reverse=reverse, **options
    )
    gradients = lstm_backward(
        *grads, activations, c, weight_hh, c0, batch_sizes=batch_sizes, reverse=reverse, **options
    )
    return [h, c, h_n, c_n, *gradients]


NAMES = ["h", "c", "h_n", "c_n", "dgates", "dh0", "dc0"]


@pytest.fixture
def check():
    def run(inputs, grads, batch_sizes=None, reverse=False, **options):
        dtype = inputs[0].dtype
        actual = ours(inputs, grads, batch_sizes, reverse, **options)
        native = in_some_order(inputs, grads, batch_sizes, reverse)
        exact = plain(inputs, grads, batch_sizes, reverse, torch.float64)
        for name, a, n, e in zip(NAMES, actual, native, exact, strict=True):
            assert a.dtype == (torch.float32 if name == "c" else dtype), name
            assert a.is_contiguous(), name
            assert_within_budget(a, n, e, name)
        return actual

    return run


@scopes
@dtypes
@pytest.mark.parametrize(
    ("T", "B", "H"), [(1, 1, 1), (4, 3, 5), (3, 17, 16), (2, 3, 20), (3, 2, 33)], ids=str
)
def test_shapes(check, device, scope, dtype, T, B, H):
    if (scope, dtype, H) == ("sequence", torch.float32, 33):
        H = 32  # the most that the kernel takes with IEEE products on every architecture
    inputs, grads = make_inputs(T, B, H, dtype, device)
    check(inputs, grads, scope=scope)


@scopes
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("sizes", [None, [3], [5, 5, 3, 3, 1], [18, 2, 1]], ids=str)
def test_packed_and_reverse(check, device, scope, reverse, sizes):
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    B = 3 if sizes is None else sizes[0]
    inputs, grads = make_inputs(4, B, 6, torch.float32, device, batch_sizes)
    check(inputs, grads, batch_sizes, reverse, scope=scope)


@scopes
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_equals_dense_where_all_rows_are_active(device, scope, reverse):
    inputs, grads = make_inputs(3, 4, 5, torch.float32, device)
    dense = ours(inputs, grads, reverse=reverse, scope=scope)
    flat = [inputs[0].flatten(0, 1), *inputs[1:]]
    flat_grads = [grads[0].flatten(0, 1), grads[1].flatten(0, 1), *grads[2:]]
    packed = ours(flat, flat_grads, torch.tensor([4, 4, 4]), reverse, scope=scope)
    for name, a, b in zip(NAMES, dense, packed, strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=0, atol=0, msg=name)


@scopes
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_of_gradients(check, device, scope, given):
    inputs, grads = make_inputs(2, 3, 4, torch.float32, device)
    grads = [g if on else None for g, on in zip(grads, given, strict=True)]
    check(inputs, grads, reverse=given[0], scope=scope)


@scopes
@pytest.mark.parametrize("given", [(True, False, False, True), (False, True, True, False)], ids=str)
def test_packed_gradients(check, device, scope, given):
    batch_sizes = torch.tensor([4, 2, 2, 1])
    inputs, grads = make_inputs(4, 4, 4, torch.float32, device, batch_sizes)
    grads = [g if on else None for g, on in zip(grads, given, strict=True)]
    for reverse in (False, True):
        check(inputs, grads, batch_sizes, reverse, scope=scope)


@scopes
def test_tf32(check, device, scope):
    inputs, grads = make_inputs(3, 3, 20, torch.float32, device)
    if device.type == "cpu":
        # The interpreter multiplies in float32 whatever the precision asked for.
        check(inputs, grads, scope=scope, input_precision="tf32")
        return
    actual = ours(inputs, grads, scope=scope, input_precision="tf32")
    exact = plain(inputs, grads, None, False, torch.float64)
    # TF32 keeps ten bits of an operand, as float16 does.
    native = plain(inputs, grads, None, False, torch.float16)
    for name, a, n, e in zip(NAMES, actual, native, exact, strict=True):
        assert_within_budget(a, n, e, name)


@scopes
def test_strided_inputs(check, device, scope):
    (gates, weight_hh, h0, c0), (grad_h, grad_c, grad_h_n, _) = make_inputs(
        3, 4, 6, torch.float32, device
    )
    batch_first = gates.transpose(0, 1).contiguous().transpose(0, 1)
    transposed = weight_hh.T.contiguous().T
    one_state = h0[:1].expand(4, -1)
    wide = torch.cat([c0, c0], dim=1)[:, :6]
    every_other = torch.stack([c0, c0], dim=-1)[..., 0]
    inputs = [batch_first, transposed, one_state, wide]
    grads = [
        grad_h[:1, :1].expand(3, 4, -1),
        grad_c.transpose(0, 1).contiguous().transpose(0, 1),
        grad_h_n[:, :1].expand(-1, 6),
        every_other,
    ]
    assert not any(x.is_contiguous() for x in inputs + grads)
    check(inputs, grads, scope=scope)


@scopes
def test_strided_packed_rows(check, device, scope):
    batch_sizes = torch.tensor([3, 2])
    inputs, grads = make_inputs(2, 3, 4, torch.float32, device, batch_sizes)
    inputs[0] = torch.cat([inputs[0], inputs[0]], dim=1)[:, : 4 * 4]
    grads[0] = grads[0][:1].expand(5, -1)
    for reverse in (False, True):
        check(inputs, grads, batch_sizes, reverse, scope=scope)


@scopes
@pytest.mark.parametrize("save_activations", [False, True])
@pytest.mark.parametrize("save_cells", [False, True])
def test_what_is_not_saved_is_empty(device, scope, save_activations, save_cells):
    inputs, _ = make_inputs(3, 2, 5, torch.float16, device)
    full = lstm_forward(*inputs, scope=scope)
    h, c, activations, h_n, c_n = lstm_forward(
        *inputs, scope=scope, save_activations=save_activations, save_cells=save_cells
    )
    assert c.dtype == torch.float32
    assert activations.dtype == torch.float16
    assert torch.equal(c, full[1]) if save_cells else c.shape == (0,)
    assert torch.equal(activations, full[2]) if save_activations else activations.shape == (0,)
    assert torch.equal(h, full[0])
    assert torch.equal(h_n, full[3])
    assert torch.equal(c_n, full[4])


@scopes
def test_activations(device, scope):
    inputs, _ = make_inputs(1, 3, 5, torch.float32, device)
    *_, activations, _, _ = lstm_forward(*inputs, scope=scope)

    def plainly(dtype):
        gates, weight_hh, h0, _ = (x.cpu().to(dtype) for x in inputs)
        i, f, g, o = (gates + h0 @ weight_hh.T).chunk(4, dim=-1)
        return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=-1)

    assert_within_budget(activations, plainly(torch.float32), plainly(torch.float64))


@scopes
@pytest.mark.parametrize(("T", "B"), [(0, 2), (2, 0)], ids=str)
def test_nothing_to_do(device, scope, T, B):
    (gates, weight_hh, h0, c0), grads = make_inputs(T, B, 3, torch.float32, device)
    h, c, activations, h_n, c_n = lstm_forward(gates, weight_hh, h0, c0, scope=scope)
    assert h.shape == c.shape == (T, B, 3)
    assert activations.shape == (T, B, 12)
    assert torch.equal(h_n, h0)
    assert torch.equal(c_n, c0)
    assert h_n is not h0
    dgates, dh0, dc0 = lstm_backward(*grads, activations, c, weight_hh, c0, scope=scope)
    assert dgates.shape == gates.shape
    assert torch.equal(dh0, grads[2])
    assert torch.equal(dc0, grads[3])
    _, dh0, dc0 = lstm_backward(*[None] * 4, activations, c, weight_hh, c0, scope=scope)
    assert not dh0.any()
    assert not dc0.any()


@scopes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_spread_as_in_torch(device, scope, bad):
    (gates, weight_hh, h0, c0), grads = make_inputs(3, 4, 5, torch.float32, device)
    gates[1, 2, 7] = bad
    c0[0, 1] = bad
    inputs = [gates, weight_hh, h0, c0]
    actual = ours(inputs, grads, scope=scope)
    native = plain(inputs, grads, None, False, torch.float32)
    for name, a, n in zip(NAMES[:4], actual, native, strict=False):
        torch.testing.assert_close(a.cpu(), n, equal_nan=True, msg=name)
    # Rows that the value does not reach are as if it were not there.
    clean = [x.nan_to_num(0, 0, 0) for x in inputs]
    for name, a, n in zip(NAMES, actual, ours(clean, grads, scope=scope), strict=True):
        rows = [1, 3]
        assert torch.equal(a[..., rows, :], n[..., rows, :]), name


@scopes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_every_time(device, scope, dtype):
    inputs, grads = make_inputs(3, 5, 20, dtype, device)
    first, second = (ours(inputs, grads, scope=scope) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_scopes_agree_where_the_step_kernel_has_many_tiles(check, device):
    inputs, grads = make_inputs(2, 66, 80, torch.bfloat16, device)
    for a, b in zip(
        check(inputs, grads, scope="step"), check(inputs, grads, scope="sequence"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_inputs_are_left_alone(device):
    for scope in SCOPES:
        inputs, grads = make_inputs(2, 3, 4, torch.float32, device)
        before = [x.clone() for x in inputs + grads]
        ours(inputs, grads, scope=scope)
        for a, b in zip(inputs + grads, before, strict=True):
            assert torch.equal(a, b)


def test_refusals(device):
    inputs, _ = make_inputs(1, 1, 129, torch.float16, device)
    with pytest.raises(ValueError, match=r"4 \* 129 \* 129 \* 2 bytes = 133128"):
        lstm_forward(*inputs, scope="sequence")
    with pytest.raises(ValueError, match="dtype"):
        lstm_forward(*[x.double() for x in inputs])
    with pytest.raises(ValueError, match="input_precision"):
        lstm_forward(*inputs, input_precision="tf64")


@triton.jit
def activations_kernel(x_ptr, sigmoid_ptr, tanh_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(sigmoid_ptr + offsets, elementwise.sigmoid(x), mask=offsets < n)
    tl.store(tanh_ptr + offsets, elementwise.tanh(x), mask=offsets < n)


def test_activation_functions(device):
    magnitudes = torch.cat([torch.logspace(-37, 2, 4000), torch.linspace(0, 12, 8000)])
    x = torch.cat([magnitudes, -magnitudes]).float().to(device)
    sigmoid, tanh = torch.empty_like(x), torch.empty_like(x)
    activations_kernel[(triton.cdiv(len(x), 1024),)](x, sigmoid, tanh, len(x), BLOCK=1024)
    exact = x.double()
    eps = torch.finfo(torch.float32).eps
    tanh_error = (tanh.double() - exact.tanh()).abs() / exact.tanh().abs().clamp_min(1e-37)
    assert tanh_error.max() <= 3 * eps
    normal = exact > -85
    sigmoid_error = ((sigmoid.double() - exact.sigmoid()) / exact.sigmoid()).abs()
    # The interpreter has no fused multiply-add: the exponent's rounding cannot be given back.
    allowed = 3 * eps + (exact.abs() * eps / 2 if device.type == "cpu" else 0)
    assert ((sigmoid_error <= allowed) | ~normal).all()
    assert (sigmoid[~normal] <= 1e-36).all()


def test_activation_functions_at_the_edges(device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, inf, -inf, nan, 3e38, -3e38, 100.0, -110.0], device=device)
    sigmoid, tanh = torch.empty_like(x), torch.empty_like(x)
    activations_kernel[(1,)](x, sigmoid, tanh, len(x), BLOCK=16)
    assert sigmoid.tolist()[:3] == [0.5, 1, 0]
    assert tanh.tolist()[:3] == [0, 1, -1]
    assert sigmoid.isnan().tolist() == tanh.isnan().tolist() == x.isnan().tolist()
    assert sigmoid.tolist()[4:] == [1, 0, 1, 0]
    assert tanh.tolist()[4:] == [1, -1, 1, -1]


@dtypes
def test_rounding(dtype, device):
    """To nearest, ties to even, also where the interpreter's own conversion would cut off."""

    @triton.jit
    def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        y = elementwise.round_to(tl.load(x_ptr + offsets), y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y)

    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1 + 2**-8, 3e38])
    ties = 1 + torch.arange(64) * 2**-9
    x = torch.cat([special, ties, torch.randn(512 - 64 - len(special))]).to(device)
    y = torch.empty(512, dtype=dtype, device=device)
    kernel[(1,)](x, y, 512)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@scopes
@pytest.mark.parametrize("H", [5, 16, 24])
@pytest.mark.parametrize("packed", [False, True])
def test_an_infinite_initial_state_stays_where_it_is(device, scope, H, packed):
    """Beyond the hidden units a tile holds zeros, and infinity times zero is NaN."""
    sizes = torch.tensor([3, 2, 1]) if packed else None
    for reverse in (False, True):
        (gates, weight, h0, c0), _ = make_inputs(3, 3, H, torch.float32, device, sizes)
        h0[0, 0] = float("inf")
        h = lstm_forward(gates, weight, h0, c0, batch_sizes=sizes, reverse=reverse, scope=scope)[0]
        expected = reference(
            gates.cpu(), weight.cpu(), h0.cpu(), c0.cpu(), batch_sizes=sizes, reverse=reverse
        )[0]
        assert torch.equal(h.cpu().isfinite(), expected.isfinite())
