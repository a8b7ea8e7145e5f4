"""FlashRNN's LSTM: one CUDA kernel for all steps, compiled for every size.

Letters of FlashRNN's layouts: T steps, B batch, G gates in the order i, f, z, o (its z is torch's
g), N heads (one here), D units of a head, P units of the step before, S states h and c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.peer import Peer, try_call
from fused_lstm.bench.cases import Case, Data
from fused_lstm.bench.providers import Call, Prepared, UnavailableError

# Its backends, the best first: one kernel, one Triton kernel (up to 64 units), a product and a
# pointwise kernel a step.
BACKENDS = ("cuda_fused", "triton_fused", "cuda")
_LARGEST_OF_TRITON = 64


class FlashRNN(Peer):
    """`flashrnn.flashrnn` and the input's product before it, which is left to its users."""

    title = "FlashRNN"
    packages = ("flashrnn",)
    device_type = "cuda"
    dtypes = ("bfloat16", "float16", "tf32")
    why_dtypes = "multiplies on tensor cores"
    lacks: ClassVar[Mapping[str, str]] = {
        "num_layers": "has one layer",
        "bidirectional": "has one direction",
        "proj_size": "has no projection",
        "packed": "takes sequences of one length",
        "cell": "has no cell",
    }

    def _build(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        package = self._import("flashrnn")
        # It has imported Triton itself.
        from triton.errors import TritonError

        # What its solver, the compilers, the loader and kernels raise.
        refusal = (RuntimeError, ValueError, AssertionError, ImportError, OSError, TritonError)
        refusals: list[str] = []
        for backend in BACKENDS:
            if backend == "triton_fused" and case.shape.H > _LARGEST_OF_TRITON:
                continue
            config = package.FlashRNNConfig(**config_arguments(case, backend))
            call = make_call(package.flashrnn, config, case, parameters, backend)
            try:
                try_call(call, case, device, mode)
            except torch.AcceleratorError:
                # The device itself failed, and would for whoever comes next.
                raise
            except refusal as error:
                message = (str(error).splitlines() or [""])[0]
                refusals.append(f"{backend}: {type(error).__name__}: {message}")
                continue
            return Prepared(call, f"{self._version()}, {backend}", "; ".join(refusals))
        raise UnavailableError(f"every backend of FlashRNN failed: {'; '.join(refusals)}")


def config_arguments(case: Case, backend: str) -> dict[str, Any]:
    """List the arguments of `flashrnn.FlashRNNConfig` for a case."""
    return {
        "backend": backend,
        "function": "lstm",
        "num_heads": 1,
        "head_dim": case.shape.H,
        "batch_size": case.shape.B,
        # Of float32, its kernels multiply in TF32.
        "dtype": "float32" if case.dtype_name == "tf32" else case.dtype_name,
        "input_shape": "TBGHD",
        "output_shape": "STBHD",
    }


def make_call(
    flashrnn: Callable[..., tuple[Tensor, Tensor]],
    config: Any,
    case: Case,
    parameters: dict[str, Tensor],
    backend: str,
) -> Call:
    """Make what runs a case.

    Args:
        flashrnn: takes Wx [T, B, G, N, D], R [G, N, D, P], b [G, N, D], states [S, 1, B, N, D] and
            config; returns all states [S, T, B, N, D] and the last ones [S, 1, B, N, D].
        config: what it is given.
        case: what is run.
        parameters: torch's.
        backend: the one whose layout the weights are kept in.
    """
    shape = case.shape
    W, R, b = (each.requires_grad_() for each in flashrnn_weights(parameters, backend))
    interleaved = keeps_gates_together(backend)

    def call(data: Data) -> tuple[Tensor, ...]:
        x, h_0, c_0 = data.inputs
        rows = F.linear(x.transpose(0, 1) if shape.batch_first else x, W)
        if interleaved:
            Wx = rows.unflatten(-1, (1, shape.H, 4)).permute(0, 1, 4, 2, 3)
        else:
            Wx = rows.unflatten(-1, (4, 1, shape.H))
        states = torch.stack((h_0, c_0)).unsqueeze(3)
        steps, last = flashrnn(Wx, R, b, states=states, config=config)
        output = steps[0].squeeze(2)
        if shape.batch_first:
            output = output.transpose(0, 1)
        results = (output, last[0].squeeze(2), last[1].squeeze(2))
        if not torch.is_grad_enabled():
            return results
        gradients = torch.autograd.grad(results, (*data.inputs, W, R, b), data.gradients)
        return (*results, *gradients[:3], *torch_gradients(gradients[3:], backend))

    return call


def keeps_gates_together(backend: str) -> bool:
    """Tell whether a backend keeps a unit's four gates side by side, [..., D, G]."""
    return backend == "cuda_fused"


def flashrnn_weights(parameters: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Arrange torch's parameters so that FlashRNN copies nothing of them or of the input's product.

    Returns:
        W [4·D, I], whose product with the input has the gates as the backend keeps them; R
        [G, N, D, P] and b [G, N, D], in memory as the backend keeps them. b is the sum of both
        biases, for FlashRNN has one, and always adds it.
    """
    weight_ih, weight_hh = (
        parameters[name].detach().unflatten(0, (4, -1)) for name in ("weight_ih_l0", "weight_hh_l0")
    )
    bias = (parameters["bias_ih_l0"] + parameters["bias_hh_l0"]).detach().unflatten(0, (4, -1))
    if keeps_gates_together(backend):
        W = weight_ih.transpose(0, 1).reshape(parameters["weight_ih_l0"].shape)
        # In memory [N, D, G, P] and [N, D, G].
        R = weight_hh.transpose(0, 1).contiguous().transpose(0, 1)
        b = bias.t().contiguous().t()
    else:
        W = parameters["weight_ih_l0"].detach().clone()
        # "cuda" keeps [N, P, G, D] and [N, G, D]; Triton's kernel is given copies in any case.
        R = weight_hh.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        b = bias.clone()
    return W, R.unsqueeze(1), b.unsqueeze(1)


def torch_gradients(gradients: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    """Arrange gradients of W, R and b as those of torch's four parameters."""
    W, R, b = gradients
    if keeps_gates_together(backend):
        W = W.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)
    R, b = R.squeeze(1).flatten(0, 1), b.flatten()
    return W, R, b, b
