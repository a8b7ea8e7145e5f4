"""Hands samples that were taken before to pytest-benchmark, which then tells of them as of its own.

It times one function after the other; ours are taken in turns, and on a GPU by the device's clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["CLOCK", "Clock"]


class Clock:
    """A clock that a benchmark's function moves forward, by a sample at each call."""

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def now(self) -> float:
        """The timer: seconds."""
        return self._now

    def _pass(self) -> None:
        # Profilers of pytest-benchmark call once more.
        self._now += next(self._samples, 0.0)

    def replay(self, benchmark: Any, samples: Sequence[float]) -> None:
        """Give a benchmark, whose timer is `now`, one round for each sample.

        Args:
            benchmark: pytest-benchmark's fixture.
            samples: seconds.
        """
        self._now = 0.0
        self._samples = iter(samples)
        benchmark.pedantic(self._pass, rounds=len(samples))


CLOCK = Clock()
