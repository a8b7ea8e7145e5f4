"""python -m benchmarks.tune_cuda, with the emulator for a GPU: the plan takes its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fused_lstm.kernels.cuda import config as planning
from fused_lstm.kernels.cuda import costs, launch
from fused_lstm.kernels.cuda.costs import Measurements

from benchmarks import tune_cuda
from tests.simt.emulator import EmulatedExecutor


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = EmulatedExecutor()
    monkeypatch.setattr(launch, "executor_for", lambda device: executor)
    monkeypatch.setattr(tune_cuda, "HIDDEN", (16,))
    monkeypatch.setattr(tune_cuda, "BATCHES", (3,))
    monkeypatch.setattr(tune_cuda, "CANDIDATES", 1)
    # Far enough apart for the clock of a busy machine.
    monkeypatch.setattr(tune_cuda, "STEPS", (1, 60))
    monkeypatch.setattr(tune_cuda, "SAMPLES", 3)


def tune(out: Path, budget: float = 100.0) -> dict:
    return tune_cuda.run([torch.bfloat16], torch.device("cpu"), out, budget)


@pytest.mark.usefixtures("small")
def test_the_table_corrects_the_plan(tmp_path):
    content = tune(tmp_path)
    assert json.loads((tmp_path / "measured.json").read_text()) == content
    assert content["left"] == 0
    directions = [entry["direction"] for entry in content["measurements"]]
    assert directions == ["forward", "backward"]
    table = tmp_path / "table.json"
    table.write_text('{"schema": 1, "measurements": []}')
    assert tune_cuda.install(tmp_path / "measured.json", table) == 2
    measurements = Measurements(json.loads(table.read_text()))
    limits = planning.known_limits("sm_90")
    for entry in content["measurements"]:
        best, *_ = planning.plan(
            entry["direction"], batch=3, hidden=16, dtype=torch.bfloat16, limits=limits
        )
        assert best.config.shape == entry["config"]
        assert measurements.us_per_step(best.config, 1, limits) == entry["us_per_step"]


@pytest.mark.usefixtures("small")
def test_what_is_beyond_the_budget_is_counted(tmp_path, capsys):
    content = tune(tmp_path, budget=-1)
    assert (content["measurements"], content["left"]) == ([], 2)
    assert "0 failed, 2 left" in capsys.readouterr().out


@pytest.fixture
def timed(monkeypatch, small) -> list:
    """The configurations that are measured, without the measuring."""
    asked: list = []

    def us_per_step(candidate, device):
        asked.append(candidate.config)
        return 5.0

    monkeypatch.setattr(tune_cuda, "us_per_step", us_per_step)
    return asked


def test_what_was_measured_is_not_measured_again(tmp_path, timed, monkeypatch, capsys):
    right = tune_cuda.us_per_step

    def cut_off(candidate, device):
        if timed:
            raise KeyboardInterrupt
        return right(candidate, device)

    monkeypatch.setattr(tune_cuda, "us_per_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path)
    kept = json.loads((tmp_path / "measured.json").read_text())
    assert (len(kept["measurements"]), kept["left"]) == (1, 1)
    monkeypatch.setattr(tune_cuda, "us_per_step", right)
    assert len(tune(tmp_path)["measurements"]) == 2
    assert len(timed) == len(set(timed)) == 2
    assert "1 measured before" in capsys.readouterr().out
    # With other kernels, and on another device, all is measured anew.
    monkeypatch.setattr(tune_cuda, "hash_of_kernels", lambda: "other")
    assert len(tune(tmp_path)["measurements"]) == 2
    assert len(timed) == 4
    assert "measuring anew" in capsys.readouterr().out


def test_a_kernel_that_cannot_be_had_is_said(tmp_path, capsys, monkeypatch, small):
    class Refusing:
        loads = 0

        def load(self, config, device):
            self.loads += 1
            raise launch.KernelUnavailableError("it spills")

    executor = Refusing()
    monkeypatch.setattr(launch, "executor_for", lambda device: executor)
    for _ in range(2):
        content = tune(tmp_path)
        assert content["measurements"] == []
    assert executor.loads == 2
    assert [each["reason"] for each in content["refused"]] == ["it spills"] * 2
    assert "it spills" in capsys.readouterr().out


def test_what_failed_is_tried_again(tmp_path, capsys, monkeypatch, timed):
    right = tune_cuda.us_per_step

    def fail(candidate, device):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(tune_cuda, "us_per_step", fail)
    content = tune(tmp_path)
    assert (content["measurements"], content["left"], len(content["failed"])) == ([], 2, 2)
    assert "FAILED: " in capsys.readouterr().out
    monkeypatch.setattr(tune_cuda, "us_per_step", lambda candidate, device: -1.0)
    content = tune(tmp_path)
    assert (content["measurements"], content["left"], content["failed"]) == ([], 2, [])
    assert "beyond what the clock tells apart" in capsys.readouterr().out
    monkeypatch.setattr(tune_cuda, "us_per_step", right)
    content = tune(tmp_path)
    assert (len(content["measurements"]), content["left"]) == (2, 0)


def test_nothing_is_tried_on_a_device_that_was_lost(tmp_path, monkeypatch, small):
    tried = []

    def fail(candidate, device):
        tried.append(candidate)
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(tune_cuda, "us_per_step", fail)
    monkeypatch.setattr(tune_cuda, "is_lost", lambda device: True)
    content = tune(tmp_path)
    assert (len(tried), content["left"]) == (1, 2)


# ---- into the table


def measurement(us: float, arch: str = "sm_90", direction: str = "forward", rank: int = 0) -> dict:
    plans = planning.plan(
        direction, batch=8, hidden=64, dtype=torch.bfloat16, limits=planning.known_limits(arch)
    )
    config = plans[rank].config.shape
    return {"arch": arch, "direction": direction, "config": config, "us_per_step": us}


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "table.json"
    entries = [measurement(1.0), measurement(2.0, "sm_80"), measurement(3.0, rank=1)]
    path.write_text(json.dumps({"schema": 1, "measurements": entries}))
    return path


def test_installing_replaces_and_adds_in_one_order(tmp_path, table):
    file = tmp_path / "measured.json"
    new = [measurement(9.0, direction="backward"), measurement(7.0)]
    file.write_text(json.dumps({"schema": 1, "device": "a GPU", "measurements": new}))
    assert tune_cuda.install(file, table) == 4
    text = table.read_text()
    content = json.loads(text)
    Measurements(content)
    assert [(each["arch"], each["direction"]) for each in content["measurements"]] == [
        ("sm_80", "forward"),
        ("sm_90", "backward"),
        ("sm_90", "forward"),
        ("sm_90", "forward"),
    ]
    assert {each["us_per_step"] for each in content["measurements"]} == {2.0, 9.0, 7.0, 3.0}
    # A line for each measurement; the same again changes nothing, nor does another order.
    assert len(text.splitlines()) == 4 + 5
    new.reverse()
    file.write_text(json.dumps({"schema": 1, "measurements": new}))
    assert tune_cuda.install(file, table) == 4
    assert table.read_text() == text


def test_the_committed_table_is_as_installing_writes_it(tmp_path):
    file, table = tmp_path / "measured.json", tmp_path / "table.json"
    file.write_text('{"schema": 1, "measurements": []}')
    table.write_text(costs.MEASURED_FILE.read_text())
    tune_cuda.install(file, table)
    assert table.read_text() == costs.MEASURED_FILE.read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"schema": 2, "measurements": []}', "expected schema 1, got 2"),
        ('{"schema": 1, "measurements": [{"arch": "sm_90"}]}', "measurement 0"),
        ("[]", "expected an object"),
    ],
)
def test_what_is_no_table_is_not_installed(tmp_path, table, monkeypatch, capsys, text, reason):
    file = tmp_path / "measured.json"
    file.write_text(text)
    before = table.read_text()
    monkeypatch.setattr(costs, "MEASURED_FILE", table)
    assert tune_cuda.main(["--install", str(file)]) == 1
    assert reason in capsys.readouterr().err
    assert table.read_text() == before


def test_measurements_of_other_kernels_are_remarked_upon(tmp_path, table, capsys):
    file = tmp_path / "measured.json"
    content = {"schema": 1, "kernels": "other", "measurements": [measurement(7.0)]}
    file.write_text(json.dumps(content))
    assert tune_cuda.install(file, table) == 3
    assert "measured with other kernels" in capsys.readouterr().err


def test_it_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as error:
        tune_cuda.main(["--device", "cpu"])
    assert error.value.code == 2
    assert "expected an NVIDIA GPU" in capsys.readouterr().err


def test_candidates_are_listed_once_and_have_plans():
    found = list(tune_cuda.list_candidates([torch.bfloat16], planning.known_limits("sm_90")))
    assert len({candidate.config for candidate in found}) == len(found) > 50
