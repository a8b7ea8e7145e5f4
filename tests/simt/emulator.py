"""Compiles CUDA kernels for the SIMT emulator and launches them on CPU tensors.

See docs/emulator.md for what the emulator models and what it finds.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import fused_lstm.kernels
import torch

if TYPE_CHECKING:
    from fused_lstm.kernels.cuda.config import Config

Direction = Literal["forward", "backward"]

HERE = Path(__file__).parent
# The sources that a kernel's instance includes.
KERNELS = Path(fused_lstm.kernels.__file__).parent / "cuda"

SCHEDULES = ("fifo", "random", "lifo", "priority")
ASYNCHRONIES = ("eager", "sometimes", "late")
ACCESSES = ("read_only", "writable", "exchange", "flags")

# No contraction: what a kernel computes does not depend on the host's instructions.
FLAGS = (
    "-std=c++17",
    "-O1",
    "-ftree-vectorize",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DSIMT_EMULATION",
    "-fPIC",
    "-shared",
)
ERROR_BYTES = 16384

# The emulator has one machine for a process.
_machine = threading.Lock()


class EmulationError(RuntimeError):
    """A kernel did what it must not do; the message says what, who and where."""


class CompilationError(RuntimeError):
    """The compiler refused a source."""


class CompilerMissingError(RuntimeError):
    """There is no C++ compiler: nothing can be emulated."""


class _Options(ctypes.Structure):
    _fields_ = (
        ("schedule", ctypes.c_int),
        ("asynchrony", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("max_resident_blocks", ctypes.c_uint),
    )


class _Range(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("access", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """How a launch is emulated.

    Attributes:
        schedule: which thread goes on: "fifo", "random", "lifo" or "priority".
        asynchrony: when what is asynchronous happens: "eager", "sometimes" or "late".
        seed: of every random choice; the same options give the same run.
        max_resident_blocks: how many blocks of a cooperative launch run at the same time; 0: all.
    """

    schedule: str = "fifo"
    asynchrony: str = "late"
    seed: int = 1
    max_resident_blocks: int = 0

    def _as_parameter(self) -> _Options:
        return _Options(
            SCHEDULES.index(self.schedule),
            ASYNCHRONIES.index(self.asynchrony),
            self.seed,
            self.max_resident_blocks,
        )


# Orders of events that differ much: a fault that depends on the order shows in one, as a rule.
SEARCH = (
    Options("fifo", "late", 1),
    Options("lifo", "late", 2),
    Options("random", "sometimes", 3),
    Options("priority", "late", 4),
    Options("priority", "sometimes", 5),
    Options("random", "late", 6),
    Options("lifo", "eager", 7),
    Options("random", "eager", 8),
)


class Statistics(ctypes.Structure):
    """What happened in a launch, counted over all blocks.

    Attributes:
        switches: from one thread to another.
        barriers: meetings of threads at barriers.
        multiplications: `multiply_add` of a warp.
        matrix_loads: `load_matrices` of a warp.
        bank_conflicts: rows in a `load_matrices` that had to wait for another's banks.
        copies: asynchronous copies of 16 bytes.
        remote_stores: stores of 16 bytes into another block's shared memory.
        releases: flags that other blocks may wait for.
    """

    _fields_ = tuple(
        (name, ctypes.c_longlong)
        for name in (
            "switches",
            "barriers",
            "multiplications",
            "matrix_loads",
            "bank_conflicts",
            "copies",
            "remote_stores",
            "releases",
        )
    )

    def __repr__(self) -> str:
        return f"Statistics({', '.join(f'{n}={getattr(self, n)}' for n, _ in self._fields_)})"


class MemoryRange(NamedTuple):
    """Global memory that a kernel may access.

    Attributes:
        address: of the first byte.
        bytes: how many.
        access: "read_only", "writable", "exchange" or "flags".
        name: for errors.
    """

    address: int
    bytes: int
    access: str
    name: str

    @classmethod
    def of(cls, tensor: torch.Tensor, access: str, name: str) -> MemoryRange:
        """The memory of a contiguous tensor."""
        return cls(tensor.data_ptr(), tensor.numel() * tensor.element_size(), access, name)


# ---- compiling


@functools.cache
def compiler() -> str:
    """The C++ compiler: $CXX, g++ or clang++.

    Raises:
        CompilerMissingError: if there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise CompilerMissingError("no C++ compiler: the kernels cannot be emulated")


@functools.cache
def default_directory() -> Path:
    """Where compiled kernels are kept from run to run: a folder of this user alone."""
    directory = Path(tempfile.gettempdir()) / f"fused_lstm_emulator_{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user")
    _remove_what_is_older(directory, days=3)
    return directory


def _remove_what_is_older(directory: Path, days: float) -> None:
    """Removes files that were not written lately: kernels of sources that are no more."""
    oldest = time.time() - days * 24 * 3600
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(source: str, kernels: Path, flags: Sequence[str]) -> str:
    """A name for what comes out of the compiler."""
    digest = hashlib.sha256()
    digest.update(repr((source, flags, compiler(), platform.machine())).encode())
    for folder in (HERE, kernels):
        for header in sorted((*folder.glob("*.h"), *folder.glob("*.cuh"))):
            digest.update(header.name.encode() + b"\0" + header.read_bytes())
    return digest.hexdigest()[:24]


def compile_library(
    source: str, *, directory: Path | None = None, kernels: Path = KERNELS
) -> ctypes.CDLL:
    """Compiles a translation unit for the emulator, unless it has been before, and loads it.

    Args:
        source: C++, including kernels and a launcher.
        directory: where the library is kept; processes may share it.
        kernels: the folder of the kernels' headers.

    Raises:
        CompilerMissingError: if there is no compiler.
        CompilationError: if it refuses the source.
    """
    directory = directory or default_directory()
    flags = (*FLAGS, f"-I{kernels}", f"-I{HERE}")
    name = _digest(source, kernels, FLAGS)
    library = directory / f"{name}.so"
    with _locked(directory / f"{name}.lock"):
        if not library.exists():
            unit, partial = directory / f"{name}.cpp", directory / f"{name}.partial.so"
            unit.write_text(source)
            command = [compiler(), *flags, str(unit), "-o", str(partial)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise CompilationError(f"{' '.join(command)}\n{result.stderr}")
            if name != _digest(source, kernels, FLAGS):
                raise CompilationError(f"{kernels} or {HERE} changed while it was compiled")
            partial.replace(library)
    return ctypes.CDLL(str(library))


# ---- launching


def _run(function: ctypes._CFuncPtr, *arguments: object, options: Options) -> Statistics:
    """Calls one of the launchers' functions."""
    statistics = Statistics()
    error = ctypes.create_string_buffer(ERROR_BYTES)
    with _machine:
        status = function(
            *arguments,
            ctypes.byref(options._as_parameter()),
            ctypes.byref(statistics),
            error,
            ctypes.c_size_t(ERROR_BYTES),
        )
    if status:
        raise EmulationError(f"{error.value.decode()}\n({options})")
    return statistics


def launch_kernel(
    library: ctypes.CDLL,
    kernel: str,
    blocks: int,
    parameters: ctypes.Structure,
    ranges: Sequence[MemoryRange] = (),
    options: Options = Options(),
) -> Statistics:
    """Runs any kernel for which its source says `SIMT_LAUNCHER(kernel, ...)`.

    Args:
        library: from `compile_library`.
        kernel: its name.
        blocks: how many.
        parameters: what the kernel is passed.
        ranges: all the global memory that it may access; none: no access is checked.
        options: how it is run.

    Raises:
        EmulationError: if the kernel did what it must not do.
    """
    listed = [(r.address, r.bytes, ACCESSES.index(r.access), r.name.encode()) for r in ranges]
    table = (_Range * len(listed))(*listed)
    return _run(
        getattr(library, f"simt_launch_{kernel}"),
        ctypes.c_uint(blocks),
        ctypes.byref(parameters),
        table,
        ctypes.c_size_t(len(table)),
        options=options,
    )


class Emulated:
    """An instance of an LSTM kernel.

    Attributes:
        threads: of a block.
        shared_bytes: of a block.
        exchange_bytes: of a team.
        team: blocks of a team.
    """

    def __init__(self, library: ctypes.CDLL):
        library.simt_parameter_bytes.restype = ctypes.c_size_t
        library.simt_exchange_bytes.restype = ctypes.c_longlong
        self._library = library
        self.threads: int = library.simt_threads()
        self.shared_bytes: int = library.simt_shared_bytes()
        self.exchange_bytes: int = library.simt_exchange_bytes()
        self.team: int = library.simt_team()

    def launch(
        self,
        teams: int,
        parameters: ctypes.Structure,
        options: Options = Options(),
    ) -> Statistics:
        """Runs `teams` teams. All accesses to global memory are checked against `parameters`.

        Raises:
            EmulationError: if the kernel did what it must not do.
        """
        expected = self._library.simt_parameter_bytes()
        if ctypes.sizeof(parameters) != expected:
            raise ValueError(
                f"{type(parameters).__name__} has {ctypes.sizeof(parameters)} bytes, "
                f"the kernel's parameters {expected}"
            )
        return _run(
            self._library.simt_launch,
            ctypes.c_uint(teams),
            ctypes.byref(parameters),
            options=options,
        )


def build(
    source: str, direction: Direction, *, directory: Path | None = None, kernels: Path = KERNELS
) -> Emulated:
    """Compiles an instance of the forward or the backward kernel.

    Args:
        source: the instance, as `Config.source` has it.
        direction: which kernel it is.
        directory: where the library is kept; processes may share it.
        kernels: the folder of the kernels' headers.

    Raises:
        CompilerMissingError: if there is no compiler.
        CompilationError: if it refuses the source.
    """
    name = direction.capitalize()
    launcher = f"lstm_{direction}_kernel, {name}Layout<Configuration>, {name}Parameters"
    unit = f'{source}\n#include "lstm_launcher.h"\nSIMT_LSTM_LAUNCHER({launcher})\n'
    return Emulated(compile_library(unit, directory=directory, kernels=kernels))


# ---- behind the host code of the kernels


class EmulatedKernel:
    """A kernel as the host code launches it; see `Kernel` in kernels/cuda/driver.py.

    Attributes:
        resident_teams: how many teams the pretended device runs at the same time.
    """

    def __init__(self, emulated: Emulated, config: Config, executor: EmulatedExecutor):
        self._emulated = emulated
        self._config = config
        self._executor = executor
        self.resident_teams = executor.resident_blocks // config.TEAM

    def launch(self, teams: int, parameters: ctypes.Structure) -> None:
        executor = self._executor
        if self._config.cooperative and teams > self.resident_teams:
            raise EmulationError(
                f"a cooperative launch of {teams} teams, where {self.resident_teams} are resident"
            )
        statistics = self._emulated.launch(teams, parameters, executor.options)
        executor.launches.append(EmulatedLaunch(self._config, teams, statistics))


class EmulatedLaunch(NamedTuple):
    """What was launched, and what happened."""

    config: Config
    teams: int
    statistics: Statistics


class EmulatedExecutor:
    """Compiles and runs kernels in the emulator; see `Executor` in kernels/cuda/driver.py.

    Attributes:
        options: how kernels are run; may be changed between launches.
        resident_blocks: how many blocks the pretended device runs at the same time.
        launches: all that were made.
    """

    def __init__(
        self,
        options: Options = Options(),
        *,
        directory: Path | None = None,
        kernels: Path = KERNELS,
        resident_blocks: int = 132,
    ):
        self.options = options
        self.resident_blocks = resident_blocks
        self.launches: list[EmulatedLaunch] = []
        self._directory = directory
        self._sources = kernels
        self._kernels: dict[Config, EmulatedKernel] = {}

    def load(self, config: Config, device: torch.device) -> EmulatedKernel:
        """The kernel of a configuration; the device is the CPU, where the tensors are."""
        if config not in self._kernels:
            emulated = build(
                config.source(), config.direction, directory=self._directory, kernels=self._sources
            )
            self._kernels[config] = EmulatedKernel(emulated, config, self)
        return self._kernels[config]
