"""Rows in 8 bits: float8 with a scale for each 128 values, int8 with one for each row.

`quantize_fp8` and `quantize_int8` serve the products of quantized experts: they read only the rows that the counts
cover, so that the rest of a padded buffer costs nothing; and they read `TokenRows` where the tokens lie, which spares
copying the rows first. `quantize` and `dequantize` are those of
`epbackend.kernels.Kernels`, for rows that travel between ranks, and may read and write views of wider rows.

Shapes: S rows, K their width; T tokens, D their width; B scales of a row; M rows of a block of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels.fp8 import BLOCK, FP8
from epbackend.kernels.triton.launch import cdiv, named_launch, next_power_of_2
from epbackend.kernels.triton.permute import TokenRows, places, source_of
from epbackend.kernels.triton.tiles import INTERPRETED, Schedule, chip_of, covered_rows

FP8_ROWS = 32
"""Rows of one program: 32 x 128 values are 32 a thread."""


@dataclass(frozen=True)
class Fp8Tokens:
    """Rows of float8_e4m3fn: real value = float8 value * scale of its 128 neighbours."""

    values_SK: Tensor
    scale_BS: Tensor
    """[K / 128, S]: a tile's rows lie side by side, so that one wide access reads their scales."""


@dataclass(frozen=True)
class Int8Tokens:
    """Rows of int8: real value = int8 value * scale of its row."""

    values_SK: Tensor
    scale_S: Tensor


def empty_fp8(rows: int, width: int, device: torch.device) -> Fp8Tokens:
    """Uninitialised memory for `rows` rows.

    Raises:
        ConfigError: The width is no multiple of 128.
    """
    if width % BLOCK:
        raise ConfigError(
            f"fp8 experts need widths that are multiples of {BLOCK}, and this one is {width}; "
            "serve this model in bfloat16"
        )
    values_SK = torch.empty(rows, width, dtype=FP8, device=device)
    return Fp8Tokens(values_SK, torch.empty(width // BLOCK, rows, dtype=torch.float32, device=device))


def quantize_fp8(rows: Tensor | TokenRows, schedule: Schedule) -> Fp8Tokens:
    """rows_SK with one scale for each 128 values of a row."""
    (source, choice_of_row_S, top_k), count = source_of(rows), len(rows)
    width = source.shape[1]
    out = empty_fp8(count, width, source.device)
    if count:
        _quantize_fp8[(cdiv(count, FP8_ROWS), width // BLOCK)](
            source=source,
            choice_of_row_S=choice_of_row_S,
            values_SK=out.values_SK,
            scale_BS=out.scale_BS,
            tiles_M3=schedule.tiles_M3,
            total_1=schedule.total_1,
            S=count,
            row_stride=source.stride(0),
            K=width,
            TOP_K=top_k,
            ROWS=FP8_ROWS,
            BLOCK=BLOCK,
        )
    return out


def quantize_int8(rows: Tensor | TokenRows, schedule: Schedule) -> Int8Tokens:
    """rows_SK with one scale a row."""
    (source, choice_of_row_S, top_k), count = source_of(rows), len(rows)
    width = source.shape[1]
    values_SK = torch.empty(count, width, dtype=torch.int8, device=source.device)
    scale_S = torch.empty(count, dtype=torch.float32, device=source.device)
    if count:
        _quantize_int8[(count,)](
            source=source,
            choice_of_row_S=choice_of_row_S,
            values_SK=values_SK,
            scale_S=scale_S,
            tiles_M3=schedule.tiles_M3,
            total_1=schedule.total_1,
            row_stride=source.stride(0),
            K=width,
            TOP_K=top_k,
            WIDTH=next_power_of_2(width),
            num_warps=8,
        )
    return Int8Tokens(values_SK, scale_S)


@triton.jit
def to_fp8(values_MN):
    """(float8 values, scale of each row) of a block; the scale brings the row's largest value to 448."""
    largest_M = tl.max(tl.abs(values_MN), 1)
    scale_M = tl.where(largest_M > 0, largest_M / 448.0, 1.0)
    scaled_MN = values_MN / scale_M[:, None]
    if INTERPRETED:
        # Triton 3.7's interpreter loses the carry when it rounds: round to 3 bits of mantissa, to even, before it does.
        bits = scaled_MN.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        scaled_MN = bits.to(tl.float32, bitcast=True)
    return scaled_MN.to(tl.float8e4nv), scale_M


@triton.jit
def int8_scale(largest):
    """The scale that brings a row's largest value to 127."""
    return tl.where(largest > 0, largest / 127.0, 1.0)


@triton.jit
def round_to_int8(scaled):
    """The nearest integers, half away from zero.

    Rounding half to even would be a call to libdevice, which the interpreter does not have.
    """
    return tl.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(tl.int8)


@named_launch
@triton.jit(do_not_specialize=["S"])
def _quantize_fp8(
    source,
    choice_of_row_S,
    values_SK,
    scale_BS,
    tiles_M3,
    total_1,
    S,
    row_stride,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows, BLOCK columns of each."""
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    column_N = block * BLOCK + tl.arange(0, BLOCK)
    ours_M = row_M < covered_rows(tiles_M3, total_1)
    at_M = places(choice_of_row_S, row_M, ours_M, TOP_K)
    place = source + at_M[:, None] * row_stride + column_N[None, :]
    values_MN, scale_M = to_fp8(tl.load(place, mask=ours_M[:, None], other=0).to(tl.float32))
    tl.store(values_SK + row_M.to(tl.int64)[:, None] * K + column_N[None, :], values_MN, mask=ours_M[:, None])
    tl.store(scale_BS + block.to(tl.int64) * S + row_M, scale_M, mask=ours_M)


@named_launch
@triton.jit
def _quantize_int8(
    source,
    choice_of_row_S,
    values_SK,
    scale_S,
    tiles_M3,
    total_1,
    row_stride,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row; WIDTH is a power of two that holds it."""
    row = tl.program_id(0).to(tl.int64)
    if row < covered_rows(tiles_M3, total_1):
        column = tl.arange(0, WIDTH)
        at = places(choice_of_row_S, row, row >= 0, TOP_K)
        values = tl.load(source + at * row_stride + column, mask=column < K, other=0).to(tl.float32)
        scale = int8_scale(tl.max(tl.abs(values)))
        tl.store(values_SK + row * K + column, round_to_int8(values / scale), mask=column < K)
        tl.store(scale_S + row, scale)


GROUPS = 8
"""Groups of 128 values that one program quantizes."""


def quantize(rows_TD: Tensor, values_TD: Tensor, scale_TB: Tensor) -> None:
    """See `epbackend.kernels.Kernels.quantize`; one launch."""
    (tokens, width), scales = rows_TD.shape, scale_TB.shape[1]
    float8 = values_TD.dtype == FP8
    groups, group = (GROUPS, BLOCK) if float8 else (1, next_power_of_2(width))
    if tokens:
        _quantize[(tokens, cdiv(scales, groups))](
            rows_TD=rows_TD,
            values_TD=values_TD,
            scale_TB=scale_TB,
            row_stride=rows_TD.stride(0),
            value_stride=values_TD.stride(0),
            scale_stride=scale_TB.stride(0),
            D=width,
            SCALES=scales,
            GROUPS=groups,
            GROUP=group,
            FLOAT8=float8,
            num_warps=4 if float8 else 8,
        )


@named_launch
@triton.jit
def _quantize(
    rows_TD,
    values_TD,
    scale_TB,
    row_stride,
    value_stride,
    scale_stride,
    D: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """GROUPS groups of one token, of GROUP values and one scale each."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(rows_TD + token * row_stride + column, mask=column < D, other=0).to(tl.float32)
    if FLOAT8:
        quantized, scale = to_fp8(values)
    else:
        scale = int8_scale(tl.max(tl.abs(values), 1))
        quantized = round_to_int8(values / scale[:, None])
    tl.store(values_TD + token * value_stride + column, quantized, mask=column < D)
    tl.store(scale_TB + token * scale_stride + group, scale, mask=group < SCALES)


ROWS, COLUMNS = 4, 1024
PROGRAMS_PER_SM = 8


def dequantize(values_SD: Tensor, scale_SB: Tensor, out_SD: Tensor, counts_L: Tensor | None = None) -> None:
    """See `epbackend.kernels.Kernels.dequantize`; one launch.

    With `counts_L` only the first `counts_L.sum()` rows, the others being left unwritten: how many there are is known
    on the device alone, so as many programs as fit on the chip share the rows.
    """
    rows, width = out_SD.shape
    if not rows:
        return
    slots = 1 if counts_L is None else len(counts_L)
    _dequantize[(chip_of(out_SD.device).sms * PROGRAMS_PER_SM,)](
        values_SD=values_SD,
        scale_SB=scale_SB,
        counts_L=counts_L,
        out_SD=out_SD,
        value_stride=values_SD.stride(0),
        scale_stride=scale_SB.stride(0),
        rows=rows,
        slots=slots,
        D=width,
        GROUP=BLOCK if values_SD.dtype == FP8 else width,
        LANES=next_power_of_2(slots),
        ROWS=ROWS,
        COLUMNS=min(COLUMNS, next_power_of_2(width)),
    )


@named_launch
@triton.jit(do_not_specialize=["rows"])
def _dequantize(
    values_SD,
    scale_SB,
    counts_L,
    out_SD,
    value_stride,
    scale_stride,
    rows,
    slots,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Blocks of ROWS rows and COLUMNS columns, from this program's number on in steps of the number of programs."""
    if counts_L is not None:
        lane = tl.arange(0, LANES)
        rows = tl.sum(tl.load(counts_L + lane, mask=lane < slots, other=0)).to(tl.int32)
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    blocks = (rows + ROWS - 1) // ROWS * column_blocks
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = (block // column_blocks * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        column = (block % column_blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        inside = (row < rows) & (column < D)
        values = tl.load(values_SD + row * value_stride + column, mask=inside)
        scale = tl.load(scale_SB + row * scale_stride + column // GROUP, mask=inside)
        wide = values.to(tl.float32) * scale
        tl.store(out_SD + row * D + column, wide.to(out_SD.dtype.element_ty), mask=inside)
