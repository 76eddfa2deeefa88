"""Where experts live: the map from physical slots to logical experts, with any number of copies of each.

Slots are numbered over all ranks: with P slots on R ranks, rank r holds slots [r * P/R, (r + 1) * P/R).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from epbackend.errors import ConfigError


@dataclass(frozen=True)
class SlotMap:
    """Slot -> logical expert. Every expert has one slot at least; every rank has as many slots as the others.

    Raises ConfigError for a map that leaves an expert out or cannot be cut into equal parts.
    """

    slot_to_expert_P: tuple[int, ...]
    ranks: int

    def __post_init__(self) -> None:
        experts_P = self.slot_to_expert_P
        if self.ranks < 1 or not experts_P or len(experts_P) % self.ranks:
            raise ConfigError(
                f"slot map: {len(experts_P)} slots cannot be spread evenly over {self.ranks} ranks (ep_size); "
                "make the number of slots a multiple of the ranks"
            )
        if min(experts_P) < 0:
            raise ConfigError(
                f"slot map: slot {experts_P.index(min(experts_P))} names expert {min(experts_P)}"
            )
        if missing := sorted(set(range(max(experts_P) + 1)) - set(experts_P)):
            raise ConfigError(
                f"slot map: no slot holds expert {missing[0]} ({len(missing)} experts have none)"
            )

    @classmethod
    def uniform(cls, experts: int, ranks: int) -> SlotMap:
        """One slot an expert, in the experts' order."""
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
        """slot_ids_TK (int64) for logical ids in [0, E): the choices of an expert take its copies in turn.

        Which copy has the first turn follows from the ids themselves: ranks that hold the same tokens agree without
        a word, and ranks that hold different ones do not all begin with the same copy.
        """
        copies_E, slots_EC = _tables(self.slot_to_expert_P, topk_ids_TK.device)
        if slots_EC.shape[1] == 1:
            return slots_EC.take(topk_ids_TK.long())
        ids_S = topk_ids_TK.reshape(-1).long()
        turn_S = (_nth_occurrence(ids_S, self.experts) + ids_S.sum()) % copies_E[ids_S]
        return slots_EC[ids_S, turn_S].view(topk_ids_TK.shape)


def _nth_occurrence(ids_S: Tensor, experts: int) -> Tensor:
    """How often each entry's value came before it: [5, 3, 5, 5] -> [0, 0, 1, 2]."""
    counts_E = torch.bincount(ids_S, minlength=experts)
    starts_E = counts_E.cumsum(0) - counts_E
    order_S = ids_S.argsort(stable=True)
    rank_S = torch.arange(len(ids_S), device=ids_S.device) - starts_E[ids_S[order_S]]
    return torch.empty_like(ids_S).scatter_(0, order_S, rank_S)


@lru_cache(maxsize=64)
def _tables(slot_to_expert_P: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """copies_E: how many slots each expert has. slots_EC: which, C being the most copies; shorter rows are padded."""
    slots_of: list[list[int]] = [[] for _ in range(max(slot_to_expert_P) + 1)]
    for slot, expert in enumerate(slot_to_expert_P):
        slots_of[expert].append(slot)
    most = max(map(len, slots_of))
    slots_EC = torch.tensor([slots + [-1] * (most - len(slots)) for slots in slots_of], device=device)
    return torch.tensor([len(slots) for slots in slots_of], device=device), slots_EC
