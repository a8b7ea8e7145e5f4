"""The emulator's own tests: what is right runs, under every schedule, and each fault is found."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch

from . import emulator
from .emulator import SEARCH, EmulationError, MemoryRange, Options, launch_kernel


class Arguments(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("exchange", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("fault", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def library(emulator_directory) -> ctypes.CDLL:
    return emulator.compile_library('#include "test_kernels.h"\n', directory=emulator_directory)


@dataclasses.dataclass
class Case:
    """A kernel of test_kernels.h on tensors of its own.

    Attributes:
        kernel: its name.
        inputs: int32, what it reads.
        expected: int32, what it must write.
        blocks: how many.
    """

    kernel: str
    inputs: torch.Tensor
    expected: torch.Tensor
    blocks: int = 1

    def run(self, library, fault=0, options=Options()):  # noqa: B008 (immutable)
        """What the kernel writes, and its statistics."""
        out = torch.full_like(self.expected, -1)
        exchange = torch.full((3 * 3 * 64 * 2,), -1, dtype=torch.int32)
        flags = torch.zeros(8, dtype=torch.int32)
        arguments = Arguments(
            self.inputs.data_ptr(), out.data_ptr(), exchange.data_ptr(), flags.data_ptr(), fault
        )
        ranges = [
            MemoryRange.of(self.inputs, "read_only", "inputs"),
            MemoryRange.of(out, "writable", "out"),
            MemoryRange.of(exchange, "exchange", "exchange"),
            MemoryRange.of(flags, "flags", "flags"),
        ]
        statistics = launch_kernel(library, self.kernel, self.blocks, arguments, ranges, options)
        return out, statistics

    def outcomes(self, library, fault, searched=SEARCH) -> list[str]:
        """What comes of it under each of several options: "right", "wrong" or an error."""
        found = []
        for options in searched:
            try:
                out, _ = self.run(library, fault, options)
                found.append("right" if torch.equal(out, self.expected) else "wrong")
            except EmulationError as error:
                found.append(str(error))
        return found


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(0, 1000, shape, dtype=torch.int32)


def mirrored(count: int) -> Case:
    inputs = integers(count)
    return Case("", inputs, inputs.flip(0))


def ring(kernel: str) -> Case:
    """Six hops around three blocks: everything is back, six larger."""
    inputs = integers(3, 64)
    return Case(kernel, inputs, inputs + 6, blocks=3)


def case_of(kernel: str) -> Case:
    torch.manual_seed(0)
    if kernel in ("cluster_ring", "grid_ring"):
        return ring(kernel)
    if kernel in ("reverse_block", "reverse_warp"):
        return dataclasses.replace(mirrored(64 if kernel == "reverse_block" else 32), kernel=kernel)
    if kernel == "matrices":
        # Lane l gets word l % 4 of row l / 4 of each of the four matrices.
        inputs = integers(4, 8, 4)
        return Case(kernel, inputs, inputs.reshape(4, 32).T.contiguous())
    inputs = integers(4, 32, 4) if kernel == "copies" else integers(32)
    return Case(kernel, inputs, inputs.clone())


RIGHT = ("reverse_block", "reverse_warp", "matrices", "copies", "cluster_ring", "grid_ring")


@pytest.mark.parametrize("kernel", [*RIGHT, "global_accesses"])
def test_right_kernels_run_under_every_schedule(library, kernel):
    options = [
        Options(schedule, asynchrony, seed)
        for schedule in emulator.SCHEDULES
        for asynchrony in emulator.ASYNCHRONIES
        for seed in (1, 2)
    ]
    case = case_of(kernel)
    assert case.outcomes(library, 0, options) == ["right"] * len(options)


def test_named_barrier(library):
    assert case_of("reverse_block").outcomes(library, 8) == ["right"] * len(SEARCH)


def test_same_options_same_run(library):
    case = case_of("cluster_ring")
    for options in SEARCH:
        first, second = (case.run(library, options=options)[1] for _ in range(2))
        assert repr(first) == repr(second)


# Kernel, number of the fault in test_kernels.h, what it is, and what finds it: an error of every
# schedule, or None where it takes the right schedule (one of SEARCH) to make the result wrong.
NOBODY = "shared memory that nobody has written"
BEING_WRITTEN = "shared memory that is being written"
FAULTS = [
    ("matrices", 2, "misaligned rows", "misaligned access of 16 bytes"),
    ("reverse_block", 1, "no barrier", None),
    ("reverse_block", 2, "a warp's barrier for a block's", None),
    ("reverse_block", 3, "unequal barrier counts", "sync_named: expects"),
    ("reverse_block", 4, "a warp that exits before a barrier", "deadlock"),
    ("reverse_block", 5, "shared memory out of bounds", "shared memory out of bounds: 4 bytes"),
    ("reverse_block", 6, "misaligned shared store", "misaligned access of 4 bytes"),
    ("reverse_block", 7, "no base", "shared memory out of bounds"),
    ("reverse_warp", 1, "no barrier before reading", None),
    ("reverse_warp", 2, "no barrier before writing", None),
    ("reverse_warp", 3, "lanes at different barriers", "divergent warp"),
    ("reverse_warp", 4, "a lane that does something else", "divergent warp"),
    ("reverse_warp", 5, "half a warp at another barrier", "deadlock"),
    ("copies", 1, "no wait", BEING_WRITTEN),
    ("copies", 2, "wait one group short", BEING_WRITTEN),
    ("copies", 3, "no barrier after the wait", None),
    ("copies", 4, "stage reused too early", None),
    ("copies", 5, "misaligned source", "misaligned load of 16 bytes"),
    ("copies", 6, "no commit", BEING_WRITTEN),
    ("cluster_ring", 1, "too few bytes expected", None),
    ("cluster_ring", 2, "too many bytes expected", "deadlock"),
    ("cluster_ring", 3, "too many arrivals", None),
    ("cluster_ring", 4, "no fence after init", "without mbarrier_init_fence"),
    ("cluster_ring", 5, "no cluster barrier at the start", None),
    ("cluster_ring", 6, "exit before stores have come", None),
    ("cluster_ring", 7, "no wait", None),
    ("cluster_ring", 8, "wait for the wrong parity", None),
    ("cluster_ring", 9, "another block's mbarrier", "are in different blocks"),
    ("cluster_ring", 10, "a buffer too few", None),
    ("cluster_ring", 11, "no such rank", "no block of rank 3"),
    ("cluster_ring", 12, "plain store to a peer", "address of the cluster"),
    ("cluster_ring", 13, "an arrival is missing", "deadlock"),
    ("grid_ring", 1, "no barrier before the release", None),
    ("grid_ring", 2, "no acquire", None),
    ("grid_ring", 3, "no barrier after the acquire", None),
    ("grid_ring", 4, "no release", "deadlock"),
    ("grid_ring", 5, "a buffer too few", None),
    ("grid_ring", 6, "flag without release", "which is for store_release"),
    ("grid_ring", 7, "read as if constant", "as if nobody wrote it"),
    ("grid_ring", 8, "data as a flag", "exchange used as a flag"),
    ("global_accesses", 1, "load beyond the end", "bytes after the end of inputs"),
    ("global_accesses", 2, "load before the start", "bytes before inputs"),
    ("global_accesses", 3, "wide load beyond the end", "load of 16 bytes out of bounds"),
    ("global_accesses", 4, "store beyond the end", "bytes after the end of out"),
    ("global_accesses", 5, "store to an input", "store to inputs, which is read only"),
    ("global_accesses", 6, "load of an output", "load of out, which this kernel may write"),
    ("global_accesses", 7, "misaligned load", "misaligned load of 8 bytes"),
    ("global_accesses", 8, "misaligned store", "misaligned store of 16 bytes"),
    ("global_accesses", 9, "copy from beyond the end", "bytes after the end of inputs"),
]


@pytest.mark.parametrize(
    ("kernel", "fault", "message"),
    [pytest.param(*f[:2], f[3], id=f"{f[0]}-{f[2].replace(' ', '-')}") for f in FAULTS],
)
def test_faults_are_found(library, kernel, fault, message):
    outcomes = case_of(kernel).outcomes(library, fault)
    if message is None:
        assert any(outcome != "right" for outcome in outcomes)
    else:
        assert all(message in outcome for outcome in outcomes), outcomes


def test_errors_name_the_place(library):
    with pytest.raises(EmulationError, match=r"block 0 warp 1 thread 63 at test_kernels.h:\d+: "):
        case_of("reverse_block").run(library, 5)
    with pytest.raises(
        EmulationError, match=r"block 0 warp 0: sync_block at test_kernels.h:\d+, 32"
    ):
        case_of("reverse_block").run(library, 4)


def test_grid_that_does_not_fit_deadlocks(library):
    with pytest.raises(EmulationError, match="deadlock"):
        case_of("grid_ring").run(library, options=Options(max_resident_blocks=2))


def test_without_ranges_only_alignment_is_checked(library):
    inputs, out = integers(64), torch.zeros(32, dtype=torch.int32)
    for fault, message in (1, None), (7, "misaligned"):
        arguments = Arguments(inputs.data_ptr(), out.data_ptr(), None, None, fault)
        if message is None:
            launch_kernel(library, "global_accesses", 1, arguments)
            assert torch.equal(out, inputs[:32])
        else:
            with pytest.raises(EmulationError, match=message):
                launch_kernel(library, "global_accesses", 1, arguments)


def test_statistics(library):
    case = case_of("matrices")
    assert case.run(library)[1].bank_conflicts == 0
    out, statistics = case.run(library, fault=1)
    assert torch.equal(out, case.expected)
    assert statistics.matrix_loads == 1
    # In each of the four matrices seven rows wait for the first.
    assert statistics.bank_conflicts == 28
    statistics = case_of("cluster_ring").run(library)[1]
    assert statistics.remote_stores == 6 * 3 * 64
    assert case_of("copies").run(library)[1].copies == 5 * 32
    assert case_of("grid_ring").run(library)[1].releases == 6 * 3


def test_impossible_launches_are_refused(library):
    with pytest.raises(EmulationError, match="4 blocks in clusters of 3"):
        dataclasses.replace(case_of("cluster_ring"), blocks=4).run(library)


# ---- numbers


def words_of(x: torch.Tensor) -> torch.Tensor:
    """Elements as the words of 32 bits that hold them."""
    return x.contiguous().view(torch.int32)


@pytest.fixture(scope="module")
def numbers(library):
    """256 numbers, and what each function made of them: float32 and int32 [8, 256]."""
    torch.manual_seed(1)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 65519.99, 65520.0]
    special += [6.0e-8, 2.9e-8, 2.98023223876953125e-8, 1e-40, 2.0**-14, 2.0**-14 - 2.0**-26]
    x = torch.cat([torch.tensor(special), torch.randn(256 - len(special)) * 4])
    # Ties, of 16-bit types and of TF32.
    x[100:120] = 1 + torch.arange(20) * 2.0**-11
    x[120:140] = 1 + torch.arange(20) * 2.0**-8
    case = Case("numbers", words_of(x), torch.empty(8, 256, dtype=torch.int32))
    return x, case.run(library)[0]


def test_conversions_are_those_of_torch(numbers):
    x, out = numbers
    for row, dtype in (0, torch.float16), (1, torch.bfloat16):
        ours = out[row].to(torch.int16).view(dtype)
        torch.testing.assert_close(ours, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    for row, dtype in (6, torch.float16), (7, torch.bfloat16):
        halves = words_of(x).to(torch.int16).view(dtype)
        ours = out[row].view(torch.float32)
        torch.testing.assert_close(ours, halves.float(), rtol=0, atol=0, equal_nan=True)


def test_tf32_is_rounded_to_eleven_bits_ties_away_from_zero(numbers):
    x, out = numbers
    finite = x.isfinite() & (x.abs() > 1e-30)
    mantissa, exponent = torch.frexp(x[finite].double())
    rounded = torch.floor(mantissa.abs() * 2**11 + 0.5) * 2.0**-11 * mantissa.sign()
    expected = torch.ldexp(rounded, exponent).float()
    assert torch.equal(out[2].view(torch.float32)[finite], expected)


def test_approximations_are_as_exact_as_the_hardwares(numbers):
    x, out = numbers
    normal = x.isfinite() & (x.abs() > 1e-30)
    for row, function, bits in (
        (3, torch.tanh, 11),
        (4, torch.exp2, 22),
        (5, torch.reciprocal, 23),
    ):
        exact = function(x[normal].double())
        kept = exact.abs().log2().abs() < 100
        error = (out[row].view(torch.float32)[normal] / exact - 1).abs()[kept].max()
        assert error <= 2.0**-bits
    # The coarse one must be coarse, or nothing would notice that it is not good enough somewhere.
    coarse = (out[3].view(torch.float32)[normal] / x[normal].double().tanh() - 1).abs().max()
    assert coarse > 2.0**-12


def test_approximations_flush_subnormals(numbers):
    x, out = numbers
    tiny = (x == torch.tensor(1e-40)).nonzero()[0]
    assert out[4].view(torch.float32)[tiny] == 1
    assert out[5].view(torch.float32)[tiny] == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_multiply_add(library, dtype):
    torch.manual_seed(2)
    k = 8 if dtype == torch.float32 else 16
    a, b, c = torch.randn(16, k).to(dtype), torch.randn(8, k).to(dtype), torch.randn(16, 8)
    inputs = torch.cat([words_of(x).flatten() for x in (a, b, c)])
    name = str(dtype).removeprefix("torch.")
    case = Case(f"multiply_{name}", inputs, torch.empty(16, 8, dtype=torch.int32))
    out = case.run(library)[0].view(torch.float32)
    if dtype == torch.float32:
        # The hardware does not look at the low 13 bits.
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    torch.testing.assert_close(out.double(), c + a.double() @ b.double().T, rtol=1e-5, atol=1e-5)
