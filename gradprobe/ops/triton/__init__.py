"""The operators as Triton kernels: device code and its launcher."""
