"""The inner loops of the grouped matmul: one tile's sums along the depth, of one matrix or of gate and up together."""

from __future__ import annotations

import triton
import triton.language as tl

from epbackend.kernels.triton.blocks import load_block, load_pair, multiply


@triton.jit
def sums(
    rows_SK,
    weight_HK,
    slot,
    column,
    first,
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
    DTYPE: tl.constexpr,
):
    """(sum_MN, up_MN) in DTYPE of rows from `first` on and the slot's columns from `column` on.

    Gate and up are one product twice as wide, for which the matrix units read each block of rows once.
    """
    if GATED:
        both_MN = tl.zeros((BLOCK_M, 2 * BLOCK_N), DTYPE)
        for depth in range(0, K, BLOCK_K):
            row_block = load_block(rows_SK, first, depth, S, K, row_stride, BLOCK_M, BLOCK_K, TMA)
            pair = load_pair(weight_HK, slot, column, depth, N, K, BLOCK_N, BLOCK_K, TMA)
            both_MN = multiply(row_block, pair, both_MN)
        sum_MN, up_MN = tl.split(tl.permute(tl.reshape(both_MN, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    else:
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
        up_MN = sum_MN
        for depth in range(0, K, BLOCK_K):
            row_block = load_block(rows_SK, first, depth, S, K, row_stride, BLOCK_M, BLOCK_K, TMA)
            block = load_block(weight_HK, slot * N + column, depth, H, K, K, BLOCK_N, BLOCK_K, TMA)
            sum_MN = multiply(row_block, block, sum_MN)
    return sum_MN, up_MN


@triton.jit
def scaled_sums(
    rows_SK,
    weight_HK,
    row_scale_BS,
    scale_LBB,
    slot,
    column,
    first,
    end,
    S,
    H,
    N: tl.constexpr,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same in float32 of float8 blocks with a scale each.

    Each 128-deep product is scaled and added in float32, as DeepSeek's own kernels do: the matrix units keep fewer bits
    than float32 when they add up float8 products. Gate and up stay two products, as the sums of both and a product of
    both together would not fit the registers.
    """
    DEEP: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    scale = scale_LBB + (slot * ((HEIGHT + BLOCK_K - 1) // BLOCK_K) + column // BLOCK_K) * DEEP
    at = slot * HEIGHT + column
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
    return sum_MN, up_MN
