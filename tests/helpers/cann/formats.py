"""FRACTAL_NZ, the layout that the matrix unit reads: a matrix in tiles of 16 rows by 32 bytes, tile after tile."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.cann.registry import aclnn, require

ROWS, BYTES = 16, 32
"""Of a tile (native/objects.cpp has them too)."""


def from_nz(tiles: Tensor) -> Tensor:
    """weight_LKN of its tiles [L, N / 32, K / 16, 16, 32] (int8)."""
    matrices, across, down, rows, columns = tiles.shape
    return tiles.permute(0, 2, 3, 1, 4).reshape(matrices, down * rows, across * columns)


@aclnn("src:T", "dst:T")
def aclnnNpuFormatCast(src: Tensor, dst: Tensor) -> None:
    require(src.dtype == torch.int8 and src.dim() == 3, "only int8 matrices [L, K, N] are emulated")
    matrices, inner, outer = src.shape
    tiles = src.view(matrices, inner // ROWS, ROWS, outer // BYTES, BYTES).permute(0, 3, 1, 2, 4)
    require(dst.shape == tiles.shape, f"dst has tiles {tuple(dst.shape)}, not {tuple(tiles.shape)}")
    dst.copy_(tiles)
