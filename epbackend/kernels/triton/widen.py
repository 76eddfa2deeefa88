"""Rows that have arrived in 8 bits, in their own dtype again, in one launch; see `epbackend.kernels.Kernels.widen`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.fp8 import BLOCK, FP8
from epbackend.kernels.triton.chip import chip_of

ROWS, COLUMNS = 4, 1024
PROGRAMS_PER_SM = 8


def widen(values_SD: Tensor, scale_SG: Tensor, out_SD: Tensor, counts_L: Tensor | None = None) -> None:
    """All rows, or with counts the first `counts_L.sum()` of them; the others are left unwritten."""
    rows, width = out_SD.shape
    if not rows:
        return
    slots = 1 if counts_L is None else len(counts_L)
    _widen[(chip_of(out_SD.device).sms * PROGRAMS_PER_SM,)](
        values_SD,
        scale_SG,
        counts_L,
        out_SD,
        values_SD.stride(0),
        scale_SG.stride(0),
        rows,
        slots,
        width,
        BLOCK if values_SD.dtype == FP8 else width,
        triton.next_power_of_2(slots),
        ROWS,
        min(COLUMNS, triton.next_power_of_2(width)),
    )


@triton.jit(do_not_specialize=["rows"])
def _widen(
    values_SD,
    scale_SG,
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
    """Every so many blocks of ROWS rows and COLUMNS columns."""
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
        scale = tl.load(scale_SG + row * scale_stride + column // GROUP, mask=inside)
        wide = values.to(tl.float32) * scale
        tl.store(out_SD + row * D + column, wide.to(out_SD.dtype.element_ty), mask=inside)
