"""Quantised rows that have arrived, in their own dtype again."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.chip import chip_of

ROWS, COLUMNS = 4, 1024
PROGRAMS_PER_SM = 8


def restore(values_SD: Tensor, scale_SG: Tensor, counts_L: Tensor, group: int, out_SD: Tensor) -> None:
    """out_SD = values * scale for the first `counts_L.sum()` rows; a scale (float32) serves `group` values of a row."""
    width = out_SD.shape[1]
    _restore[(chip_of(out_SD.device).sms * PROGRAMS_PER_SM,)](
        values_SD,
        scale_SG,
        counts_L,
        out_SD,
        values_SD.stride(0),
        scale_SG.stride(0),
        len(counts_L),
        width,
        group,
        triton.next_power_of_2(len(counts_L)),
        ROWS,
        min(COLUMNS, triton.next_power_of_2(width)),
    )


@triton.jit
def _restore(
    values_SD,
    scale_SG,
    counts_L,
    out_SD,
    value_stride,
    scale_stride,
    slots,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every so many blocks of ROWS rows and COLUMNS columns."""
    lane = tl.arange(0, LANES)
    rows = tl.sum(tl.load(counts_L + lane, mask=lane < slots, other=0))
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    blocks = (rows + ROWS - 1) // ROWS * column_blocks
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = (block // column_blocks * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        column = (block % column_blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        inside = (row < rows) & (column < D)
        values = tl.load(values_SD + row * value_stride + column, mask=inside)
        scale = tl.load(scale_SG + row * scale_stride + column // GROUP, mask=inside)
        restored = values.to(tl.float32) * scale
        tl.store(out_SD + row * D + column, restored.to(out_SD.dtype.element_ty), mask=inside)
