"""What fused_lstm does beyond torch.nn.LSTM: beside its plain layer, and beside today's way."""

from __future__ import annotations

import pytest
import torch

from benchmarks.additions import SIZES, AdditionsRecord, list_additions, measure
from benchmarks.options import wants_addition
from benchmarks.replay import CLOCK
from fused_lstm.bench.cases import MODES

# Their names alone: tensors are made where the cases run.
ADDITIONS = {each.name: each for each in list_additions(4, 1, torch.device("cpu"))}
TASKS = [(sizes, name, mode) for sizes in SIZES for name in ADDITIONS for mode in MODES]


def _contenders(name):
    return ("ours", "plain", *["todays"] * (ADDITIONS[name].todays is not None))


def pytest_generate_tests(metafunc):
    tasks = [task for task in TASKS if wants_addition(metafunc.config, task[2])]
    ways = [(*task, name) for task in tasks for name in _contenders(task[1])]
    if not ways:
        reason = "additions: not among what was asked for"
        nothing = pytest.param(None, None, marks=pytest.mark.skip(reason=reason), id="NOTSET")
        metafunc.parametrize(("addition", "way"), [nothing])
        return
    metafunc.parametrize(
        ("addition", "way"),
        [(way[:-1], way) for way in ways],
        ids=[
            f"t{T}-b{B}-i{inputs}-h{hidden}-{addition}-{mode}-{name}"
            for (T, B, inputs, hidden), addition, mode, name in ways
        ],
        indirect=["addition"],
        scope="session",
    )


@pytest.fixture(scope="session")
def additions_record(suite):
    return AdditionsRecord(suite.recorder)


@pytest.fixture(scope="session")
def addition(request, suite, additions_record):
    """What is known of an addition in one mode: measured once, for all contenders."""
    sizes, name, mode = request.param
    task = "-".join((name, *map(str, sizes), mode))
    earlier = additions_record.resumed(name, sizes, mode)
    if earlier is not None:
        return earlier, {}
    if suite.recorder.elapsed > suite.recorder.budget:
        suite.recorder.not_run[task] = f"beyond the budget of {suite.recorder.budget:g} s"
        return None
    (wanted,) = (each for each in list_additions(*sizes[:2], suite.device) if each.name == name)
    gemm = suite.limits("float32").gemm_flops_per_second
    result, samples = measure(wanted, sizes, mode, suite.device, suite.seconds)
    additions_record.add(result, gemm, suite.seconds)
    if result["status"] == "wrong":
        suite.recorder.failed.append(f"{task}: error over budget {result['error_over_budget']}")
    return result, samples


@pytest.mark.benchmark(timer=CLOCK.now)
def test_addition(request, addition, way, benchmark):
    if addition is None:
        benchmark.skipped = True
        pytest.skip("not run: beyond the budget")
    result, samples = addition
    if result["status"] == "wrong":
        pytest.fail(f"wrong: error over budget {result['error_over_budget']}", pytrace=False)
    if not samples:
        benchmark.skipped = True
        pytest.skip("recorded by an earlier run of this commit")
    benchmark.group = request.node.callspec.id.rpartition("-")[0]
    benchmark.extra_info.update(result)
    CLOCK.replay(benchmark, samples[way[-1]])
