"""`LSTM` and `LSTMCell`: `torch.nn.LSTM` and `torch.nn.LSTMCell` on fused kernels."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from fused_lstm import functional
from fused_lstm.backends import check_name
from fused_lstm.modifiers import check_clip
from fused_lstm.plain import plain_layers
from fused_lstm.regularization import (
    NO_REGULARIZATION,
    Regularization,
    Zoneout,
    check_probability,
    check_zoneout,
)
from fused_lstm.sequences import Lengths, as_lengths, as_packed_resets, as_resets
from fused_lstm.transforms import transform_under_way

__all__ = ["LSTM", "LSTMCell"]

HiddenState = tuple[Tensor, Tensor]

# The parameters of a cell, in torch's order.
_WEIGHTS_OF_A_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LSTM(nn.LSTM):
    """A drop-in `torch.nn.LSTM`: same parameters, `state_dict`, results, errors and random numbers.

    The equations are those of `fused_lstm.lstm_recurrence`, with gates = x·W_ihᵀ + b_ih + b_hh in
    each layer (Hochreiter & Schmidhuber 1997; Gers et al. 2000; Sak et al. 2014). What it does
    beyond torch's layer, here and in `forward`, is off by default. Random masks come from torch's
    generator of the device.

    Args:
        input_size: I, features of the input.
        hidden_size: H, hidden units.
        num_layers: L, stacked layers.
        bias: whether to learn b_ih and b_hh.
        batch_first: whether input and output are [B, T, ...] rather than [T, B, ...].
        dropout: probability of zeroing an output of every layer but the last, in training.
        bidirectional: whether a second recurrence runs backwards in time (D = 2, else 1).
        proj_size: P, size of a learned projection of h; 0 for none (P = H).
        device: device of the parameters.
        dtype: dtype of the parameters.
        recurrent_dropout: probability in [0, 1) of zeroing a unit of h_{t−1} where it enters W_hh,
            the others scaled by 1/(1−p), in training: one mask for each layer, direction and
            sequence, the same at every step (Gal & Ghahramani 2016, arXiv:1512.05287).
        weight_dropout: probability in [0, 1) of zeroing an element of W_hh, the others scaled by
            1/(1−p), in training: one mask for each layer and direction at every call (Merity,
            Keskar & Socher 2018, arXiv:1708.02182).
        zoneout: probability in [0, 1) that a unit of h and of c keeps its previous value at a
            step, or a pair (p_h, p_c); in evaluation the expectation, p·previous + (1−p)·new
            (Krueger et al. 2017, arXiv:1606.01305).
        forget_bias: initial value of b_ih for the forget gate, with 0 for b_hh there (Gers et al.
            2000; Jozefowicz et al. 2015); None leaves torch's uniform one.
        cell_clip: a new cell state is clamped to [−cell_clip, cell_clip] (Sak et al. 2014); None
            for no bound.
        backend: "native", "cuda", "triton", "aten" or "reference" to insist on one; None for the
            fastest that supports the problem (`fused_lstm.explain` tells which).

    Raises:
        TypeError: as `torch.nn.LSTM`; or if backend is neither None nor a string.
        ValueError: as `torch.nn.LSTM`; if a probability is not in [0, 1), cell_clip is not above
            0, forget_bias is given without bias or not finite, or no backend has that name.
    """

    # For modules pickled or built without them.
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: Zoneout = 0.0
    forget_bias: float | None = None
    cell_clip: float | None = None
    backend: str | None = None

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
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        forget_bias: float | None = None,
        cell_clip: float | None = None,
        backend: str | None = None,
    ) -> None:
        # Before torch's constructor, which initializes the parameters.
        self.__dict__["forget_bias"] = _check_forget_bias(forget_bias, bias)
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
        )
        self.recurrent_dropout = check_probability("recurrent_dropout", recurrent_dropout)
        self.weight_dropout = check_probability("weight_dropout", weight_dropout)
        self.zoneout = as_given(zoneout)
        self.cell_clip = check_clip(cell_clip)
        self.backend = check_name(backend)

    def reset_parameters(self) -> None:
        """As `torch.nn.LSTM`, and the biases of the forget gates as `forget_bias` says."""
        super().reset_parameters()
        if self.forget_bias is None:
            return
        forget = slice(self.hidden_size, 2 * self.hidden_size)
        with torch.no_grad():
            for name in self._flat_weights_names:
                if name.startswith("bias_ih"):
                    getattr(self, name)[forget] = self.forget_bias
                elif name.startswith("bias_hh"):
                    getattr(self, name)[forget] = 0

    def _regularization(self) -> Regularization:
        """What the options of this module are to the functional form."""
        if not (
            self.recurrent_dropout
            or self.weight_dropout
            or self.zoneout
            or self.cell_clip is not None
        ):
            return NO_REGULARIZATION
        # Checked again: they may have been set since.
        return Regularization(
            check_probability("recurrent_dropout", self.recurrent_dropout),
            check_probability("weight_dropout", self.weight_dropout),
            check_zoneout(self.zoneout),
            check_clip(self.cell_clip),
        )

    def _normalization(self) -> functional.Normalization | None:
        """What normalizes the layers: nothing here."""
        return None

    @property
    def _flat_weight_refs(self) -> list[Any]:
        """No weak references: torch's would forbid `torch.utils.swap_tensors`."""
        return []

    @_flat_weight_refs.setter
    def _flat_weight_refs(self, value: list[Any]) -> None:
        # Torch deletes the key when it pickles.
        self.__dict__["_flat_weight_refs"] = []

    def _weights_have_changed(self) -> bool:
        """Tell whether a weight is another object than at the last forward pass.

        As torch's own, down to the number of times a weight is read (`spectral_norm` iterates at
        each), but by comparison with the list of weights itself.
        """
        parameters = self._parameters
        for known, name in zip(self._flat_weights, self._flat_weights_names, strict=True):
            if known is not None and parameters.get(name) is known:
                continue  # the common case, at a tenth of the time
            weight = getattr(self, name) if hasattr(self, name) else None
            if weight is not None and known is not None and known is not weight:
                return True
        return False

    def _current_weights(self) -> list[Tensor]:
        """Return the weights as they are now, in torch's order: never a stale copy.

        Whatever replaces a weight (`functional_call`, a parametrization, pruning, assignment,
        `_parameters[...]`) is seen by the next forward pass.
        """
        if transform_under_way():
            # Torch's list would keep a transform's tensors beyond the transform.
            return [getattr(self, name) for name in self._flat_weights_names]
        self._update_flat_weights()
        return self._flat_weights  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, Any]) -> LSTM:
        """Copy the module; parametrized ones too, whose computed weights cannot be copied."""
        replica = self.__new__(type(self))
        memo[id(self)] = replica
        # A parametrized module refuses `__getstate__`: its class is no one else's.
        pickles = not parametrize.is_parametrized(self)
        state: dict[str, Any] = self.__dict__.copy()
        if pickles:
            state = self.__getstate__()  # type: ignore[no-untyped-call]
        state["_flat_weights"] = []
        state = copy.deepcopy(state, memo)
        if pickles:
            replica.__setstate__(state)  # type: ignore[no-untyped-call]
        else:
            replica.__dict__.update(state)
        replica._init_flat_weights()
        return replica

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: HiddenState | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | PackedSequence | None = None,
        return_cells: bool = False,
    ) -> Any:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I] ([B, T, I] with batch_first), [T, I] for one sequence, or a
                `PackedSequence`; in the dtype of the weights unless autocast is on.
            hx: (h_0 [L·D, B, P], c_0 [L·D, B, H]), without B for one sequence; zeros if None.
            lengths: [B] integers between 0 and T in any order, a tensor on any device or a list;
                one integer for one sequence. Steps past a sequence's length change nothing: output
                and cells are 0 there, h_n and c_n are those of its last step (of hx, for a length
                of 0), a second direction starts there, and what the input holds (NaN, too) reaches
                no result and no gradient. As packing, without it.
            resets: bool [T, B] ([B, T] with batch_first, [T] for one sequence); True where a new
                episode begins: the state entering that step is zero in every layer, and no gradient
                flows back from it. For a packed input likewise, in the order of the user's batch,
                or packed as the input is.
            return_cells: whether to return the cell states after every step as well.

        Returns:
            `(output, (h_n, c_n))`: output as input with D·P features, h_n and c_n as h_0 and c_0.
            With return_cells `(output, (h_n, c_n), cells)`: cells of the last layer, as output with
            D·H features.

        Raises:
            ValueError: if input has neither 2 nor 3 dimensions, or not the weights' dtype; for
                lengths that are negative, above T, as many as not B, or given with a packed input;
                for resets of another shape, or with two directions.
            TypeError: for lengths that are not integers, or resets that are not bools.
            RuntimeError: for sizes or devices that do not fit, with torch's text. Lengths out of
                range on a GPU fail an assertion of the device.
            BackendUnavailableError: if the named backend cannot run the problem.
        """
        if (
            type(input) is Tensor
            and lengths is resets is None
            and not return_cells
            and type(self) is LSTM
            and not self.proj_size
            and not (self.dropout and self.training and self.num_layers > 1)
            and self._regularization() is NO_REGULARIZATION
        ):
            # What most models look like.
            result = plain_layers(
                input,
                hx,
                self._current_weights(),
                self.backend,
                False,
                self.input_size,
                self.hidden_size,
                self.bias,
                self.num_layers,
                2 if self.bidirectional else 1,
                self.batch_first,
            )
            if result is not None:
                output, h_n, c_n = result
                return output, (h_n, c_n)
        if _is_fx_call(self, LSTM, input, hx, lengths, resets):
            options = {"lengths": lengths, "resets": resets, "return_cells": return_cells or None}
            return _as_fx_call(self, input, hx, **options)
        if resets is not None and self.bidirectional:
            raise ValueError(
                "resets: expected None with bidirectional=True, whose second direction runs "
                "backwards in time and would need to know where episodes end"
            )
        weights = self._current_weights()
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(
                    "lengths: expected None with a PackedSequence, which holds its own lengths, "
                    f"got {lengths}"
                )
            return self._forward_packed(input, hx, weights, resets, return_cells)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        if hx is None:
            hx = self._zero_state(x, x.size(batch_dim))
        elif hx[0].dim() != input.dim() or hx[1].dim() != input.dim():
            kind, dims = ("batched 3-D", "3-D") if batched else ("unbatched 2-D", "2-D")
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dims} but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        elif not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self.check_forward_args(x, hx, None)
        if lengths is not None:
            batch, steps = x.shape[batch_dim], x.shape[1 - batch_dim]
            lengths = as_lengths(lengths, batch, steps, batched, x)
        if resets is not None:
            leading = tuple(input.shape[:-1])
            resets = as_resets(resets, leading, self.batch_first, x)  # type: ignore[arg-type]
        output, h_n, c_n, *cells = self._layers(x, hx, weights, None, lengths, resets, return_cells)
        if not batched:
            output, h_n, c_n = output.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
            cells = [each.squeeze(batch_dim) for each in cells]
        return output, (h_n, c_n), *cells

    def _forward_packed(
        self,
        input: PackedSequence,
        hx: HiddenState | None,
        weights: list[Tensor],
        resets: Tensor | PackedSequence | None,
        return_cells: bool,
    ) -> Any:
        """Run the layers over packed rows; hx and the results are in the user's order."""
        rows, batch_sizes, sorted_indices, unsorted_indices = input
        if resets is not None:
            resets = as_packed_resets(resets, input, self.batch_first)
        if hx is None:
            hx = self._zero_state(rows, batch_sizes[0])
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        output, h_n, c_n, *cells = self._layers(
            rows, hx, weights, batch_sizes, None, resets, return_cells
        )

        def packed(rows: Tensor) -> PackedSequence:
            return PackedSequence(rows, batch_sizes, sorted_indices, unsorted_indices)

        states = self.permute_hidden((h_n, c_n), unsorted_indices)
        return packed(output), states, *map(packed, cells)

    def _layers(
        self,
        input: Tensor,
        hx: HiddenState,
        weights: list[Tensor],
        batch_sizes: Tensor | None,
        lengths: Any,
        resets: Any,
        return_cells: bool,
    ) -> tuple[Tensor, ...]:
        return functional.lstm(
            input,
            hx,
            weights,
            batch_sizes=batch_sizes,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            lengths=lengths,
            resets=resets,
            return_cells=return_cells,
            regularization=self._regularization(),
            normalization=self._normalization(),
            backend=self.backend,
        )

    def _zero_state(self, input: Tensor, batch: int | Tensor) -> HiddenState:
        """Zeros for h_0 and c_0, in the dtype and on the device of the input."""
        states = self.num_layers * (2 if self.bidirectional else 1)
        size, dtype, device = self.hidden_size, input.dtype, input.device
        c_0 = torch.zeros(states, batch, size, dtype=dtype, device=device)  # type: ignore[arg-type]
        if not self.proj_size:
            # Nothing writes into it: the two may be one.
            return c_0, c_0
        size = self.proj_size
        h_0 = torch.zeros(states, batch, size, dtype=dtype, device=device)  # type: ignore[arg-type]
        return h_0, c_0

    def extra_repr(self) -> str:
        """As `torch.nn.LSTM`, and the options that are its own where they are not the default."""
        text = super().extra_repr()
        for name in (*REGULARIZERS, "forget_bias", "backend"):
            value = getattr(self, name)
            if value != getattr(LSTM, name):
                text += f", {name}={value!r}"
        return text

    def to_torch(self) -> nn.LSTM:
        """Return an equal `torch.nn.LSTM` that shares this module's parameters.

        A weight that is computed (a parametrization's) is shared as it is now. For tools that
        look for the exact class (`quantize_dynamic`, `torch.jit.script`).

        Raises:
            ValueError: if `torch.nn.LSTM` cannot compute the same: with zoneout or cell_clip, and
                in training mode with recurrent_dropout or weight_dropout.
        """
        check_expressible(self)
        twin = nn.LSTM(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            bidirectional=self.bidirectional,
            proj_size=self.proj_size,
            device="meta",
        )
        # Set afterwards: the constructor warns of dropout in a single layer.
        twin.dropout = self.dropout
        _share_weights(self, twin, self._flat_weights_names)
        twin._init_flat_weights()
        return twin.train(self.training)

    def __prepare_scriptable__(self) -> nn.LSTM:
        """What `torch.jit.script` compiles, and leaves in the model, in this module's place."""
        check_expressible(self)
        return _scriptable(self, LSTM, self.to_torch)  # type: ignore[no-any-return]


class LSTMCell(nn.LSTMCell):
    """A drop-in `torch.nn.LSTMCell`: one step of an LSTM, same parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, hidden units.
        bias: whether to learn b_ih and b_hh.
        device: device of the parameters.
        dtype: dtype of the parameters.
        backend: as for `LSTM`.

    Raises:
        TypeError: if backend is neither None nor a string.
        ValueError: if no backend has that name.
    """

    backend: str | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype)
        self.backend = check_name(backend)

    def forward(self, input: Tensor, hx: HiddenState | None = None) -> HiddenState:
        """Compute one step.

        Args:
            input: [B, I], or [I] for one sequence.
            hx: (h [B, H], c [B, H]), without B for one sequence; zeros if None.

        Returns:
            h and c after the step, shaped as hx.

        Raises:
            ValueError: if input or a state has neither 1 nor 2 dimensions.
            RuntimeError: for sizes or devices that do not fit, with torch's text.
            BackendUnavailableError: if the named backend cannot run the problem.
        """
        parameters = self._parameters
        given: tuple[Any, ...] | None = None
        if type(input) is Tensor:
            try:
                # Written out: going through their names takes twice as long.
                given = (
                    parameters["weight_ih"],
                    parameters["weight_hh"],
                    parameters["bias_ih"],
                    parameters["bias_hh"],
                )
            except KeyError:
                # One is elsewhere: pruned, parametrized, a buffer.
                given = None
        if given is not None:
            # What a stream of single steps looks like.
            bias = not (given[2] is given[3] is None)
            given = given if bias else given[:2]
            result = plain_layers(
                input, hx, given, self.backend, True, self.input_size, self.hidden_size, bias
            )
            if result is not None:
                return result[1:]
        if _is_fx_call(self, LSTMCell, input, hx):
            return _as_fx_call(self, input, hx)  # type: ignore[no-any-return]
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for k, state in enumerate(() if hx is None else hx):
            if state.dim() not in (1, 2):
                raise ValueError(
                    f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead"
                )
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            zeros = torch.zeros(x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)
            hx = (zeros, zeros)
        elif not batched:
            hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        # Parameters without the detour through __getattr__, which reads whatever is not one.
        weights: list[Any] = [
            parameters[name] if name in parameters else getattr(self, name)
            for name in _WEIGHTS_OF_A_CELL
        ]
        h, c = functional.lstm_cell(x, hx, *weights, backend=self.backend)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def extra_repr(self) -> str:
        """As `torch.nn.LSTMCell`, and the backend if one was named."""
        text = super().extra_repr()
        return text if self.backend is None else f"{text}, backend={self.backend!r}"

    def to_torch(self) -> nn.LSTMCell:
        """Return an equal `torch.nn.LSTMCell` that shares this module's parameters."""
        twin = nn.LSTMCell(self.input_size, self.hidden_size, self.bias, device="meta")
        _share_weights(self, twin, _WEIGHTS_OF_A_CELL)
        return twin.train(self.training)

    def __prepare_scriptable__(self) -> nn.LSTMCell:
        """What `torch.jit.script` compiles, and leaves in the model, in this module's place."""
        return _scriptable(self, LSTMCell, self.to_torch)  # type: ignore[no-any-return]


# Options of a fused LSTM that change what it computes, and that can be given to a finished one.
REGULARIZERS = ("recurrent_dropout", "weight_dropout", "zoneout", "cell_clip")


def inexpressible(module: nn.LSTM) -> list[str]:
    """List the options that keep a `torch.nn.LSTM` from computing the same as `module` does now."""
    in_training = ("recurrent_dropout", "weight_dropout")
    return [
        f"{name}={value!r}"
        for name in REGULARIZERS
        if (value := getattr(module, name, None)) not in (None, 0, (0, 0))
        and (module.training or name not in in_training)
    ]


def check_expressible(module: nn.LSTM) -> None:
    """Raise unless a `torch.nn.LSTM` can compute what `module` does in its present mode.

    Raises:
        ValueError: naming the options in the way.
    """
    options = inexpressible(module)
    if options:
        mode = "training" if module.training else "evaluation"
        raise ValueError(f"torch.nn.LSTM has no {' and no '.join(options)} in {mode} mode")


def as_given(zoneout: Any) -> Zoneout:
    """Checked zoneout, a number if it was one: what a module keeps and shows."""
    pair = check_zoneout(zoneout)
    return pair if isinstance(zoneout, (tuple, list)) and any(pair) else pair[0]


def _check_forget_bias(value: Any, bias: bool) -> float | None:
    """Return `value` if it is None, or a finite number and there are biases."""
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"forget_bias: expected None or a finite number, got {value!r}")
    if not bias:
        raise ValueError(f"forget_bias: expected None with bias=False, got {value!r}")
    return float(value)


def _is_fx_call(module: nn.Module, cls: type[nn.Module], *arguments: Any) -> bool:
    """Tell whether `torch.fx` is tracing a model that contains `module`.

    Not where a subclass has a forward of its own: what that adds is to be traced (and, as with
    torch's layers, cannot be).
    """
    return _proxy(*arguments) is not None and type(module).forward is cls.forward


def _proxy(*arguments: Any) -> torch.fx.Proxy | None:
    """Return the first argument, or state in a pair of them, that `torch.fx` stands in for."""
    for argument in arguments:
        for value in argument if isinstance(argument, (tuple, list)) else (argument,):
            if isinstance(value, torch.fx.Proxy):
                return value
    return None


def _as_fx_call(module: nn.Module, input: Any, hx: Any, **options: Any) -> Any:
    """Stay one `call_module` node in `torch.fx`, whose tracer enters classes outside torch."""
    proxy = _proxy(input, hx, *options.values())
    assert proxy is not None
    tracer = proxy.tracer
    path = tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not path:
        raise torch.fx.proxy.TraceError(
            f"{type(module).__name__} is one node of a graph and has none of its own: trace the "
            "model that contains it"
        )
    arguments = (input,) if hx is None else (input, hx)
    given = {name: value for name, value in options.items() if value is not None}
    return tracer.create_proxy("call_module", path, arguments, given)


def _scriptable(module: nn.Module, cls: type[nn.Module], twin: Callable[[], Any]) -> Any:
    """Return what `torch.jit.script` is to compile: a torch layer, or else the module itself.

    The module itself, which the compiler refuses, is right where a torch layer would lose
    something: another forward, hooks, or weights that are computed.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks
    computed = parametrize.is_parametrized(module)
    if type(module).forward is not cls.forward or hooked or computed:
        return module
    return twin()


def _share_weights(source: nn.Module, target: nn.Module, names: Iterable[str]) -> None:
    """Give `target` the weights of `source`: parameters stay parameters, tensors stay tensors."""
    for name in names:
        weight = getattr(source, name)
        if weight is not None and not isinstance(weight, nn.Parameter):
            delattr(target, name)
        setattr(target, name, weight)
