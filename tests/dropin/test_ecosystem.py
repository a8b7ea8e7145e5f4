"""What surrounds a layer in practice: distribution, checkpointing, hooks, scripting, compilers."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_lstm

from .helpers import (
    OPTIONS,
    H,
    I,
    P,
    T,
    build_pair,
    compare,
    data_of,
    leaf,
    make_hx,
    make_input,
    run,
    tolerances,
    values,
    weighted_sum,
)

scripting_is_deprecated = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"
)


class Tagger(nn.Module):
    """A model around the layer."""

    def __init__(self, rnn: nn.Module, features: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(features, 2, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, states = self.rnn(x)
        return self.head(output) + states[0].sum()


def build_taggers(backend=None, **options):
    native, ours = build_pair(dtype=torch.float64, backend=backend, **options)
    features = (native.proj_size or H) * (2 if native.bidirectional else 1)
    tagger = Tagger(native, features)
    other = Tagger(ours, features)
    other.head.load_state_dict(tagger.head.state_dict())
    return tagger, other


def train(model, x):
    model.zero_grad()
    result = model(x)
    result.square().sum().backward()
    return [result.detach(), *(parameter.grad for parameter in model.parameters())]


# Distribution


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.usefixtures("process_group")
class TestDistributed:
    @pytest.mark.parametrize(
        "options", [{}, OPTIONS["projected-everything"]], ids=["plain", "projected-everything"]
    )
    def test_distributed_data_parallel(self, options, backend):
        tagger, other = build_taggers(backend, **options)
        parallel = nn.parallel.DistributedDataParallel(other)
        x = make_input(dtype=torch.float64)
        for _ in range(2):
            expected, actual = train(tagger, x), train(parallel, x)
            torch.testing.assert_close(actual, expected, **tolerances(torch.float64, backend))

    def test_distributed_data_parallel_waits_for_every_parameter(self, backend):
        """A loss that leaves half of the parameters unused, twice."""
        native, ours = build_pair(I, H, 2, bidirectional=True, backend=backend)
        models = [nn.parallel.DistributedDataParallel(module) for module in (native, ours)]
        for model in models:
            for _ in range(2):
                output, _ = model(make_input())
                output[0, :, :H].sum().backward()
        for name, parameter in native.named_parameters():
            torch.testing.assert_close(getattr(ours, name).grad, parameter.grad)

    def test_distributed_data_parallel_with_a_static_graph_and_views(self, backend):
        tagger, other = build_taggers(backend)
        parallel = nn.parallel.DistributedDataParallel(
            other, static_graph=True, gradient_as_bucket_view=True
        )
        x = make_input(dtype=torch.float64)
        for _ in range(2):
            expected, actual = train(tagger, x), train(parallel, x)
            torch.testing.assert_close(actual, expected, **tolerances(torch.float64, backend))

    @pytest.mark.parametrize(
        "options", [{}, OPTIONS["projected-everything"]], ids=["plain", "projected-everything"]
    )
    def test_fully_shard(self, options, backend):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        native, ours = build_pair(dtype=torch.float64, backend=backend, **options)
        x = make_input(dtype=torch.float64)
        fully_shard(ours, mesh=mesh)
        assert isinstance(ours, fused_lstm.LSTM)
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (native, ours)]
        for _ in range(3):  # the sharded weights are gathered anew each time
            for module, optimizer in zip((native, ours), optimizers, strict=True):
                optimizer.zero_grad()
                output, states = module(x)
                weighted_sum([output, *states]).backward()
                optimizer.step()
        for name, parameter in native.named_parameters():
            sharded = getattr(ours, name)
            assert isinstance(sharded, DTensor)
            torch.testing.assert_close(
                sharded.grad.full_tensor(), parameter.grad, rtol=1e-9, atol=1e-12
            )
            torch.testing.assert_close(sharded.full_tensor(), parameter, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_one_model(tmp_path):
    """Each rank has half of the batch; together they have the gradient of the whole."""
    script = Path(__file__).parent / "two_processes.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "store"), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would move the model to the GPUs")
def test_data_parallel_without_a_gpu(backend):
    tagger, other = build_taggers(backend)
    x = make_input(dtype=torch.float64)
    torch.testing.assert_close(train(nn.DataParallel(other), x), train(tagger, x))


# Checkpointing


class Flat(nn.Module):
    """The layer with tensors only: reentrant checkpointing sees no others."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, *hx):
        output, states = self.rnn(x, hx or None)
        return output, *states


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("with_states", [True, False], ids=["states", "no-states"])
def test_checkpointing_repeats_the_same_dropout(use_reentrant, with_states, backend):
    native, ours = build_pair(I, H, 3, dropout=0.5, dtype=torch.float64, backend=backend)
    results = []
    for module in (native, ours):
        x = leaf(make_input(dtype=torch.float64))
        hx = [leaf(state) for state in make_hx(native, dtype=torch.float64) if with_states]
        torch.manual_seed(7)
        tensors = checkpoint(Flat(module), x, *hx, use_reentrant=use_reentrant)
        weighted_sum(tensors).backward()
        gradients = [tensor.grad for tensor in (x, *hx, *module.parameters())]
        results.append([*(tensor.detach() for tensor in tensors), *gradients])
    torch.testing.assert_close(results[1], results[0], **tolerances(torch.float64, backend))
    # As without checkpointing.
    expected = run(native, x.detach(), hx or None)
    torch.testing.assert_close(results[1][0], expected["output"])
    torch.testing.assert_close(results[1][3], expected["grad of input"])
    torch.testing.assert_close(results[1][-1], expected["grad of bias_hh_l2"])


def test_checkpointing_the_layer_itself(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    x, hx = make_input(dtype=torch.float64), make_hx(native, dtype=torch.float64)
    expected = run(native, x, hx)
    x, hx = leaf(x), tuple(leaf(state) for state in hx)
    output, (h_n, c_n) = checkpoint(ours, x, hx, use_reentrant=False)
    weighted_sum([output, h_n, c_n]).backward()
    for tensor, name in [(x, "input"), (hx[0], "h0"), (hx[1], "c0")]:
        torch.testing.assert_close(tensor.grad, expected[f"grad of {name}"])


# Hooks


def test_forward_hooks_see_what_torchs_see(backend):
    native, ours = build_pair(I, H, 2, backend=backend)
    x, hx = make_input(), make_hx(native)
    seen = {}
    for name, module in (("native", native), ("ours", ours)):
        log = seen[name] = []
        module.register_forward_pre_hook(
            lambda module, args, kwargs, log=log: log.append(("pre", len(args), sorted(kwargs))),
            with_kwargs=True,
        )
        module.register_forward_hook(
            lambda module, args, result, log=log: log.append(
                ("post", len(args), type(result), type(result[1]), result[0].shape)
            )
        )
        module(x)
        module(x, hx)
        module(x, hx=hx)
    assert seen["ours"] == seen["native"]
    assert len(seen["ours"]) == 6


def test_hooks_can_change_input_and_result(backend):
    native, ours = build_pair(I, H, dtype=torch.float64, backend=backend)
    for module in (native, ours):
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    compare(native, ours, make_input(dtype=torch.float64), backend=backend)


def test_backward_hooks_see_what_torchs_see(backend):
    native, ours = build_pair(I, H, 2, dtype=torch.float64, backend=backend)
    gradients = []
    for module in (native, ours):
        seen = []
        module.register_full_backward_pre_hook(lambda module, go, seen=seen: seen.append(go[0]))
        module.register_full_backward_hook(
            lambda module, gi, go, seen=seen: seen.extend([gi[0], go[0]])
        )
        x = leaf(make_input(dtype=torch.float64))
        module(x)[0].square().sum().backward()
        assert len(seen) == 3
        assert torch.equal(seen[1], x.grad)
        gradients.append(seen)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_hooks_on_checkpoints(backend):
    _, ours = build_pair(backend=backend)
    ours.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({f"{prefix}extra": torch.ones(1)})
    )
    ours.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *rest: state.pop(f"{prefix}extra")
    )
    state = nn.Sequential(ours).state_dict()
    assert "0.extra" in state
    nn.Sequential(ours).load_state_dict(state)


# Training


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_training_goes_the_same_way(optimizer, backend):
    tagger, other = build_taggers(backend, num_layers=2, bidirectional=True)
    x = make_input(dtype=torch.float64)
    losses = []
    for model in (tagger, other):
        steps = optimizer(model.parameters(), lr=0.05)

        def closure(model=model, steps=steps):
            steps.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss

        losses.append([steps.step(closure).item() for _ in range(5)])
    assert losses[1][-1] < losses[1][0]
    # The curvature estimate of LBFGS amplifies rounding errors.
    rel = 1e-5 if optimizer is torch.optim.LBFGS else 1e-8
    assert losses[1] == pytest.approx(losses[0], rel=rel)


def test_averaged_models_copy_the_layer(backend):
    tagger, other = build_taggers(backend)
    x = make_input(dtype=torch.float64)
    averages = []
    for model in (tagger, other):
        average = torch.optim.swa_utils.AveragedModel(model)
        train(model, x)
        average.update_parameters(model)
        averages.append(average(x))
    torch.testing.assert_close(averages[1], averages[0])


def test_layers_in_containers(backend):
    native, ours = build_pair(backend=backend)
    model = nn.ModuleDict({"layers": nn.ModuleList([ours, copy.deepcopy(ours)])})
    names = [f"layers.{i}.{name}" for i in range(2) for name, _ in native.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == names
    assert [m for m in model.modules() if isinstance(m, nn.LSTM)] == list(model["layers"])


# TorchScript


@scripting_is_deprecated
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript ends with Python 3.13")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_model_around_the_layer_can_be_scripted(options, backend, tmp_path):
    _, model = build_taggers(backend, **options)
    x = make_input(dtype=torch.float64, batch_first=model.rnn.batch_first)
    expected = train(model, x)
    scripted = torch.jit.script(model)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(scripted(x), expected[0], **close)
    # The scripted model trains the same parameters.
    model.zero_grad()
    scripted(x).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients, expected[1:], **close)
    path = str(tmp_path / "model.pt")
    scripted.save(path)
    torch.testing.assert_close(torch.jit.load(path)(x), expected[0], **close)
    # Scripting puts the prepared layer into the model itself, which still works.
    torch.testing.assert_close(model(x), expected[0], **close)


# Compilers


def test_import_leaves_the_compilers_settings_alone():
    import torch._dynamo

    assert torch._dynamo.config.allow_rnn is False


def test_a_compiled_model_with_a_graph_break(backend):
    tagger, other = build_taggers(backend)
    x = make_input(dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="eager")
    torch.testing.assert_close(train(compiled, x), train(tagger, x))


# Quantisation


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.skipif(
    not {"fbgemm", "x86", "onednn", "qnnpack"} & set(torch.backends.quantized.supported_engines),
    reason="torch without quantised kernels",
)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_quantisation_through_to_torch(options):
    from torch.ao.quantization import quantize_dynamic

    class Encoder(nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn = rnn

        def forward(self, x):
            return self.rnn(x)[0]

    native, ours = build_pair(**options)
    x = make_input()
    quantised = [
        quantize_dynamic(Encoder(rnn).eval(), {nn.LSTM}, dtype=torch.qint8)
        for rnn in (native, ours.to_torch())
    ]
    assert "quantized" in type(quantised[1].rnn).__module__
    torch.testing.assert_close(quantised[1](x), quantised[0](x))
    # Quantisation took place: close to the layer, but not equal to it.
    assert not torch.equal(quantised[1](x), native(x)[0])
    torch.testing.assert_close(quantised[1](x), native(x)[0], rtol=0, atol=0.05)


# Devices


def test_moving_between_dtypes_and_back(backend):
    native, ours = build_pair(I, H, 2, proj_size=P, backend=backend)
    for dtype in [torch.float64, torch.bfloat16, torch.float16, torch.float32]:
        native.to(dtype)
        ours.to(dtype)
        compare(native, ours, make_input(dtype=dtype), backend=backend)


def test_two_layers_in_turn(backend):
    """Nothing is remembered from one layer or one shape to the next."""
    first, second = build_pair(seed=1, backend=backend), build_pair(seed=2, backend=backend)
    for steps in [3, T, 1]:
        for native, ours in (first, second):
            x = values(steps, 2, I, seed=steps)
            compare(native, ours, x, backend=backend)
            assert data_of(x).shape[0] == steps
