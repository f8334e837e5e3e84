"""Kernels for a CPU: compiled with numba where the processor has AVX-512."""
