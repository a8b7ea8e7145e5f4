"""The LSTM recurrence: the one differentiable core, and its hand-written gradients.

Everything around it (input projections, biases, dropout, layers, directions) is ordinary PyTorch,
but for whole layers on the native CPU kernels (layer.py).

Dimensions: `T` time steps, `B` batch, `H` hidden units, `P` features of h (H, or the size of the
projection), `N` rows of a packed batch (the sum of `batch_sizes`). Gate order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lstm import backends, ops, reference
from fused_lstm.devices import upload
from fused_lstm.modifiers import Modifiers, check_modifiers
from fused_lstm.reference import LSTMOutput, RecurrenceForward, check_batch_sizes
from fused_lstm.transforms import transform_under_way

__all__ = [
    "LSTMOutput",
    "LSTMRecurrenceFunction",
    "differentiable_gradients",
    "lstm_recurrence",
    "product_operand",
    "sum_of_outer_products",
    "weight_hh_gradient",
]


def lstm_recurrence(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    weight_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    cell_clip: float | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> LSTMOutput:
    """Run the LSTM recurrence over a whole sequence.

    For t = 0 … T−1 (T−1 … 0 if `reverse`), with σ the logistic function and ⊙ the elementwise
    product (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000; projection: Sak et al.
    2014):

        a_t = gates_t + h_{t−1}·W_hhᵀ
        i, f, o = σ(a_i), σ(a_f), σ(a_o);  g = tanh(a_g)
        ĉ_t = f ⊙ c_{t−1} + i ⊙ g
        ĥ_t = o ⊙ tanh(ĉ_t), or (o ⊙ tanh(ĉ_t))·W_hrᵀ
        c_t = ĉ_t,  h_t = ĥ_t

    What may change that, each None where it is not used:

    - `lengths`: steps t ≥ lengths[b] are not computed. They leave the state as it is, their h and
      c are 0, and what the gates hold there (NaN, too) reaches nothing. `reverse` starts at step
      lengths[b]−1.
    - `resets`: where True, h_{t−1} and c_{t−1} are 0, and no gradient goes back.
    - `recurrent_mask`: h_{t−1} ⊙ recurrent_mask enters the product with W_hh (Gal & Ghahramani
      2016).
    - `zoneout_h`, `zoneout_c`: h_t = z_h ⊙ h_{t−1} + (1 − z_h) ⊙ ĥ_t and
      c_t = z_c ⊙ c_{t−1} + (1 − z_c) ⊙ ĉ_t (Krueger et al. 2017).
    - `cell_clip`: ĉ_t is clamped to [−cell_clip, cell_clip].

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
        lengths: [B] int64 on the device of gates, 0 ≤ length ≤ T in any order; not with
            batch_sizes. A value out of range raises, on a GPU as a failed assertion of the device.
        resets: [T, B] or [N] bool, any strides.
        recurrent_mask: [B, P] in the dtype of gates; not differentiated, and so for the next two.
        zoneout_h: [T, B, P] or [N, P] between 0 and 1, in the dtype of gates, or float32 for
            16-bit ones, any strides: 1 and 0 where units keep their state or do not, or a
            probability.
        zoneout_c: [T, B, H] or [N, H], likewise.
        cell_clip: above 0.
        reverse: whether time runs backwards; outputs stay in the order of the input.
        backend: "native", "cuda", "triton" or "reference"; None for the default choice.

    Returns:
        LSTMOutput(h, c, h_n, c_n), see there for shapes and dtypes.

    Raises:
        TypeError: if a tensor's dtype is not as said above, or gates is not floating-point.
        ValueError: if a shape or value does not fit, T is 0, lengths come with batch_sizes, a mask
            requires a gradient, or the backend is unknown.
        BackendUnavailableError: if the named backend cannot run the problem.
    """
    backends.check_name(backend)
    modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip)
    return recurrence(
        gates,
        weight_hh,
        h0,
        c0,
        weight_hr,
        batch_sizes,
        modifiers,
        reverse,
        backend,
        save_cells=True,
    )


def recurrence(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
    backend: str | None,
    *,
    save_cells: bool,
) -> LSTMOutput:
    """`lstm_recurrence`, whose c may be empty unless `save_cells`."""
    _check(gates, weight_hh, h0, c0, weight_hr, batch_sizes, modifiers)
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
    arguments = (gates, weight_hh, h0, c0, weight_hr, batch_sizes, *modifiers, reverse)
    if differentiated and not (compiling or recorded):
        outputs = LSTMRecurrenceFunction.apply(*arguments, backend)  # type: ignore[no-untyped-call]
    else:
        # Compilers cannot record a Function; the operator has the same gradient registered.
        outputs = ops.lstm_forward(
            *arguments, differentiated, differentiated or save_cells, backend
        )
    h, c, _, h_n, c_n = outputs
    return LSTMOutput(h, c, h_n, c_n)


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of a function's inputs by computing it once more, with a graph if one is wanted.

    Args:
        function: takes `inputs`, in operations that can be differentiated.
        inputs: its arguments.
        grads: of its results, or None for zeros.
        needed: which inputs' gradients are wanted.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: a gradient is then of this use alone, even where one input was computed from
        # another.
        views = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        given = [
            (out, grad)
            for out, grad in zip(function(*views), grads, strict=True)
            if out is not None and grad is not None
        ]
        wanted = [k for k, need in enumerate(needed) if need]
        gradients = torch.autograd.grad(
            [out for out, _ in given],
            [view for k in wanted if (view := views[k]) is not None],
            [grad for _, grad in given],
            create_graph=create_graph,
            allow_unused=True,
        )
    result: list[Tensor | None] = [None] * len(views)
    for k, gradient in zip(wanted, gradients, strict=True):
        result[k] = gradient
    return result


def _check(
    gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
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
    if any(modifier is not None for modifier in modifiers):
        leading = tuple(gates.shape[:-1])
        check_modifiers(modifiers, leading, batch, features, hidden, gates.dtype, gates.device)


def sum_of_outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over all rows of left ᵀ·right: [..., X], [..., Y] to [X, Y], in one GEMM."""
    return left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])


def product_operand(
    h: Tensor,
    h0: Tensor,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
) -> Tensor:
    """What was multiplied with W_hh in every row: h_{t−1} [T, B, P] or [N, P], masked."""
    before = reference.states_before(h, h0, batch_sizes, modifiers, reverse)
    mask = modifiers.recurrent_mask
    if mask is None:
        return before
    if batch_sizes is not None:
        column = reference.packed_positions(batch_sizes, h.shape[0])[1]
        mask = mask.index_select(0, upload(column, mask.device))
    return before * mask


def weight_hh_gradient(
    grad_gates: Tensor,
    h: Tensor,
    h0: Tensor,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    reverse: bool,
) -> Tensor:
    """Σ_t δa_tᵀ·h_{t−1} [4H, P], h_{t−1} masked: what a product with W_hh leaves for W_hh."""
    plain = modifiers.lengths is modifiers.resets is modifiers.recurrent_mask is None
    if batch_sizes is not None or not plain:
        operand = product_operand(h, h0, batch_sizes, modifiers, reverse)
        return sum_of_outer_products(grad_gates, operand)
    first, later = (-1, slice(None, -1)) if reverse else (0, slice(1, None))
    before = h[1:] if reverse else h[:-1]
    return torch.addmm(sum_of_outer_products(grad_gates[later], before), grad_gates[first].t(), h0)


def _weight_gradients(
    ctx: Any,
    grad_gates: Tensor,
    whole_grad_h: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    modifiers: Modifiers,
    h: Tensor,
    c: Tensor,
    activations: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight_hh, Σ_t δa_tᵀ·h_{t−1}, and weight_hr, Σ_t δĥ_tᵀ·(o_t ⊙ tanh(ĉ_t))."""
    grad_weight_hh = grad_weight_hr = None
    if ctx.needs_input_grad[1]:
        grad_weight_hh = weight_hh_gradient(grad_gates, h, h0, batch_sizes, modifiers, ctx.reverse)
    if weight_hr is not None and ctx.needs_input_grad[4]:
        c = reference.new_cells(activations, c, c0, batch_sizes, modifiers, ctx.reverse)
        cell_output = (activations.chunk(4, -1)[3] * c.tanh()).to(h.dtype)
        grad_weight_hr = sum_of_outer_products(whole_grad_h, cell_output)
    return grad_weight_hh, grad_weight_hr


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the derivatives need; `inputs` are those of `LSTMRecurrenceFunction.forward`."""
    weights_to_masks = inputs[1:_CELL_CLIP]
    ctx.cell_clip, ctx.reverse = inputs[_CELL_CLIP : _CELL_CLIP + 2]
    ctx.backend = inputs[-1]
    ctx.save_for_backward(*weights_to_masks, *output[:3])


def _saved(ctx: Any) -> tuple[list[Any], Modifiers, tuple[Tensor, Tensor, Tensor]]:
    """What `_setup_context` saved: weight_hh … batch_sizes, modifiers; h, c and activations."""
    *inputs, lengths, resets, recurrent_mask, zoneout_h, zoneout_c, h, c, activations = (
        ctx.saved_tensors
    )
    modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, ctx.cell_clip)
    return inputs, modifiers, (h, c, activations)


def _backward(
    ctx: Any, gradient: Callable[..., tuple[Tensor, ...]], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of gates, weight_hh, h0, c0 and weight_hr.

    Args:
        ctx: what `_setup_context` filled.
        gradient: runs the recurrence in reverse: `ops.lstm_backward`, or its differentiable form.
        grads: the leading arguments of `gradient`, the incoming gradients.
    """
    (weight_hh, h0, c0, weight_hr, batch_sizes), modifiers, (h, c, activations) = _saved(ctx)
    with ops.autocast_off(activations.device.type):
        grad_gates, grad_h0, grad_c0, whole_grad_h = gradient(
            *grads,
            activations,
            c,
            weight_hh,
            c0,
            weight_hr,
            batch_sizes,
            *modifiers,
            ctx.reverse,
            ctx.backend,
        )
        grad_weight_hh, grad_weight_hr = _weight_gradients(
            ctx,
            grad_gates,
            whole_grad_h,
            h0,
            c0,
            weight_hr,
            batch_sizes,
            modifiers,
            h,
            c,
            activations,
        )
    return grad_gates, grad_weight_hh, grad_h0, grad_c0, grad_weight_hr


# Where cell_clip is among the arguments of the forward Function, behind all tensors.
_CELL_CLIP = 11


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
        lengths: Tensor | None,
        resets: Tensor | None,
        recurrent_mask: Tensor | None,
        zoneout_h: Tensor | None,
        zoneout_c: Tensor | None,
        cell_clip: float | None,
        reverse: bool,
        backend: str | None,
    ) -> tuple[Tensor, ...]:
        """Compute h, c, activations, h_n and c_n; see `reference.recurrence_forward`."""
        modifiers = (lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip)
        outputs: tuple[Tensor, ...] = ops.lstm_forward(
            gates,
            weight_hh,
            h0,
            c0,
            weight_hr,
            batch_sizes,
            *modifiers,
            reverse,
            True,
            True,
            backend,
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save tensors for `backward` and `jvp`."""
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:_CELL_CLIP], *output[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the recurrence in reverse for δgates; all else is one GEMM after the loop."""
        if all(grad is None for grad in grads):
            return (None,) * 14
        gradients = _backward(ctx, LSTMRecurrenceBackwardFunction.apply, grads)
        return (*gradients, *(None,) * 9)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        """Push tangents forward; see `reference.recurrence_jvp`."""
        inputs, modifiers, (h, c, activations) = _saved(ctx)
        # h_n and c_n enter no tangent: any tensor may stand for them.
        primals = RecurrenceForward(h, c, activations, h, c)
        with ops.autocast_off(h.device.type):
            weight_hh, h0, c0, weight_hr, batch_sizes = inputs
            return reference.recurrence_jvp(
                primals,
                weight_hh,
                h0,
                c0,
                weight_hr,
                batch_sizes,
                modifiers,
                ctx.reverse,
                *tangents[:5],
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
        lengths: Tensor | None,
        resets: Tensor | None,
        recurrent_mask: Tensor | None,
        zoneout_h: Tensor | None,
        zoneout_c: Tensor | None,
        cell_clip: float | None,
        reverse: bool,
        backend: str | None,
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of gates, h0 and c0, and δĥ of all rows (empty if not needed)."""
        modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, cell_clip)
        saved = (activations, c, weight_hh, c0, weight_hr, batch_sizes)
        if grad_activations is None:
            outputs: tuple[Tensor, ...] = ops.lstm_backward(
                grad_h, grad_c, grad_h_n, grad_c_n, *saved, *modifiers, reverse, backend
            )
            return outputs
        grad_gates, grad_h0, grad_c0, whole = reference.recurrence_backward(
            grad_h, grad_c, grad_activations, grad_h_n, grad_c_n, *saved, modifiers, reverse
        )
        return grad_gates, grad_h0, grad_c0, activations.new_empty(0) if whole is None else whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save every tensor argument."""
        *tensors, ctx.cell_clip, ctx.reverse, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.has_projection = inputs[9] is not None

    @staticmethod
    def _as_function_of_tensors(
        ctx: Any,
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[int], list[Tensor]]:
        """Return the gradient in plain PyTorch, which of its arguments are given, and these."""
        *tensors, batch_sizes, lengths, resets, recurrent_mask, zoneout_h, zoneout_c = (
            ctx.saved_tensors
        )
        modifiers = Modifiers(lengths, resets, recurrent_mask, zoneout_h, zoneout_c, ctx.cell_clip)
        given = [k for k, tensor in enumerate(tensors) if tensor is not None]

        def gradient(*arguments: Tensor) -> tuple[Tensor, ...]:
            every: list[Any] = [None] * len(tensors)
            for k, argument in zip(given, arguments, strict=True):
                every[k] = argument
            every += [batch_sizes, modifiers, ctx.reverse]
            results = reference.recurrence_backward(*every)
            return tuple(result for result in results if result is not None)

        return gradient, given, [tensors[k] for k in given]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the plain PyTorch form in reverse mode."""
        gradient, given, tensors = LSTMRecurrenceBackwardFunction._as_function_of_tensors(ctx)
        result: list[Tensor | None] = [None] * 19
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
        *(None,) * 11,
    )


torch.library.register_autograd(
    "fused_lstm::lstm_forward",
    _operator_backward,
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, output),
)
