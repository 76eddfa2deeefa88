"""`permute` in one launch for the few choices of a decode step, where launches cost more than the work itself.

Every program counts all choices anew, so that none has to wait for another, then places and copies those of its block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels import Permuted
from epbackend.kernels.triton.sort import load_slots, place, store_counts, store_sources

MOST_CHOICES = 2048
"""256 tokens of 8 choices: with more, counting everything in every program costs more than two further launches."""

FEW_BLOCK = 16
COLUMNS = 512


def permute_few(hidden_TD: Tensor, ids_S: Tensor, top_k: int, first: int, out: Permuted) -> None:
    """Fill `out` with the rows from `first` on."""
    slots, (rows, width) = len(out.counts_L), out.rows_SD.shape
    _permute_few[(triton.cdiv(len(ids_S), FEW_BLOCK),)](
        hidden_TD,
        ids_S,
        out.rows_SD,
        out.counts_L,
        out.source_S,
        len(ids_S),
        slots,
        first,
        first + rows,
        hidden_TD.stride(0),
        width,
        top_k,
        triton.next_power_of_2(slots + 1),
        triton.next_power_of_2(max(FEW_BLOCK, len(ids_S))),
        FEW_BLOCK,
        min(COLUMNS, triton.next_power_of_2(width)),
    )


@triton.jit(do_not_specialize=["S", "first", "last"])
def _permute_few(
    hidden_TD,
    ids_S,
    rows_SD,
    counts_L,
    source_S,
    S,
    slots,
    first,
    last,
    token_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of choices; ALL is a power of two that holds all of them."""
    start = tl.program_id(0) * BLOCK
    each = tl.arange(0, ALL)
    every_slot = load_slots(ids_S, each, S, slots)
    # The lane after the local slots takes what belongs elsewhere, and is worth nothing.
    here = tl.arange(0, LANES) < slots
    totals = tl.where(here, tl.histogram(every_slot, LANES), 0)
    before = tl.where(here, tl.histogram(tl.where(each < start, every_slot, slots), LANES), 0)
    if start == 0:
        store_counts(counts_L, totals, first, last, slots, LANES)
    choice = start + tl.arange(0, BLOCK)
    slot = load_slots(ids_S, choice, S, slots)
    row = place(slot, choice, totals, before, BLOCK)
    ours = store_sources(source_S, slot, choice, row, tl.sum(totals), first, last, slots)
    token = (choice // K).to(tl.int64)
    for start_column in range(0, D, COLUMNS):
        column = start_column + tl.arange(0, COLUMNS)
        inside = ours[:, None] & (column < D)[None, :]
        values = tl.load(hidden_TD + token[:, None] * token_stride + column[None, :], mask=inside)
        target = rows_SD + (row - first).to(tl.int64)[:, None] * D + column[None, :]
        tl.store(target, values, mask=inside)
