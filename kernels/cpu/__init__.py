"""CPU kernels of the LSTM, in C++: one shared library, built at installation.

To read in this order: `lstm.h`, the interface; `forward.h`, `backward.h` and `layer_norm.h`, the
equations and who computes what; `layout.h`, `multiply.h` and `simd.h`, the parts they are made of;
`run.h` and `team.h`, memory and threads; `plain.h`, what spares plain layers their structures;
`lstm.cpp`, one of each per instruction set. `launch.py`, `plain.py` and `layer_norm.py` call them.
"""

from .launch import (
    layer_backward,
    layer_forward,
    lstm_backward,
    lstm_forward,
    multiplies_bfloat16,
)
from .layer_norm import layer_norm_backward, layer_norm_forward
from .library import Library, LibraryUnavailableError, load
from .plain import PlainLayers

__all__ = [
    "Library",
    "LibraryUnavailableError",
    "PlainLayers",
    "layer_backward",
    "layer_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "load",
    "lstm_backward",
    "lstm_forward",
    "multiplies_bfloat16",
]
