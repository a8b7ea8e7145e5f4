"""Timing of fused_lstm.LSTM beside torch.nn.LSTM: `pytest benchmarks`."""
