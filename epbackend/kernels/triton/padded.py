"""Between rows sorted by slot and a block of equal capacity C for each slot, as libraries with fixed sizes have them.

    counts_L = [2, 1], C = 3:  padded_LCD = [[a, b, .], [c, ., .]]  <->  rows_SD = [a, b, c, ...]

Only as many rows as the counts say are moved, whatever the capacity.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.launch import named_launch, next_power_of_2
from epbackend.kernels.triton.tiles import chip_of

COLUMNS = 1024
PROGRAMS_PER_SM = 8


def compact(padded_LCD: Tensor, counts_L: Tensor, rows_SD: Tensor) -> None:
    """Write the rows of `padded_LCD` (contiguous) to the first `counts_L.sum()` rows of `rows_SD`."""
    _launch(padded_LCD, counts_L, rows_SD, to_rows=True)


def spread(rows_SD: Tensor, counts_L: Tensor, padded_LCD: Tensor) -> None:
    """Write the first `counts_L.sum()` rows to `padded_LCD` (contiguous); the rest of it stays as it is."""
    _launch(padded_LCD, counts_L, rows_SD, to_rows=False)


def _launch(padded_LCD: Tensor, counts_L: Tensor, rows_SD: Tensor, to_rows: bool) -> None:
    slots, capacity, width = padded_LCD.shape
    _move[(chip_of(rows_SD.device).sms * PROGRAMS_PER_SM,)](
        padded_LCD=padded_LCD,
        counts_L=counts_L,
        rows_SD=rows_SD,
        row_stride=rows_SD.stride(0),
        slots=slots,
        capacity=capacity,
        D=width,
        LANES=next_power_of_2(slots),
        COLUMNS=min(COLUMNS, next_power_of_2(width)),
        TO_ROWS=to_rows,
    )


@named_launch
@triton.jit
def _move(
    padded_LCD,
    counts_L,
    rows_SD,
    row_stride,
    slots,
    capacity,
    D: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TO_ROWS: tl.constexpr,
):
    """Every so many blocks of one row and COLUMNS columns."""
    lane = tl.arange(0, LANES)
    ends = tl.cumsum(tl.load(counts_L + lane, mask=lane < slots, other=0).to(tl.int64))
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    for block in range(tl.program_id(0), tl.max(ends) * column_blocks, tl.num_programs(0)):
        row = block // column_blocks
        column = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        slot = tl.sum((ends <= row).to(tl.int32)).to(tl.int64)
        nth = row - tl.max(tl.where(ends <= row, ends, 0))
        sorted_place = rows_SD + row * row_stride + column
        padded_place = padded_LCD + (slot * capacity + nth) * D + column
        if TO_ROWS:
            tl.store(sorted_place, tl.load(padded_place, mask=column < D), mask=column < D)
        else:
            tl.store(padded_place, tl.load(sorted_place, mask=column < D), mask=column < D)
