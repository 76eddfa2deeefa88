"""The `level` split in plain Python: integer for integer what is compiled, and the text to port to another device.

All is arithmetic of whole tokens, so that neither the order of a sum nor the machine changes a result. An expert's
slots are in ascending order, and so are their ranks.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.placement import Layout
from epbackend.placement.speeds import rank_weights

GAP_BITS = 10
"""Sweeps end when the largest rank load is proven to be within 2^-10 of the optimum."""
MOST_SWEEPS = 64
"""Two are enough on average; of 950 hard layers (chains and rings of 320 ranks) none needed more than 45."""

Tree = dict[int, tuple[int, int, int]]
"""By rank, in the order of joining: the expert by which it joined, that expert's replica nearer to the root, and its
replica on this rank."""


def level_shares(tokens_E: np.ndarray, layout: Layout, rank_speed: tuple[float, ...] = ()) -> np.ndarray:
    """shares_P (int64) with the smallest largest rank time, load over speed.

    Block-coordinate descent on the sum of squared rank loads, each over its speed, whose optimum also has the smallest
    maximum (as in every problem of fair division over a polymatroid). Speeds are whole numbers, the ranks' weights. A
    sweep reassigns the tokens of one expert after the other, by water-filling over the ranks of its replicas. A few
    sweeps balance ranks that are near each other; along a chain of ranks they are slow. So before every second sweep a
    tree of ranks is levelled, which also proves when the optimum is reached. Only the first slot of an expert on a rank
    takes part: another one cannot change a rank's load.
    """
    weight_R = rank_weights(rank_speed, layout.ranks)
    slots_of = [_one_slot_a_rank(layout, expert) for expert in range(layout.experts)]
    ranks_of = [layout.rank_of_slot_P[slots] for slots in slots_of]
    shares_of = [
        water_fill(int(t), np.zeros(len(r), np.int64), weight_R[r])
        for t, r in zip(tokens_E, ranks_of, strict=True)
    ]
    loads_R = np.zeros(layout.ranks, dtype=np.int64)
    for ranks, shares in zip(ranks_of, shares_of, strict=True):
        loads_R[ranks] += shares
    for sweep in range(MOST_SWEEPS):
        tree = grow_tree(loads_R, weight_R, ranks_of, shares_of)
        if is_level(loads_R, weight_R, tree):
            break
        if sweep % 2:
            level_tree(loads_R, weight_R, ranks_of, shares_of, tree)
        for expert, ranks in enumerate(ranks_of):
            loads_R[ranks] -= shares_of[expert]
            shares_of[expert] = water_fill(int(tokens_E[expert]), loads_R[ranks], weight_R[ranks])
            loads_R[ranks] += shares_of[expert]
    shares_P = np.zeros(layout.slots, dtype=np.int64)
    shares_P[np.concatenate(slots_of)] = np.concatenate(shares_of)
    return shares_P


def water_fill(tokens: int, loads_C: np.ndarray, weight_C: np.ndarray) -> np.ndarray:
    """Shares (int64 [C]) of `tokens` for ranks that carry `loads_C`: the ranks that get any end at the same time.

    The remainder of the division goes to the first ones, one each.

    >>> water_fill(5, np.array([5, 0, 1]), np.array([1, 1, 1])).tolist()  # two ranks end at 3
    [0, 3, 2]
    >>> water_fill(5, np.array([5, 0, 1]), np.array([1, 2, 1])).tolist()  # at 4, with twice the weight, and at 2
    [0, 4, 1]
    """
    under_C = np.ones(len(loads_C), dtype=bool)
    while True:
        total, weight = tokens + int(loads_C[under_C].sum()), int(weight_C[under_C].sum())
        level_C = total * weight_C // weight
        if (loads_C[under_C] <= level_C[under_C]).all():
            break
        under_C &= loads_C <= level_C
    shares_C = np.where(under_C, level_C - loads_C, 0)
    shares_C[np.flatnonzero(under_C)[: tokens - int(shares_C.sum())]] += 1
    return shares_C


def grow_tree(
    loads_R: np.ndarray, weight_R: np.ndarray, ranks_of: list[np.ndarray], shares_of: list[np.ndarray]
) -> Tree:
    """The ranks that tokens of the rank with the largest time, the root, can reach in one step or several.

    An expert with a share on a rank of the tree adds its other ranks to the tree.
    """
    root = 0
    for rank in range(1, len(loads_R)):
        if loads_R[rank] * weight_R[root] > loads_R[root] * weight_R[rank]:
            root = rank
    tree: Tree = {root: (-1, -1, -1)}
    grown = 0
    while len(tree) > grown:
        grown = len(tree)
        for expert, ranks in enumerate(ranks_of):
            reached = [
                replica
                for replica, rank in enumerate(ranks)
                if rank in tree and shares_of[expert][replica] > 0
            ]
            for replica, rank in enumerate(ranks):
                if reached and rank not in tree:
                    tree[int(rank)] = (expert, reached[0], replica)
    return tree


def is_level(loads_R: np.ndarray, weight_R: np.ndarray, tree: Tree) -> bool:
    """Whether no split gets below the present maximum by more than 2^-GAP_BITS of it.

    The proof: every token now on the tree's ranks belongs to an expert without replicas elsewhere, so under any split
    one of these ranks takes at least as long as all of them if they ended together, rounded up to a token of the root.
    """
    ranks = list(tree)
    most, weight = int(loads_R[ranks[0]]), int(weight_R[ranks].sum())
    return most - (most >> GAP_BITS) <= -(-int(loads_R[ranks].sum()) * int(weight_R[ranks[0]]) // weight)


def level_tree(
    loads_R: np.ndarray,
    weight_R: np.ndarray,
    ranks_of: list[np.ndarray],
    shares_of: list[np.ndarray],
    tree: Tree,
) -> None:
    """Moves tokens along the branches of the tree towards equal times, in place.

    From the leaves to the root, each rank gives its parent what it has above its part of the tree's load, or takes what
    it lacks, as far as the shares of the joining expert allow. The ranks that joined first get the remainder of the
    division.
    """
    ranks = list(tree)
    total = int(loads_R[ranks].sum())
    parts = total * weight_R[ranks] // int(weight_R[ranks].sum())
    left = total - int(parts.sum())
    for index, (rank, (expert, giver, replica)) in reversed(list(enumerate(tree.items()))[1:]):
        shares_C = shares_of[expert]
        surplus = int(loads_R[rank]) - int(parts[index]) - (index < left)
        surplus = max(min(surplus, int(shares_C[replica])), -int(shares_C[giver]))
        shares_C[replica] -= surplus
        shares_C[giver] += surplus
        loads_R[rank] -= surplus
        loads_R[ranks_of[expert][giver]] += surplus


def _one_slot_a_rank(layout: Layout, expert: int) -> np.ndarray:
    """The slots of the expert, the first one of each rank."""
    slots = layout.slots_EC[expert, : layout.replicas_E[expert]]
    return slots[np.unique(layout.rank_of_slot_P[slots], return_index=True)[1]]


def own_quota(
    counts_RE: np.ndarray, shares_P: np.ndarray, layout: Layout, source_rank: int, node_size: int
) -> np.ndarray:
    """quota_P (int64) of `source_rank`.

    Sources and slots are matched within blocks of one rank, then of a node, then of all ranks. In each block the tokens
    that its sources still have lie on one line, in order of ranks, and the capacity that its slots still have on
    another: a source's quota of a slot is the overlap of their two intervals.
    """
    quota_P = np.zeros(layout.slots, dtype=np.int64)
    for expert in range(layout.experts):
        slots_C = layout.slots_EC[expert, : layout.replicas_E[expert]]
        tokens_R, capacity_C = counts_RE[:, expert].copy(), shares_P[slots_C]
        for block_ranks in (1, node_size or layout.ranks, layout.ranks):
            for first_rank in range(0, layout.ranks, block_ranks):
                in_R = np.arange(layout.ranks) // block_ranks == first_rank // block_ranks
                in_C = layout.rank_of_slot_P[slots_C] // block_ranks == first_rank // block_ranks
                token_ends = np.cumsum(np.where(in_R, tokens_R, 0))
                capacity_ends_C = np.cumsum(np.where(in_C, capacity_C, 0))
                if in_R[source_rank]:
                    end, start = token_ends[source_rank], token_ends[source_rank] - tokens_R[source_rank]
                    overlap_C = np.minimum(capacity_ends_C, end) - np.maximum(
                        capacity_ends_C - capacity_C, start
                    )
                    quota_P[slots_C[in_C]] += np.maximum(overlap_C, 0)[in_C]
                met = min(token_ends[-1], capacity_ends_C[-1])
                tokens_R[in_R] = np.minimum(tokens_R, np.maximum(token_ends - met, 0))[in_R]
                capacity_C[in_C] = np.minimum(capacity_C, np.maximum(capacity_ends_C - met, 0))[in_C]
    return quota_P
