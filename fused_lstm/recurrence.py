"""The LSTM recurrence: the one differentiable core, and its hand-written gradients.

Everything around it (input projections, biases, dropout, layers, directions) is ordinary PyTorch,
but for whole layers on the native CPU kernels (layer.py).

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch (the sum of `batch_sizes`). Gate order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_lstm import backends, ops, reference
from fused_lstm.reference import LSTMOutput, RecurrenceForward, check_batch_sizes

__all__ = [
    "LSTMOutput",
    "LSTMRecurrenceFunction",
    "lstm_recurrence",
    "transform_under_way",
]


def lstm_recurrence(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    weight_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> LSTMOutput:
    """Run the LSTM recurrence over a whole sequence.

    For t = 0 … T−1 (T−1 … 0 if `reverse`), with σ the logistic function and ⊙ the elementwise
    product (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000; projection: Sak et al.
    2014):

        a_t = gates_t + h_{t−1}·W_hhᵀ
        i, f, o = σ(a_i), σ(a_f), σ(a_o);  g = tanh(a_g)
        c_t = f ⊙ c_{t−1} + i ⊙ g
        h_t = o ⊙ tanh(c_t), or (o ⊙ tanh(c_t))·W_hrᵀ

    Sums and the cell state are kept in float32 (float64 for float64 gates); h is rounded once, when
    it is stored. Differentiable any number of times in reverse and forward mode, and under `vmap`.

    Args:
        gates: [T, B, 4H] floating, x·W_ihᵀ + b_ih + b_hh for the whole sequence, any strides; or
            [N, 4H] rows of a packed batch, in the order of `PackedSequence.data`.
        weight_hh: [4H, P] in the dtype of gates, recurrent weights.
        h0: [B, P] in the dtype of gates, initial hidden state.
        c0: [B, H] in the dtype of gates, initial cell state.
        weight_hr: [P, H] in the dtype of gates, projection; None for P = H.
        batch_sizes: [T] int64 on the CPU, rows active at each step, as in `PackedSequence`; None
            for [T, B, 4H] gates.
        reverse: whether time runs backwards; outputs stay in the order of the input.
        backend: "native", "triton" or "reference"; None for the default choice.

    Returns:
        LSTMOutput(h, c, h_n, c_n), see there for shapes and dtypes.

    Raises:
        TypeError: if a tensor's dtype is not that of gates, or gates is not floating-point.
        ValueError: if a shape does not fit, T is 0, or the backend is unknown.
        BackendUnavailableError: if the named backend cannot run the problem.
    """
    backends.check_name(backend)
    return recurrence(
        gates, weight_hh, h0, c0, weight_hr, batch_sizes, reverse, backend, save_cells=True
    )


def recurrence(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    backend: str | None,
    *,
    save_cells: bool,
) -> LSTMOutput:
    """`lstm_recurrence`, whose c may be empty unless `save_cells`."""
    _check(gates, weight_hh, h0, c0, weight_hr, batch_sizes)
    transform = transform_under_way()
    # A recorded program may be differentiated later, whatever holds while it is recorded.
    compiling = transform == "compile"
    recorded = torch.compiler.is_exporting() if compiling else torch._C._is_tracing()
    if not compiling:
        # Once, for forward and backward; a compiled program asks when it runs.
        backend = backends.requested_name(backend)
    differentiated = (
        recorded
        or transform in ("vmap", "jvp")
        or (
            torch.is_grad_enabled()
            and any(
                t is not None and t.requires_grad for t in (gates, weight_hh, h0, c0, weight_hr)
            )
        )
    )
    arguments = (gates, weight_hh, h0, c0, weight_hr, batch_sizes, reverse)
    if differentiated and not (compiling or recorded):
        outputs = LSTMRecurrenceFunction.apply(*arguments, backend)  # type: ignore[no-untyped-call]
    else:
        # Compilers cannot record a Function; the operator has the same gradient registered.
        outputs = ops.lstm_forward(
            *arguments, differentiated, differentiated or save_cells, backend
        )
    h, c, _, h_n, c_n = outputs
    return LSTMOutput(h, c, h_n, c_n)


def transform_under_way() -> str:
    """Name what is looking at the computation: "compile", "vmap", "jvp", or "" for nothing."""
    if torch.compiler.is_compiling():
        return "compile"
    if torch._C._are_functorch_transforms_active():
        return "vmap"
    if forward_ad._current_level >= 0:
        return "jvp"
    return ""


def _check(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
) -> None:
    """Raise what `lstm_recurrence` says it raises."""
    dims = 3 if batch_sizes is None else 2
    if gates.dim() != dims or gates.shape[-1] % 4 or gates.shape[-1] == 0:
        expected = "[T, B, 4H]" if batch_sizes is None else "[N, 4H] with batch_sizes"
        raise ValueError(f"gates: expected {expected}, got {list(gates.shape)}")
    if gates.shape[0] == 0:
        raise ValueError("gates: expected at least one time step, got 0")
    if not gates.is_floating_point():
        raise TypeError(f"gates: expected a floating-point dtype, got {gates.dtype}")
    if batch_sizes is None:
        batch = gates.shape[1]
    else:
        check_batch_sizes(batch_sizes, gates.shape[0], "gates")
        batch = h0.shape[0] if torch.compiler.is_compiling() else int(batch_sizes[0])
    hidden = gates.shape[-1] // 4
    features = hidden if weight_hr is None else weight_hr.shape[0]
    expected_shapes = {
        "weight_hh": (weight_hh, (4 * hidden, features)),
        "h0": (h0, (batch, features)),
        "c0": (c0, (batch, hidden)),
        "weight_hr": (weight_hr, (features, hidden)),
    }
    for name, (tensor, shape) in expected_shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != gates.dtype:
            raise TypeError(f"{name}: expected {gates.dtype} like gates, got {tensor.dtype}")
        if tensor.device != gates.device:
            raise ValueError(f"{name}: expected device {gates.device}, got {tensor.device}")


def _packed_hidden_before(h: Tensor, h0: Tensor, counts: Tensor, reverse: bool) -> Tensor:
    """Gather h_{t−1} for every packed row: [N, P] from h [N, P], h0 [B, P], batch_sizes [T].

    Row (t, b) follows row (t', b) of the step computed before, or h0[b] where t' has no row b.
    """
    starts = counts.cumsum(0) - counts
    total, batch = h.shape[0], h0.shape[0]
    step = torch.repeat_interleave(torch.arange(counts.shape[0]), counts, output_size=total)
    column = torch.arange(total) - starts[step]
    before = step + 1 if reverse else step - 1
    exists = (before >= 0) & (before < counts.shape[0])
    before = before.clamp(0, counts.shape[0] - 1)
    source = torch.where(
        exists & (column < counts[before]), batch + starts[before] + column, column
    )
    return torch.cat([h0, h]).index_select(0, source.to(h.device, non_blocking=True))


def _sum_of_outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over all rows of left ᵀ·right: [..., X], [..., Y] to [X, Y], in one GEMM."""
    return left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])


def _weight_gradients(
    ctx: Any,
    grad_gates: Tensor,
    whole_grad_h: Tensor,
    h0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    h: Tensor,
    c: Tensor,
    activations: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight_hh, Σ_t δa_tᵀ·h_{t−1}, and weight_hr, Σ_t δh_tᵀ·(o_t ⊙ tanh(c_t))."""
    grad_weight_hh = grad_weight_hr = None
    if ctx.needs_input_grad[1]:
        if batch_sizes is None:
            first, later = (-1, slice(None, -1)) if ctx.reverse else (0, slice(1, None))
            before = h[1:] if ctx.reverse else h[:-1]
            grad_weight_hh = torch.addmm(
                _sum_of_outer_products(grad_gates[later], before), grad_gates[first].t(), h0
            )
        else:
            before = _packed_hidden_before(h, h0, batch_sizes, ctx.reverse)
            grad_weight_hh = _sum_of_outer_products(grad_gates, before)
    if weight_hr is not None and ctx.needs_input_grad[4]:
        output_gate = activations.chunk(4, -1)[3]
        cell_output = (output_gate * c.tanh()).to(h.dtype)
        grad_weight_hr = _sum_of_outer_products(whole_grad_h, cell_output)
    return grad_weight_hh, grad_weight_hr


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the derivatives need; `inputs` are those of `LSTMRecurrenceFunction.forward`."""
    _, weight_hh, h0, c0, weight_hr, batch_sizes, ctx.reverse = inputs[:7]
    ctx.backend = inputs[-1]
    h, c, activations, _, _ = output
    saved = (weight_hh, h0, c0, weight_hr, batch_sizes, h, c, activations)
    ctx.save_for_backward(*saved)


def _backward(
    ctx: Any, gradient: Callable[..., tuple[Tensor, ...]], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of gates, weight_hh, h0, c0 and weight_hr.

    Args:
        ctx: what `_setup_context` filled.
        gradient: runs the recurrence in reverse: `ops.lstm_backward`, or its differentiable form.
        grads: the leading arguments of `gradient`, the incoming gradients.
    """
    weight_hh, h0, c0, weight_hr, batch_sizes, h, c, activations = ctx.saved_tensors
    with ops.autocast_off(activations.device.type):
        grad_gates, grad_h0, grad_c0, whole_grad_h = gradient(
            *grads,
            activations,
            c,
            weight_hh,
            c0,
            weight_hr,
            batch_sizes,
            ctx.reverse,
            ctx.backend,
        )
        grad_weight_hh, grad_weight_hr = _weight_gradients(
            ctx, grad_gates, whole_grad_h, h0, weight_hr, batch_sizes, h, c, activations
        )
    return grad_gates, grad_weight_hh, grad_h0, grad_c0, grad_weight_hr


class LSTMRecurrenceFunction(torch.autograd.Function):
    """The recurrence with its hand-written derivatives.

    Saved for the backward pass: the activated gates and c, next to the weights, the initial states
    and h, which exist anyway. The activated gates are an output of the Function, so that a second
    derivative flows through what was saved.
    """

    # vmap maps over forward, backward and jvp, whose operators have batching rules (ops.py).
    generate_vmap_rule = True

    @staticmethod
    def forward(
        gates: Tensor,
        weight_hh: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_hr: Tensor | None,
        batch_sizes: Tensor | None,
        reverse: bool,
        backend: str | None,
    ) -> tuple[Tensor, ...]:
        """Compute h, c, activations, h_n and c_n; see `reference.recurrence_forward`."""
        outputs: tuple[Tensor, ...] = ops.lstm_forward(
            gates, weight_hh, h0, c0, weight_hr, batch_sizes, reverse, True, True, backend
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save tensors for `backward` and `jvp`."""
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:6], *output[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the recurrence in reverse for δgates; all else is one GEMM after the loop."""
        if all(grad is None for grad in grads):
            return (None,) * 8
        return (*_backward(ctx, LSTMRecurrenceBackwardFunction.apply, grads), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        """Push tangents forward; see `reference.recurrence_jvp`."""
        weight_hh, h0, c0, weight_hr, batch_sizes, h, c, activations = ctx.saved_tensors
        # h_n and c_n enter no tangent: any tensor may stand for them.
        primals = RecurrenceForward(h, c, activations, h, c)
        with ops.autocast_off(h.device.type):
            return reference.recurrence_jvp(
                primals, weight_hh, h0, c0, weight_hr, batch_sizes, ctx.reverse, *tangents[:5]
            )


class LSTMRecurrenceBackwardFunction(torch.autograd.Function):
    """The recurrence's gradient as a function that can be differentiated in its turn.

    The first derivative runs on the kernels; its own derivatives recompute it in plain PyTorch.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        grad_activations: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        activations: Tensor,
        c: Tensor,
        weight_hh: Tensor,
        c0: Tensor,
        weight_hr: Tensor | None,
        batch_sizes: Tensor | None,
        reverse: bool,
        backend: str | None,
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of gates, h0 and c0, and the whole δh (empty if not needed)."""
        saved = (activations, c, weight_hh, c0, weight_hr, batch_sizes, reverse)
        if grad_activations is None:
            outputs: tuple[Tensor, ...] = ops.lstm_backward(
                grad_h, grad_c, grad_h_n, grad_c_n, *saved, backend
            )
            return outputs
        grad_gates, grad_h0, grad_c0, whole = reference.recurrence_backward(
            grad_h, grad_c, grad_activations, grad_h_n, grad_c_n, *saved
        )
        return grad_gates, grad_h0, grad_c0, activations.new_empty(0) if whole is None else whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save every tensor argument."""
        *tensors, ctx.reverse, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.has_projection = inputs[9] is not None

    @staticmethod
    def _as_function_of_tensors(
        ctx: Any,
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[int], list[Tensor]]:
        """Return the gradient in plain PyTorch, which of its arguments are given, and these."""
        tensors = list(ctx.saved_tensors)
        batch_sizes = tensors.pop()
        given = [k for k, tensor in enumerate(tensors) if tensor is not None]

        def gradient(*arguments: Tensor) -> tuple[Tensor, ...]:
            every: list[Any] = [None] * len(tensors)
            for k, argument in zip(given, arguments, strict=True):
                every[k] = argument
            every += [batch_sizes, ctx.reverse]
            results = reference.recurrence_backward(*every)
            return tuple(result for result in results if result is not None)

        return gradient, given, [tensors[k] for k in given]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the plain PyTorch form in reverse mode."""
        gradient, given, tensors = LSTMRecurrenceBackwardFunction._as_function_of_tensors(ctx)
        result: list[Tensor | None] = [None] * 13
        with ops.autocast_off(tensors[0].device.type):
            vjp = torch.func.vjp(gradient, *tensors)[1]
            wanted = grads if ctx.has_projection else grads[:3]
            for k, grad in zip(given, vjp(tuple(wanted)), strict=True):
                result[k] = grad
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        """Push tangents through the plain PyTorch form."""
        gradient, given, tensors = LSTMRecurrenceBackwardFunction._as_function_of_tensors(ctx)
        moved = tuple(
            torch.zeros_like(tensor) if tangents[k] is None else tangents[k]
            for k, tensor in zip(given, tensors, strict=True)
        )
        with ops.autocast_off(tensors[0].device.type):
            # The transpose of the transpose: forward-mode levels do not nest outside torch.func.
            outputs, vjp = torch.func.vjp(gradient, *tensors)[:2]
            transposed = torch.func.vjp(vjp, tuple(map(torch.zeros_like, outputs)))[1]
            (result,) = transposed(moved)
        return result if ctx.has_projection else (*result, tensors[0].new_empty(0))


def _operator_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of the operator `fused_lstm::lstm_forward`, for compiled programs."""
    grad_h, grad_c, _, grad_h_n, grad_c_n = grads
    return (
        *_backward(ctx, ops.lstm_backward, (grad_h, grad_c, grad_h_n, grad_c_n)),
        None,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "fused_lstm::lstm_forward",
    _operator_backward,
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, output),
)
