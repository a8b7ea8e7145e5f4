"""Every provider in every case: first checked against float64, then timed beside torch.nn's layer.

pytest-benchmark chooses, groups, shows, stores and compares. The times are taken beforehand, of all
who run a case in turns, so that what else the machine does meets them alike.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.replay import CLOCK


@pytest.mark.benchmark(timer=CLOCK.now)
def test_lstm(contender, benchmark) -> None:
    plan, result, samples = contender
    benchmark.group = plan.name
    benchmark.extra_info.update(asdict(result))
    CLOCK.replay(benchmark, samples)
