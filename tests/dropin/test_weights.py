"""Attributes and weights: names, values, and a fresh reading of every weight at every forward."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_lstm

from .helpers import (
    OPTIONS,
    B,
    H,
    I,
    P,
    T,
    build_pair,
    compare,
    make_hx,
    make_input,
    outcome,
    run,
    values,
)

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


# Initialisation


@each_option
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_same_seed_same_parameters_and_generator_state(options, dtype):
    torch.manual_seed(5)
    native = nn.LSTM(I, H, dtype=dtype, **options)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    ours = fused_lstm.LSTM(I, H, dtype=dtype, **options)
    assert torch.equal(torch.get_rng_state(), state)

    expected = list(native.named_parameters())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in expected]
    for name, parameter in expected:
        mine = getattr(ours, name)
        assert type(mine) is nn.Parameter
        assert mine.requires_grad
        assert mine.dtype == dtype
        assert torch.equal(mine, parameter), name


def test_names_and_order_within_layers_and_directions():
    ours = fused_lstm.LSTM(I, H, 2, bidirectional=True, proj_size=P)
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
    assert [name for name, _ in ours.named_parameters()] == [
        f"{kind}_l{layer}{direction}"
        for layer in range(2)
        for direction in ["", "_reverse"]
        for kind in kinds
    ]


@each_option
def test_reset_parameters_draws_what_torch_draws(options, backend):
    native, ours = build_pair(backend=backend, **options)
    for module in (native, ours):
        torch.manual_seed(11)
        module.reset_parameters()
    for name, parameter in native.named_parameters():
        assert torch.equal(getattr(ours, name), parameter)
    compare(native, ours, make_input(batch_first=native.batch_first), backend=backend)


# Attributes


@each_option
def test_attributes(options):
    native, ours = build_pair(**options)
    assert ours.mode == "LSTM"
    for name in nn.LSTM.__constants__:
        assert getattr(ours, name) == getattr(native, name)
        assert type(getattr(ours, name)) is type(getattr(native, name))
    assert ours._flat_weights_names == native._flat_weights_names
    assert ours._all_weights == native._all_weights
    assert [id(w) for w in ours._flat_weights] == [id(p) for p in ours.parameters()]
    assert [[id(w) for w in layer] for layer in ours.all_weights] == [
        [id(getattr(ours, name)) for name in layer] for layer in native._all_weights
    ]
    assert list(ours.buffers()) == []
    assert list(ours.children()) == []


def test_all_weights_is_read_only():
    ours = fused_lstm.LSTM(I, H)
    with pytest.raises(AttributeError, match="all_weights"):
        ours.all_weights = []


def test_flat_weights_follow_an_assignment():
    ours = fused_lstm.LSTM(I, H, 2)
    replacement = nn.Parameter(torch.zeros(4 * H, H))
    ours.weight_hh_l1 = replacement
    assert ours._flat_weights[ours._flat_weights_names.index("weight_hh_l1")] is replacement
    assert ours.all_weights[1][1] is replacement


@pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), {"num_layers": 3, "dropout": 0.25}, {"bidirectional": 1}],
    ids=[*OPTIONS, "dropout", "truthy"],
)
def test_extra_repr(options):
    native, ours = build_pair(**options)
    assert ours.extra_repr() == native.extra_repr()
    assert repr(ours) == repr(native)
    assert str(nn.Sequential(ours)) == str(nn.Sequential(native))


@each_option
def test_flatten_parameters_is_harmless(options, backend):
    native, ours = build_pair(backend=backend, **options)
    before = [id(p) for p in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert [id(p) for p in ours.parameters()] == before
    compare(native, ours, make_input(batch_first=native.batch_first), backend=backend)


@each_option
def test_expected_sizes_of_the_states(options):
    native, ours = build_pair(**options)
    x = make_input(batch_first=native.batch_first)
    packed = torch.tensor([4, 2, 1])
    for arguments in [(x, None), (x[0], packed)]:
        for name in ["get_expected_hidden_size", "get_expected_cell_size"]:
            assert getattr(ours, name)(*arguments) == getattr(native, name)(*arguments)
    rows = native.num_layers * (2 if native.bidirectional else 1)
    assert ours.get_expected_cell_size(x, None) == (rows, B, H)
    assert ours.get_expected_hidden_size(x, packed) == (rows, 4, native.proj_size or H)


CHECK_INPUT = {
    "good": (torch.zeros(T, B, I), None),
    "packed": (torch.zeros(T, I), torch.tensor([B])),
    "dimensions": (torch.zeros(T, I), None),
    "packed-dimensions": (torch.zeros(T, B, I), torch.tensor([B])),
    "features": (torch.zeros(T, B, I + 1), None),
    "dtype": (torch.zeros(T, B, I, dtype=torch.float64), None),
    "dtype-and-dimensions": (torch.zeros(I, dtype=torch.float16), None),
}


@pytest.mark.parametrize("arguments", CHECK_INPUT.values(), ids=CHECK_INPUT)
def test_check_input(arguments):
    native, ours = build_pair()
    expected = outcome(lambda: native.check_input(*arguments))
    assert outcome(lambda: ours.check_input(*arguments)) == expected


@pytest.mark.parametrize("size", [(1, B, H), (1, B, H + 1), (2, B, H), (B, H)], ids=str)
def test_check_hidden_size_and_forward_args(size):
    native, ours = build_pair()
    state, good, x = torch.zeros(size), torch.zeros(1, B, H), torch.zeros(T, B, I)
    calls = [
        lambda module: module.check_hidden_size(state, (1, B, H)),
        lambda module: module.check_hidden_size(state, (1, B, H), "wanted {} but {}"),
        lambda module: module.check_forward_args(x, (state, good), None),
        lambda module: module.check_forward_args(x, (good, state), None),
    ]
    for call in calls:
        expected = outcome(lambda call=call: call(native))
        assert (expected.error is None) == (size == (1, B, H))
        assert outcome(lambda call=call: call(ours)) == expected


def test_permute_hidden():
    _, ours = build_pair()
    hx = make_hx(ours)
    assert ours.permute_hidden(hx, None) is hx
    order = torch.tensor([2, 0, 1])
    h, c = ours.permute_hidden(hx, order)
    assert torch.equal(h, hx[0][:, order])
    assert torch.equal(c, hx[1][:, order])


# Weights are read afresh


def assign_parameter(module, donor):
    module.weight_hh_l0 = nn.Parameter(donor.weight_hh_l0.detach().clone())


def assign_every_parameter(module, donor):
    for name, parameter in donor.named_parameters():
        setattr(module, name, nn.Parameter(parameter.detach().clone()))


def assign_to_the_dictionary(module, donor):
    module._parameters["weight_ih_l1"] = nn.Parameter(donor.weight_ih_l1.detach().clone())


def register_again(module, donor):
    module.register_parameter("bias_ih_l0", nn.Parameter(donor.bias_ih_l0.detach().clone()))


def assign_data(module, donor):
    module.weight_hh_l1.data = donor.weight_hh_l1.detach().clone()


def copy_in_place(module, donor):
    with torch.no_grad():
        module.weight_ih_l0.copy_(donor.weight_ih_l0)


def make_orthogonal_in_place(module, donor):
    nn.init.orthogonal_(module.weight_hh_l0)
    nn.init.zeros_(module.bias_hh_l0)


def drop_weights_by_hook(module, donor):
    raw = module._parameters.pop("weight_hh_l1")
    module.register_parameter("weight_hh_l1_raw", nn.Parameter(raw.detach().clone()))

    def redraw(module, arguments):
        module.weight_hh_l1 = nn.functional.dropout(module.weight_hh_l1_raw, 0.5)

    module.register_forward_pre_hook(redraw)


def normalise_weights(module, donor):
    parametrizations.weight_norm(module, "weight_hh_l0")


def normalise_and_remove(module, donor):
    parametrizations.weight_norm(module, "weight_hh_l0")
    module(make_input(size=H, dtype=torch.float64))
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)
    parametrize.remove_parametrizations(module, "weight_hh_l0")


def normalise_spectrally(module, donor):
    # Training would refine the estimate at every access of the weight, however many there are.
    parametrizations.spectral_norm(module, "weight_ih_l1", n_power_iterations=5)
    module.eval()


def keep_orthogonal(module, donor):
    parametrizations.orthogonal(module, "weight_hh_l0")


def parametrize_twice(module, donor):
    parametrizations.weight_norm(module, "weight_hh_l0")
    parametrizations.weight_norm(module, "weight_hh_l1")


def parametrize_in_float64(module, donor):
    parametrizations.weight_norm(module, "weight_ih_l0")
    module.to(torch.float32)
    module.to(torch.float64)


def normalise_weights_by_hook(module, donor):
    nn.utils.weight_norm(module, "weight_hh_l0")


def normalise_spectrally_by_hook(module, donor):
    nn.utils.spectral_norm(module, "weight_hh_l0")


def prune_by_magnitude(module, donor):
    prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)


def prune_rows(module, donor):
    prune.ln_structured(module, "weight_ih_l0", amount=0.3, n=2, dim=0)


def prune_and_remove(module, donor):
    prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
    module(make_input(size=H, dtype=torch.float64))
    prune.remove(module, "weight_hh_l0")


def tie_layers(module, donor):
    module.weight_hh_l1 = module.weight_hh_l0


def tie_biases_to_another_module(module, donor):
    module.bias_hh_l0 = donor.bias_hh_l0
    module.bias_hh_l1 = donor.bias_hh_l0


def freeze_some(module, donor):
    module.weight_hh_l0.data = donor.weight_hh_l0.data.clone()
    module.weight_ih_l1 = nn.Parameter(donor.weight_ih_l1.data.clone() * 2)


def go_through_float32(module, donor):
    module.float()
    module.double()


def go_through_to(module, donor):
    module.to(torch.bfloat16).to("cpu", torch.float64)


def load(module, donor):
    module.load_state_dict(donor.state_dict())


def load_by_assignment(module, donor):
    module.load_state_dict(copy.deepcopy(donor.state_dict()), assign=True)


def go_through_meta(module, donor):
    module.to_empty(device="meta")
    module.to_empty(device="cpu")
    module.load_state_dict(donor.state_dict())


def load_into_meta(module, donor):
    module.to(device="meta")
    module.load_state_dict(copy.deepcopy(donor.state_dict()), assign=True)


def share_memory(module, donor):
    module.share_memory()
    assert all(parameter.is_shared() for parameter in module.parameters())
    module.load_state_dict(donor.state_dict())


def from_vector(module, donor):
    vector = nn.utils.parameters_to_vector(donor.parameters())
    nn.utils.vector_to_parameters(vector, module.parameters())


def take_an_optimizer_step(module, donor):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    run(module, make_input(size=H, dtype=torch.float64))
    optimizer.step()


CHANGES = [
    assign_parameter,
    assign_every_parameter,
    assign_to_the_dictionary,
    register_again,
    assign_data,
    copy_in_place,
    make_orthogonal_in_place,
    drop_weights_by_hook,
    normalise_weights,
    normalise_and_remove,
    normalise_spectrally,
    keep_orthogonal,
    parametrize_twice,
    parametrize_in_float64,
    normalise_weights_by_hook,
    normalise_spectrally_by_hook,
    prune_by_magnitude,
    prune_rows,
    prune_and_remove,
    tie_layers,
    tie_biases_to_another_module,
    freeze_some,
    go_through_float32,
    go_through_to,
    load,
    load_by_assignment,
    go_through_meta,
    load_into_meta,
    share_memory,
    from_vector,
    take_an_optimizer_step,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_used_by_the_next_forward(change, backend):
    native, ours = build_pair(H, H, 2, dtype=torch.float64, backend=backend)
    x = make_input(size=H, dtype=torch.float64)
    for module in (native, ours):
        module(x)  # whatever a layer may remember, it remembers now
        torch.manual_seed(1)
        donor = nn.LSTM(H, H, 2, dtype=torch.float64)
        torch.manual_seed(2)
        change(module, donor)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in native.named_parameters()]
    hx = make_hx(native, dtype=torch.float64)
    first = compare(native, ours, x, hx, backend=backend)
    # A second time: no result of a parametrization is kept from the first.
    with torch.no_grad():
        for module in (native, ours):
            for parameter in module.parameters():
                parameter.mul_(1.5)
    second = compare(native, ours, x, hx, backend=backend)
    assert not torch.equal(first["output"], second["output"])


def test_a_deleted_parameter_is_replaced_by_a_tensor(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    for round_ in range(2):
        for module in (native, ours):
            if not round_:
                module(x)
                raw = module.weight_hh_l0
                del module.weight_hh_l0
                module.register_parameter("weight_hh_l0_raw", raw)
            keep = values(4 * H, H, seed=round_, dtype=torch.float64) > 0
            module.weight_hh_l0 = module.weight_hh_l0_raw * keep
        results = compare(native, ours, x, make_hx(native, dtype=torch.float64), backend=backend)
        assert torch.equal(results["grad of weight_hh_l0_raw"] != 0, keep)


def test_functional_call_uses_the_given_weights(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    before = ours(x)[0]
    gradients = []
    for module in (native, ours):
        weights = {
            name: values(*p.shape, seed=i, dtype=p.dtype).requires_grad_()
            for i, (name, p) in enumerate(native.named_parameters())
        }
        output, _ = torch.func.functional_call(module, weights, (x,))
        output.square().sum().backward()
        gradients.append([output.detach(), *(weight.grad for weight in weights.values())])
        assert all(parameter.grad is None for parameter in module.parameters())
    torch.testing.assert_close(gradients[1], gradients[0])
    # Afterwards the module is as it was.
    assert torch.equal(ours(x)[0], before)


def test_functional_call_of_a_part_of_the_weights_within_a_model(backend):
    native, ours = build_pair(I, H, dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    weight = values(4 * H, H, seed=3, dtype=torch.float64)
    outputs = [
        torch.func.functional_call(nn.ModuleDict({"rnn": module})["rnn"], changes, (x,))[0]
        for module in (native, ours)
        for changes in [{"weight_hh_l0": weight}]
    ]
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.equal(outputs[1], ours(x)[0])

    class Model(nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn = rnn

        def forward(self, x):
            return self.rnn(x)[0]

    nested = torch.func.functional_call(Model(ours), {"rnn.weight_hh_l0": weight}, (x,))
    torch.testing.assert_close(nested, outputs[0])


# Checkpoints and copies


@each_option
def test_state_dict_has_the_same_keys_values_and_metadata(options):
    native, ours = build_pair(**options)
    expected, actual = native.state_dict(), ours.state_dict()
    assert list(actual) == list(expected)
    assert actual._metadata == expected._metadata
    for name, value in expected.items():
        assert torch.equal(actual[name], value)
    prefixed = nn.ModuleDict({"encoder": ours}).state_dict()
    assert list(prefixed) == [f"encoder.{name}" for name in expected]


@each_option
def test_checkpoints_load_in_both_directions(options, backend):
    native, _ = build_pair(seed=1, **options)
    other, ours = build_pair(seed=2, backend=backend, **options)
    x = make_input(batch_first=native.batch_first)
    assert not ours.load_state_dict(native.state_dict()).missing_keys
    compare(native, ours, x, backend=backend)
    ours.load_state_dict(other.state_dict())
    native.load_state_dict(ours.state_dict())
    compare(native, ours, x, backend=backend)


def test_a_checkpoint_that_does_not_fit_is_refused():
    native, ours = build_pair(I, H, 2)
    for wrong in [nn.LSTM(I, H), nn.LSTM(I, H, 3), nn.LSTM(I, H + 1, 2), nn.LSTM(I, H, 2, False)]:
        expected = outcome(lambda wrong=wrong: native.load_state_dict(wrong.state_dict()))
        actual = outcome(lambda wrong=wrong: ours.load_state_dict(wrong.state_dict()))
        assert expected.error is RuntimeError
        assert actual == expected


@each_option
def test_pickle_and_deepcopy(options, backend):
    native, ours = build_pair(backend=backend, **options)
    x = make_input(batch_first=native.batch_first)
    run(ours, x)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    copies = [
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(stream, weights_only=False),
    ]
    for other in copies:
        assert type(other) is fused_lstm.LSTM
        assert repr(other) == repr(ours)
        assert other.training == ours.training
        for mine, its in zip(ours.parameters(), other.parameters(), strict=True):
            assert its is not mine
            assert torch.equal(its, mine)
        compare(native, other, x, backend=backend)
        with torch.no_grad():  # a copy is on its own
            other.weight_ih_l0.zero_()
        compare(native, ours, x, backend=backend)


def test_a_copy_in_evaluation_mode_stays_there():
    ours = fused_lstm.LSTM(I, H, 2, dropout=0.5).eval()
    assert not copy.deepcopy(ours).training
    assert not pickle.loads(pickle.dumps(ours)).training


def test_a_deepcopy_keeps_tied_weights_tied(backend):
    native, ours = build_pair(H, H, 2, backend=backend)
    for module in (native, ours):
        module.weight_hh_l1 = module.weight_hh_l0
    other = copy.deepcopy(ours)
    assert other.weight_hh_l1 is other.weight_hh_l0
    compare(native, other, make_input(size=H), backend=backend)


@each_option
def test_an_old_checkpoint_without_proj_size_loads(options, backend):
    options = {name: value for name, value in options.items() if name != "proj_size"}
    native, ours = build_pair(backend=backend, **options)
    state = dict(ours.__getstate__())
    del state["proj_size"]
    loaded = fused_lstm.LSTM.__new__(fused_lstm.LSTM)
    loaded.__setstate__(state)
    assert loaded.proj_size == 0
    compare(native, loaded, make_input(batch_first=native.batch_first), backend=backend)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}], ids=str
)
def test_an_old_checkpoint_with_lists_of_weights_loads(options, backend):
    native, ours = build_pair(backend=backend, **options)
    state = dict(ours.__getstate__())
    state["all_weights"] = ours.all_weights
    for name in ["proj_size", "_all_weights", "_flat_weights", "_flat_weights_names"]:
        state.pop(name, None)
    loaded = fused_lstm.LSTM.__new__(fused_lstm.LSTM)
    loaded.__setstate__(state)
    assert loaded._all_weights == native._all_weights
    assert loaded._flat_weights_names == native._flat_weights_names
    compare(native, loaded, make_input(), backend=backend)


def test_meta_layers_compute_shapes(backend):
    _, ours = build_pair(I, H, 2, bidirectional=True, device="meta", backend=backend)
    output, (h_n, c_n) = ours(torch.empty(T, B, I, device="meta"))
    assert output.is_meta
    assert output.shape == (T, B, 2 * H)
    assert h_n.shape == c_n.shape == (4, B, H)


def test_a_replica_has_weights_of_its_own(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x = make_input(dtype=torch.float64)
    expected = run(native, x)
    original = list(ours._flat_weights)
    replica = ours._replicate_for_data_parallel()
    assert isinstance(replica, fused_lstm.LSTM)
    assert replica._flat_weights is not ours._flat_weights
    assert replica._flat_weights_names is not ours._flat_weights_names
    # As `torch.nn.parallel.replicate` does it: the replica gets plain tensors.
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter * 1)
    assert all(a is b for a, b in zip(ours._flat_weights, original, strict=True))
    output, states = replica(x)
    torch.testing.assert_close(output, expected["output"])
    (output.sum() * 2 + states[0].sum() + states[1].sum()).backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


# Conversion


@each_option
def test_to_torch_is_an_equal_layer_with_the_same_parameters(options, backend):
    native, ours = build_pair(backend=backend, **options)
    ours.dropout = 0.25
    ours.eval()
    converted = ours.to_torch()
    assert type(converted) is nn.LSTM
    assert not converted.training
    for name in nn.LSTM.__constants__:
        assert getattr(converted, name) == getattr(ours, name)
    for mine, its in zip(ours.named_parameters(), converted.named_parameters(), strict=True):
        assert its[0] == mine[0]
        assert its[1] is mine[1]
    compare(native, converted, make_input(batch_first=native.batch_first))


def test_initialisation_loops_find_the_layer():
    model = nn.Sequential(nn.Linear(2, I), fused_lstm.LSTM(I, H))
    found = [module for module in model.modules() if isinstance(module, nn.LSTM)]
    assert found == [model[1]]
    for name, parameter in found[0].named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(parameter)
            parameter.data[H : 2 * H].fill_(1.0)
    assert model[1].bias_ih_l0.sum() == H
