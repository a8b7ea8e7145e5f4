"""The kernels, on a GPU or in Triton's interpreter, and as the compiler sees them."""
