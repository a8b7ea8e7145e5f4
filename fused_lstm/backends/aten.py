"""PyTorch's own fused layers (oneDNN on a CPU, cuDNN or MIOpen on a GPU) as a backend.

It serves whole stacks of layers where nothing of ours is faster, so that nobody is slower than with
`torch.nn.LSTM`. It cannot serve one recurrence: PyTorch's operator contains the projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from typing_extensions import override

from fused_lstm.backends.base import Backend, Problem, Support
from fused_lstm.devices import autocast_is_on

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
        missing = [name for name in problem.additions if name != "lengths"]
        if missing:
            return Support(False, f"PyTorch's operator has no {', '.join(missing)}")
        if problem.additions and (problem.transform or problem.device.type == "meta"):
            return Support(False, "it would pack the sequences, which takes the lengths' values")
        library = _LIBRARY.get(problem.device.type, "ATen")
        packing = ", the sequences packed by their lengths" if problem.additions else ""
        return Support(True, f"PyTorch's own fused layers ({library}){packing}")

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
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run a stack of layers; arguments and results as in `fused_lstm.functional.lstm`."""
        if lengths is not None:
            return self._packed(
                lengths,
                input,
                hx,
                weights,
                batch_first,
                bias=bias,
                num_layers=num_layers,
                dropout=dropout,
                training=training,
                bidirectional=bidirectional,
            )
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

    def _packed(
        self,
        lengths: Tensor,
        input: Tensor,
        hx: tuple[Tensor, Tensor],
        weights: list[Tensor],
        batch_first: bool,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pack padded sequences, run, and pad; on a GPU the lengths have to be waited for."""
        time, batch = (1, 0) if batch_first else (0, 1)
        steps = input.shape[time]
        # A packed sequence has at least one step: those without any keep their initial states.
        (present,) = (lengths > 0).nonzero(as_tuple=True)
        h_0, c_0 = hx
        if not steps:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if not len(present):
            features = (2 if options["bidirectional"] else 1) * h_0.shape[-1]
            kind = input.device.type
            dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else input.dtype
            # A sum of nothing: the zeros depend on the weights, for who asks for gradients.
            zero = weights[1].flatten()[:0].sum().to(dtype)
            output = zero.expand(*input.shape[:2], features).clone()
            return output, h_0.to(dtype, copy=True), c_0.to(dtype, copy=True)
        packed = pack_padded_sequence(
            input.index_select(batch, present),
            lengths[present].cpu(),
            batch_first=batch_first,
            enforce_sorted=False,
        )
        rows, batch_sizes, order, restore = packed
        assert order is not None
        assert restore is not None
        columns = present[order]
        states = h_0.index_select(1, columns), c_0.index_select(1, columns)
        out, h_n, c_n = self.layers(
            rows, states, weights, batch_sizes=batch_sizes, batch_first=False, **options
        )
        padded, _ = pad_packed_sequence(
            PackedSequence(out, batch_sizes, order, restore), batch_first, total_length=steps
        )
        shape = list(padded.shape)
        shape[batch] = input.shape[batch]
        output = padded.new_zeros(shape).index_copy(batch, present, padded)
        h_n, c_n = (
            state.to(last.dtype).index_copy(1, present, last.index_select(1, restore))
            for state, last in ((h_0, h_n), (c_0, c_n))
        )
        return output, h_n, c_n
