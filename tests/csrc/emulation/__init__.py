"""Runs the CUDA kernels of csrc/cuda on the CPU, to test them without a GPU; see include/emulation.h."""
