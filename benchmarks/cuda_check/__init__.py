"""CUDA kernels compiled for GPUs that are not here, and what the compiler says of them."""
