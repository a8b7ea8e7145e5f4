"""python -m fused_lstm info | check | bench."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

import fused_lstm
from fused_lstm import bench, check
from fused_lstm.__main__ import main
from fused_lstm.bench import comparison, limits, providers, table
from fused_lstm.bench.cases import MODES, Case, Shape
from fused_lstm.bench.comparison import Measured, Result
from fused_lstm.bench.providers import TORCH, Prepared, Provider
from fused_lstm.bench.timing import Percentiles

TINY = ("bench", "--input", "4", "--hidden", "5", "--batch", "2", "--steps", "3")
ON_CPU = (*TINY, "--device", "cpu", "--seconds", "0.01")


@pytest.fixture
def quick(monkeypatch):
    """Measure limits of the machine on little, and with one thread."""
    monkeypatch.setattr(limits, "_GEMM_SIZES", {"cpu": (16, 16)})
    monkeypatch.setattr(limits, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(limits, "_SECONDS", 1e-4)
    threads = torch.get_num_threads()
    # Threads of several test processes wait for one another.
    torch.set_num_threads(1)
    # Each timing begins with a collection, of what all tests have loaded.
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def test_info_prints_versions_and_the_choice(capsys) -> None:
    assert main(["info", "--hidden", "32", "--device", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "LSTM(64, 32) on sm_90 GPU" in printed
    assert "-> aten" in printed


def test_check_passes_here(capsys) -> None:
    assert main(["check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for line in ("aten       float32   ok", "reference  float64   ok", "reference  bfloat16  ok"):
        assert line in printed
    assert "triton     float64   --" in printed


def test_check_notices_a_wrong_result(monkeypatch, capsys) -> None:
    right = check._results
    calls = []

    def wrong(layer, x, packed):
        results = right(layer, x, packed)
        calls.append(1)
        # The first of three is the layer under test.
        return [r * 1.5 for r in results] if len(calls) % 3 == 1 else results

    monkeypatch.setattr(check, "_results", wrong)
    assert main(["check", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_command_is_required(capsys) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "command" in capsys.readouterr().err


# ---- bench


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("rich", [True, False])
def test_bench_prints_ratios(monkeypatch, capsys, rich) -> None:
    if not rich:
        monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    measured = []
    right = comparison.measure

    def measure(*arguments, **options):
        measured.append(right(*arguments, **options))
        return measured[-1]

    monkeypatch.setattr(comparison, "measure", measure)
    arguments = ("--backend", "reference", "--backend", "default", "--batch-first")
    assert main([*ON_CPU, *arguments]) == 0
    printed = capsys.readouterr().out
    head, *lines = printed.splitlines()
    assert head.startswith("t3-b2-i4-h5-bf-float32 on CPU, 1 threads, torch ")
    assert "GFLOP/s" in head
    (columns,) = (line.split() for line in lines if "ratio " in line and "mode" in line)
    assert columns[:3] == ["mode", "layer", "ms"]
    results = [result for each in measured for result in each.results]
    rows = [line.split() for line in lines if line.split()[:1] in (["inference"], ["training"])]
    assert len(rows) == len(results) == 2 * 3
    for row, result in zip(rows, results, strict=True):
        assert row[:2] == [
            result.mode,
            "torch.nn" if result.provider == "torch" else result.provider,
        ]
        assert f"{result.ratio:.2f}" in row
    assert [result.provider for result in results[:3]] == [
        "torch",
        "fused_lstm[reference]",
        "fused_lstm",
    ]
    assert "ratio: median time of torch.nn's layer over this one's" in printed


SHAPE = Shape(3, 2, 4, 5)
TIMED = Result(
    "torch",
    "inference",
    "eager",
    "timed",
    error_over_budget=0.0,
    seconds=Percentiles(1.0, 2.0, 3.0),
    ratio=1.0,
    fraction_of_limit=1.0,
)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "case", "others"),
    [
        ((), Case(SHAPE, "float32"), {}),
        (("--dtype", "float64"), Case(SHAPE, "float64"), {}),
        (("--layers", "2"), Case(Shape(3, 2, 4, 5, 2), "float32"), {}),
        (("--proj", "2"), Case(Shape(3, 2, 4, 5, proj_size=2), "float32"), {}),
        (("--bidirectional",), Case(Shape(3, 2, 4, 5, bidirectional=True), "float32"), {}),
        (("--batch-first",), Case(Shape(3, 2, 4, 5, batch_first=True), "float32"), {}),
        (("--packed",), Case(Shape(3, 2, 4, 5, packed=True), "float32"), {}),
        (("--cell",), Case(Shape(1, 2, 4, 5, cell=True), "float32"), {}),
        (("--mode", "training"), Case(SHAPE, "float32"), {"modes": ["training"]}),
        (("--memory",), Case(SHAPE, "float32"), {"memory": True}),
        (("--seconds", "7"), Case(SHAPE, "float32"), {"seconds": 7.0}),
        (
            ("--compile", "--backend", "aten", "--backend", "default"),
            Case(SHAPE, "float32"),
            {"names": ["torch", "torch.compile", "fused_lstm[aten]", "fused_lstm"]},
        ),
    ],
)
def test_options_of_bench_reach_what_is_measured(monkeypatch, arguments, case, others) -> None:
    asked = []

    def measure(case, mode, providers, device, seconds, limits, *, memory):
        names = [provider.name for provider in providers]
        asked.append((case, mode, names, device, seconds, memory))
        assert limits.gemm_flops_per_second > 0
        assert limits.copy_bytes_per_second > 0
        return Measured([TIMED], {}, 1)

    monkeypatch.setattr(comparison, "measure", measure)
    assert main([*TINY, "--device", "cpu", *arguments]) == 0
    names = others.get("names", ["torch", "fused_lstm"])
    seconds, memory = others.get("seconds", 2.0), others.get("memory", False)
    assert asked == [
        (case, mode, names, torch.device("cpu"), seconds, memory)
        for mode in others.get("modes", MODES)
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--steps", "0"), "argument --steps: expected a positive whole number, got '0'"),
        (("--hidden", "1.5"), "argument --hidden: expected a positive whole number, got '1.5'"),
        (("--proj", "-1"), "argument --proj: expected a positive whole number, got '-1'"),
        (("--seconds", "nan"), "argument --seconds: expected a positive number, got 'nan'"),
        (("--seconds", "inf"), "argument --seconds: expected a positive number, got 'inf'"),
        (("--mode", "both"), "argument --mode: invalid choice: 'both'"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("--proj", "5"), "proj should be 0 or from 1 to hidden - 1 = 4, got 5"),
        (
            ("--backend", "abacus"),
            "backend should be one of default, native, cuda, triton, aten, reference, got 'abacus'",
        ),
        (("--device", "abacus"), "device should be cpu, cuda or cuda:N, got 'abacus'"),
        (("--device", "meta"), "device should be cpu, cuda or cuda:N, got 'meta'"),
        (("--device", "cpu", "--dtype", "tf32"), "expected a CUDA GPU, got device 'cpu'"),
        (("--device", "cuda:9999"), "device should be one that is there, got 'cuda:9999'"),
        (
            ("--cell", "--layers", "2"),
            "cell=True: expected nothing that only a layer has, got layers=2",
        ),
        (("--cell", "--bidirectional"), "bidirectional=True"),
        (("--packed", "--batch-first"), "a PackedSequence has no batch_first"),
    ],
)
def test_bad_arguments_of_bench_are_named(monkeypatch, capsys, arguments, expected) -> None:
    def measure(*arguments):
        raise AssertionError("measured before the arguments were looked at")

    monkeypatch.setattr(limits, "measure_gemm", measure)
    try:
        status = main([*TINY, *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "python -m fused_lstm bench: error: " in printed.err
    assert expected in printed.err


@pytest.mark.usefixtures("quick")
def test_bench_notices_a_wrong_layer(monkeypatch, capsys) -> None:
    class OffByOnePercent(fused_lstm.LSTM):
        def forward(self, input, hx=None):
            output, states = super().forward(input, hx)
            return output * 1.01, states

    monkeypatch.setattr(fused_lstm, "LSTM", OffByOnePercent)
    assert main([*ON_CPU, "--mode", "inference"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "WRONG: output: an error of" in printed


@pytest.mark.usefixtures("quick")
def test_a_backend_that_cannot_run_says_why_and_is_no_failure(capsys) -> None:
    # The kernels have no float64, on any machine.
    arguments = ("--backend", "triton", "--dtype", "float64", "--mode", "inference")
    assert main([*ON_CPU, *arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "fused_lstm[triton] UNAVAILABLE: backend='triton' cannot run here: torch.float64" in printed
    )


@pytest.mark.usefixtures("quick")
def test_what_torch_compiles_wrong_is_no_failure_of_ours(monkeypatch, capsys) -> None:
    class Wrong(Provider):
        def prepare(self, *arguments):
            call = TORCH.prepare(*arguments).call
            return Prepared(lambda data: tuple(2 * t for t in call(data)), "compiled")

    monkeypatch.setattr(providers, "COMPILED", Wrong("torch.compile", error_factor=8.0))
    right = bench.run(input=4, hidden=5, batch=2, steps=3, compile=True, device="cpu", seconds=0.01)
    assert "torch.compile (compiled) WRONG" in capsys.readouterr().out
    assert right


def test_bench_is_a_command() -> None:
    command = [sys.executable, "-m", "fused_lstm", *ON_CPU, "--mode", "inference"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "t3-b2-i4-h5-float32 on CPU" in done.stdout
    assert "fused_lstm" in done.stdout
