"""Commands in stages: run within a budget, several at the same time, and not again once passed.

Only Python's library is needed; lines are coloured where rich is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, NOT_RUN, UNAVAILABLE = "passed", "failed", "not run", "unavailable"
STYLES = {PASSED: "green", FAILED: "bold red", NOT_RUN: "yellow", UNAVAILABLE: "yellow"}
NOT_BEGUN = "not begun"
# Seconds between a look at what runs and the next, and from the request to end to the end.
POLL, GRACE = 0.05, 10.0
# Lines of a failed unit's log, and units of a kind, that the report shows.
EXCERPT, LISTED = 3, 8
NOTES = 12


@dataclass(frozen=True)
class Unit:
    """A command that is run as a whole, or not at all.

    Attributes:
        name: unique in its stage.
        command: program and arguments.
        environment: variables besides those of this process.
        refusal: a pattern; if the log of a failed unit has it, the machine cannot run the unit.
        left: what a command that succeeded has left to another run; empty if nothing.
        notes: lines for the report.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    refusal: str | None = None
    left: Callable[[], str] = lambda: ""
    notes: Callable[[], Sequence[str]] = lambda: ()


@dataclass(frozen=True)
class Stage:
    """Units, the most telling first.

    Attributes:
        name: unique.
        units: what to run.
        workers: how many of them at the same time.
        then: further units, which are known when the first have run.
        unavailable: why nothing of it can run here; empty if it can.
    """

    name: str
    units: Sequence[Unit] = ()
    workers: int = 1
    then: Callable[[], Sequence[Unit]] = lambda: ()
    unavailable: str = ""


@dataclass
class Record:
    """How a unit went, as gpu.json has it."""

    stage: str
    unit: str
    status: str
    seconds: float = 0.0
    log: str = ""
    detail: str = ""


class Job:
    """A unit that runs, in a process group of its own."""

    def __init__(self, unit: Unit, log: Path, environment: Mapping[str, str]) -> None:
        self.unit, self.log, self.start = unit, log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                unit.command,
                cwd=ROOT,
                env={**environment, **unit.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return round(time.monotonic() - self.start, 1)

    def signal(self, number: int) -> None:
        """To the process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def stop(jobs: Sequence[Job]) -> None:
    """End jobs and all that they have started: with a request, then without."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for job in jobs:
            job.signal(number)
        end = time.monotonic() + GRACE
        for job in jobs:
            # What hangs in the driver outlasts even SIGKILL: it is not waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(max(0.0, end - time.monotonic()))


class Suite:
    """Runs stages, and knows what has passed before.

    Args:
        out: folder for gpu.json and logs.
        state: all that a result depends on; records of another state are not believed.
        budget: seconds for each stage; None for no limit.
        environment: variables of the units.
    """

    def __init__(
        self,
        out: Path,
        state: Mapping[str, Any],
        budget: float | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.out, self.state, self.budget, self.environment = out, state, budget, environment
        self.records: dict[tuple[str, str], Record] = {}
        self.notes: list[str] = []
        self.ran: set[str] = set()
        # Whether what OUT has is of another state.
        self.anew = self.path.exists() and not self._resume()

    @property
    def path(self) -> Path:
        """Where records are kept."""
        return self.out / "gpu.json"

    def _resume(self) -> bool:
        try:
            before = json.loads(self.path.read_text())
            records = [Record(**each) for each in before["units"]]
            old = before["state"]
        except (ValueError, KeyError, TypeError) as error:
            say(f"{self.path} cannot be read ({error!r}): starting anew", "yellow")
            return False
        if changed := [key for key in self.state if old.get(key) != self.state[key]]:
            say(f"{self.path} is of other {', '.join(changed)}: starting anew", "yellow")
            return False
        self.records = {(each.stage, each.unit): each for each in records}
        return True

    def log_of(self, stage: Stage, unit: Unit) -> Path:
        """Where a unit's output goes."""
        return self.out / "logs" / f"{stage.name}-{slug(unit.name)}.log"

    def passed(self, stage: str, unit: str) -> bool:
        """Whether there is no need to run a unit."""
        record = self.records.get((stage, unit))
        return record is not None and record.status == PASSED

    def forget(self, stage: str, statuses: Iterable[str] = tuple(STYLES)) -> None:
        """Drop a stage's records of some statuses."""
        self.records = {
            key: record
            for key, record in self.records.items()
            if record.stage != stage or record.status not in statuses
        }

    def add(self, record: Record) -> None:
        """Keep a record, on disk too, and print its line, if it was begun."""
        self.records[record.stage, record.unit] = record
        units = [asdict(each) for each in self.records.values()]
        write_json(self.path, {"schema": 1, "state": dict(self.state), "units": units})
        if record.detail == NOT_BEGUN:
            return
        line = f"{record.status:<11} {record.stage:<10} {record.unit:<44} {record.seconds:7.1f} s"
        say(f"{line}  {record.detail}".rstrip(), STYLES[record.status])

    def run(self, stage: Stage) -> None:
        """Run what has not passed yet, within the budget."""
        self.ran.add(stage.name)
        self.forget(stage.name, (FAILED, NOT_RUN, UNAVAILABLE))
        if stage.unavailable:
            self.add(Record(stage.name, "all", UNAVAILABLE, detail=stage.unavailable))
            return
        deadline = time.monotonic() + (math.inf if self.budget is None else self.budget)
        self._run(stage, stage.units, deadline)
        self._run(stage, stage.then(), deadline)

    def _run(self, stage: Stage, units: Sequence[Unit], deadline: float) -> None:
        waiting = [unit for unit in units if not self.passed(stage.name, unit.name)]
        if units:
            before = len(units) - len(waiting)
            say(f"{stage.name}: {len(waiting)} to run, {before} passed before", "bold")
        running: list[Job] = []
        try:
            while (waiting or running) and time.monotonic() <= deadline:
                while waiting and len(running) < stage.workers:
                    unit = waiting.pop(0)
                    try:
                        running.append(Job(unit, self.log_of(stage, unit), self.environment))
                    except OSError as error:
                        self.add(Record(stage.name, unit.name, FAILED, detail=str(error)))
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    self._finish(stage, job)
                time.sleep(POLL)
        finally:
            stop(running)
            for job in running:
                self._finish(stage, job, f"stopped after {job.seconds} s")
            for unit in waiting:
                self.add(Record(stage.name, unit.name, NOT_RUN, detail=NOT_BEGUN))
            for unit in units:
                self.notes += unit.notes()

    def _finish(self, stage: Stage, job: Job, stopped: str = "") -> None:
        unit, returned = job.unit, job.process.poll()
        record = Record(stage.name, unit.name, PASSED, job.seconds, str(job.log))
        record.detail = stopped or summary_of(job.log)
        if stopped:
            record.status = NOT_RUN
        elif returned != 0:
            refused = unit.refusal is not None and re.search(unit.refusal, read_log(job.log))
            record.status = UNAVAILABLE if refused else FAILED
            record.detail = f"exit status {returned}: {record.detail}"
        elif left := unit.left():
            record.status, record.detail = NOT_RUN, left
        self.add(record)

    def report(self) -> int:
        """Print what matters, the whole of it short; return the exit status."""
        say("")
        for stage in dict.fromkeys(record.stage for record in self.records.values()):
            records = [record for record in self.records.values() if record.stage == stage]
            counts = Counter(record.status for record in records)
            words = ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])
            seconds = sum(record.seconds for record in records)
            earlier = "" if stage in self.ran else "  (all of it in an earlier run)"
            say(f"{stage:<10} {words}  {seconds:.0f} s of work{earlier}", "bold")
        for note in self.notes[-NOTES:]:
            say(note)
        for status in (UNAVAILABLE, NOT_RUN, FAILED):
            self._report(status)
        failed = any(
            record.status == FAILED and record.stage in self.ran for record in self.records.values()
        )
        verdict = "FAILED" if failed else "all that ran passed"
        say(f"make gpu: {verdict}; records: {self.path}", STYLES[FAILED if failed else PASSED])
        return int(failed)

    def _report(self, status: str) -> None:
        """Print the units of a status; what was the same with several, once."""
        alike: dict[tuple[str, str], list[Record]] = {}
        for record in self.records.values():
            if record.status == status:
                key = record.log if status == FAILED else record.detail
                alike.setdefault((record.stage, key), []).append(record)
        for (stage, _), records in list(alike.items())[:LISTED]:
            names = ", ".join(record.unit for record in records)
            say(f"{status}: {stage}, {names}: {records[0].detail[:200]}", STYLES[status])
            if status == FAILED:
                say(f"    {records[0].log}")
                for line in excerpt_of(Path(records[0].log)):
                    say(f"    {line}")
        if (more := len(alike) - LISTED) > 0:
            say(f"{status}: and {more} more", STYLES[status])


def say(text: str, style: str = "") -> None:
    """Print a line, in colour where rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(text, flush=True)
        return
    Console(soft_wrap=True).print(text, style=style, markup=False, highlight=False)


def slug(name: str) -> str:
    """A name as a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def read_log(log: Path) -> str:
    """What a unit has printed."""
    return log.read_text(errors="replace") if log.is_file() else ""


def summary_of(log: Path) -> str:
    """How many tests passed and what a sanitizer counted, else the last line."""
    lines = [line.strip("= ") for line in read_log(log).splitlines() if line.strip("= ")]
    telling = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    telling = telling[-1:] + [line for line in lines if " SUMMARY: " in line][-1:]
    return "; ".join(dict.fromkeys(telling or lines[-1:]))


def excerpt_of(log: Path) -> list[str]:
    """What failed, in a few lines."""
    lines = read_log(log).splitlines()
    pattern = r"FAILED |ERROR |=+ (Invalid|Error:|Barrier error|Misaligned|Program hit)"
    telling = [line for line in lines if re.match(pattern, line)]
    return [line[:200] for line in telling[:EXCERPT] or lines[-EXCERPT:]]


def hash_of(folders: Iterable[str], patterns: Iterable[str]) -> str:
    """A digest of files by name and content, the same in a checkout and in a copy of it."""
    digest = hashlib.sha256()
    found = {path for folder in folders for each in patterns for path in ROOT.glob(folder + each)}
    for path in sorted(found):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object to a file, as `write_text` does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is, at every moment, the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
