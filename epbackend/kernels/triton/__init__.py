"""The kernels' contract in Triton, for CUDA GPUs from Ampere on.

One file a kernel. `kernels.py` puts them together; `tiles.py` chooses how a product is cut; `resources.py` reads off
the compiled kernels what they take of a chip. Nothing here is imported on a machine without Triton.
"""
