"""Inputs, states, results, errors, dtypes and dropout of a forward pass."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import fused_lstm

from .helpers import (
    FORMS,
    OPTIONS,
    B,
    H,
    I,
    P,
    T,
    assert_within_budget,
    build_pair,
    compare,
    data_of,
    make_hx,
    make_input,
    outcome,
    run,
    tolerances,
    values,
)

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_form = pytest.mark.parametrize("form", FORMS)


# Results and gradients are torch's


@each_form
@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_and_gradients_with_states(options, form, dtype, backend):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    x = make_input(form, dtype=dtype, batch_first=native.batch_first)
    compare(native, ours, x, make_hx(native, form, dtype=dtype), backend=backend)


@each_form
@each_option
def test_results_and_gradients_without_states(options, form, backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend, **options)
    x = make_input(form, dtype=torch.float64, batch_first=native.batch_first)
    compare(native, ours, x, backend=backend)
    expected = compare(native.eval(), ours.eval(), x, backend=backend)
    zeros = tuple(torch.zeros_like(state) for state in make_hx(native, form, dtype=torch.float64))
    with_zeros = run(ours, x, zeros)
    torch.testing.assert_close(with_zeros["output"], expected["output"])


@pytest.mark.parametrize("form", ["batched", "packed-unsorted"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_option
def test_half_precision_trains_within_torchs_error(options, dtype, form, backend):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    x = make_input(form, dtype=dtype, batch_first=native.batch_first)
    results = compare(native, ours, x, make_hx(native, form, dtype=dtype), backend=backend)
    assert {tensor.dtype for tensor in results.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_over_many_steps(dtype, backend):
    native, ours = build_pair(8, 16, dtype=dtype, backend=backend)
    x = make_input(dtype=dtype, steps=60, size=8)
    compare(native, ours, x, make_hx(native, dtype=dtype), backend=backend)


@pytest.mark.parametrize(
    ("steps", "batch"), [(1, 1), (1, 5), (7, 1), (40, 2)], ids=lambda n: f"{n}"
)
@pytest.mark.parametrize("options", [{}, OPTIONS["projected-everything"]], ids=["plain", "all"])
def test_lengths_and_batches(steps, batch, options, backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend, **options)
    x = make_input(dtype=torch.float64, steps=steps, batch=batch, batch_first=native.batch_first)
    compare(native, ours, x, make_hx(native, dtype=torch.float64, batch=batch), backend=backend)


@pytest.mark.parametrize(
    ("input_size", "hidden_size", "proj_size"),
    [(1, 1, 0), (1, 2, 1), (17, 3, 0), (2, 33, 0), (3, 31, 7)],
)
def test_odd_sizes(input_size, hidden_size, proj_size, backend):
    native, ours = build_pair(
        input_size, hidden_size, 2, proj_size=proj_size, bidirectional=True, backend=backend
    )
    compare(native, ours, make_input(size=input_size), make_hx(native), backend=backend)


def test_many_layers(backend):
    native, ours = build_pair(I, H, 5, dtype=torch.float64, backend=backend)
    compare(native, ours, make_input(dtype=torch.float64), backend=backend)


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_saturated_gates(scale, backend):
    native, ours = build_pair(dtype=torch.float64, backend=backend)
    results = compare(native, ours, make_input(dtype=torch.float64) * scale, backend=backend)
    assert all(tensor.isfinite().all() for tensor in results.values())


def test_not_a_number_travels_only_along_its_sequence(backend):
    native, ours = build_pair(backend=backend)
    x = make_input()
    x[2, 1] = float("nan")
    actual, expected = ours(x), native(x)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert actual[0][2:, 1].isnan().all()
    assert actual[0][:, [0, 2]].isfinite().all()


def test_use_backend_chooses_for_a_while(backend):
    native, ours = build_pair(dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    with fused_lstm.use_backend(backend or "aten"):
        compare(native, ours, x, backend="reference")
    compare(native, ours, x)


# Kinds of input


def test_unbatched_input_ignores_batch_first(backend):
    _, ours = build_pair(I, H, batch_first=True, backend=backend)
    x = make_input("unbatched")
    output, (h_n, c_n) = ours(x)
    assert output.shape == (T, H)
    assert h_n.shape == c_n.shape == (1, H)
    ours.batch_first = False
    torch.testing.assert_close(ours(x)[0], output)
    torch.testing.assert_close(ours(x.unsqueeze(1))[0].squeeze(1), output)


@pytest.mark.parametrize("form", ["packed-sorted", "packed-unsorted"])
def test_packed_input_ignores_batch_first_and_keeps_its_layout(form, backend):
    native, ours = build_pair(I, H, batch_first=True, backend=backend)
    packed = make_input(form)
    output, _ = ours(packed, make_hx(ours))
    assert type(output) is PackedSequence
    assert output.data.shape == (len(packed.data), H)
    for field in ["batch_sizes", "sorted_indices", "unsorted_indices"]:
        expected, actual = getattr(packed, field), getattr(output, field)
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert torch.equal(actual, expected)
    torch.testing.assert_close(output.data, native(packed, make_hx(native))[0].data)


@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("options", [{}, OPTIONS["two-layers-bidirectional"]], ids=["one", "four"])
def test_packed_states_are_in_the_users_order(enforce_sorted, options, backend):
    """Each sequence of a packed batch gives what it gives alone."""
    _, ours = build_pair(dtype=torch.float64, backend=backend, **options)
    lengths = [6, 4, 1] if enforce_sorted else [1, 6, 4]
    sequences = [values(n, I, seed=n, dtype=torch.float64) for n in lengths]
    h0, c0 = make_hx(ours, dtype=torch.float64)
    output, (h_n, c_n) = ours(pack_sequence(sequences, enforce_sorted=enforce_sorted), (h0, c0))
    padded, _ = pad_packed_sequence(output)
    for b, sequence in enumerate(sequences):
        alone, (h, c) = ours(sequence, (h0[:, b], c0[:, b]))
        torch.testing.assert_close(padded[: len(sequence), b], alone, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(h_n[:, b], h, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(c_n[:, b], c, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 1, 1, 1], [9, 1]], ids=str)
def test_packed_lengths(lengths, backend):
    native, ours = build_pair(I, H, 2, bidirectional=True, dtype=torch.float64, backend=backend)
    padded = values(max(lengths), len(lengths), I, dtype=torch.float64)
    packed = pack_padded_sequence(padded, torch.tensor(lengths))
    hx = make_hx(native, dtype=torch.float64, batch=len(lengths))
    compare(native, ours, packed, hx, backend=backend)


@each_form
@pytest.mark.parametrize("container", [tuple, list])
def test_states_as_tuple_or_list(form, container, backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    hx = make_hx(native, form, container=container)
    compare(native, ours, make_input(form), hx, backend=backend)


def test_states_can_be_named_arguments(backend):
    _, ours = build_pair(backend=backend)
    x, hx = make_input(), make_hx(ours)
    torch.testing.assert_close(ours(input=x, hx=hx), ours(x, hx))
    torch.testing.assert_close(ours(x, None), ours(x))


@pytest.mark.parametrize("form", ["batched", "packed-unsorted"])
def test_states_carry_a_sequence_on(form, backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x = make_input(form, dtype=torch.float64)
    _, expected = native(x, native(x)[1])
    _, actual = ours(x, ours(x)[1])
    torch.testing.assert_close(actual, expected, **tolerances(torch.float64, backend))


# What comes back


@each_form
@each_option
def test_types_shapes_and_memory_of_the_results(options, form, backend):
    native, ours = build_pair(backend=backend, **options)
    x = make_input(form, batch_first=native.batch_first)
    hx = make_hx(native, form)
    result, expected = ours(x, hx), native(x, hx)
    assert type(result) is tuple
    assert len(result) == 2
    assert type(result[1]) is tuple
    assert len(result[1]) == 2
    output, (h_n, c_n) = result
    assert type(output) is type(expected[0])
    output, wanted = data_of(output), data_of(expected[0])
    assert output.shape == wanted.shape
    assert output.stride() == wanted.stride()
    for state, wanted in zip((h_n, c_n), expected[1], strict=True):
        assert state.shape == wanted.shape
        assert state.is_contiguous()
    storages = {t.untyped_storage().data_ptr() for t in (output, h_n, c_n, *hx, data_of(x))}
    assert len(storages) == 6


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_batch_first_output_is_a_transposed_view(num_layers, grad, backend):
    _, ours = build_pair(I, H, num_layers, batch_first=True, backend=backend)
    with torch.set_grad_enabled(grad):
        output, _ = ours(make_input(batch_first=True))
    assert output.shape == (B, T, H)
    assert not output.is_contiguous()
    assert output.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("steps", [1, 4])
def test_writing_to_a_state_leaves_the_output_alone(steps, backend):
    _, ours = build_pair(backend=backend)
    with torch.no_grad():
        x, hx = make_input(steps=steps), make_hx(ours)
        output, states = ours(x, hx)
        saved = [tensor.clone() for tensor in (output, x, *hx)]
        for state in states:
            state.fill_(9.0)
    for tensor, before in zip((output, x, *hx), saved, strict=True):
        assert torch.equal(tensor, before)


@each_form
def test_arguments_are_left_as_they_were(form, backend):
    _, ours = build_pair(I, H, 2, dropout=0.5, backend=backend)
    x, hx = make_input(form), make_hx(ours, form)
    saved = [tensor.clone() for tensor in (data_of(x), *hx)]
    run(ours, x, hx)
    ours(x, hx)
    for tensor, before in zip((data_of(x), *hx), saved, strict=True):
        assert torch.equal(tensor, before)
        assert tensor._version == 0


def test_the_last_step_of_the_output_is_h_n(backend):
    _, ours = build_pair(bidirectional=True, backend=backend)
    output, (h_n, _) = ours(make_input())
    assert torch.equal(output[-1, :, :H], h_n[0])
    assert torch.equal(output[0, :, H:], h_n[1])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@each_form
def test_without_gradients(context, form, backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    x = make_input(form)
    with context():
        output, (h_n, c_n) = ours(x)
        expected = native(x)
    for tensor in (data_of(output), h_n, c_n):
        assert not tensor.requires_grad
        assert tensor.is_inference() == (context is torch.inference_mode)
    torch.testing.assert_close(data_of(output), data_of(expected[0]))
    torch.testing.assert_close((h_n, c_n), expected[1])


def test_results_repeat_bit_for_bit(backend):
    _, ours = build_pair(I, H, 2, bidirectional=True, backend=backend)
    x, hx = make_input(), make_hx(ours)
    first, second = run(ours, x, hx), run(ours, x, hx)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Errors


def state(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


GOOD = state(2, B, H)
# Calls of a layer with two layers, and the error that torch raises.
REFUSED = {
    "0-D": ((torch.tensor(1.0),), ValueError),
    "1-D": ((state(I),), ValueError),
    "4-D": ((state(1, T, B, I),), ValueError),
    "4-D-wrong-dtype": ((state(1, T, B, I, dtype=torch.float64),), ValueError),
    "float64-input": ((state(T, B, I, dtype=torch.float64),), ValueError),
    "half-input": ((state(T, B, I, dtype=torch.float16),), ValueError),
    "integer-input": ((state(T, B, I, dtype=torch.int64),), ValueError),
    "unbatched-float64-input": ((state(T, I, dtype=torch.float64),), ValueError),
    "wrong-dtype-and-features": ((state(T, B, I + 1, dtype=torch.float64),), ValueError),
    "features": ((state(T, B, I + 1),), RuntimeError),
    "no-features": ((state(T, B, 0),), RuntimeError),
    "unbatched-features": ((state(T, I - 1),), RuntimeError),
    "h0-layers": ((state(T, B, I), (state(1, B, H), GOOD)), RuntimeError),
    "h0-batch": ((state(T, B, I), (state(2, B + 1, H), GOOD)), RuntimeError),
    "h0-features": ((state(T, B, I), (state(2, B, H + 1), GOOD)), RuntimeError),
    "c0-layers": ((state(T, B, I), (GOOD, state(3, B, H))), RuntimeError),
    "c0-batch": ((state(T, B, I), (GOOD, state(2, 1, H))), RuntimeError),
    "c0-features": ((state(T, B, I), [GOOD, state(2, B, 1)]), RuntimeError),
    "both-states": ((state(T, B, I), (state(1, 1, 1), state(3, 3, 3))), RuntimeError),
    "features-and-states": ((state(T, B, 9), (state(1, 1, 1), GOOD)), RuntimeError),
    "2-D-h0": ((state(T, B, I), (state(2, H), GOOD)), RuntimeError),
    "2-D-c0": ((state(T, B, I), (GOOD, state(2, H))), RuntimeError),
    "2-D-states-and-features": ((state(T, B, 9), (state(2, H), state(2, H))), RuntimeError),
    "4-D-states": ((state(T, B, I), (state(1, 2, B, H),) * 2), RuntimeError),
    "unbatched-3-D-h0": ((state(T, I), (state(2, 1, H), state(2, H))), RuntimeError),
    "unbatched-3-D-states": ((state(T, I), (state(2, 1, H),) * 2), RuntimeError),
    "unbatched-h0-features": ((state(T, I), (state(2, H + 1), state(2, H))), RuntimeError),
    "three-states": ((state(T, B, I), (GOOD, GOOD, GOOD)), RuntimeError),
    "three-states-in-a-list": ((state(T, B, I), [GOOD, GOOD, GOOD]), RuntimeError),
    "no-steps": ((state(0, B, I),), RuntimeError),
    "no-steps-with-states": ((state(0, B, I), (GOOD, GOOD)), RuntimeError),
    "unbatched-no-steps": ((state(0, I),), RuntimeError),
    "input-elsewhere": ((state(T, B, I, device="meta"),), RuntimeError),
    "input-elsewhere-with-states": ((state(T, B, I, device="meta"), (GOOD, GOOD)), RuntimeError),
    "h0-elsewhere": ((state(T, B, I), (GOOD.to("meta"), GOOD)), RuntimeError),
    "c0-elsewhere": ((state(T, B, I), (GOOD, GOOD.to("meta"))), RuntimeError),
    "states-elsewhere": ((state(T, B, I), (GOOD.to("meta"),) * 2), RuntimeError),
}


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_a_refused_call_has_torchs_error(arguments, error, backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    expected = outcome(lambda: native(*arguments))
    assert expected.error is error
    actual = outcome(lambda: ours(*arguments))
    assert (actual.error, actual.message) == (expected.error, expected.message)


@pytest.mark.parametrize("states", [(), (GOOD,), [GOOD]], ids=["none", "one", "one-in-a-list"])
def test_too_few_states_are_an_error(states, backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    expected = outcome(lambda: native(state(T, B, I), states))
    assert expected.error is IndexError
    # torch stumbles over the missing element; saying what is expected is as good.
    assert outcome(lambda: ours(state(T, B, I), states)).error in (IndexError, RuntimeError)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"batch_first": True}, (state(B, 0, I),)),
        ({"batch_first": True}, (state(B, T, I), (state(1, T, H), state(1, T, H)))),
        ({"bidirectional": True}, (state(T, B, I), (state(1, B, H), state(2, B, H)))),
        ({"proj_size": P}, (state(T, B, I), (state(1, B, H), state(1, B, H)))),
        ({"proj_size": P}, (state(T, B, I), (state(1, B, P), state(1, B, P)))),
    ],
    ids=["no-steps", "batch-first-states", "directions", "h0-of-H", "c0-of-P"],
)
def test_a_refused_call_of_other_layers(options, arguments, backend):
    native, ours = build_pair(backend=backend, **options)
    expected = outcome(lambda: native(*arguments))
    assert expected.error is RuntimeError
    actual = outcome(lambda: ours(*arguments))
    assert (actual.error, actual.message) == (expected.error, expected.message)


def test_weights_elsewhere_are_an_error(backend):
    native, ours = build_pair(I, H, device="meta", backend=backend)
    expected = outcome(lambda: native(state(T, B, I)))
    assert expected.error is RuntimeError
    actual = outcome(lambda: ours(state(T, B, I)))
    assert (actual.error, actual.message) == (expected.error, expected.message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_states_of_another_dtype_are_an_error(dtype, backend):
    native, ours = build_pair(backend=backend)
    arguments = state(T, B, I), (state(1, B, H, dtype=dtype), state(1, B, H, dtype=dtype))
    assert outcome(lambda: native(*arguments)).error is RuntimeError
    assert outcome(lambda: ours(*arguments)).error in (RuntimeError, ValueError)


@pytest.mark.parametrize(
    ("form", "h0", "c0"),
    [
        ("packed-sorted", (2, B + 1, H), (2, B + 1, H)),
        ("packed-sorted", (1, B, H), (1, B, H)),
        ("packed-sorted", (2, B, H + 1), (2, B, H)),
        ("packed-unsorted", (2, B - 1, H), (2, B - 1, H)),
        ("packed-unsorted", (2, B, H + 1), (2, B, H)),
    ],
    ids=str,
)
def test_wrong_states_of_a_packed_input_are_an_error(form, h0, c0, backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    arguments = make_input(form), (state(*h0), state(*c0))
    assert outcome(lambda: native(*arguments)).error is RuntimeError
    assert outcome(lambda: ours(*arguments)).error is RuntimeError


def test_packed_input_of_the_wrong_features_or_dtype_is_an_error(backend):
    native, ours = build_pair(backend=backend)
    for packed in [make_input("packed-sorted", size=I + 1), make_input("packed-sorted").double()]:
        assert outcome(lambda packed=packed: native(packed)).error is RuntimeError
        assert outcome(lambda packed=packed: ours(packed)).error in (RuntimeError, ValueError)


def test_the_layer_works_after_a_refused_call(backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    for arguments, _ in REFUSED.values():
        assert outcome(lambda a=arguments: ours(*a)).error is not None
    compare(native, ours, make_input(), make_hx(native), backend=backend)


# An empty batch


@pytest.mark.parametrize("with_states", [True, False], ids=["states", "no-states"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("options", [{}, OPTIONS["projected-everything"]], ids=["plain", "all"])
def test_an_empty_batch(options, dtype, with_states, backend):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    x = make_input(batch=0, dtype=dtype, batch_first=native.batch_first)
    hx = make_hx(native, batch=0, dtype=dtype) if with_states else None
    expected, actual = run(native, x, hx), run(ours, x, hx)
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape
        assert actual[name].dtype == dtype
    for name, parameter in ours.named_parameters():
        assert torch.equal(actual[f"grad of {name}"], torch.zeros_like(parameter))


# Autocast


@pytest.mark.parametrize("with_states", [True, False], ids=["states", "no-states"])
@pytest.mark.parametrize("form", ["batched", "unbatched"])
@pytest.mark.parametrize("options", [{}, OPTIONS["projected-everything"]], ids=["plain", "all"])
def test_autocast_to_bfloat16(options, form, with_states, backend):
    native, ours = build_pair(backend=backend, **options)
    x = make_input(form, batch_first=native.batch_first)
    hx = make_hx(native, form) if with_states else None
    exact = run(copy.deepcopy(native).double(), x.double(), hx and tuple(t.double() for t in hx))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = run(native, x, hx), run(ours, x, hx)
    assert actual["output"].dtype == actual["h_n"].dtype == torch.bfloat16
    # The precision of torch's cell state depends on the machine and on `proj_size`.
    assert actual["c_n"].dtype in (torch.bfloat16, torch.float32)
    for name, wanted in expected.items():
        if name.startswith("grad"):
            assert actual[name].dtype == wanted.dtype == torch.float32
        # Everything passed through bfloat16 on its way, so that is its precision.
        assert_within_budget(actual[name].bfloat16(), wanted.bfloat16(), exact[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_skips_the_dtype_check(dtype, backend):
    if (backend, dtype) == ("aten", torch.float16):
        pytest.skip("oneDNN cannot train in float16 under autocast")
    native, ours = build_pair(backend=backend)
    x = make_input(dtype=dtype)
    assert outcome(lambda: ours(x)).error is ValueError
    with torch.autocast("cpu", dtype=dtype):
        expected, actual = native(x), ours(x)
    assert actual[0].dtype == expected[0].dtype == dtype
    assert {tensor.dtype for tensor in actual[1]} == {dtype}
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_disabled_autocast_changes_nothing(backend):
    native, ours = build_pair(backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        compare(native, ours, make_input(), backend=backend)
    compare(native, ours, make_input(), backend=backend)


# Dropout

DROPOUT = [
    {"num_layers": 2, "dropout": 0.5},
    {"num_layers": 3, "dropout": 0.3, "bidirectional": True},
    {"num_layers": 2, "dropout": 0.7, "batch_first": True, "proj_size": P},
    {"num_layers": 2, "dropout": 1.0},
]


@each_form
@pytest.mark.parametrize("options", DROPOUT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_draws_torchs_masks(options, form, dtype, backend):
    native, ours = build_pair(dtype=dtype, backend=backend, **options)
    x = make_input(form, dtype=dtype, batch_first=native.batch_first)
    states = []
    for module in (native, ours):
        torch.manual_seed(3)
        module(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    compare(native, ours, x, backend=backend)
    # The next call draws the next mask.
    torch.manual_seed(3)
    native(x)
    expected = native(x)
    torch.manual_seed(3)
    ours(x)
    actual = ours(x)
    torch.testing.assert_close(data_of(actual[0]), data_of(expected[0]))


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"num_layers": 2}, True),
        ({"num_layers": 2, "dropout": 1.0}, True),
        ({"num_layers": 2, "dropout": 0.5}, False),
        ({"num_layers": 1}, True),
    ],
    ids=["p=0", "p=1", "evaluation", "one-layer"],
)
@pytest.mark.parametrize("form", ["batched", "packed-unsorted"])
def test_no_random_numbers_are_consumed(options, training, form, backend):
    native, ours = build_pair(backend=backend, **options)
    for module in (native, ours):
        module.train(training)
        before = torch.get_rng_state()
        weighted = module(make_input(form))
        data_of(weighted[0]).sum().backward()
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
def test_one_layer_has_no_dropout(backend):
    native, ours = build_pair(I, H, dropout=0.9, backend=backend)
    results = compare(native, ours, make_input(), backend=backend)
    torch.manual_seed(99)
    assert torch.equal(ours(make_input())[0], results["output"])


def test_dropout_of_one_cuts_the_layers_apart(backend):
    _, ours = build_pair(I, H, 2, dropout=1.0, backend=backend)
    results = run(ours, make_input(), loss_on=("output",))
    assert torch.equal(results["grad of input"], torch.zeros(T, B, I))
    assert torch.equal(results["grad of weight_ih_l1"], torch.zeros(4 * H, H))
    assert torch.equal(ours(make_input())[0], ours(make_input() * 5)[0])
    assert ours(make_input())[1][0][0].abs().sum() > 0


def test_dropout_acts_on_time_major_output(backend):
    """The same seed gives the same masks with either layout."""
    _, time_major = build_pair(I, H, 2, dropout=0.5, backend=backend)
    _, batch_first = build_pair(I, H, 2, dropout=0.5, batch_first=True, backend=backend)
    x = make_input()
    torch.manual_seed(1)
    expected, _ = time_major(x)
    torch.manual_seed(1)
    actual, _ = batch_first(x.transpose(0, 1))
    torch.testing.assert_close(actual.transpose(0, 1), expected)


def test_dropout_leaves_states_alone(backend):
    _, ours = build_pair(I, H, 2, dropout=0.5, backend=backend)
    x = make_input()
    first, second = ours(x), ours(x)
    assert torch.equal(first[1][0][0], second[1][0][0])
    assert not torch.equal(first[0], second[0])
    assert not (first[0] == 0).any()


def test_dropout_can_be_changed_between_calls(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    outputs = []
    for p in [0.0, 0.4, 1.0, 0.0, 0.9]:
        native.dropout = ours.dropout = p
        outputs.append(compare(native, ours, x, backend=backend)["output"])
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[4])
    native.eval()
    ours.eval()
    assert torch.equal(compare(native, ours, x, backend=backend)["output"], outputs[0])


def test_training_and_evaluation_alternate(backend):
    native, ours = build_pair(I, H, 2, dropout=0.5, dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    for mode in [True, False, True, False]:
        compare(native.train(mode), ours.train(mode), x, backend=backend)
