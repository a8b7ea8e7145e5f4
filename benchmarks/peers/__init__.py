"""LSTMs of other packages, for a comparison with torch's and ours.

Each runs at its best settings, and is imported only when a case is prepared with it.
"""

from __future__ import annotations

from benchmarks.peers.flash_rnn import FlashRNN
from benchmarks.peers.onnx_runtime import ONNXRuntime
from benchmarks.peers.peer import installed_version
from benchmarks.peers.torch_rl import TorchRL
from fused_lstm.bench.providers import Provider

__all__ = ["PEERS", "versions"]

# They compute in other orders, with other tanhs, and some keep the cell state in 16 bits: a result
# that is a few roundings off is still one to compare with.
_ERROR_FACTOR = 8.0

# Each is named after its distribution.
PEERS: tuple[Provider, ...] = (
    ONNXRuntime("onnxruntime", error_factor=_ERROR_FACTOR, graphs=False),
    # It launches on streams of its own, and its second choice synchronizes the device: nothing
    # that a graph can capture.
    FlashRNN("flashrnn", error_factor=_ERROR_FACTOR, graphs=False),
    TorchRL("torchrl", error_factor=_ERROR_FACTOR),
)


def versions() -> dict[str, str]:
    """Map the names of the installed peers to their versions, without importing them."""
    found = {peer.name: installed_version(peer.name) for peer in PEERS}
    return {name: version for name, version in found.items() if version is not None}
