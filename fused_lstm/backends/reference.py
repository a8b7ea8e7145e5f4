"""The plain PyTorch recurrence as a backend: every device, every floating dtype."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from fused_lstm import reference
from fused_lstm.backends.base import Backend, Problem, RecurrenceGradients, Support
from fused_lstm.reference import RecurrenceForward

__all__ = ["ReferenceBackend"]


class ReferenceBackend(Backend):
    """A Python loop over the time steps: slow, and always right."""

    name = "reference"

    @override
    def supports(self, problem: Problem) -> Support:
        if not problem.dtype.is_floating_point:
            return Support(False, f"{problem.dtype} is not a floating-point dtype")
        return Support(True, "plain PyTorch, one step at a time")

    @override
    def forward(
        self,
        gates: Tensor,
        weight_hh: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_hr: Tensor | None,
        batch_sizes: Tensor | None,
        reverse: bool,
        save_activations: bool,
        save_cells: bool,
    ) -> RecurrenceForward:
        out = reference.recurrence_forward(
            gates, weight_hh, h0, c0, weight_hr, batch_sizes, reverse
        )
        return out._replace(
            c=out.c if save_cells else out.c.new_empty(0),
            activations=out.activations if save_activations else out.activations.new_empty(0),
        )

    @override
    def backward(
        self,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        activations: Tensor,
        c: Tensor,
        weight_hh: Tensor,
        c0: Tensor,
        weight_hr: Tensor | None,
        batch_sizes: Tensor | None,
        reverse: bool,
    ) -> RecurrenceGradients:
        return RecurrenceGradients(
            *reference.recurrence_backward(
                grad_h,
                grad_c,
                None,
                grad_h_n,
                grad_c_n,
                activations,
                c,
                weight_hh,
                c0,
                weight_hr,
                batch_sizes,
                reverse,
            )
        )
