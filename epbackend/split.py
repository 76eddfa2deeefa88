"""Which copy of its expert a token takes, batch by batch: `epbackend.placement.split` on tensors, between ranks.

A *source* is a group of ranks that hold the same tokens (one rank, without attention tensor parallelism). All of them
get the same answer, and only `level` has to ask the other sources anything: what their tokens chose.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from epbackend.dispatch.base import Problem
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.ranks import RankGroup
from epbackend.errors import ConfigError
from epbackend.kernels.copies import EvenCopies, LevelCopies, Split
from epbackend.kernels.guard import IdGuard
from epbackend.placement.layout import Layout
from epbackend.placement.split import SPLITS
from epbackend.slots import SlotMap


class TokenSplit:
    """Finds a slot for every choice of one layer's tokens."""

    def __init__(self, name: str, slot_map: SlotMap, problem: Problem, check_ids: bool = True) -> None:
        """Raises ConfigError for an unknown split."""
        if name not in SPLITS:
            raise ConfigError(f"split {name!r} is unknown; it is one of {', '.join(SPLITS)}")
        self._kernels, self._layer, self._check_ids = problem.kernels, problem.layer, check_ids
        self._experts = slot_map.experts
        self._copies = _copies(name, slot_map, problem)
        self._split: Split | None = None

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        """slot_ids_TK (int64) for logical ids in [0, E). With `level` all ranks make the call together.

        Raises ConfigError for an id that no expert has: at once on a CPU, on other devices in a later call.
        """
        if self._split is None:
            self._split = self._on(topk_ids_TK.device)
        return self._split(topk_ids_TK)

    def _on(self, device: torch.device) -> Split:
        guard = IdGuard(self._experts, device, self._layer) if self._check_ids else None
        if isinstance(self._copies, LevelCopies):
            return self._kernels.level_split(self._copies, device, guard)
        return self._kernels.even_split(self._copies, device, guard)


def _copies(name: str, slot_map: SlotMap, problem: Problem) -> EvenCopies | LevelCopies:
    ranks, slot_ids_EC = problem.ranks, slot_map.slot_ids_EC
    takes_EC = slot_ids_EC >= 0
    if slot_ids_EC.shape[1] == 1:
        # With one copy of each expert there is nothing to split, and nothing to ask the other ranks.
        return EvenCopies(slot_ids_EC, takes_EC)
    layout, node = _by_source(slot_map.layout, ranks), _sources_of_node(slot_map.node_size, ranks)
    if name == "even":
        return EvenCopies(slot_ids_EC, takes_EC, ranks.source)
    if name == "nearest":
        return EvenCopies(slot_ids_EC, _nearest(layout, ranks.source, node), ranks.source)
    gather = _gather(problem) if ranks.sources > 1 else None
    return LevelCopies(slot_ids_EC, slot_map.layout, layout, ranks.source, node, gather)


def _gather(problem: Problem) -> Callable[[Tensor], Tensor]:
    """counts_E -> counts_GE: what the tokens of every source chose."""
    collectives = Collectives.of(problem)
    return lambda counts_E: collectives.all_gather(counts_E[None])[:: problem.ranks.token_size]


def _nearest(layout: Layout, source: int, node: int) -> np.ndarray:
    """takes_EC (bool): the copies of each expert that are nearest to the source, as `placement.split.even` has it."""
    source_EC = layout.rank_of_slot_P[layout.slots_EC]
    node = node or layout.ranks
    distance_EC = (source_EC != source).astype(np.int64) + (source_EC // node != source // node)
    distance_EC[layout.slots_EC < 0] = 3
    return distance_EC == distance_EC.min(axis=1, keepdims=True)


def _by_source(layout: Layout, ranks: RankGroup) -> Layout:
    """The same slots with the ranks of each source taken together."""
    held = layout.experts_of_rank
    firsts = range(0, len(held), ranks.token_size)
    return Layout(tuple(sum(held[first : first + ranks.token_size], ()) for first in firsts), layout.experts)


def _sources_of_node(node_size: int, ranks: RankGroup) -> int:
    """Sources of a node, 0 for all; a source that is no part of a node counts as one of its own."""
    whole = node_size % ranks.token_size == 0
    return node_size // ranks.token_size if whole else 1
