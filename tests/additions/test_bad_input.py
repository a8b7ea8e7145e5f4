"""What is refused, and how: every message names the argument and what it was given."""

import re

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fused_lstm

from .oracle import B, H, I, P, T, build, make_resets, make_x, pack

pytestmark = pytest.mark.usefixtures("backend")


def refuses(error, call, *parts):
    """Asserts that `call` raises exactly `error`, with all `parts` in its message."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    for part in parts:
        assert part in str(raised.value), f"{part!r} not in {raised.value}"


PROBABILITIES = ["recurrent_dropout", "weight_dropout", "zoneout"]


@pytest.mark.parametrize("name", PROBABILITIES)
@pytest.mark.parametrize("value", [-0.1, 1.0, 1, 1.5, float("nan"), float("inf")], ids=str)
def test_probabilities_outside_their_range(name, value):
    refuses(ValueError, lambda: fused_lstm.LSTM(I, H, **{name: value}), name, str(value))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ((0.1, 1.0), "1.0"),
        ((-0.2, 0.1), "-0.2"),
        ((0.1, float("nan")), "nan"),
        ((0.1,), "(0.1,)"),
        ((0.1, 0.2, 0.3), "(0.1, 0.2, 0.3)"),
        ((), "()"),
    ],
    ids=str,
)
def test_pairs_of_zoneout(value, named):
    refuses(ValueError, lambda: fused_lstm.LSTM(I, H, zoneout=value), "zoneout", named)


@pytest.mark.parametrize("name", PROBABILITIES)
@pytest.mark.parametrize("value", ["0.1", None, True, [0.1, "x"]], ids=repr)
def test_probabilities_that_are_no_numbers(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        fused_lstm.LSTM(I, H, **{name: value})


@pytest.mark.parametrize("value", [0.0, 0, -1.0, float("nan")], ids=str)
def test_clips_that_are_not_positive(value):
    refuses(ValueError, lambda: fused_lstm.LSTM(I, H, cell_clip=value), "cell_clip", str(value))


@pytest.mark.parametrize("value", ["1", True, [1.0]], ids=repr)
def test_clips_that_are_no_numbers(value):
    with pytest.raises((TypeError, ValueError), match="cell_clip"):
        fused_lstm.LSTM(I, H, cell_clip=value)


@pytest.mark.parametrize("value", ["1", [1.0]], ids=repr)
def test_forget_biases_that_are_no_numbers(value):
    with pytest.raises((TypeError, ValueError), match="forget_bias"):
        fused_lstm.LSTM(I, H, forget_bias=value)


def test_the_new_options_are_keywords():
    with pytest.raises(TypeError):
        fused_lstm.LSTM(I, H, 1, True, False, 0.0, False, 0, None, None, 0.1)
    with pytest.raises(TypeError):
        build()(make_x(), None, [1, 2, 3, 4])


# lengths


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("form", [list, torch.tensor], ids=["list", "tensor"])
class TestLengths:
    @pytest.mark.parametrize(
        ("lengths", "culprit"),
        [([2, 7, 1, 4], "7"), ([2, 6, -1, 4], "-1"), ([-3, 7, 1, 4], ""), ([100] * 4, "100")],
        ids=str,
    )
    def test_values_out_of_range(self, batch_first, form, lengths, culprit):
        module = build(batch_first=batch_first)
        x = make_x(batch_first=batch_first)
        refuses(ValueError, lambda: module(x, lengths=form(lengths)), "lengths", culprit, str(T))

    @pytest.mark.parametrize("lengths", [[2, 6, 1], [2, 6, 1, 4, 4], [3], [2] * T], ids=str)
    def test_a_wrong_count(self, batch_first, form, lengths):
        module = build(batch_first=batch_first)
        x = make_x(batch_first=batch_first)
        count = str(len(lengths))
        refuses(ValueError, lambda: module(x, lengths=form(lengths)), "lengths", count, str(B))

    def test_none_at_all(self, batch_first, form):
        module = build(batch_first=batch_first)
        x = make_x(batch_first=batch_first)
        lengths = [] if form is list else torch.zeros(0, dtype=torch.int64)
        refuses(ValueError, lambda: module(x, lengths=lengths), "lengths", str(B))


def test_lengths_of_a_wrong_shape():
    module, x = build(), make_x()
    for lengths in (torch.ones(B, 1, dtype=torch.int64), torch.ones(1, B, dtype=torch.int64)):
        shape = str(list(lengths.shape))[1:-1]
        refuses(ValueError, lambda lengths=lengths: module(x, lengths=lengths), "lengths", shape)
    refuses(ValueError, lambda: module(x, lengths=torch.tensor(3)), "lengths")


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        (torch.tensor([2.0, 6.0, 1.0, 4.0]), "float32"),
        (torch.tensor([2.0, 6.0, 1.0, 4.0], dtype=torch.float64), "float64"),
        (torch.tensor([2.0, 6.0, 1.0, 4.0]).half(), "float16"),
        (torch.tensor([True, True, False, True]), "bool"),
        (torch.tensor([1, 2, 3, 4]).to(torch.complex64), "complex64"),
        ([2.5, 6, 1, 4], "2.5"),
        ([2.0, 6.0, 1.0, 4.0], "2.0"),
        ((2, 6, 1, "4"), "4"),
        ([True, True, False, True], "True"),
        ([2, None, 1, 4], "None"),
        ([[2], [6], [1], [4]], "[2]"),
        ("2614", "str"),
        ({2: 1, 6: 1, 1: 1, 4: 1}, "dict"),
        ({2, 6, 1, 4}, "set"),
        (3.0, "float"),
    ],
    ids=str,
)
def test_lengths_of_another_type(lengths, named):
    module, x = build(), make_x()
    refuses(TypeError, lambda: module(x, lengths=lengths), "lengths", named)


@pytest.mark.parametrize("lengths", [7, -1, [7], torch.tensor(7), torch.tensor([-1])], ids=str)
def test_lengths_of_one_sequence_out_of_range(lengths):
    culprit = "7" if "7" in str(lengths) else "-1"
    x = make_x(batch=None)
    refuses(ValueError, lambda: build()(x, lengths=lengths), "lengths", culprit, str(T))


@pytest.mark.parametrize("lengths", [[3, 3], torch.tensor([3, 3]), []], ids=str)
def test_lengths_of_more_or_less_than_one_sequence(lengths):
    refuses(ValueError, lambda: build()(make_x(batch=None), lengths=lengths), "lengths")


@pytest.mark.parametrize("lengths", [3.0, True, "3", torch.tensor(3.0)], ids=repr)
def test_lengths_of_one_sequence_of_another_type(lengths):
    refuses(TypeError, lambda: build()(make_x(batch=None), lengths=lengths), "lengths")


def test_lengths_of_packed_sequences():
    module, x = build(), pack(make_x(), [2, 6, 1, 4])
    refuses(ValueError, lambda: module(x, lengths=[2, 6, 1, 4]), "lengths", "PackedSequence")


def test_a_single_int_is_not_for_batches():
    """Nor for a batch of one? A tensor or list says how many sequences it is about."""
    with pytest.raises((TypeError, ValueError), match="lengths"):
        build()(make_x(), lengths=3)


# resets


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_resets_of_a_wrong_shape(batch_first):
    module, x = build(batch_first=batch_first), make_x(batch_first=batch_first)
    right = (B, T) if batch_first else (T, B)
    for shape in ((right[1], right[0]), (T,), (B,), (T, B, 1), (T - 1, B), (T, B + 1), ()):
        resets = torch.zeros(shape, dtype=torch.bool)
        refuses(
            ValueError,
            lambda resets=resets: module(x, resets=resets),
            "resets",
            str(list(shape)),
            str(list(right)),
        )


def test_resets_of_a_wrong_shape_for_one_sequence():
    for shape in ((T - 1,), (T, 1), (1, T), ()):
        resets = torch.zeros(shape, dtype=torch.bool)
        refuses(
            ValueError,
            lambda resets=resets: build()(make_x(batch=None), resets=resets),
            "resets",
            str(list(shape)),
            str([T]),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_resets_of_another_dtype(dtype):
    module = build()
    resets = make_resets(T, B).to(dtype)
    refuses(TypeError, lambda: module(make_x(), resets=resets), "resets", str(dtype), "bool")
    x = pack(make_x(), [2, 6, 1, 4])
    refuses(TypeError, lambda: module(x, resets=resets), "resets", str(dtype), "bool")
    packed = pack(resets, [2, 6, 1, 4])
    refuses(TypeError, lambda: module(x, resets=packed), "resets", str(dtype), "bool")


@pytest.mark.parametrize(
    "resets", [[[True] * B] * T, True, "reset", 3], ids=["list", "bool", "str", "int"]
)
def test_resets_that_are_no_tensor(resets):
    refuses(TypeError, lambda: build()(make_x(), resets=resets), "resets", type(resets).__name__)


def test_resets_of_a_bidirectional_layer():
    for options in ({}, {"num_layers": 2, "batch_first": True, "proj_size": P}):
        module = build(bidirectional=True, **options)
        x = make_x(batch_first=module.batch_first)
        resets = torch.zeros(x.shape[:2], dtype=torch.bool)
        refuses(ValueError, lambda: module(x, resets=resets), "resets", "bidirectional")  # noqa: B023


def test_packed_resets_of_another_packing():
    module, x = build(), pack(make_x(), [2, 6, 1, 4])
    other = pack(make_resets(T, B), [2, 6, 2, 4])
    refuses(ValueError, lambda: module(x, resets=other), "resets", "batch_sizes")
    fewer = pack_sequence([torch.zeros(3, dtype=torch.bool)])
    refuses(ValueError, lambda: module(x, resets=fewer), "resets")
    features = pack(torch.zeros(T, B, 2, dtype=torch.bool), [2, 6, 1, 4])
    refuses(ValueError, lambda: module(x, resets=features), "resets")


def test_packed_resets_in_another_order():
    """The same batch_sizes, but the rows belong to other sequences of the caller's batch."""
    x = pack(make_x(), [2, 6, 1, 4])
    resets = pack(make_resets(T, B), [6, 4, 2, 1])
    assert torch.equal(resets.batch_sizes, x.batch_sizes)
    # Whether row by row or sequence by sequence is meant cannot be known.
    refuses(ValueError, lambda: build()(x, resets=resets), "resets")


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_padded_resets_of_packed_sequences(batch_first):
    module, x = build(batch_first=batch_first), pack(make_x(), [2, 6, 1, 4])
    for shape in ((T, B + 1), (T - 1, B), (T,), (len(x.data),)):
        resets = torch.zeros(shape, dtype=torch.bool)
        shape = list(shape)
        if batch_first and len(shape) == 2:
            resets, shape = resets.t(), shape[::-1]
        refuses(ValueError, lambda r=resets: module(x, resets=r), "resets", str(shape))


def test_packed_resets_of_padded_sequences():
    resets = pack(make_resets(T, B), [2, 6, 1, 4])
    for x in (make_x(), make_x(batch=None)):
        with pytest.raises((TypeError, ValueError), match="resets"):
            build()(x, resets=resets)


def test_nothing_is_refused_too_late():
    """The arguments are looked at before anything is computed, or any mask drawn."""
    module = build(num_layers=2, recurrent_dropout=0.5)
    before = torch.random.get_rng_state()
    for arguments in ({"lengths": [9] * B}, {"resets": torch.zeros(1, 1, dtype=torch.bool)}):
        with pytest.raises(ValueError, match=re.escape(next(iter(arguments)))):
            module(make_x(), **arguments)
    assert torch.equal(torch.random.get_rng_state(), before)


# The core


def core_arguments(**changes):
    zeros = torch.zeros
    arguments = {
        "gates": zeros(T, B, 4 * H),
        "weight_hh": zeros(4 * H, H),
        "h0": zeros(B, H),
        "c0": zeros(B, H),
    }
    return {**arguments, **changes}


BAD_SHAPES = {
    "lengths": torch.zeros(B + 1, dtype=torch.int64),
    "resets": torch.zeros(B, T, dtype=torch.bool),
    "recurrent_mask": torch.zeros(B, H + 1),
    "zoneout_h": torch.zeros(T, B, H + 1),
    "zoneout_c": torch.zeros(T + 1, B, H),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_the_core_names_a_wrong_shape(name):
    tensor = BAD_SHAPES[name]
    refuses(
        ValueError,
        lambda: fused_lstm.lstm_recurrence(**core_arguments(**{name: tensor})),
        name,
        str(list(tensor.shape)),
    )


BAD_DTYPES = {
    "lengths": torch.zeros(B),
    "resets": torch.zeros(T, B),
    "recurrent_mask": torch.zeros(B, H, dtype=torch.float64),
    "zoneout_h": torch.zeros(T, B, H, dtype=torch.float64),
    "zoneout_c": torch.zeros(T, B, H, dtype=torch.bool),
}


@pytest.mark.parametrize("name", BAD_DTYPES)
def test_the_core_names_a_wrong_dtype(name):
    tensor = BAD_DTYPES[name]
    refuses(
        TypeError,
        lambda: fused_lstm.lstm_recurrence(**core_arguments(**{name: tensor})),
        name,
        str(tensor.dtype),
    )


@pytest.mark.parametrize("lengths", [[2, T + 1, 0, 1], [2, -1, 0, 1]], ids=str)
def test_the_core_refuses_lengths_out_of_range(lengths):
    refuses(
        ValueError,
        lambda: fused_lstm.lstm_recurrence(**core_arguments(lengths=torch.tensor(lengths))),
        "lengths",
        str(lengths[1]),
    )


def test_the_core_refuses_lengths_with_batch_sizes():
    sizes = torch.tensor([B] * T)
    arguments = core_arguments(gates=torch.zeros(T * B, 4 * H), batch_sizes=sizes)
    lengths = torch.tensor([T] * B)
    refuses(
        ValueError,
        lambda: fused_lstm.lstm_recurrence(**arguments, lengths=lengths),
        "lengths",
        "batch_sizes",
    )


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")], ids=str)
def test_the_core_refuses_a_clip_that_is_not_positive(clip):
    refuses(
        ValueError,
        lambda: fused_lstm.lstm_recurrence(**core_arguments(cell_clip=clip)),
        "cell_clip",
        str(clip),
    )
