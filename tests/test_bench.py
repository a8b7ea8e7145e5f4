"""fused_lstm.bench: what is wrong is not timed, ratios are right, memory is seen, tables say it."""

from __future__ import annotations

import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm.bench import cases, comparison, memory, table, timing
from fused_lstm.bench.cases import Case, Shape
from fused_lstm.bench.comparison import Result, measure
from fused_lstm.bench.limits import Limits, compulsory_bytes, least_seconds
from fused_lstm.bench.providers import (
    COMPILED,
    TORCH,
    Prepared,
    Provider,
    TorchProvider,
    UnavailableError,
    provider_of_backend,
)
from fused_lstm.bench.timing import Percentiles, Samples

CPU = torch.device("cpu")
TINY = Case(Shape(3, 2, 4, 5), "float32")
LIMITS = Limits(1e11, 1e10)
OURS = provider_of_backend("default")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    # Threads of several test processes wait for one another.
    torch.set_num_threads(1)
    # Each timing begins with a collection, of what all tests have loaded.
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def measured(case, mode, *providers, memory=False):
    """Measure torch's layer and others, briefly."""
    return measure(case, mode, [TORCH, *providers], CPU, 0.005, LIMITS, memory=memory)


@dataclass(frozen=True)
class Altered(Provider):
    """torch's layer, whose results are altered; counts its calls."""

    alter: object = None
    calls: list = field(default_factory=list)

    def prepare(self, case, parameters, device, mode):
        right = TORCH.prepare(case, parameters, device, mode).call

        def call(data):
            self.calls.append(1)
            return self.alter(right(data))

        return Prepared(call, "altered")


class AlteredOurs(Altered):
    is_ours: ClassVar[bool] = True


def replaced(index, alter):
    """Alter one of the results."""

    def alter_one(results):
        return tuple(
            alter(each) if k == index % len(results) else each for k, each in enumerate(results)
        )

    return alter_one


def raising(error):
    def alter(results):
        raise error

    return alter


# ---- what is right, and what is timed


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_tiny_case_is_checked_and_timed(mode) -> None:
    backends = ("default", "aten", "reference")
    got = measured(TINY, mode, *map(provider_of_backend, backends))
    names = ["torch", "fused_lstm", "fused_lstm[aten]", "fused_lstm[reference]"]
    assert [result.provider for result in got.results] == names
    assert got.sets == 1
    assert set(got.samples) == {(name, "eager") for name in names}

    # Once more by hand: float64 is exact, and torch's own error makes the budget.
    data, parameters = cases.make_data(TINY, CPU), cases.make_parameters(TINY, CPU)
    layers = [nn.LSTM(4, 5, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    outputs = []
    for layer in layers:
        layer.load_state_dict(parameters)
        x, h, c = (t.to(layer.weight_ih_l0.dtype) for t in data.inputs)
        outputs.append(layer(x, (h, c))[0].double())
    exact, native = (output.detach() for output in outputs)
    error = float((exact - native).abs().max())
    budget = 2 * error + torch.finfo(torch.float32).eps * float(exact.abs().max())

    baseline = got.samples["torch", "eager"].seconds
    variables = ("input", "h_0", "c_0", *parameters) if mode == "training" else ()
    for result in got.results:
        assert (result.status, result.detail) == ("timed", "")
        assert (result.mode, result.launch) == (mode, "eager")
        assert result.backend
        assert result.reason
        expected = ["output", "h_n", "c_n", *(f"gradient of {name}" for name in variables)]
        assert list(result.errors) == expected
        assert result.errors["output"]["budget"] == pytest.approx(budget)
        ratios = [each["error"] / each["budget"] for each in result.errors.values()]
        assert result.error_over_budget == max(ratios) <= 1
        taken = got.samples[result.provider, "eager"].seconds
        assert result.repetitions == len(taken) >= timing.MIN_REPETITIONS
        assert 0 < result.seconds.p20 <= result.seconds.p50 <= result.seconds.p80
        assert result.seconds.p50 == statistics.median(taken)
        assert result.host_seconds is None
        assert result.ratio == statistics.median(baseline) / result.seconds.p50
        pairs = [a / b for a, b in zip(baseline, taken, strict=True)]
        assert result.ratio_of_pairs == statistics.median(pairs)
        assert result.flops == TINY.flops(mode)
        assert result.bytes == compulsory_bytes(TINY, mode)
        least = least_seconds(TINY, mode, LIMITS)
        assert (result.limit_seconds, result.limited_by) == (least.seconds, least.limited_by)
        assert result.fraction_of_limit == least.seconds / result.seconds.p50
        assert result.peak_memory_bytes is result.memory_ratio is None
    assert got.results[0].ratio == got.results[0].ratio_of_pairs == 1
    assert got.results[0].errors["output"]["error"] == pytest.approx(error)
    assert [result.backend for result in got.results[2:]] == ["aten", "reference"]


@pytest.mark.parametrize(
    ("shape", "dtype", "name", "results", "parameters"),
    [
        (Shape(3, 2, 4, 6, proj_size=3), "float32", "t3-b2-i4-h6-p3-float32", 3, 5),
        (Shape(8, 3, 4, 5, packed=True), "float32", "t8-b3-i4-h5-packed-float32", 3, 4),
        (Shape(1, 2, 4, 5, cell=True), "float32", "cell-b2-i4-h5-float32", 2, 4),
        (Shape(3, 2, 4, 5), "float64", "t3-b2-i4-h5-float64", 3, 4),
        (Shape(3, 2, 4, 5), "bfloat16", "t3-b2-i4-h5-bfloat16", 3, 4),
        (Shape(3, 2, 4, 5), "float16", "t3-b2-i4-h5-float16", 3, 4),
        (Shape(3, 2, 4, 5, bidirectional=True), "float32", "t3-b2-i4-h5-bi-float32", 3, 8),
        (
            Shape(2, 3, 4, 5, num_layers=2, bidirectional=True, batch_first=True),
            "bfloat16",
            "t2-b3-i4-h5-l2-bi-bf-bfloat16",
            3,
            16,
        ),
    ],
)
def test_every_kind_of_case_is_checked_and_timed(shape, dtype, name, results, parameters) -> None:
    case = Case(shape, dtype)
    assert case.name == name
    for mode in cases.MODES:
        # Of another order of operations than torch's own, in float64 too.
        got = measured(case, mode, provider_of_backend("reference"))
        for result in got.results:
            assert result.status == "timed", result.detail
            gradients = (3 + parameters) * (mode == "training")
            assert len(result.errors) == results + gradients
            assert all(each["budget"] > 0 for each in result.errors.values())
            assert result.ratio > 0
        assert got.results[1].backend == "reference"
        # Not by being exactly torch's: the check has something to see.
        assert any(each["error"] > 0 for each in got.results[1].errors.values())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("mode", "results"), [("inference", 3), ("training", 10)])
def test_every_result_that_is_off_or_nan_is_wrong_and_not_timed(dtype, mode, results) -> None:
    case = Case(TINY.shape, dtype)
    factor = 1.2 if dtype == "bfloat16" else 1.01
    contenders = [
        AlteredOurs(f"{index} times {times}", alter=replaced(index, lambda t, f=times: t * f))
        for index, times in itertools.product(range(results), (factor, math.nan))
    ]
    got = measured(case, mode, *contenders)
    assert set(got.samples) == {("torch", "eager")}
    assert got.results[0].status == "timed"
    names = cases.result_names(case, mode, cases.make_parameters(case, CPU))
    for contender, result in zip(contenders, got.results[1:], strict=True):
        assert result.status == "wrong"
        assert len(contender.calls) == 1
        assert result.seconds is result.ratio is result.fraction_of_limit is None
        assert result.repetitions == 0
        assert not result.error_over_budget <= 1
        index, _, times = result.provider.split()
        assert math.isnan(result.error_over_budget) == (times == "nan")
        worst = result.errors[names[int(index)]]
        assert not worst["error"] <= worst["budget"]
        assert result.detail == (
            f"{names[int(index)]}: an error of {worst['error']:.3g} against float64, budget "
            f"{worst['budget']:.3g}"
        )


class OffByOnePercent(fused_lstm.LSTM):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output * 1.01, states


class FallsBack(fused_lstm.LSTM):
    def forward(self, input, hx=None):
        warnings.warn("no such kernel", fused_lstm.KernelFallbackWarning, stacklevel=2)
        return super().forward(input, hx)


@pytest.mark.parametrize(
    ("layer", "status", "detail"),
    [
        (OffByOnePercent, "wrong", " against float64, budget "),
        (FallsBack, "failed", "KernelFallbackWarning: no such kernel"),
    ],
)
@pytest.mark.parametrize("mode", cases.MODES)
def test_our_layer_itself_is_what_is_checked(monkeypatch, layer, status, detail, mode) -> None:
    monkeypatch.setattr(fused_lstm, "LSTM", layer)
    with warnings.catch_warnings():
        # As in a program; this test suite makes an error of it anyway.
        warnings.simplefilter("default", fused_lstm.KernelFallbackWarning)
        got = measured(TINY, mode, OURS)
    assert got.results[1].status == status
    assert detail in got.results[1].detail
    assert set(got.samples) == {("torch", "eager")}


@pytest.mark.parametrize(
    ("error", "ours", "theirs", "detail"),
    [
        (UnavailableError("no such case"), "unavailable", "unavailable", "no such case"),
        (
            fused_lstm.BackendUnavailableError("no such device"),
            "unavailable",
            "unavailable",
            "no such device",
        ),
        (RuntimeError("it broke"), "failed", "unavailable", "RuntimeError: it broke"),
        (
            torch.OutOfMemoryError("it is large"),
            "unavailable",
            "unavailable",
            "out of memory: it is large",
        ),
    ],
)
def test_who_cannot_run_says_why_and_others_are_timed(error, ours, theirs, detail) -> None:
    got = measured(
        TINY,
        "inference",
        AlteredOurs("ours", alter=raising(error)),
        Altered("peer", alter=raising(error)),
        OURS,
    )
    assert [result.status for result in got.results] == ["timed", ours, theirs, "timed"]
    assert [result.detail for result in got.results[1:3]] == [detail, detail]
    assert set(got.samples) == {("torch", "eager"), ("fused_lstm", "eager")}


def test_a_backend_that_cannot_run_a_case_says_why() -> None:
    # The kernels have no float64, on any machine.
    case = Case(TINY.shape, "float64")
    result = measured(case, "inference", provider_of_backend("triton")).results[1]
    assert result.status == "unavailable"
    assert "float64" in result.detail


@pytest.mark.parametrize(
    ("alter", "detail"),
    [
        (lambda results: results[:-1], "ValueError: there are 2 results, not 3"),
        (
            replaced(0, lambda t: t[:-1]),
            "ValueError: a result has the shape [2, 2, 5], not [3, 2, 5]",
        ),
    ],
)
def test_results_of_another_number_or_shape_are_failures(alter, detail) -> None:
    got = measured(TINY, "inference", AlteredOurs("ours", alter=alter))
    assert got.results[1].status == "failed"
    assert detail in got.results[1].detail
    assert set(got.samples) == {("torch", "eager")}


def test_a_peer_may_use_its_error_factor_of_the_budget() -> None:
    budget = measured(TINY, "inference").results[0].errors["output"]["budget"]

    def off_by(budgets):
        return replaced(0, lambda t: t + budgets * budget)

    # torch's own error is at most half of the budget.
    got = measured(
        TINY,
        "inference",
        Altered("near", error_factor=8.0, alter=off_by(5)),
        Altered("far", error_factor=8.0, alter=off_by(10)),
        AlteredOurs("ours", alter=off_by(2)),
    )
    near, far, ours = got.results[1:]
    assert [result.status for result in (near, far, ours)] == ["timed", "wrong", "wrong"]
    assert 4 < near.error_over_budget < 6
    assert near.errors["output"]["budget"] == pytest.approx(budget)
    assert 9 < far.error_over_budget < 11
    assert far.detail.endswith(f"budget {budget:.3g} (times 8 for another package)")
    assert "another package" not in ours.detail


def test_a_result_of_zeros_has_a_budget_of_zero() -> None:
    zero = replaced(0, lambda t: t * 0)
    data = [cases.make_data(TINY, CPU)]
    parameters = cases.make_parameters(TINY, CPU)
    compared = comparison._Comparison(TINY, "inference", CPU, parameters, data)
    compared.exact[0] = compared.exact[0] * 0
    compared.budgets = [0.0, 1.0, 1.0]
    with torch.no_grad():
        right = compared.check(AlteredOurs("right", alter=zero), "eager")
        wrong = compared.check(AlteredOurs("wrong", alter=lambda results: results), "eager")
    assert (right.status, wrong.status) == ("timed", "wrong")
    assert wrong.error_over_budget == math.inf


def test_nobody_is_timed_without_torchs_layer(monkeypatch) -> None:
    def prepare(*arguments):
        raise RuntimeError("no such engine")

    monkeypatch.setattr(TorchProvider, "prepare", prepare)
    got = measured(TINY, "inference", OURS, provider_of_backend("reference"))
    assert got.samples == {}
    assert [result.status for result in got.results] == ["unavailable"] * 3
    assert got.results[0].detail == "RuntimeError: no such engine"
    assert {result.detail for result in got.results[1:]} == {
        "torch.nn's layer, whose error would be the measure, could not run"
    }


def test_nobody_is_timed_if_torchs_layer_is_nan(monkeypatch) -> None:
    right = TorchProvider.prepare

    def prepare(*arguments):
        call = right(*arguments).call
        return Prepared(lambda data: tuple(t * math.nan for t in call(data)), "torch")

    monkeypatch.setattr(TorchProvider, "prepare", prepare)
    got = measured(TINY, "inference", OURS)
    assert [result.status for result in got.results] == ["wrong", "wrong"]
    assert got.samples == {}


def test_figures_are_those_of_the_samples(monkeypatch) -> None:
    taken = {
        ("torch", "eager"): Samples([4.0, 8.0, 6.0], [1.0, 2.0, 3.0]),
        ("fused_lstm", "eager"): Samples([2.0, 2.0, 6.0], [3.0, 4.0, 5.0]),
    }
    asked = []

    def time_in_turns(calls, device, seconds, **options):
        asked.append((list(calls), device, seconds, options["sets"], options["calls_per_sample"]))
        return taken

    monkeypatch.setattr(timing, "time_in_turns", time_in_turns)
    monkeypatch.setattr(timing, "calls_of_block", lambda call: 17)
    cell = Case(Shape(1, 2, 4, 5, cell=True), "float32")
    # Products take 4 s.
    limits = Limits(cell.flops("inference") / 4.0)
    got = measure(cell, "inference", [TORCH, OURS], CPU, 7.0, limits)
    assert asked == [(list(taken), CPU, 7.0, 1, 17)]
    assert got.calls_per_sample == 17
    assert got.samples == taken
    torchs, ours = got.results
    assert (torchs.ratio, torchs.ratio_of_pairs) == (1, 1)
    # 6 over 2; and of 2, 4 and 1.
    assert (ours.ratio, ours.ratio_of_pairs) == (3, 2)
    assert ours.seconds == Percentiles(2.0, 2.0, pytest.approx(4.4))
    assert ours.host_seconds.p50 == 4
    assert ours.repetitions == 3
    assert (ours.limit_seconds, ours.limited_by) == (4.0, "products")
    assert ours.fraction_of_limit == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_a_tiny_case_on_a_gpu(dtype, mode) -> None:
    where = torch.device("cuda", 0)
    case = Case(Shape(8, 4, 16, 32), dtype)
    providers = [TORCH, OURS, provider_of_backend("triton")]
    got = measure(case, mode, providers, where, 0.01, Limits(1e14, 1e12), memory=True)
    assert got.sets >= 2
    assert {(result.provider, result.launch) for result in got.results} == set(
        itertools.product(("torch", "fused_lstm", "fused_lstm[triton]"), ("eager", "graph"))
    )
    for result in got.results:
        assert result.status == "timed", result.detail
        assert result.host_seconds is not None
        assert (result.peak_memory_bytes is not None) == (result.launch == "eager")
        baseline = got.samples["torch", result.launch].seconds
        assert result.ratio == statistics.median(baseline) / result.seconds.p50


# ---- memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
MIB = 1 << 20


@linux
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.ones(64 * MIB // 4), 64),
        # One after the other, and both together.
        (lambda: [torch.ones(64 * MIB // 4).sum() for _ in range(2)], 64),
        (lambda: [torch.ones(32 * MIB // 4) for _ in range(3)], 96),
        # It is the peak, though nothing of it is left.
        (lambda: torch.ones(96 * MIB // 4).sum().item(), 96),
    ],
)
def test_the_peak_of_a_call_is_seen(call, expected) -> None:
    peak = memory.peak_of_call(call, CPU)
    assert peak / MIB == pytest.approx(expected, rel=0.05)


@linux
def test_a_call_that_takes_nothing_has_no_peak() -> None:
    kept = torch.ones(64 * MIB // 4)
    assert memory.peak_of_call(lambda: kept[0].item(), CPU) < MIB


@linux
def test_the_peak_of_a_provider_is_that_of_its_first_call(monkeypatch) -> None:
    orders = []
    run = subprocess.run

    def spy(command, **options):
        orders.append(json.loads(command[-1]))
        return run(command, **options)

    monkeypatch.setattr(memory.subprocess, "run", spy)
    case = Case(Shape(200, 64, 64, 256, proj_size=64), "float32")
    peak = memory.peak_of_provider(provider_of_backend("aten"), case, "training")
    assert orders == [
        {
            "backend": "aten",
            "shape": asdict(case.shape),
            "dtype": "float32",
            "mode": "training",
            "threads": 1,
        }
    ]
    # Gates and cell states of every step are kept for the backward pass.
    rows = 200 * 64
    assert rows * 5 * 256 * 4 < peak < 10 * rows * 5 * 256 * 4


def test_who_is_not_ours_has_no_process_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(memory.subprocess, "run", raising(AssertionError))
    assert memory.peak_of_provider(COMPILED, TINY, "inference") is None
    assert memory.peak_of_provider(Altered("peer"), TINY, "inference") is None


@linux
def test_a_process_that_fails_says_why(monkeypatch) -> None:
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "it broke")

    monkeypatch.setattr(memory.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"the memory of fused_lstm failed:\nit broke"):
        memory.peak_of_provider(OURS, TINY, "inference")


def test_memory_is_that_of_what_was_timed(monkeypatch) -> None:
    peaks = {"torch": 200, "fused_lstm": 50, "peer": None}
    asked = []

    def peak_of_provider(provider, case, mode):
        asked.append((provider.name, case, mode))
        return peaks[provider.name]

    monkeypatch.setattr(comparison, "peak_of_provider", peak_of_provider)
    peer = Altered("peer", alter=lambda results: results)
    wrong = AlteredOurs("wrong", alter=replaced(0, lambda t: t * 2))
    got = measured(TINY, "training", OURS, peer, wrong, memory=True)
    assert asked == [(name, TINY, "training") for name in peaks]
    assert [(result.peak_memory_bytes, result.memory_ratio) for result in got.results] == [
        (200, 1),
        (50, 0.25),
        (None, None),
        (None, None),
    ]


# ---- time


def test_contenders_take_turns_and_sets_rotate(monkeypatch) -> None:
    monkeypatch.setattr(timing, "MIN_REPETITIONS", 5)
    order = []
    calls = {name: lambda index, name=name: order.append((name, index)) for name in "ab"}
    samples = timing.time_in_turns(calls, CPU, 1e-9, sets=2)
    turns = order[2 * timing.WARM_UP :]
    assert "".join(name for name, _ in turns) == "abbaabbaab"
    assert [index for _, index in turns[::2]] == [0, 1, 0, 1, 0]
    assert [index for _, index in turns[1::2]] == [0, 1, 0, 1, 0]
    assert [len(taken.seconds) for taken in samples.values()] == [5, 5]
    assert all(taken.host == [] for taken in samples.values())
    order.clear()
    timing.time_in_turns(calls, CPU, 1e-9, calls_per_sample=3)
    assert (
        "".join(name for name, _ in order[6 * timing.WARM_UP :]) == "aaabbbbbbaaaaaabbbbbbaaaaaabbb"
    )


def test_a_sample_is_the_time_of_one_call(monkeypatch) -> None:
    now = itertools.count()
    # Each look at the clock is a second later; each call takes eleven.
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(now)))

    def call(index):
        for _ in range(10):
            next(now)

    samples = Samples()
    timing.take_sample(call, 0, CPU, False, samples)
    timing.take_sample(call, 0, CPU, False, samples, calls=5)
    assert samples.seconds == [11, 51 / 5]


def test_samples_end_with_the_time_or_their_number(monkeypatch) -> None:
    monkeypatch.setattr(timing, "MAX_REPETITIONS", 12)
    collecting = []

    def call(index):
        collecting.append(gc.isenabled())

    samples = timing.time_in_turns({"a": call}, CPU, math.inf)
    assert len(samples["a"].seconds) == 12
    assert not any(collecting[timing.WARM_UP :])
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        timing.time_in_turns({"a": lambda index: 1 // 0}, CPU, 1.0)
    assert gc.isenabled()


def test_percentiles_and_ratios_of_pairs() -> None:
    assert timing.percentiles([float(k) for k in range(11)]) == Percentiles(2, 5, 8)
    assert timing.percentiles([1.0, 2.0]) == Percentiles(
        pytest.approx(1.2), 1.5, pytest.approx(1.8)
    )
    assert timing.ratio_of_pairs([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2
    assert timing.sets_to_rotate(1, CPU) == 1


# ---- cases


def test_operations_are_counted() -> None:
    case = Case(Shape(2, 3, 4, 5, num_layers=2, bidirectional=True), "float32")
    # Multiplications and additions of x·W_ihᵀ and h·W_hhᵀ, for both layers.
    by_hand = sum(2 * 2 * (2 * 3 * 20 * (width + 5)) for width in (4, 10))
    assert case.flops("inference") == by_hand
    assert case.flops("training") == 3 * by_hand


def test_operations_of_a_projection_and_of_packed_rows_are_counted() -> None:
    case = Case(Shape(2, 3, 4, 5, proj_size=2, num_layers=2), "float32")
    # x·W_ihᵀ, h·W_hhᵀ and o⊙tanh(c)·W_hrᵀ, for both layers.
    by_hand = sum(2 * (2 * 3) * (20 * (width + 2) + 5 * 2) for width in (4, 2))
    assert case.flops("inference") == by_hand

    packed = Shape(40, 16, 4, 5, packed=True)
    rows = int(packed.lengths.sum())
    assert Case(packed, "float32").flops("inference") == 2 * rows * 20 * (4 + 5)
    assert packed.lengths.tolist() == sorted(packed.lengths.tolist(), reverse=True)
    assert 10 <= packed.lengths.min() < packed.lengths.max() <= 40
    data = cases.make_data(Case(packed, "float32"), CPU)
    assert data.input.data.shape == (rows, 4)
    assert int(data.batch_sizes.sum()) == rows
    lengths = nn.utils.rnn.pad_packed_sequence(data.input)[1]
    assert torch.equal(lengths, packed.lengths)


@pytest.mark.parametrize(("dtype", "products"), [("tf32", "tf32"), ("float32", "ieee")])
def test_products_of_float32_are_as_asked_and_put_back(dtype, products) -> None:
    settings = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [each.fp32_precision for each in settings]

    def check():
        with cases.products_of(Case(TINY.shape, dtype)):
            assert [each.fp32_precision for each in settings] == [products, products]
            raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        check()
    assert [each.fp32_precision for each in settings] == before
    assert Case(TINY.shape, "tf32").dtype == torch.float32
    assert Case(TINY.shape, "tf32").eps == 2**-10


# ---- tables

TIMED = Result(
    "fused_lstm",
    "inference",
    "eager",
    "timed",
    backend="native",
    error_over_budget=0.456,
    seconds=Percentiles(1.234e-3, 2.346e-3, 0.5),
    ratio=3.456,
    fraction_of_limit=0.1234,
)


def print_results(monkeypatch, capsys, rich, *results):
    if not rich:
        monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    table.print_table(results)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("rich", [True, False])
def test_a_table_has_the_figures(monkeypatch, capsys, rich) -> None:
    torchs = partial(Result, "torch", "inference", backend="torch")
    results = [
        torchs(
            "eager",
            "timed",
            **{name: getattr(TIMED, name) for name in ("seconds", "ratio")},
            error_over_budget=0.1,
            fraction_of_limit=1.0,
        ),
        TIMED,
        Result("onnxruntime", "inference", "eager", "unavailable", "it\nis [bold]not[/bold] here"),
    ]
    lines = print_results(monkeypatch, capsys, rich, *results)
    (head,) = (line for line in lines if "ratio" in line)
    assert " ".join(head.split()) == "mode layer ms p20 to p80 ratio of limit error"
    (ours,) = (line for line in lines if "fused_lstm" in line)
    assert " ".join(ours.split()) == (
        "inference fused_lstm (native) 2.35 1.23 to 500 3.46 12.3% 0.46"
    )
    assert any(line.split()[:3] == ["inference", "torch.nn", "2.35"] for line in lines)
    (peer,) = (line for line in lines if "onnxruntime" in line)
    assert "onnxruntime UNAVAILABLE: it is [bold]not[/bold] here" in peer


@pytest.mark.parametrize("rich", [True, False])
def test_a_table_has_memory_host_time_and_launches_where_they_are(monkeypatch, capsys, rich):
    result = Result(
        **{
            **{name: getattr(TIMED, name) for name in vars(TIMED)},
            "launch": "graph",
            "host_seconds": Percentiles(1e-6, 2e-6, 3e-6),
            "peak_memory_bytes": 1_500_000,
            "ratio": None,
        }
    )
    lines = print_results(monkeypatch, capsys, rich, result)
    (head,) = (line for line in lines if "host ms" in line)
    assert " ".join(head.split()) == "mode layer ms p20 to p80 host ms of limit error MB"
    (ours,) = (line for line in lines if "fused_lstm" in line)
    assert " ".join(ours.split()) == (
        "inference fused_lstm (native), graph 2.35 1.23 to 500 0.00200 12.3% 0.46 1.5"
    )


@pytest.mark.parametrize(("seconds", "calls"), [(1e-6, 20), (5e-4, 10), (2.5e-3, 2), (0.5, 1)])
def test_short_calls_are_timed_in_blocks(monkeypatch, seconds, calls) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(index: int) -> None:
        now[0] += seconds

    assert timing.calls_of_block(call) == calls
