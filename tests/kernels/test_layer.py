"""The kernels behind the layer: found by name, right in every dtype, never by another route."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm import check


def test_every_backend_passes_its_own_check(device, capsys) -> None:
    assert check.run(str(device))
    printed = capsys.readouterr().out
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"triton     {dtype:<9} ok" in printed


@pytest.mark.parametrize("batch_first", [False, True])
def test_training_goes_as_with_torch(device, batch_first: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 12, 2, batch_first=batch_first, device=device)
    ours = fused_lstm.LSTM(5, 12, 2, batch_first=batch_first, device=device, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for layer in (theirs, ours):
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        generator = torch.Generator().manual_seed(1)
        losses.append([])
        for _ in range(3):
            x = torch.randn(4, 6, 5, generator=generator).to(device)
            loss = (layer(x)[0].sum(-1) - x.sum(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if device.type == "cuda" else 1e-5)


def test_second_derivative_and_vmap(device) -> None:
    layer = fused_lstm.LSTM(3, 4, device=device, backend="triton")
    plain = fused_lstm.LSTM(3, 4, device=device, backend="reference")
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3, device=device)

    def penalty(module):
        y = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(y)[0].sum(), y, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(module.parameters())[:2])

    tolerance = {"rtol": 2e-2, "atol": 2e-3} if device.type == "cuda" else {}
    for a, b in zip(penalty(layer), penalty(plain), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    xs = torch.stack([x, -x, 2 * x])
    mapped = torch.vmap(lambda v: layer(v)[0])(xs)
    expected = torch.stack([plain(v)[0] for v in xs])
    torch.testing.assert_close(mapped, expected, **tolerance)


def test_compiled_with_the_kernels_inside(device) -> None:
    layer = fused_lstm.LSTM(3, 4, device=device, backend="triton")
    x = torch.randn(5, 2, 3, device=device)
    expected = layer(x)[0]
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(lambda v: layer(v)[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("hidden_size", [64, 300])
def test_captured_in_a_cuda_graph(hidden_size: int) -> None:
    layer = fused_lstm.LSTM(32, hidden_size, device="cuda", dtype=torch.bfloat16, backend="triton")
    x = torch.randn(20, 8, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)[0]
        x.normal_()
        graph.replay()
        assert torch.equal(captured, layer(x)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scope_size", [64, 300])
def test_repeats_bit_for_bit_and_runs_on_a_side_stream(scope_size: int) -> None:
    layer = fused_lstm.LSTM(
        32, scope_size, device="cuda", dtype=torch.bfloat16, backend="triton", bidirectional=True
    )
    x = torch.randn(50, 33, 32, device="cuda", dtype=torch.bfloat16)

    def once() -> list[torch.Tensor]:
        layer.zero_grad()
        y, _ = layer(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in layer.parameters())]

    first = once()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = once()
    torch.cuda.current_stream().wait_stream(side)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_steps_than_cudnn_takes() -> None:
    layer = fused_lstm.LSTM(2, 16, device="cuda", backend="triton")
    x = torch.randn(70_000, 1, 2, device="cuda")
    with torch.no_grad():
        y, (h_n, _) = layer(x)
    assert torch.isfinite(y).all()
    assert torch.equal(y[-1], h_n[0])
