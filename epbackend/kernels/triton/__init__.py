"""The kernels' contract in Triton, for CUDA GPUs from Ampere on. Nothing here is imported on a machine without Triton.

`kernels.py` puts them together. Kernels: `permute.py` (sort and sum), `grouped_matmul.py`, for many rows on Hopper
`specialized_matmul.py`, and `expert_mlp.py` (the experts), `quantize.py` (rows in 8 bits), `even_split.py`,
`level_split.py` and its `level_shares.py` (replicas), `symmetric.py` and `padded.py` (rows between GPUs). Around them:
`tiles.py` (chips, and how a product is cut), `tuning.py` (`epbackend tune`), `launch.py` (launches by name),
`compile_info.py` (registers and spills without a GPU).

Shapes, besides those of `epbackend.kernels`: M rows, N columns and K depth of a block that is multiplied; B also
blocks of choices; H = L * N rows of all slots' matrices; R ranks; X replicated experts, J unreplicated experts of a
rank; C in `symmetric.py` and `padded.py` rows of a receive buffer. Sizes that are constexpr (LANES, ALL, XS, ...) are
powers of two that hold what their comment says.
"""
