"""Compiles kernels at run time: NVRTC, from CUDA C++ to the machine code of one architecture.

No toolkit, host compiler or CUDA header is needed, and no GPU either: only the packages
`cuda-bindings` and `nvidia-cuda-nvrtc`, which `pip install fused-lstm[cuda]` brings. Importing this
module needs neither.
"""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from .cache import CubinCache

__all__ = [
    "KernelUnavailableError",
    "architecture",
    "availability",
    "compile_source",
    "cubin_of",
    "nvrtc_version",
]

_INSTALL = "pip install fused-lstm[cuda]"
# Functions without a word of where they run are the device's: the headers are host C++ elsewhere.
_OPTIONS = ("--std=c++17", "-default-device")

_cache = CubinCache()


class KernelUnavailableError(RuntimeError):
    """A kernel cannot be had on this machine; the message says why."""


@functools.cache
def availability() -> str | None:
    """What is missing to compile kernels, or None. Only the first call costs anything."""
    try:
        nvrtc = _nvrtc()
    except ImportError as error:
        name = (getattr(error, "name", None) or "").split(".")[0]
        if name in ("", "cuda"):
            return f"the package cuda-bindings is not installed: {_INSTALL}"
        return f"the package cuda-bindings cannot be imported ({error}): {_INSTALL}"
    # Whatever the search for a shared library ends with; cuda-bindings' types differ by version.
    except Exception as error:
        return f"the package cuda-bindings cannot be loaded ({_first_line(error)}): {_INSTALL}"
    try:
        _checked(nvrtc, "nvrtcVersion")
    except Exception as error:
        return f"NVRTC's library cannot be loaded ({_first_line(error)}): {_INSTALL}"
    return None


def architecture(major: int, minor: int) -> str:
    """The architecture to compile for, of a device of this compute capability.

    The plain one ("sm_90", not "sm_90a"): nothing here needs more, thread block clusters and
    `st.async` included. A device newer than NVRTC runs code for an older one of the same major
    number.

    Raises:
        KernelUnavailableError: if NVRTC is not there, or knows no such architecture.
    """
    supported = _supported_architectures()
    usable = [n for n in supported if n // 10 == major and n % 10 <= minor]
    if not usable:
        raise KernelUnavailableError(
            f"NVRTC {nvrtc_version()} does not compile for compute capability {major}.{minor}"
        )
    return f"sm_{max(usable)}"


def cubin_of(source: str, arch: str) -> bytes:
    """The compiled kernel, from the cache if it is there.

    Args:
        source: a translation unit, which may include every header of this folder.
        arch: such as "sm_90".

    Raises:
        KernelUnavailableError: if NVRTC is not there or refuses the source.
    """
    return _cache.get(_cache_key(source, arch), lambda: compile_source(source, arch))


def compile_source(source: str, arch: str) -> bytes:
    """Compiles without the cache; see `cubin_of`."""
    nvrtc = _available_nvrtc()
    headers = _headers()
    options = [*_OPTIONS, f"--gpu-architecture={arch}"]
    program = _checked(
        nvrtc,
        "nvrtcCreateProgram",
        source.encode(),
        b"instance.cu",
        len(headers),
        list(headers.values()),
        [name.encode() for name in headers],
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelUnavailableError(
                f"NVRTC could not compile a kernel for {arch} ({status.name}):\n"
                f"{_log(nvrtc, program)}"
            )
        cubin = b" " * _checked(nvrtc, "nvrtcGetCUBINSize", program)
        _checked(nvrtc, "nvrtcGetCUBIN", program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _nvrtc():
    """The module that binds NVRTC."""
    from cuda.bindings import nvrtc

    return nvrtc


def _available_nvrtc():
    """Likewise; raises if something is missing."""
    if reason := availability():
        raise KernelUnavailableError(reason)
    return _nvrtc()


def _first_line(error: Exception) -> str:
    """What an error says, in short, for a reason shown in a table."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def _checked(nvrtc, function: str, *arguments: object):
    """Calls one of NVRTC's functions and returns its result, or the tuple of its results."""
    status, *results = getattr(nvrtc, function)(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelUnavailableError(f"NVRTC's {function} failed: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


def nvrtc_version() -> str:
    """The version of NVRTC, such as "13.0"."""
    return "{}.{}".format(*_checked(_available_nvrtc(), "nvrtcVersion"))


@functools.cache
def _supported_architectures() -> tuple[int, ...]:
    """Every architecture that NVRTC compiles for: 90 is sm_90."""
    return tuple(_checked(_available_nvrtc(), "nvrtcGetSupportedArchs"))


def _log(nvrtc, program) -> str:
    """What the compiler wrote."""
    log = b" " * _checked(nvrtc, "nvrtcGetProgramLogSize", program)
    _checked(nvrtc, "nvrtcGetProgramLog", program, log)
    return log.decode(errors="replace").strip("\0 \n")


@functools.cache
def _headers() -> dict[str, bytes]:
    """Every header of this folder by name, sorted."""
    folder = Path(__file__).parent
    paths = [path for pattern in ("*.cuh", "*.h") for path in folder.glob(pattern)]
    return {path.name: path.read_bytes() for path in sorted(paths)}


@functools.cache
def _cache_key(source: str, arch: str) -> str:
    """A digest of all that the machine code depends on."""
    headers = [part for name, text in _headers().items() for part in (name.encode(), text)]
    circumstances = repr((nvrtc_version(), arch, _OPTIONS)).encode()
    return _digest([circumstances, source.encode(), *headers])


def _digest(parts: Iterable[bytes]) -> str:
    """A digest of a list of texts, in which no text can pass for a part of its neighbour."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
