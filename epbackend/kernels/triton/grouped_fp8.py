"""Grouped matmul of float8 rows and DeepSeek's 128 x 128-block float8 matrices.

Each 128-deep product is scaled and added in float32, as DeepSeek's own kernels do: the matrix units keep fewer bits
than float32 when they add up float8 products. With GATED the result leaves as float8 again, scaled anew for each 128
columns, so that the second product reads it as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.fp8 import BLOCK, Fp8Blocks
from epbackend.kernels.triton.blocks import find_tile, load_block, multiply, store_block, swiglu
from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.matrix import aligned, matrix
from epbackend.kernels.triton.quantise import Fp8Tokens, empty_fp8, to_fp8
from epbackend.kernels.triton.schedule import Schedule
from epbackend.kernels.triton.tile import Tile


def grouped_matmul_fp8(
    rows: Fp8Tokens, experts: Fp8Blocks, schedule: Schedule, tile: Tile, chip: Chip, dtype: torch.dtype
) -> Tensor:
    """rows_SN in `dtype`. Rows past the counts are left unwritten."""
    count, columns = len(rows.values_SK), experts.values_LNK.shape[1]
    out_SN = torch.empty(count, columns, dtype=dtype, device=rows.values_SK.device)
    _launch(rows, experts, schedule, tile, chip, out_SN, None)
    return out_SN


def gated_matmul_fp8(
    rows: Fp8Tokens, experts: Fp8Blocks, schedule: Schedule, tile: Tile, chip: Chip
) -> Fp8Tokens:
    """silu(gate) * up, quantised: F = N / 2 columns in blocks of 128, each the work of one tile."""
    out = empty_fp8(len(rows.values_SK), experts.values_LNK.shape[1] // 2, rows.values_SK.device)
    _launch(rows, experts, schedule, tile, chip, out.values_SK, out.scale_BS)
    return out


def _launch(
    rows: Fp8Tokens,
    experts: Fp8Blocks,
    schedule: Schedule,
    tile: Tile,
    chip: Chip,
    out_SN: Tensor,
    out_scale_BS: Tensor | None,
) -> None:
    (count, depth), (slots, height, _) = rows.values_SK.shape, experts.values_LNK.shape
    if count == 0:
        return
    weight_HK = experts.values_LNK.view(slots * height, depth)
    tma = tile.tma and chip.tma and aligned(rows.values_SK) and aligned(weight_HK)
    _grouped_matmul_fp8[(chip.sms * tile.programs,)](
        matrix(rows.values_SK, (tile.rows, BLOCK), tma),
        matrix(weight_HK, (tile.columns, BLOCK), tma),
        rows.scale_BS,
        experts.scale_LBB,
        out_SN,
        out_scale_BS,
        schedule.tiles_M3,
        schedule.total_1,
        count,
        slots * height,
        out_SN.shape[1],
        depth,
        GATED=out_scale_BS is not None,
        TMA=tma,
        **tile.launch(),
    )


@triton.jit(do_not_specialize=["S"])
def _grouped_matmul_fp8(
    rows_SK,
    weight_HK,
    row_scale_BS,
    scale_LBB,
    out_SN,
    out_scale_BS,
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
    """Tiles [BLOCK_M, BLOCK_N] of out_SN, BLOCK_N at most 128 and, with GATED, 128; BLOCK_K is 128."""
    HEIGHT: tl.constexpr = 2 * N if GATED else N
    SCALES: tl.constexpr = (HEIGHT + BLOCK_K - 1) // BLOCK_K
    DEEP: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
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
        scale = scale_LBB + (slot * SCALES + column // BLOCK_K) * DEEP
        row_M = first + tl.arange(0, BLOCK_M)
        nothing_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sum_MN, up_MN = nothing_MN, nothing_MN
        for deep in range(0, DEEP):
            row_block = load_block(rows_SK, first, deep * BLOCK_K, S, K, K, BLOCK_M, BLOCK_K, TMA)
            block = load_block(weight_HK, at, deep * BLOCK_K, H, K, K, BLOCK_N, BLOCK_K, TMA)
            row_scale = row_scale_BS + S.to(tl.int64) * deep + row_M
            row_scale_M1 = tl.load(row_scale, mask=row_M < end, other=0)[:, None]
            sum_MN += multiply(row_block, block, nothing_MN) * (row_scale_M1 * tl.load(scale + deep))
            if GATED:
                up_block = load_block(weight_HK, at + N, deep * BLOCK_K, H, K, K, BLOCK_N, BLOCK_K, TMA)
                up_scale = tl.load(scale + (N // BLOCK_K) * DEEP + deep)
                up_MN += multiply(row_block, up_block, nothing_MN) * (row_scale_M1 * up_scale)
        column_N = column + tl.arange(0, BLOCK_N)
        if GATED:
            values_MN, out_scale_M = to_fp8(swiglu(sum_MN, up_MN))
            store_block(out_SN, values_MN, row_M, end, column_N, N)
            tl.store(out_scale_BS + column_tile.to(tl.int64) * S + row_M, out_scale_M, mask=row_M < end)
        else:
            store_block(out_SN, sum_MN, row_M, end, column_N, N)
