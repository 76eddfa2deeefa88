"""`level`: one launch from the counts of all sources to a slot for every choice of one's own.

Every program works out the shares and its source's quotas anew, so that none has to wait for another, and then seats
the choices of its blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.copies import EvenCopies, LevelCopies, Split
from epbackend.kernels.guard import IdGuard
from epbackend.kernels.triton.chip import Chip, chip_of
from epbackend.kernels.triton.sort import load_slots
from epbackend.kernels.triton.split.even import EvenSplit
from epbackend.kernels.triton.split.quota import own_quota, take
from epbackend.kernels.triton.split.seats import (
    BLOCK,
    Counted,
    copy_of_seat,
    count_all,
    empty_slots,
    find_seats,
    store_slots,
)
from epbackend.kernels.triton.split.shares import level_shares
from epbackend.kernels.triton.split.table import LevelTable

QUOTA_CELLS = 1024
"""Experts times copies times sources (or copies) whose quotas are worked out at a time: 8 values a thread."""

SOURCES = tl.constexpr(8)
"""Sources whose counts are added up at a time."""


def level_split(copies: LevelCopies, device: torch.device, guard: IdGuard | None, chip: Chip | None) -> Split:
    """See `epbackend.kernels.Kernels.level_split`; the sum of all counts is below 2^31."""
    table = LevelTable.of(copies, device)
    if not len(table.expert_X):  # copies of an expert on one rank only, of which the first takes all
        first_E1 = copies.slot_ids_EC[:, :1]
        return EvenSplit(EvenCopies(first_E1, first_E1 >= 0), device, guard)
    return LevelSplit(copies, table, guard, chip)


class LevelSplit:
    """A layer with experts on several ranks."""

    def __init__(
        self, copies: LevelCopies, table: LevelTable, guard: IdGuard | None, chip: Chip | None
    ) -> None:
        self._copies, self._table, self._guard, self._chip = copies, table, guard, chip

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        if self._guard:
            self._guard.report()
        experts, slot_ids_TK = len(self._table.first_slot_E), empty_slots(topk_ids_TK)
        counted = Counted.of(topk_ids_TK.contiguous().view(-1), experts)
        counts_GE = self._copies.gather(counted.counts_E(experts)) if self._copies.gather else None
        if len(counted.ids_S):
            self._seat(counted, counts_GE, slot_ids_TK)
        return slot_ids_TK

    def _seat(self, counted: Counted, counts_GE: Tensor | None, slot_ids_TK: Tensor) -> None:
        table, copies = self._table, self._copies
        (replicated, most), (ranks, single) = table.ranks_XC.shape, table.single_RJ.shape
        xs, cs = triton.next_power_of_2(replicated), triton.next_power_of_2(most)
        sources = 1 if counts_GE is None else len(counts_GE)
        gs = triton.next_power_of_2(sources)
        chip = self._chip or chip_of(counted.ids_S.device)
        _level_slots[(min(counted.blocks, chip.sms),)](
            counted.ids_S,
            counted.totals_E,
            counted.before_BE,
            counts_GE,
            0 if counts_GE is None else counts_GE.stride(0),
            table.first_slot_E,
            table.replicated_E,
            table.single_RJ,
            table.expert_X,
            table.slots_XC,
            table.ranks_XC,
            table.sources_XC,
            self._guard.found_1 if self._guard else None,
            slot_ids_TK,
            len(counted.ids_S),
            counted.blocks,
            len(table.first_slot_E),
            sources,
            copies.source,
            copies.node_sources or sources,
            ranks,
            single,
            replicated,
            most,
            triton.next_power_of_2(ranks),
            triton.next_power_of_2(max(1, single)),
            xs,
            cs,
            gs,
            max(1, min(xs, QUOTA_CELLS // (cs * max(cs, gs)))),
            triton.next_power_of_2(len(table.first_slot_E) + 1),
            counted.all,
            BLOCK,
        )


@triton.jit(do_not_specialize=["S", "blocks", "source", "node", "stride"])
def _level_slots(
    ids_S,
    totals_E,
    before_BE,
    counts_GE,
    stride,
    first_slot_E,
    replicated_E,
    single_RJ,
    expert_X,
    slots_XC,
    ranks_XC,
    sources_XC,
    found_1,
    slot_ids_S,
    S,
    blocks,
    E,
    G,
    source,
    node,
    R,
    J,
    X,
    C,
    RS: tl.constexpr,
    JS: tl.constexpr,
    XS: tl.constexpr,
    CS: tl.constexpr,
    GS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """XS, CS, ... are powers of two that hold X, C, ..."""
    lane = tl.arange(0, LANES)
    if counts_GE is not None:
        tokens = _add_sources(counts_GE, stride, E, G, LANES)
    elif ALL:
        tokens = tl.where(lane < E, count_all(ids_S, S, E, LANES, ALL), 0)
    else:
        tokens = tl.load(totals_E + lane, mask=lane < E, other=0).to(tl.int32)
    quota = level_shares(tokens, single_RJ, expert_X, ranks_XC, R, J, X, C, RS, JS, XS, CS)
    if counts_GE is not None:
        quota = own_quota(
            quota, counts_GE, stride, expert_X, sources_XC, source, node, G, X, C, XS, CS, GS, CHUNK
        )
    slot_of_first = tl.load(first_slot_E)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        choice = block * BLOCK + tl.arange(0, BLOCK)
        expert = load_slots(ids_S, choice, S, E)
        seat, _ = find_seats(ids_S, totals_E, before_BE, block, expert, S, E, LANES, ALL, BLOCK)
        x = tl.load(replicated_E + expert, mask=expert < E, other=-1)
        place = tl.maximum(x, 0)[:, None] * CS + tl.arange(0, CS)[None, :]
        taken = copy_of_seat(take(quota, place, XS * CS, BLOCK, CS), seat)
        slot = tl.load(first_slot_E + expert, mask=(expert < E) & (x < 0), other=0)
        shared = tl.load(slots_XC + x * C + taken, mask=(x >= 0) & (taken < C), other=0)
        store_slots(slot_ids_S, tl.where(x >= 0, shared, slot), slot_of_first, ids_S, found_1, choice, S, E)


@triton.jit
def _add_sources(counts_GE, stride, E, G, LANES: tl.constexpr):
    """Choices of each lane's expert, over all sources."""
    lane = tl.arange(0, LANES)[None, :]
    tokens = tl.zeros((LANES,), tl.int32)
    for start in range(0, G, SOURCES):
        source = (start + tl.arange(0, SOURCES))[:, None]
        counts = counts_GE + source.to(tl.int64) * stride + lane
        tokens += tl.sum(tl.load(counts, mask=(source < G) & (lane < E), other=0).to(tl.int32), 0)
    return tokens
