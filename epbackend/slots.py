"""Where experts live: the map from physical slots to logical experts, any number of copies each.

Slots are numbered over all ranks: with P slots on R ranks, rank r holds slots [r * P/R, (r + 1) * P/R).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from epbackend.errors import ConfigError


@dataclass(frozen=True)
class SlotMap:
    """slot -> logical expert. Every expert has a slot at least; every rank has as many slots as the others."""

    slot_to_expert_P: tuple[int, ...]
    ranks: int

    def __post_init__(self) -> None:
        slots = len(self.slot_to_expert_P)
        if self.ranks < 1 or slots == 0 or slots % self.ranks:
            raise ConfigError(f"{slots} slots cannot be spread evenly over {self.ranks} ranks")
        present = set(self.slot_to_expert_P)
        if missing := sorted(set(range(max(present) + 1)) - present):
            raise ConfigError(f"experts {missing[:8]} have no slot")
        if min(present) < 0:
            raise ConfigError(f"slot {self.slot_to_expert_P.index(min(present))} names expert {min(present)}")

    @classmethod
    def uniform(cls, experts: int, ranks: int) -> SlotMap:
        """One slot an expert, in the experts' order."""
        if ranks < 1 or experts % ranks:
            raise ConfigError(f"{experts} experts cannot be spread evenly over {ranks} ranks (ep_size)")
        return cls(tuple(range(experts)), ranks)

    @property
    def experts(self) -> int:
        """E: logical experts."""
        return max(self.slot_to_expert_P) + 1

    @property
    def slots_per_rank(self) -> int:
        """L: slots of each rank."""
        return len(self.slot_to_expert_P) // self.ranks

    def local_experts(self, rank: int) -> tuple[int, ...]:
        """The logical expert in each slot of `rank`."""
        first = rank * self.slots_per_rank
        return self.slot_to_expert_P[first : first + self.slots_per_rank]

    def assign(self, topk_ids_TK: Tensor) -> Tensor:
        """slot_ids_TK for logical ids; an expert's choices go round its copies.

        The copy that comes first depends on the ids alone: ranks that hold the same tokens agree, and ranks that hold
        different ones do not all begin with the same copy.
        """
        copies_E, slots_EC = (table.to(topk_ids_TK.device) for table in self._tables)
        if slots_EC.shape[1] == 1:
            return slots_EC[:, 0][topk_ids_TK]
        flat_S = topk_ids_TK.reshape(-1)
        order_S = flat_S.argsort(stable=True)
        starts_E = torch.bincount(flat_S, minlength=self.experts).cumsum(0).roll(1)
        starts_E[0] = 0
        turn_S = torch.empty_like(flat_S)
        turn_S[order_S] = torch.arange(len(flat_S), device=flat_S.device) - starts_E[flat_S[order_S]]
        copy_S = (turn_S + flat_S.sum()) % copies_E[flat_S]
        return slots_EC[flat_S, copy_S].view_as(topk_ids_TK)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """copies_E: how many slots each expert has. slots_EC: which; the rows of experts with fewer are padded."""
        slots_of = [[] for _ in range(self.experts)]
        for slot, expert in enumerate(self.slot_to_expert_P):
            slots_of[expert].append(slot)
        copies_E = torch.tensor([len(slots) for slots in slots_of])
        most = int(copies_E.max())
        return copies_E, torch.tensor([slots + [-1] * (most - len(slots)) for slots in slots_of])
