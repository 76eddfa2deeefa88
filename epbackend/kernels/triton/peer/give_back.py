"""Store each expert's result at its token's own rank, in the place of the choice that it answers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.chip import chip_of
from epbackend.kernels.triton.peer.mirror import Mirror, reach

ROWS, COLUMNS = 4, 1024
PROGRAMS_PER_SM = 8


def give_back(rows_SD: Tensor, counts_L: Tensor, source_S: Tensor, results: Mirror) -> None:
    """Send the first `counts_L.sum()` rows; `results` is [tokens * K, D] on each rank, `source_S` as `send` wrote it.

    As many programs as fit on the chip share the rows, since how many there are is known on the device alone.
    """
    (choices, width), columns = results.mine.shape, min(COLUMNS, triton.next_power_of_2(rows_SD.shape[1]))
    _give_back[(chip_of(rows_SD.device).sms * PROGRAMS_PER_SM,)](
        rows_SD,
        counts_L,
        source_S,
        results.addresses_R,
        results.mine,
        rows_SD.stride(0),
        len(counts_L),
        choices,
        width,
        triton.next_power_of_2(len(counts_L)),
        ROWS,
        columns,
    )


@triton.jit
def _give_back(
    rows_SD,
    counts_L,
    source_S,
    results_R,
    results_CD,
    row_stride,
    slots,
    choices,
    D: tl.constexpr,
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
        row = block // column_blocks * ROWS + tl.arange(0, ROWS).to(tl.int64)
        column = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        source = tl.load(source_S + row, mask=row < rows, other=0)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        values = tl.load(rows_SD + row[:, None] * row_stride + column[None, :], mask=inside)
        start = reach(results_R, source // choices, results_CD) + source % choices * D
        tl.store(start[:, None] + column[None, :], values.to(results_CD.dtype.element_ty), mask=inside)
