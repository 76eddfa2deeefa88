"""Sort the choices of all tokens by local slot, and copy each token once for each: `count` and `permute`.

A stable counting sort, deterministic because nothing depends on which program comes first:

    slot_ids_TK = [[1, 9], [0, 1], [9, 0]], two slots, blocks of 4 choices
    counts_BL   = [[1, 2], [1, 0]]      # choices of each block, by slot; 9 is a slot of another rank
    before_BL   = [[0, 0], [1, 2]]      # those in earlier blocks
    source_S    = [2, 5, 0, 3, -1, -1]  # place = rows of earlier slots + before_BL + earlier ones in the same block

Nothing comes back to the host, so there are as many rows as there may be choices; those past the counts have source -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels import Permuted
from epbackend.kernels.triton.permute_few import MOST_CHOICES, permute_few
from epbackend.kernels.triton.sort import load_slots, place, store_counts, store_sources

BLOCK = 128
"""Choices of one program. It compares each with each, so a small block is cheap and a large one is not."""

COPIED_ROWS, COPIED_COLUMNS = 4, 1024
"""The part of the hidden states that one program copies: 16 bytes a thread and load in half precision."""


def count(slot_ids_TK: Tensor, slots: int) -> Tensor:
    """counts_L (int64): how many choices fell on each of the `slots` local slots."""
    ids_S = slot_ids_TK.contiguous().view(-1)
    if not 0 < len(ids_S) <= MOST_CHOICES:
        return count_in_blocks(ids_S, slots)[0]
    counts_1L = torch.empty(1, slots, dtype=torch.int64, device=ids_S.device)
    lanes, block = triton.next_power_of_2(slots + 1), triton.next_power_of_2(max(BLOCK, len(ids_S)))
    _count_blocks[(1,)](ids_S, counts_1L, len(ids_S), slots, lanes, block)
    return counts_1L[0]


def permute(
    hidden_TD: Tensor, slot_ids_TK: Tensor, slots: int, window: tuple[int, int] | None = None
) -> Permuted:
    """See `kernels.Kernels.permute`. Rows: T * K, or with a `window` (first, last) at most last - first."""
    (tokens, top_k), width = slot_ids_TK.shape, hidden_TD.shape[1]
    ids_S = slot_ids_TK.contiguous().view(-1)
    first, last = window or (0, len(ids_S))
    rows = max(0, min(last, len(ids_S)) - first)
    out = Permuted(
        rows_SD=hidden_TD.new_empty(rows, width),
        counts_L=torch.empty(slots, dtype=torch.int64, device=hidden_TD.device),
        source_S=torch.empty(rows, dtype=torch.int64, device=hidden_TD.device),
    )
    if tokens == 0:
        out.counts_L.zero_()
    elif len(ids_S) <= MOST_CHOICES:
        permute_few(hidden_TD, ids_S, top_k, first, out)
    else:
        _permute_many(hidden_TD, ids_S, top_k, first, out)
    return out


def _permute_many(hidden_TD: Tensor, ids_S: Tensor, top_k: int, first: int, out: Permuted) -> None:
    """Count, place, copy: a launch for each, and one to add up the blocks' counts."""
    slots, (rows, width) = len(out.counts_L), out.rows_SD.shape
    totals_L, before_BL = count_in_blocks(ids_S, slots)
    _place[(len(before_BL),)](
        ids_S,
        totals_L,
        before_BL,
        out.counts_L,
        out.source_S,
        len(ids_S),
        slots,
        first,
        first + rows,
        triton.next_power_of_2(slots + 1),
        BLOCK,
    )
    if rows:
        grid = (triton.cdiv(rows, COPIED_ROWS), triton.cdiv(width, COPIED_COLUMNS))
        _copy_rows[grid](
            hidden_TD,
            out.source_S,
            out.rows_SD,
            rows,
            hidden_TD.stride(0),
            width,
            top_k,
            COPIED_ROWS,
            COPIED_COLUMNS,
        )


def count_in_blocks(ids_S: Tensor, slots: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """totals_L (int64) and before_BL (int32): choices of each slot in all blocks, and in those before each block."""
    blocks = triton.cdiv(len(ids_S), block)
    before_BL = torch.empty(blocks, slots, dtype=torch.int32, device=ids_S.device)
    totals_L = torch.empty(slots, dtype=torch.int64, device=ids_S.device)
    if blocks:
        lanes = triton.next_power_of_2(slots + 1)
        _count_blocks[(blocks,)](ids_S, before_BL, len(ids_S), slots, lanes, block)
    _add_up_blocks[(slots,)](before_BL, totals_L, blocks, slots)
    return totals_L, before_BL


@triton.jit(do_not_specialize=["S"])
def _count_blocks(ids_S, counts_BL, S, slots, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Choices of one block, by slot."""
    block = tl.program_id(0)
    slot = load_slots(ids_S, block * BLOCK + tl.arange(0, BLOCK), S, slots)
    lane = tl.arange(0, LANES)
    counts = tl.histogram(slot, LANES)
    tl.store(counts_BL + block.to(tl.int64) * slots + lane, counts, mask=lane < slots)


@triton.jit(do_not_specialize=["blocks"])
def _add_up_blocks(counts_BL, totals_L, blocks, slots, CHUNK: tl.constexpr = 1024):
    """Replace one slot's counts by their sums over earlier blocks, and store the sum over all."""
    slot = tl.program_id(0)
    total = tl.zeros((), tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        entry = counts_BL + block.to(tl.int64) * slots + slot
        counts = tl.load(entry, mask=block < blocks, other=0)
        tl.store(entry, total + tl.cumsum(counts) - counts, mask=block < blocks)
        total += tl.sum(counts)
    tl.store(totals_L + slot, total.to(tl.int64))


@triton.jit(do_not_specialize=["S", "first", "last"])
def _place(
    ids_S,
    totals_L,
    before_BL,
    counts_L,
    source_S,
    S,
    slots,
    first,
    last,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the choices of one block to their places among rows [first, last)."""
    block = tl.program_id(0)
    lane = tl.arange(0, LANES)
    totals = tl.load(totals_L + lane, mask=lane < slots, other=0).to(tl.int32)
    before = tl.load(before_BL + block.to(tl.int64) * slots + lane, mask=lane < slots, other=0)
    if block == 0:
        store_counts(counts_L, totals, first, last, slots, LANES)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    slot = load_slots(ids_S, choice, S, slots)
    row = place(slot, choice, totals, before, BLOCK)
    store_sources(source_S, slot, choice, row, tl.sum(totals), first, last, slots)


@triton.jit(do_not_specialize=["S"])
def _copy_rows(
    hidden_TD,
    source_S,
    rows_SD,
    S,
    token_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rows_SD[s] = hidden_TD[source_S[s] // K]; unused rows stay as they are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(source_S + row, mask=row < S, other=-1)
    inside = (source >= 0)[:, None] & (column < D)[None, :]
    values = tl.load(hidden_TD + (source // K)[:, None] * token_stride + column[None, :], mask=inside)
    tl.store(rows_SD + row.to(tl.int64)[:, None] * D + column[None, :], values, mask=inside)
