"""From the logical experts that a router chose to the slots where their tokens go.

`SlotMap` is where the experts of one layer live, as the data path numbers it: every rank has its slots, and every slot
an id. With L slots on the rank that has most, rank r's slots are r * L, r * L + 1, ...: so `id // L` is a slot's rank
and `id % L` its place there, also where ranks have unequal numbers. Ids past a rank's last slot are
never given to a token.

`TokenSplit` says which replica of its expert a token takes, batch by batch: `epbackend.placement.replica_split` on
tensors, between ranks. A *source* is a group of ranks that hold the same tokens (one rank, without attention tensor
parallelism). All of them get the same answer, and only `level` and `level_by_node` have to ask the other
sources anything: what their tokens chose.

Letters of shapes: T tokens of this rank, K choices of a token, E logical experts, C replicas of an expert, P slots over
all ranks, R ranks, L slots of one rank, G sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from epbackend.dispatch.base import LayerSpec, RankGroup
from epbackend.dispatch.collectives import Collectives
from epbackend.errors import ConfigError
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas, Split
from epbackend.names import LEVEL_BY_NODE, LEVELLING, SPLITS
from epbackend.placement.placement import Layout
from epbackend.placement.replica_split import nearest_replicas


@dataclass(frozen=True)
class SlotMap:
    """The layout of one layer, and the ids of its slots."""

    layout: Layout
    node_size: int = 0
    """Ranks of a node, whose ranks reach each other faster; 0: all ranks are one node."""
    rank_speed: tuple[float, ...] = ()
    """Speeds of the ranks beside the fastest one, which the splits that level heed; empty: equally fast."""

    @classmethod
    def uniform(cls, experts: int, ranks: int) -> SlotMap:
        """One slot an expert, in the experts' order; ranks get equal numbers, or numbers that differ by one."""
        return cls(Layout.even(experts, ranks))

    @classmethod
    def of(cls, slot_to_expert_P: Sequence[int], ranks: int) -> SlotMap:
        """The logical expert of each slot, rank by rank, equally many on each.

        Raises:
            ConfigError: the map leaves an expert out, or cannot be cut into equal parts.
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

    @property
    def most_replicas(self) -> int:
        """The most that an expert can have in any layout of the same slots."""
        return self.layout.slots - self.experts + 1

    @cached_property
    def slot_ids_EC(self) -> np.ndarray:
        """The ids of each expert's slots in ascending order, int64; C is the most replicas, shorter rows end in -1."""
        layout = self.layout
        place_P = np.arange(layout.slots) - layout.first_R[layout.rank_of_slot_P]
        ids_P = layout.rank_of_slot_P * self.slots_per_rank + place_P
        return np.where(layout.slots_EC < 0, -1, ids_P[layout.slots_EC])


class TokenSplit:
    """Finds a slot for every choice of one layer's tokens."""

    def __init__(
        self, name: str, slot_map: SlotMap, spec: LayerSpec, check_ids: bool = True, movable: bool = False
    ) -> None:
        """With `check_ids` the ids that no expert has are found; `movable`: see `become`.

        Raises:
            ConfigError: there is no split of that name.
        """
        if name not in SPLITS:
            raise ConfigError(f"split {name!r} is unknown; it is one of {', '.join(SPLITS)}")
        self._kernels, self._layer, self._check_ids = spec.kernels, spec.layer, check_ids
        self._experts, self._movable = slot_map.experts, movable
        self._replicas = _replicas(name, slot_map, spec, movable)
        self._split: Split | None = None

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        """slot_ids_TK (int64) for logical ids in [0, E). With the splits that level, all ranks make the call together.

        Raises:
            ConfigError: an id is of no expert: at once on a CPU, on other devices in a later call.
        """
        return (self._split or self.prepare(topk_ids_TK.device))(topk_ids_TK)

    @torch.inference_mode(False)
    def prepare(self, device: torch.device) -> Split:
        """Make the tables there now, which the first call would make. It holds no collective.

        Tensors that are made in inference mode could not be changed outside of it, where another call may be.
        """
        self._split = self._on(device)
        return self._split

    def become(self, other: TokenSplit) -> None:
        """Split by the map of `other`, which is prepared, from the next call on.

        If both are movable the tables are filled in place, so that captured graphs split by it too.
        """
        self._replicas = other._replicas
        if not self._movable:
            self._split = other._split
        elif self._split is not None:
            self._split.become(other._split)

    def _on(self, device: torch.device) -> Split:
        id_check = ExpertIdCheck(self._experts, device, self._layer) if self._check_ids else None
        if isinstance(self._replicas, LevelReplicas):
            return self._kernels.level_split(self._replicas, device, id_check)
        return self._kernels.even_split(self._replicas, device, id_check)


def _replicas(name: str, slot_map: SlotMap, spec: LayerSpec, movable: bool) -> EvenReplicas | LevelReplicas:
    ranks, slot_ids_EC = spec.ranks, slot_map.slot_ids_EC
    if slot_map.most_replicas == 1:
        # With one replica of each expert there is nothing to split, and nothing to ask the other ranks.
        return EvenReplicas(slot_ids_EC, slot_ids_EC >= 0)
    layout, node = _by_source(slot_map.layout, ranks), _sources_of_node(slot_map.node_size, ranks)
    if name in LEVELLING:
        gather = _gather(spec) if ranks.sources > 1 else None
        by_node = name == LEVEL_BY_NODE and 0 < node < ranks.sources
        return LevelReplicas(
            slot_ids_EC,
            slot_map.layout,
            layout,
            ranks.source,
            node,
            gather,
            slot_map.rank_speed,
            movable,
            by_node,
        )
    takes_EC = slot_ids_EC >= 0 if name == "even" else nearest_replicas(layout, ranks.source, node)
    if movable:
        room = (0, 0), (0, slot_map.most_replicas - slot_ids_EC.shape[1])
        slot_ids_EC, takes_EC = np.pad(slot_ids_EC, room, constant_values=-1), np.pad(takes_EC, room)
    return EvenReplicas(slot_ids_EC, takes_EC, ranks.source)


def _gather(spec: LayerSpec) -> Callable[[Tensor], Tensor]:
    """counts_E -> counts_GE: what the tokens of every source chose."""
    collectives = Collectives.of(spec)
    return lambda counts_E: collectives.all_gather(counts_E[None])[:: spec.ranks.token_size]


def _by_source(layout: Layout, ranks: RankGroup) -> Layout:
    """The same slots with the ranks of each source taken together."""
    held = layout.experts_of_rank
    firsts = range(0, len(held), ranks.token_size)
    return Layout(tuple(sum(held[first : first + ranks.token_size], ()) for first in firsts), layout.experts)


def _sources_of_node(node_size: int, ranks: RankGroup) -> int:
    """Sources of a node, 0 for all; a source that is no part of a node counts as one of its own."""
    whole = node_size % ranks.token_size == 0
    return node_size // ranks.token_size if whole else 1
