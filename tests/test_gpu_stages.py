"""make gpu without a GPU: units and stages, what is resumed, stopped, missing, and reported."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, units
from benchmarks.units import Record, Stage, Suite, Unit

from . import conftest

STATE = {"sources": "1", "device": "a GPU"}


def python(code: str, *arguments: object) -> tuple[str, ...]:
    # Isolated: it starts in a few milliseconds.
    return (sys.executable, "-I", "-S", "-c", code, *map(str, arguments))


def unit(name: str, code: str = "", *arguments: object, **options) -> Unit:
    return Unit(name, python(code, *arguments), **options)


def counting(name: str, folder: Path, code: str = "") -> Unit:
    """A unit that leaves a letter in a file each time it runs."""
    return unit(name, f"import sys; open(sys.argv[1], 'a').write('x'); {code}", folder / name)


def statuses(suite: Suite) -> dict[str, str]:
    return {record.unit: record.status for record in suite.records.values()}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(units, "GRACE", 0.5)


def test_a_failure_is_reported_and_the_next_stage_runs(tmp_path, capsys):
    suite = Suite(tmp_path, STATE)
    code = "print('FAILED a_test - wrong'); print('== 1 failed, 2 passed in 3s =='); sys.exit(1)"
    suite.run(Stage("tests", [unit("bad", f"import sys; {code}"), unit("good", "print('fine')")]))
    suite.run(Stage("tune", [unit("tuned")]))
    capsys.readouterr()
    assert suite.report() == 1
    printed = capsys.readouterr().out
    assert statuses(suite) == {"bad": "failed", "good": "passed", "tuned": "passed"}
    for text in ("tests      1 passed, 1 failed", "exit status 1: 1 failed, 2 passed", "a_test"):
        assert text in printed
    assert "make gpu: FAILED" in printed
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["state"] == STATE
    bad, good, _ = kept["units"]
    assert (bad["stage"], bad["unit"], bad["status"]) == ("tests", "bad", "failed")
    assert Path(good["log"]).read_text() == "fine\n"
    assert good["detail"] == "fine"


def test_what_passed_is_not_run_again(tmp_path, capsys):
    stage = Stage("tests", [counting("good", tmp_path), counting("bad", tmp_path, "sys.exit(1)")])
    for _ in range(2):
        Suite(tmp_path / "out", STATE).run(stage)
    assert (tmp_path / "good").read_text() == "x"
    assert (tmp_path / "bad").read_text() == "xx"
    assert "tests: 1 to run, 1 passed before" in capsys.readouterr().out
    # Of another stage, in another run: neither run nor lost, and not this run's failure.
    other = Suite(tmp_path / "out", STATE)
    other.run(Stage("tune", [unit("tuned")]))
    assert statuses(other) == {"good": "passed", "bad": "failed", "tuned": "passed"}
    assert other.report() == 0


def test_another_state_starts_anew(tmp_path, capsys):
    stage = Stage("tests", [counting("good", tmp_path)])
    Suite(tmp_path / "out", STATE).run(stage)
    Suite(tmp_path / "out", STATE | {"sources": "2"}).run(stage)
    assert (tmp_path / "good").read_text() == "xx"
    assert "is of other sources: starting anew" in capsys.readouterr().out
    (tmp_path / "out" / "gpu.json").write_text("{")
    Suite(tmp_path / "out", STATE).run(stage)
    assert (tmp_path / "good").read_text() == "xxx"
    assert "cannot be read" in capsys.readouterr().out


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {DEAF!r}])
with open(sys.argv[1], "w") as file:
    file.write(str(child.pid))
time.sleep(60)
"""


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.usefixtures("impatient")
def test_a_hanging_unit_is_stopped_with_its_children(tmp_path, capsys):
    suite = Suite(tmp_path, STATE, budget=2.0)
    pid = tmp_path / "pid"
    hanging = [unit("quick"), unit("hangs", PARENT, pid), unit("waits"), unit("waits too")]
    start = time.monotonic()
    suite.run(Stage("tests", hanging))
    assert time.monotonic() - start < 10
    suite.run(Stage("tune", [unit("tuned")]))
    wait_until(lambda: has_ended(int(pid.read_text())))
    capsys.readouterr()
    assert suite.report() == 0
    printed = capsys.readouterr().out
    assert statuses(suite) == {
        "quick": "passed",
        "hangs": "not run",
        "waits": "not run",
        "waits too": "not run",
        "tuned": "passed",
    }
    assert re.search(r"not run: tests, hangs: stopped after \d\.\d s", printed)
    assert "not run: tests, waits, waits too: not begun" in printed
    assert "make gpu: all that ran passed" in printed


def test_units_share_a_stage_in_parallel_and_more_follow(tmp_path):
    meet = "import os, sys, time\nopen(sys.argv[1], 'w')\n"
    meet += "while not os.path.exists(sys.argv[2]): time.sleep(0.01)\nprint('tests/test_it.py::a')"
    one, two = tmp_path / "one", tmp_path / "two"
    first = [unit("one", meet, one, two), unit("two", meet, two, one)]
    suite = Suite(tmp_path, STATE, budget=20)
    log = suite.log_of(Stage("tests"), first[0])
    stage = Stage("tests", first, 2, lambda: [unit(log.read_text().strip())])
    suite.run(stage)
    assert statuses(suite) == {"one": "passed", "two": "passed", "tests/test_it.py::a": "passed"}


def test_what_cannot_run_or_is_left_is_no_failure(tmp_path, capsys):
    suite = Suite(tmp_path, STATE)
    refuse = "import sys; print('Device not supported'); sys.exit(1)"
    left = unit("halfway", left=lambda: "3 cases did not fit", notes=lambda: ["twice as fast"])
    suite.run(Stage("sanitize", [unit("refused", refuse, refusal="not supported"), left]))
    suite.run(Stage("benchmarks", unavailable="numpy: not installed"))
    capsys.readouterr()
    assert suite.report() == 0
    printed = capsys.readouterr().out
    assert statuses(suite) == {"refused": "unavailable", "halfway": "not run", "all": "unavailable"}
    for text in (
        "unavailable: sanitize, refused: exit status 1: Device not supported",
        "not run: sanitize, halfway: 3 cases did not fit",
        "unavailable: benchmarks, all: numpy: not installed",
        "twice as fast",
    ):
        assert text in printed


def test_a_program_that_is_not_there_fails(tmp_path):
    suite = Suite(tmp_path, STATE)
    suite.run(Stage("tune", [Unit("gone", ("/no/such/program",)), unit("here")]))
    assert statuses(suite) == {"gone": "failed", "here": "passed"}
    assert "No such file" in suite.records["tune", "gone"].detail


def test_the_report_is_short(tmp_path, capsys):
    suite = Suite(tmp_path, STATE)
    for number in range(30):
        for status in ("failed", "not run", "unavailable"):
            text = str(number)
            suite.add(Record("tests", f"{status} {text}", status, log=text, detail=text))
    capsys.readouterr()
    suite.ran.add("tests")
    assert suite.report() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert "failed: and 22 more" in lines


BEGIN = "import time; print('begun', flush=True); time.sleep(60)"


def test_a_request_to_end_stops_what_runs(tmp_path):
    """In a process of its own, as `make gpu` is."""
    script = f"""
from pathlib import Path
from benchmarks import gpu, units
units.GRACE = 0.5
stage = units.Stage("tests", [units.Unit("hangs", {python(BEGIN)!r})])
gpu.probe = lambda: {{"device": "a GPU"}}
gpu.install = lambda *arguments: None
gpu.list_stages = lambda *arguments: [stage]
raise SystemExit(gpu.main(["--out", {str(tmp_path)!r}]))
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=units.ROOT, stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: "begun" in units.read_log(tmp_path / "logs" / "tests-hangs.log"))
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=20)[0]
    assert process.returncode == 1
    assert "not run: tests, hangs: stopped after" in printed
    assert "make gpu: interrupted" in printed


# ---- the suite's own stages


def options(tmp_path: Path, **given) -> SimpleNamespace:
    defaults = {"stages": gpu.STAGES, "budget": None, "workers": 4, "wheels": None}
    return SimpleNamespace(out=tmp_path, **defaults | given)


def test_tests_are_divided_into_chunks_and_every_file_has_its_turn(monkeypatch):
    monkeypatch.setattr(gpu, "CHUNK", 2)
    a = [f"tests/a.py::test_{name}" for name in ("x[1]", "x[with a space]", "y")]
    lines = [*a, "tests/b.py::test_z", "", "4/9 tests collected (5 deselected) in 1.00s"]
    assert gpu.chunks_of(lines) == [
        ("a.py [1/2]", a[:2]),
        ("b.py [1/1]", ["tests/b.py::test_z"]),
        ("a.py [2/2]", a[2:]),
    ]


def test_the_tests_stage_runs_what_was_collected(tmp_path):
    suite = Suite(tmp_path, STATE)
    stage = gpu.tests(options(tmp_path))
    log = suite.log_of(stage, stage.units[0])
    assert stage.then() == []
    log.parent.mkdir()
    log.write_text("tests/a.py::test_x[1]\n")
    (chunk,) = stage.then()
    assert chunk.command[-3:] == ("-m", "gpu", "tests/a.py::test_x[1]")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    needs = {**gpu.NEEDS, "benchmarks": {"pytest-benchmark": "no_such_module", "pytest": "pytest"}}
    monkeypatch.setattr(gpu, "NEEDS", needs)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: None)
    tests, sanitize, tune, benchmarks = gpu.list_stages(options(tmp_path), tmp_path)
    assert (tests.name, tests.unavailable, tune.unavailable) == ("tests", "", "")
    assert "compute-sanitizer is neither on PATH" in sanitize.unavailable
    assert benchmarks.unavailable.startswith("pytest-benchmark: not installed in ")
    (only,) = gpu.list_stages(options(tmp_path, stages=["tune"]), tmp_path)
    assert only.name == "tune"


def test_what_keeps_to_a_budget_is_told_it(tmp_path):
    for maker in (gpu.tune, gpu.benchmarks):
        (bounded,) = maker(options(tmp_path, budget=120.0)).units
        assert bounded.command[-2:] == ("--budget", "100")
        (free,) = maker(options(tmp_path)).units
        assert "--budget" not in free.command


def test_what_benchmarks_and_tuning_leave_is_read_from_their_records(tmp_path):
    (benchmarks,), (tune,) = (
        maker(options(tmp_path)).units for maker in (gpu.benchmarks, gpu.tune)
    )
    assert benchmarks.left() == ""
    assert not (*benchmarks.notes(), *tune.notes())
    summary = {
        "provider": "fused_lstm[cuda]",
        "mode": "training",
        "launch": "graph",
        "dtype": "bfloat16",
        "geometric_mean_of_ratio": 2.5,
        "least": [0.5, "a case"],
        "cases": 2,
    }
    run = {"not_run": {"a": "budget", "b": "budget"}, "summaries": [summary]}
    units.write_json(tmp_path / "results" / "a-gpu" / "run.json", run)
    assert benchmarks.left() == "2 cases did not fit"
    assert benchmarks.notes() == [
        "fused_lstm[cuda], bfloat16 training graph: 2.50 times as fast as torch.nn.LSTM, geometric "
        "mean of 2 cases; at worst 0.50 (a case)"
    ]
    units.write_json(tmp_path / "tune" / "measured.json", {"left": 7})
    assert tune.left() == "7 configurations did not fit"
    assert "--install" in tune.notes()[0]


def test_every_kernel_is_sanitized_by_tests_that_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: "/bin/compute-sanitizer")
    found = {each.name: each for each in gpu.sanitize(options(tmp_path)).units}
    tools = ("memcheck", "racecheck", "synccheck")
    assert set(found) == {f"{tool} {family}" for tool in tools for family in gpu.FAMILIES}
    assert found["memcheck cuda"].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    for family in gpu.FAMILIES.values():
        for test in family.tests:
            path, _, name = test.partition("::")
            if path.endswith(".py"):
                assert f"def {name or 'test_small_'}" in (units.ROOT / path).read_text()
    kernels = [
        name
        for path in (units.ROOT / "kernels" / "triton").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    ]
    assert len(kernels) >= 8
    families = [gpu.FAMILIES["triton"].kernels, gpu.FAMILIES["triton-layer-norm"].kernels]
    assert all(any(part in kernel for part in families) for kernel in kernels)


def test_wheels_that_do_not_fit_or_are_there_are_reported(tmp_path, capsys):
    for name in ("nowhere-1.0-cp27-none-any.whl", "torch-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    (benchmarks,) = gpu.benchmarks(options(tmp_path, wheels=tmp_path)).units
    assert benchmarks.name == "pytest benchmarks with nowhere, torch"
    install, left_out = gpu.list_wheels(tmp_path, tmp_path / "site")
    assert [(each.unit, each.status) for each in left_out] == [
        ("torch-1.0-py3-none-any.whl", "unavailable")
    ]
    suite = Suite(tmp_path / "out", STATE)
    suite.run(Stage("install", install))
    assert statuses(suite) == {"nowhere-1.0-cp27-none-any.whl": "unavailable"}
    assert suite.report() == 0
    assert "nowhere-1.0-cp27" in capsys.readouterr().out


def test_the_digest_is_of_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "ROOT", tmp_path)
    (tmp_path / "kernels" / "cuda").mkdir(parents=True)
    (tmp_path / "README.md").write_text("a")
    file = tmp_path / "kernels" / "cuda" / "a.cuh"
    file.write_text("a")
    first = gpu.hash_of_sources()
    (tmp_path / "README.md").write_text("b")
    assert gpu.hash_of_sources() == first
    file.write_text("b")
    second = gpu.hash_of_sources()
    file.rename(file.with_name("b.cuh"))
    assert len({first, second, gpu.hash_of_sources()}) == 3


def test_records_of_other_sources_are_set_aside(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "probe", lambda: {"device": "a GPU"})
    monkeypatch.setattr(gpu, "install", lambda *arguments: None)
    record = tmp_path / "results" / "a-gpu" / "run.json"
    monkeypatch.setattr(gpu, "list_stages", lambda *arguments: [Stage("tests", [unit("a")])])
    # This process keeps its own way to end.
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    for number, sources in enumerate("1122"):
        monkeypatch.setattr(gpu, "hash_of_sources", lambda sources=sources: sources)
        units.write_json(record, {"number": number})
        assert gpu.main(["--out", str(tmp_path)]) == 0
    assert json.loads(record.read_text()) == {"number": 3}
    aside = tmp_path / "results-before-1" / "a-gpu" / "run.json"
    assert json.loads(aside.read_text()) == {"number": 2}
    assert capsys.readouterr().out.count("starting anew") == 1


def test_without_a_gpu_or_torch_it_says_so(tmp_path, monkeypatch, capsys):
    machine = {"torch": "2.11.0", "device": None}
    monkeypatch.setattr(gpu, "probe", lambda: machine)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"make gpu: torch 2.11.0 of {sys.executable} sees no GPU" in printed
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "PROBE", "import no_such_torch")
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "cannot be imported: ModuleNotFoundError: No module named" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--stages", "dance"], ["--budget", "-1"], ["--workers", "0"], ["--wheels", "/no/such/place"]],
    ids=" ".join,
)
def test_arguments_that_cannot_be(arguments, tmp_path):
    with pytest.raises(SystemExit) as error:
        gpu.main([*arguments, "--out", str(tmp_path)])
    assert error.value.code == 2


def test_out_must_be_a_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as error:
        gpu.main(["--out", str(file)])
    assert error.value.code == 2


# ---- the marker


class Item:
    nodeid = "tests/test_something.py::test_it"

    def __init__(self, *fixtures: str, **parameters: object) -> None:
        self.fixturenames = fixtures
        self.marks: list[str] = []
        if parameters:
            self.callspec = SimpleNamespace(params=parameters)

    def add_marker(self, mark) -> None:
        self.marks.append(mark.name)


@pytest.mark.parametrize("available", [False, True], ids=["without", "with"])
def test_tests_that_run_on_the_gpu_where_there_is_one_are_marked(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    on_it = [Item("device"), Item("device", "scope", scope="step")]
    # A parameter that is called so, no fixture of that name, no fixtures at all.
    elsewhere = [
        Item("device", device="sm_90"),
        Item("tmp_path"),
        SimpleNamespace(marks=[], nodeid=""),
    ]
    conftest.pytest_collection_modifyitems([*on_it, *elsewhere])
    assert [item.marks for item in on_it] == [["gpu"] * available] * 2
    assert not any(item.marks for item in elsewhere)
