"""The benchmark suite: records are complete, wrong layers are not timed, nothing is left out."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import benchmarks.test_additions as suite_of_additions
import fused_lstm
from benchmarks import additions, records, shapes, suite, units
from benchmarks import environment as environments
from benchmarks.environment import Environment
from benchmarks.records import Recorder
from benchmarks.shapes import Group
from fused_lstm.bench import cases, comparison, limits, timing
from fused_lstm.bench.cases import Case, Shape
from fused_lstm.bench.comparison import Measured, Result
from fused_lstm.bench.limits import Limits
from fused_lstm.bench.providers import TORCH, Prepared, Provider
from fused_lstm.bench.timing import Percentiles

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[1]
TINY = Case(Shape(3, 2, 4, 5), "float32")
SECOND = Case(Shape(3, 2, 4, 6, proj_size=3), "float64")
GROUPS = (
    Group("small", (TINY,), ("fused_lstm", "fused_lstm[reference]")),
    Group("variants", (SECOND,), ("fused_lstm",)),
)
SIZES = (5, 3, 4, 6)


@pytest.fixture(autouse=True)
def _small_and_repeatable(monkeypatch):
    monkeypatch.setattr(shapes, "list_groups", lambda device_type: GROUPS)
    monkeypatch.setattr(shapes, "HEADLINE", (TINY.shape,))
    monkeypatch.setattr(suite_of_additions, "TASKS", [])
    monkeypatch.setattr(limits, "_GEMM_SIZES", {"cpu": (16, 16)})
    monkeypatch.setattr(limits, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(limits, "_SECONDS", 1e-4)
    # pytest-benchmark would not measure in a worker of pytest-xdist.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", *environments.TUNED_ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    # Each timing begins with a collection, of what all tests have loaded.
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@dataclass
class Run:
    """A run of the suite.

    Attributes:
        status: pytest's exit status.
        outcomes: of each test: "passed", "skipped", "failed"; and why.
        printed: to standard output and to standard error.
    """

    status: int
    outcomes: dict[str, tuple[str, str]]
    printed: str

    def count(self) -> Counter[str]:
        return Counter(outcome for outcome, _ in self.outcomes.values())


class Outcomes:
    """A plugin that keeps what became of each test."""

    def __init__(self) -> None:
        self.of_tests: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.partition("[")[2].removesuffix("]")
            self.of_tests[name] = report.outcome, str(report.longrepr or "")


@pytest.fixture
def run_suite(tmp_path, capsys):
    """Run `pytest benchmarks` in this process."""

    def run(*arguments: str, out: Path = tmp_path / "out") -> Run:
        plugin = Outcomes()
        status = pytest.main(
            [
                str(REPOSITORY / "benchmarks"),
                *("-c", str(REPOSITORY / "pyproject.toml")),
                *("-s", "-q", "-o", "timeout=0", "--benchmark-quiet"),
                # What this process has running already.
                *("-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:faulthandler"),
                *("--out", str(out), "--seconds", "0.005", "--threads", "1"),
                *arguments,
            ],
            plugins=[plugin],
        )
        captured = capsys.readouterr()
        outcomes = {
            name: outcome
            for name, outcome in plugin.of_tests.items()
            if not name.startswith("NOTSET")
        }
        return Run(int(status), outcomes, captured.out + captured.err)

    return run


def read_records(folder):
    """Map file names to contents, from the one device folder in `folder`."""
    (device,) = (path for path in folder.iterdir() if path.is_dir())
    return {path.name: json.loads(path.read_text()) for path in device.iterdir()}


@dataclass(frozen=True)
class Altered(Provider):
    """torch's layer, and what it returns is altered."""

    factor: float = 1.0
    error: Exception | None = None

    def prepare(self, case, parameters, device, mode):
        if self.error is not None:
            raise self.error
        call = TORCH.prepare(case, parameters, device, mode).call
        return Prepared(lambda data: tuple(t * self.factor for t in call(data)), "altered")


class AlteredOurs(Altered):
    is_ours: ClassVar[bool] = True


# ---- the suite


def test_a_run_leaves_complete_records(run_suite, tmp_path) -> None:
    report = tmp_path / "report.json"
    run = run_suite("--benchmark-json", str(report))
    assert run.status == 0
    # Two cases in two modes: torch's and two of ours, torch's and one of ours.
    assert run.count() == {"passed": 2 * (3 + 2)}

    contents = read_records(tmp_path / "out")
    assert set(contents) == {"run.json", f"{TINY.name}.json", f"{SECOND.name}.json"}
    summary = contents["run.json"]
    assert summary["schema"] == 2
    assert summary["cases"] == [TINY.name, SECOND.name]
    assert summary["not_run"] == {}
    assert summary["wrong"] == summary["failed"] == []
    assert set(summary["limits"]) == {"float32", "float64"}
    assert summary["elapsed_seconds"] > 0

    for case, group in ((TINY, "small"), (SECOND, "variants")):
        record = contents[f"{case.name}.json"]
        assert record["schema"] == 2
        assert record["case"] == {
            "name": case.name,
            "dtype": case.dtype_name,
            **{field.name: getattr(case.shape, field.name) for field in fields(Shape)},
        }
        assert record["groups"] == [group]
        assert record["input_sets"] == 1
        assert set(record["calls_per_sample"]) == set(cases.MODES)
        assert all(1 <= calls <= 20 for calls in record["calls_per_sample"].values())
        assert record["seconds_per_mode"] == 0.005
        assert record["limits"] == summary["limits"][case.dtype_name]
        assert record["limits"]["gemm_flops_per_second"] > 0
        assert record["limits"]["copy_bytes_per_second"] > 0
        assert record["limits"]["exchange_seconds"] == {}
        environment = record["environment"]
        assert set(environment) == {field.name for field in fields(Environment)}
        assert environment == summary["environment"]
        assert environment["torch"] == torch.__version__
        assert environment["threads"] == 1
        assert environment["device_type"] == "cpu"
        assert environment["allocator"] == "default"
        results = record["results"]
        providers = ["torch", "fused_lstm", *["fused_lstm[reference]"] * (case is TINY)]
        assert [(r["provider"], r["mode"]) for r in results] == [
            (provider, mode) for mode in cases.MODES for provider in providers
        ]
        for result in results:
            assert set(result) == {field.name for field in fields(Result)}
            assert result["status"] == "timed", result["detail"]
            least = limits.least_seconds(case, result["mode"], Limits(**record["limits"]))
            assert result["limit_seconds"] == least.seconds
            assert result["fraction_of_limit"] == least.seconds / result["seconds"]["p50"]
        for torchs, *others in (results[: len(providers)], results[len(providers) :]):
            for result in others:
                ratio = torchs["seconds"]["p50"] / result["seconds"]["p50"]
                assert result["ratio"] == pytest.approx(ratio)

    # pytest-benchmark tells of the same samples.
    told = {each["param"]: each for each in json.loads(report.read_text())["benchmarks"]}
    assert set(told) == set(run.outcomes)
    for case in (TINY, SECOND):
        for result in contents[f"{case.name}.json"]["results"]:
            each = told[f"{case.name}-{result['mode']}-{result['provider']}"]
            assert each["group"] == f"{case.name}-{result['mode']}"
            assert each["stats"]["median"] == pytest.approx(result["seconds"]["p50"], rel=1e-6)
            assert each["stats"]["rounds"] == result["repetitions"] >= timing.MIN_REPETITIONS
            assert each["extra_info"]["ratio"] == result["ratio"]

    # The last lines say what it comes to.
    for headline in summary["headlines"]:
        assert headline["shapes"] == [TINY.shape.name]
        assert (
            f"{headline['provider']}, {headline['mode']}: "
            f"{headline['geometric_mean_of_ratio']:.2f}, the geometric mean of the ratio over 1 of "
            "1 headline shapes"
        ) in run.printed
    ours = ("fused_lstm", "fused_lstm[reference]")
    assert [(h["provider"], h["mode"]) for h in summary["headlines"]] == [
        (provider, mode) for mode in cases.MODES for provider in ours
    ]
    assert f"2 cases in {summary['elapsed_seconds']:.0f} s" in run.printed


def test_a_slower_layer_is_said_to_be(run_suite, monkeypatch) -> None:
    def measure(case, mode, providers, *arguments, **options):
        ratio = 0.5 if mode == "training" else 1.5
        result = Result(
            "fused_lstm", mode, "eager", "timed", backend="native", ratio=ratio, repetitions=2
        )
        samples = timing.Samples([1.0, 2.0])
        return Measured([result], {("fused_lstm", "eager"): samples}, 1)

    monkeypatch.setattr(comparison, "measure", measure)
    run = run_suite("--group", "small", "-k", "not torch and not reference")
    assert run.status == 0
    assert "fused_lstm is slower (ratio below 0.97) in 1 of 2 cases and modes" in run.printed
    assert f"0.50  {TINY.name} training eager (native)" in run.printed
    assert f"1.50  {TINY.name}" not in run.printed


@pytest.mark.parametrize(
    ("arguments", "cases_and_modes", "providers"),
    [
        (("--group", "small"), 2, ("torch", "fused_lstm", "fused_lstm[reference]")),
        (("--dtype", "float64", "--mode", "training"), 1, ("torch", "fused_lstm")),
        (
            ("--provider", "fused_lstm[aten]", "--mode", "inference"),
            2,
            ("torch", "fused_lstm[aten]"),
        ),
        (("--provider", "torch", "--group", "small", "--group", "variants"), 4, ("torch",)),
    ],
)
def test_what_is_asked_for_is_selected(
    run_suite, tmp_path, arguments, cases_and_modes, providers
) -> None:
    run = run_suite(*arguments)
    assert run.status == 0
    assert run.count() == {"passed": cases_and_modes * len(providers)}
    wanted = dict(zip(arguments[::2], arguments[1::2], strict=True))
    found = [
        (record["case"]["dtype"], result["mode"], result["provider"])
        for name, record in read_records(tmp_path / "out").items()
        if name != "run.json"
        for result in record["results"]
    ]
    assert len(found) == cases_and_modes * len(providers)
    assert {provider for *_, provider in found} == set(providers)
    assert {dtype for dtype, *_ in found} <= {wanted.get("--dtype", dtype) for dtype, *_ in found}
    assert all(mode == wanted.get("--mode", mode) for _, mode, _ in found)


def test_plans_join_what_groups_say_of_a_case(monkeypatch) -> None:
    groups = (
        Group("speech", (SECOND, TINY), ("fused_lstm[aten]",)),
        Group("small", (TINY,), ("onnxruntime", "fused_lstm"), memory=True),
    )
    monkeypatch.setattr(shapes, "list_groups", lambda device_type: groups)
    plans = suite.list_plans("cpu", cases.MODES)
    assert [(plan.case, plan.mode) for plan in plans] == list(
        itertools.product((SECOND, TINY), cases.MODES)
    )
    assert [plan.name for plan in plans[:2]] == [f"{SECOND.name}-{mode}" for mode in cases.MODES]
    assert [plan.memory for plan in plans] == [False, False, True, True]
    assert [plan.groups for plan in plans[1:3]] == [("speech",), ("speech", "small")]
    names = [[provider.name for provider in plan.providers] for plan in plans[1:3]]
    assert names == [
        ["torch", "fused_lstm[aten]"],
        ["torch", "fused_lstm", "fused_lstm[aten]", "onnxruntime"],
    ]
    (plan,) = suite.list_plans("cpu", ["training"], groups=["small"], providers=["torchrl"])
    assert plan.case == TINY
    assert [provider.name for provider in plan.providers] == ["torch", "torchrl"]
    assert [launch for _, launch in plan.contenders(CPU)] == ["eager", "eager"]
    on_gpu = [(p.name, launch) for p, launch in plan.contenders(torch.device("cuda"))]
    assert on_gpu[:2] == [("torch", "eager"), ("torch", "graph")]


@pytest.mark.parametrize(
    ("provider", "status", "detail"),
    [
        (AlteredOurs("fused_lstm", factor=1.01), "wrong", "an error of "),
        (AlteredOurs("fused_lstm", factor=math.nan), "wrong", "an error of nan"),
        (AlteredOurs("fused_lstm", error=RuntimeError("it broke")), "failed", "it broke"),
    ],
)
def test_a_wrong_layer_of_ours_fails_the_run(
    run_suite, monkeypatch, tmp_path, provider, status, detail
) -> None:
    monkeypatch.setitem(suite.PROVIDERS, "fused_lstm", provider)
    run = run_suite("--group", "small")
    assert run.status == 1
    assert run.count() == {"failed": 2, "passed": 4}
    contents = read_records(tmp_path / "out")
    for mode in cases.MODES:
        outcome, reason = run.outcomes[f"{TINY.name}-{mode}-fused_lstm"]
        assert outcome == "failed"
        assert reason.startswith(f"{status}: ")
        assert detail in reason
    assert len(contents["run.json"][status]) == 2
    assert contents["run.json"]["headlines"][0]["provider"] == "fused_lstm[reference]"
    for line in contents["run.json"][status]:
        assert line.startswith(f"{TINY.name} fused_lstm ")
        assert f"{status.upper()}  {line}" in run.printed
    ours = [r for r in contents[f"{TINY.name}.json"]["results"] if r["provider"] == "fused_lstm"]
    assert [result["status"] for result in ours] == [status, status]
    for result in ours:
        assert result["seconds"] is result["ratio"] is None
        if math.isnan(provider.factor):
            assert result["error_over_budget"] == "nan"


def test_a_backend_that_cannot_run_a_case_does_not_fail_the_run(run_suite, tmp_path) -> None:
    # The kernels have no float64, on any machine.
    run = run_suite("--group", "variants", "--provider", "fused_lstm[triton]")
    assert run.status == 0
    _, reason = run.outcomes[f"{SECOND.name}-training-fused_lstm[triton]"]
    assert "float64" in reason
    assert run.count() == {"skipped": 2, "passed": 2}
    assert read_records(tmp_path / "out")["run.json"]["failed"] == []


@pytest.mark.parametrize(
    ("provider", "status"),
    [
        (Altered("onnxruntime", error_factor=8.0, factor=1.5), "wrong"),
        (Altered("onnxruntime", error=RuntimeError("it broke")), "unavailable"),
    ],
)
def test_a_wrong_peer_does_not_fail_the_run(
    run_suite, monkeypatch, tmp_path, provider, status
) -> None:
    monkeypatch.setitem(suite.PROVIDERS, "onnxruntime", provider)
    run = run_suite(*("--group", "small", "--provider", "fused_lstm", "--provider", "onnxruntime"))
    assert run.status == 0
    assert run.count() == {"skipped": 2, "passed": 4}
    _, reason = run.outcomes[f"{TINY.name}-training-onnxruntime"]
    assert f"{status}: " in reason
    contents = read_records(tmp_path / "out")
    assert len(contents["run.json"]["wrong"]) == 2 * (status == "wrong")
    assert contents["run.json"]["failed"] == []
    theirs = [r for r in contents[f"{TINY.name}.json"]["results"] if r["provider"] == "onnxruntime"]
    assert [result["status"] for result in theirs] == [status, status]


def test_a_case_that_breaks_off_fails_the_run_once_and_others_go_on(
    run_suite, monkeypatch, tmp_path
) -> None:
    right, calls = comparison.measure, []

    def measure(case, mode, *arguments, **options):
        calls.append((case, mode))
        if (case, mode) == (TINY, "inference"):
            raise RuntimeError("out of inputs")
        return right(case, mode, *arguments, **options)

    monkeypatch.setattr(comparison, "measure", measure)
    run = run_suite()
    assert run.status == 1
    assert calls == list(itertools.product((TINY, SECOND), cases.MODES))
    assert run.count() == {"failed": 3, "passed": 7}
    summary = read_records(tmp_path / "out")["run.json"]
    assert summary["failed"] == [f"{TINY.name}-inference: RuntimeError: out of inputs"]
    assert summary["cases"] == [TINY.name, SECOND.name]
    assert "FAILED  t3-b2-i4-h5-float32-inference: RuntimeError: out of inputs" in run.printed


# ---- budget, and going on


def test_cases_beyond_the_budget_are_listed(run_suite, tmp_path) -> None:
    run = run_suite("--budget", "1e-9")
    assert run.status == 0
    assert run.count() == {"skipped": 10}
    summary = read_records(tmp_path / "out")["run.json"]
    assert summary["cases"] == []
    assert summary["budget_seconds"] == 1e-9
    reason = "beyond the budget of 1e-09 s"
    names = [f"{case.name}-{mode}" for case in (TINY, SECOND) for mode in cases.MODES]
    assert summary["not_run"] == dict.fromkeys(names, reason)
    for name in names:
        assert f"not run  {name}: {reason}" in run.printed


def test_a_case_that_would_not_fit_is_not_begun(monkeypatch, tmp_path) -> None:
    now = [0.0]
    monkeypatch.setattr(records.time, "monotonic", lambda: now[0])
    durations = iter((10.0, 30.0, 12.0))
    limited = []

    def measure(*arguments, **options):
        now[0] += next(durations)
        return Measured([replace(TIMED)], {}, 1)

    monkeypatch.setattr(comparison, "measure", measure)
    monkeypatch.setattr(suite, "measure_gemm", lambda *arguments: limited.append(now[0]) or 1.0)
    recorder = Recorder(tmp_path, ENVIRONMENT, budget=81.0, resume=False)
    of_run = suite.Suite(CPU, 0.1, recorder)
    plan = suite.Plan(TINY, "inference", (TORCH,), (), False)
    for _ in range(3):
        of_run.run(plan)
    # 52 s are over, and the longest of the three took 30.
    with pytest.raises(suite.NotRunError, match=r"beyond the budget of 81 s"):
        of_run.run(plan)
    assert recorder.not_run == {plan.name: "beyond the budget of 81 s"}
    recorder.budget = 83.0
    with pytest.raises(StopIteration):
        of_run.run(plan)
    # After half a minute the rate of products is measured again.
    assert limited == [0, 40]


def test_what_is_recorded_is_left_out_of_a_run_that_resumes(
    run_suite, monkeypatch, tmp_path
) -> None:
    first = run_suite()
    assert first.count() == {"passed": 10}
    before = read_records(tmp_path / "out")

    def measure(*arguments, **options):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "measure", measure)
        # Records take no time: a budget that is spent leaves nothing out.
        resumed = run_suite("--resume", "--budget", "1e-9")
    assert resumed.status == 0
    assert resumed.count() == {"skipped": 10}
    assert all("recorded by an earlier run" in reason for _, reason in resumed.outcomes.values())
    after = read_records(tmp_path / "out")
    for case in (TINY, SECOND):
        assert after[f"{case.name}.json"] == before[f"{case.name}.json"]
    for name in ("cases", "headlines", "slopes", "wrong", "failed", "not_run"):
        assert after["run.json"][name] == before["run.json"][name]

    # Of other sources, one is measured again.
    (device,) = (tmp_path / "out").iterdir()
    path = device / f"{SECOND.name}.json"
    content = json.loads(path.read_text())
    content["environment"]["sources"] = "others"
    path.write_text(json.dumps(content))
    again = run_suite("--resume")
    assert again.count() == {"skipped": 6, "passed": 4}
    assert json.loads(path.read_text())["environment"] != content["environment"]
    # Without --resume, all are.
    assert run_suite("--group", "small").count() == {"passed": 6}


def test_a_wrong_layer_of_an_earlier_run_is_wrong_in_one_that_resumes(
    run_suite, monkeypatch, tmp_path
) -> None:
    wrong = AlteredOurs("fused_lstm", factor=1.01)
    monkeypatch.setitem(suite.PROVIDERS, "fused_lstm", wrong)
    first = run_suite("--group", "small", "--mode", "training")
    again = run_suite("--group", "small", "--mode", "training", "--resume")
    assert first.status == again.status == 1
    # What was wrong is tried again.
    assert again.count() == {"failed": 1, "passed": 2}
    assert len(read_records(tmp_path / "out")["run.json"]["wrong"]) == 1


ENVIRONMENT = Environment(
    device="a processor",
    device_type="cpu",
    slug="a-processor",
    driver=None,
    compute_capability=None,
    processor="a processor",
    cpu_count=2,
    threads=1,
    allocator="default",
    load_average=0.0,
    python="3.12.1",
    torch="2.11",
    triton=None,
    cuda="13.0",
    cudnn=91900,
    peers={"onnxruntime": "1.2"},
    sources="these",
    commit="c0ffee",
    dirty=False,
    date="2026-01-01",
)
TIMED = Result("torch", "inference", "eager", "timed", seconds=Percentiles(1.0, 2.0, 3.0))
CONTENDERS = [("torch", "eager")]
MEASURED = Measured([TIMED], {}, 1)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"date": "2026-01-02", "load_average": 3.0}, True),
        ({"commit": "decaf", "dirty": True}, True),
        ({"sources": "others"}, False),
        ({"allocator": "another"}, False),
        ({"torch": "2.12"}, False),
        ({"triton": "3.6"}, False),
        ({"device": "another"}, False),
        ({"driver": "580"}, False),
        ({"threads": 2}, False),
        ({"peers": {}}, False),
        ({"cudnn": 92000}, False),
        ({"cuda": "12.8"}, False),
        ({"python": "3.13"}, False),
    ],
)
def test_a_record_of_another_environment_is_not_resumed(tmp_path, change, same) -> None:
    Recorder(tmp_path, ENVIRONMENT, budget=1, resume=False).add(
        TINY, (), Limits(1.0), 0.1, MEASURED
    )
    recorder = Recorder(tmp_path, replace(ENVIRONMENT, **change), budget=1, resume=True)
    assert recorder.resumed(TINY, "inference", CONTENDERS) == ([TIMED] if same else None)
    assert recorder.resumed(TINY, "training", CONTENDERS) is None
    assert list(recorder.done) == [TINY.name] * same
    eager = Recorder(tmp_path, ENVIRONMENT, budget=1, resume=False)
    assert eager.resumed(TINY, "inference", CONTENDERS) is None


def test_what_is_measured_again_takes_the_place_of_what_was_recorded(tmp_path) -> None:
    for version in range(2):
        recorder = Recorder(tmp_path, ENVIRONMENT, budget=1, resume=False)
        for mode in ("inference", "training"):
            result = replace(TIMED, mode=mode, detail=f"run {version}")
            recorder.add(TINY, (), Limits(1.0), 0.1, Measured([result], {}, 1))
    results = read_records(tmp_path)[f"{TINY.name}.json"]["results"]
    assert [(result["mode"], result["detail"]) for result in results] == [
        ("inference", "run 1"),
        ("training", "run 1"),
    ]


def test_all_cases_are_compared_with_the_best_of_the_limits(tmp_path) -> None:
    recorder = Recorder(tmp_path, ENVIRONMENT, budget=1, resume=False)
    recorder.add(TINY, ("small",), Limits(1e3), 0.1, Measured([replace(TIMED)], {}, 1))
    recorder.finish({"float32": Limits(2e3)})
    contents = read_records(tmp_path)
    record = contents[f"{TINY.name}.json"]
    assert record["groups"] == ["small"]
    assert record["seconds_per_mode"] == 0.1
    assert record["limits"] == contents["run.json"]["limits"]["float32"]
    (result,) = record["results"]
    assert result["limit_seconds"] == TINY.flops("inference") / 2e3
    assert result["fraction_of_limit"] == result["limit_seconds"] / 2.0
    # What was resumed keeps the limits that it was measured with.
    resuming = Recorder(tmp_path, ENVIRONMENT, budget=1, resume=True)
    assert resuming.resumed(TINY, "inference", CONTENDERS)
    resuming.finish({})
    assert read_records(tmp_path)[f"{TINY.name}.json"] == record


def test_a_record_of_another_schema_is_not_resumed(tmp_path) -> None:
    Recorder(tmp_path, ENVIRONMENT, budget=1, resume=False).add(
        TINY, (), Limits(1.0), 0.1, MEASURED
    )
    recorder = Recorder(tmp_path, ENVIRONMENT, budget=1, resume=True)
    path = recorder.path_of(TINY)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 1}))
    assert recorder.resumed(TINY, "inference", CONTENDERS) is None


def test_a_file_that_is_no_record_is_named(tmp_path) -> None:
    path = tmp_path / "case.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"case\.json: expected a JSON record"):
        records.read_record(path)


def test_a_mode_that_is_recorded_stays_when_the_other_is_added(run_suite, tmp_path) -> None:
    run_suite("--group", "small", "--mode", "inference")
    run = run_suite("--group", "small", "--mode", "training", "--resume")
    assert run.count() == {"passed": 3}
    record = read_records(tmp_path / "out")[f"{TINY.name}.json"]
    assert [result["mode"] for result in record["results"]] == [
        mode for mode in cases.MODES for _ in range(3)
    ]


def test_a_run_of_some_cases_leaves_the_record_of_the_whole_run(run_suite, tmp_path) -> None:
    run_suite("--group", "small")
    # There is no other.
    assert read_records(tmp_path / "out")["run.json"]["cases"] == [TINY.name]
    run_suite()
    whole = read_records(tmp_path / "out")["run.json"]
    assert whole["cases"] == [TINY.name, SECOND.name]
    assert run_suite("--group", "small").status == 0
    assert read_records(tmp_path / "out")["run.json"] == whole


def test_a_provider_that_is_not_recorded_is_measured_by_a_run_that_resumes(
    run_suite, tmp_path
) -> None:
    run_suite("--group", "small", "--provider", "fused_lstm")
    run = run_suite("--group", "small", "--resume")
    assert run.status == 0
    record = read_records(tmp_path / "out")[f"{TINY.name}.json"]
    assert {result["provider"] for result in record["results"]} == {
        "torch",
        "fused_lstm",
        "fused_lstm[reference]",
    }


# ---- options


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--device", "abacus", "expected cpu, cuda or cuda:N, got 'abacus'"),
        ("--device", "meta", "expected cpu, cuda or cuda:N, got 'meta'"),
        ("--seconds", "0", "expected a positive number, got '0'"),
        ("--seconds", "soon", "expected a positive number, got 'soon'"),
        ("--budget", "nan", "expected a positive number, got 'nan'"),
        ("--threads", "0", "expected a positive whole number, got '0'"),
        ("--threads", "1.5", "expected a positive whole number, got '1.5'"),
        ("--group", "abacus", "invalid choice: 'abacus'"),
        ("--dtype", "int8", "invalid choice: 'int8'"),
        ("--mode", "both", "invalid choice: 'both'"),
        ("--provider", "abacus", "invalid choice: 'abacus'"),
    ],
)
def test_bad_options_are_named(run_suite, tmp_path, option, value, expected) -> None:
    run = run_suite(option, value)
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert f"argument {option}: {expected}" in run.printed
    assert run.outcomes == {}
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_records(run_suite, tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    run = run_suite(out=file)
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert (
        f"argument --out: expected a folder that can be written to, got '{file}' (File exists)"
    ) in run.printed
    assert run.outcomes == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(run_suite, tmp_path) -> None:
    run = run_suite("--device", "cuda:1")
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert "argument --device: expected a device that is there, got 'cuda:1'" in run.printed
    assert "sees 0 CUDA GPUs" in run.printed
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tuned_allocator(monkeypatch):
    """An environment as if the allocator had been told; the library is what a test says."""
    for name, value in environments.TUNED_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    assert set(environments.TUNED_ALLOCATOR.values()) == {"4294967296"}

    def library(*version):
        monkeypatch.setattr("platform.libc_ver", lambda: version)

    library("glibc", "2.36")
    return library


@pytest.mark.usefixtures("tuned_allocator")
def test_the_tuned_allocator_has_training_and_records_of_its_own(run_suite, tmp_path) -> None:
    run = run_suite("--group", "small")
    assert run.status == 0
    contents = read_records(tmp_path / "out")
    name = f"{TINY.name}-tuned-allocator.json"
    assert set(contents) == {"run-tuned-allocator.json", name}
    assert contents["run-tuned-allocator.json"]["cases"] == [TINY.name]
    assert contents[name]["environment"]["allocator"] == "glibc, 4 GiB thresholds"
    assert {result["mode"] for result in contents[name]["results"]} == {"training"}


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (("", ""), "expected a Python on glibc 2.35 or later, got "),
        (("glibc", "2.31"), "expected a Python on glibc 2.35 or later, got glibc 2.31"),
    ],
)
def test_the_allocator_that_cannot_be_tuned(run_suite, tuned_allocator, library, expected) -> None:
    tuned_allocator(*library)
    run = run_suite()
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert expected in run.printed
    assert "MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are set" in run.printed


# ---- records


def test_headlines_are_geometric_means_over_the_named_shapes(monkeypatch) -> None:
    first, second = Shape(1000, 1, 16, 32), Shape(100, 1, 64, 64)
    monkeypatch.setattr(shapes, "HEADLINE", (first, second))

    def results(inference, training):
        ours = [("inference", inference), ("training", training)]
        return [
            Result("torch", "inference", "eager", "timed", ratio=1.0),
            *(Result("fused_lstm", mode, "eager", "timed", ratio=ratio) for mode, ratio in ours),
            Result("fused_lstm", "inference", "graph", "timed", ratio=50.0),
        ]

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


def test_slopes_are_the_exponents_of_the_upper_half(monkeypatch) -> None:
    sizes = (10, 100, 1000, 10_000, 100_000)
    swept = {
        "sweep-T": [Shape(T, 1, 32, 32) for T in sizes],
        "sweep-H": [Shape(50, 16, H, H) for H in (16, 32, 64, 128)],
    }
    groups = tuple(
        Group(name, tuple(Case(shape, "float32") for shape in of_group), ())
        for name, of_group in swept.items()
    )
    monkeypatch.setattr(shapes, "list_groups", lambda device_type: groups)

    def timed(provider, seconds, mode="training", launch="eager"):
        times = None if seconds is None else Percentiles(0.0, seconds, math.inf)
        return Result(provider, mode, launch, "timed", seconds=times)

    done = [
        # Overhead alone at first, then in proportion to T; of H, with the square.
        *(
            (
                Case(shape, "float32"),
                [
                    timed("torch", max(1000, shape.T) ** 1.0),
                    timed("fused_lstm", shape.T**0.5 if shape.T > 10 else None),
                    timed("two", 1.0 if shape.T > 1000 else None),
                ],
            )
            for shape in reversed(swept["sweep-T"])
        ),
        *(
            (Case(shape, "float32"), [timed("torch", 7.0 * shape.H**2)])
            for shape in swept["sweep-H"]
        ),
        (TINY, [timed("torch", 3.0)]),
    ]
    slopes = {(slope.group, slope.provider): slope for slope in records.list_slopes(done, "cpu")}
    # Two points are no line.
    assert set(slopes) == {
        ("sweep-T", "torch"),
        ("sweep-T", "fused_lstm"),
        ("sweep-H", "torch"),
    }
    expected = {("sweep-T", "torch"): 1, ("sweep-T", "fused_lstm"): 0.5, ("sweep-H", "torch"): 2}
    for name, exponent in expected.items():
        assert slopes[name].slope == pytest.approx(exponent)
        assert slopes[name].points == 3
        assert (slopes[name].mode, slopes[name].launch) == ("training", "eager")
        assert slopes[name].dtype == "float32"


def test_files_are_replaced_whole(tmp_path, monkeypatch) -> None:
    path = tmp_path / "folder" / "record.json"
    records.write_json(path, {"a": [1.0, math.nan], "b": -math.inf})
    assert json.loads(path.read_text()) == {"a": [1.0, "nan"], "b": "-inf"}
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == "-inf"

    # Until the new file is complete, the old one is there.
    move = os.replace

    def replaced(source, target):
        assert json.loads(path.read_text())["b"] == "-inf"
        assert json.loads(Path(source).read_text()) == {"c": 1}
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(units.os, "replace", replaced)
        with pytest.raises(OSError, match="no room"):
            records.write_json(path, {"c": 1})
    assert json.loads(path.read_text())["b"] == "-inf"
    assert list(path.parent.iterdir()) == [path]
    assert units.os.replace is move
    records.write_json(path, {"c": 1})
    assert json.loads(path.read_text()) == {"c": 1}


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("AMD EPYC 2 threads", "amd-epyc-2-threads"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz 2 threads", "intel-xeon-cpu-2-threads"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_a_device_is_a_folder(text, slug) -> None:
    assert environments._slug(text) == slug


# ---- shapes


@pytest.fixture
def real_groups(monkeypatch):
    """The groups of a device type, by name."""
    monkeypatch.undo()
    return lambda device_type: {group.name: group for group in shapes.list_groups(device_type)}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_groups_are_named_once_and_have_cases_and_providers(real_groups, device_type) -> None:
    groups = real_groups(device_type)
    assert len(groups) == len(shapes.list_groups(device_type))
    assert set(groups) < set(shapes.GROUPS)
    assert shapes.ADDITIONS in shapes.GROUPS
    for group in groups.values():
        assert len(set(group.cases)) == len(group.cases) > 0
        assert len(set(group.providers)) == len(group.providers) > 0
        assert any(suite.PROVIDERS[name].is_ours for name in group.providers)
        assert set(group.providers) <= set(suite.PROVIDERS)
        for case in group.cases:
            assert group.name in shapes.groups_of(case, device_type)
            assert case.dtype_name in cases.DTYPES
            assert device_type == "cuda" or case.dtype_name != "tf32"
    chosen = {case for group in groups.values() for case in group.cases}
    assert len({case.name for case in chosen}) == len(chosen) >= 13
    # Each case has its file, and each of its modes its name.
    plans = suite.list_plans(device_type, cases.MODES)
    assert len({plan.name for plan in plans}) == len(plans) == 2 * len(chosen)


def test_a_run_on_a_cpu_begins_with_the_headline_shapes(real_groups) -> None:
    real_groups("cpu")
    plans = suite.list_plans("cpu", ["inference"])
    headline = [Case(shape, "float32") for shape in shapes.HEADLINE]
    assert len(headline) == 11
    assert [plan.case for plan in plans[: len(headline)]] == headline
    assert all(
        {"fused_lstm", "fused_lstm[aten]"} <= {provider.name for provider in plan.providers}
        for plan in plans[: len(headline)]
    )


ANY = (1, 10**9)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("group", "ranges"),
    [
        # T, B, I, H.
        ("reinforcement-learning", ((16, 128), (256, 4096), ANY, (64, 512))),
        ("time-series", ((100, 1000), (32, 256), (1, 32), (32, 256))),
        ("speech", ((400, 2000), (16, 256), ANY, (256, 1024))),
        ("language", ((35, 512), (32, 128), ANY, (512, 2048))),
        ("streaming", ((1, 1), (1, 16), ANY, ANY)),
    ],
)
def test_groups_are_of_what_people_run(real_groups, device_type, group, ranges) -> None:
    chosen = [case.shape for case in real_groups(device_type)[group].cases]
    sizes = [(shape.T, shape.B, shape.I, shape.H) for shape in chosen]
    if (group, device_type) == ("speech", "cpu"):
        # A single utterance, too.
        ranges = (ranges[0], (1, 256), *ranges[2:])
    for values, (least, most) in zip(zip(*sizes, strict=True), ranges, strict=True):
        assert least <= min(values)
        assert max(values) <= most
    if group == "streaming":
        assert {1, 16} <= {shape.B for shape in chosen}
        assert {True, False} == {shape.cell for shape in chosen}
    if group == "speech":
        assert any(shape.bidirectional for shape in chosen)
        layers = {shape.num_layers for shape in chosen if shape.bidirectional}
        assert min(layers) == 2
        assert max(layers) == {"cpu": 2, "cuda": 5}[device_type]
    if device_type == "cuda" and group != "streaming":
        # The whole range is there on a GPU, but for what a case of its own stands for.
        reached = {
            "reinforcement-learning": ({16, 128}, {256, 4096}, set(), {64, 512}),
            "time-series": ({168, 1000}, {32, 256}, {1, 32}, {32, 256}),
            "speech": ({400, 2000}, {16, 256}, set(), {256, 1024}),
            "language": ({35, 512}, {32, 128}, set(), {512, 2048}),
        }[group]
        for values, wanted in zip(zip(*sizes, strict=True), reached, strict=True):
            assert wanted <= set(values)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_published_case_and_every_dtype_are_there(real_groups, device_type) -> None:
    groups = real_groups(device_type)
    assert Case(Shape(1024, 16, 768, 768), "bfloat16") in groups["flashrnn"].cases
    dtypes = {case.dtype_name for group in groups.values() for case in group.cases}
    assert dtypes == (
        {"float32", "float64", "bfloat16"}
        if device_type == "cpu"
        else {"bfloat16", "float16", "tf32", "float32"}
    )
    variants = [case.shape for case in groups["variants"].cases]
    assert any(shape.proj_size for shape in variants)
    assert any(shape.packed for shape in variants)
    assert any(shape.bidirectional and shape.num_layers > 1 for shape in variants)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("group", "size", "largest"),
    [("sweep-T", "T", 100_000), ("sweep-B", "B", 1024), ("sweep-H", "H", 1024)],
)
def test_a_sweep_varies_one_size(real_groups, device_type, group, size, largest) -> None:
    chosen = [case.shape for case in real_groups(device_type)[group].cases]
    sizes = [shapes.SWEEPS[group](shape) for shape in chosen]
    assert sizes == [getattr(shape, size) for shape in chosen] == sorted(set(sizes))
    assert len(sizes) >= 5
    assert sizes[-1] >= largest
    # Nothing else: H alone takes I along.
    fixed = {"H": 1, "I": 1} if size == "H" else {size: 1}
    assert len({replace(shape, **fixed) for shape in chosen}) == 1


# ---- additions


@pytest.fixture
def all_additions(monkeypatch):
    tasks = list(itertools.product([SIZES], suite_of_additions.ADDITIONS, cases.MODES))
    monkeypatch.setattr(suite_of_additions, "TASKS", tasks)
    return tasks


def test_additions_are_checked_timed_and_recorded(
    run_suite, all_additions, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(suite, "measure_gemm", lambda *arguments: 1e9)
    run = run_suite("--group", "additions")
    assert run.status == 0
    contents = read_records(tmp_path / "out")
    # No case was run: there is nothing to say of the run.
    assert set(contents) == {"additions.json"}
    record = contents["additions.json"]
    assert record["schema"] == 2
    assert record["dtype"] == "float32"
    assert set(record["environment"]) == {field.name for field in fields(Environment)}
    measured = {(each["addition"], each["mode"]): each for each in record["additions"]}
    assert set(measured) == {(name, mode) for _, name, mode in all_additions}
    assert len(measured) == len(record["additions"])
    for (name, mode), result in measured.items():
        assert result["status"] == "timed"
        assert result["sizes"] == dict(zip("TBIH", SIZES, strict=True))
        assert result["flops"] == Case(Shape(*SIZES), "float32").flops(mode)
        assert result["repetitions"] >= timing.MIN_REPETITIONS
        times = {way: each["p50"] for way, each in result["seconds"].items()}
        assert result["over_plain"] == pytest.approx(times["ours"] / times["plain"])
        assert ("todays" in times) == bool(result["todays_way"])
        if "todays" in times:
            assert result["ratio"] == pytest.approx(times["todays"] / times["ours"])
            assert 0 < result["error_over_budget"] <= 1
        # With lengths there are fewer products.
        assert ("largest_ratio" in result) == ("todays" in times and name != "lengths")
        if "largest_ratio" in result:
            assert result["gemm_flops_per_second"] == 1e9
            least = result["flops"] / 1e9
            assert result["largest_ratio"] == pytest.approx(times["todays"] / least)
    with_todays = {name for name, _ in measured if measured[name, "training"]["todays_way"]}
    assert with_todays == {"resets", "lengths", "return_cells"}


@pytest.mark.usefixtures("all_additions")
def test_all_contenders_of_an_addition_are_told_of(run_suite, tmp_path) -> None:
    report = tmp_path / "report.json"
    run = run_suite("--group", "additions", "--benchmark-json", str(report))
    assert run.count() == {"passed": 2 * (3 * 3 + 5 * 2)}
    told = {each["param"]: each["stats"] for each in json.loads(report.read_text())["benchmarks"]}
    assert set(told) == set(run.outcomes)
    for result in read_records(tmp_path / "out")["additions.json"]["additions"]:
        for way, seconds in result["seconds"].items():
            stats = told[f"t5-b3-i4-h6-{result['addition']}-{result['mode']}-{way}"]
            assert stats["median"] == pytest.approx(seconds["p50"], rel=1e-6)


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_wrong_addition_is_not_timed(
    run_suite, all_additions, tmp_path, monkeypatch, factor
) -> None:
    class Wrong(fused_lstm.LSTM):
        def forward(self, input, hx=None, **options):
            output, *rest = super().forward(input, hx, **options)
            return output * factor, *rest

    monkeypatch.setattr(additions.fused_lstm, "LSTM", Wrong)
    run = run_suite("--group", "additions")
    assert run.status == 1
    record = read_records(tmp_path / "out")["additions.json"]
    wrong = [each for each in record["additions"] if each["status"] == "wrong"]
    assert {each["addition"] for each in wrong} == {"resets", "lengths", "return_cells"}
    assert len(wrong) == 6
    assert all("seconds" not in each and "ratio" not in each for each in wrong)
    outcome, reason = run.outcomes["t5-b3-i4-h6-resets-training-ours"]
    assert outcome == "failed"
    assert reason.startswith("wrong: error over budget ")


def test_additions_are_resumed_and_keep_to_the_budget(run_suite, monkeypatch, tmp_path) -> None:
    tasks = [(SIZES, "zoneout", mode) for mode in cases.MODES]
    monkeypatch.setattr(suite_of_additions, "TASKS", tasks[:1])
    assert run_suite("--group", "additions").count() == {"passed": 2}
    monkeypatch.setattr(suite_of_additions, "TASKS", tasks)
    run = run_suite("--group", "additions", "--resume", "--budget", "1e-9")
    assert run.status == 0
    assert run.count() == {"skipped": 4}
    contents = read_records(tmp_path / "out")
    reason = "beyond the budget of 1e-09 s"
    assert contents["run.json"]["not_run"] == {"zoneout-5-3-4-6-training": reason}
    run = run_suite("--group", "additions", "--resume")
    assert run.count() == {"skipped": 2, "passed": 2}
    recorded = read_records(tmp_path / "out")["additions.json"]["additions"]
    assert [(each["addition"], each["mode"]) for each in recorded] == [
        ("zoneout", mode) for mode in cases.MODES
    ]


@pytest.mark.usefixtures("tuned_allocator")
def test_additions_of_the_tuned_allocator_leave_the_others_alone(
    run_suite, monkeypatch, tmp_path
) -> None:
    tasks = [(SIZES, "zoneout", "training")]
    monkeypatch.setattr(suite_of_additions, "TASKS", tasks)
    run = run_suite("--group", "additions")
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert "--group additions: no case of a cpu device is all of this" in run.printed
    assert not (tmp_path / "out").exists()


def test_additions_keep_to_the_mode_that_is_asked_for(run_suite, monkeypatch) -> None:
    tasks = [(SIZES, "zoneout", mode) for mode in cases.MODES]
    monkeypatch.setattr(suite_of_additions, "TASKS", tasks)
    run = run_suite("--group", "additions", "--mode", "training")
    assert set(run.outcomes) == {f"t5-b3-i4-h6-zoneout-training-{way}" for way in ("ours", "plain")}
