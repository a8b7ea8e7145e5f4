"""Swap the LSTM layers of a finished model, in place, keeping its parameters."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from fused_lstm.backends import check_name
from fused_lstm.modifiers import check_clip
from fused_lstm.module import LSTM, REGULARIZERS, LSTMCell, as_given, check_expressible
from fused_lstm.regularization import Zoneout, check_probability

__all__ = ["replace_lstm", "restore_lstm"]

Model = TypeVar("Model", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_TORCH = {fused: plain for plain, fused in _FUSED.items()}


def replace_lstm(
    model: Model,
    *,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    zoneout: Zoneout = 0.0,
    cell_clip: float | None = None,
    backend: str | None = None,
) -> Model:
    """Make every `torch.nn.LSTM` and `torch.nn.LSTMCell` of a model a fused one.

    Parameters, hooks, flags and names stay the very same objects, so optimizers and checkpoints go
    on working. Subclasses of torch's layers are left alone: their forward pass may be their own.
    Layers that are fused already keep their options.

    Args:
        model: any module; if it is itself an LSTM, it becomes a fused one.
        recurrent_dropout: as for `fused_lstm.LSTM`, and so for what follows; a cell has none of
            them but backend.
        weight_dropout: see there.
        zoneout: see there.
        cell_clip: see there.
        backend: see there.

    Returns:
        The model.

    Raises:
        TypeError: if model is not a module, or backend neither None nor a string.
        ValueError: if an option has no such value.
    """
    options: dict[str, Any] = {
        "recurrent_dropout": check_probability("recurrent_dropout", recurrent_dropout),
        "weight_dropout": check_probability("weight_dropout", weight_dropout),
        "zoneout": as_given(zoneout),
        "cell_clip": check_clip(cell_clip),
    }
    check_name(backend)
    for module in _change_classes(model, _FUSED):
        module.backend = backend  # type: ignore[assignment]
        if isinstance(module, nn.LSTM):
            for name, value in options.items():
                setattr(module, name, value)
    return model


def restore_lstm(model: Model) -> Model:
    """Undo `replace_lstm`: make every fused layer of a model a torch layer again.

    A `LayerNormLSTM`, which replaces nothing of torch's, stays.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        TypeError: if model is not a module.
        ValueError: if a layer has an option that torch's has not, and that acts in its present
            mode (see `fused_lstm.LSTM.to_torch`); the model is then left as it was.
    """
    _check_model(model)
    for module in model.modules():
        if type(module) is LSTM:
            check_expressible(module)
    for module in _change_classes(model, _TORCH):
        for name in ("backend", "forget_bias", *REGULARIZERS):
            module.__dict__.pop(name, None)
        if isinstance(module, nn.LSTM):
            module._init_flat_weights()
    return model


def _change_classes(
    model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]
) -> list[nn.Module]:
    """Change the class of every module of exactly a listed class; return those changed.

    The classes differ in methods alone, so the object, and every reference to it, stays.
    """
    _check_model(model)
    changed = [module for module in model.modules() if type(module) in classes]
    for module in changed:
        module.__class__ = classes[type(module)]
    return changed


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got: {type(model).__name__}")
