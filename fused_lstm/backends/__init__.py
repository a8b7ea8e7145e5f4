"""Which backend runs a problem, and why the others do not.

The choice is a pure function of the problem, made once per problem and cached:
the first backend in `ORDER` that supports it by default. A name, given to a module or by
`use_backend`, replaces the choice; a named backend that cannot run raises its reason.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

from fused_lstm.backends.aten import AtenBackend
from fused_lstm.backends.base import (
    Backend,
    BackwardArguments,
    ForwardArguments,
    LayerNormBackwardArguments,
    LayerNormForwardArguments,
    Problem,
    RecurrenceGradients,
    Support,
)
from fused_lstm.backends.cuda import CudaBackend
from fused_lstm.backends.native import NativeBackend
from fused_lstm.backends.reference import ReferenceBackend
from fused_lstm.backends.triton import TritonBackend
from fused_lstm.errors import BackendUnavailableError

__all__ = [
    "ORDER",
    "Backend",
    "BackwardArguments",
    "ForwardArguments",
    "LayerNormBackwardArguments",
    "LayerNormForwardArguments",
    "Problem",
    "RecurrenceGradients",
    "Support",
    "check_name",
    "get_backend",
    "requested_name",
    "select_backend",
    "supports",
    "use_backend",
]

_BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        NativeBackend(),
        CudaBackend(),
        TritonBackend(),
        AtenBackend(),
        ReferenceBackend(),
    )
}

# Fastest first. The last one runs everything.
ORDER = tuple(_BACKENDS)

_requested: ContextVar[str | None] = ContextVar("fused_lstm_backend", default=None)


def check_name(backend: str | None) -> str | None:
    """Return `backend` if it is None or the name of a backend.

    Raises:
        TypeError: if it is neither None nor a string.
        ValueError: if no backend has that name.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend should be None or a str, got: {type(backend).__name__}")
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r}: expected None or one of {', '.join(ORDER)}")
    return backend


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every layer that names no backend of its own on the backend `name`.

    Args:
        name: "native", "cuda", "triton", "aten" or "reference"; None for the default choice.

    Raises:
        TypeError: if `name` is neither None nor a string.
        ValueError: if no backend has that name.
        BackendUnavailableError: from a layer within, where the backend cannot run its problem.

    Example:
        >>> with fused_lstm.use_backend("reference"):
        ...     output, (h_n, c_n) = lstm(input)
    """
    token = _requested.set(check_name(name))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_name(own: str | None) -> str | None:
    """Return the backend a layer was given, or else the one that `use_backend` asks for."""
    return own if own is not None else _requested.get()


def get_backend(name: str) -> Backend:
    """Return the backend called `name`."""
    return _BACKENDS[name]


@functools.lru_cache(maxsize=4096)
def supports(name: str, problem: Problem) -> Support:
    """Ask one backend about one problem; answers are cached."""
    return _BACKENDS[name].supports(problem)


def select_backend(problem: Problem, name: str | None = None) -> str:
    """Return the name of the backend that runs `problem`.

    Args:
        problem: what is to be run.
        name: a backend asked for by name, or None for the first that supports the problem.

    Raises:
        BackendUnavailableError: if the named backend cannot run the problem.
    """
    if name is None:
        return _first_default(problem)
    support = supports(name, problem)
    if not support.ok:
        raise BackendUnavailableError(f"backend={name!r} cannot run here: {support.reason}")
    return name


@functools.lru_cache(maxsize=4096)
def _first_default(problem: Problem) -> str:
    refusals = []
    for name in ORDER:
        support = supports(name, problem)
        if support.ok and support.default:
            return name
        refusals.append(f"{name}: {support.reason}")
    raise BackendUnavailableError("no backend can run here: " + "; ".join(refusals))
