"""The backend of the CUDA kernels: what it takes, what it says, and what happens when it fails."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from fused_lstm.kernels import cuda as kernels
from fused_lstm.kernels.cuda import KernelUnavailableError, driver, launch

import fused_lstm
from fused_lstm import (
    BackendUnavailableError,
    KernelFallbackWarning,
    backends,
    explain,
    ops,
)
from fused_lstm.backends import BackwardArguments, ForwardArguments, Problem
from fused_lstm.backends import cuda as backend
from fused_lstm.devices import describe_device, input_precision, upload
from fused_lstm.modifiers import NO_MODIFIERS, Modifiers
from fused_lstm.reference import recurrence_backward, recurrence_forward


@pytest.fixture(autouse=True)
def compiler_at_hand(monkeypatch):
    """Pretend that kernels can be compiled; forget cached choices and failures."""

    def forget() -> None:
        backends.supports.cache_clear()
        backends._first_default.cache_clear()
        ops._failed.clear()
        launch._chosen.clear()

    forget()
    monkeypatch.setattr(kernels, "availability", lambda: None)
    yield
    forget()


def problem(device: str = "sm_90", **options) -> Problem:
    given = {"dtype": torch.bfloat16, "steps": 3, "batch": 4, "hidden_size": 24, "training": True}
    return Problem(device=describe_device(device), **(given | options))


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        ("cpu", {}, "it runs on NVIDIA GPUs, not on a cpu device"),
        ("gfx942", {}, "it runs on NVIDIA GPUs, not on AMD's gfx942"),
        ("sm_75", {}, "sm_75 is older than sm_80, the first with bfloat16 and TF32"),
        ("sm_90", {"proj_size": 8}, "proj_size=8: the kernels have no projection"),
        ("sm_90", {"additions": ("layer_norm",)}, "the kernels have no layer normalization"),
        ("sm_90", {"dtype": torch.float64}, "torch.float64 is not one of float32, float16, bfloat"),
        ("sm_90", {"hidden_size": 20}, "hidden_size=20 is not a multiple of 8"),
        ("sm_90", {"hidden_size": 0}, "hidden_size=0 is not a multiple of 8"),
        ("sm_80", {"hidden_size": 4096}, "W_hh stays on chip: 4 * 4096 * 4096 * 2 bytes = 134217"),
    ],
    ids=str,
)
def test_what_it_refuses_and_why(device, options, reason) -> None:
    support = backends.supports("cuda", problem(device, **options))
    assert not support.ok
    assert support.reason.startswith(reason)
    with pytest.raises(BackendUnavailableError, match="backend='cuda' cannot run here: "):
        backends.select_backend(problem(device, **options), "cuda")


def test_it_says_what_would_run() -> None:
    support = backends.supports("cuda", problem(batch=32, hidden_size=64))
    assert support.ok
    assert support.reason.startswith(
        "block scope: one block a team, 4 of 8 columns each, 4 of 4 weight tiles in registers"
    )
    large = backends.supports("cuda", problem(batch=32, hidden_size=1024)).reason
    assert large.startswith("grid scope: teams of ")
    assert "in the grid" in large
    assert "cluster scope" in backends.supports("cuda", problem(hidden_size=256)).reason
    for device in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"):
        assert backends.supports("cuda", problem(device)).ok


def test_it_is_chosen_by_default_only_where_it_has_been_verified(monkeypatch) -> None:
    support = backends.supports("cuda", problem())
    assert not support.default
    assert "to be named: its tests have not passed on sm_90 yet" in support.reason
    assert backends.select_backend(problem()) == "reference"
    assert backends.select_backend(problem(), "cuda") == "cuda"
    monkeypatch.setattr(backend, "VERIFIED_ARCHITECTURES", frozenset({"sm_90"}))
    backends.supports.cache_clear()
    backends._first_default.cache_clear()
    assert backends.select_backend(problem()) == "cuda"
    assert backends.select_backend(problem(whole_layers=True)) == "cuda"
    assert backends.select_backend(problem("sm_80")) == "reference"


def test_the_choice_follows_the_precision_of_float32_products(monkeypatch) -> None:
    """1024 hidden units find room where a product is one of TF32, not where it is three."""
    layer = fused_lstm.LSTM(8, 1024, backend="cuda", device="meta")
    for precision, served in ("ieee", False), ("tf32", True), ("ieee", False):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        assert (explain(layer, device="sm_90").backend == "cuda") == served
        # A failure of one kernel is none of the other's.
        assert (
            ops._kernel("cuda", "forward", explain(layer, device="sm_90").problem)[4] == precision
        )
    half = fused_lstm.LSTM(8, 1024, device="meta", dtype=torch.bfloat16)
    assert explain(half, device="sm_90").problem.precision == ""


def test_without_a_compiler_it_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "availability", lambda: "NVRTC is on holiday")
    assert backends.supports("cuda", problem()) == backends.Support(False, "NVRTC is on holiday")
    # What no compiler would help comes first.
    assert "multiple of 8" in backends.supports("cuda", problem(hidden_size=20)).reason


@pytest.mark.parametrize(
    ("additions", "flags"),
    [
        ((), set()),
        (("lengths",), {"lengths"}),
        (("resets", "return_cells"), {"resets"}),
        (("recurrent_dropout",), {"recurrent_mask"}),
        (("recurrent_mask", "zoneout_c"), {"recurrent_mask", "zoneout_c"}),
        (("zoneout", "cell_clip"), {"zoneout_h", "zoneout_c", "cell_clip"}),
    ],
)
def test_additions_become_flags(additions, flags) -> None:
    asked = backend.kernel_flags(problem(additions=additions))
    given = {name for name, value in vars(asked).items() if value}
    assert given == flags | {"save_activations", "save_cells"}
    assert backends.supports("cuda", problem(additions=additions)).ok
    inference = backend.kernel_flags(problem(additions=additions, training=False))
    assert not inference.save_activations
    assert inference.save_cells == ("return_cells" in additions)
    assert backend.kernel_flags(problem(packed=True)).packed


def test_explain_knows_it() -> None:
    layer = fused_lstm.LSTM(64, 256, dtype=torch.bfloat16)
    reasons = explain(layer, device="sm_90").reasons
    assert list(reasons) == ["native", "cuda", "triton", "aten", "reference"]
    assert reasons["cuda"].startswith("not chosen by default: cluster scope: teams of ")
    named = explain(fused_lstm.LSTM(64, 256, backend="cuda"), device="sm_90")
    assert named.backend == "cuda"
    assert named.reasons["cuda"].startswith("asked for by name: ")
    assert (
        "no projection"
        in explain(fused_lstm.LSTM(64, 256, proj_size=8), device="sm_90").reasons["cuda"]
    )
    assert "AMD" in explain(layer, device="gfx942").reasons["cuda"]


def test_a_layer_that_asks_for_it_on_a_cpu_gets_the_reason() -> None:
    layer = fused_lstm.LSTM(3, 8, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="NVIDIA GPUs, not on a cpu device"):
        layer(torch.randn(2, 1, 3))


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "captured"])
def test_what_a_graph_will_copy_again_is_not_left_in_pageable_memory(monkeypatch, capturing):
    """A packed batch's rows are looked up on the GPU by indices that the CPU computes."""
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(driver, "upload", lambda x, device: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: x)
    x = torch.arange(3)
    assert upload(x, torch.device("cuda", 0)) is x
    assert len(pinned) == capturing


# ---- when it fails


def arguments(modifiers: Modifiers = NO_MODIFIERS) -> ForwardArguments:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    return ForwardArguments(
        normal(3, 4, 96), normal(96, 24) / 5, normal(4, 24), normal(4, 24), None, None, modifiers,
        False, True, True,
    )  # fmt: skip


def expected(given: ForwardArguments):
    return recurrence_forward(*given[:6], given.modifiers, given.reverse)


class FailingExecutor:
    """Fails when a kernel is loaded, or when it is launched."""

    resident_teams = 132

    def __init__(self, error: Exception, at_launch: bool) -> None:
        self.error, self.at_launch = error, at_launch

    def load(self, config, device):
        if not self.at_launch:
            raise self.error
        return self

    def launch(self, teams, parameters):
        raise self.error


FAILURES = {
    "unsupported architecture": (
        KernelUnavailableError("NVRTC 12.4 does not compile for compute capability 15.0"),
        False,
    ),
    "no compiler": (KernelUnavailableError("NVRTC's library cannot be loaded"), False),
    "compile error": (KernelUnavailableError("forward.cuh(1): error: expected a ;"), False),
    "spills": (KernelUnavailableError("needs 8 bytes a thread beyond its registers"), False),
    "something unforeseen": (OSError("no space left on device"), False),
    "refused launch": (RuntimeError("CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"), True),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_gives_one_warning_and_the_right_result(monkeypatch, failure) -> None:
    error, at_launch = FAILURES[failure]
    executor = FailingExecutor(error, at_launch)
    monkeypatch.setattr(launch, "executor_for", lambda device: executor)
    given = arguments()
    tried = []

    def run(chosen):
        tried.append(chosen.name)
        return chosen.forward(given)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [ops.run_on_backend("forward", problem(), "cuda", run) for _ in range(2)]
    assert tried == ["cuda", "reference", "reference"]
    (warning,) = caught
    assert warning.category is KernelFallbackWarning
    assert "the forward kernel of the backend 'cuda' failed" in str(warning.message)
    assert "the next backend runs" in str(warning.message)
    assert str(error) in str(warning.message)
    for out in results:
        for a, b in zip(out, expected(given), strict=True):
            assert torch.equal(a, b)
    assert explain_failed() == ["forward"]


def explain_failed() -> list[str]:
    return ops.failed_kernels("cuda", problem())


def test_a_failing_backward_kernel_falls_back_too(monkeypatch) -> None:
    executor = FailingExecutor(RuntimeError("CUDA_ERROR_LAUNCH_FAILED"), at_launch=True)
    monkeypatch.setattr(launch, "executor_for", lambda device: executor)
    given = arguments()
    out = expected(given)
    grad_h = torch.ones_like(out.h)
    backward = BackwardArguments(
        grad_h, None, None, None, out.activations, out.c, given.weight_hh, given.c0, None, None,
        NO_MODIFIERS, False,
    )  # fmt: skip
    with pytest.warns(KernelFallbackWarning, match="backward kernel .* CUDA_ERROR_LAUNCH_FAILED"):
        gradients = ops.run_on_backend(
            "backward", problem(), "cuda", lambda chosen: chosen.backward(backward)
        )
    exact = recurrence_backward(
        grad_h, None, None, None, None, out.activations, out.c, given.weight_hh, given.c0
    )
    for a, b in zip(gradients[:3], exact, strict=False):
        assert torch.equal(a, b)


def test_what_the_kernels_return_is_what_callers_get(monkeypatch) -> None:
    """Arguments reach the kernels by name; modifiers among them."""
    calls = []

    def record(*positional, **options):
        calls.append((positional, options))
        return torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(kernels, "lstm_forward", record)
    monkeypatch.setattr(kernels, "lstm_backward", lambda **options: record(**options)[:3])
    given = arguments(Modifiers(cell_clip=2.0, lengths=torch.tensor([1, 2, 3, 0])))
    taken = backend.CudaBackend().forward(given)
    assert len(taken) == 5
    (_, options) = calls.pop()
    assert options["gates"] is given.gates
    assert options["cell_clip"] == 2.0
    assert options["lengths"] is given.modifiers.lengths
    assert options["input_precision"] == input_precision()
    assert "weight_hr" not in options
    gradients = backend.CudaBackend().backward(
        BackwardArguments(*[None] * 4, *given[:4], None, None, given.modifiers, True)
    )
    assert gradients.h is None
    (_, options) = calls.pop()
    assert options["reverse"] is True
    assert options["cell_clip"] == 2.0
