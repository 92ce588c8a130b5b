"""Runs the CUDA kernels of csrc/cuda on the CPU to test them without a GPU. See include/emulation.h."""
