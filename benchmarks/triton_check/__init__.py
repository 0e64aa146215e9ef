"""Triton kernels compiled for GPUs that are not here, and what the binaries say of themselves."""
