"""PyTorch's own fused layers (oneDNN on a CPU, cuDNN or MIOpen on a GPU) as a backend.

It serves whole stacks of layers where nothing of ours is faster, so that nobody is slower than with
`torch.nn.LSTM`. It cannot serve one recurrence: PyTorch's operator contains the projections.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from fused_lstm.backends.base import Backend, Problem, Support

__all__ = ["UNTRACEABLE", "AtenBackend"]

# cuDNN's recurrent layers take at most this many time steps.
_CUDNN_MAX_STEPS = 65_535

# Why compiled programs never contain it.
UNTRACEABLE = "torch.compile cannot trace PyTorch's operator as one that can be trained"

_LIBRARY = {"cpu": "oneDNN or ATen", "cuda": "MIOpen" if torch.version.hip else "cuDNN"}


class AtenBackend(Backend):
    """`torch.lstm`, exactly as `torch.nn.LSTM` calls it."""

    name = "aten"

    @override
    def supports(self, problem: Problem) -> Support:
        if not problem.whole_layers:
            return Support(False, "PyTorch's operator computes whole layers, not one recurrence")
        if (
            problem.device.type == "cpu"
            and problem.dtype == torch.float16
            and problem.autocast
            and problem.training
            and not (problem.packed or problem.proj_size)
        ):
            return Support(False, "oneDNN cannot train in float16 under autocast")
        if problem.transform == "vmap":
            return Support(
                False, "PyTorch's operator has no batching rule for torch.func transforms"
            )
        if problem.transform == "jvp":
            return Support(False, "PyTorch's operator has no forward-mode derivative")
        if problem.device.type == "cuda" and problem.steps > _CUDNN_MAX_STEPS:
            return Support(
                False, f"{problem.steps} time steps are more than cuDNN's {_CUDNN_MAX_STEPS}"
            )
        library = _LIBRARY.get(problem.device.type, "ATen")
        return Support(True, f"PyTorch's own fused layers ({library})")

    def layers(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor],
        weights: list[Tensor],
        *,
        batch_sizes: Tensor | None,
        bias: bool,
        num_layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run a stack of layers; arguments and results as in `fused_lstm.functional.lstm`."""
        if input.is_cuda and not training and torch.is_grad_enabled():
            # cuDNN differentiates only what ran in training mode; without dropout the two modes
            # compute the same.
            dropout, training = 0.0, True
        if batch_sizes is None:
            return torch._VF.lstm(
                input,
                hx,
                weights,
                bias,
                num_layers,
                dropout,
                training,
                bidirectional,
                batch_first,
            )
        return torch._VF.lstm(
            input, batch_sizes, hx, weights, bias, num_layers, dropout, training, bidirectional
        )
