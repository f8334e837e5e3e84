"""Kernels for a CPU, compiled with numba: for any processor, with products in few bits where it has AVX-512 bf16."""
