"""The choice of a backend, its reasons, and what happens when a kernel fails."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from fused_lstm.kernels.cpu import PlainLayers, library
from torch import nn

import fused_lstm
from fused_lstm import (
    BackendUnavailableError,
    KernelFallbackWarning,
    backends,
    explain,
    functional,
    ops,
)
from fused_lstm.backends import Problem, Support, native
from fused_lstm.backends.reference import ReferenceBackend
from fused_lstm.devices import describe_device


def make_problem(device: str = "cpu", dtype: torch.dtype = torch.float32, **options) -> Problem:
    return Problem(describe_device(device), dtype, 10, 4, 16, **options)


def native_is_there() -> bool:
    try:
        library.load()
    except library.LibraryUnavailableError:
        return False
    return True


class BrokenKernel(ReferenceBackend):
    """Takes every problem, and fails as a compiler would."""

    name = "broken"

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.launches = 0

    def supports(self, problem: Problem) -> Support:
        return Support(not problem.whole_layers, "a broken kernel")

    def forward(self, *arguments):
        self.launches += 1
        raise self.error

    def backward(self, *arguments):
        self.launches += 1
        raise self.error


@pytest.fixture
def clean_choices():
    """Forget cached choices and failures, before and after."""

    def forget() -> None:
        backends.supports.cache_clear()
        backends._first_default.cache_clear()
        ops._failed.clear()

    forget()
    yield
    forget()


@pytest.fixture
def install(monkeypatch, clean_choices):
    def put_first(backend):
        monkeypatch.setitem(backends._BACKENDS, backend.name, backend)
        monkeypatch.setattr(backends, "ORDER", (backend.name, *backends.ORDER))
        return backend

    return put_first


# What a CPU has by default for layers, and for one recurrence, in float32 and float64.
LAYERS, RECURRENCE = ("native", "native") if native_is_there() else ("aten", "reference")


def test_the_order() -> None:
    assert backends.ORDER == ("native", "cuda", "triton", "aten", "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cpu_gets_the_native_kernels_for_layers_and_for_one_recurrence(dtype) -> None:
    assert backends.select_backend(make_problem(dtype=dtype, whole_layers=True)) == LAYERS
    assert backends.select_backend(make_problem(dtype=dtype)) == RECURRENCE


def test_float16_gets_torchs_own_layers_and_one_recurrence_the_reference() -> None:
    dtype = torch.float16
    assert backends.select_backend(make_problem(dtype=dtype, whole_layers=True)) == "aten"
    assert backends.select_backend(make_problem(dtype=dtype)) == "reference"


@pytest.fixture
def products_of_bfloat16(monkeypatch):
    """Says whether the CPU has instructions for them, and the kernels use them."""

    def say(has_them: bool, kernels: bool = False, tiles: bool = False) -> None:
        monkeypatch.setattr(native, "multiplies_bfloat16", lambda: has_them)
        monkeypatch.setattr(native, "multiplies_tiles", lambda: tiles)
        monkeypatch.setattr(native, "kernels_multiply_bfloat16", lambda: kernels)
        forget()

    def forget() -> None:
        backends.supports.cache_clear()
        backends._first_default.cache_clear()

    yield say
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    ("hidden_size", "batch", "training", "default"),
    [
        (64, 8, False, LAYERS),
        (64, 8, True, LAYERS),
        (64, 64, False, "aten"),
        (64, 64, True, "aten"),
        (128, 8, False, "aten"),
        (256, 16, True, "aten"),
        (512, 1, False, "aten"),
        (512, 1, True, LAYERS),
    ],
)
def test_products_of_bfloat16_are_left_to_onednn_where_the_cpu_has_them(
    hidden_size, batch, training, default, products_of_bfloat16
):
    products_of_bfloat16(True)
    problem = make_problem(dtype=torch.bfloat16, training=training, whole_layers=True)
    problem = problem._replace(hidden_size=hidden_size, batch=batch)
    assert backends.select_backend(problem) == default


@pytest.mark.parametrize("size", [(32, 1), (64, 64), (512, 1), (1024, 4)])
def test_inference_in_bfloat16_is_ours_where_the_kernels_multiply_it(size, products_of_bfloat16):
    problem = make_problem(dtype=torch.bfloat16, whole_layers=True)
    problem = problem._replace(hidden_size=size[0], batch=size[1])
    products_of_bfloat16(True, kernels=True)
    assert backends.select_backend(problem) == LAYERS
    # Instructions for whole tiles are oneDNN's alone.
    products_of_bfloat16(True, kernels=True, tiles=True)
    assert backends.select_backend(problem) == (LAYERS if size == (32, 1) else "aten")


@pytest.mark.skipif(LAYERS != "native", reason="needs the native library")
def test_what_is_computed_in_bfloat16_is_said(products_of_bfloat16):
    plain = make_problem(dtype=torch.bfloat16, whole_layers=True)
    products_of_bfloat16(True, kernels=True)
    for others, how in (
        ({}, "in bfloat16"),
        ({"additions": ("lengths", "resets", "cell_clip")}, "in bfloat16"),
        ({"packed": True, "autocast": True}, "in bfloat16"),
        ({"cell": True}, "in bfloat16"),
        ({"training": True}, "in float32 where gradients are needed"),
        ({"proj_size": 2}, "in float32"),
        ({"whole_layers": False}, "in float32"),
        ({"additions": ("zoneout",)}, "in float32"),
        ({"additions": ("return_cells",)}, "in float32"),
    ):
        reason = backends.supports("native", plain._replace(**others)).reason
        assert reason.split("; ")[0].endswith(how), others
    products_of_bfloat16(True, kernels=False)
    assert "in float32" in backends.supports("native", plain).reason


@pytest.mark.parametrize(
    ("hidden_size", "batch", "training", "default"),
    [
        (64, 1, False, LAYERS),
        (512, 1, False, "aten"),
        (512, 1, True, LAYERS),
        (512, 32, False, LAYERS),
    ],
)
def test_bfloat16_layers_whose_weights_outgrow_the_cache(
    hidden_size, batch, training, default, products_of_bfloat16
):
    products_of_bfloat16(False)
    problem = make_problem(
        dtype=torch.bfloat16,
        training=training,
        whole_layers=True,
    )._replace(hidden_size=hidden_size, batch=batch)
    assert backends.select_backend(problem) == default
    assert backends.supports("native", problem).ok == (LAYERS == "native")


def test_large_batches_of_large_layers_are_left_to_onednn() -> None:
    problem = make_problem(whole_layers=True)._replace(hidden_size=1024, batch=64)
    assert backends.select_backend(problem) == "aten"
    assert backends.select_backend(problem._replace(dtype=torch.bfloat16)) == "aten"
    for other in (
        {"batch": 4},
        {"hidden_size": 512},
        {"packed": True},
        {"training": True},
        {"whole_layers": False},
    ):
        assert backends.select_backend(problem._replace(**other)) in (LAYERS, RECURRENCE)


def test_without_the_library_a_cpu_gets_torchs_own_layers(monkeypatch, clean_choices) -> None:
    def absent():
        raise library.LibraryUnavailableError("it was not built")

    monkeypatch.setattr("fused_lstm.kernels.cpu.load", absent)
    assert backends.select_backend(make_problem(whole_layers=True)) == "aten"
    assert backends.select_backend(make_problem()) == "reference"
    layer = fused_lstm.LSTM(3, 4)
    assert explain(layer).reasons["native"] == "cannot run it: it was not built"
    torch.testing.assert_close(
        layer(torch.ones(5, 2, 3))[0], layer.to_torch()(torch.ones(5, 2, 3))[0]
    )


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_transforms_leave_torchs_operator(transform) -> None:
    problem = make_problem(whole_layers=True, transform=transform)
    assert backends.select_backend(problem) == RECURRENCE
    assert "PyTorch's operator has no" in backends.supports("aten", problem).reason
    with pytest.raises(BackendUnavailableError, match="PyTorch's operator has no"):
        backends.select_backend(problem, "aten")
    half = problem._replace(dtype=torch.float16)
    assert backends.select_backend(half) == "reference"


@pytest.mark.parametrize("transform", ["trace", "modes"])
def test_recordings_hold_torchs_operator(transform) -> None:
    problem = make_problem(whole_layers=True, transform=transform)
    assert backends.select_backend(problem) == "aten"


def test_more_steps_than_cudnn_takes() -> None:
    problem = make_problem("sm_90", whole_layers=True)._replace(steps=65_536)
    assert backends.supports("aten", problem) == Support(
        False, "65536 time steps are more than cuDNN's 65535"
    )


def test_a_name_that_cannot_run_raises_its_reason() -> None:
    layer = fused_lstm.LSTM(3, 4, dtype=torch.float64, backend="triton")
    with pytest.raises(BackendUnavailableError, match=r"backend='triton' cannot run here: torch\."):
        layer(torch.randn(2, 1, 3, dtype=torch.float64))


@pytest.mark.parametrize("make", [fused_lstm.LSTM, fused_lstm.LSTMCell])
def test_unknown_names_are_refused_where_they_are_given(make) -> None:
    with pytest.raises(
        ValueError, match="backend='cudnn': expected None or one of native, cuda, triton"
    ):
        make(3, 4, backend="cudnn")
    with pytest.raises(TypeError, match="backend should be None or a str, got: int"):
        make(3, 4, backend=3)
    with pytest.raises(ValueError, match="backend='cudnn'"), fused_lstm.use_backend("cudnn"):
        pass


def test_use_backend_nests_restores_and_yields_to_a_layers_own(install) -> None:
    broken = install(BrokenKernel(RuntimeError("boom")))
    layer = fused_lstm.LSTM(3, 4)
    x = torch.randn(2, 1, 3)
    with fused_lstm.use_backend("broken"):
        assert explain(layer, x).backend == ""
        with fused_lstm.use_backend("reference"):
            assert explain(layer, x).backend == "reference"
            layer(x)
        with fused_lstm.use_backend(None):
            assert explain(layer, x).backend == LAYERS
        own = fused_lstm.LSTM(3, 4, backend="aten")
        assert explain(own, x).backend == "aten"
        own(x)
    assert broken.launches == 0
    assert explain(layer, x).backend == LAYERS


def test_use_backend_reaches_a_cell() -> None:
    cell = fused_lstm.LSTMCell(3, 4, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = cell(x)
    with fused_lstm.use_backend("reference"):
        torch.testing.assert_close(cell(x), expected)
    with fused_lstm.use_backend("triton"), pytest.raises(BackendUnavailableError, match="float64"):
        cell(x)


@pytest.mark.parametrize("named", [False, True])
def test_a_failing_kernel_falls_back_with_one_warning_and_the_right_result(install, named) -> None:
    broken = install(BrokenKernel(RuntimeError("ptxas fatal")))
    layer = fused_lstm.LSTM(3, 4, backend="broken" if named else None, bidirectional=True)
    twin = layer.to_torch()
    x = torch.randn(5, 2, 3, requires_grad=True)
    context = fused_lstm.use_backend("broken")
    with context, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            output, states = layer(x)
            (grad,) = torch.autograd.grad(output.sum(), x)
    messages = [str(w.message) for w in caught if w.category is KernelFallbackWarning]
    # One for the forward kernel and one for the backward kernel, however often they are called.
    assert len(messages) == 2
    for message, kernel in zip(messages, ("forward", "backward"), strict=True):
        assert f"the {kernel} kernel of the backend 'broken' failed" in message
        assert "hidden_size=4" in message
        assert "RuntimeError: ptxas fatal" in message
    assert broken.launches == 2
    expected, expected_states = twin(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(states, expected_states)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_running_out_of_memory_is_no_reason_to_fall_back(install) -> None:
    install(BrokenKernel(torch.OutOfMemoryError("out of memory")))
    layer = fused_lstm.LSTM(3, 4, backend="broken")
    with pytest.raises(torch.OutOfMemoryError):
        layer(torch.randn(5, 2, 3))


def test_explain_on_a_cpu() -> None:
    layer = fused_lstm.LSTM(3, 4, num_layers=2)
    explanation = explain(layer, torch.randn(7, 2, 3))
    assert explanation.backend == LAYERS
    assert list(explanation.reasons) == list(backends.ORDER)
    assert explanation.problem.steps == 7
    assert explanation.problem.batch == 2
    text = str(explanation)
    assert (
        "LSTM(3, 4, num_layers=2) on CPU: input of 7 steps × 2 sequences, float32, training" in text
    )
    assert f"-> {LAYERS}" in text
    if LAYERS == "native":
        assert "not needed: PyTorch's own fused layers (oneDNN or ATen)" in text
        (line,) = (line for line in text.splitlines() if "-> native" in line)
        assert "the first that can run it: native kernels for" in line
    assert "not needed: plain PyTorch" in text


def test_a_cpu_without_the_interpreter_has_no_kernel(monkeypatch, clean_choices) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = explain(fused_lstm.LSTM(3, 4), device="cpu").reasons["triton"]
    assert reason == "cannot run it: Triton compiles for GPUs, not for a cpu device"


@pytest.mark.parametrize(("hidden_size", "kernel"), [(64, "sequence"), (1024, "step")])
def test_explain_for_a_hopper_gpu_that_is_not_here(hidden_size: int, kernel: str) -> None:
    layer = fused_lstm.LSTM(64, hidden_size, dtype=torch.bfloat16)
    explanation = explain(layer, device="sm_90")
    assert explanation.backend == "aten"
    assert "cuDNN" in explanation.reasons["aten"]
    assert explanation.reasons["triton"].startswith(f"not chosen by default: {kernel} kernel")
    named = explain(fused_lstm.LSTM(64, hidden_size, backend="triton"), device="sm_90")
    assert named.backend == "triton"
    assert named.reasons["triton"].startswith("asked for by name")
    assert named.reasons["aten"].startswith("triton was asked for by name")
    assert (
        "proj_size=8"
        in explain(fused_lstm.LSTM(4, 64, proj_size=8), device="sm_90").reasons["triton"]
    )
    old = explain(layer, device="sm_70").reasons["triton"]
    assert old == "cannot run it: sm_70 is older than sm_80, the first with bfloat16 and TF32"


def test_explain_reads_the_sizes_of_every_input_form() -> None:
    x = torch.randn(2, 7, 3)

    def sizes(layer, input=None):
        problem = explain(layer, input).problem
        return problem.steps, problem.batch, problem.packed

    assert sizes(fused_lstm.LSTM(3, 4), x) == (2, 7, False)
    assert sizes(fused_lstm.LSTM(3, 4, batch_first=True), x) == (7, 2, False)
    assert sizes(fused_lstm.LSTM(3, 4, batch_first=True), x[0]) == (7, 1, False)
    packed = nn.utils.rnn.pack_padded_sequence(x.transpose(0, 1), [7, 5])
    assert sizes(fused_lstm.LSTM(3, 4), packed) == (7, 2, True)
    assert sizes(fused_lstm.LSTMCell(3, 4), x[0]) == (1, 7, False)
    assert sizes(nn.LSTM(3, 4)) == (100, 32, False)


def test_explain_takes_torchs_layers_and_refuses_others() -> None:
    assert explain(nn.LSTM(3, 4)).backend == LAYERS
    assert explain(nn.LSTMCell(3, 4)).backend == LAYERS
    assert explain(nn.LSTM(3, 4, dtype=torch.float16)).backend == "aten"
    with pytest.raises(TypeError, match="module should be an LSTM or LSTMCell, got: GRU"):
        explain(nn.GRU(3, 4))
    with pytest.raises(ValueError, match="device='hopper': expected a torch device"):
        explain(nn.LSTM(3, 4), device="hopper")


def test_importing_needs_torch_alone() -> None:
    """With triton, numpy and the extras hidden, the package imports and a layer runs."""
    code = """
import sys
for name in ("triton", "rich", "matplotlib", "pytest"):
    sys.modules[name] = None
import torch, fused_lstm
layer = fused_lstm.LSTM(3, 4, backend="reference")
layer(torch.randn(2, 1, 3))[0].sum().backward()
fused_lstm.LSTM(3, 4)(torch.randn(2, 1, 3))[0].sum().backward()
print(fused_lstm.explain(layer, device="sm_90").reasons["triton"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "cannot run it: the package triton is not installed"


def test_using_the_package_on_a_cpu_loads_no_kernel_of_another_device() -> None:
    code = """
import sys, torch, fused_lstm
assert "fused_lstm.kernels" not in sys.modules
with torch.no_grad():
    fused_lstm.LSTM(3, 4, dtype=torch.float16)(torch.randn(2, 1, 3, dtype=torch.float16))
assert "fused_lstm.kernels" not in sys.modules, "a kernel was loaded that cannot run this"
layer = fused_lstm.LSTM(3, 4)
layer(torch.randn(2, 1, 3))[0].sum().backward()
layer(torch.randn(2, 1, 3), (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)))
assert "triton" not in sys.modules, "triton was imported"
assert "fused_lstm.kernels.triton" not in sys.modules
"""
    environment_without_interpreter = {"PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment_without_interpreter)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_runs_the_layer_as_uncompiled_ones_do(monkeypatch, grad, dtype) -> None:
    """The compiler stops at an RNN; what it leaves alone has whole layers to choose from."""
    calls = []

    def count(owner, name):
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: calls.append(1) or run(*args, **kw))

    if LAYERS == "native":
        count(functional, "native_layer")
        count(PlainLayers, "forward")
    else:
        count(type(backends.get_backend("aten")), "layers")
    model = nn.Sequential(nn.Linear(3, 3), fused_lstm.LSTM(3, 4)).to(dtype)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 2, 3, dtype=dtype)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x)[0], model(x)[0])
    assert len(calls) == 2
