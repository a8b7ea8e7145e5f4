"""Options and fixtures of the suite: `pytest benchmarks`, or `make bench`."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import records, shapes
from benchmarks.records import Recorder
from benchmarks.suite import PROVIDERS, NotRunError, Plan, Suite, list_plans
from fused_lstm.bench.arguments import device_argument, positive_count, positive_number
from fused_lstm.bench.cases import DTYPES, MODES
from fused_lstm.bench.comparison import Measured, Result
from fused_lstm.bench.providers import Provider

DEFAULT_SECONDS = {"cpu": 1.0, "cuda": 0.3}
# Below this, ours is said to be the slower one: noise of a quiet machine is smaller.
SLOWER = 0.97

_SUITE = pytest.StashKey[Suite]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_lstm", "benchmarks of fused_lstm")
    group.addoption(
        "--device", type=device_argument, default="cpu", help="cpu (default), cuda or cuda:N"
    )
    group.addoption(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder of all devices' records (default: benchmarks/results)",
    )
    group.addoption(
        "--seconds",
        type=positive_number,
        help="time for each case and mode (default: 1 on a CPU, 0.3 on a GPU)",
    )
    group.addoption(
        "--budget",
        type=positive_number,
        default=math.inf,
        help="seconds for the whole run; a case that would not fit is not begun (default: no end)",
    )
    group.addoption(
        "--resume",
        action="store_true",
        help="leave out what --out has from the same commit, versions and device",
    )
    group.addoption("--threads", type=positive_count, help="on a CPU (default: torch's own choice)")
    for name, choices, what in (
        ("group", shapes.GROUPS, "cases"),
        ("dtype", DTYPES, "cases"),
        ("mode", MODES, "cases"),
        (
            "provider",
            tuple(PROVIDERS),
            "providers, instead of each group's own; torch's always runs",
        ),
    ):
        group.addoption(
            f"--{name}",
            action="append",
            choices=choices,
            default=[],
            help=f"only these {what}; may be repeated",
        )


def pytest_configure(config: pytest.Config) -> None:
    """Set up the device and the run; the arguments are looked at before anything is measured."""
    device: torch.device = config.getoption("--device")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise pytest.UsageError(
                f"argument --device: expected a device that is there, got {str(device)!r}, and "
                f"torch {torch.__version__} sees {count} CUDA GPUs"
            )
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if records.allocator_is_tuned():
        library, version = platform.libc_ver()
        # Before 2.35, it ignored thresholds above 32 MiB.
        if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
            raise pytest.UsageError(
                f"{' and '.join(records.TUNED_ALLOCATOR)} are set: expected a Python on glibc 2.35 "
                f"or later, got {' '.join((library, version)).strip() or platform.system()}"
            )
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)
    out: Path = config.getoption("--out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(
            f"argument --out: expected a folder that can be written to, got {str(out)!r} "
            f"({error.strerror})"
        ) from None
    environment = records.describe_environment(device)
    recorder = Recorder(
        out,
        environment,
        budget=config.getoption("--budget"),
        resume=config.getoption("--resume"),
    )
    seconds = config.getoption("--seconds") or DEFAULT_SECONDS[device.type]
    config.stash[_SUITE] = Suite(device, seconds, recorder)


def pytest_report_header(config: pytest.Config) -> str:
    environment = config.stash[_SUITE].recorder.environment
    return (
        f"device: {environment.device}, {environment.threads} threads, load average "
        f"{environment.load_average}; torch {environment.torch}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device = config.stash[_SUITE].device
    # Training alone takes large blocks from the allocator at each call.
    modes = ("training",) if records.allocator_is_tuned() else MODES
    plans = list_plans(
        device.type,
        [mode for mode in modes if mode in (config.getoption("--mode") or MODES)],
        groups=config.getoption("--group"),
        dtypes=config.getoption("--dtype"),
        providers=config.getoption("--provider"),
    )
    contenders = [(plan, *each) for plan in plans for each in plan.contenders(device)]
    metafunc.parametrize(
        ("measured", "contender"),
        [(plan, (plan, provider, launch)) for plan, provider, launch in contenders],
        ids=[
            "-".join((plan.name, provider.name, *[launch] * (launch != "eager")))
            for plan, provider, launch in contenders
        ],
        indirect=True,
        scope="session",
    )


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    return pytestconfig.stash[_SUITE]


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, suite: Suite) -> Measured | NotRunError:
    """What is known of a case in one mode: measured once, for all who run it."""
    try:
        return suite.run(request.param)
    except NotRunError as reason:
        return reason


@pytest.fixture
def contender(
    request: pytest.FixtureRequest, measured: Measured | NotRunError
) -> tuple[Plan, Result, list[float]]:
    """A case, what one of its contenders did there, and its times in seconds."""
    plan, provider, launch = request.param
    if isinstance(measured, NotRunError):
        pytest.skip(f"not run: {measured}")
    result = _result_of(measured, provider, launch)
    if result.status != "timed" and provider.is_ours:
        pytest.fail(f"{result.status}: {result.detail}", pytrace=False)
    if result.status != "timed":
        pytest.skip(f"{result.status}: {result.detail}")
    if not measured.samples:
        pytest.skip("recorded by an earlier run of this commit")
    return plan, result, measured.samples[provider.name, launch].seconds


def _result_of(measured: Measured, provider: Provider, launch: str) -> Result:
    return next(
        result
        for result in measured.results
        if (result.provider, result.launch) == (provider.name, launch)
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Iterator[None]:
    """Write the record of the run; say in the last lines what it comes to."""
    yield
    suite = config.stash[_SUITE]
    recorder = suite.recorder
    if not recorder.done and not recorder.not_run and not recorder.failed:
        return
    headlines, slopes = recorder.write_run(suite.describe_limits())
    write = terminalreporter.write_line
    terminalreporter.section("fused_lstm")
    write("ratio: median time of torch.nn's layer over that of the other, above 1 it is faster")
    for headline in headlines:
        write(
            f"{headline.provider}, {headline.mode}: {headline.geometric_mean_of_ratio:.2f}, the "
            f"geometric mean of the ratio over {len(headline.shapes)} of {len(shapes.HEADLINE)} "
            "headline shapes"
        )
    for slope in slopes:
        write(
            f"{slope.group} {slope.dtype}, {slope.provider} {slope.mode} {slope.launch}: time "
            f"grows with the power {slope.slope:.2f} of the size"
        )
    ours = [
        (result.ratio, case.name, result)
        for case, results in recorder.done.values()
        for result in results
        if result.provider == "fused_lstm" and result.ratio is not None
    ]
    slower = sorted((each for each in ours if each[0] < SLOWER), key=lambda each: each[0])
    if ours:
        write(
            f"fused_lstm is slower (ratio below {SLOWER}) in {len(slower)} of {len(ours)} cases "
            "and modes"
        )
    for ratio, name, result in slower:
        write(f"  {ratio:.2f}  {name} {result.mode} {result.launch} ({result.backend})")
    for title, lines in (
        ("WRONG", recorder.describe("wrong")),
        ("FAILED", [*recorder.failed, *recorder.describe("failed")]),
        ("not run", [f"{name}: {reason}" for name, reason in recorder.not_run.items()]),
    ):
        for line in lines:
            write(f"{title}  {line}")
    write(f"{len(recorder.done)} cases in {recorder.elapsed:.0f} s; records in {recorder.folder}")
