"""The CUDA kernels: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1), and compiled where there is neither."""
