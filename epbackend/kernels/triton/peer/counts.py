"""Every rank learns how many choices of every rank fell on each slot."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.peer.mirror import Mirror, reach
from epbackend.kernels.triton.permute import count_in_blocks


def publish_counts(slot_ids_TK: Tensor, tokens: int, table: Mirror, rank: int) -> Tensor:
    """Write this rank's row of every rank's table (int32 [R, P + 1]): its counts of all slots, and `tokens`.

    Returns before_BP (int32): of each block of `permute.BLOCK` choices, how many earlier choices fell on each slot.
    """
    ranks, columns = table.mine.shape
    totals_P, before_BP = count_in_blocks(slot_ids_TK.contiguous().view(-1), columns - 1)
    _publish[(ranks,)](
        totals_P,
        table.addresses_R,
        table.mine,
        tokens,
        rank,
        columns - 1,
        triton.next_power_of_2(columns),
    )
    return before_BP


@triton.jit(do_not_specialize=["tokens", "rank"])
def _publish(totals_P, addresses_R, table_RC, tokens, rank, P, LANES: tl.constexpr):
    """One receiving rank: the row that this rank has there."""
    lane = tl.arange(0, LANES)
    totals = tl.load(totals_P + lane, mask=lane < P, other=0).to(tl.int32)
    row = reach(addresses_R, tl.program_id(0), table_RC) + rank * (P + 1)
    tl.store(row + lane, tl.where(lane < P, totals, tokens), mask=lane <= P)
