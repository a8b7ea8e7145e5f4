"""The GPU suite: tests, sanitizers, tuning and benchmarks on this machine's NVIDIA GPU.

Each stage is a list of units, each unit a command whose output goes to `OUT/logs`. How it went is
kept in `OUT/gpu.json` after every unit: run again with the same OUT, the suite leaves out what has
passed, as long as sources, Python, PyTorch and GPU are the same. A budget bounds each stage; what
did not fit is listed, and is what the next run does.

The exit status is 0 if all that ran passed; 1 if a unit failed or there is no GPU; 2 for arguments
that cannot be. Only Python's library is imported, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from benchmarks.units import (
    FAILED,
    ROOT,
    STYLES,
    UNAVAILABLE,
    Record,
    Stage,
    Suite,
    Unit,
    hash_of,
    read_log,
    say,
)

STAGES = ("tests", "sanitize", "tune", "benchmarks")
# Modules without which a stage cannot run, by the names that they are installed by.
NEEDS = {
    "tests": {"pytest": "pytest"},
    "sanitize": {"pytest": "pytest"},
    "tune": {},
    "benchmarks": {"pytest": "pytest", "pytest-benchmark": "pytest_benchmark", "numpy": "numpy"},
}
# Tests of a unit: few enough to lose little when one is cut off, many enough to pay for its start.
CHUNK = 48
# Of a process beside others: these are the parallelism.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


# ---- the stages


def list_stages(options: argparse.Namespace, site: Path) -> list[Stage]:
    """The stages that were asked for, in their order; those that lack something say what."""
    makers = {"tests": tests, "sanitize": sanitize, "tune": tune, "benchmarks": benchmarks}
    stages = []
    for name in STAGES:
        if name not in options.stages:
            continue
        missing = [
            package
            for package, module in NEEDS[name].items()
            if PathFinder.find_spec(module, [*sys.path, str(site)]) is None
        ]
        if missing:
            reason = f"{', '.join(missing)}: not installed in {sys.executable}"
            stages.append(Stage(name, unavailable=reason))
        else:
            stages.append(makers[name](options))
    return stages


def pytest(*arguments: str, timeout: int = 300) -> tuple[str, ...]:
    """The command for pytest; without pytest-timeout, without the settings that need it."""
    plugin = PathFinder.find_spec("pytest_timeout") is not None
    settings = ("--timeout", str(timeout)) if plugin else ("-o", "addopts=--import-mode=importlib")
    return (sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", *settings, *arguments)


def tests(options: argparse.Namespace) -> Stage:
    """The test suite, as far as it runs on the GPU."""
    listing = ("--collect-only", "--quiet", "--disable-warnings")
    collection = Unit("collection", pytest("tests", "-m", "gpu", *listing))
    log = options.out / "logs" / "tests-collection.log"

    def chunks() -> list[Unit]:
        return [
            Unit(name, pytest("-m", "gpu", *chunk), ONE_THREAD)
            for name, chunk in chunks_of(read_log(log).splitlines())
        ]

    return Stage("tests", [collection], options.workers, chunks)


def chunks_of(lines: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Divide tests into named chunks: of every file the first, then of every file the second."""
    files: dict[str, list[str]] = {}
    for line in lines:
        if match := re.match(r"(tests/\S+\.py)::", line):
            files.setdefault(match[1], []).append(line.strip())
    chunks = []
    for name, found in files.items():
        parts = [found[i : i + CHUNK] for i in range(0, len(found), CHUNK)]
        for number, part in enumerate(parts, 1):
            title = f"{name.removeprefix('tests/')} [{number}/{len(parts)}]"
            chunks.append((number, title, part))
    return [chunk[1:] for chunk in sorted(chunks, key=lambda chunk: chunk[0])]


@dataclass(frozen=True)
class Family:
    """Kernels for compute-sanitizer: part of their names, quick tests that launch them, options."""

    kernels: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()


_KERNEL_TESTS = "tests/kernels/test_"
FAMILIES = {
    # A kernel of ours has two mbarriers; PyTorch's libraries have more.
    "cuda": Family(
        "lstm_", (f"{_KERNEL_TESTS}cuda_gpu.py", "-k", "small"), ("--num-cuda-barriers", "64")
    ),
    "triton": Family(
        "lstm_",
        (
            f"{_KERNEL_TESTS}triton.py::test_same_bits_every_time",
            f"{_KERNEL_TESTS}triton.py::test_tf32",
            f"{_KERNEL_TESTS}triton.py::test_strided_packed_rows",
            f"{_KERNEL_TESTS}triton_modifiers.py::test_tails",
        ),
    ),
    "triton-layer-norm": Family(
        "layer_norm_",
        (
            f"{_KERNEL_TESTS}triton_layer_norm.py::test_tails",
            f"{_KERNEL_TESTS}triton_layer_norm.py::test_many_tiles",
            f"{_KERNEL_TESTS}triton_layer_norm.py::test_half_precision",
        ),
    ),
}


def sanitize(options: argparse.Namespace) -> Stage:
    """compute-sanitizer's tools over small cases of every family of kernels."""
    places = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(f"{place}/bin" for place in places if place)]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None:
        reason = "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
        return Stage("sanitize", unavailable=reason)
    # Without PyTorch's cache of memory every tensor is an allocation, whose ends memcheck knows;
    # what an API answers, the tests see.
    tools = {
        "memcheck": (("--report-api-errors", "no"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        "racecheck": ((), {}),
        "synccheck": ((), {}),
    }
    units = []
    for tool, (arguments, environment) in tools.items():
        for name, family in FAMILIES.items():
            command = (
                *(program, "--tool", tool, "--error-exitcode", "1", *arguments, *family.options),
                *("--kernel-name", f"kernel_substring={family.kernels}"),
                *pytest(*family.tests, timeout=1800),
            )
            # What it says of a GPU that it cannot watch.
            refusal = "Device not supported"
            units.append(Unit(f"{tool} {name}", command, {**ONE_THREAD, **environment}, refusal))
    return Stage("sanitize", units, options.workers)


def tune(options: argparse.Namespace) -> Stage:
    """What a step of the CUDA kernels costs, for the table that corrects their plan."""
    out = options.out / "tune"
    table = out / "measured.json"
    command = (sys.executable, "-m", "benchmarks.tune_cuda", "--out", str(out))

    def left() -> str:
        number = load(table)["left"]
        return f"{number} configurations did not fit" if number else ""

    def notes() -> list[str]:
        return [f"python -m benchmarks.tune_cuda --install {table}"] if table.exists() else []

    unit = Unit("tune_cuda", (*command, *inner_budget(options)), left=left, notes=notes)
    return Stage("tune", [unit])


def benchmarks(options: argparse.Namespace) -> Stage:
    """Every layer beside torch.nn's, other packages' and the machine's limits."""
    out = options.out / "results"
    command = pytest("benchmarks", "--device", "cuda", "--out", str(out), "--resume", timeout=0)

    def left() -> str:
        number = sum(len(load(path).get("not_run", ())) for path in out.glob("*/run.json"))
        return f"{number} cases did not fit" if number else ""

    def notes() -> list[str]:
        return [
            f"{each['provider']}, {each['dtype']} {each['mode']} {each['launch']}: "
            f"{each['geometric_mean_of_ratio']:.2f} times as fast as torch.nn.LSTM, geometric mean "
            f"of {each['cases']} cases; at worst {each['least'][0]:.2f} ({each['least'][1]})"
            for path in out.glob("*/run.json")
            for each in load(path).get("summaries", ())
        ]

    # With other packages to compare with, it is another unit.
    peers = sorted(wheel.name.partition("-")[0] for wheel in list_files(options.wheels))
    name = " with ".join(["pytest benchmarks", *[", ".join(peers)] * bool(peers)])
    unit = Unit(name, (*command, *inner_budget(options)), left=left, notes=notes)
    return Stage("benchmarks", [unit])


def inner_budget(options: argparse.Namespace) -> tuple[str, ...]:
    """What a unit that keeps to a budget itself is told: to end before it is stopped."""
    if options.budget is None:
        return ()
    return "--budget", f"{max(1.0, 0.9 * options.budget - 8):g}"


def load(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


# ---- what it runs in

PROBE = """
import json, platform, torch
try:
    from triton import __version__ as triton
except ImportError:
    triton = None
device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
machine = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton}
print(json.dumps({**machine, "device": device}))
"""


def probe() -> dict[str, Any]:
    """Versions, and the GPU; in a process of its own, which does not keep the GPU.

    Raises:
        RuntimeError: if torch cannot be imported.
    """
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"torch of {sys.executable} cannot be imported: {last}")
    machine: dict[str, Any] = json.loads(done.stdout)
    return machine


def hash_of_sources() -> str:
    """A digest of all that a unit's outcome depends on; records and texts are not part of it."""
    folders = ("fused_lstm/**/", "kernels/**/", "tests/**/", "benchmarks/", "")
    return hash_of(folders, ("*.py", "*.cuh", "*.cu", "*.h", "*.cpp", "*.toml", "measured.json"))


PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
# As a unit's refusal: whatever goes wrong, the rest runs with what is there.
ANYTHING = ""


def install(suite: Suite, wheels: Path | None, site: Path) -> None:
    """Install the package, and wheels beside it, offline; where that fails, say why and go on."""
    site.mkdir(parents=True, exist_ok=True)
    place = "import importlib.util as u; print(u.find_spec('fused_lstm').origin)"
    found = subprocess.run(
        [sys.executable, "-c", place], cwd=site, capture_output=True, text=True, check=False
    )
    here = found.stdout.strip() == str(ROOT / "fused_lstm" / "__init__.py")
    if not here or (wheels and not any(site.iterdir())):
        suite.forget("install")
    editable = (*PIP, "--no-build-isolation", "--editable", ".")
    units, there = list_wheels(wheels, site)
    suite.run(Stage("install", [Unit("fused_lstm", editable, refusal=ANYTHING), *units]))
    for record in there:
        suite.add(record)


def list_wheels(wheels: Path | None, site: Path) -> tuple[list[Unit], list[Record]]:
    """Units that install wheels, and records of those that are left out."""
    units, left_out = [], []
    for wheel in list_files(wheels):
        name = wheel.name.partition("-")[0]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            command = (*PIP, "--upgrade", "--target", str(site), str(wheel))
            units.append(Unit(wheel.name, command, refusal=ANYTHING))
        else:
            # What is on PYTHONPATH would go before it.
            detail = f"{name} {version} is installed already"
            left_out.append(Record("install", wheel.name, UNAVAILABLE, detail=detail))
    return units, left_out


def list_files(wheels: Path | None) -> list[Path]:
    """The wheels of a folder."""
    return sorted(wheels.glob("*.whl")) if wheels else []


def set_aside(results: Path) -> None:
    """Rename a folder of records, that a run of other sources may not go on with them."""
    if results.exists():
        number = len(list(results.parent.glob(f"{results.name}-before-*"))) + 1
        aside = results.rename(results.with_name(f"{results.name}-before-{number}"))
        say(f"what {results} had is in {aside}", "yellow")


def pack(out: Path) -> None:
    """Put all that was written, the installed packages aside, into one file, gpu.tar.gz."""
    archive = out / "gpu.tar.gz"
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as file:
        for path in sorted(out.iterdir()):
            if path.name != "site" and not path.name.startswith(archive.stem):
                file.add(path, f"gpu/{path.name}")
    partial.replace(archive)


def positive(text: str) -> float:
    """A number of seconds."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; paths become absolute."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--budget", type=positive, help="seconds for each stage; none by default")
    parser.add_argument("--workers", type=int, default=4, help="processes that share the GPU")
    parser.add_argument("--wheels", type=Path, help="folder of other packages to compare with")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"argument --workers: expected 1 or more, got {options.workers}")
    if options.wheels is not None:
        options.wheels = options.wheels.resolve()
        if not options.wheels.is_dir():
            parser.error(f"argument --wheels: expected a folder, got {str(options.wheels)!r}")
    options.out = options.out.resolve()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {options.out}: {error.strerror}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parse(arguments)
    try:
        machine = probe()
    except RuntimeError as error:
        say(f"make gpu: {error}", STYLES[FAILED])
        return 1
    if machine["device"] is None:
        say(f"make gpu: torch {machine['torch']} of {sys.executable} sees no GPU", STYLES[FAILED])
        return 1
    say(", ".join(f"{key} {value}" for key, value in machine.items()))
    # A request to end ends the units, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    site = options.out / "site"
    paths = [os.environ.get("PYTHONPATH"), str(site)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # Room for the reason on the line of a test that failed.
        "COLUMNS": "180",
    }
    suite = Suite(options.out, {"sources": hash_of_sources(), **machine}, None, environment)
    if suite.anew:
        set_aside(options.out / "results")
    try:
        install(suite, options.wheels, site)
        suite.budget = options.budget
        for stage in list_stages(options, site):
            suite.run(stage)
            pack(options.out)
    except KeyboardInterrupt:
        suite.report()
        say("make gpu: interrupted", STYLES[FAILED])
        return 1
    return suite.report()


if __name__ == "__main__":
    sys.exit(main())
