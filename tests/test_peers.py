"""The providers of other packages: ONNX Runtime itself, the others by what they document.

FlashRNN and TorchRL need a GPU. What is tested of them is what we do: how torch's parameters,
inputs and gradients become theirs and back. In their place stand recurrences written from their
documentation of layouts.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import peers
from benchmarks.peers import PEERS, flash_rnn, peer, torch_rl
from fused_lstm.bench import cases
from fused_lstm.bench.cases import Case, Shape
from fused_lstm.bench.providers import UnavailableError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ONNX_RUNTIME, FLASH_RNN, TORCH_RL = PEERS


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnx", reason="onnx is not installed")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def run_torch(case, parameters, data, dtype):
    layer = cases.torch_layer(case, parameters, CPU, dtype)
    return [each.detach() for each in cases.run_layer(layer, data.to(dtype))]


def assert_as_torch(call, case, parameters, data) -> None:
    """Compare everything a call returns with torch's, in float64, where little is allowed."""
    expected = run_torch(case, parameters, data, torch.float64)
    names = cases.result_names(case, "training", parameters)
    actual = call(data)
    assert len(actual) == len(names) == len(expected)
    for name, mine, theirs in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-12, atol=1e-12, msg=name)
    with torch.no_grad():
        inference = call(data)
    assert len(inference) == 3
    for mine, theirs in zip(inference, expected[:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_peers_are_named_after_their_packages() -> None:
    assert [each.name for each in PEERS] == ["onnxruntime", "flashrnn", "torchrl"]
    assert {each.error_factor for each in PEERS} == {8.0}
    case = Case(Shape(3, 2, 4, 5), "float32")
    launches = {
        each.name: [each.launches(case, "training", device) for device in (CPU, CUDA)]
        for each in PEERS
    }
    assert launches == {
        "onnxruntime": [("eager",), ("eager",)],
        "flashrnn": [("eager",), ("eager",)],
        "torchrl": [("eager",), ("eager", "graph")],
    }


def test_versions_are_of_what_is_installed_and_import_nothing(monkeypatch) -> None:
    installed = {"onnxruntime": "1.2.3", "torchrl": "0.1"}
    monkeypatch.setattr(peers, "installed_version", installed.get)
    for name in ("onnx", "onnxruntime", "flashrnn", "torchrl"):
        # Importing it now is an error.
        monkeypatch.setitem(sys.modules, name, None)
    assert peers.versions() == installed


# What cannot be done.

LAYER = Shape(3, 2, 4, 5)

ONNX_CANNOT = [
    (LAYER, "float32", CUDA, "inference", "device = 'cuda:0': ONNX Runtime runs on a cpu device"),
    (LAYER, "float32", CPU, "training", "mode = 'training': ONNX Runtime does inference only"),
    *(
        (
            LAYER,
            dtype,
            CPU,
            "inference",
            f"dtype = '{dtype}': ONNX Runtime has no LSTM for this on a CPU; "
            "it takes float32 or float16",
        )
        for dtype in ("bfloat16", "tf32", "float64")
    ),
    (
        Shape(3, 2, 4, 5, proj_size=2),
        "float32",
        CPU,
        "inference",
        "proj_size = 2: ONNX Runtime has an LSTM without a projection",
    ),
    (
        Shape(3, 2, 4, 5, packed=True),
        "float32",
        CPU,
        "inference",
        "packed = True: ONNX Runtime takes padded sequences alone, and padding would be timed "
        "with it",
    ),
]

FLASH_CANNOT = [
    (LAYER, "bfloat16", CPU, "training", "device = 'cpu': FlashRNN runs on a cuda device"),
    *(
        (
            LAYER,
            dtype,
            CUDA,
            "training",
            f"dtype = '{dtype}': FlashRNN multiplies on tensor cores; "
            "it takes bfloat16 or float16 or tf32",
        )
        for dtype in ("float32", "float64")
    ),
    *(
        (Shape(3, 2, 4, 5, **option), "bfloat16", CUDA, "inference", message)
        for option, message in (
            ({"num_layers": 2}, "num_layers = 2: FlashRNN has one layer"),
            ({"bidirectional": True}, "bidirectional = True: FlashRNN has one direction"),
            ({"proj_size": 2}, "proj_size = 2: FlashRNN has no projection"),
            ({"packed": True}, "packed = True: FlashRNN takes sequences of one length"),
            ({"cell": True}, "cell = True: FlashRNN has no cell"),
        )
    ),
]

TORCH_RL_CANNOT = [
    (
        LAYER,
        "float32",
        CPU,
        "training",
        "device = 'cpu': TorchRL's Triton LSTM runs on a cuda device",
    ),
    *(
        (
            LAYER,
            dtype,
            CUDA,
            "training",
            f"dtype = '{dtype}': TorchRL's Triton LSTM keeps its tensors in float32; "
            "it takes float32 or tf32",
        )
        for dtype in ("bfloat16", "float16", "float64")
    ),
    *(
        (Shape(3, 2, 4, 5, **option), "float32", CUDA, "inference", message)
        for option, message in (
            (
                {"bidirectional": True},
                "bidirectional = True: TorchRL's Triton LSTM has one direction",
            ),
            ({"proj_size": 2}, "proj_size = 2: TorchRL's Triton LSTM has no projection"),
            (
                {"packed": True},
                "packed = True: TorchRL's Triton LSTM takes sequences of one length",
            ),
            ({"cell": True}, "cell = True: TorchRL's Triton LSTM has no cell"),
        )
    ),
]


@pytest.mark.parametrize(
    ("provider", "shape", "dtype", "device", "mode", "message"),
    [
        (provider, *row)
        for provider, rows in zip(PEERS, (ONNX_CANNOT, FLASH_CANNOT, TORCH_RL_CANNOT), strict=True)
        for row in rows
    ],
)
def test_what_a_peer_cannot_do_is_said_whether_or_not_it_is_installed(
    monkeypatch, provider, shape, dtype, device, mode, message
) -> None:
    monkeypatch.setattr(peer, "installed_version", lambda package: None)
    with pytest.raises(UnavailableError) as caught:
        provider.prepare(Case(shape, dtype), {}, device, mode)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("provider", "dtype", "device", "message"),
    [
        (
            ONNX_RUNTIME,
            "float32",
            CPU,
            "ONNX Runtime is not installed: pip install onnx onnxruntime",
        ),
        (FLASH_RNN, "bfloat16", CUDA, "FlashRNN is not installed: pip install flashrnn"),
        (TORCH_RL, "tf32", CUDA, "TorchRL's Triton LSTM is not installed: pip install torchrl"),
    ],
)
def test_a_peer_that_is_not_installed_says_what_to_install(
    monkeypatch, provider, dtype, device, message
) -> None:
    monkeypatch.setattr(peer, "installed_version", lambda package: None)
    with pytest.raises(UnavailableError) as caught:
        provider.prepare(Case(LAYER, dtype), {}, device, "inference")
    assert str(caught.value) == message


@pytest.mark.parametrize("provider", PEERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("error", [ImportError("no einops"), OSError("no CUDA_HOME")])
def test_a_peer_that_cannot_be_imported_says_why(monkeypatch, provider, error) -> None:
    def fail(module):
        raise error

    monkeypatch.setattr(peer, "installed_version", lambda package: "1.0")
    monkeypatch.setattr(importlib, "import_module", fail)
    device = torch.device(provider.device_type)
    with pytest.raises(UnavailableError, match=rf"{provider.title} cannot import \S+: {error}"):
        provider.prepare(Case(LAYER, provider.dtypes[0]), {}, device, "inference")


# ONNX Runtime.


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 3, 4),
        Shape(7, 3, 5, 6),
        Shape(7, 3, 5, 6, batch_first=True),
        Shape(7, 3, 5, 6, num_layers=3),
        Shape(7, 3, 5, 6, bidirectional=True),
        Shape(7, 3, 5, 6, num_layers=2, bidirectional=True, batch_first=True),
        Shape(1, 3, 5, 6, cell=True),
    ],
    ids=lambda shape: shape.name,
)
def test_onnx_runtime_computes_what_torch_does(onnxruntime, shape, dtype) -> None:
    case = Case(shape, dtype)
    parameters = cases.make_parameters(case, CPU)
    prepared = ONNX_RUNTIME.prepare(case, parameters, CPU, "inference")
    assert prepared.backend == f"onnxruntime {onnxruntime.__version__}, CPUExecutionProvider"
    assert ("float32" in prepared.reason) == (dtype == "float16")
    count = len(cases.result_names(case, "inference", parameters))
    data = [cases.make_data(case, CPU, seed) for seed in range(2)]
    with torch.no_grad():
        results = [prepared.call(each) for each in data]
    # Results of a call outlive the next.
    for each, actual in zip(data, results, strict=True):
        exact = run_torch(case, parameters, each, torch.float64)[:count]
        native = run_torch(case, parameters, each, case.dtype)[:count]
        budgets = cases.error_budgets(cases.largest_errors(native, exact), exact, case.eps)
        errors = cases.largest_errors(actual, exact)
        assert all(result.dtype == case.dtype for result in actual)
        for error, budget in zip(errors, budgets, strict=True):
            assert error <= ONNX_RUNTIME.error_factor * budget


def test_onnx_runtime_takes_torchs_threads_and_does_not_spin_after_a_call(
    onnxruntime, monkeypatch
) -> None:
    seen = []
    session = onnxruntime.InferenceSession

    def record(model, options, **keywords):
        seen.append(options)
        return session(model, options, **keywords)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    torch.set_num_threads(2)
    case = Case(LAYER, "float32")
    prepared = ONNX_RUNTIME.prepare(case, cases.make_parameters(case, CPU), CPU, "inference")
    (options,) = seen
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    prepared.call(cases.make_data(case, CPU))
    assert len(seen) == 1


# FlashRNN.


def documented_flashrnn(Wx, R, b, states, config):
    """Compute as FlashRNN's README says, with its input_shape TBGHD and output_shape STBHD.

    Raw gates are Wx + R h + b, in the order i, f, z, o; R [G, N, D, P] maps P units of the step
    before to D.
    """
    T, B, _, N, D = Wx.shape
    assert Wx.shape[2] == 4
    assert R.shape == (4, N, D, D)
    assert b.shape == (4, N, D)
    assert states.shape == (2, 1, B, N, D)
    h, c = states[:, 0]
    steps = []
    for t in range(T):
        raw = Wx[t] + torch.einsum("gndp,bnp->bgnd", R, h) + b
        i, f, z, o = raw.unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.tanh(c)
        steps.append(torch.stack((h, c)))
    every = torch.stack(steps, 1)
    return every, every[:, -1:]


@pytest.mark.parametrize("backend", flash_rnn.BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_flashrnn_is_given_torchs_layer(backend, batch_first) -> None:
    case = Case(Shape(4, 3, 5, 6, batch_first=batch_first), "float64")
    parameters = cases.make_parameters(case, CPU)
    call = flash_rnn.make_call(documented_flashrnn, None, case, parameters, backend)
    for seed in range(2):
        assert_as_torch(call, case, parameters, cases.make_data(case, CPU, seed))


@pytest.mark.parametrize(
    ("backend", "input_order", "R_order", "b_order"),
    [("cuda_fused", "TBHDG", "HDGP", "HDG"), ("cuda", "TBHGD", "HPGD", "HGD")],
)
def test_flashrnn_has_nothing_to_copy(backend, input_order, R_order, b_order) -> None:
    """Its kernels take these orders (H: heads), and it copies what is not in them."""
    case = Case(Shape(4, 3, 5, 6), "float32")
    seen = []

    def record(Wx, R, b, states, config):
        seen.extend(((Wx, "TBGHD", input_order), (R, "GHDP", R_order), (b, "GHD", b_order)))
        return documented_flashrnn(Wx, R, b, states, config)

    parameters = cases.make_parameters(case, CPU)
    call = flash_rnn.make_call(record, None, case, parameters, backend)
    with torch.no_grad():
        call(cases.make_data(case, CPU))
    assert len(seen) == 3
    for tensor, given, kept in seen:
        assert tensor.permute([given.index(letter) for letter in kept]).is_contiguous()


def test_flashrnn_is_configured_for_the_case() -> None:
    shape = Shape(3, 2, 4, 5)
    of_bfloat16 = flash_rnn.config_arguments(Case(shape, "bfloat16"), "cuda")
    assert of_bfloat16 == {
        "backend": "cuda",
        "function": "lstm",
        "num_heads": 1,
        "head_dim": 5,
        "batch_size": 2,
        "dtype": "bfloat16",
        "input_shape": "TBGHD",
        "output_shape": "STBHD",
    }
    assert flash_rnn.config_arguments(Case(shape, "tf32"), "cuda")["dtype"] == "float32"


def flashrnn_package(errors, tried):
    """Make a package whose backends raise the given errors."""

    def run(Wx, R, b, states, config):
        tried.append(config.backend)
        if config.backend in errors:
            raise errors[config.backend]
        return documented_flashrnn(Wx, R, b, states, config)

    return SimpleNamespace(flashrnn=run, FlashRNNConfig=SimpleNamespace)


def build_on_cpu(monkeypatch, provider, package, shape, dtype="tf32"):
    monkeypatch.setattr(peer, "installed_version", lambda name: "1.0")
    monkeypatch.setattr(type(provider), "_import", lambda self, module: package)
    case = Case(shape, dtype)
    return provider._build(case, cases.make_parameters(case, CPU), CPU, "training")


UNSOLVED = ValueError("No solution of constraints for CUDA module\nand more")


@pytest.mark.parametrize(
    ("errors", "H", "backend", "reason"),
    [
        ({}, 64, "cuda_fused", ""),
        (
            {"cuda_fused": UNSOLVED},
            64,
            "triton_fused",
            "cuda_fused: ValueError: No solution of constraints for CUDA module",
        ),
        # Its Triton kernel ends at 64 units.
        (
            {"cuda_fused": UNSOLVED},
            65,
            "cuda",
            "cuda_fused: ValueError: No solution of constraints for CUDA module",
        ),
        (
            {"cuda_fused": RuntimeError("no nvcc"), "triton_fused": AssertionError()},
            6,
            "cuda",
            "cuda_fused: RuntimeError: no nvcc; triton_fused: AssertionError: ",
        ),
    ],
)
def test_flashrnn_takes_its_best_backend_that_runs(monkeypatch, errors, H, backend, reason) -> None:
    tried = []
    package = flashrnn_package(errors, tried)
    prepared = build_on_cpu(monkeypatch, FLASH_RNN, package, Shape(2, 2, 3, H))
    assert prepared.backend == f"flashrnn 1.0, {backend}"
    assert prepared.reason == reason
    assert tried == [*errors, backend]


def test_flashrnn_without_a_backend_names_every_refusal(monkeypatch) -> None:
    errors = {backend: RuntimeError(f"{backend} is broken") for backend in flash_rnn.BACKENDS}
    with pytest.raises(UnavailableError) as caught:
        build_on_cpu(monkeypatch, FLASH_RNN, flashrnn_package(errors, []), LAYER)
    for backend in flash_rnn.BACKENDS:
        assert f"{backend}: RuntimeError: {backend} is broken" in str(caught.value)


@pytest.mark.parametrize("error", [torch.AcceleratorError("device-side assert"), TypeError("ours")])
def test_flashrnn_passes_on_what_is_no_refusal(monkeypatch, error) -> None:
    package = flashrnn_package({"cuda_fused": error}, [])
    with pytest.raises(type(error), match=str(error)):
        build_on_cpu(monkeypatch, FLASH_RNN, package, LAYER)


# TorchRL.


def documented_lstm_triton(x, h, c, w_ih, w_hh, b_ih, b_hh, is_init, *, input_precision):
    """Compute as TorchRL's docstrings say: x, h and c by batch, and h[:, t] where a row begins."""
    assert input_precision in ("ieee", "tf32", "tf32x3")
    B, T, _ = x.shape
    assert x.is_contiguous()
    assert h.shape == c.shape == (B, T, w_hh.shape[1])
    assert is_init.shape == (B, T)
    assert is_init.dtype == torch.bool
    h_t, c_t = h[:, 0], c[:, 0]
    h_steps, c_steps = [], []
    for t in range(T):
        begins = is_init[:, t, None]
        h_t, c_t = torch.where(begins, h[:, t], h_t), torch.where(begins, c[:, t], c_t)
        gates = x[:, t] @ w_ih.t() + b_ih + h_t @ w_hh.t() + b_hh
        i, f, g, o = gates.chunk(4, dim=1)
        c_t = torch.sigmoid(f) * c_t + torch.sigmoid(i) * torch.tanh(g)
        h_t = torch.sigmoid(o) * torch.tanh(c_t)
        h_steps.append(h_t)
        c_steps.append(c_t)
    return torch.stack(h_steps, 1), torch.stack(c_steps, 1), h_t, c_t


@pytest.mark.parametrize(
    ("num_layers", "batch_first"), list(itertools.product((1, 3), (False, True)))
)
def test_torchrl_is_given_torchs_layers(num_layers, batch_first) -> None:
    case = Case(Shape(4, 3, 5, 6, num_layers=num_layers, batch_first=batch_first), "float64")
    parameters = cases.make_parameters(case, CPU)
    call = torch_rl.make_call(documented_lstm_triton, case, parameters, CPU)
    # Its starting states are buffers: the second call must not see the first one's.
    for seed in range(2):
        assert_as_torch(call, case, parameters, cases.make_data(case, CPU, seed))


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee"), ("tf32", "tf32")])
def test_torchrl_multiplies_as_the_case_says(monkeypatch, dtype, precision) -> None:
    seen = []

    def record(*arguments, input_precision):
        # TorchRL reads this switch itself, and reading it fails where torch's two disagree.
        seen.append((input_precision, torch.backends.cuda.matmul.allow_tf32))
        return documented_lstm_triton(*arguments, input_precision=input_precision)

    package = SimpleNamespace(lstm_triton=record)
    prepared = build_on_cpu(monkeypatch, TORCH_RL, package, LAYER, dtype)
    assert prepared.backend == "torchrl 1.0, lstm_triton"
    assert prepared.reason == f"input_precision='{precision}'"
    assert seen == [(precision, dtype == "tf32")]


def test_torchrl_leaves_the_switches_of_tf32_as_they_were() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with cases.products_of(Case(LAYER, "tf32")):
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = matmul.allow_tf32
        with torch_rl.switches_agree():
            assert matmul.allow_tf32
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = matmul.allow_tf32
    assert matmul.fp32_precision == before
    assert not matmul.allow_tf32


def test_torchrl_says_which_size_its_kernels_refuse(monkeypatch) -> None:
    errors = pytest.importorskip("triton.errors", reason="triton is not installed")

    def refuse(*arguments, **keywords):
        raise errors.TritonError("out of resource: shared memory")

    with pytest.raises(UnavailableError) as caught:
        build_on_cpu(monkeypatch, TORCH_RL, SimpleNamespace(lstm_triton=refuse), LAYER)
    assert str(caught.value) == (
        "H = 5: TorchRL's Triton LSTM does not compile or fit: out of resource: shared memory"
    )


def test_torchrl_of_another_version_is_told_apart(monkeypatch) -> None:
    with pytest.raises(
        UnavailableError, match=r"torchrl 1\.0 has no lstm_triton in .*expected 0\.14"
    ):
        build_on_cpu(monkeypatch, TORCH_RL, SimpleNamespace(), LAYER)
