"""The core: its values, its hand-written derivatives, its operators and their transforms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fused_lstm
from fused_lstm import lstm_recurrence, reference
from fused_lstm.modifiers import NO_MODIFIERS

T, B, H, P = 5, 4, 3, 2
BATCH_SIZES = torch.tensor([4, 4, 3, 1, 1])


def make_arguments(
    dtype: torch.dtype = torch.float64, projected: bool = False, packed: bool = False
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    features = P if projected else H
    leading = (int(BATCH_SIZES.sum()),) if packed else (T, B)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "gates": randn(*leading, 4 * H),
        "weight_hh": randn(4 * H, features),
        "h0": randn(B, features),
        "c0": randn(B, H),
        "weight_hr": randn(P, H) if projected else None,
    }


@pytest.fixture(params=[None, "native", "reference"], ids=["default", "native", "plain"])
def backend(request):
    """Runs a test on the default choice and on every backend that a CPU always has.

    The choice is made around the test, so that its oracles and options stay as they are.
    """
    if request.param == "native":
        kernels = pytest.importorskip("fused_lstm.kernels.cpu")
        try:
            kernels.load()
        except kernels.LibraryUnavailableError as error:
            pytest.skip(str(error))
    with fused_lstm.use_backend(request.param):
        yield request.param


def as_function(arguments, packed, reverse, function=lstm_recurrence, **options):
    """The recurrence as a function of its tensors alone, and those tensors."""
    names = [name for name, value in arguments.items() if value is not None]

    def run(*tensors: Tensor):
        return tuple(
            function(
                **dict(zip(names, tensors, strict=True)),
                batch_sizes=BATCH_SIZES if packed else None,
                reverse=reverse,
                **options,
            )
        )

    return run, [arguments[name] for name in names]


VARIANTS = list(itertools.product([False, True], repeat=3))
variants = pytest.mark.parametrize(
    ("projected", "packed", "reverse"),
    VARIANTS,
    ids=[
        "-".join(n for n, on in zip(("proj", "packed", "reverse"), v, strict=True) if on) or "plain"
        for v in VARIANTS
    ],
)


@pytest.mark.usefixtures("backend")
@variants
def test_values_equal_torch(projected: bool, packed: bool, reverse: bool) -> None:
    arguments = make_arguments(projected=projected, packed=packed)
    run, tensors = as_function(arguments, packed, reverse)
    _, c, h_n, c_n = run(*tensors)
    h = run(*tensors)[0]
    # One direction of a bidirectional torch layer, with the identity as input projection.
    layer = torch.nn.LSTM(
        4 * H, H, bias=False, bidirectional=True, proj_size=P if projected else 0
    ).double()
    suffix = "_reverse" if reverse else ""
    with torch.no_grad():
        getattr(layer, f"weight_ih_l0{suffix}").copy_(torch.eye(4 * H))
        getattr(layer, f"weight_hh_l0{suffix}").copy_(arguments["weight_hh"])
        if projected:
            getattr(layer, f"weight_hr_l0{suffix}").copy_(arguments["weight_hr"])
    states = tuple(torch.stack([arguments[k]] * 2) for k in ("h0", "c0"))
    x = arguments["gates"]
    if packed:
        x = torch.nn.utils.rnn.PackedSequence(x, BATCH_SIZES)
    output, (expected_h_n, expected_c_n) = layer(x, states)
    output = output.data if packed else output
    torch.testing.assert_close(h, output.chunk(2, -1)[int(reverse)])
    torch.testing.assert_close(h_n, expected_h_n[int(reverse)])
    torch.testing.assert_close(c_n, expected_c_n[int(reverse)])
    assert c.shape == (*x.data.shape[:-1], H) if packed else c.shape == (T, B, H)


@pytest.mark.usefixtures("backend")
@variants
def test_gradients_equal_autograd_of_the_reference(
    projected: bool, packed: bool, reverse: bool
) -> None:
    arguments = make_arguments(projected=projected, packed=packed)
    gradients = []
    for function in (lstm_recurrence, reference.lstm_recurrence):
        run, tensors = as_function(arguments, packed, reverse, function)
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs = run(*leaves)
        torch.manual_seed(1)
        loss = sum((out * torch.randn_like(out)).sum() for out in outputs)
        gradients.append(torch.autograd.grad(loss, leaves))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("backend")
@variants
def test_numerical_derivatives_of_first_and_second_order(
    projected: bool, packed: bool, reverse: bool
) -> None:
    run, tensors = as_function(make_arguments(projected=projected, packed=packed), packed, reverse)
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("used", range(4), ids=["h", "c", "h_n", "c_n"])
def test_gradient_of_one_output_alone(used: int) -> None:
    arguments = make_arguments()
    run, tensors = as_function(arguments, False, False)
    leaves = [t.clone().requires_grad_() for t in tensors]
    ours = torch.autograd.grad(run(*leaves)[used].square().sum(), leaves)
    run, _ = as_function(arguments, False, False, reference.lstm_recurrence)
    expected = torch.autograd.grad(run(*leaves)[used].square().sum(), leaves)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("backend")
def test_third_derivative() -> None:
    run, tensors = as_function(make_arguments(), False, False)
    ref, _ = as_function(make_arguments(), False, False, reference.lstm_recurrence)

    def third(function) -> Tensor:
        gates = tensors[0].clone().requires_grad_()
        value = function(gates, *tensors[1:])[0].square().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, gates, create_graph=True)
            value = grad.square().sum()
        return value

    torch.testing.assert_close(third(run), third(ref))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    arguments = make_arguments(dtype)
    out = lstm_recurrence(**arguments)
    assert out.h.dtype == out.h_n.dtype == out.c_n.dtype == dtype
    assert out.c.dtype == torch.float32
    exact = lstm_recurrence(**make_arguments())
    assert (out.h.double() - exact.h).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("backend")
@variants
def test_vmap_over_everything_and_over_weights(
    projected: bool, packed: bool, reverse: bool
) -> None:
    run, tensors = as_function(make_arguments(projected=projected, packed=packed), packed, reverse)
    stacked = [torch.stack([t, t.flip(0), -t]) for t in tensors]
    one_by_one = [run(*(t[v] for t in stacked)) for v in range(3)]
    for a, b in zip(torch.vmap(run)(*stacked), zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    # Only the activations are mapped, along a middle dimension for the gates.
    dims = (1, None, 0, None) + ((None,) if projected else ())
    mapped = [stacked[0].movedim(0, 1), tensors[1], stacked[2], *tensors[3:]]
    expected = [run(stacked[0][v], tensors[1], stacked[2][v], *tensors[3:]) for v in range(3)]
    for a, b in zip(torch.vmap(run, dims)(*mapped), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("packed", [False, True])
def test_per_sample_gradients(packed: bool) -> None:
    run, tensors = as_function(make_arguments(packed=packed), packed, False)
    gates = torch.stack([tensors[0], -tensors[0]])

    def loss(weight: Tensor, g: Tensor) -> Tensor:
        return run(g, weight, *tensors[2:])[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(tensors[1], gates)
    for k in range(2):
        weight = tensors[1].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(weight, gates[k]), weight)
        torch.testing.assert_close(per_sample[k], expected)


@pytest.mark.usefixtures("backend")
def test_hessian_jacobians_and_forward_mode() -> None:
    run, tensors = as_function(make_arguments(), False, False)
    ref, _ = as_function(make_arguments(), False, False, reference.lstm_recurrence)

    def of_h0(function):
        return lambda h0: function(tensors[0], tensors[1], h0, tensors[3])[0].square().sum()

    for transform in (torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(of_h0(run))(tensors[2]), transform(of_h0(ref))(tensors[2])
        )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[2], torch.ones_like(tensors[2]))
        tangent = forward_ad.unpack_dual(of_h0(run)(dual)).tangent
        expected = forward_ad.unpack_dual(of_h0(ref)(dual)).tangent
    torch.testing.assert_close(tangent, expected)


@variants
def test_operators_pass_opcheck(projected: bool, packed: bool, reverse: bool) -> None:
    arguments = make_arguments(torch.float32, projected, packed)
    sizes = BATCH_SIZES if packed else None
    tensors = [t if t is None else t.requires_grad_() for t in arguments.values()]
    for save in (False, True):
        torch.library.opcheck(
            torch.ops.fused_lstm.lstm_forward.default,
            ([t if t is None or save else t.detach() for t in tensors])
            + [sizes, *NO_MODIFIERS, reverse, save, True, None],
        )
    with torch.no_grad():
        h, c, activations, h_n, c_n = torch.ops.fused_lstm.lstm_forward(
            *tensors, sizes, *NO_MODIFIERS, reverse, True, True, None
        )
    weight_hh, c0, weight_hr = (
        t if t is None else t.detach() for t in (*tensors[1:2], *tensors[3:])
    )
    saved = (activations, c, weight_hh, c0, weight_hr, sizes)
    torch.library.opcheck(
        torch.ops.fused_lstm.lstm_backward.default,
        (h, c, h_n, c_n, *saved, *NO_MODIFIERS, reverse, None),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph_with_gradients(packed: bool) -> None:
    arguments = make_arguments(torch.float32, packed=packed)
    run, tensors = as_function(arguments, packed, False)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        results.append((*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.usefixtures("backend")
def test_saved_tensor_changed_in_place_is_noticed() -> None:
    run, tensors = as_function(make_arguments(), False, False)
    weight = tensors[1].clone().requires_grad_()
    scratch = weight * 1
    h = run(tensors[0], scratch, *tensors[2:])[0]
    scratch.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.usefixtures("backend")
def test_second_backward_needs_retain_graph() -> None:
    run, tensors = as_function(make_arguments(), False, False)
    gates = tensors[0].clone().requires_grad_()
    loss = run(gates, *tensors[1:])[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.usefixtures("backend")
def test_batch_of_none() -> None:
    leaves = [
        torch.randn(s, requires_grad=True) for s in ((T, 0, 4 * H), (4 * H, H), (0, H), (0, H))
    ]
    out = lstm_recurrence(*leaves)
    assert out.h.shape == (T, 0, H)
    out.h.sum().backward()
    assert torch.equal(leaves[1].grad, torch.zeros(4 * H, H))


def test_nothing_is_rounded_by_autocast() -> None:
    arguments = make_arguments(torch.float32)
    leaves = {k: v if v is None else v.clone().requires_grad_() for k, v in arguments.items()}
    plain = lstm_recurrence(**leaves)
    expected = torch.autograd.grad(plain.h.sum(), leaves["weight_hh"])
    with torch.autocast("cpu", torch.bfloat16):
        out = lstm_recurrence(**leaves)
        grads = torch.autograd.grad(out.h.sum(), leaves["weight_hh"])
    assert torch.equal(out.h, plain.h)
    assert torch.equal(grads[0], expected[0])


BAD = {
    "gates": (torch.zeros(T, B, 4 * H - 1), ValueError, r"gates: expected \[T, B, 4H\]"),
    "no steps": (torch.zeros(0, B, 4 * H), ValueError, "gates: expected at least one time step"),
    "integers": (torch.zeros(T, B, 4 * H, dtype=torch.int64), TypeError, "gates: expected a float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_gates(case: str) -> None:
    gates, error, message = BAD[case]
    with pytest.raises(error, match=message):
        lstm_recurrence(**{**make_arguments(torch.float32), "gates": gates})


@pytest.mark.parametrize("name", ["weight_hh", "h0", "c0"])
def test_bad_shapes_and_dtypes_name_the_argument(name: str) -> None:
    arguments = make_arguments(torch.float32)
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        lstm_recurrence(**{**arguments, name: torch.zeros(7, 7)})
    with pytest.raises(TypeError, match=f"{name}: expected torch.float32"):
        lstm_recurrence(**{**arguments, name: arguments[name].double()})
    with pytest.raises(ValueError, match=f"{name}: expected device"):
        lstm_recurrence(**{**arguments, name: arguments[name].to("meta")})


@pytest.mark.parametrize("sizes", [[4, 4, 3, 1, 2], [4, 4, 3, 2, 0], [4, 4, 4, 4, 4], []], ids=str)
def test_bad_batch_sizes(sizes: list[int]) -> None:
    arguments = make_arguments(packed=True)
    with pytest.raises(ValueError, match="batch_sizes: expected"):
        lstm_recurrence(**arguments, batch_sizes=torch.tensor(sizes, dtype=torch.int64))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend='cudnn': expected None or one of"):
        lstm_recurrence(**make_arguments(), backend="cudnn")
    with pytest.raises(fused_lstm.BackendUnavailableError, match="whole layers"):
        lstm_recurrence(**make_arguments(), backend="aten")
