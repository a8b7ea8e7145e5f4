"""Hooks and fixtures of the suite: `pytest benchmarks`, or `make bench`."""

from __future__ import annotations

import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import environment, options, shapes
from benchmarks.records import Recorder
from benchmarks.report import SLOWER_BELOW
from benchmarks.suite import NotRunError, Plan, Suite
from fused_lstm.bench.arguments import select_device
from fused_lstm.bench.comparison import Measured, Result

_SUITE = pytest.StashKey[Suite]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Set up the device and the run; the arguments are looked at before anything is measured."""
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("argument -n: expected none, for what is timed runs by itself")
    device = _usable_device(config.getoption("--device"))
    _check_allocator(device)
    options.check_selection(config, device)
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
    recorder = Recorder(
        out,
        environment.describe_environment(device),
        budget=config.getoption("--budget"),
        resume=config.getoption("--resume"),
        whole=options.whole(config),
    )
    seconds = config.getoption("--seconds") or options.DEFAULT_SECONDS[device.type]
    config.stash[_SUITE] = Suite(device, seconds, recorder)
    # A run that is ended writes its summary all the same.
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.add_cleanup(lambda: signal.signal(signal.SIGTERM, earlier))


def _usable_device(device: torch.device) -> torch.device:
    try:
        return select_device(device)
    except LookupError as error:
        raise pytest.UsageError(
            f"argument --device: expected a device that is there, got {str(device)!r}, and {error}"
        ) from None


def _check_allocator(device: torch.device) -> None:
    if not environment.allocator_is_tuned():
        return
    names = " and ".join(environment.TUNED_ALLOCATOR)
    if device.type != "cpu":
        raise pytest.UsageError(f"{names} are set: expected --device cpu, got {str(device)!r}")
    library, version = platform.libc_ver()
    # Before 2.35, it ignored thresholds above 32 MiB.
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        raise pytest.UsageError(
            f"{names} are set: expected a Python on glibc 2.35 or later, got "
            f"{' '.join((library, version)).strip() or platform.system()}"
        )


def pytest_report_header(config: pytest.Config) -> str:
    here = config.stash[_SUITE].recorder.environment
    return (
        f"device: {here.device}, {here.threads} threads, load average {here.load_average}; "
        f"torch {here.torch}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measured" not in metafunc.fixturenames:
        return
    device = metafunc.config.stash[_SUITE].device
    contenders = [
        (plan, *contender)
        for plan in options.plans(metafunc.config, device)
        for contender in plan.contenders(device)
    ]
    metafunc.parametrize(
        ("measured", "contender"),
        [(contender[0], contender) for contender in contenders],
        ids=[
            "-".join((plan.name, provider.name, *[launch] * (launch != "eager")))
            for plan, provider, launch in contenders
        ],
        indirect=True,
        scope="session",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order what runs. No case has a time limit of its own: --budget is for all of them.

    Additions come first on a CPU, for whose figures there has to be time, and last on a GPU.
    """
    on_cpu = config.stash[_SUITE].device.type == "cpu"
    items.sort(key=lambda item: (item.path.name == "test_additions.py") != on_cpu)
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))


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
    result = next(
        result
        for result in measured.results
        if (result.provider, result.launch) == (provider.name, launch)
    )
    if result.status in ("wrong", "failed") and provider.is_ours:
        pytest.fail(f"{result.status}: {result.detail}", pytrace=False)
    if result.status != "timed":
        pytest.skip(f"{result.status}: {result.detail}")
    if not measured.samples:
        pytest.skip("recorded by an earlier run of the same sources")
    return plan, result, measured.samples[provider.name, launch].seconds


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What failed outside of a benchmark, such as the exchange of a GPU, fails the run."""
    suite = session.config.stash.get(_SUITE, None)
    if suite is not None and suite.recorder.failed and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
    terminalreporter.section("fused_lstm")
    _write_summary(terminalreporter.write_line, suite)
    for title, lines in (
        ("WRONG", recorder.describe("wrong")),
        ("FAILED", [*recorder.failed, *recorder.describe("failed")]),
        ("not run", [f"{name}: {reason}" for name, reason in recorder.not_run.items()]),
    ):
        for line in lines:
            terminalreporter.write_line(f"{title}  {line}")
    terminalreporter.write_line(
        f"{len(recorder.done)} cases in {recorder.elapsed:.0f} s; records in {recorder.folder}"
    )


def _write_summary(write: Callable[[str], None], suite: Suite) -> None:
    recorder = suite.recorder
    run = recorder.finish(suite.known_limits())
    write("ratio: median time of torch.nn's layer over that of the other, above 1 it is faster")
    for headline in run.headlines:
        write(
            f"{headline.provider}, {headline.mode}: {headline.geometric_mean_of_ratio:.2f}, the "
            f"geometric mean of the ratio over {len(headline.shapes)} of {len(shapes.HEADLINE)} "
            "headline shapes"
        )
    for summary in run.summaries:
        write(summary.text)
    for slope in run.slopes:
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
    slower = sorted((each for each in ours if each[0] < SLOWER_BELOW), key=lambda each: each[0])
    if ours:
        write(
            f"fused_lstm is slower (ratio below {SLOWER_BELOW}) in {len(slower)} of {len(ours)} "
            "cases and modes"
        )
    for ratio, name, result in slower:
        write(f"  {ratio:.2f}  {name} {result.mode} {result.launch} ({result.backend})")
