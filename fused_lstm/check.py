"""Compare every backend that can run here with `torch.nn.LSTM`, in a few seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fused_lstm.backends import ORDER
from fused_lstm.errors import BackendUnavailableError
from fused_lstm.explanation import explain
from fused_lstm.module import LSTM

__all__ = ["run"]

# T, B, I, H: hidden units on both sides of a tile's edge.
_SIZES = (7, 5, 6, 33)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(device: str | None = None) -> bool:
    """Print, for each backend and dtype, the largest error relative to what is allowed.

    Outputs, states and every gradient of a two-layer bidirectional LSTM, padded and packed, are
    compared with a float64 `torch.nn.LSTM`; allowed is twice the error of `torch.nn.LSTM` in the
    dtype itself, and one rounding.

    Args:
        device: a torch device; by default CUDA if there is any, else the CPU.

    Returns:
        Whether all that could run was right.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    right = True
    for backend, dtype in itertools.product(ORDER, _DTYPES):
        title = f"{backend:<10} {str(dtype)[6:]:<9}"
        layer = LSTM(*_SIZES[2:], device=device, dtype=dtype, backend=backend)
        try:
            ratio = max(_ratios(backend, dtype, device))
        except BackendUnavailableError:
            print(f"{title} --    {explain(layer).reasons[backend]}")
            continue
        # Written so that NaN is wrong.
        passed = ratio <= 1
        right &= passed
        print(f"{title} {'ok' if passed else 'WRONG'}    error / allowed = {ratio:.2f}")
    return right


def _ratios(backend: str, dtype: torch.dtype, device: str) -> Iterator[float]:
    """Yield error over allowed error for every result."""
    steps, batch, features, hidden = _SIZES
    for packed in (False, True):
        torch.manual_seed(0)
        ours = LSTM(features, hidden, 2, bidirectional=True, device=device, backend=backend)
        theirs = nn.LSTM(features, hidden, 2, bidirectional=True, device=device)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(steps, batch, features, device=device)
        # All three start from values that the dtype holds exactly.
        results = [
            _results(layer.to(dtype).to(wide), x.to(dtype).to(wide), packed)
            for layer, wide in ((ours, dtype), (theirs, dtype), (theirs, torch.float64))
        ]
        for actual, native, exact in zip(*results, strict=True):
            allowed = 2 * (native.double() - exact).abs().max()
            # One rounding of the result, and what float64 itself is worth.
            eps = max(torch.finfo(dtype).eps, 64 * torch.finfo(torch.float64).eps)
            allowed += eps * exact.abs().max()
            yield float((actual.double() - exact).abs().max() / allowed)


def _results(layer: nn.LSTM, x: Tensor, packed: bool) -> list[Tensor]:
    """Outputs, states and gradients of one call; independent of the layer afterwards."""
    lengths = torch.linspace(x.shape[0], 1, x.shape[1]).long()
    x = x.clone().requires_grad_()
    layer.zero_grad()
    output, states = layer(pack_padded_sequence(x, lengths) if packed else x)
    rows = output.data if isinstance(output, PackedSequence) else output
    # A loss whose gradient is neither constant nor random.
    torch.stack([t.square().sum() for t in (rows, *states)]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in (x, *layer.parameters()) if p.grad is not None]
    return [t.detach().clone() for t in (rows, *states, *gradients)]
