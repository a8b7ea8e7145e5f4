"""Compiled kernels, kept in memory and on disk.

The folder is `$FUSED_LSTM_CACHE`, else `$XDG_CACHE_HOME/fused_lstm`, else `~/.cache/fused_lstm`.
Any number of processes may share it: a file appears under its name only when it is complete, and
is believed only if its checksum fits. Nothing in it is ever missed: it may be deleted at any time.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

__all__ = ["CubinCache", "cache_folder"]

# The first bytes of a file; the number is the format's.
_MAGIC = b"fused_lstm cubin 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Where compiled kernels are kept; it need not exist yet.

    Raises:
        RuntimeError: if no variable names it and there is no home folder.
    """
    if folder := os.environ.get("FUSED_LSTM_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder, "fused_lstm")
    return Path.home() / ".cache" / "fused_lstm"


def _digest(key: str, cubin: bytes) -> bytes:
    """The checksum of a file's content; with the key, so that a renamed file does not fit."""
    return hashlib.sha256(key.encode() + b"\0" + cubin).digest()


class CubinCache:
    """Cubins by key: from memory, else from the disk, else compiled.

    A key says everything that a cubin depends on; the cache never compares anything else. A disk
    that cannot be read or written costs one warning, and compilation in every process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cubins: dict[str, bytes] = {}
        self._key_locks: dict[str, threading.Lock] = {}
        self._warned = False

    def get(self, key: str, compile_cubin: Callable[[], bytes]) -> bytes:
        """The cubin of `key`; only one of several threads that ask compiles it.

        Args:
            key: a hexadecimal digest.
            compile_cubin: makes the cubin; what it raises is raised, and nothing is kept.
        """
        if (cubin := self._cubins.get(key)) is not None:
            return cubin
        with self._lock:
            key_lock = self._key_locks.setdefault(key, threading.Lock())
        with key_lock:
            if (cubin := self._cubins.get(key)) is None:
                cubin = self._read(key)
                if cubin is None:
                    cubin = compile_cubin()
                    self._write(key, cubin)
                self._cubins[key] = cubin
        return cubin

    def _read(self, key: str) -> bytes | None:
        """The cubin on disk; None where there is none, or what is there is not what was written."""
        try:
            content = (cache_folder() / f"{key}.cubin").read_bytes()
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError) as error:
            self._warn("read", error)
            return None
        start = len(_MAGIC) + _DIGEST_BYTES
        cubin = content[start:]
        fits = content[:start] == _MAGIC + _digest(key, cubin)
        return cubin if fits else None

    def _write(self, key: str, cubin: bytes) -> None:
        """Writes the file under another name and renames it: readers see all of it, or none."""
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=folder, prefix=f"{key[:16]}.", suffix=".tmp")
            try:
                with open(descriptor, "wb") as file:
                    file.write(_MAGIC + _digest(key, cubin) + cubin)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, folder / f"{key}.cubin")
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except (OSError, RuntimeError) as error:
            self._warn("written", error)

    def _warn(self, what: str, error: Exception) -> None:
        """Says once that the disk does not help."""
        with self._lock:
            if self._warned:
                return
            self._warned = True
        warnings.warn(
            f"fused_lstm's cache of compiled kernels cannot be {what} ({error}); kernels are "
            "compiled again in every process. FUSED_LSTM_CACHE names another folder.",
            UserWarning,
            stacklevel=2,
        )
