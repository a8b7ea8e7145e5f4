"""replace_lstm and restore_lstm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_lstm


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.tied = self.encoder
        self.deep = nn.Sequential(nn.Linear(8, 3), nn.ModuleList([nn.LSTMCell(3, 4)]))

    def forward(self, x):
        y, _ = self.encoder(x)
        return self.deep[1][0](self.deep[0](y[:, -1]))


def test_swaps_in_place_and_back() -> None:
    model = Model()
    model.encoder.flag = "kept"
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 5, 3)
    expected = model(x)

    assert fused_lstm.replace_lstm(model) is model
    assert type(model.encoder) is fused_lstm.LSTM
    assert model.tied is model.encoder
    assert type(model.deep[1][0]) is fused_lstm.LSTMCell
    assert model.encoder.flag == "kept"
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    torch.testing.assert_close(model(x), expected)
    assert calls == [1, 1]
    model(x)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(model(x)[0], expected[0])

    changed = model(x)
    assert fused_lstm.restore_lstm(model) is model
    assert type(model.encoder) is nn.LSTM
    assert type(model.deep[1][0]) is nn.LSTMCell
    assert "backend" not in model.encoder.__dict__
    torch.testing.assert_close(model(x), changed)
    copy.deepcopy(model)


def test_a_layer_by_itself_and_a_named_backend() -> None:
    layer = fused_lstm.replace_lstm(nn.LSTM(3, 4), backend="reference")
    assert type(layer) is fused_lstm.LSTM
    assert layer.backend == "reference"
    assert fused_lstm.explain(layer).backend == "reference"
    twice = fused_lstm.replace_lstm(layer)
    assert twice is layer
    assert layer.backend == "reference"


def test_subclasses_with_their_own_forward_are_left_alone() -> None:
    class Own(nn.LSTM):
        pass

    model = nn.Sequential(Own(3, 4))
    fused_lstm.replace_lstm(model)
    assert type(model[0]) is Own


@pytest.mark.parametrize("convert", [fused_lstm.replace_lstm, fused_lstm.restore_lstm])
def test_what_is_not_a_module_is_refused(convert) -> None:
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module, got: list"):
        convert([nn.LSTM(3, 4)])


def test_unknown_backend_changes_nothing() -> None:
    model = Model()
    with pytest.raises(ValueError, match="backend='cudnn'"):
        fused_lstm.replace_lstm(model, backend="cudnn")
    assert type(model.encoder) is nn.LSTM
