"""Grouped matmul of bfloat16, float16 and float32: each row times the transposed matrix of its slot.

One persistent launch: as many programs as fit on the chip take tiles in turn, whatever the counts say, so that empty
and huge groups cost what their rows cost, and nothing is read back to the host. With GATED the two halves of gate_up
are multiplied side by side and leave as silu(gate) * up: the wide intermediate never reaches memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.blocks import find_tile, load_block, multiply, store_block, swiglu
from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.matrix import aligned, matrix
from epbackend.kernels.triton.schedule import Schedule
from epbackend.kernels.triton.tile import Tile


def grouped_matmul(
    rows_SK: Tensor,
    weight_LNK: Tensor,
    schedule: Schedule,
    tile: Tile,
    chip: Chip,
    *,
    gated: bool,
    bias_LN: Tensor | None = None,
) -> Tensor:
    """rows_SN, or with `gated` rows_SF with F = N / 2. Rows past the counts are left unwritten."""
    rows, depth = rows_SK.shape
    slots, height, _ = weight_LNK.shape
    columns = height // 2 if gated else height
    out_SN = rows_SK.new_empty(rows, columns)
    if rows == 0:
        return out_SN
    weight_HK = weight_LNK.view(slots * height, depth)
    tma = tile.tma and chip.tma and aligned(rows_SK) and aligned(weight_HK)
    _grouped_matmul[(chip.sms * tile.programs,)](
        matrix(rows_SK, (tile.rows, tile.depth), tma),
        matrix(weight_HK, (tile.columns, tile.depth), tma),
        bias_LN,
        out_SN,
        schedule.tiles_M3,
        schedule.total_1,
        rows,
        slots * height,
        rows_SK.stride(0),
        columns,
        depth,
        GATED=gated,
        TMA=tma,
        **tile.launch(),
    )
    return out_SN


@triton.jit(do_not_specialize=["S"])
def _grouped_matmul(
    rows_SK,
    weight_HK,
    bias_LN,
    out_SN,
    tiles_M3,
    total_1,
    S,
    H,
    row_stride,
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
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for depth in range(0, K, BLOCK_K):
            row_block = load_block(rows_SK, first, depth, S, K, row_stride, BLOCK_M, BLOCK_K, TMA)
            block = load_block(weight_HK, at, depth, H, K, K, BLOCK_N, BLOCK_K, TMA)
            sum_MN = multiply(row_block, block, sum_MN)
            if GATED:
                up_block = load_block(weight_HK, at + N, depth, H, K, K, BLOCK_N, BLOCK_K, TMA)
                up_MN = multiply(row_block, up_block, up_MN)
        row_M = first + tl.arange(0, BLOCK_M)
        column_N = column + tl.arange(0, BLOCK_N)
        if bias_LN is not None:
            bias = bias_LN + slot * HEIGHT + column_N
            sum_MN += tl.load(bias, mask=column_N < N, other=0).to(tl.float32)[None, :]
            if GATED:
                up_MN += tl.load(bias + N, mask=column_N < N, other=0).to(tl.float32)[None, :]
        if GATED:
            sum_MN = swiglu(sum_MN, up_MN)
        store_block(out_SN, sum_MN, row_M, end, column_N, N)
