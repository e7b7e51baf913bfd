"""Kernels for GPUs: what launches them, and, in `kernels/`, themselves in Triton, imported when one is chosen."""
