"""What a backend is: it says whether it can run a problem, and why not, and runs it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_lstm.devices import DeviceDescription
from fused_lstm.layer_norm_reference import LayerNorm, LayerNormForward, LayerNormGradients
from fused_lstm.modifiers import Modifiers
from fused_lstm.reference import RecurrenceForward

__all__ = [
    "Backend",
    "BackwardArguments",
    "ForwardArguments",
    "LayerNormBackwardArguments",
    "LayerNormForwardArguments",
    "Problem",
    "RecurrenceGradients",
    "Support",
]


class Problem(NamedTuple):
    """Everything the choice of a backend may depend on; hashable, so that choices are cached.

    Attributes:
        device: where it runs.
        dtype: dtype of the gates (under autocast, the autocast dtype).
        steps: T, time steps.
        batch: B.
        hidden_size: H.
        proj_size: P, or 0 without a projection.
        packed: whether the rows are packed (`batch_sizes`).
        training: whether a gradient may be asked for (grad mode).
        autocast: whether autocast chose the dtype.
        whole_layers: True for a stack of layers with its input projections, False for one
            recurrence.
        transform: what is under way: "vmap" (any `torch.func` transform), "jvp" (forward-mode AD),
            "trace" (`torch.jit.trace`), "modes" (dispatch modes and tensor subclasses), or "".
        cell: whether it is one step of an `LSTMCell`.
        additions: what is asked for beyond `torch.nn.LSTM`: names of arguments of
            `fused_lstm.LSTM` for whole layers, of `Modifiers` for one recurrence, and "layer_norm".
        precision: of float32 products on a GPU, "tf32" or "ieee", as `torch.backends` has it now;
            "" where there is no choice.
    """

    device: DeviceDescription
    dtype: torch.dtype
    steps: int
    batch: int
    hidden_size: int
    proj_size: int = 0
    packed: bool = False
    training: bool = False
    autocast: bool = False
    whole_layers: bool = False
    transform: str = ""
    cell: bool = False
    additions: tuple[str, ...] = ()
    precision: str = ""


class Support(NamedTuple):
    """A backend's answer for one problem.

    Attributes:
        ok: whether it can run the problem.
        reason: why it cannot, or how it would run it.
        default: whether it may be chosen without being named: a kernel that has not passed its
            tests on a device's architecture can be named there, but is not chosen.
    """

    ok: bool
    reason: str
    default: bool = True


class ForwardArguments(NamedTuple):
    """One recurrence to compute.

    Attributes:
        gates: [T, B, 4H] or packed rows [N, 4H], any strides.
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H], or None for P = H.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: see `fused_lstm.lstm_recurrence`.
        reverse: whether time runs from T-1 to 0.
        save_activations: whether the activated gates are wanted.
        save_cells: whether the cell states are wanted.
    """

    gates: Tensor
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor
    weight_hr: Tensor | None
    batch_sizes: Tensor | None
    modifiers: Modifiers
    reverse: bool
    save_activations: bool
    save_cells: bool


class BackwardArguments(NamedTuple):
    """One recurrence to differentiate.

    Attributes:
        grad_h: like h, any strides, or None for zeros; so for the other gradients.
        grad_c: like c.
        grad_h_n: [B, P].
        grad_c_n: [B, H].
        activations: what the forward pass saved.
        c: likewise.
        weight_hh: as in the forward pass, and so for what follows.
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] or None.
        modifiers: as in the forward pass.
        reverse: whether time ran from T-1 to 0.
    """

    grad_h: Tensor | None
    grad_c: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    activations: Tensor
    c: Tensor
    weight_hh: Tensor
    c0: Tensor
    weight_hr: Tensor | None
    batch_sizes: Tensor | None
    modifiers: Modifiers
    reverse: bool


class RecurrenceGradients(NamedTuple):
    """Gradients of one recurrence.

    Attributes:
        gates: like gates.
        h0: [B, P].
        c0: [B, H].
        h: δĥ of all rows, like h, where there is a projection; else None.
    """

    gates: Tensor
    h0: Tensor
    c0: Tensor
    h: Tensor | None


class LayerNormForwardArguments(NamedTuple):
    """One layer-normalized recurrence to compute; see `ForwardArguments`.

    Attributes:
        norm: gains, bias and eps, in the dtype of the gates.
        save: whether activations, normalized and rstd are wanted; c always is.
    """

    gates: Tensor
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor
    weight_hr: Tensor | None
    batch_sizes: Tensor | None
    modifiers: Modifiers
    reverse: bool
    norm: LayerNorm
    save: bool


class LayerNormBackwardArguments(NamedTuple):
    """One layer-normalized recurrence to differentiate; see `BackwardArguments`.

    Attributes:
        normalized: what the forward pass saved, as activations and c.
        rstd: likewise.
        norm: as in the forward pass.
    """

    grad_h: Tensor | None
    grad_c: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    activations: Tensor
    c: Tensor
    normalized: Tensor
    rstd: Tensor
    weight_hh: Tensor
    c0: Tensor
    weight_hr: Tensor | None
    batch_sizes: Tensor | None
    modifiers: Modifiers
    reverse: bool
    norm: LayerNorm


class Backend:
    """One way to compute the recurrence. Subclasses are stateless; `name` is what users write."""

    name: ClassVar[str]

    def supports(self, problem: Problem) -> Support:
        """Say whether this backend can run `problem`, and why or how."""
        raise NotImplementedError

    def forward(self, arguments: ForwardArguments) -> RecurrenceForward:
        """Compute the recurrence; what is not to be saved comes back as an empty tensor."""
        raise NotImplementedError

    def backward(self, arguments: BackwardArguments) -> RecurrenceGradients:
        """Compute the recurrence's gradients; see `reference.recurrence_backward`."""
        raise NotImplementedError

    def layer_norm_forward(self, arguments: LayerNormForwardArguments) -> LayerNormForward:
        """Compute a layer-normalized recurrence, where "layer_norm" is supported."""
        raise NotImplementedError

    def layer_norm_backward(self, arguments: LayerNormBackwardArguments) -> LayerNormGradients:
        """Compute its gradients; see `layer_norm_reference.layer_norm_backward`."""
        raise NotImplementedError
