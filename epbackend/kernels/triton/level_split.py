"""The splits `level` and `level_by_node` on the device: one launch from the counts of all sources to one's own slots.

Every program computes the shares and its source's quotas for itself, so that none waits for another, and then places
the choices of its blocks. In order:

    LevelTable     what the kernel must know of a layer's slots, made once
    level_shares   how many tokens each replica takes, and `by_node_shares` (`level_shares.py`)
    own_quota      how many of one source's tokens go to each replica, near ones first
    LevelSplit     the call and the kernel

With several sources the counts are gathered before, by `LevelReplicas.gather`.

Shapes: S choices, E experts, X replicated experts (on several ranks), C replicas of an expert, R ranks, J unreplicated
experts of a rank, G sources, B blocks of choices. XS, CS, RS, JS and GS are powers of two that hold X, C, R, J and G.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas, Split, fill
from epbackend.kernels.triton.even_split import (
    BLOCK,
    EvenSplit,
    ExpertCounts,
    count_all,
    empty_slots,
    positions_of_choices,
    replica_of_position,
    store_slots,
)
from epbackend.kernels.triton.launch import named_launch, next_power_of_2
from epbackend.kernels.triton.level_shares import Replicated, Singles, by_node_shares, level_shares
from epbackend.kernels.triton.permute import load_slots
from epbackend.kernels.triton.tiles import Chip, chip_of
from epbackend.placement.placement import Layout
from epbackend.placement.speeds import rank_weights


@dataclass(frozen=True)
class LevelTable:
    """A layer's slots as the kernel reads them. Of two slots of an expert on one rank the first counts."""

    first_slot_E: Tensor
    """int64: each expert's first slot."""
    replicated_E: Tensor
    """int32: which of the X an expert is, or -1."""
    single_RJ: Tensor
    """int32: the experts that are on one rank alone; rows end in -1."""
    replicated_1: Tensor
    """int32: how many of the rows below are in use, which the kernel looks up, as experts that move change it."""
    expert_X: Tensor
    """int32."""
    slots_XC: Tensor
    """int64, in ascending order; rows end in -1, here and below."""
    ranks_XC: Tensor
    """int32: the rank of each replica."""
    sources_XC: Tensor
    """int32: the source that the rank belongs to."""
    weight_R: Tensor | None
    """int32: speeds of the ranks as whole numbers; None where all are equally fast."""

    @classmethod
    def of(cls, replicas: LevelReplicas, device: torch.device) -> LevelTable:
        layout = replicas.layout
        kept = [
            _one_a_rank(layout.slots_EC[expert], layout.rank_of_slot_P) for expert in range(layout.experts)
        ]
        replicated = [expert for expert, slots in enumerate(kept) if len(slots) > 1]
        single_of: list[list[int]] = [[] for _ in range(layout.ranks)]
        for expert, slots in enumerate(kept):
            if len(slots) == 1:
                single_of[layout.rank_of_slot_P[slots[0]]].append(expert)
        index_E = np.full(layout.experts, -1)
        index_E[replicated] = np.arange(len(replicated))
        most_X, most_C, most_J = _room(layout) if replicas.movable else (0, 0, 0)
        slots_XC = _padded([kept[expert] for expert in replicated], most_X, most_C)
        here_XC = slots_XC >= 0

        def on(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(np.array(values), dtype=dtype, device=device)

        return cls(
            first_slot_E=on(replicas.slot_ids_EC[:, 0], torch.int64),
            replicated_E=on(index_E),
            single_RJ=on(_padded(single_of, 0, most_J)),
            replicated_1=on([len(replicated)]),
            expert_X=on([*replicated, *[0] * (len(slots_XC) - len(replicated))]),
            slots_XC=on(
                _padded(
                    [replicas.slot_ids_EC[e, np.isin(layout.slots_EC[e], kept[e])] for e in replicated],
                    most_X,
                    most_C,
                ),
                torch.int64,
            ),
            ranks_XC=on(np.where(here_XC, layout.rank_of_slot_P[slots_XC], -1)),
            sources_XC=on(np.where(here_XC, replicas.by_source.rank_of_slot_P[slots_XC], -1)),
            weight_R=on(rank_weights(replicas.rank_speed, layout.ranks)) if replicas.rank_speed else None,
        )


def _one_a_rank(slots_C: np.ndarray, rank_of_slot_P: np.ndarray) -> np.ndarray:
    slots_C = slots_C[slots_C >= 0]
    return slots_C[np.unique(rank_of_slot_P[slots_C], return_index=True)[1]]


def _padded(rows: list, height: int, width: int) -> np.ndarray:
    """[rows, the longest one] (int64), -1 past the ends; as high and as wide as said, if that is more."""
    table = np.full((max(height, len(rows)), max(width, *map(len, rows), 0)), -1)
    for row, values in zip(table, rows, strict=False):
        row[: len(values)] = values
    return table


def _room(layout: Layout) -> tuple[int, int, int]:
    """(X, C, J), the most that any layout of the same slots has."""
    redundant = layout.slots - layout.experts
    return min(layout.experts, redundant), min(layout.ranks, redundant + 1), int(layout.slots_R.max())


@triton.jit
def gather_flat(values, index, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a block with SIZE values, by flat indices.

    Triton 3.7 cannot gather from two-dimensional blocks of all shapes.
    """
    flat = tl.gather(tl.reshape(values, (SIZE,)), tl.reshape(index, (ROWS * COLUMNS,)), 0)
    return tl.reshape(flat, (ROWS, COLUMNS))


@triton.jit
def own_quota(shares, counts_GE, stride, replicated, source, node, G, GS: tl.constexpr, CHUNK: tl.constexpr):
    """quota [XS, CS] of `source`, from the shares [XS, CS] of all; CHUNK experts at a time.

    Sources and replicas are matched within blocks of one source first, then of a node, then of all. In each block the
    tokens that its sources still have lie on one line, and the shares that its replicas still have free on another: a
    source's quota of a replica is the overlap of their two intervals.
    """
    XS: tl.constexpr = shares.shape[0]
    CS: tl.constexpr = shares.shape[1]
    each = tl.arange(0, XS)[:, None]
    replica, sources = tl.arange(0, CS)[None, :], tl.arange(0, GS)[None, :]
    quota = tl.zeros_like(shares)
    for start in range(0, replicated.X, CHUNK):
        x = (start + tl.arange(0, CHUNK))[:, None]
        used = x < replicated.X
        expert = tl.load(replicated.expert_X + x, mask=used, other=0)
        counts = counts_GE + sources.to(tl.int64) * stride + expert
        tokens = tl.load(counts, mask=used & (sources < G), other=0).to(tl.int32)
        place = replicated.sources_XC + x * replicated.C + replica
        holder = tl.load(place, mask=used & (replica < replicated.C), other=-1)
        free = gather_flat(shares, tl.minimum(x, XS - 1) * CS + replica, XS * CS, CHUNK, CS)
        free = tl.where(used, free, 0)
        part = tl.zeros_like(free)
        for step in tl.static_range(3):
            if step == 0:
                block = 1
            elif step == 1:
                block = node
            else:
                block = G
            gained, tokens, free = _match(tokens, free, holder, source, block, CS, GS, CHUNK)
            part += gained
        mine = (each >= start) & (each < start + CHUNK)
        row = tl.minimum(tl.maximum(each - start, 0), CHUNK - 1)
        quota = tl.where(mine, gather_flat(part, row * CS + replica, CHUNK * CS, XS, CS), quota)
    return quota


@triton.jit
def _match(tokens, free, holder, source, block, CS: tl.constexpr, GS: tl.constexpr, CHUNK: tl.constexpr):
    """(what the source gives each replica of its own block, tokens left, shares still free), for CHUNK experts.

    `tokens` is [CHUNK, GS]; `free`, the replicas' shares that are not taken yet, and `holder`, the source of each
    replica or -1 past them, are [CHUNK, CS]. `block` is how many sources a block has.
    """
    sources, replica = tl.arange(0, GS)[None, :], tl.arange(0, CS)
    block_G = sources // block
    block_C = tl.where(holder >= 0, holder // block, -1)
    start_of_x = tl.arange(0, CHUNK)[:, None] * GS
    first = block_G * block
    last = tl.minimum(first + block, GS) - 1
    sums = tl.cumsum(tokens, 1)
    ends = sums - gather_flat(sums - tokens, start_of_x + first, CHUNK * GS, CHUNK, GS)
    same = block_C[:, :, None] == block_C[:, None, :]
    earlier = same & (replica[None, None, :] <= replica[None, :, None])
    free_ends = tl.sum(tl.where(earlier, free[:, None, :], 0), 2)
    here = sources == source
    end = tl.sum(tl.where(here, ends, 0), 1)[:, None]
    start = end - tl.sum(tl.where(here, tokens, 0), 1)[:, None]
    overlap = tl.maximum(tl.minimum(free_ends, end) - tl.maximum(free_ends - free, start), 0)
    inside = block_C[:, :, None] == block_G[:, None, :]
    free_G = tl.sum(tl.where(inside, free[:, :, None], 0), 1)
    matched_G = tl.minimum(gather_flat(ends, start_of_x + last, CHUNK * GS, CHUNK, GS), free_G)
    at = holder[:, :, None] == sources[:, None, :]
    matched_C = tl.sum(tl.where(at, matched_G[:, None, :], 0), 2)
    tokens = tl.minimum(tokens, tl.maximum(ends - matched_G, 0))
    left = tl.minimum(free, tl.maximum(free_ends - matched_C, 0))
    return tl.where(block_C == source // block, overlap, 0), tokens, left


QUOTA_CELLS = 1024
"""Experts times replicas times sources (or replicas) whose quotas are computed at a time: 8 values a thread."""

SOURCES = tl.constexpr(8)
"""Sources whose counts are added up at a time."""


def level_split(
    replicas: LevelReplicas, device: torch.device, id_check: ExpertIdCheck | None, chip: Chip | None
) -> Split:
    """See `epbackend.kernels.Kernels.level_split`; the sum of all counts is below 2^31."""
    table = LevelTable.of(replicas, device)
    if not len(table.expert_X):  # no expert is on two ranks, or can be: the first of its replicas takes all
        first_E1 = replicas.slot_ids_EC[:, :1]
        return EvenSplit(EvenReplicas(first_E1, first_E1 >= 0), device, id_check)
    return LevelSplit(replicas, table, id_check, chip)


class LevelSplit:
    """A layer with experts on several ranks."""

    def __init__(
        self, replicas: LevelReplicas, table: LevelTable, id_check: ExpertIdCheck | None, chip: Chip | None
    ) -> None:
        self._replicas, self._table, self._id_check, self._chip = replicas, table, id_check, chip
        self._experts = len(table.first_slot_E)
        (replicated, most), (ranks, single) = table.ranks_XC.shape, table.single_RJ.shape
        self._xs, self._cs = next_power_of_2(replicated), next_power_of_2(most)
        self._launch = _level_slots.bind(
            first_slot_E=table.first_slot_E,
            replicated_E=table.replicated_E,
            single_RJ=table.single_RJ,
            replicated_1=table.replicated_1,
            expert_X=table.expert_X,
            slots_XC=table.slots_XC,
            ranks_XC=table.ranks_XC,
            sources_XC=table.sources_XC,
            weight_R=table.weight_R,
            found_1=id_check.found_1 if id_check else None,
            E=self._experts,
            source=replicas.source,
            R=ranks,
            J=single,
            C=most,
            RS=next_power_of_2(ranks),
            JS=next_power_of_2(max(1, single)),
            XS=self._xs,
            CS=self._cs,
            BY_NODE=replicas.by_node,
            LANES=next_power_of_2(self._experts + 1),
            BLOCK=BLOCK,
        )

    def become(self, other: LevelSplit) -> None:
        mine, new = vars(self._table), vars(other._table)
        given = [name for name, values in mine.items() if values is not None]
        fill([mine[name] for name in given], [new[name] for name in given])

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        if self._id_check:
            self._id_check.report()
        slot_ids_TK = empty_slots(topk_ids_TK)
        counts = ExpertCounts.of(topk_ids_TK.contiguous().view(-1), self._experts)
        gather = self._replicas.gather
        counts_GE = gather(counts.counts_E(self._experts)) if gather else None
        if len(counts.ids_S):
            self._find_slots(counts, counts_GE, slot_ids_TK)
        return slot_ids_TK

    def _find_slots(self, counts: ExpertCounts, counts_GE: Tensor | None, slot_ids_TK: Tensor) -> None:
        sources, stride = (1, 0) if counts_GE is None else (len(counts_GE), counts_GE.stride(0))
        gs = next_power_of_2(sources)
        chip = self._chip or chip_of(counts.ids_S.device)
        self._launch[(min(counts.blocks, chip.sms),)](
            ids_S=counts.ids_S,
            totals_E=counts.totals_E,
            before_BE=counts.before_BE,
            counts_GE=counts_GE,
            stride=stride,
            slot_ids_S=slot_ids_TK,
            S=len(counts.ids_S),
            blocks=counts.blocks,
            G=sources,
            node=self._replicas.node_sources or sources,
            GS=gs,
            CHUNK=max(1, min(self._xs, QUOTA_CELLS // (self._cs * max(self._cs, gs)))),
            ALL=counts.all,
        )


@named_launch
@triton.jit(do_not_specialize=["S", "blocks", "source", "node", "stride"])
def _level_slots(
    ids_S,
    totals_E,
    before_BE,
    counts_GE,
    stride,
    first_slot_E,
    replicated_E,
    single_RJ,
    replicated_1,
    expert_X,
    slots_XC,
    ranks_XC,
    sources_XC,
    weight_R,
    found_1,
    slot_ids_S,
    S,
    blocks,
    E,
    G,
    source,
    node,
    R,
    J,
    C,
    RS: tl.constexpr,
    JS: tl.constexpr,
    XS: tl.constexpr,
    CS: tl.constexpr,
    GS: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_NODE: tl.constexpr,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program: the shares, this source's quotas, then the blocks of choices from its own number on.

    `stride` is that of counts_GE, which is None where all ranks hold the same tokens; ALL as in `ExpertCounts`.
    """
    lane = tl.arange(0, LANES)
    X = tl.load(replicated_1)
    if counts_GE is not None:
        tokens = _add_sources(counts_GE, stride, E, G, LANES)
    elif ALL:
        tokens = tl.where(lane < E, count_all(ids_S, S, E, LANES, ALL), 0)
    else:
        tokens = tl.load(totals_E + lane, mask=lane < E, other=0).to(tl.int32)
    singles = Singles(single_RJ, R, J)
    replicated = Replicated(expert_X, ranks_XC, sources_XC, X, C)
    quota, loads = level_shares(tokens, singles, replicated, weight_R, RS, JS, XS, CS)
    if counts_GE is not None:
        if BY_NODE:
            quota = by_node_shares(
                quota, loads, tokens, counts_GE, stride, singles, replicated, weight_R, node, G, JS
            )
        quota = own_quota(quota, counts_GE, stride, replicated, source, node, G, GS, CHUNK)
    slot_of_first = tl.load(first_slot_E)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        choice = block * BLOCK + tl.arange(0, BLOCK)
        expert = load_slots(ids_S, choice, S, E)
        position, _ = positions_of_choices(ids_S, totals_E, before_BE, block, expert, S, E, LANES, ALL, BLOCK)
        x = tl.load(replicated_E + expert, mask=expert < E, other=-1)
        place = tl.maximum(x, 0)[:, None] * CS + tl.arange(0, CS)[None, :]
        taken = replica_of_position(gather_flat(quota, place, XS * CS, BLOCK, CS), position)
        slot = tl.load(first_slot_E + expert, mask=(expert < E) & (x < 0), other=0)
        shared = tl.load(slots_XC + x * C + taken, mask=(x >= 0) & (taken < C), other=0)
        store_slots(slot_ids_S, tl.where(x >= 0, shared, slot), slot_of_first, ids_S, found_1, choice, S, E)


@triton.jit
def _add_sources(counts_GE, stride, E, G, LANES: tl.constexpr):
    """Choices of each lane's expert, over all sources."""
    lane = tl.arange(0, LANES)[None, :]
    tokens = tl.zeros((LANES,), tl.int32)
    for start in range(0, G, SOURCES):
        source = (start + tl.arange(0, SOURCES))[:, None]
        counts = counts_GE + source.to(tl.int64) * stride + lane
        tokens += tl.sum(tl.load(counts, mask=(source < G) & (lane < E), other=0).to(tl.int32), 0)
    return tokens
