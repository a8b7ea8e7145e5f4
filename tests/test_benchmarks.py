"""python -m benchmarks.compare: a wrong layer is not timed, and records are complete."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
import torch
from torch import nn

import fused_lstm
from benchmarks import additions, cases, compare, records, timing
from benchmarks.cases import Case, Provider, Shape
from benchmarks.records import Environment, Result

TINY = ["--shape", "3,2,4,5", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def _small_and_repeatable(monkeypatch):
    monkeypatch.setitem(timing._GEMM_SIZE, "cpu", 64)
    threads = torch.get_num_threads()
    # Threads of several test processes wait for one another.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read_records(folder):
    """Map file names to contents, from the one device folder in `folder`."""
    (device,) = folder.iterdir()
    return {path.name: json.loads(path.read_text()) for path in device.iterdir()}


class OffByOnePercent(fused_lstm.LSTM):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output * 1.01, states


class FallsBack(fused_lstm.LSTM):
    def forward(self, input, hx=None):
        warnings.warn("no such kernel", fused_lstm.KernelFallbackWarning, stacklevel=2)
        return super().forward(input, hx)


def with_ours(monkeypatch, layer):
    providers = [cases.TORCH, Provider("fused_lstm", layer, fused_lstm.LSTMCell)]
    monkeypatch.setattr(cases, "list_providers", lambda backends: providers)


def test_records_of_a_tiny_case_are_complete(tmp_path, capsys) -> None:
    backends = ["--backend", "default", "--backend", "reference"]
    assert compare.main([*TINY, "--out", str(tmp_path), "--threads", "1", *backends]) == 0
    printed = capsys.readouterr().out
    assert "t3-b2-i4-h5-float32" in printed
    assert "fused_lstm[reference]" in printed

    contents = read_records(tmp_path)
    assert set(contents) == {"run.json", "t3-b2-i4-h5-float32.json"}
    run, record = contents["run.json"], contents["t3-b2-i4-h5-float32.json"]
    assert run["cases"] == ["t3-b2-i4-h5-float32"]
    assert run["not_run"] == {}
    assert record["case"]["dtype"] == "float32"
    assert [record["case"][size] for size in "TBIH"] == [3, 2, 4, 5]
    assert record["calls_per_sample"] == 1
    assert record["gemm_flops_per_second"] > 0
    assert set(record["environment"]) == {field.name for field in fields(Environment)}
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["threads"] == 1

    results = record["results"]
    assert [(r["provider"], r["mode"]) for r in results] == [
        (provider, mode)
        for mode in cases.MODES
        for provider in ("torch", "fused_lstm", "fused_lstm[reference]")
    ]
    for result in results:
        assert set(result) == {field.name for field in fields(Result)}
        assert result["status"] == "timed", result["detail"]
        assert result["repetitions"] >= timing.MIN_REPETITIONS
        times = result["seconds"]
        assert 0 < times["p20"] <= times["p50"] <= times["p80"]
        assert result["flops_per_second"] == pytest.approx(result["flops"] / times["p50"])
        assert result["backend"]
        assert result["reason"]
        assert result["error_over_budget"] <= 1
        expected = 3 if result["mode"] == "inference" else 3 + 3 + 4
        assert len(result["errors"]) == expected
    assert results[0]["ratio"] == results[0]["ratio_of_pairs"] == 1
    torch_seconds, our_seconds = (results[k]["seconds"]["p50"] for k in (0, 1))
    assert results[1]["ratio"] == pytest.approx(torch_seconds / our_seconds)


@pytest.mark.parametrize(
    ("shape", "dtype", "name", "inference_results"),
    [
        (Shape(3, 2, 4, 6, proj_size=3), "float32", "t3-b2-i4-h6-p3-float32", 3),
        (Shape(8, 3, 4, 5, packed=True), "float32", "t8-b3-i4-h5-packed-float32", 3),
        (Shape(1, 2, 4, 5, cell=True), "float32", "cell-b2-i4-h5-float32", 2),
        (Shape(3, 2, 4, 5), "float64", "t3-b2-i4-h5-float64", 3),
        (Shape(3, 2, 4, 5), "bfloat16", "t3-b2-i4-h5-bfloat16", 3),
    ],
)
def test_every_kind_of_case_is_checked_and_timed(
    tmp_path, shape, dtype, name, inference_results
) -> None:
    status = compare.run(
        [Case(shape, dtype)],
        # Of another order of operations than torch's own, in float64 too.
        cases.list_providers(["reference"]),
        torch.device("cpu"),
        tmp_path,
        seconds=0.01,
        budget=60,
    )
    assert status == 0
    record = read_records(tmp_path)[f"{name}.json"]
    assert record["case"]["proj_size"] == shape.proj_size
    assert record["case"]["packed"] == shape.packed
    assert record["calls_per_sample"] == (cases.CALLS_PER_SAMPLE_OF_CELL if shape.cell else 1)
    for result in record["results"]:
        assert result["status"] == "timed", result["detail"]
        assert result["backend"] == ("torch" if result["provider"] == "torch" else "reference")
        # In training besides the gradients of three inputs and four or five parameters.
        gradients = (7 + bool(shape.proj_size)) * (result["mode"] == "training")
        assert len(result["errors"]) == inference_results + gradients
        assert all(error["budget"] > 0 for error in result["errors"].values())


def test_a_second_run_overwrites_the_same_files(tmp_path) -> None:
    shape = Shape(2, 3, 4, 5, num_layers=2, bidirectional=True, batch_first=True)
    for _ in range(2):
        status = compare.run(
            [Case(shape, "bfloat16")],
            cases.list_providers(["default"]),
            torch.device("cpu"),
            tmp_path,
            seconds=0.01,
            budget=60,
        )
        assert status == 0
    name = "t2-b3-i4-h5-l2-bi-bf-bfloat16.json"
    assert set(read_records(tmp_path)) == {"run.json", name}


def test_a_wrong_layer_is_recorded_and_not_timed(tmp_path, monkeypatch, capsys) -> None:
    with_ours(monkeypatch, OffByOnePercent)
    assert compare.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out
    contents = read_records(tmp_path)
    assert len(contents["run.json"]["wrong"]) == len(cases.MODES)
    ours = [r for r in contents["t3-b2-i4-h5-float32.json"]["results"] if r["provider"] != "torch"]
    for result in ours:
        assert result["status"] == "wrong"
        assert result["seconds"] is result["ratio"] is None
        assert result["error_over_budget"] > 1
        assert result["errors"]["output"]["error"] > result["errors"]["output"]["budget"]
    assert ours[0]["detail"].startswith("output: an error of")


def test_nan_is_wrong(tmp_path, monkeypatch) -> None:
    class NotANumber(fused_lstm.LSTM):
        def forward(self, input, hx=None):
            output, (h_n, c_n) = super().forward(input, hx)
            return output, (h_n, c_n * math.nan)

    with_ours(monkeypatch, NotANumber)
    assert compare.main([*TINY, "--out", str(tmp_path)]) == 1
    result = read_records(tmp_path)["t3-b2-i4-h5-float32.json"]["results"][1]
    assert (result["status"], result["error_over_budget"]) == ("wrong", "nan")


def test_a_kernel_that_falls_back_has_failed(tmp_path, monkeypatch) -> None:
    with_ours(monkeypatch, FallsBack)
    assert compare.main([*TINY, "--out", str(tmp_path)]) == 1
    contents = read_records(tmp_path)
    result = contents["t3-b2-i4-h5-float32.json"]["results"][1]
    assert result["status"] == "failed"
    assert result["detail"] == "KernelFallbackWarning: no such kernel"
    assert len(contents["run.json"]["failed"]) == len(cases.MODES)


def test_what_cannot_run_says_why(tmp_path) -> None:
    # The kernels have no float64, on any machine.
    arguments = [*TINY, "--out", str(tmp_path), "--dtype", "float64", "--backend", "triton"]
    assert compare.main(arguments) == 0
    result = read_records(tmp_path)["t3-b2-i4-h5-float64.json"]["results"][1]
    assert result["status"] == "unavailable"
    assert "float64" in result["detail"]


def test_cases_beyond_the_budget_are_listed(tmp_path, capsys) -> None:
    arguments = [*TINY, "--out", str(tmp_path), "--budget", "1e-9"]
    assert compare.main(arguments) == 0
    assert "not run  t3-b2-i4-h5-float32: beyond the budget of 1e-09 s" in capsys.readouterr().out
    run = read_records(tmp_path)["run.json"]
    assert run["cases"] == []
    assert run["not_run"] == {"t3-b2-i4-h5-float32": "beyond the budget of 1e-09 s"}


def test_a_case_that_breaks_off_fails_the_run(tmp_path, monkeypatch) -> None:
    def break_off(*arguments):
        raise RuntimeError("out of inputs")

    monkeypatch.setattr(compare, "measure", break_off)
    assert compare.main([*TINY, "--out", str(tmp_path)]) == 1
    run = read_records(tmp_path)["run.json"]
    assert run["not_run"] == {"t3-b2-i4-h5-float32": "RuntimeError: out of inputs"}


def test_the_tuned_allocator_is_a_child_process_of_its_own_records(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compare.platform, "libc_ver", lambda: ("glibc", "2.36"))
    arguments = [*TINY, "--out", str(tmp_path), "--tuned-allocator"]
    children = []

    def run(command, **options):
        children.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 3)

    with monkeypatch.context() as patch:
        patch.setattr(compare.subprocess, "run", run)
        assert compare.main(arguments) == 3
    ((command, environment),) = children
    assert command == [sys.executable, "-m", "benchmarks.compare", *arguments]
    four_gib = "4294967296"
    assert environment["MALLOC_MMAP_THRESHOLD_"] == four_gib
    assert environment["MALLOC_TRIM_THRESHOLD_"] == four_gib

    # What that child does, but for its allocator.
    for name in records.TUNED_ALLOCATOR:
        monkeypatch.setenv(name, environment[name])
    assert compare.main(arguments) == 0
    contents = read_records(tmp_path)
    name = "t3-b2-i4-h5-float32-tuned-allocator"
    assert set(contents) == {"run-tuned-allocator.json", f"{name}.json"}
    assert contents["run-tuned-allocator.json"]["cases"] == [name]
    record = contents[f"{name}.json"]
    assert record["environment"]["allocator"] == "glibc, 4 GiB thresholds"
    assert {result["mode"] for result in record["results"]} == {"training"}


@pytest.mark.parametrize(
    ("device", "library", "expected"),
    [
        ("cpu", ("", ""), "expected a Python on glibc 2.35 or later, got "),
        ("cpu", ("glibc", "2.31"), "expected a Python on glibc 2.35 or later, got glibc 2.31"),
        ("cuda:0", ("glibc", "2.36"), "expected --device cpu, got 'cuda:0'"),
    ],
)
def test_the_allocator_that_cannot_be_tuned(monkeypatch, capsys, device, library, expected) -> None:
    monkeypatch.setattr(compare.platform, "libc_ver", lambda: library)
    with pytest.raises(SystemExit) as stop:
        compare.main(["--device", device, "--tuned-allocator"])
    assert stop.value.code == 2
    assert f"argument --tuned-allocator: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("--device", "abacus", "expected cpu, cuda or cuda:N, got 'abacus'"),
        ("--device", "meta", "expected cpu, cuda or cuda:N, got 'meta'"),
        ("--seconds", "-1", "expected a positive number, got '-1'"),
        ("--budget", "nan", "expected a positive number, got 'nan'"),
        ("--threads", "0", "expected a positive whole number, got '0'"),
        ("--shape", "1,2,3", "expected four positive whole numbers T,B,I,H, got '1,2,3'"),
        ("--dtype", "int8", "invalid choice: 'int8'"),
        ("--backend", "abacus", "invalid choice: 'abacus'"),
    ],
)
def test_bad_arguments_are_named(capsys, argument, value, expected) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main([argument, value])
    assert stop.value.code == 2
    assert f"argument {argument}: {expected}" in capsys.readouterr().err


def test_a_file_is_no_folder_for_records(tmp_path, capsys) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stop:
        compare.main([*TINY, "--out", str(file)])
    assert stop.value.code == 2
    assert "argument --out: expected a folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main(["--device", "cuda", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "argument --device: expected a device that is there" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_tiny_case_on_a_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(timing._GEMM_SIZE, "cuda", 512)
    arguments = ["--shape", "8,4,16,32", "--seconds", "0.01", "--device", "cuda"]
    assert compare.main([*arguments, "--out", str(tmp_path)]) == 0
    contents = read_records(tmp_path)
    for dtype in cases.DEFAULT_DTYPES["cuda"]:
        results = contents[f"t8-b4-i16-h32-{dtype}.json"]["results"]
        assert {(r["provider"], r["launch"]) for r in results} == {
            (provider, launch)
            for provider in ("torch", "fused_lstm", "fused_lstm[triton]")
            for launch in ("eager", "graph")
        }
        for result in results:
            assert result["status"] == "timed", result["detail"]
            assert result["host_seconds"] is not None
            training_call = (result["mode"], result["launch"]) == ("training", "eager")
            assert (result["peak_memory_bytes"] is not None) == training_call


def test_the_table_needs_no_rich(monkeypatch, capsys) -> None:
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    result = Result("fused_lstm", "inference", "eager", 1, "unavailable", "no reason")
    records.print_table([(Case(Shape(1, 2, 3, 4), "float32"), [result])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["case", "mode", "launch", "layer"]
    assert "fused_lstm UNAVAILABLE: no reason" in lines[1]


def test_headlines_are_geometric_means_over_the_named_shapes() -> None:
    def results(inference, training):
        ours = [("inference", inference), ("training", training)]
        return [
            Result("torch", "inference", "eager", 1, ratio=1.0),
            *(Result("fused_lstm", mode, "eager", 1, ratio=ratio) for mode, ratio in ours),
        ]

    first, second = cases.HEADLINE_SHAPES[:2]
    done = [
        (Case(first, "float32"), results(1.0, 3.0)),
        (Case(second, "float32"), results(4.0, None)),
        (Case(first, "bfloat16"), results(100.0, 100.0)),
        (Case(Shape(1, 2, 3, 4), "float32"), results(100.0, 100.0)),
    ]
    inference, training = records.list_headlines(done)
    assert (inference.provider, inference.mode) == ("fused_lstm", "inference")
    assert inference.geometric_mean_of_ratio == pytest.approx(2)
    assert inference.shapes == (first.name, second.name)
    assert training.geometric_mean_of_ratio == pytest.approx(3)
    assert training.shapes == (first.name,)


def test_headlines_are_printed_and_recorded(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cases, "HEADLINE_SHAPES", (Shape(3, 2, 4, 5),))
    assert compare.main([*TINY, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    headlines = read_records(tmp_path)["run.json"]["headlines"]
    assert [headline["mode"] for headline in headlines] == list(cases.MODES)
    for headline in headlines:
        assert headline["shapes"] == ["t3-b2-i4-h5"]
        figure = headline["geometric_mean_of_ratio"]
        assert f"fused_lstm, {headline['mode']}: {figure:.2f}, the geometric mean" in printed


def test_files_are_replaced_whole(tmp_path) -> None:
    path = tmp_path / "folder" / "record.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


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
    data = cases.make_data(Case(packed, "float32"), torch.device("cpu"))
    assert data.input.data.shape == (rows, 4)
    assert int(data.batch_sizes.sum()) == rows
    lengths = nn.utils.rnn.pad_packed_sequence(data.input)[1]
    assert torch.equal(lengths, packed.lengths)


def test_contenders_take_turns_and_sets_rotate() -> None:
    order = []

    def call_of(name):
        return lambda index: order.append((name, index))

    calls = {name: call_of(name) for name in "ab"}
    samples = timing.time_in_turns(calls, torch.device("cpu"), 1e-9, sets=2)
    turns = order[2 * timing.WARM_UP :]
    assert "".join(name for name, _ in turns) == "abbaabbaab"
    assert [index for _, index in turns[::2]] == [0, 1, 0, 1, 0]
    assert [len(taken.seconds) for taken in samples.values()] == [5, 5]
    order.clear()
    timing.time_in_turns(calls, torch.device("cpu"), 1e-9, calls_per_sample=3)
    assert (
        "".join(name for name, _ in order[6 * timing.WARM_UP :]) == "aaabbbbbbaaaaaabbbbbbaaaaaabbb"
    )
    assert timing.ratio_of_pairs([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_names_of_cases_are_unique(device_type) -> None:
    names = [case.name for case in cases.list_cases(device_type)]
    assert len(set(names)) == len(names) >= 13


def test_default_cases_on_a_cpu_begin_with_the_headline_shapes() -> None:
    chosen = cases.list_cases("cpu")
    headline = [Case(shape, "float32") for shape in cases.HEADLINE_SHAPES]
    assert chosen[: len(headline)] == headline
    # A dtype that is asked for is that of every shape.
    assert [case.shape for case in cases.list_cases("cpu", ["float64"])] == list(cases.CPU_SHAPES)


def test_additions_are_checked_timed_and_recorded(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(additions, "SIZES", [(5, 3, 4, 6)])
    assert additions.main(["--out", str(tmp_path), "--seconds", "0.01"]) == 0
    record = read_records(tmp_path)["additions.json"]
    assert record["gemm_flops_per_second"] > 0
    measured = {(each["addition"], each["mode"]): each for each in record["additions"]}
    names = ("resets", "lengths", "return_cells", "zoneout", "recurrent_dropout")
    printed = capsys.readouterr().out
    for name, mode in itertools.product(names, cases.MODES):
        result = measured[name, mode]
        assert result["status"] == "timed"
        assert result["sizes"] == {"T": 5, "B": 3, "I": 4, "H": 6}
        assert result["over_plain"] > 0
        assert set(result["seconds"]) >= {"ours", "plain"}
        assert name in printed
        if result["todays_way"]:
            assert result["ratio"] > 0
            assert 0 < result["error_over_budget"] <= 1


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_wrong_addition_is_not_timed(tmp_path, monkeypatch, capsys, factor) -> None:
    class Wrong(fused_lstm.LSTM):
        def forward(self, input, hx=None, **options):
            output, *rest = super().forward(input, hx, **options)
            return output * factor, *rest

    monkeypatch.setattr(additions, "SIZES", [(5, 3, 4, 6)])
    monkeypatch.setattr(additions.fused_lstm, "LSTM", Wrong)
    assert additions.main(["--out", str(tmp_path), "--seconds", "0.01"]) == 1
    record = read_records(tmp_path)["additions.json"]
    wrong = {each["addition"] for each in record["additions"] if each["status"] == "wrong"}
    assert wrong == {"resets", "lengths", "return_cells"}
    assert all("seconds" not in e for e in record["additions"] if e["status"] == "wrong")
    assert "WRONG" in capsys.readouterr().out
