"""A drop-in `torch.nn.LSTM` whose fused kernels compute all four gates and the cell update at once.

>>> import fused_lstm
>>> lstm = fused_lstm.LSTM(input_size=32, hidden_size=64)
>>> output, (h_n, c_n) = lstm(input)
>>> print(fused_lstm.explain(lstm, input))

Importing needs PyTorch alone; kernels load when they are first used.
"""

from fused_lstm.backends import use_backend
from fused_lstm.convert import replace_lstm, restore_lstm
from fused_lstm.errors import BackendUnavailableError, KernelFallbackWarning
from fused_lstm.explanation import Explanation, explain
from fused_lstm.layer_norm import LayerNormLSTM
from fused_lstm.module import LSTM, LSTMCell
from fused_lstm.recurrence import LSTMOutput, lstm_recurrence

__version__ = "0.1.0.dev0"

__all__ = [
    "LSTM",
    "BackendUnavailableError",
    "Explanation",
    "KernelFallbackWarning",
    "LSTMCell",
    "LSTMOutput",
    "LayerNormLSTM",
    "explain",
    "lstm_recurrence",
    "replace_lstm",
    "restore_lstm",
    "use_backend",
]
