"""Where experts live, as the data path numbers it: every rank has its slots, and every slot an id.

With L slots on the rank that has most, rank r's slots are r * L, r * L + 1, ...: so `id // L` is a slot's rank and
`id % L` its place there, also where ranks have unequal numbers. Ids past a rank's last slot are never given to a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from epbackend.placement.layout import Layout


@dataclass(frozen=True)
class SlotMap:
    """The layout of one layer, and the ids of its slots."""

    layout: Layout
    node_size: int = 0
    """Ranks of a node, whose ranks reach each other faster; 0: all ranks are one node."""

    @classmethod
    def uniform(cls, experts: int, ranks: int) -> SlotMap:
        """One slot an expert, in the experts' order; ranks get equal numbers, or numbers that differ by one."""
        return cls(Layout.even(experts, ranks))

    @classmethod
    def of(cls, slot_to_expert_P: Sequence[int], ranks: int) -> SlotMap:
        """The logical expert of each slot, rank by rank, equally many on each.

        Raises ConfigError for a map that leaves an expert out or cannot be cut into equal parts.
        """
        return cls(Layout.of(slot_to_expert_P, ranks, max(slot_to_expert_P, default=-1) + 1))

    @property
    def ranks(self) -> int:
        """R."""
        return self.layout.ranks

    @property
    def experts(self) -> int:
        """E: logical experts."""
        return self.layout.experts

    @cached_property
    def slots_per_rank(self) -> int:
        """L: slots of the rank that has most, which is how far apart the ranks' ids are."""
        return int(self.layout.slots_R.max())

    def local_experts(self, rank: int) -> tuple[int, ...]:
        """The logical expert in each slot of `rank`: L of them, or fewer."""
        return self.layout.experts_of_rank[rank]

    @cached_property
    def slot_ids_EC(self) -> np.ndarray:
        """The ids of each expert's slots in ascending order, int64; C is the most copies, shorter rows end in -1."""
        layout = self.layout
        first_R = np.cumsum(layout.slots_R) - layout.slots_R
        place_P = np.arange(layout.slots) - first_R[layout.rank_of_slot_P]
        ids_P = layout.rank_of_slot_P * self.slots_per_rank + place_P
        return np.where(layout.slots_EC < 0, -1, ids_P[layout.slots_EC])
