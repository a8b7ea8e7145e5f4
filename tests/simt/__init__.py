"""The SIMT emulator: runs the CUDA kernels on a CPU, with its own tests. See docs/emulator.md."""
