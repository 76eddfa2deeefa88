"""The token splits on one device: what they know of a layer's replicas, and how they are computed by torch's operators.

A split finds a slot for each choice of a batch, in three steps:

    counts_E     how many choices of this source's tokens fell on each expert
    quota_EC     how many of them each replica takes; here `even` and `level` differ
    slot_ids_TK  which ones: round-robin along the batch, so that every part of it is shared

Shapes: E experts, C replicas of the expert that has most, P slots of all ranks, G sources. A source is a group of ranks
that hold the same tokens. The numbers are those of `epbackend.placement.replica_split`, to the last token. Devices
without kernels of their own for it use `TorchSplits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from epbackend.errors import EPError
from epbackend.kernels.id_check import ExpertIdCheck, clamp_ids
from epbackend.placement.placement import Layout
from epbackend.placement.replica_split import (
    STRIDE,
    level_by_node_shares,
    level_shares,
    own_quota,
    round_robin,
)


class Split(Protocol):
    """Finds a slot for each choice of one layer's tokens."""

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        """slot_ids_TK (int64) for logical ids."""

    def become(self, other: Any) -> None:
        """Split as `other` does, one of the same kernels for another layout of the same slots, from the next call on.

        Both are of movable layers (`epbackend.moe`), so that their tables have the same shapes. They are filled in
        place, in the current stream: a captured graph reads them where they were.
        """


@dataclass(frozen=True, eq=False)
class EvenReplicas:
    """Replicas that share their expert's tokens equally, or in numbers that differ by one."""

    slot_ids_EC: np.ndarray
    """int64: the slots of each expert, -1 past the last one. C is the most that one has, or could have after a move."""
    takes_EC: np.ndarray
    """bool: the replicas that take tokens of this source, one for each expert at least."""
    offset: int = 0
    """Round-robin offset of the first call: which replica gets one more where the tokens do not divide. It advances by
    one with each call: a decode step has few choices of an expert, often one, which would always go to the same
    replica."""

    @property
    def takers_E(self) -> np.ndarray:
        """int64: how many replicas take tokens."""
        return self.takes_EC.sum(axis=1)

    @property
    def place_EC(self) -> np.ndarray:
        """int64: the place of each replica in the queue for one more; -1 where it takes none."""
        return round_robin(self.takes_EC, self.offset)


@dataclass(frozen=True, eq=False)
class LevelReplicas:
    """Replicas that take what levels the ranks' loads."""

    slot_ids_EC: np.ndarray
    """int64: the slots of each expert, -1 past the last one."""
    layout: Layout
    """The same slots with their ranks."""
    by_source: Layout
    """The same slots, each source's ranks taken together."""
    source: int
    node_sources: int
    """Sources of a node, which share tokens among themselves first; 0: all are one node."""
    gather: Callable[[Tensor], Tensor] | None
    """counts_E of this source -> counts_GE of all; None: there is no other. All sources call it together."""
    rank_speed: tuple[float, ...] = ()
    """Speeds of the ranks, whose times are levelled, as `placement.speeds.checked_speeds` gives them."""
    movable: bool = False
    """Whether the shapes of all tables shall be those for any layout of these slots; see `Split.become`."""
    by_node: bool = False
    """Whether tokens stay on their node where balance allows it: the split `level_by_node`, for several nodes."""

    @property
    def node_ranks(self) -> int:
        """Ranks of a node."""
        return self.node_sources * self.layout.ranks // self.by_source.ranks


Count = Callable[[Tensor, int], Tensor]
"""`Kernels.count`."""


class TorchSplits:
    """`even_split` and `level_split` of `epbackend.kernels.Kernels`."""

    count: Count

    def even_split(
        self, replicas: EvenReplicas, device: torch.device, id_check: ExpertIdCheck | None
    ) -> Split:
        return EvenSplit(self.count, replicas, device, id_check)

    def level_split(
        self, replicas: LevelReplicas, device: torch.device, id_check: ExpertIdCheck | None
    ) -> Split:
        return LevelSplit(self.count, replicas, device, id_check)


class EvenSplit:
    """All on the device: nothing waits for it, and a CUDA graph can hold the call."""

    def __init__(
        self, count: Count, replicas: EvenReplicas, device: torch.device, id_check: ExpertIdCheck | None
    ) -> None:
        self._count, self._id_check = count, id_check
        self._slot_ids_EC, self._place_EC, self._takers_E1 = (
            torch.tensor(table, dtype=torch.int64, device=device)
            for table in (replicas.slot_ids_EC, replicas.place_EC, replicas.takers_E[:, None])
        )
        self._calls = torch.zeros((), dtype=torch.int64, device=device)

    def become(self, other: EvenSplit) -> None:
        fill(self._tables, other._tables)

    @property
    def _tables(self) -> tuple[Tensor, ...]:
        return self._slot_ids_EC, self._place_EC, self._takers_E1, self._calls

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        experts, most = self._slot_ids_EC.shape
        ids_TK = _clamped(topk_ids_TK, experts, self._id_check)
        if most == 1:
            return self._slot_ids_EC.take(ids_TK)
        counts_E = self._count(ids_TK, experts)
        each_E1, more_E1 = counts_E[:, None] // self._takers_E1, counts_E[:, None] % self._takers_E1
        gets_more_EC = (self._place_EC - self._calls) % self._takers_E1 < more_E1
        self._calls += 1  # in place, so that it also advances in replays of a CUDA graph
        quota_EC = (each_E1 + gets_more_EC) * (self._place_EC >= 0)
        return self._slot_ids_EC.take(assign(ids_TK, counts_E, quota_EC))


class LevelSplit:
    """Quotas from the host's compiled form: the counts go there, which waits for their device; no graph can hold it."""

    def __init__(
        self, count: Count, replicas: LevelReplicas, device: torch.device, id_check: ExpertIdCheck | None
    ) -> None:
        self._count, self._id_check, self._replicas = count, id_check, replicas
        self._slot_ids_EC = torch.tensor(replicas.slot_ids_EC, dtype=torch.int64, device=device)
        self._slots_EC = torch.tensor(replicas.layout.slots_EC, dtype=torch.int64, device=device)

    def become(self, other: LevelSplit) -> None:
        self._replicas = other._replicas
        self._slot_ids_EC, self._slots_EC = other._slot_ids_EC, other._slots_EC

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        replicas, experts = self._replicas, len(self._slot_ids_EC)
        ids_TK = _clamped(topk_ids_TK, experts, self._id_check)
        counts_E = self._count(ids_TK, experts)
        counts_GE = replicas.gather(counts_E) if replicas.gather else counts_E[None]
        quota_P = level_quota(counts_GE, replicas).to(ids_TK.device)
        quota_EC = quota_P[self._slots_EC.clamp(min=0)] * (self._slots_EC >= 0)
        return self._slot_ids_EC.take(assign(ids_TK, counts_E, quota_EC))


def fill(tables: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Fill tables in place with those values, of the same shapes."""
    for table, new in zip(tables, values, strict=True):
        if table.shape != new.shape:
            raise EPError(f"a split's table is {tuple(table.shape)}, and its new values {tuple(new.shape)}")
        table.copy_(new)


def level_quota(counts_GE: Tensor, replicas: LevelReplicas) -> Tensor:
    """quota_P (int64, on the CPU) of the source: `own_quota` of `level_shares`, or of `level_by_node_shares`."""
    counts, layout, rank_speed = counts_GE.cpu().contiguous().numpy(), replicas.layout, replicas.rank_speed
    if replicas.by_node:
        shares_P = level_by_node_shares(counts, layout, replicas.node_ranks, rank_speed)
    else:
        shares_P = level_shares(counts.sum(axis=0), layout, rank_speed)
    quota_P = own_quota(counts, shares_P, replicas.by_source, replicas.source, replicas.node_sources)
    return torch.from_numpy(quota_P)


def assign(ids_TK: Tensor, counts_E: Tensor, quota_EC: Tensor) -> Tensor:
    """replica_TK: for each choice an index into the flat [E, C], as `epbackend.placement.replica_split` has it.

    An expert's n choices have positions 0 to n - 1, one replica's quota after the other's. The i-th choice of the batch
    gets position i * STRIDE % n, a permutation that spreads every replica's tokens over the batch.
    """
    ids_S = ids_TK.reshape(-1)
    by_expert_S = ids_S.argsort(stable=True)
    sorted_S = ids_S[by_expert_S]
    first_S = (counts_E.cumsum(0) - counts_E)[sorted_S]
    nth_S = torch.arange(len(ids_S), dtype=torch.int64, device=ids_S.device) - first_S
    position_S = first_S + nth_S * STRIDE % counts_E[sorted_S]
    replica_S = torch.searchsorted(quota_EC.reshape(-1).cumsum(0), position_S, right=True)
    return torch.empty_like(ids_S).scatter_(0, by_expert_S, replica_S).view(ids_TK.shape)


def _clamped(topk_ids_TK: Tensor, experts: int, id_check: ExpertIdCheck | None) -> Tensor:
    return id_check.clamp(topk_ids_TK) if id_check else clamp_ids(topk_ids_TK, experts)
