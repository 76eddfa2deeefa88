"""Grouped matmul in every form: each row times the transposed matrix of its slot.

One persistent launch: as many programs as fit on the chip take tiles in turn, whatever the counts say, so that empty
and huge groups cost what their rows cost, and nothing is read back to the host. With `gated` the two halves of gate_up
are multiplied side by side and leave as silu(gate) * up: the wide intermediate never reaches memory. Float8 experts
get it as float8, scaled anew for each 128 columns, so that the second product reads it as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.forms import Experts
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.blocks import find_tile, one_a_column, store_block, swiglu
from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.matrix import aligned, matrix
from epbackend.kernels.triton.quantise import Fp8Tokens, Int8Tokens, empty_fp8, to_fp8
from epbackend.kernels.triton.schedule import Schedule
from epbackend.kernels.triton.sums import scaled_sums, sums
from epbackend.kernels.triton.tile import Tile

Rows = Tensor | Fp8Tokens | Int8Tokens
"""What comes in, in the form of the experts."""


def grouped_matmul(
    rows: Rows,
    experts: Experts,
    schedule: Schedule,
    tile: Tile,
    chip: Chip,
    *,
    gated: bool,
    dtype: torch.dtype,
    bias_LN: Tensor | None = None,
) -> Tensor | Fp8Tokens:
    """rows_SN in `dtype`, or with `gated` rows_SF, F = N / 2: as `Fp8Tokens` where the experts are float8.

    Rows past the counts are left unwritten.
    """
    values_SK, row_scale = _parts(rows)
    weight_LNK, weight_scale = _parts(experts)
    (count, depth), (slots, height, _) = values_SK.shape, weight_LNK.shape
    columns = height // 2 if gated else height
    out: Tensor | Fp8Tokens
    if gated and isinstance(experts, Fp8Blocks):
        out = empty_fp8(count, columns, values_SK.device)
    else:
        out = torch.empty(count, columns, dtype=dtype, device=values_SK.device)
    if count == 0:
        return out
    weight = weight_LNK.view(slots * height, depth)
    block: tuple[int, ...] = (tile.columns, tile.depth)
    if gated and not isinstance(experts, Fp8Blocks):  # gate and up of a tile come in one block
        weight, block = weight.view(2 * slots, columns, depth), (2, *block)
    out_SN, out_scale_BS = _parts(out)
    tma = tile.tma and chip.tma and aligned(values_SK) and aligned(weight)
    _grouped_matmul[(chip.sms * tile.programs,)](
        matrix(values_SK, (tile.rows, tile.depth), tma),
        matrix(weight, block, tma),
        row_scale,
        weight_scale,
        bias_LN,
        out_SN,
        out_scale_BS,
        schedule.tiles_M3,
        schedule.total_1,
        count,
        slots * height,
        values_SK.stride(0),
        columns,
        depth,
        FP8=isinstance(experts, Fp8Blocks),
        INT8=isinstance(experts, Int8Weights),
        GATED=gated,
        TMA=tma,
        **tile.launch(),
    )
    return out


def _parts(given: Rows | Experts) -> tuple[Tensor, Tensor | None]:
    """The values, and their scales if they have any."""
    if isinstance(given, Tensor):
        return given, None
    values, scale = vars(given).values()
    return values, scale


@triton.jit(do_not_specialize=["S"])
def _grouped_matmul(
    rows_SK,
    weight_HK,
    row_scale,
    weight_scale,
    bias_LN,
    out_SN,
    out_scale_BS,
    tiles_M3,
    total_1,
    S,
    H,
    row_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    FP8: tl.constexpr,
    INT8: tl.constexpr,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Tiles [BLOCK_M, BLOCK_N] of out_SN; H counts the rows of all slots' matrices, one below the other.

    Float8: BLOCK_K is 128, BLOCK_N at most 128 and, with GATED, 128.
    """
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
        if FP8:
            sum_MN, up_MN = scaled_sums(
                rows_SK, weight_HK, row_scale, weight_scale, slot, column, first, end, S, H,
                N, K, HEIGHT, GATED, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            sum_MN, up_MN = sums(
                rows_SK, weight_HK, slot, column, first, S, H, row_stride,
                N, K, GATED, TMA, BLOCK_M, BLOCK_N, BLOCK_K, tl.int32 if INT8 else tl.float32,
            )  # fmt: skip
        row_M = first + tl.arange(0, BLOCK_M)
        column_N = column + tl.arange(0, BLOCK_N)
        if INT8:
            row_scale_M1 = tl.load(row_scale + row_M, mask=row_M < end, other=0)[:, None]
            scale = weight_scale + slot * HEIGHT
            sum_MN = sum_MN.to(tl.float32) * row_scale_M1 * one_a_column(scale, column_N, N)
            if GATED:
                up_MN = up_MN.to(tl.float32) * row_scale_M1 * one_a_column(scale + N, column_N, N)
        if bias_LN is not None:
            bias = bias_LN + slot * HEIGHT
            sum_MN += one_a_column(bias, column_N, N)
            if GATED:
                up_MN += one_a_column(bias + N, column_N, N)
        if GATED:
            sum_MN = swiglu(sum_MN, up_MN)
        if out_scale_BS is not None:
            sum_MN, out_scale_M = to_fp8(sum_MN)
            tl.store(out_scale_BS + column_tile.to(tl.int64) * S + row_M, out_scale_M, mask=row_M < end)
        store_block(out_SN, sum_MN, row_M, end, column_N, N)
