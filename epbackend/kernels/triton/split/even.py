"""`even` and `nearest`: equal quotas for the copies that take any, or quotas that differ by one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.copies import EvenCopies
from epbackend.kernels.guard import IdGuard
from epbackend.kernels.triton.sort import load_slots
from epbackend.kernels.triton.split.seats import (
    BLOCK,
    Counted,
    copy_of_seat,
    empty_slots,
    find_seats,
    store_slots,
)

FEW = 512
"""Choices that one warp counts in its registers."""


class EvenSplit:
    """See `epbackend.kernels.Kernels.even_split`."""

    def __init__(self, copies: EvenCopies, device: torch.device, guard: IdGuard | None) -> None:
        self._guard = guard
        self._slot_ids_EC = torch.tensor(copies.slot_ids_EC, device=device)
        self._place_EC, self._takers_E = (
            torch.tensor(table, dtype=torch.int32, device=device)
            for table in (copies.place_EC, copies.takers_E)
        )
        self._turn_2 = torch.zeros(2, dtype=torch.int64, device=device)

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        if self._guard:
            self._guard.report()
        (experts, copies), slot_ids_TK = self._slot_ids_EC.shape, empty_slots(topk_ids_TK)
        if topk_ids_TK.numel():
            ids_S = topk_ids_TK.contiguous().view(-1)
            counted = Counted.of(ids_S, experts) if copies > 1 else Counted(ids_S, None, None, 0)
            _even_slots[(counted.blocks,)](
                ids_S,
                counted.totals_E,
                counted.before_BE,
                self._slot_ids_EC,
                self._place_EC,
                self._takers_E,
                self._turn_2,
                self._guard.found_1 if self._guard else None,
                slot_ids_TK,
                len(ids_S),
                experts,
                copies,
                triton.next_power_of_2(copies),
                triton.next_power_of_2(experts + 1),
                counted.all,
                BLOCK,
                num_warps=1 if counted.all <= FEW else 4,
            )
        return slot_ids_TK


@triton.jit(do_not_specialize=["S"])
def _even_slots(
    ids_S,
    totals_E,
    before_BE,
    slot_ids_EC,
    place_EC,
    takers_E,
    turn_2,
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
    """One block of choices. turn_2: calls so far, and programs of this call that have finished."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    expert = load_slots(ids_S, choice, S, E)
    known = expert < E
    copy = tl.zeros_like(expert)
    if C > 1:
        turn = tl.load(turn_2)
        seat, seats = find_seats(ids_S, totals_E, before_BE, block, expert, S, E, LANES, ALL, BLOCK)
        takers = tl.load(takers_E + expert, mask=known, other=1)
        each = tl.arange(0, CS)[None, :]
        place = expert[:, None] * C + each
        place = tl.load(place_EC + place, mask=known[:, None] & (each < C), other=-1)
        taking = place >= 0
        place -= (turn % takers).to(tl.int32)[:, None]
        place = tl.where(place < 0, place + takers[:, None], place)
        more = (place < (seats % takers)[:, None]).to(tl.int32)
        copy = copy_of_seat(tl.where(taking, (seats // takers)[:, None] + more, 0), seat)
        # The last program moves the turn on, when all have read it.
        tl.debug_barrier()
        if tl.atomic_add(turn_2 + 1, 1) == tl.num_programs(0) - 1:
            tl.store(turn_2, turn + 1)
            tl.store(turn_2 + 1, 0)
    slot = tl.load(slot_ids_EC + expert * C + copy, mask=known & (copy < C), other=0)
    store_slots(slot_ids_S, slot, tl.load(slot_ids_EC), ids_S, found_1, choice, S, E)
