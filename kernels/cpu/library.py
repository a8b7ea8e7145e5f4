"""Finds and loads the native library: at the first call that needs it, and once per process.

The library is plain C++ without Python's headers: whoever can fill the structures of lstm.h can
call it. It depends on no OpenMP runtime either. It is handed the one that PyTorch runs on, because
two runtimes in one process compete for the cores, and some pairs of them abort it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["ABI_VERSION", "PATH_VARIABLE", "Library", "LibraryUnavailableError", "load"]

# kLstmAbiVersion in lstm.h.
ABI_VERSION = 6

# Environment variable that names another build of the library, for sanitizers and debugging.
PATH_VARIABLE = "FUSED_LSTM_NATIVE_LIBRARY"

# What lstm.h says of fused_lstm_set_openmp, in its order.
_OPENMP_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")

# Of the ELF format: the size of a segment's entry, and the kind that is mapped into memory.
_ELF_SEGMENT_ENTRY = 56
_ELF_SEGMENT_LOADED = 1

Run = Callable[[bytes, int, int, int, int], int]
RunPlain = Callable[[bytes], int]


class LibraryUnavailableError(RuntimeError):
    """The native library cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Library:
    """The native library, loaded.

    Attributes:
        path: the file it was loaded from.
        instruction_sets: what it was compiled for and this CPU has, best first, such as
            ("avx512", "avx2", "baseline").
        multiply_bfloat16: for each of them, whether `forward` takes bfloat16.
        forward: `fused_lstm_forward(structures, count, dtype, threads, instruction_set)`, where the
            structures are `bytes`; returns an LstmStatus. Runs without the interpreter's lock.
        backward: `fused_lstm_backward`, likewise.
        layer_norm_forward: `fused_lstm_layer_norm_forward`, likewise.
        layer_norm_backward: `fused_lstm_layer_norm_backward`, likewise.
        plain_forward: `fused_lstm_plain_forward(layers)`, with a structure and the addresses behind
            it as `bytes`; likewise.
        plain_backward: `fused_lstm_plain_backward(layers)`, likewise.
        openmp: whether it has PyTorch's OpenMP runtime. Without one it takes a single thread.
        openmp_reason: why it does not, else empty.
    """

    path: Path
    instruction_sets: tuple[str, ...]
    multiply_bfloat16: tuple[bool, ...]
    forward: Run
    backward: Run
    layer_norm_forward: Run
    layer_norm_backward: Run
    plain_forward: RunPlain
    plain_backward: RunPlain
    openmp: bool
    openmp_reason: str


_lock = threading.Lock()
# What the first load() came to: the library, or the reason why there is none.
_outcome: Library | str | None = None


def load() -> Library:
    """Return the native library, loading it at the first call.

    Raises:
        LibraryUnavailableError: if it was not built, or cannot be used here. A failure is
            remembered like a success: later calls raise it again and do not look at the disk.
    """
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                try:
                    _outcome = _open(_locate())
                except LibraryUnavailableError as error:
                    _outcome = str(error)
    if isinstance(_outcome, str):
        raise LibraryUnavailableError(_outcome)
    return _outcome


def _locate() -> Path:
    """Return the file to load: the one that the environment names, or the one next to this file."""
    named = os.environ.get(PATH_VARIABLE)
    if named:
        # A name without a folder would make the dynamic loader search its own path.
        return Path(named).absolute()
    folder = Path(__file__).absolute().parent
    for suffix in (*importlib.machinery.EXTENSION_SUFFIXES, ".so", ".dylib"):
        path = folder / f"_native{suffix}"
        if os.path.lexists(path):
            return path
    raise LibraryUnavailableError(
        f"{folder} holds no native library: it is built when fused_lstm is installed, and that "
        "needs a C++17 compiler (GCC or Clang)"
    )


def _open(path: Path) -> Library:
    """Load the library at `path`, check that it is one, and hand it PyTorch's OpenMP runtime."""
    _check_file(path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        cause = str(error).removeprefix(f"{path}: ")
        raise LibraryUnavailableError(f"{path} cannot be loaded: {cause}") from error
    try:
        abi_version = library.fused_lstm_abi_version
        abi_version.argtypes = []
        abi_version.restype = ctypes.c_int64
        found = abi_version()
        if found != ABI_VERSION:
            raise LibraryUnavailableError(
                f"{path} was built from other sources than this fused_lstm: its interface has "
                f"version {found}, expected {ABI_VERSION}; install fused_lstm again"
            )
        instruction_sets = library.fused_lstm_instruction_sets
        instruction_sets.argtypes = []
        instruction_sets.restype = ctypes.c_char_p
        multiplies_bfloat16 = library.fused_lstm_multiplies_bfloat16
        multiplies_bfloat16.argtypes = [ctypes.c_int64]
        multiplies_bfloat16.restype = ctypes.c_int64
        set_openmp = library.fused_lstm_set_openmp
        set_openmp.argtypes = [ctypes.c_void_p] * len(_OPENMP_FUNCTIONS)
        set_openmp.restype = None
        runs = (
            library.fused_lstm_forward,
            library.fused_lstm_backward,
            library.fused_lstm_layer_norm_forward,
            library.fused_lstm_layer_norm_backward,
        )
        plain_runs = (library.fused_lstm_plain_forward, library.fused_lstm_plain_backward)
    except AttributeError as error:
        cause = str(error).removeprefix(f"{path}: ")
        raise LibraryUnavailableError(
            f"{path} is not fused_lstm's native library: {cause}"
        ) from error
    for run in runs:
        run.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
        run.restype = ctypes.c_int32
    for run in plain_runs:
        run.argtypes = [ctypes.c_void_p]
        run.restype = ctypes.c_int32
    names = tuple((instruction_sets() or b"").decode("ascii", "replace").split(","))
    if not names[0]:
        raise LibraryUnavailableError(f"{path} has no kernels that this CPU can run")
    openmp, reason = _find_openmp()
    if openmp:
        set_openmp(*openmp)
    multiply_bfloat16 = tuple(bool(multiplies_bfloat16(k)) for k in range(len(names)))
    return Library(path, names, multiply_bfloat16, *runs, *plain_runs, bool(openmp), reason)


def _check_file(path: Path) -> None:
    """Refuse what the dynamic loader would report badly, or not survive.

    glibc says of a file for another processor that it does not exist. It maps as much of a file as
    the headers promise, and the process dies of SIGBUS where the file ends before: an interrupted
    copy must be caught here.
    """
    try:
        if not path.is_file():
            cause = "is not a file" if path.exists() else "does not exist"
            raise LibraryUnavailableError(f"{path} {cause}")
        machine, ours = _elf_machine(path), _elf_machine(Path(torch._C.__file__))
        if machine and ours and machine != ours:
            raise LibraryUnavailableError(f"{path} was built for another processor or system")
        size, promised = path.stat().st_size, _promised_size(path)
    except OSError as error:
        raise LibraryUnavailableError(f"{path} cannot be read: {error.strerror}") from error
    if size < promised:
        raise LibraryUnavailableError(
            f"{path} is cut off: it has {size} of at least {promised} bytes; install fused_lstm "
            "again"
        )


def _elf_machine(path: Path) -> bytes:
    """Return the word size, byte order and processor of an ELF file, and nothing of other files."""
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20 or not header.startswith(b"\x7fELF"):
        return b""
    return header[4:6] + header[18:20]


def _promised_size(path: Path) -> int:
    """Return how many bytes a 64-bit ELF file must have by its headers, and 0 for other files."""
    with path.open("rb") as file:
        header = file.read(64)
        if not header.startswith(b"\x7fELF\x02"):
            return 0
        if len(header) < 64:
            return 64
        segments_at, sections_at = struct.unpack_from("=QQ", header, 32)
        segment_size, segments, section_size, sections = struct.unpack_from("=HHHH", header, 54)
        tables_end: int = max(
            segments_at + segment_size * segments, sections_at + section_size * sections
        )
        if tables_end > path.stat().st_size or segment_size < _ELF_SEGMENT_ENTRY:
            return tables_end
        file.seek(segments_at)
        table = file.read(segment_size * segments)
    ends = [tables_end]
    for index in range(segments):
        kind, _, offset, _, _, length = struct.unpack_from("=IIQQQQ", table, index * segment_size)
        if kind == _ELF_SEGMENT_LOADED:
            ends.append(offset + length)
    return max(ends)


def _find_openmp() -> tuple[list[int], str]:
    """Look up the OpenMP functions that PyTorch itself calls.

    Returns:
        The address of each of `_OPENMP_FUNCTIONS` and an empty text, or no address and the reason.
    """
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    path = Path(torch.__file__).parent / "lib" / name
    try:
        # Elsewhere in a distribution's package; the loader knows it by its name then. It is loaded
        # already: a lookup must not load a second copy.
        mode = os.RTLD_LOCAL | os.RTLD_NOLOAD
        torch_library = ctypes.CDLL(str(path) if path.exists() else name, mode=mode)
        everything = ctypes.CDLL(None)
    except (AttributeError, OSError, TypeError) as error:
        return [], f"one thread only: PyTorch's {name} is not to be found: {error}"
    addresses = []
    for function in _OPENMP_FUNCTIONS:
        # The dynamic linker's own order, so that a runtime that was preloaded is found, as PyTorch
        # finds it. But only what PyTorch's library can see counts.
        if not hasattr(torch_library, function):
            return [], f"one thread only: PyTorch runs on no OpenMP runtime that has {function}"
        scope = everything if hasattr(everything, function) else torch_library
        address = ctypes.cast(getattr(scope, function), ctypes.c_void_p).value
        assert address is not None
        addresses.append(address)
    return addresses, ""
