"""From how many tokens a copy takes to which ones: what both splits share.

The n choices of an expert sit down on n seats, its copies' quotas side by side; the i-th one takes seat i * STRIDE % n,
so that copies alternate along the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.guard import NOTHING as NO_ID
from epbackend.kernels.triton.permute import count, count_in_blocks
from epbackend.kernels.triton.permute_few import MOST_CHOICES
from epbackend.kernels.triton.sort import load_slots

STRIDE = tl.constexpr(3762083063)
"""The prime of `epbackend.placement.split.assign`."""

NOTHING = tl.constexpr(NO_ID)

BLOCK = 32
"""Choices that one program seats at a time; it compares each with each."""


@dataclass(frozen=True)
class Counted:
    """The choices of a batch, and their counts where a program cannot find them by the way."""

    ids_S: Tensor
    totals_E: Tensor | None
    """int64."""
    before_BE: Tensor | None
    """int32: in the blocks before each block."""
    all: int
    """A power of two that holds all choices; 0 where they are counted already."""

    @classmethod
    def of(cls, ids_S: Tensor, experts: int) -> Counted:
        if len(ids_S) <= MOST_CHOICES:
            return cls(ids_S, None, None, triton.next_power_of_2(max(BLOCK, len(ids_S))))
        totals_E, before_BE = count_in_blocks(ids_S, experts, BLOCK)
        return cls(ids_S, totals_E, before_BE, 0)

    def counts_E(self, experts: int) -> Tensor:
        """int64."""
        return count(self.ids_S, experts) if self.totals_E is None else self.totals_E

    @property
    def blocks(self) -> int:
        return triton.cdiv(len(self.ids_S), BLOCK)


@triton.jit
def count_all(ids_S, S, E, LANES: tl.constexpr, ALL: tl.constexpr):
    """How many choices each lane's expert has; lane E takes the ids that are no expert's."""
    return tl.histogram(load_slots(ids_S, tl.arange(0, ALL), S, E), LANES)


@triton.jit
def find_seats(
    ids_S,
    totals_E,
    before_BE,
    block,
    expert,
    S,
    E,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(seat of each choice of a block among its expert's, how many seats there are); `expert` is E for no expert."""
    nth = tl.arange(0, BLOCK)
    known = expert < E
    if ALL:
        each = tl.arange(0, ALL)
        earlier = tl.where(each < block * BLOCK, load_slots(ids_S, each, S, E), E)
        seats = tl.gather(count_all(ids_S, S, E, LANES, ALL), expert, 0)
        before = tl.gather(tl.histogram(earlier, LANES), expert, 0)
    else:
        seats = tl.load(totals_E + expert, mask=known, other=1).to(tl.int32)
        row = (block * BLOCK + nth).to(tl.int64) // BLOCK
        before = tl.load(before_BE + row * E + expert, mask=known, other=0)
    twins = (expert[:, None] == expert[None, :]) & (nth[None, :] < nth[:, None])
    occurrence = (before + tl.sum(twins.to(tl.int32), 1)).to(tl.int64)
    seats = tl.where(known, seats, 1)
    return (occurrence * STRIDE % seats).to(tl.int32), seats


@triton.jit
def copy_of_seat(quota, seat):
    """Which copy each choice takes; `quota` has a row for each choice."""
    return tl.sum((tl.cumsum(quota, 1) <= seat[:, None]).to(tl.int32), 1)


@triton.jit
def store_slots(slot_ids_S, slot, slot_of_first, ids_S, found_1, choice, S, E):
    """Store the slots. A choice of no expert goes to a slot of the first one, and its id to the guard."""
    ids = tl.load(ids_S + choice, mask=choice < S, other=0).to(tl.int64)
    wild = (ids < 0) | (ids >= E)
    tl.store(slot_ids_S + choice, tl.where(wild, slot_of_first, slot), mask=choice < S)
    if found_1 is not None:
        largest = tl.max(tl.where(wild, ids, NOTHING))
        tl.store(found_1, largest, mask=largest != NOTHING)


def empty_slots(topk_ids_TK: Tensor) -> Tensor:
    return torch.empty(topk_ids_TK.shape, dtype=torch.int64, device=topk_ids_TK.device)
