"""`fused_lstm.LSTM` and `fused_lstm.LSTMCell` behave as `torch.nn.LSTM` and `torch.nn.LSTMCell`."""
