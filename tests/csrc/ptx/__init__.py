"""Runs the PTX of the CUDA kernels on the CPU."""
