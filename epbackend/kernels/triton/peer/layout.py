"""Where each choice's row lies on its expert's rank: sorted by slot, then by sending rank, then in the sender's order.

    counts_RP = [[2, 1], [3, 0]], one rank of two slots: slot 0 gets 2 rows from rank 0 and 3 from rank 1
    rows      = [0: slot 0 from rank 0, 0, 0: slot 0 from rank 1, 0, 0, 1: slot 1 from rank 0]
    bases_P   = [0, 5] on rank 0, [2, 6] on rank 1: where the first row that this rank sends to each slot lies

So the receiver needs no second sort. All ranks compute the same from the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.permute import BLOCK
from epbackend.kernels.triton.sort import earlier_twins, load_slots, store_counts


@dataclass(frozen=True)
class Layout:
    """What the table of counts says to one rank."""

    bases_P: Tensor
    """int64: the row of this rank's first choice of each slot, on the slot's rank."""
    counts_L: Tensor
    """int64: how many rows of the window each of this rank's slots gets from all ranks together."""
    needs_R2: Tensor
    """int64: the rows that each rank gets in all, and the tokens that it has left."""


def lay_out(table_RC: Tensor, rank: int, slots: int, window: tuple[int, int]) -> Layout:
    """`table_RC` is `counts.publish_counts`'s (C is P + 1), `window` the range of rows that `counts_L` tells of."""
    ranks, columns = table_RC.shape
    layout = Layout(
        bases_P=torch.empty(columns - 1, dtype=torch.int64, device=table_RC.device),
        counts_L=torch.empty(slots, dtype=torch.int64, device=table_RC.device),
        needs_R2=torch.empty(ranks, 2, dtype=torch.int64, device=table_RC.device),
    )
    _lay_out[(ranks,)](
        table_RC,
        layout.bases_P,
        layout.counts_L,
        layout.needs_R2,
        rank,
        *window,
        ranks,
        slots,
        triton.next_power_of_2(ranks),
        triton.next_power_of_2(slots),
    )
    return layout


@triton.jit(do_not_specialize=["rank", "first", "last"])
def _lay_out(
    table_RC,
    bases_P,
    counts_L,
    needs_R2,
    rank,
    first,
    last,
    ranks,
    slots,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The slots of one receiving rank."""
    receiver = tl.program_id(0)
    sender = tl.arange(0, RANKS)[:, None]
    lane = tl.arange(0, LANES)
    row = table_RC + sender * (ranks * slots + 1)
    inside = (sender < ranks) & (lane < slots)[None, :]
    counts = tl.load(row + receiver * slots + lane[None, :], mask=inside, other=0)
    totals = tl.sum(counts, 0)
    earlier_senders = tl.sum(tl.where(sender < rank, counts, 0), 0)
    bases = tl.cumsum(totals) - totals + earlier_senders
    tl.store(bases_P + receiver * slots + lane, bases.to(tl.int64), mask=lane < slots)
    tokens = tl.load(table_RC + receiver * (ranks * slots + 1) + ranks * slots)
    tl.store(needs_R2 + 2 * receiver, tl.sum(totals).to(tl.int64))
    tl.store(needs_R2 + 2 * receiver + 1, tokens.to(tl.int64))
    if receiver == rank:
        store_counts(counts_L, totals, first, last, slots, LANES)


def place(slot_ids_TK: Tensor, before_BP: Tensor, bases_P: Tensor) -> Tensor:
    """row_S (int64): the row of each choice on its slot's rank; -1 for choices of no slot."""
    row_S = torch.empty(slot_ids_TK.numel(), dtype=torch.int64, device=slot_ids_TK.device)
    if len(before_BP):
        ids_S = slot_ids_TK.contiguous().view(-1)
        _place[(len(before_BP),)](ids_S, before_BP, bases_P, row_S, len(ids_S), len(bases_P), BLOCK)
    return row_S


@triton.jit(do_not_specialize=["S"])
def _place(ids_S, before_BP, bases_P, row_S, S, P, BLOCK: tl.constexpr):
    """One block of choices."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    slot = load_slots(ids_S, choice, S, P)
    known = slot < P
    base = tl.load(bases_P + slot, mask=known, other=0)
    before = tl.load(before_BP + block.to(tl.int64) * P + slot, mask=known, other=0)
    row = base + before + earlier_twins(slot, BLOCK)
    tl.store(row_S + choice, tl.where(known, row, -1), mask=choice < S)
