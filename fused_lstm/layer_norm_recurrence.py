"""The layer-normalized recurrence on the backends' kernels, with its gradients.

What looks at the computation (`torch.func`, forward mode, compilers, recordings) and derivatives of
a higher order see the plain PyTorch of layer_norm_reference.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fused_lstm import backends, ops
from fused_lstm.backends import LayerNormBackwardArguments, LayerNormForwardArguments
from fused_lstm.layer_norm_reference import LayerNorm, layer_norm_forward, normalize
from fused_lstm.modifiers import Modifiers, check_length_values, check_modifiers
from fused_lstm.recurrence import differentiable_gradients, product_operand, sum_of_outer_products
from fused_lstm.reference import LSTMOutput, new_cells
from fused_lstm.transforms import readable, recording_under_way, transform_under_way

__all__ = ["LayerNormRecurrenceFunction", "layer_norm_recurrence"]


def layer_norm_recurrence(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
    norm: LayerNorm,
    backend: str | None,
) -> LSTMOutput:
    """Run the layer-normalized recurrence; see `layer_norm_reference.layer_norm_forward`.

    Args:
        gates: [T, B, 4H] or [N, 4H].
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H] or None.
        batch_sizes: [T] int64 on the CPU for packed rows, else None.
        modifiers: see `fused_lstm.lstm_recurrence`.
        reverse: whether time runs backwards.
        norm: gains, bias and eps, in the dtype of gates.
        backend: a backend's name, or None for the default choice.
    """
    _check_norm(norm, gates)
    leading = tuple(gates.shape[:-1])
    check_modifiers(
        modifiers,
        leading,
        h0.shape[0],
        weight_hh.shape[1],
        c0.shape[1],
        gates.dtype,
        gates.device,
    )
    tensors = (gates, weight_hh, h0, c0, weight_hr, *norm[:3])
    transform = transform_under_way()
    recording = transform or recording_under_way(tensors)
    lengths = modifiers.lengths
    if recording and lengths is not None:
        # Its values are not to be had here: the operator is looked at when it runs.
        modifiers = modifiers._replace(lengths=ops.checked_lengths(lengths, gates.shape[0]))
    elif lengths is not None:
        check_length_values(lengths, gates.shape[0])
    plain = (gates, weight_hh, h0, c0, weight_hr, batch_sizes, modifiers, reverse, norm)
    if transform != "compile":
        backend = backends.requested_name(backend)
    if not recording:
        training = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        problem = _problem(plain, training)
        if backends.select_backend(problem, backend) != backends.ORDER[-1]:
            if training:
                out = LayerNormRecurrenceFunction.apply(  # type: ignore[no-untyped-call]
                    *tensors, norm.eps, batch_sizes, *modifiers, reverse, backend
                )
                return LSTMOutput(*out)
            arguments = LayerNormForwardArguments(*plain, save=False)
            result = ops.run_on_backend(
                "forward", problem, backend, lambda chosen: chosen.layer_norm_forward(arguments)
            )
            return LSTMOutput(result.h, result.c, result.h_n, result.c_n)
    with ops.autocast_off(gates.device.type):
        out = layer_norm_forward(*plain)
    return LSTMOutput(out.h, out.c, out.h_n, out.c_n)


def _check_norm(norm: LayerNorm, gates: Tensor) -> None:
    """Raise unless gains and bias fit the gates: kernels get pointers."""
    hidden = gates.shape[-1] // 4
    shapes = {"gain_hh": (4 * hidden,), "gain_c": (hidden,), "bias_c": (hidden,)}
    for (name, shape), tensor in zip(shapes.items(), norm[:3], strict=True):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise RuntimeError(
                f"Expected {name} to have size {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != gates.dtype or tensor.device != gates.device:
            raise RuntimeError(
                f"Expected {name} to have the dtype and device of the gates, {gates.dtype} on "
                f"{gates.device}, got {tensor.dtype} on {tensor.device}"
            )


def _problem(arguments: tuple[Any, ...], training: bool) -> backends.Problem:
    """Describe a normalized recurrence to the backends."""
    gates, weight_hh, h0, _, weight_hr, batch_sizes, modifiers, *_ = arguments
    problem = ops.recurrence_problem(
        gates, weight_hh, weight_hr, h0.shape[0], batch_sizes is not None, modifiers, training
    )
    return problem._replace(additions=("layer_norm", *problem.additions))


class LayerNormRecurrenceFunction(torch.autograd.Function):
    """The normalized recurrence with its hand-written gradient.

    From the kernels' δa, δp (of p = h_{t−1}·W_hhᵀ) and δz (of z = gain_c ⊙ LN(ĉ) + bias_c), over
    all rows: δW_hh = Σ δpᵀ·h_{t−1}, δgain_hh = Σ δa ⊙ LN(p), δgain_c = Σ δz ⊙ LN(ĉ),
    δbias_c = Σ δz, δW_hr = Σ δĥᵀ·(o ⊙ tanh(z)). A second derivative goes through plain PyTorch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        weight_hh: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_hr: Tensor | None,
        gain_hh: Tensor,
        gain_c: Tensor,
        bias_c: Tensor | None,
        eps: float,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        recurrent_mask: Tensor | None,
        zoneout_h: Tensor | None,
        zoneout_c: Tensor | None,
        cell_clip: float | None,
        reverse: bool,
        backend: str | None,
    ) -> tuple[Tensor, ...]:
        """Compute h, c, h_n and c_n."""
        modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip)
        norm = LayerNorm(gain_hh, gain_c, bias_c, eps)
        plain = (gates, weight_hh, h0, c0, weight_hr, batch_sizes, modifiers, reverse, norm)
        arguments = LayerNormForwardArguments(*plain, save=True)
        out = ops.run_on_backend(
            "forward",
            _problem(plain, True),
            backend,
            lambda chosen: chosen.layer_norm_forward(arguments),
        )
        ctx.constants = eps, cell_clip, reverse, backend
        inputs = (gates, weight_hh, h0, c0, weight_hr, gain_hh, gain_c, bias_c)
        saved = (out.h, out.c, out.activations, out.normalized, out.rstd)
        ctx.save_for_backward(*inputs, batch_sizes, *modifiers[:5], *saved)
        ctx.set_materialize_grads(False)
        return out.h, out.c, out.h_n, out.c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the recurrence in reverse; all else is one GEMM or sum after the loop."""
        rest = (None,) * 10
        if all(grad is None for grad in grads):
            return (None,) * 8 + rest
        saved = ctx.saved_tensors
        inputs, batch_sizes = saved[:8], saved[8]
        lengths, resets, recurrent_mask, zoneout_h, zoneout_c = saved[9:14]
        eps, cell_clip, reverse, backend = ctx.constants
        modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip)
        sequence = (batch_sizes, modifiers, reverse)
        with ops.autocast_off(inputs[0].device.type):
            if torch.is_grad_enabled() or not readable(grads):
                again = functools.partial(_plain_outputs, sequence, eps)
                needed = ctx.needs_input_grad[: len(inputs)]
                return (*differentiable_gradients(again, inputs, grads, needed), *rest)
            return (*_gradients(ctx, inputs, sequence, eps, saved[14:], grads, backend), *rest)


# batch_sizes, modifiers, reverse.
_Sequence = tuple[Tensor | None, Modifiers, bool]


def _gradients(
    ctx: Any,
    inputs: tuple[Any, ...],
    sequence: _Sequence,
    eps: float,
    saved: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
    backend: str | None,
) -> list[Tensor | None]:
    """Gradients of the tensors in `inputs`, by a backend."""
    gates, weight_hh, h0, c0, weight_hr, gain_hh, gain_c, bias_c = inputs
    h, c, activations, normalized, rstd = saved
    norm = LayerNorm(gain_hh, gain_c, bias_c, eps)
    ops.check_saved(activations, c, weight_hh, c0, weight_hr, sequence[1])
    _check_norm(norm, gates)
    grad_h, grad_c, grad_h_n, grad_c_n = grads
    arguments = LayerNormBackwardArguments(
        grad_h,
        grad_c,
        grad_h_n,
        grad_c_n,
        activations,
        c,
        normalized,
        rstd,
        weight_hh,
        c0,
        weight_hr,
        *sequence,
        norm,
    )
    out = ops.run_on_backend(
        "backward",
        _problem((gates, weight_hh, h0, c0, weight_hr, *sequence, norm), True),
        backend,
        lambda chosen: chosen.layer_norm_backward(arguments),
    )
    need = ctx.needs_input_grad
    result: list[Tensor | None] = [out.gates, None, out.h0, out.c0, None, None, None, None]
    if need[1]:
        result[1] = sum_of_outer_products(out.product, product_operand(h, h0, *sequence))
    if need[5]:
        result[5] = (out.gates.to(c.dtype) * normalized).flatten(0, -2).sum(0).to(gain_hh.dtype)
    if need[7]:
        result[7] = out.z.flatten(0, -2).sum(0).to(gain_c.dtype)
    if need[6] or need[4]:
        n = normalize(new_cells(activations, c, c0, *sequence), eps)[0]
        if need[6]:
            result[6] = (out.z * n).flatten(0, -2).sum(0).to(gain_c.dtype)
        if need[4] and out.h is not None:
            z = gain_c * n if bias_c is None else gain_c * n + bias_c
            cell_output = (activations.chunk(4, -1)[3] * z.tanh()).to(h.dtype)
            result[4] = sum_of_outer_products(out.h, cell_output)
    return result


def _plain_outputs(sequence: _Sequence, eps: float, *inputs: Any) -> tuple[Tensor, ...]:
    """Compute h, c, h_n and c_n in plain PyTorch."""
    gates, weight_hh, h0, c0, weight_hr, gain_hh, gain_c, bias_c = inputs
    norm = LayerNorm(gain_hh, gain_c, bias_c, eps)
    out = layer_norm_forward(gates, weight_hh, h0, c0, weight_hr, *sequence, norm)
    return out.h, out.c, out.h_n, out.c_n
