"""`LSTM` and `LSTMCell`: `torch.nn.LSTM` and `torch.nn.LSTMCell` on fused kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from fused_lstm import functional
from fused_lstm.backends import check_name
from fused_lstm.recurrence import transform_under_way

__all__ = ["LSTM", "LSTMCell"]

HiddenState = tuple[Tensor, Tensor]


class LSTM(nn.LSTM):
    """A drop-in `torch.nn.LSTM`: same parameters, `state_dict`, results, errors and random numbers.

    The equations are those of `fused_lstm.lstm_recurrence`, with gates = x·W_ihᵀ + b_ih + b_hh in
    each layer (Hochreiter & Schmidhuber 1997; Gers et al. 2000; Sak et al. 2014).

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
        backend: "triton", "aten" or "reference" to insist on one; None for the fastest that
            supports the problem (`fused_lstm.explain` tells which).

    Raises:
        TypeError: as `torch.nn.LSTM`; or if backend is neither None nor a string.
        ValueError: as `torch.nn.LSTM`; or if no backend has that name.
    """

    # For modules pickled or built without it.
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
        backend: str | None = None,
    ) -> None:
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
        self.backend = check_name(backend)

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

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: HiddenState | None = None
    ) -> tuple[Tensor | PackedSequence, HiddenState]:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I] ([B, T, I] with batch_first), [T, I] for one sequence, or a
                `PackedSequence`; in the dtype of the weights unless autocast is on.
            hx: (h_0 [L·D, B, P], c_0 [L·D, B, H]), without B for one sequence; zeros if None.

        Returns:
            `(output, (h_n, c_n))`: output as input with D·P features, h_n and c_n as h_0 and c_0.

        Raises:
            ValueError: if input has neither 2 nor 3 dimensions, or not the weights' dtype.
            RuntimeError: for sizes or devices that do not fit, with torch's text.
            BackendUnavailableError: if the named backend cannot run the problem.
        """
        if _is_fx_call(self, LSTM, input, hx):
            return _as_fx_call(self, input, hx)  # type: ignore[no-any-return]
        weights = self._current_weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, weights)
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
        output, h_n, c_n = self._layers(x, hx, weights, None)
        if not batched:
            return output.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))
        return output, (h_n, c_n)

    def _forward_packed(
        self, input: PackedSequence, hx: HiddenState | None, weights: list[Tensor]
    ) -> tuple[PackedSequence, HiddenState]:
        """Run the layers over packed rows; hx and the results are in the user's order."""
        rows, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            hx = self._zero_state(rows, batch_sizes[0])
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        output, h_n, c_n = self._layers(rows, hx, weights, batch_sizes)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden((h_n, c_n), unsorted_indices)

    def _layers(
        self, input: Tensor, hx: HiddenState, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        """As `torch.nn.LSTM`, and the backend if one was named."""
        text = super().extra_repr()
        return text if self.backend is None else f"{text}, backend={self.backend!r}"

    def to_torch(self) -> nn.LSTM:
        """Return an equal `torch.nn.LSTM` that shares this module's parameters.

        A weight that is computed (a parametrization's) is shared as it is now. For tools that
        look for the exact class (`quantize_dynamic`, `torch.jit.script`).
        """
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
        if type(input) is Tensor and type(hx) is tuple and len(hx) == 2 and input.dim() == 2:
            # What a stream of single steps looks like.
            parameters = self._parameters
            if self.backend is None and len(parameters) == 4:
                result = functional.quick_cell(input, hx, *parameters.values())  # type: ignore[arg-type]
                if result is not None:
                    return result
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
        parameters = self._parameters
        weights: list[Any] = [
            parameters[name] if name in parameters else getattr(self, name)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
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
        _share_weights(self, twin, ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
        return twin.train(self.training)

    def __prepare_scriptable__(self) -> nn.LSTMCell:
        """What `torch.jit.script` compiles, and leaves in the model, in this module's place."""
        return _scriptable(self, LSTMCell, self.to_torch)  # type: ignore[no-any-return]


def _is_fx_call(module: nn.Module, cls: type[nn.Module], input: Any, hx: Any) -> bool:
    """Tell whether `torch.fx` is tracing a model that contains `module`.

    Not where a subclass has a forward of its own: what that adds is to be traced (and, as with
    torch's layers, cannot be).
    """
    return _proxy(input, hx) is not None and type(module).forward is cls.forward


def _proxy(input: Any, hx: Any) -> torch.fx.Proxy | None:
    """Return the first argument that `torch.fx` stands in for."""
    if isinstance(input, torch.fx.Proxy):
        return input
    if hx is None:
        return None
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    return next((state for state in states if isinstance(state, torch.fx.Proxy)), None)


def _as_fx_call(module: nn.Module, input: Any, hx: Any) -> Any:
    """Stay one `call_module` node in `torch.fx`, whose tracer enters classes outside torch."""
    proxy = _proxy(input, hx)
    assert proxy is not None
    tracer = proxy.tracer
    path = tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not path:
        raise torch.fx.proxy.TraceError(
            f"{type(module).__name__} is one node of a graph and has none of its own: trace the "
            "model that contains it"
        )
    arguments = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", path, arguments, {})


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


def _share_weights(source: nn.Module, target: nn.Module, names: list[str]) -> None:
    """Give `target` the weights of `source`: parameters stay parameters, tensors stay tensors."""
    for name in names:
        weight = getattr(source, name)
        if weight is not None and not isinstance(weight, nn.Parameter):
            delattr(target, name)
        setattr(target, name, weight)
