"""python -m benchmarks.tune_cuda, with the emulator for a GPU: the plan takes its table."""

import json

import pytest
import torch
from fused_lstm.kernels.cuda import config as planning
from fused_lstm.kernels.cuda import launch
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


@pytest.mark.usefixtures("small")
def test_the_table_corrects_the_plan(tmp_path):
    content = tune_cuda.run([torch.bfloat16], torch.device("cpu"), tmp_path, budget=100)
    (path,) = tmp_path.glob("*/measured.json")
    assert json.loads(path.read_text()) == content
    directions = [entry["direction"] for entry in content["measurements"]]
    assert directions == ["forward", "backward"]
    measurements = Measurements(content)
    limits = planning.known_limits("sm_90")
    for entry in content["measurements"]:
        best, *_ = planning.plan(
            entry["direction"], batch=3, hidden=16, dtype=torch.bfloat16, limits=limits
        )
        assert best.config.shape == entry["config"]
        assert measurements.us_per_step(best.config, 1, limits) == entry["us_per_step"]


@pytest.mark.usefixtures("small")
def test_what_is_beyond_the_budget_is_counted(tmp_path, capsys):
    content = tune_cuda.run([torch.bfloat16], torch.device("cpu"), tmp_path, budget=-1)
    assert content["measurements"] == []
    assert "2 left" in capsys.readouterr().out


def test_a_kernel_that_cannot_be_had_is_said(tmp_path, capsys, monkeypatch, small):
    class Refusing:
        def load(self, config, device):
            raise launch.KernelUnavailableError("it spills")

    monkeypatch.setattr(launch, "executor_for", lambda device: Refusing())
    content = tune_cuda.run([torch.bfloat16], torch.device("cpu"), tmp_path, budget=100)
    assert content["measurements"] == []
    assert "it spills" in capsys.readouterr().out


def test_it_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as error:
        tune_cuda.main(["--device", "cpu"])
    assert error.value.code == 2
    assert "expected an NVIDIA GPU" in capsys.readouterr().err


def test_candidates_are_listed_once_and_have_plans():
    found = list(tune_cuda.list_candidates([torch.bfloat16], planning.known_limits("sm_90")))
    assert len({candidate.config for candidate in found}) == len(found) > 50
