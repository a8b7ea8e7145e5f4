"""The package's own exceptions and warnings."""

__all__ = ["BackendUnavailableError", "KernelFallbackWarning"]


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run the problem; the message says why."""


class KernelFallbackWarning(RuntimeWarning):
    """A kernel failed to compile or launch; the next backend computed the (right) result."""
