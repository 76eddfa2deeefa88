"""The slots of one layer: which logical expert each rank holds in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from epbackend.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """One layer of a placement. Slots are numbered over all ranks, rank by rank; ranks may have unequal numbers.

    Every expert in [0, experts) has one slot at least, and every rank one slot at least. Raises ConfigError otherwise.
    The derived arrays are computed once and cannot be written to.
    """

    experts_of_rank: tuple[tuple[int, ...], ...]
    """For each of the R ranks the logical experts in its slots, in order; lists become tuples."""
    experts: int
    """E: logical experts of the layer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts_of_rank", tuple(map(tuple, self.experts_of_rank)))
        if not self.experts_of_rank or self.experts < 1:
            raise ConfigError(
                f"layout: it has {self.ranks} ranks and {self.experts} experts; it needs one of both"
            )
        if () in self.experts_of_rank:
            raise ConfigError(
                f"layout: rank {self.experts_of_rank.index(())} has no slot; give every rank one at least"
            )
        held = set().union(*self.experts_of_rank)
        if not 0 <= min(held) <= max(held) < self.experts:
            outside = min(held) if min(held) < 0 else max(held)
            raise ConfigError(
                f"layout: a slot holds expert {outside}, but experts are numbered 0 to {self.experts - 1}"
            )
        if len(held) < self.experts:
            missing = next(expert for expert in range(self.experts) if expert not in held)
            raise ConfigError(
                f"layout: no slot holds expert {missing} ({self.experts - len(held)} experts have none); place every "
                "expert"
            )

    @classmethod
    def of(cls, slot_to_expert_P: Sequence[int] | np.ndarray, ranks: int, experts: int) -> Layout:
        """Slots in order, cut evenly: rank r holds slots [r * P / R, (r + 1) * P / R).

        Raises ConfigError where the ranks do not divide the slots.
        """
        slots = len(slot_to_expert_P)
        if ranks < 1 or slots % ranks:
            raise ConfigError(
                f"slots: {slots} cannot be spread evenly over {ranks} ranks; make them a multiple of the ranks"
            )
        held_RL = np.asarray(slot_to_expert_P, dtype=np.int64).reshape(ranks, slots // ranks)
        return cls(tuple(map(tuple, held_RL.tolist())), experts)

    @classmethod
    def even(cls, experts: int, ranks: int, slots: int | None = None) -> Layout:
        """What there is without planning: experts in order, and again from the first one while slots are left.

        `slots` (P) is E unless given. Ranks get equal numbers of slots, or numbers that differ by one.
        """
        slots = experts if slots is None else slots
        if slots < experts:
            raise ConfigError(f"slots: {slots} are fewer than the {experts} experts; every expert needs one")
        if slots < ranks:
            raise ConfigError(f"slots: {slots} are fewer than the {ranks} ranks; every rank needs one")
        bounds = [rank * slots // ranks for rank in range(ranks + 1)]
        held = (tuple(slot % experts for slot in range(*pair)) for pair in pairwise(bounds))
        return cls(tuple(held), experts)

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.experts_of_rank)

    @property
    def slots(self) -> int:
        """P: slots over all ranks."""
        return len(self.slot_to_expert_P)

    @property
    def duplicates_on_rank(self) -> int:
        """Slots whose expert has another slot on the same rank: copies that cannot share out any load."""
        return sum(len(held) - len(set(held)) for held in self.experts_of_rank)

    @cached_property
    def slots_R(self) -> np.ndarray:
        """Slots of each rank, int64."""
        return _frozen([len(held) for held in self.experts_of_rank])

    @cached_property
    def slot_to_expert_P(self) -> np.ndarray:
        """The logical expert of every slot, int64."""
        return _frozen([expert for held in self.experts_of_rank for expert in held])

    @cached_property
    def rank_of_slot_P(self) -> np.ndarray:
        """The rank of every slot, int64."""
        return _frozen(np.repeat(np.arange(self.ranks), self.slots_R))

    @cached_property
    def copies_E(self) -> np.ndarray:
        """How many slots hold each expert, int64."""
        return _frozen(np.bincount(self.slot_to_expert_P, minlength=self.experts))

    @cached_property
    def slots_EC(self) -> np.ndarray:
        """The slots of each expert in ascending order, int64; C is the most copies, and shorter rows end in -1."""
        slots_EC = np.full((self.experts, int(self.copies_E.max())), -1)
        order_P = np.argsort(self.slot_to_expert_P, kind="stable")
        first_E = np.cumsum(self.copies_E) - self.copies_E
        copy_P = np.arange(self.slots) - np.repeat(first_E, self.copies_E)
        slots_EC[self.slot_to_expert_P[order_P], copy_P] = order_P
        return _frozen(slots_EC)


def _frozen(values: object) -> np.ndarray:
    array = np.array(values, dtype=np.int64)
    array.flags.writeable = False
    return array
