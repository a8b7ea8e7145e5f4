"""Recurrent regularizers of an LSTM: their settings, and the masks drawn for them.

Masks come from PyTorch's generator of the device, so that seeds, `torch.random.fork_rng` and
`torch.utils.checkpoint` repeat them.

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lstm.modifiers import Modifiers
from fused_lstm.reference import state_dtype

__all__ = [
    "NO_REGULARIZATION",
    "Regularization",
    "Zoneout",
    "check_probability",
    "check_zoneout",
]

# One probability, or those of h and c.
Zoneout = float | tuple[float, float]


class Regularization(NamedTuple):
    """What keeps a recurrence from overfitting, or from running away.

    Attributes:
        recurrent_dropout: probability of zeroing a unit of h_{t−1} where it enters W_hh, one mask
            for a whole sequence, in training (Gal & Ghahramani 2016, "A theoretically grounded
            application of dropout in recurrent neural networks", arXiv:1512.05287).
        weight_dropout: probability of zeroing an element of W_hh, one mask for a forward pass, in
            training (DropConnect; Merity, Keskar & Socher 2018, "Regularizing and optimizing LSTM
            language models", arXiv:1708.02182).
        zoneout: probability that a unit keeps its previous value, of h and of c; in evaluation
            their expectation (Krueger et al. 2017, "Zoneout: regularizing RNNs by randomly
            preserving hidden activations", arXiv:1606.01305).
        cell_clip: largest magnitude of a new cell state (Sak, Senior & Beaufays 2014, "Long
            short-term memory recurrent neural network architectures for large scale acoustic
            modeling"), or None.
    """

    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    cell_clip: float | None = None

    def names(self, training: bool) -> tuple[str, ...]:
        """Names of those that act on the recurrence itself."""
        names = []
        if training and self.recurrent_dropout:
            names.append("recurrent_dropout")
        if any(self.zoneout):
            names.append("zoneout")
        if self.cell_clip is not None:
            names.append("cell_clip")
        return tuple(names)

    def draw(
        self,
        leading: tuple[int, ...],
        batch: int,
        features: int,
        hidden: int,
        device: torch.device,
        dtype: torch.dtype,
        training: bool,
    ) -> Modifiers:
        """Draw the masks of one recurrence.

        Args:
            leading: (T, B), or (N,) for packed rows.
            batch: B.
            features: P.
            hidden: H.
            device: of the gates.
            dtype: dtype of the gates.
            training: whether masks are random; else probabilities stand for them.
        """
        mask = None
        if training and self.recurrent_dropout:
            ones = torch.ones((batch, features), dtype=dtype, device=device)
            mask = torch.dropout(ones, self.recurrent_dropout, True)

        def zoneout(p: float, width: int) -> Tensor | None:
            if not p:
                return None
            shape = (*leading, width)
            if training:
                return torch.bernoulli(torch.empty(shape, dtype=dtype, device=device), p)
            row = torch.full((width,), p, dtype=state_dtype(dtype), device=device)
            return row.expand(shape)

        p_h, p_c = self.zoneout
        return Modifiers(
            recurrent_mask=mask,
            zoneout_h=zoneout(p_h, features),
            zoneout_c=zoneout(p_c, hidden),
            cell_clip=self.cell_clip,
        )


NO_REGULARIZATION = Regularization()


def check_probability(name: str, value: Any) -> float:
    """Return `value` if it is a probability below 1.

    Raises:
        ValueError: if it is not.
    """
    number = isinstance(value, numbers.Number) and not isinstance(value, (bool, complex))
    if not number or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return float(value)


def check_zoneout(value: Any) -> tuple[float, float]:
    """Return the probabilities of h and c, from a pair of them or one for both.

    Raises:
        ValueError: if one of them is not in [0, 1), or there are not two.
    """
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"zoneout: expected a number or a pair (p_h, p_c), got {value!r}")
        p_h, p_c = (check_probability("zoneout", p) for p in value)
        return p_h, p_c
    p = check_probability("zoneout", value)
    return p, p
