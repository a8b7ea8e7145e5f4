"""Swap the LSTM layers of a finished model, in place, keeping its parameters."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fused_lstm.backends import check_name
from fused_lstm.module import LSTM, LSTMCell

__all__ = ["replace_lstm", "restore_lstm"]

Model = TypeVar("Model", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_TORCH = {fused: plain for plain, fused in _FUSED.items()}


def replace_lstm(model: Model, *, backend: str | None = None) -> Model:
    """Make every `torch.nn.LSTM` and `torch.nn.LSTMCell` of a model a fused one.

    Parameters, hooks, flags and names stay the very same objects, so optimizers and checkpoints go
    on working. Subclasses of torch's layers are left alone: their forward pass may be their own.

    Args:
        model: any module; if it is itself an LSTM, it becomes a fused one.
        backend: as for `fused_lstm.LSTM`.

    Returns:
        The model.

    Raises:
        TypeError: if model is not a module, or backend neither None nor a string.
        ValueError: if no backend has that name.
    """
    check_name(backend)
    for module in _change_classes(model, _FUSED):
        module.backend = backend  # type: ignore[assignment]
    return model


def restore_lstm(model: Model) -> Model:
    """Undo `replace_lstm`: make every fused layer of a model a torch layer again.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        TypeError: if model is not a module.
    """
    for module in _change_classes(model, _TORCH):
        module.__dict__.pop("backend", None)
        if isinstance(module, nn.LSTM):
            module._init_flat_weights()
    return model


def _change_classes(
    model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]
) -> list[nn.Module]:
    """Change the class of every module of exactly a listed class; return those changed.

    The classes differ in methods alone, so the object, and every reference to it, stays.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got: {type(model).__name__}")
    changed = [module for module in model.modules() if type(module) in classes]
    for module in changed:
        module.__class__ = classes[type(module)]
    return changed
