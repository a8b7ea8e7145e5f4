"""`LayerNormLSTM`: an LSTM whose pre-activations and cell states are normalized."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import nn

from fused_lstm.functional import Normalization
from fused_lstm.layer import DirectionNorms
from fused_lstm.module import LSTM
from fused_lstm.regularization import Zoneout

__all__ = ["LayerNormLSTM"]


class LayerNormLSTM(LSTM):
    """An LSTM with layer normalization, and with all that `fused_lstm.LSTM` can do.

    Normalized over their features are x·W_ihᵀ and h_{t−1}·W_hhᵀ, each over all 4H, and the cell
    state where it enters the output's tanh (Ba, Kiros & Hinton 2016, "Layer normalization",
    arXiv:1607.06450, equations 20 to 22). For the equations see
    `fused_lstm.layer_norm_reference.layer_norm_forward`.

    Parameters are those of `torch.nn.LSTM` and, for each layer and direction, `gain_ih_l0` [4H],
    `gain_hh_l0` [4H] and `gain_c_l0` [H], ones at first, and `bias_c_l0` [H]. The biases of the
    first two normalizations are `bias_ih_l0` and `bias_hh_l0`; biases are zeros at first.

    Args:
        input_size: as for `fused_lstm.LSTM`, and so for what is not described.
        hidden_size: see there.
        num_layers: see there.
        bias: whether to learn the three biases.
        batch_first: see there.
        dropout: see there.
        bidirectional: see there.
        proj_size: see there.
        device: see there.
        dtype: see there.
        eps: added to the variances, above 0.
        recurrent_dropout: see there.
        weight_dropout: see there.
        zoneout: see there.
        forget_bias: see there; the sum of both biases.
        cell_clip: see there; of the state that is kept, which is not normalized.
        backend: "native", "triton" or "reference" to insist on one; None for the fastest that
            supports the problem.

    Raises:
        TypeError: as `fused_lstm.LSTM`.
        ValueError: as `fused_lstm.LSTM`, or if eps is not above 0.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        forget_bias: float | None = None,
        cell_clip: float | None = None,
        backend: str | None = None,
    ) -> None:
        number = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
        if not number or not 0 < eps < math.inf:
            raise ValueError(f"eps: expected a finite number above 0, got {eps!r}")
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            forget_bias=forget_bias,
            cell_clip=cell_clip,
            backend=backend,
        )
        self.eps = eps
        widths = {"gain_ih": 4 * hidden_size, "gain_hh": 4 * hidden_size, "gain_c": hidden_size}
        if bias:
            widths["bias_c"] = hidden_size
        for suffix in self._suffixes():
            for name, width in widths.items():
                parameter = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
                self.register_parameter(name + suffix, parameter)
        self._reset_norms()

    def _suffixes(self) -> list[str]:
        """What ends the names of parameters, for each layer and direction, such as "_l0"."""
        return [
            f"_l{layer}{direction}"
            for layer in range(self.num_layers)
            for direction in ("", "_reverse")[: 1 + self.bidirectional]
        ]

    def reset_parameters(self) -> None:
        """Weights as `torch.nn.LSTM`; gains are ones and biases zeros, but for `forget_bias`."""
        super().reset_parameters()
        # The constructor registers the gains afterwards.
        if "gain_ih_l0" in self._parameters:
            self._reset_norms()

    def _reset_norms(self) -> None:
        forget = slice(self.hidden_size, 2 * self.hidden_size)
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("gain"):
                    parameter.fill_(1)
                elif name.startswith("bias"):
                    parameter.zero_()
                    if name.startswith("bias_ih") and self.forget_bias is not None:
                        parameter[forget] = self.forget_bias

    def _normalization(self) -> Normalization:
        """What normalizes each layer and direction, for the functional form."""
        names = ("gain_ih", "gain_hh", "gain_c", "bias_c")
        return Normalization(
            [
                DirectionNorms(*(getattr(self, name + suffix, None) for name in names))  # type: ignore[arg-type]
                for suffix in self._suffixes()
            ],
            self.eps,
        )

    def to_torch(self) -> nn.LSTM:
        """Raise: `torch.nn.LSTM` has no normalization.

        Raises:
            ValueError: always.
        """
        raise ValueError("torch.nn.LSTM has no layer normalization")

    def __prepare_scriptable__(self) -> nn.LSTM:
        """Tell `torch.jit.script` that there is nothing of torch's to compile."""
        return self.to_torch()

    def extra_repr(self) -> str:
        """As `fused_lstm.LSTM`, and eps."""
        return f"{super().extra_repr()}, eps={self.eps}"
