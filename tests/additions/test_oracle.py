"""The oracle itself, against `torch.nn.LSTM`."""

import copy

import pytest
import torch
from torch import nn

from .oracle import (
    CLOSE,
    B,
    H,
    I,
    P,
    T,
    assert_same,
    lengths_of,
    make_hx,
    make_resets,
    make_x,
    pack,
    run,
    run_oracle,
    to_padded,
    to_rows,
)

OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "three-layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "projected": {"proj_size": P},
    "everything": {"num_layers": 2, "bidirectional": True, "proj_size": P, "batch_first": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@options
@pytest.mark.parametrize("batch", [B, None], ids=["batched", "unbatched"])
def test_the_oracle_equals_torch(options, batch):
    native = nn.LSTM(I, H, dtype=torch.float64, **options)
    x = make_x(batch=batch, batch_first=native.batch_first)
    for hx in (None, make_hx(native, batch)):
        assert_same(run_oracle(native, x, hx), run(native, x, hx))


@options
def test_the_oracle_equals_torch_on_packed_sequences(options):
    native = nn.LSTM(I, H, dtype=torch.float64, **options)
    x = pack(make_x(), [2, 6, 1, 6])
    for hx in (None, make_hx(native)):
        assert_same(run_oracle(native, x, hx), run(native, x, hx))


@options
def test_the_oracle_with_lengths_equals_packing(options):
    native = nn.LSTM(I, H, dtype=torch.float64, **options)
    x, lengths = make_x(batch_first=native.batch_first), [2, 6, 1, 4]
    hx = make_hx(native)
    expected = run(Packed(native, lengths), x, hx)
    actual = run_oracle(native, x, hx, lengths=lengths)
    assert_same(actual, {name.replace("native.", ""): v for name, v in expected.items()})


class Packed(nn.Module):
    """A layer that packs its input and pads its output."""

    def __init__(self, native, lengths):
        super().__init__()
        self.native, self.lengths = native, lengths

    def forward(self, x, hx):
        first = self.native.batch_first
        output, states = self.native(pack(x, self.lengths, first), hx)
        output, _ = nn.utils.rnn.pad_packed_sequence(output, first, total_length=T)
        return output, states


def test_the_oracle_with_resets_equals_separate_episodes():
    native = nn.LSTM(I, H, 2, dtype=torch.float64)
    resets = make_resets(T, B)
    x, hx = make_x(), make_hx(native)
    expected = run_oracle(native, x, hx, resets=resets)
    assert resets.any()
    for b in range(B):
        states = tuple(state[:, b].contiguous() for state in hx)
        for t in range(T):
            if resets[t, b]:
                states = tuple(torch.zeros_like(state) for state in states)
            output, states = native(x[t : t + 1, b], states)
            torch.testing.assert_close(output[0], expected["output"][t, b], **CLOSE[x.dtype])
        torch.testing.assert_close(states[1], expected["c_n"][:, b], **CLOSE[x.dtype])


def test_the_oracles_cells_are_those_of_the_last_step():
    native = nn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)
    x, lengths = make_x(), [3, 6, 0, 1]
    results = run_oracle(native, x, lengths=lengths, return_cells=True)
    for b, length in enumerate(lengths):
        if length:
            assert torch.equal(results["cells"][length - 1, b, :H], results["c_n"][2, b])
            assert torch.equal(results["cells"][0, b, H:], results["c_n"][3, b])
        assert not results["cells"][length:, b].any()


def test_packing_rows():
    x = make_x()
    packed = pack(x, [2, 6, 1, 4])
    assert lengths_of(packed.batch_sizes) == [6, 4, 2, 1]
    padded = to_padded(packed.data, packed.batch_sizes)
    assert torch.equal(to_rows(padded, packed.batch_sizes), packed.data)
    assert torch.equal(padded[:, 0], x[:, 1])
    assert torch.equal(padded[:2, 2], x[:2, 0])
    assert not padded[2:, 2].any()


def test_the_masks_of_the_oracle():
    """Zoneout of 1 keeps the state, a recurrent mask of 0 is a W_hh of 0."""
    native = nn.LSTM(I, H, dtype=torch.float64)
    x, hx = make_x(), make_hx(native)
    kept = run_oracle(native, x, hx, zoneout_h=[1.0], zoneout_c=[1.0])
    assert torch.equal(kept["h_n"], hx[0])
    assert torch.equal(kept["c_n"], hx[1])
    dropped = run_oracle(native, x, hx, recurrent_masks=torch.zeros(1, B, H, dtype=x.dtype))
    nulled = copy.deepcopy(native)
    nn.init.zeros_(nulled.weight_hh_l0)
    expected = run(nulled, x, hx)
    for name in ("output", "c_n", "grad of input", "grad of weight_ih_l0"):
        torch.testing.assert_close(dropped[name], expected[name], **CLOSE[x.dtype])
    assert not dropped["grad of weight_hh_l0"].any()
    clipped = run_oracle(native, x, hx, cell_clip=0.1, return_cells=True)
    assert clipped["cells"].abs().max() == 0.1
