"""Which copy of its expert a token takes, batch by batch: `epbackend.placement.split` on tensors, between ranks.

A *source* is a group of ranks that hold the same tokens (one rank, without attention tensor parallelism). All of them
get the same answer, and only `level` has to ask the other sources anything: what their tokens chose.

    counts_E     choices of this source's tokens for each expert
    quota_EC     how many of them each copy takes    even, nearest, level: this is where they differ
    slot_ids_TK  which ones                          copies in turn along the batch, so that every part is shared
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
from epbackend.placement.layout import Layout
from epbackend.placement.split import SPLITS
from epbackend.placement.split.assign import STRIDE
from epbackend.slots import SlotMap

Quota = Callable[[Tensor], Tensor]
"""counts_E (int64) -> quota_EC (int64): how many of this source's choices each copy takes; rows sum to the counts."""


class TokenSplit:
    """Finds a slot for every choice of one layer's tokens."""

    def __init__(self, name: str, slot_map: SlotMap, problem: Problem) -> None:
        """Raises ConfigError for an unknown split."""
        if name not in SPLITS:
            raise ConfigError(f"split {name!r} is unknown; it is one of {', '.join(SPLITS)}")
        self._kernels = problem.kernels
        self._slot_ids_EC = torch.from_numpy(slot_map.slot_ids_EC)
        # With one copy of each expert there is nothing to split, and nothing to ask the other ranks.
        self._quota = _quota(name, slot_map, problem) if self._slot_ids_EC.shape[1] > 1 else None

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        """slot_ids_TK (int64) for logical ids in [0, E). With `level` all ranks make the call together."""
        self._slot_ids_EC = self._slot_ids_EC.to(topk_ids_TK.device)
        if self._quota is None:
            return self._slot_ids_EC.take(topk_ids_TK.long())
        counts_E = self._kernels.count(topk_ids_TK, len(self._slot_ids_EC))
        return self._slot_ids_EC.take(assign(topk_ids_TK, counts_E, self._quota(counts_E)))


def assign(topk_ids_TK: Tensor, counts_E: Tensor, quota_EC: Tensor) -> Tensor:
    """copy_TK: for each choice an index into the flat [E, C], as `epbackend.placement.split.assign` has it.

    The copies of an expert have a seat for each choice, one copy's seats after the other's. Its i-th of n choices takes
    seat i * STRIDE % n, a permutation that spreads every copy's tokens over the batch.
    """
    ids_S = topk_ids_TK.reshape(-1).long()
    by_expert_S = ids_S.argsort(stable=True)
    sorted_S = ids_S[by_expert_S]
    first_S = (counts_E.cumsum(0) - counts_E)[sorted_S]
    turn_S = torch.arange(len(ids_S), device=ids_S.device) - first_S
    seat_S = first_S + turn_S * STRIDE % counts_E[sorted_S]
    copy_S = torch.searchsorted(quota_EC.reshape(-1).cumsum(0), seat_S, right=True)
    return torch.empty_like(ids_S).scatter_(0, by_expert_S, copy_S).view(topk_ids_TK.shape)


def _quota(name: str, slot_map: SlotMap, problem: Problem) -> Quota:
    layout, ranks = _by_source(slot_map.layout, problem.ranks), problem.ranks
    node = _sources_of_node(slot_map.node_size, ranks)
    if name == "even":
        return _Even(layout.slots_EC >= 0, ranks.source)
    if name == "nearest":
        return _Even(_nearest(layout, ranks.source, node), ranks.source)
    return _Level(slot_map.layout, layout, node, problem)


class _Even:
    """Equal quotas for the copies that take any, or quotas that differ by one: `placement.split.even`.

    Who gets one more moves on with every call. A step of decoding has few choices of an expert, often one: without the
    turn it would always go to the same copy.
    """

    def __init__(self, takes_EC: np.ndarray, turn: int) -> None:
        takers_E = takes_EC.sum(axis=1)
        start_E1 = (turn + np.cumsum(takers_E > 1))[:, None]
        self._takes_EC, self._takers_E1 = torch.from_numpy(takes_EC), torch.from_numpy(takers_E)[:, None]
        self._place_EC = torch.from_numpy(takes_EC.cumsum(axis=1) - 1 - start_E1)

    def __call__(self, counts_E: Tensor) -> Tensor:
        takes_EC, takers_E1, place_EC = (
            table.to(counts_E.device) for table in (self._takes_EC, self._takers_E1, self._place_EC)
        )
        self._takes_EC, self._takers_E1, self._place_EC = takes_EC, takers_E1, place_EC - 1
        counts_E1 = counts_E[:, None]
        return (counts_E1 // takers_E1 + (place_EC % takers_E1 < counts_E1 % takers_E1)) * takes_EC


class _Level:
    """Quotas that level the load of the ranks: every source learns what all have chosen, and finds the same shares."""

    def __init__(self, layout: Layout, by_source: Layout, node: int, problem: Problem) -> None:
        self._layout, self._by_source, self._node = layout, by_source, node
        self._kernels = problem.kernels
        self._ranks, self._collectives = problem.ranks, Collectives.of(problem)
        self._slots_EC = torch.from_numpy(layout.slots_EC.copy())

    def __call__(self, counts_E: Tensor) -> Tensor:
        counts_GE = counts_E[None]
        if self._ranks.sources > 1:
            counts_RE = self._collectives.all_gather(counts_GE.int())
            counts_GE = counts_RE[:: self._ranks.token_size].long()
        quota_P = self._kernels.level_quota(
            counts_GE, self._layout, self._by_source, self._ranks.source, self._node
        )
        self._slots_EC = self._slots_EC.to(quota_P.device)
        return quota_P[self._slots_EC.clamp(min=0)] * (self._slots_EC >= 0)


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
