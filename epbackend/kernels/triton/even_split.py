"""The split `even` (and `nearest`) on the device, and what `level_split.py` shares with it: from quotas to slots.

One launch and nothing read back, integer for integer what `epbackend.placement.replica_split` computes on a CPU, so
that ranks of either kind agree. The n choices of an expert have positions 0 to n - 1, its replicas' quotas side by
side; the i-th one gets position i * STRIDE % n, so that replicas alternate along the batch. With n = 5:

    i         0  1  2  3  4
    position  0  3  1  4  2
    replica   0  1  0  1  0      quotas 3 and 2: positions 0 to 2 are the first replica's

The kernel counts the choices of a batch itself while they are few (`permute.MOST_CHOICES`); with more, two launches
count them first.

Shapes: S choices, E experts, C replicas of an expert, B blocks of choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.id_check import NOTHING as NO_ID
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.replica_split import EvenReplicas, fill
from epbackend.kernels.triton.launch import cdiv, named_launch, next_power_of_2
from epbackend.kernels.triton.permute import MOST_CHOICES, count, count_in_blocks, earlier_twins, load_slots
from epbackend.placement.replica_split import STRIDE as PRIME

STRIDE = tl.constexpr(PRIME)
NOTHING = tl.constexpr(NO_ID)

BLOCK = 32
"""Choices that one program places at a time; it compares each with each."""


@dataclass(frozen=True)
class ExpertCounts:
    """The choices of a batch, and their counts where they are too many for each program to count them itself."""

    ids_S: Tensor
    totals_E: Tensor | None
    """int64."""
    before_BE: Tensor | None
    """int32: in the blocks before each block."""
    all: int
    """A power of two that holds all choices; 0 where they are counted already."""

    @classmethod
    def of(cls, ids_S: Tensor, experts: int) -> ExpertCounts:
        if len(ids_S) <= MOST_CHOICES:
            return cls(ids_S, None, None, next_power_of_2(max(BLOCK, len(ids_S))))
        totals_E, before_BE = count_in_blocks(ids_S, experts, BLOCK)
        return cls(ids_S, totals_E, before_BE, 0)

    def counts_E(self, experts: int) -> Tensor:
        """int64."""
        return count(self.ids_S, experts) if self.totals_E is None else self.totals_E

    @property
    def blocks(self) -> int:
        return cdiv(len(self.ids_S), BLOCK)


@triton.jit
def count_all(ids_S, S, E, LANES: tl.constexpr, ALL: tl.constexpr):
    """How many choices each lane's expert has; lane E counts the ids that are no expert's."""
    return tl.histogram(load_slots(ids_S, tl.arange(0, ALL), S, E), LANES)


@triton.jit
def positions_of_choices(
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
    """(position of each choice of a block within its expert, choices of that expert); `expert` is E for no expert."""
    known = expert < E
    if ALL:
        each = tl.arange(0, ALL)
        earlier = tl.where(each < block * BLOCK, load_slots(ids_S, each, S, E), E)
        total = tl.gather(count_all(ids_S, S, E, LANES, ALL), expert, 0)
        before = tl.gather(tl.histogram(earlier, LANES), expert, 0)
    else:
        total = tl.load(totals_E + expert, mask=known, other=1).to(tl.int32)
        row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64) // BLOCK
        before = tl.load(before_BE + row * E + expert, mask=known, other=0)
    nth = (before + earlier_twins(expert, BLOCK)).to(tl.int64)
    total = tl.where(known, total, 1)
    return (nth * STRIDE % total).to(tl.int32), total


@triton.jit
def replica_of_position(quota, position):
    """Which replica each choice takes; `quota` has a row for each choice."""
    return tl.sum((tl.cumsum(quota, 1) <= position[:, None]).to(tl.int32), 1)


@triton.jit
def store_slots(slot_ids_S, slot, slot_of_first, ids_S, found_1, choice, S, E):
    """Store the slots. A choice of no expert gets a slot of the first one, and its id goes to the `ExpertIdCheck`."""
    ids = tl.load(ids_S + choice, mask=choice < S, other=0).to(tl.int64)
    outside = (ids < 0) | (ids >= E)
    tl.store(slot_ids_S + choice, tl.where(outside, slot_of_first, slot), mask=choice < S)
    if found_1 is not None:
        largest = tl.max(tl.where(outside, ids, NOTHING))
        tl.store(found_1, largest, mask=largest != NOTHING)


def empty_slots(topk_ids_TK: Tensor) -> Tensor:
    """slot_ids_TK (int64), uninitialised."""
    return torch.empty(topk_ids_TK.shape, dtype=torch.int64, device=topk_ids_TK.device)


FEW = 512
"""Choices that one warp counts in its registers."""


class EvenSplit:
    """See `epbackend.kernels.Kernels.even_split`."""

    def __init__(self, replicas: EvenReplicas, device: torch.device, id_check: ExpertIdCheck | None) -> None:
        self._id_check = id_check
        self._experts, self._most = replicas.slot_ids_EC.shape
        self._tables = {
            "slot_ids_EC": torch.tensor(replicas.slot_ids_EC, dtype=torch.int64, device=device),
            "place_EC": torch.tensor(replicas.place_EC, dtype=torch.int32, device=device),
            "takers_E": torch.tensor(replicas.takers_E, dtype=torch.int32, device=device),
            "calls_2": torch.zeros(2, dtype=torch.int64, device=device),
        }
        self._launch = _even_slots.bind(
            **self._tables,
            found_1=id_check.found_1 if id_check else None,
            E=self._experts,
            C=self._most,
            CS=next_power_of_2(self._most),
            LANES=next_power_of_2(self._experts + 1),
            BLOCK=BLOCK,
        )

    def become(self, other: EvenSplit) -> None:
        fill(self._tables.values(), other._tables.values())

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        if self._id_check:
            self._id_check.report()
        slot_ids_TK = empty_slots(topk_ids_TK)
        if topk_ids_TK.numel():
            ids_S = topk_ids_TK.contiguous().view(-1)
            counts = ExpertCounts(ids_S, None, None, 0)
            if self._most > 1:  # otherwise there is nothing to choose
                counts = ExpertCounts.of(ids_S, self._experts)
            self._launch[(counts.blocks,)](
                ids_S=ids_S,
                totals_E=counts.totals_E,
                before_BE=counts.before_BE,
                slot_ids_S=slot_ids_TK,
                S=len(ids_S),
                ALL=counts.all,
                num_warps=1 if counts.all <= FEW else 4,
            )
        return slot_ids_TK


@named_launch
@triton.jit(do_not_specialize=["S"])
def _even_slots(
    ids_S,
    totals_E,
    before_BE,
    slot_ids_EC,
    place_EC,
    takers_E,
    calls_2,
    found_1,
    slot_ids_S,
    S,
    E,
    C: tl.constexpr,
    CS: tl.constexpr,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of choices; CS is a power of two that holds C.

    calls_2: earlier calls, and programs of this call that have finished.
    """
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    expert = load_slots(ids_S, choice, S, E)
    known = expert < E
    replica = tl.zeros_like(expert)
    if C > 1:
        calls = tl.load(calls_2)
        position, total = positions_of_choices(
            ids_S, totals_E, before_BE, block, expert, S, E, LANES, ALL, BLOCK
        )
        takers = tl.load(takers_E + expert, mask=known, other=1)
        each = tl.arange(0, CS)[None, :]
        place = expert[:, None] * C + each
        place = tl.load(place_EC + place, mask=known[:, None] & (each < C), other=-1)
        taking = place >= 0
        place -= (calls % takers).to(tl.int32)[:, None]
        place = tl.where(place < 0, place + takers[:, None], place)
        more = (place < (total % takers)[:, None]).to(tl.int32)
        quota = tl.where(taking, (total // takers)[:, None] + more, 0)
        replica = replica_of_position(quota, position)
        # The last program counts this call, when all have read the number of earlier ones.
        tl.debug_barrier()
        if tl.atomic_add(calls_2 + 1, 1) == tl.num_programs(0) - 1:
            tl.store(calls_2, calls + 1)
            tl.store(calls_2 + 1, 0)
    slot = tl.load(slot_ids_EC + expert * C + replica, mask=known & (replica < C), other=0)
    store_slots(slot_ids_S, slot, tl.load(slot_ids_EC), ids_S, found_1, choice, S, E)
