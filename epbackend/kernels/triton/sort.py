"""A stable counting sort of choices by local slot: what `permute` and its fused form for few choices share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_slots(ids_S, choice, S, slots):
    """Local slot of each choice; `slots` for those of other ranks, and past the end."""
    slot = tl.load(ids_S + choice, mask=choice < S, other=-1)
    return tl.where((slot >= 0) & (slot < slots), slot, slots).to(tl.int32)


@triton.jit
def place(slot, choice, totals, before, BLOCK: tl.constexpr):
    """Row of each choice of one block, were all rows kept; a place past all rows for choices of other ranks.

    `slot` and `choice` are the block's, in order. For each lane, which is a slot: `totals` counts its choices in all
    blocks, `before` those in earlier blocks.
    """
    starts = tl.cumsum(totals) - totals
    return tl.gather(starts + before, slot, 0) + earlier_twins(slot, BLOCK)


@triton.jit
def earlier_twins(slot, BLOCK: tl.constexpr):
    """For each choice of one block, how many earlier ones of the block fell on the same slot."""
    nth = tl.arange(0, BLOCK)
    twins = (slot[:, None] == slot[None, :]) & (nth[None, :] < nth[:, None])
    return tl.sum(twins.to(tl.int32), 1)


@triton.jit
def store_counts(counts_L, totals, first, last, slots, LANES: tl.constexpr):
    """How many of each slot's rows lie in [first, last)."""
    lane = tl.arange(0, LANES)
    ends = tl.cumsum(totals)
    starts = ends - totals
    inside = tl.minimum(tl.maximum(ends, first), last) - tl.minimum(tl.maximum(starts, first), last)
    tl.store(counts_L + lane, inside.to(tl.int64), mask=lane < slots)


@triton.jit
def store_sources(source_S, slot, choice, row, rows, first, last, slots):
    """Write each choice to its row; `rows` is how many rows there are in all, were all kept.

    The rows that no choice fills are shared out: each choice marks the one that has its own number with -1.
    """
    ours = (slot < slots) & (row >= first) & (row < last)
    tl.store(source_S + row - first, choice.to(tl.int64), mask=ours)
    tl.store(source_S + choice, -1, mask=(first + choice >= rows) & (first + choice < last))
    return ours
