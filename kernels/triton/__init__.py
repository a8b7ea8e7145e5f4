"""Portable GPU kernels of the LSTM recurrence, in Triton.

The kernels run on NVIDIA and AMD GPUs, and on a CPU in Triton's interpreter
(TRITON_INTERPRET=1, set before the first import).
"""

from .config import LaunchConfig, ShippedConfig, select_launch_config, shipped_configs
from .launch import lstm_backward, lstm_forward
from .layer_norm import layer_norm_backward, layer_norm_forward

__all__ = [
    "LaunchConfig",
    "ShippedConfig",
    "layer_norm_backward",
    "layer_norm_forward",
    "lstm_backward",
    "lstm_forward",
    "select_launch_config",
    "shipped_configs",
]
