"""Device code, installed as `fused_lstm.kernels`: one package per language it is written in."""
