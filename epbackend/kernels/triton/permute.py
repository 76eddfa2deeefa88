"""Sort the choices of all tokens by local slot, and copy each token once for each: `count` and `permute`.

A stable counting sort in three launches, deterministic because nothing depends on which program comes first:

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

BLOCK = 128
"""Choices of one program. It compares each with each, so a small block is cheap and a large one is not."""

COPIED_ROWS, COPIED_COLUMNS = 4, 1024
"""The part of the hidden states that one program copies: 16 bytes a thread and load in half precision."""


def count(slot_ids_TK: Tensor, slots: int) -> Tensor:
    """counts_L (int64): how many choices fell on each of the `slots` local slots."""
    return _count(slot_ids_TK.reshape(-1), slots)[0]


def permute(
    hidden_TD: Tensor, slot_ids_TK: Tensor, slots: int, window: tuple[int, int] | None = None
) -> Permuted:
    """See `kernels.Kernels.permute`. Rows: T * K, or with a `window` (first, last) at most last - first."""
    ids_S = slot_ids_TK.reshape(-1)
    first, last = window or (0, len(ids_S))
    rows = max(0, min(last, len(ids_S)) - first)
    rows_SD = hidden_TD.new_empty(rows, hidden_TD.shape[1])
    source_S = torch.empty(rows, dtype=torch.int64, device=hidden_TD.device)
    totals_L, before_BL = _count(ids_S, slots)
    if len(ids_S) == 0:
        return Permuted(rows_SD, totals_L, source_S)
    counts_L = torch.empty_like(totals_L)
    _place[(len(before_BL),)](
        ids_S,
        totals_L,
        before_BL,
        counts_L,
        source_S,
        len(ids_S),
        slots,
        first,
        first + rows,
        _pow2(slots),
        BLOCK,
    )
    grid = (triton.cdiv(rows, COPIED_ROWS), triton.cdiv(hidden_TD.shape[1], COPIED_COLUMNS))
    if rows:
        _copy_rows[grid](
            hidden_TD,
            source_S,
            rows_SD,
            rows,
            hidden_TD.stride(0),
            hidden_TD.shape[1],
            slot_ids_TK.shape[1],
            COPIED_ROWS,
            COPIED_COLUMNS,
        )
    return Permuted(rows_SD, counts_L, source_S)


def _count(ids_S: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """totals_L (int64) and before_BL (int32): choices of each slot in all blocks, and in those before each block."""
    blocks = triton.cdiv(len(ids_S), BLOCK)
    before_BL = torch.empty(blocks, slots, dtype=torch.int32, device=ids_S.device)
    totals_L = torch.empty(slots, dtype=torch.int64, device=ids_S.device)
    if blocks:
        _count_blocks[(blocks,)](ids_S, before_BL, len(ids_S), slots, _pow2(slots), BLOCK)
    _add_up_blocks[(slots,)](before_BL, totals_L, blocks, slots)
    return totals_L, before_BL


def _pow2(slots: int) -> int:
    """Lanes for the local slots and one for all others."""
    return triton.next_power_of_2(slots + 1)


@triton.jit
def _load_slots(ids_S, choice, S, slots):
    """Local slot of each choice; `slots` for those of other ranks, and past the end."""
    slot = tl.load(ids_S + choice, mask=choice < S, other=-1)
    return tl.where((slot >= 0) & (slot < slots), slot, slots).to(tl.int32)


@triton.jit
def _count_blocks(ids_S, counts_BL, S, slots, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Choices of one block, by slot."""
    block = tl.program_id(0)
    slot = _load_slots(ids_S, block * BLOCK + tl.arange(0, BLOCK), S, slots)
    lane = tl.arange(0, LANES)
    counts = tl.histogram(slot, LANES)
    tl.store(counts_BL + block.to(tl.int64) * slots + lane, counts, mask=lane < slots)


@triton.jit
def _add_up_blocks(counts_BL, totals_L, blocks, slots, CHUNK: tl.constexpr = 1024):
    """Replace one slot's counts by their sums over earlier blocks, and store the sum over all."""
    slot = tl.program_id(0)
    total = tl.zeros((), tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        place = counts_BL + block.to(tl.int64) * slots + slot
        counts = tl.load(place, mask=block < blocks, other=0)
        tl.store(place, total + tl.cumsum(counts) - counts, mask=block < blocks)
        total += tl.sum(counts)
    tl.store(totals_L + slot, total.to(tl.int64))


@triton.jit
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
    ends = tl.cumsum(totals)
    before = tl.load(before_BL + block.to(tl.int64) * slots + lane, mask=lane < slots, other=0)
    if block == 0:
        inside = tl.minimum(tl.maximum(ends, first), last) - tl.minimum(
            tl.maximum(ends - totals, first), last
        )
        tl.store(counts_L + lane, inside.to(tl.int64), mask=lane < slots)
    nth = tl.arange(0, BLOCK)
    choice = block * BLOCK + nth
    slot = _load_slots(ids_S, choice, S, slots)
    twins = (slot[:, None] == slot[None, :]) & (nth[None, :] < nth[:, None])
    row = tl.gather(ends - totals + before, slot, 0) + tl.sum(twins.to(tl.int32), 1)
    ours = (slot < slots) & (row >= first) & (row < last)
    tl.store(source_S + row - first, choice.to(tl.int64), mask=ours)
    # The rows that no choice fills are shared out evenly: each program marks those with the numbers of its choices.
    unused = (first + choice >= tl.sum(totals)) & (first + choice < last)
    tl.store(source_S + choice, -1, mask=unused)


@triton.jit
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
