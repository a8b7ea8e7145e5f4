"""The module around the additions: its state, its copies, its text, transforms and compilers."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo
from torch import nn

import fused_lstm

from .oracle import (
    CLOSE,
    B,
    H,
    I,
    P,
    T,
    assert_same,
    build,
    finish,
    leaf,
    make_hx,
    make_resets,
    make_x,
    pack,
    run,
    run_oracle,
    zoneout_in_evaluation,
)
from .test_core import BATCH_SIZES, NAMES, make_arguments, make_modifiers, with_gradients


def with_spoilt_padding(x, lengths):
    """[T, B, I] whose padding is NaN."""
    x = x.clone()
    x[torch.arange(len(x))[:, None] >= lengths] = float("nan")
    return x


EVERYTHING = {
    "recurrent_dropout": 0.2,
    "weight_dropout": 0.3,
    "zoneout": (0.1, 0.4),
    "forget_bias": 1.5,
    "cell_clip": 0.7,
}


def test_state_dict_is_torchs():
    for options in ({}, {"num_layers": 2, "bidirectional": True, "proj_size": P}):
        ours, native = fused_lstm.LSTM(I, H, **options, **EVERYTHING), nn.LSTM(I, H, **options)
        assert list(ours.state_dict()) == list(native.state_dict())
        native.load_state_dict(ours.state_dict())
        ours.load_state_dict(native.state_dict())
        names = [name for name, _ in ours.named_parameters()]
        assert names == [name for name, _ in native.named_parameters()]
        assert not list(ours.buffers())


def copies(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "save": torch.load(file, weights_only=False),
        "copy": copy.copy(module),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_copies_keep_the_options(training):
    module = build(num_layers=2, proj_size=P, **EVERYTHING).train(training)
    x, hx = make_x(), make_hx(module)
    arguments = {"lengths": [2, 6, 0, 4], "resets": make_resets(T, B), "return_cells": True}
    expected = run(module, x, hx, seed=5, **arguments)
    for name, other in copies(module).items():
        assert repr(other) == repr(module), name
        assert_same(run(other, x, hx, seed=5, **arguments), expected, rtol=0, atol=0)
        if name == "copy":
            continue  # it shares its parameters
        other.reset_parameters()
        assert (other.bias_ih_l1[H : 2 * H] == 1.5).all()
        assert not other.bias_hh_l1[H : 2 * H].any()
        assert module.weight_hh_l0.ne(other.weight_hh_l0).any()


def test_its_text_shows_the_options():
    text = repr(fused_lstm.LSTM(I, H, **EVERYTHING))
    for part in (
        "recurrent_dropout=0.2",
        "weight_dropout=0.3",
        "zoneout=(0.1, 0.4)",
        "forget_bias=1.5",
        "cell_clip=0.7",
    ):
        assert part in text
    assert "zoneout=0.25" in repr(fused_lstm.LSTM(I, H, zoneout=0.25)) or (
        "zoneout=(0.25, 0.25)" in repr(fused_lstm.LSTM(I, H, zoneout=0.25))
    )
    assert "forget_bias=0" in repr(fused_lstm.LSTM(I, H, forget_bias=0.0))
    # Only what was asked for, as torch.
    plain = repr(fused_lstm.LSTM(I, H, 2, proj_size=P, batch_first=True))
    assert plain == repr(nn.LSTM(I, H, 2, proj_size=P, batch_first=True))


def from_an_older_version(module):
    """As it would be unpickled from before the additions: only torch's attributes, and backend."""
    known = set(nn.LSTM(I, H).__dict__) | {"backend"}
    state = {k: v for k, v in module.__getstate__().items() if k in known}
    other = type(module).__new__(type(module))
    other.__setstate__(state)
    return other


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_modules_of_an_older_version_run(training):
    module = build(num_layers=2, proj_size=P).train(training)
    older = from_an_older_version(module)
    x, hx = make_x(), make_hx(module)
    arguments = {"lengths": [2, 6, 0, 4], "resets": make_resets(T, B), "return_cells": True}
    expected = run(module, x, hx, **arguments)
    assert_same(run(older, x, hx, **arguments), expected, rtol=0, atol=0)
    assert_same(run(older, x, hx), run(module, x, hx), rtol=0, atol=0)
    assert repr(older) == repr(module)
    assert_same(run(copy.deepcopy(older), x, hx, **arguments), expected, rtol=0, atol=0)
    assert_same(
        run(pickle.loads(pickle.dumps(older)), x, hx, **arguments), expected, rtol=0, atol=0
    )
    older.reset_parameters()


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_module_without_one_of_the_attributes_runs(name):
    module = build()
    module.__dict__.pop(name, None)
    x = make_x()
    assert_same(run(module, x), run(build(), x), rtol=0, atol=0)
    repr(module)
    module.reset_parameters()


def test_options_can_be_read():
    module = fused_lstm.LSTM(I, H, **EVERYTHING)
    for name in ("recurrent_dropout", "weight_dropout", "forget_bias", "cell_clip"):
        assert getattr(module, name) == EVERYTHING[name]
    assert tuple(module.zoneout) == (0.1, 0.4)


@pytest.mark.usefixtures("backend")
def test_options_can_be_changed_afterwards():
    """As torch's `dropout` can: the next call heeds it."""
    x = make_x()
    module = build()
    hx = make_hx(module)
    module.cell_clip = 0.3
    expected = run(build(cell_clip=0.3), x, hx)
    assert_same(run(module, x, hx), expected, rtol=0, atol=0)
    module = build(recurrent_dropout=0.5)
    module.recurrent_dropout = 0.0
    assert_same(run(module, x, hx), run(build(), x, hx), rtol=0, atol=0)


@pytest.mark.usefixtures("backend")
def test_hooks_see_the_arguments():
    module, seen = build(), []
    module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    module.register_forward_hook(lambda module, args, result: seen.append(len(result)))
    module(make_x(), lengths=[2, 6, 0, 4], return_cells=True)
    assert seen == [["lengths", "return_cells"], 3]


@pytest.mark.usefixtures("backend")
def test_parametrized_weights():
    module = build(num_layers=2, weight_dropout=0.3, cell_clip=0.7)
    x, hx = make_x(), make_hx(module)
    arguments = {"lengths": [2, 6, 0, 4], "return_cells": True}
    expected = run(module, x, hx, seed=5, **arguments)

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Half())
    actual = run(module, x, hx, seed=5, **arguments)
    for name in ("output", "h_n", "c_n", "cells", "grad of input"):
        torch.testing.assert_close(actual[name], expected[name], **CLOSE[torch.float64])
    original = actual["grad of parametrizations.weight_hh_l0.original"]
    torch.testing.assert_close(2 * original, expected["grad of weight_hh_l0"])


@pytest.mark.usefixtures("backend")
def test_data_parallel_wrappers_and_containers():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = build(num_layers=2, batch_first=True)

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)[0]

    model = Encoder()
    x, lengths = make_x(batch_first=True), torch.tensor([2, 6, 0, 4])
    expected = run_oracle(model.rnn, x, lengths=lengths)["output"]
    torch.testing.assert_close(model(x, lengths), expected, **CLOSE[torch.float64])
    torch.testing.assert_close(nn.DataParallel(model)(x, lengths), expected)


# Transforms


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_vmap_over_inputs_lengths_and_resets(batch_first):
    module = build(num_layers=2, batch_first=batch_first, zoneout=(0.2, 0.4), cell_clip=0.6).eval()
    xs = torch.stack([make_x(seed=s, batch_first=batch_first) for s in range(3)])
    resets = torch.stack([make_resets(*xs.shape[1:3], seed=s) for s in range(3)])
    lengths = torch.tensor([[2, 6, 0, 4], [6, 6, 6, 6], [0, 1, 2, 3]])
    modifiers = {**zoneout_in_evaluation(module, (0.2, 0.4)), "cell_clip": 0.6}

    def call(x, lengths, resets):
        output, states, cells = module(x, lengths=lengths, resets=resets, return_cells=True)
        return output, *states, cells

    actual = torch.vmap(call)(xs, lengths, resets)
    shared = torch.vmap(call, (0, None, None))(xs, lengths[0], resets[0])
    for v in range(3):
        for results, k in ((actual, v), (shared, 0)):
            arguments = {"lengths": lengths[k], "resets": resets[k], "return_cells": True}
            expected = run_oracle(module, xs[v], **arguments, **modifiers)
            for got, name in zip(results, ("output", "h_n", "c_n", "cells"), strict=True):
                torch.testing.assert_close(got[v], expected[name], **CLOSE[torch.float64])


@pytest.mark.usefixtures("backend")
def test_vmap_over_single_sequences():
    """Every sequence by itself, with its own length and its own resets."""
    module = build(num_layers=2, proj_size=P)
    x, resets = make_x(), make_resets(T, B)
    lengths = torch.tensor([2, 6, 0, 4])
    expected = run_oracle(module, x, lengths=lengths, resets=resets)["output"]

    def call(x, length, resets):
        return module(x, lengths=length, resets=resets)[0]

    spoilt = with_spoilt_padding(x, lengths)
    actual = torch.vmap(call, (1, 0, 1), 1)(spoilt, lengths, resets)
    torch.testing.assert_close(actual, expected, **CLOSE[torch.float64])


@pytest.mark.usefixtures("backend")
def test_per_sample_gradients():
    module = build(num_layers=2)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x, resets = make_x(), make_resets(T, B)
    lengths = torch.tensor([2, 6, 0, 4])

    def loss(weights, x, length, resets):
        arguments = {"lengths": length, "resets": resets, "return_cells": True}
        output, states, cells = torch.func.functional_call(module, weights, (x,), arguments)
        return output.square().sum() + states[0].sum() + cells.square().sum()

    spoilt = with_spoilt_padding(x, lengths)
    actual = torch.vmap(torch.func.grad(loss), (None, 1, 0, 1))(weights, spoilt, lengths, resets)
    for b in range(B):
        module.zero_grad(set_to_none=True)
        one = slice(b, b + 1)
        arguments = {"lengths": lengths[one], "resets": resets[:, one], "return_cells": True}
        output, states, cells = module(x[:, one], **arguments)
        (output.square().sum() + states[0].sum() + cells.square().sum()).backward()
        for name, parameter in module.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(actual[name][b], wanted, **CLOSE[torch.float64])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(randomness):
    """The `randomness` of `vmap` decides whether the mapped layers share their masks."""
    for option in ("recurrent_dropout", "weight_dropout", "zoneout"):
        module = build(**{option: 0.4})
        x, hx = make_x(), make_hx(module)
        several = torch.stack([x, x])
        output = torch.vmap(lambda x: module(x, hx)[0], randomness=randomness)(several)  # noqa: B023
        assert torch.allclose(output[0], output[1]) == (randomness == "same"), option


@pytest.mark.usefixtures("backend")
def test_forward_mode():
    module = build(num_layers=2, bidirectional=True)
    x, hx = make_x(), make_hx(module)
    tangent = make_x(seed=9)

    def call(x):
        return module(x, hx, lengths=[2, 6, 0, 4], return_cells=True)[2]

    cells, moved = torch.func.jvp(call, (x,), (tangent,))
    step = 1e-6
    numerical = (call(x + step * tangent) - call(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(moved, numerical, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(cells, call(x))


# Compilers and tracers


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = build(num_layers=2, zoneout=(0.2, 0.4), cell_clip=0.6)
        self.head = nn.Linear(2 * H, 2, dtype=torch.float64)

    def forward(self, x, lengths, resets):
        output, (h_n, _), cells = self.rnn(x, lengths=lengths, resets=resets, return_cells=True)
        return self.head(torch.cat([output, cells], -1).relu()) + h_n.sum()


@pytest.mark.parametrize("allow_rnn", [False, True], ids=["graph-break", "one-graph"])
def test_a_compiled_model(allow_rnn):
    torch._dynamo.reset()
    model = Tagger().eval()
    compiled = torch.compile(model, backend="aot_eager")
    x, resets = make_x(), make_resets(T, B)
    results = []
    for function in (model, compiled):
        for lengths in ([2, 6, 0, 4], [6, 1, 1, 5]):
            data = leaf(with_spoilt_padding(x, torch.tensor(lengths)))
            model.zero_grad()
            with torch._dynamo.config.patch(allow_rnn=allow_rnn):
                y = function(data, torch.tensor(lengths), resets)
            y.square().sum().backward()
            results.append([y.detach(), data.grad, *(p.grad for p in model.parameters())])
    for eager, traced in zip(results[:2], results[2:], strict=True):
        for wanted, got in zip(eager, traced, strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE[torch.float64])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_core_compiles_into_one_graph_with_gradients(packed):
    arguments = make_arguments(packed=packed, dtype=torch.float32)
    modifiers = make_modifiers(NAMES, arguments, packed)
    clip = modifiers.pop("cell_clip")
    sizes = BATCH_SIZES if packed else None

    def function(tensors, modifiers):
        return tuple(
            fused_lstm.lstm_recurrence(**tensors, **modifiers, cell_clip=clip, batch_sizes=sizes)
        )

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = with_gradients(lambda leaves: function(leaves, modifiers), arguments)
    traced = with_gradients(lambda leaves: compiled(leaves, modifiers), arguments)
    for got, wanted in zip(traced, eager, strict=True):
        torch.testing.assert_close(got, wanted)


def test_lengths_in_a_list_are_constants_of_an_exported_program():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = build()

        def forward(self, x):
            return self.rnn(x, lengths=[2, 6, 0, 4])[0]

    model, x = Encoder(), make_x()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_on_the_meta_device():
    module = build(device="meta")
    x = torch.empty(T, B, I, dtype=torch.float64, device="meta")
    for lengths in ([2, 6, 0, 4], torch.empty(B, dtype=torch.int64, device="meta")):
        output, _ = module(x, lengths=lengths)
        assert output.is_meta
        assert output.shape == (T, B, H)
    assert module(x, return_cells=True)[2].shape == (T, B, H)


def test_the_layer_stays_one_node_of_a_graph():
    """`torch.fx` records the call with its arguments."""
    model = Tagger().eval()
    traced = torch.fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in calls] == ["rnn", "head"]
    assert {"lengths", "resets", "return_cells"} <= set(calls[0].kwargs)
    arguments = make_x(), torch.tensor([2, 6, 0, 4]), make_resets(T, B)
    torch.testing.assert_close(traced(*arguments), model(*arguments))


@pytest.mark.usefixtures("backend")
def test_checkpointing_with_lengths_and_resets():
    from torch.utils.checkpoint import checkpoint

    module = build(num_layers=2, recurrent_dropout=0.3, zoneout=0.3, weight_dropout=0.2)
    x, hx = make_x(), make_hx(module)
    arguments = {"lengths": [2, 6, 0, 4], "resets": make_resets(T, B), "return_cells": True}
    expected = run(module, x, hx, seed=5, **arguments)
    data, states = leaf(x), tuple(leaf(state) for state in hx)
    module.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    output, (h_n, c_n), cells = checkpoint(module, data, states, **arguments, use_reentrant=False)
    torch.rand(3)
    results = {"output": output, "h_n": h_n, "c_n": c_n, "cells": cells}
    weights = dict(module.named_parameters())
    assert_same(finish(results, data, states, weights, None), expected)


@pytest.mark.usefixtures("backend")
def test_training_goes_down():
    """A task that needs the lengths: the sum of each sequence, with NaN in the padding."""
    torch.manual_seed(0)
    module = fused_lstm.LSTM(1, 8, forget_bias=1.0, zoneout=0.05, recurrent_dropout=0.1)
    head = nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.02)
    lengths = torch.arange(1, 17).remainder(7)
    x = torch.randn(T, 16, 1)
    x[torch.arange(T)[:, None] >= lengths] = float("nan")
    target = x.nan_to_num(0).sum(0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        _, (h_n, _) = module(x, lengths=lengths)
        loss = (head(h_n[0]) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.usefixtures("backend")
def test_packed_sequences_keep_their_order():
    module = build(zoneout=0.3).eval()
    x = pack(make_x(), [2, 6, 1, 4])
    output, _, cells = module(x, return_cells=True, resets=make_resets(T, B))
    for result in (output, cells):
        assert result.sorted_indices is x.sorted_indices
        assert result.unsorted_indices is x.unsorted_indices
        assert torch.equal(result.batch_sizes, x.batch_sizes)
