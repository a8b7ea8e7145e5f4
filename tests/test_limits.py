"""Limits of a machine: they are measured, the bound is right, exchanges that fail are errors."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math

import pytest
import torch
from fused_lstm.kernels.cuda import compiler, launch
from fused_lstm.kernels.cuda.cubin import resources_of
from fused_lstm.kernels.cuda.limits import DeviceLimits, known_limits

from benchmarks import exchange
from benchmarks.exchange import Exchange, ExchangeConfig, ExchangeError
from fused_lstm.bench import limits, timing
from fused_lstm.bench.cases import Case, Shape, make_data, make_parameters
from fused_lstm.bench.limits import Least, Limits, compulsory_bytes, least_seconds
from tests.simt import emulator, seeded_bugs

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(limits, "_GEMM_SIZES", {"cpu": (16, 64)})
    monkeypatch.setattr(limits, "_LARGEST_FLOAT64_GEMM", {"cpu": 32})
    monkeypatch.setattr(limits, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(limits, "_SECONDS", 1e-3)


@pytest.fixture
def precision():
    """Torch's setting of float32 products, put back afterwards; monkeypatch cannot."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


# ---- what is measured


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_rate_of_products(dtype) -> None:
    assert 1e5 < limits.measure_gemm(dtype, CPU) < 1e14


@pytest.mark.usefixtures("tiny")
def test_the_bandwidth_of_a_copy() -> None:
    assert 1e7 < limits.measure_copy(CPU) < 1e13


@pytest.mark.parametrize(
    ("dtype", "seconds", "sizes", "rate"),
    [
        ("float32", [1e-3, 1e-3, 1e-3], [16, 32, 64], 2 * 64**3 / 1e-3),
        # Not better for being larger.
        ("float32", [1e-3, 1e-3, 1e-2], [16, 32, 64], 2 * 32**3 / 1e-3),
        ("float32", [1e-3, 1.0], [16, 32], 2 * 16**3 / 1e-3),
        ("float64", [1e-3, 1e-3], [16, 32], 2 * 32**3 / 1e-3),
    ],
)
def test_products_grow_until_they_take_long(tiny, monkeypatch, dtype, seconds, sizes, rate) -> None:
    multiplied = []

    def seconds_of_product(size, dtype, device):
        multiplied.append(size)
        return seconds[len(multiplied) - 1]

    monkeypatch.setattr(limits, "_seconds_of_product", seconds_of_product)
    assert limits.measure_gemm(dtype, CPU) == pytest.approx(rate)
    assert multiplied == sizes


@pytest.mark.parametrize(
    ("dtype", "device", "during"),
    [("float32", "cpu", "ieee"), ("float32", "cuda", "ieee"), ("tf32", "cuda", "tf32")],
)
@pytest.mark.parametrize("before", ["ieee", "tf32", "none"])
def test_the_precision_of_products_is_put_back(
    monkeypatch, precision, dtype, device, during, before
) -> None:
    found = []

    def fail(size, dtype, device):
        found.append((precision.fp32_precision, dtype))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(limits, "_seconds_of_product", fail)
    precision.fp32_precision = before
    with pytest.raises(RuntimeError, match="out of memory"):
        limits.measure_gemm(dtype, torch.device(device))
    assert found == [(during, torch.float32)]
    assert precision.fp32_precision == before


def test_products_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"dtype_name must be one of .*, got 'int8'"):
        limits.measure_gemm("int8", CPU)
    with pytest.raises(ValueError, match="products in TF32 need a GPU, got device cpu"):
        limits.measure_gemm("tf32", CPU)


def test_caches_are_counted_once(tmp_path, monkeypatch) -> None:
    def describe(cpu, index, **files):
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")

    for cpu in (0, 1):
        own = {"level": 1, "shared_cpu_list": cpu, "size": "32K"}
        describe(cpu, 0, type="Data", **own)
        describe(cpu, 1, type="Instruction", **own)
        describe(cpu, 2, type="Unified", level=3, shared_cpu_list="0-1", size="4096K")
    monkeypatch.setattr(limits, "_CACHES_OF_CPUS", tmp_path)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert limits.cache_bytes(CPU) == (2 * 32 + 4096) * 1024
    (tmp_path / "cpu1" / "cache" / "index2" / "size").unlink()
    assert limits.cache_bytes(CPU) is None
    monkeypatch.setattr(limits, "_CACHES_OF_CPUS", tmp_path / "nowhere")
    assert limits.cache_bytes(CPU) is None


def test_a_cpu_keeps_nothing_on_chip() -> None:
    assert limits.multiprocessor_bytes(CPU) is None


# ---- bytes that have to move


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        # x, output, h_0 c_0 h_n c_n, W_ih, W_hh, b_ih b_hh
        (
            Shape(3, 2, 4, 5),
            3 * 2 * 4 + 3 * 2 * 5 + 4 * 2 * 5 + 20 * 4 + 20 * 5 + 2 * 20,
        ),
        # of P = 3: output, h_0 h_n, W_hh, W_hr
        (
            Shape(3, 2, 4, 5, proj_size=3),
            3 * 2 * 4 + 3 * 2 * 3 + 2 * 2 * 3 + 2 * 2 * 5 + 20 * 4 + 20 * 3 + 2 * 20 + 3 * 5,
        ),
        # two directions; the second layer reads 10 features
        (
            Shape(3, 2, 4, 5, num_layers=2, bidirectional=True),
            3 * 2 * 4
            + 3 * 2 * 10
            + 4 * (4 * 2 * 5)
            + 2 * (20 * 4 + 20 * 5 + 2 * 20)
            + 2 * (20 * 10 + 20 * 5 + 2 * 20),
        ),
        # x, h_0 c_0, h_1 c_1, parameters
        (Shape(1, 2, 4, 5, cell=True), 2 * 4 + 4 * 2 * 5 + 20 * 4 + 20 * 5 + 2 * 20),
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_compulsory_bytes_by_hand(shape, elements, dtype, size) -> None:
    assert compulsory_bytes(Case(shape, dtype), "inference") == size * elements
    # Gradients of results are read, those of everything else written.
    assert compulsory_bytes(Case(shape, dtype), "training") == 2 * size * elements


@pytest.mark.parametrize(
    "shape",
    [
        Shape(7, 3, 4, 6),
        Shape(7, 3, 4, 6, packed=True),
        Shape(7, 3, 4, 6, num_layers=3, bidirectional=True, batch_first=True, proj_size=2),
        Shape(1, 3, 4, 6, cell=True),
    ],
    ids=lambda shape: shape.name,
)
def test_compulsory_bytes_are_those_of_the_tensors(shape) -> None:
    case = Case(shape, "float32")
    data = make_data(case, CPU)
    # Each result is as large as its gradient.
    tensors = (*data.inputs, *data.gradients, *make_parameters(case, CPU).values())
    assert compulsory_bytes(case, "inference") == sum(tensor.nbytes for tensor in tensors)


# ---- the bound

CASE = Case(Shape(10, 2, 64, 64), "float32")
FLOPS, BYTES = CASE.flops("inference"), compulsory_bytes(CASE, "inference")


def test_the_largest_limit_counts() -> None:
    machine = Limits(FLOPS / 3.0, BYTES / 2.0, {"block": 0.1})
    assert least_seconds(CASE, "inference", machine) == Least(pytest.approx(3.0), "products")
    slow = dataclasses.replace(machine, copy_bytes_per_second=BYTES / 4.0)
    assert least_seconds(CASE, "inference", slow) == Least(pytest.approx(4.0), "memory")
    slow = dataclasses.replace(machine, exchange_seconds={"block": 1.0})
    # Ten steps exchange nine times.
    assert least_seconds(CASE, "inference", slow) == Least(pytest.approx(9.0), "exchange")
    assert least_seconds(CASE, "training", slow) == Least(pytest.approx(18.0), "exchange")


def test_caches_spare_memory() -> None:
    machine = Limits(math.inf, 1.0)
    assert least_seconds(CASE, "inference", machine).seconds == BYTES
    warm = dataclasses.replace(machine, cache_bytes=100)
    assert least_seconds(CASE, "inference", warm).seconds == BYTES - 100
    for nothing in ({"cache_bytes": None}, {"cache_bytes": 2 * BYTES}):
        assert (
            least_seconds(CASE, "inference", dataclasses.replace(machine, **nothing)).seconds == 0
        )
    machine = Limits(FLOPS / 3.0, None)
    assert least_seconds(CASE, "inference", machine) == Least(pytest.approx(3.0), "products")


@pytest.mark.parametrize(
    ("shape", "exchanges"),
    [
        (Shape(10, 2, 4, 8), 9),
        (Shape(10, 2, 4, 8, num_layers=3), 11),
        (Shape(10, 2, 4, 8, bidirectional=True), 9),
        # No layer can begin before the one below has ended in both directions.
        (Shape(10, 2, 4, 8, num_layers=3, bidirectional=True), 29),
        (Shape(1, 2, 4, 8, cell=True), 0),
        (Shape(40, 3, 4, 8, packed=True), int(Shape(40, 3, 4, 8, packed=True).lengths[0]) - 1),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_exchanges_that_wait_for_each_other(shape, exchanges) -> None:
    machine = Limits(math.inf, None, {"block": 1.0})
    assert least_seconds(Case(shape, "float32"), "inference", machine).seconds == exchanges
    assert least_seconds(Case(shape, "float32"), "training", machine).seconds == 2 * exchanges


@pytest.mark.parametrize(
    ("shape", "dtype", "room", "seconds"),
    [
        # W_hh takes 4 H H elements: 64 KiB in float32 for H = 64.
        (Shape(2, 1, 64, 64), "float32", 64 << 10, 1.0),
        (Shape(2, 1, 64, 64), "float32", (64 << 10) - 1, 2.0),
        (Shape(2, 1, 64, 64), "bfloat16", (64 << 10) - 1, 1.0),
        (Shape(2, 1, 64, 64), "float32", 4 << 10, 3.0),
        # Not even a GPU holds it.
        (Shape(2, 1, 64, 64), "float32", 1 << 10, 5.0),
        # W_hh 4 H P and W_hr P H.
        (Shape(2, 1, 64, 64, proj_size=8), "float32", 10 << 10, 1.0),
        (Shape(2, 1, 64, 64, proj_size=8), "float32", (10 << 10) - 1, 2.0),
        (Shape(2, 1, 64, 64), "float32", None, 1.0),
    ],
)
def test_who_can_hold_the_weights_exchanges(shape, dtype, room, seconds) -> None:
    exchanges = {"grid": 5.0, "block": 1.0, "cluster-2": 2.0, "grid-16": 3.0, "cluster-16": 4.0}
    machine = Limits(math.inf, None, exchanges, multiprocessor_bytes=room)
    least = least_seconds(Case(shape, dtype), "inference", machine)
    assert least == Least(seconds, "exchange")


# ---- exchanges

# Few blocks: in the emulator each of them has 128 threads.
MACHINE = DeviceLimits("sm_90", multiprocessors=3, shared_bytes=227 << 10, max_cluster=2)
CONFIGS = exchange.list_configs(MACHINE)[0]
NAMES = ["block", "cluster-2", "grid-2", "grid"]


def emulated_source() -> str:
    launchers = (
        f"SIMT_LAUNCHER({c.kernel_name}, ForwardParameters, {c.threads}, {c.shared_bytes}, "
        f"{c.cluster}, {str(c.cooperative).lower()})"
        for c in CONFIGS.values()
    )
    instances = "".join(config.instance() for config in CONFIGS.values())
    text = exchange.SOURCE.read_text()
    return "\n".join((text, instances, '#include "launcher.h"', *launchers, ""))


class EmulatedKernel:
    """The kernel of a configuration; `exchange` says where its memory is."""

    resident_teams = 1

    def __init__(self, library: ctypes.CDLL, config: ExchangeConfig, options=emulator.Options()):  # noqa: B008 (immutable)
        self.library, self.config, self.options = library, config, options
        self.launches = 0

    def launch(self, teams: int, parameters: ctypes.Structure) -> None:
        self.launches += 1
        team = self.config.TEAM
        ranges = [
            emulator.MemoryRange(parameters.recurrence[0].h_n, 128 * team, "writable", "counters"),
            emulator.MemoryRange(parameters.flags, 4 * team, "flags", "flags"),
        ]
        if self.config.exchange_bytes:
            buffers = parameters.exchange, self.config.exchange_bytes
            ranges.append(emulator.MemoryRange(*buffers, "exchange", "exchange"))
        emulator.launch_kernel(
            self.library, self.config.kernel_name, teams * team, parameters, ranges, self.options
        )


def compile_emulated(**options) -> ctypes.CDLL:
    try:
        return emulator.compile_library(emulated_source(), **options)
    except emulator.CompilerMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    return compile_emulated()


@pytest.fixture(scope="module")
def emulated_with_bugs(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("exchange")
    no_exchange = seeded_bugs.bug(
        "no exchange",
        CONFIGS["grid"],
        ("exchange.cuh", "sent(int) const { device::sync_block(); }", "sent(int) const {}"),
        ("exchange.cuh", "{ device::mbarrier_wait(mbarrier(s), (s >> 1) & 1); }", "{}"),
        ("exchange.cuh", "device::store_global128(buffers + offset, device", "(void)(device"),
    )
    no_exchange.apply(folder / "kernels")
    return compile_emulated(directory=folder, kernels=folder / "kernels")


def check_emulated(library: ctypes.CDLL, name: str, steps: int, options: emulator.Options) -> None:
    config = CONFIGS[name]
    exchanged = Exchange(config, EmulatedKernel(library, config, options), CPU)
    exchanged.prepare(steps)
    exchanged.launch()
    exchanged.check(exchange.expected_counters(config.TEAM, steps))


def test_the_scopes_of_a_gpu() -> None:
    assert list(CONFIGS) == NAMES
    configs, reasons = exchange.list_configs(known_limits("sm_80"))
    assert reasons["cluster-2"] == "sm_80 has no clusters"
    assert configs["grid"].TEAM == 108
    configs, reasons = exchange.list_configs(known_limits("sm_120"))
    assert reasons == {"cluster-16": "sm_120 has at most 8"}
    assert configs["cluster-8"].cluster == 8


def test_counters_by_hand() -> None:
    def next_counter(x):
        return (x * exchange.MULTIPLIER + exchange.INCREMENT) % 2**32

    first, second = (
        exchange.expected_counters(3, steps).to(torch.int64) % 2**32 for steps in (1, 2)
    )
    for rank, chunk, word in itertools.product(range(3), range(8), range(4)):
        # Of block (rank + s + chunk) mod 3, chunk + 2.
        source = ((rank + chunk) % 3 * 8 + (chunk + 2) % 8) * 4 + word
        assert first[rank, chunk, word] == next_counter(source)
        before = first[(rank + 1 + chunk) % 3, (chunk + 2) % 8, word]
        assert second[rank, chunk, word] == next_counter(int(before))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_exchange_counters(emulated, name) -> None:
    for options, steps in zip(emulator.SEARCH, (1, 2, 3, 7, 8, 9, 10, 11), strict=True):
        check_emulated(emulated, name, steps, options)


@pytest.mark.parametrize("name", NAMES)
def test_an_exchange_left_out_is_found(emulated_with_bugs, name) -> None:
    def outcome(options):
        try:
            check_emulated(emulated_with_bugs, name, 9, options)
        except (ExchangeError, emulator.EmulationError) as error:
            return type(error)
        return None

    assert any(outcome(options) for options in emulator.SEARCH)


def test_the_measurement(emulated, monkeypatch) -> None:
    kernels = {}

    class Executor:
        def load(self, config, device):
            if config.SCOPE == "cluster":
                raise launch.KernelUnavailableError("the device has no room for a team")
            return kernels.setdefault(config.TEAM, EmulatedKernel(emulated, config))

    monkeypatch.setattr(launch, "executor_for", lambda device: Executor())
    monkeypatch.setattr(launch, "limits_of", lambda device: MACHINE)
    # Far enough apart for the clock of a busy machine.
    monkeypatch.setattr(exchange, "STEPS", (1, 60))
    monkeypatch.setattr(exchange, "SAMPLES", 3)
    seconds, reasons = exchange.measure_exchange(CPU)
    assert list(seconds) == ["block", "grid-2", "grid"]
    assert all(each > 0 for each in seconds.values())
    assert reasons["cluster-2"] == "the device has no room for a team"
    assert reasons["cluster-4"] == "sm_90 has at most 2"
    assert reasons["grid-4"] == "there are 3 multiprocessors"
    assert [kernel.launches for kernel in kernels.values()] == [2 * (timing.WARM_UP + 3)] * 3
    least = least_seconds(CASE, "inference", Limits(math.inf, None, seconds))
    assert least.seconds == 9 * min(seconds.values())


def test_a_kernel_that_does_nothing_has_no_time() -> None:
    class Idle:
        resident_teams = 1

        def launch(self, teams, parameters):
            pass

    config = CONFIGS["grid"]
    with pytest.raises(ExchangeError, match="exchange_grid_3: 24 of 24 counters are wrong"):
        exchange.seconds_per_exchange(Exchange(config, Idle(), CPU), config.TEAM, CPU)


@pytest.mark.skipif(compiler.availability() is not None, reason=str(compiler.availability()))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_without_spills(arch) -> None:
    device = known_limits(arch)
    configs, _ = exchange.list_configs(device)
    for name in {"block", "cluster-2", "cluster-16", "grid-2", "grid"} & set(configs):
        cubin = compiler.compile_source(configs[name].source(), arch)
        resources = resources_of(cubin)
        assert resources.kernel == configs[name].kernel_name
        assert resources.local_bytes == 0, name
        assert configs[name].shared_bytes <= device.shared_bytes


def test_the_command_needs_a_gpu(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        exchange.main(["--device", "cpu"])
    assert stop.value.code == 2
    assert "expected an NVIDIA GPU, got 'cpu'" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_exchanges_of_this_gpu() -> None:
    device = torch.device("cuda")
    seconds, reasons = exchange.measure_exchange(device)
    assert {"block", "grid"} <= set(seconds), reasons
    assert 1e-9 < seconds["block"] < seconds["grid"] < 1e-4
    for team in (size for size in exchange.CLUSTERS if f"cluster-{size}" in seconds):
        assert seconds["block"] < seconds[f"cluster-{team}"] < seconds["grid"]
    assert limits.multiprocessor_bytes(device) > 256 << 10
    assert limits.cache_bytes(device) > 0
