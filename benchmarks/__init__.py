"""Timing of fused_lstm.LSTM beside torch.nn.LSTM: `python -m benchmarks.compare`."""
