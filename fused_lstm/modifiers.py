"""What may change a recurrence: lengths, resets, masks, zoneout, clipping.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NO_MODIFIERS", "Modifiers", "check_clip", "check_length_values", "check_modifiers"]


class Modifiers(NamedTuple):
    """Arguments of one recurrence that are None where they are not used; see `lstm_recurrence`.

    Attributes:
        lengths: [B] int64, steps of each sequence; for padded batches.
        resets: [T, B] or [N] bool, whether the state entering a step is zero.
        recurrent_mask: [B, P] in the dtype of the gates, factors on h_{t−1} where it enters W_hh.
        zoneout_h: [T, B, P] or [N, P], the part of h_t that is h_{t−1}.
        zoneout_c: [T, B, H] or [N, H], the part of c_t that is c_{t−1}.
        cell_clip: largest magnitude of a new cell state.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    cell_clip: float | None = None

    def names(self) -> tuple[str, ...]:
        """Names of those that are given."""
        return tuple(
            name for name, value in zip(self._fields, self, strict=True) if value is not None
        )

    def to(self, dtype: torch.dtype) -> Modifiers:
        """The masks for gates in `dtype`: probabilities may stay in float32 for 16-bit gates."""

        def zoneout(mask: Tensor | None) -> Tensor | None:
            return mask if mask is None or mask.dtype in _mask_dtypes(dtype) else mask.to(dtype)

        return self._replace(
            recurrent_mask=None if self.recurrent_mask is None else self.recurrent_mask.to(dtype),
            zoneout_h=zoneout(self.zoneout_h),
            zoneout_c=zoneout(self.zoneout_c),
        )


NO_MODIFIERS = Modifiers()


def _mask_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What zoneout may be given in: float32 for 16-bit gates rounds a probability less."""
    return (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)


def check_length_values(lengths: Tensor | None, steps: int) -> None:
    """Raise unless every length is between 0 and T; on an NVIDIA or AMD GPU the device does, later.

    Raises:
        ValueError: if one is not.
    """
    if lengths is None or not lengths.numel():
        return
    if lengths.device.type == "meta":
        return
    if lengths.device.type == "cuda":
        within = ((lengths >= 0) & (lengths <= steps)).all()
        # No waiting for the device, as where an index is out of range.
        torch._assert_async(within, f"lengths: expected 0 <= length <= {steps}")
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(lengths))
    if smallest < 0 or largest > steps:
        bad = smallest if smallest < 0 else largest
        raise ValueError(f"lengths: expected 0 <= length <= {steps} (time steps), got {bad}")


def check_clip(value: Any) -> float | None:
    """Return `value` if it is None or a finite number above 0.

    Raises:
        ValueError: if it is neither.
    """
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < float(value) < math.inf:
        raise ValueError(f"cell_clip: expected None or a finite number above 0, got {value!r}")
    return float(value)


def check_modifiers(
    modifiers: Modifiers,
    leading: tuple[int, ...],
    batch: int,
    features: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise unless shapes, dtypes and devices fit a recurrence; no value of a tensor is read.

    Args:
        modifiers: what to check.
        leading: the shape of the gates without their last dimension: (T, B), or (N,) for packed
            rows.
        batch: B.
        features: P.
        hidden: H.
        dtype: dtype of the gates.
        device: device of the gates.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for anything else that does not fit.
    """
    lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip = modifiers
    if lengths is not None and len(leading) == 1:
        raise ValueError(
            "lengths: expected none with batch_sizes, which already say how long sequences are, "
            f"got {list(lengths.shape)}"
        )
    masks = _mask_dtypes(dtype)
    expected = {
        "lengths": (lengths, (batch,), (torch.int64,)),
        "resets": (resets, leading, (torch.bool,)),
        "recurrent_mask": (recurrent_mask, (batch, features), (dtype,)),
        "zoneout_h": (zoneout_h, (*leading, features), masks),
        "zoneout_c": (zoneout_c, (*leading, hidden), masks),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {tensor!r}")
        if tensor.dtype not in dtypes:
            names = " or ".join(map(str, dtypes))
            raise TypeError(f"{name}: expected {names}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor that requires no gradient")
    check_clip(cell_clip)
