"""Grouped matmul of int8 rows and int8 matrices (W8A8), summed in int32 and scaled once at the end.

One scale for each row and one for each output: real value = sum * row scale * output scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.blocks import find_tile, load_block, multiply, store_block, swiglu
from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.matrix import aligned, matrix
from epbackend.kernels.triton.quantise import Int8Tokens
from epbackend.kernels.triton.schedule import Schedule
from epbackend.kernels.triton.tile import Tile


def grouped_matmul_int8(
    rows: Int8Tokens,
    experts: Int8Weights,
    schedule: Schedule,
    tile: Tile,
    chip: Chip,
    *,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    """rows_SN in `dtype`, or with `gated` rows_SF, F = N / 2. Rows past the counts are left unwritten."""
    count, depth = rows.values_SK.shape
    slots, height, _ = experts.values_LNK.shape
    columns = height // 2 if gated else height
    out_SN = torch.empty(count, columns, dtype=dtype, device=rows.values_SK.device)
    if count == 0:
        return out_SN
    weight_HK = experts.values_LNK.view(slots * height, depth)
    tma = tile.tma and chip.tma and aligned(rows.values_SK) and aligned(weight_HK)
    _grouped_matmul_int8[(chip.sms * tile.programs,)](
        matrix(rows.values_SK, (tile.rows, tile.depth), tma),
        matrix(weight_HK, (tile.columns, tile.depth), tma),
        rows.scale_S,
        experts.scale_LN,
        out_SN,
        schedule.tiles_M3,
        schedule.total_1,
        count,
        slots * height,
        columns,
        depth,
        GATED=gated,
        TMA=tma,
        **tile.launch(),
    )
    return out_SN


@triton.jit(do_not_specialize=["S"])
def _grouped_matmul_int8(
    rows_SK,
    weight_HK,
    row_scale_S,
    scale_LN,
    out_SN,
    tiles_M3,
    total_1,
    S,
    H,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Tiles [BLOCK_M, BLOCK_N] of out_SN; H counts the rows of all slots' matrices, one below the other."""
    HEIGHT: tl.constexpr = 2 * N if GATED else N
    row_tiles = tl.load(total_1)
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(
        tl.program_id(0),
        row_tiles * column_tiles,
        tl.num_programs(0),
        flatten=FLATTEN,
        warp_specialize=SPECIALIZE,
    ):
        slot, first, end, column_tile = find_tile(tile, tiles_M3, row_tiles, column_tiles, BAND)
        column = column_tile * BLOCK_N
        at = slot * HEIGHT + column
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        up_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for depth in range(0, K, BLOCK_K):
            row_block = load_block(rows_SK, first, depth, S, K, K, BLOCK_M, BLOCK_K, TMA)
            block = load_block(weight_HK, at, depth, H, K, K, BLOCK_N, BLOCK_K, TMA)
            sum_MN = multiply(row_block, block, sum_MN)
            if GATED:
                up_block = load_block(weight_HK, at + N, depth, H, K, K, BLOCK_N, BLOCK_K, TMA)
                up_MN = multiply(row_block, up_block, up_MN)
        row_M = first + tl.arange(0, BLOCK_M)
        column_N = column + tl.arange(0, BLOCK_N)
        row_scale_M1 = tl.load(row_scale_S + row_M, mask=row_M < end, other=0)[:, None]
        scale = scale_LN + slot * HEIGHT + column_N
        out_MN = sum_MN.to(tl.float32) * row_scale_M1 * tl.load(scale, mask=column_N < N, other=0)[None, :]
        if GATED:
            up_scale_1N = tl.load(scale + N, mask=column_N < N, other=0)[None, :]
            out_MN = swiglu(out_MN, up_MN.to(tl.float32) * row_scale_M1 * up_scale_1N)
        store_block(out_SN, out_MN, row_M, end, column_N, N)
