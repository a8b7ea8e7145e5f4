"""The plain PyTorch recurrence as a backend: every device, every floating dtype."""

from __future__ import annotations

from typing_extensions import override

from fused_lstm import layer_norm_reference, reference
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
from fused_lstm.layer_norm_reference import LayerNormForward, LayerNormGradients
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
    def forward(self, arguments: ForwardArguments) -> RecurrenceForward:
        inputs = arguments._asdict()
        save_activations, save_cells = inputs.pop("save_activations"), inputs.pop("save_cells")
        out = reference.recurrence_forward(**inputs)
        return out._replace(
            c=out.c if save_cells else out.c.new_empty(0),
            activations=out.activations if save_activations else out.activations.new_empty(0),
        )

    @override
    def backward(self, arguments: BackwardArguments) -> RecurrenceGradients:
        return RecurrenceGradients(
            *reference.recurrence_backward(**arguments._asdict(), grad_activations=None)
        )

    @override
    def layer_norm_forward(self, arguments: LayerNormForwardArguments) -> LayerNormForward:
        inputs = arguments._asdict()
        del inputs["save"]
        return layer_norm_reference.layer_norm_forward(**inputs)

    @override
    def layer_norm_backward(self, arguments: LayerNormBackwardArguments) -> LayerNormGradients:
        return layer_norm_reference.layer_norm_backward(*arguments)
