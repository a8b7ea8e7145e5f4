"""TorchRL's LSTM in Triton, which `torchrl.modules.LSTMModule(recurrent_backend="triton")` runs.

Its function is called for each layer as the module calls it, without the module's TensorDicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.peers.peer import Peer, try_call
from fused_lstm.bench.cases import Case, Data
from fused_lstm.bench.providers import Call, Prepared, UnavailableError

_KERNELS = "torchrl.modules.tensordict_module._rnn_triton"


class TorchRL(Peer):
    """`lstm_triton`, with no sequence that begins amid the batch."""

    title = "TorchRL's Triton LSTM"
    packages = ("torchrl",)
    device_type = "cuda"
    dtypes = ("float32", "tf32")
    why_dtypes = "keeps its tensors in float32"
    lacks: ClassVar[Mapping[str, str]] = {
        "bidirectional": "has one direction",
        "proj_size": "has no projection",
        "packed": "takes sequences of one length",
        "cell": "has no cell",
    }

    def _build(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        kernels = self._import(_KERNELS)
        if not hasattr(kernels, "lstm_triton"):
            raise UnavailableError(
                f"{self._version()} has no lstm_triton in {_KERNELS}: expected 0.14"
            )
        # Imported here: there are systems without it.
        from triton.errors import TritonError

        call = make_call(kernels.lstm_triton, case, parameters, device)
        try:
            try_call(call, case, device, mode)
        except TritonError as error:
            raise UnavailableError(
                f"H = {case.shape.H}: {self.title} does not compile or fit: {error}"
            ) from error
        precision = precision_of(case)
        return Prepared(call, f"{self._version()}, lstm_triton", f"input_precision={precision!r}")


def precision_of(case: Case) -> str:
    """Name the arithmetic of a case's products as `lstm_triton` does."""
    return "tf32" if case.dtype_name == "tf32" else "ieee"


def make_call(
    lstm_triton: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    case: Case,
    parameters: dict[str, Tensor],
    device: torch.device,
) -> Call:
    """Make what runs a case.

    Args:
        lstm_triton: takes x [B, T, I], h and c [B, T, H] (of which, of a sequence that begins at
            step 0, only that step counts), torch's parameters of a layer, is_init [B, T] (which
            sequences begin anew at a step) and input_precision; returns h and c of all steps
            [B, T, H] and those of the last one [B, H].
        case: what is run.
        parameters: torch's.
        device: where.
    """
    s = case.shape
    is_init = torch.zeros(s.B, s.T, dtype=torch.bool, device=device)
    # A layer's starting states lie in what its users have anyway, a state for every step. These
    # are leaves, and written to between calls.
    h_starts, c_starts = (
        [
            torch.zeros(s.B, s.T, s.H, dtype=case.dtype, device=device, requires_grad=True)
            for _ in range(s.num_layers)
        ]
        for _ in ("h", "c")
    )
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    leaves = {name: each.detach().clone().requires_grad_() for name, each in parameters.items()}
    layers = [[leaves[f"{name}_l{layer}"] for name in names] for layer in range(s.num_layers)]
    precision = precision_of(case)

    def call(data: Data) -> tuple[Tensor, ...]:
        x, h_0, c_0 = data.inputs
        with torch.no_grad():
            for starts, given in ((h_starts, h_0), (c_starts, c_0)):
                for start, state in zip(starts, given, strict=True):
                    start[:, 0].copy_(state)
        # Copied once, as the module does it, and not once again in the backward pass.
        output = (x if s.batch_first else x.transpose(0, 1)).contiguous()
        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        with switches_agree():
            for weights, h_start, c_start in zip(layers, h_starts, c_starts, strict=True):
                output, _, h, c = lstm_triton(
                    output, h_start, c_start, *weights, is_init, input_precision=precision
                )
                h_n.append(h)
                c_n.append(c)
            results = (
                output if s.batch_first else output.transpose(0, 1),
                _stack(h_n),
                _stack(c_n),
            )
            if not torch.is_grad_enabled():
                return results
            variables = (x, *h_starts, *c_starts, *leaves.values())
            gradients = torch.autograd.grad(results, variables, data.gradients)
        L = s.num_layers
        states = (gradients[1 : 1 + L], gradients[1 + L : 1 + 2 * L])
        h_gradient, c_gradient = (_stack([each[:, 0] for each in of]) for of in states)
        return (*results, gradients[0], h_gradient, c_gradient, *gradients[1 + 2 * L :])

    return call


def _stack(layers: list[Tensor]) -> Tensor:
    # One layer's is a view.
    return torch.stack(layers) if len(layers) > 1 else layers[0].unsqueeze(0)


@contextlib.contextmanager
def switches_agree() -> Iterator[None]:
    """Have torch's older switch of TF32 products say what its newer one says.

    TorchRL reads and sets the older one, and reading it is an error where they differ.
    """
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    tf32 = precision == "tf32"
    try:
        agree = matmul.allow_tf32 == tf32
    except RuntimeError:
        agree = False
    if agree:
        yield
        return
    # This sets both.
    matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = not tf32
        matmul.fp32_precision = precision
