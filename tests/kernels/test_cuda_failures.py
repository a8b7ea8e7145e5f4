"""What can go wrong between a layer and a launch, with all of the host code in between.

The compiler, its cache, the executor and the fallback are the real ones. In place of the GPU there
is the emulator, or a driver that only notes what it is asked.
"""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from fused_lstm.kernels.cuda import compiler, driver, launch

import fused_lstm
from fused_lstm import backends, ops
from fused_lstm.backends import Support
from fused_lstm.backends.cuda import CudaBackend
from fused_lstm.errors import KernelFallbackWarning

from ..simt.emulator import CompilerMissingError, EmulatedExecutor
from ..simt.emulator import compiler as host_compiler
from .test_cuda_driver import FakeDriver

pytestmark = pytest.mark.skipif(
    compiler.availability() is not None, reason=str(compiler.availability())
)

T, B, I, H = 3, 2, 4, 8  # noqa: E741  (the field's name for the input size)


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch):
    """Lets layers that name "cuda" have it, here; forgets choices, failures and compiled code."""

    class OnTheCpu(CudaBackend):
        def supports(self, problem):
            return Support(True, "pretended", default=False)

    def forget() -> None:
        backends.supports.cache_clear()
        backends._first_default.cache_clear()

    monkeypatch.setitem(backends._BACKENDS, "cuda", OnTheCpu())
    monkeypatch.setattr(ops, "_failed", set())
    monkeypatch.setattr(launch, "_chosen", {})
    monkeypatch.setattr(compiler, "_cache", compiler.CubinCache())
    forget()
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> FakeDriver:
    """The real executor, for an H100 that only notes what it is asked."""
    fake = FakeDriver()
    fake.properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232_448
    )
    executor = driver.CudaExecutor()
    monkeypatch.setenv("FUSED_LSTM_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "executor_for", lambda device: executor)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "_current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: fake.properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver._primary_context.cache_clear()
    yield fake
    driver._primary_context.cache_clear()


def results_and_warnings(calls: int = 2) -> tuple[bool, list[warnings.WarningMessage]]:
    """Whether a layer on the kernels gets what the reference gets, and what it warns of."""
    torch.manual_seed(0)
    ours = fused_lstm.LSTM(I, H, backend="cuda", dtype=torch.bfloat16)
    plain = fused_lstm.LSTM(I, H, backend="reference", dtype=torch.bfloat16)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, dtype=torch.bfloat16)
    right = True
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(calls):
            actual, expected = ours(x)[0], plain(x)[0]
            right &= torch.allclose(actual, expected, rtol=2e-2, atol=2e-2)
    return right, caught


# ---- the cache


class CompilingExecutor(EmulatedExecutor):
    """Compiles for a GPU, with the cache, and runs in the emulator."""

    def load(self, config, device):
        assert compiler.cubin_of(config.source(), "sm_90")[:4] == b"\x7fELF"
        return super().load(config, device)


def a_file(monkeypatch, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("no folder")
    monkeypatch.setenv("FUSED_LSTM_CACHE", str(path))


def a_home_that_takes_no_files(monkeypatch, tmp_path) -> None:
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs a folder in which not even root may write")
    monkeypatch.delenv("FUSED_LSTM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/self")


@pytest.mark.parametrize("folder", [a_file, a_home_that_takes_no_files])
def test_without_a_cache_the_kernels_run_after_one_warning(monkeypatch, tmp_path, folder) -> None:
    try:
        host_compiler()
    except CompilerMissingError as error:
        pytest.skip(str(error))
    folder(monkeypatch, tmp_path)
    executor = CompilingExecutor()
    monkeypatch.setattr(launch, "executor_for", lambda device: executor)
    right, caught = results_and_warnings()
    assert right
    assert len(executor.launches) == 2
    (warning,) = caught
    assert warning.category is UserWarning
    assert "cache of compiled kernels cannot be" in str(warning.message)


# ---- kernels that cannot be had


def assert_one_fallback_that_says(*texts: str) -> None:
    right, caught = results_and_warnings()
    assert right
    (warning,) = caught
    assert warning.category is KernelFallbackWarning
    for text in texts:
        assert text in str(warning.message)
    assert "the next backend runs" in str(warning.message)


def test_a_gpu_that_the_compiler_does_not_know(gpu) -> None:
    gpu.properties.major = 15
    assert_one_fallback_that_says("does not compile for compute capability 15.0")
    assert gpu.calls == []


def test_no_compiler(gpu, monkeypatch) -> None:
    monkeypatch.setattr(driver, "availability", lambda: "NVRTC is on holiday")
    assert_one_fallback_that_says("NVRTC is on holiday")


def test_a_header_that_does_not_compile(gpu, monkeypatch) -> None:
    headers = dict(compiler._headers()) | {"layout.cuh": b"#error not today\n"}
    monkeypatch.setattr(compiler, "_headers", lambda: headers)
    compiler._cache_key.cache_clear()
    assert_one_fallback_that_says("NVRTC could not compile a kernel for sm_90", "not today")
    compiler._cache_key.cache_clear()


def test_a_driver_that_is_too_old(gpu) -> None:
    gpu.refusals["cuModuleLoadData"] = "CUDA_ERROR_NO_BINARY_FOR_GPU"
    assert_one_fallback_that_says("driver of CUDA 12.8", "CUDA_ERROR_NO_BINARY_FOR_GPU")


def test_no_room_for_a_team(gpu) -> None:
    gpu.answers["cuOccupancyMaxActiveBlocksPerMultiprocessor"] = 0
    gpu.answers["cuOccupancyMaxActiveClusters"] = 0
    assert_one_fallback_that_says("the device has no room for a team")


def test_a_refused_launch(gpu) -> None:
    gpu.refusals["cuLaunchKernelEx"] = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
    assert_one_fallback_that_says("launching 1 teams of lstm_forward_kernel", "OUT_OF_RESOURCES")
    assert gpu.names().count("cuLaunchKernelEx") == 1


def test_no_memory_is_the_callers_to_handle(gpu) -> None:
    gpu.refusals["cuModuleLoadData"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(torch.OutOfMemoryError, match="cuModuleLoadData"):
        results_and_warnings()
