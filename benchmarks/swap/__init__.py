"""Blocks of published models before and after ``moe_kernels.apply``."""
