"""The suite on a CUDA GPU: timing by events, what only a GPU shows, and ``make gpu-check``."""
