"""From how many tokens a copy takes to which ones.

The n choices of an expert sit down on n seats, its copies' quotas side by side; the i-th one takes seat i * STRIDE % n,
so that copies alternate along the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.permute import BLOCK, count_in_blocks
from epbackend.kernels.triton.sort import load_slots
from epbackend.kernels.triton.split.table import SplitTable

STRIDE = tl.constexpr(3762083063)
"""The prime of `epbackend.placement.split.assign`."""


def assign(topk_ids_TK: Tensor, quota_XC: Tensor, table: SplitTable) -> Tensor:
    """slot_ids_TK (int64); -1 for ids that are no expert's."""
    ids_S = topk_ids_TK.reshape(-1)
    experts, copies = len(table.slot_E), quota_XC.shape[1]
    slot_ids_S = torch.empty(len(ids_S), dtype=torch.int64, device=ids_S.device)
    if len(ids_S):
        totals_E, before_BE = count_in_blocks(ids_S, experts)
        _assign[(len(before_BE),)](
            ids_S,
            totals_E,
            before_BE,
            table.slot_E,
            table.replicated_E,
            table.slots_XC,
            quota_XC,
            slot_ids_S,
            len(ids_S),
            experts,
            copies,
            triton.next_power_of_2(copies),
            BLOCK,
        )
    return slot_ids_S.view(topk_ids_TK.shape)


@triton.jit(do_not_specialize=["S"])
def _assign(
    ids_S,
    totals_E,
    before_BE,
    slot_E,
    replicated_E,
    slots_XC,
    quota_XC,
    slot_ids_S,
    S,
    E,
    C,
    CS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of choices."""
    block = tl.program_id(0)
    nth = tl.arange(0, BLOCK)
    choice = block * BLOCK + nth
    expert = load_slots(ids_S, choice, S, E)
    known = expert < E
    twins = (expert[:, None] == expert[None, :]) & (nth[None, :] < nth[:, None])
    before = tl.load(before_BE + block.to(tl.int64) * E + expert, mask=known, other=0)
    occurrence = (before + tl.sum(twins.to(tl.int32), 1)).to(tl.int64)
    seat = occurrence * STRIDE % tl.load(totals_E + expert, mask=known, other=1)
    x = tl.load(replicated_E + expert, mask=known, other=-1)
    copy = tl.arange(0, CS)
    replicated = (x >= 0)[:, None] & (copy < C)[None, :]
    quota = tl.load(quota_XC + x[:, None] * C + copy[None, :], mask=replicated, other=0)
    passed = (tl.cumsum(quota, 1) <= seat[:, None]) & replicated
    taken = tl.sum(passed.to(tl.int32), 1)
    first_slot = tl.load(slot_E + expert, mask=known, other=-1)
    slot = tl.load(slots_XC + x * C + taken, mask=(x >= 0) & (taken < C), other=-1)
    tl.store(slot_ids_S + choice, tl.where(x >= 0, slot, first_slot), mask=choice < S)
