"""CPU kernels of the LSTM, in C++: one shared library, built at installation.

`lstm.h` is the interface, `forward.h` and `backward.h` hold the equations.
"""

from .launch import cell_forward, layer_backward, layer_forward, lstm_backward, lstm_forward
from .library import Library, LibraryUnavailableError, load

__all__ = [
    "Library",
    "LibraryUnavailableError",
    "cell_forward",
    "layer_backward",
    "layer_forward",
    "load",
    "lstm_backward",
    "lstm_forward",
]
