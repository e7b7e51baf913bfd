"""Triton's kernels. Nothing here may be imported before it is launched: Triton is optional."""
