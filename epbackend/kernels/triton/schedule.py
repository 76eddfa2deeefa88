"""From counts to tiles: which rows each tile of a grouped matmul multiplies, worked out on the device.

Example: counts_L = [3, 0, 130] with blocks of 128 rows gives tiles_M3 = [[0, 0, 3], [2, 3, 133], [2, 131, 133]] and
total_1 = [3]: slot, first row, and the row at which the slot's rows end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The row tiles of one grouped matmul. Both products of an expert share one."""

    tiles_M3: Tensor
    """int32: slot, first row, end of the slot's rows. M is the most that the counts may ask for."""
    total_1: Tensor
    """int32: how many of the M are used."""
    block_rows: int


def row_tiles(counts_L: Tensor, rows: int, block_rows: int) -> Schedule:
    """The tiles of `block_rows` rows that cover the groups of `counts_L`, whose sum is at most `rows` (< 2^31)."""
    slots = len(counts_L)
    most = rows // block_rows + min(slots, rows)
    tiles_M3 = torch.empty(most, 3, dtype=torch.int32, device=counts_L.device)
    total_1 = torch.empty(1, dtype=torch.int32, device=counts_L.device)
    slots_pow2 = triton.next_power_of_2(slots)
    _row_tiles[(slots,)](counts_L, tiles_M3, total_1, slots, slots_pow2, block_rows, num_warps=1)
    return Schedule(tiles_M3, total_1, block_rows)


@triton.jit
def _row_tiles(
    counts_L,
    tiles_M3,
    total_1,
    slots,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LANES: tl.constexpr = 32,
):
    """One program a slot writes the tiles of that slot, LANES at a time."""
    slot = tl.program_id(0)
    each = tl.arange(0, SLOTS)
    rows_L = tl.load(counts_L + each, mask=each < slots, other=0).to(tl.int32)
    tiles_L = (rows_L + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_tile = tl.sum(tl.where(each < slot, tiles_L, 0))
    first_row = tl.sum(tl.where(each < slot, rows_L, 0))
    tiles = tl.sum(tl.where(each == slot, tiles_L, 0))
    end = first_row + tl.sum(tl.where(each == slot, rows_L, 0))
    for start in range(0, tiles, LANES):
        tile = start + tl.arange(0, LANES)
        entry = tiles_M3 + 3 * (first_tile + tile)
        tl.store(entry, slot, mask=tile < tiles)
        tl.store(entry + 1, first_row + tile * BLOCK_ROWS, mask=tile < tiles)
        tl.store(entry + 2, end, mask=tile < tiles)
    if slot == slots - 1:
        tl.store(total_1, first_tile + tiles)


@triton.jit
def covered_rows(tiles_M3, total_1):
    """How many rows the counts add up to: where the last tile's slot ends."""
    tiles = tl.load(total_1)
    return tl.load(tiles_M3 + 3 * tiles - 1, mask=tiles > 0, other=0)
