"""What the options are to torch: they travel with a fused layer, and are never lost in silence."""

import pytest
import torch
from torch import nn

import fused_lstm

OPTIONS = {"recurrent_dropout": 0.2, "weight_dropout": 0.3, "zoneout": (0.1, 0.4), "cell_clip": 2.0}


def test_replacing_gives_a_finished_model_the_options():
    model = nn.Sequential(nn.LSTM(3, 4), nn.LSTMCell(3, 4))
    before = dict(model.named_parameters())
    fused_lstm.replace_lstm(model, **OPTIONS)
    own = {name: getattr(model[0], name) for name in OPTIONS}
    assert own == OPTIONS
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    x = torch.randn(5, 2, 3)
    torch.manual_seed(0)
    first = model[0](x)[0]
    torch.manual_seed(1)
    assert not torch.equal(model[0](x)[0], first)


@pytest.mark.parametrize(
    ("name", "value"),
    [("zoneout", 1.0), ("zoneout", (0.1,)), ("cell_clip", 0.0), ("weight_dropout", -0.1)],
)
def test_replacing_refuses_bad_options_and_changes_nothing(name, value):
    model = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match=name):
        fused_lstm.replace_lstm(model, **{name: value})
    assert type(model[0]) is nn.LSTM


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "value"), OPTIONS.items())
def test_a_torch_layer_is_refused_where_it_would_compute_something_else(name, value, training):
    layer = fused_lstm.LSTM(3, 4, **{name: value}).train(training)
    model = nn.Sequential(nn.LSTM(3, 4), layer)
    if training or name in ("zoneout", "cell_clip"):
        with pytest.raises(ValueError, match=name):
            layer.to_torch()
        fused_lstm.replace_lstm(model)
        # That gave the first one no options, and left the second, which was fused before.
        with pytest.raises(ValueError, match=name):
            fused_lstm.restore_lstm(model)
        assert [type(each) for each in model] == [fused_lstm.LSTM] * 2
        return
    x = torch.randn(5, 2, 3)
    expected = layer(x)[0]
    torch.testing.assert_close(layer.to_torch()(x)[0], expected)
    fused_lstm.restore_lstm(model)
    assert type(model[1]) is nn.LSTM
    assert name not in vars(model[1])
    torch.testing.assert_close(model[1](x)[0], expected)


def test_scripting_does_not_drop_an_option():
    with pytest.raises((RuntimeError, ValueError)):
        torch.jit.script(nn.Sequential(fused_lstm.LSTM(3, 4, zoneout=0.1)))
    scripted = torch.jit.script(nn.Sequential(fused_lstm.LSTM(3, 4, forget_bias=1.0)))
    assert scripted(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


def test_explains_what_is_asked_for():
    layer = fused_lstm.LSTM(3, 4, zoneout=0.1, recurrent_dropout=0.2)
    explanation = fused_lstm.explain(layer, lengths=[1], resets=torch.zeros(1), return_cells=True)
    asked = ("resets", "lengths", "recurrent_dropout", "zoneout", "return_cells")
    assert set(explanation.problem.additions) == set(asked)
    assert all(name in str(explanation) for name in asked)
    refusal = explanation.reasons["aten"]
    assert all(name in refusal for name in asked if name != "lengths")
    # In evaluation there is no dropout.
    assert "recurrent_dropout" not in fused_lstm.explain(layer.eval()).problem.additions
    plain = fused_lstm.explain(fused_lstm.LSTM(3, 4), lengths=[1], device="sm_90")
    assert plain.backend == "aten"
    assert "packed by their lengths" in plain.reasons["aten"]
