"""Plain forms of the compiled splits, integer for integer the same: the text to port to another device.

All is arithmetic of whole tokens, so that neither the order of a sum nor the machine changes a result. An expert's
slots are in ascending order, and so are their ranks.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.placement import Layout
from epbackend.placement.search.level_split import GAP_BITS, MOST_SWEEPS

Tree = dict[int, tuple[int, int, int]]
"""For each rank, in the order of joining: the expert that joined it, its replica nearer to the root, its replica
there."""


def level_shares(tokens_E: np.ndarray, layout: Layout) -> np.ndarray:
    """shares_P (int64) with the smallest largest rank load.

    Block-coordinate descent on the sum of squared rank loads, whose optimum also has the smallest maximum (as in every
    problem of fair division over a polymatroid): the replicated experts in turn pour their tokens anew on the ranks of
    their replicas. Sweeps of this settle what is near within a few, and what is far along a chain of ranks slowly; so
    before every second sweep loads are carried along a tree, which also proves when the optimum is reached. Only the
    first slot of an expert on a rank takes part: another one cannot change a rank's load.
    """
    slots_of = [_one_slot_a_rank(layout, expert) for expert in range(layout.experts)]
    ranks_of = [layout.rank_of_slot_P[slots] for slots in slots_of]
    shares_of = [pour(int(t), np.zeros(len(s), np.int64)) for t, s in zip(tokens_E, slots_of, strict=True)]
    loads_R = np.zeros(layout.ranks, dtype=np.int64)
    for ranks, shares in zip(ranks_of, shares_of, strict=True):
        loads_R[ranks] += shares
    for sweep in range(MOST_SWEEPS):
        tree = grow_tree(loads_R, ranks_of, shares_of)
        if is_level(loads_R, tree):
            break
        if sweep % 2:
            carry(loads_R, ranks_of, shares_of, tree)
        for expert, ranks in enumerate(ranks_of):
            loads_R[ranks] -= shares_of[expert]
            shares_of[expert] = pour(int(tokens_E[expert]), loads_R[ranks])
            loads_R[ranks] += shares_of[expert]
    shares_P = np.zeros(layout.slots, dtype=np.int64)
    shares_P[np.concatenate(slots_of)] = np.concatenate(shares_of)
    return shares_P


def pour(tokens: int, loads_C: np.ndarray) -> np.ndarray:
    """Tokens poured on ranks that carry `loads_C`: those under the water end level, the others get nothing.

    5 poured on [5, 0, 1] gives [0, 3, 2]: two ranks end at 3. What division leaves over goes to the first ones.
    """
    under_C = np.ones(len(loads_C), dtype=bool)
    while True:
        level, left = divmod(tokens + int(loads_C[under_C].sum()), int(under_C.sum()))
        if (loads_C[under_C] <= level).all():
            break
        under_C &= loads_C <= level
    shares_C = np.where(under_C, level - loads_C, 0)
    shares_C[np.flatnonzero(under_C)[:left]] += 1
    return shares_C


def grow_tree(loads_R: np.ndarray, ranks_of: list[np.ndarray], shares_of: list[np.ndarray]) -> Tree:
    """The ranks to which tokens of the fullest rank, the root, can get in one step or several.

    An expert with a share on a rank of the tree joins its other ranks to it.
    """
    tree: Tree = {int(loads_R.argmax()): (-1, -1, -1)}
    grown = 0
    while len(tree) > grown:
        grown = len(tree)
        for expert, ranks in enumerate(ranks_of):
            givers = [
                replica
                for replica, rank in enumerate(ranks)
                if rank in tree and shares_of[expert][replica] > 0
            ]
            for replica, rank in enumerate(ranks):
                if givers and rank not in tree:
                    tree[int(rank)] = (expert, givers[0], replica)
    return tree


def is_level(loads_R: np.ndarray, tree: Tree) -> bool:
    """Whether no split at all gets below the present maximum, but for 2^-GAP_BITS of it.

    The proof: every token now on the tree's ranks belongs to an expert without a replica elsewhere, so that under any
    split one of these ranks has their mean at least, rounded up.
    """
    most = int(loads_R.max())
    return most - (most >> GAP_BITS) <= -(-int(loads_R[list(tree)].sum()) // len(tree))


def carry(loads_R: np.ndarray, ranks_of: list[np.ndarray], shares_of: list[np.ndarray], tree: Tree) -> None:
    """Levels the tree as far as it can be done along its branches.

    From the leaves to the root, each rank hands to its parent what it has above the mean, or takes from it what it
    lacks, as far as the shares of the joining expert go; the ranks that joined first get what division leaves over.
    """
    mean, left = divmod(int(loads_R[list(tree)].sum()), len(tree))
    for index, (rank, (expert, giver, replica)) in reversed(list(enumerate(tree.items()))[1:]):
        shares_C = shares_of[expert]
        surplus = int(loads_R[rank]) - mean - (index < left)
        surplus = max(min(surplus, int(shares_C[replica])), -int(shares_C[giver]))
        shares_C[replica] -= surplus
        shares_C[giver] += surplus
        loads_R[rank] -= surplus
        loads_R[ranks_of[expert][giver]] += surplus


def _one_slot_a_rank(layout: Layout, expert: int) -> np.ndarray:
    slots = layout.slots_EC[expert, : layout.replicas_E[expert]]
    return slots[np.unique(layout.rank_of_slot_P[slots], return_index=True)[1]]


def own_quota(
    counts_RE: np.ndarray, shares_P: np.ndarray, layout: Layout, source_rank: int, node_size: int
) -> np.ndarray:
    """quota_P (int64) of `source_rank`.

    Sources and slots meet in blocks of one rank, then of a node, then of all ranks. In each block the tokens that
    its sources still have lie on one line, in order of ranks, and the room that its slots still have on another: a
    source's quota of a slot is the overlap of their two intervals.
    """
    quota_P = np.zeros(layout.slots, dtype=np.int64)
    for expert in range(layout.experts):
        slots_C = layout.slots_EC[expert, : layout.replicas_E[expert]]
        tokens_R, room_C = counts_RE[:, expert].copy(), shares_P[slots_C]
        for block_ranks in (1, node_size or layout.ranks, layout.ranks):
            for first_rank in range(0, layout.ranks, block_ranks):
                in_R = np.arange(layout.ranks) // block_ranks == first_rank // block_ranks
                in_C = layout.rank_of_slot_P[slots_C] // block_ranks == first_rank // block_ranks
                token_ends = np.cumsum(np.where(in_R, tokens_R, 0))
                room_ends_C = np.cumsum(np.where(in_C, room_C, 0))
                if in_R[source_rank]:
                    end, start = token_ends[source_rank], token_ends[source_rank] - tokens_R[source_rank]
                    overlap_C = np.minimum(room_ends_C, end) - np.maximum(room_ends_C - room_C, start)
                    quota_P[slots_C[in_C]] += np.maximum(overlap_C, 0)[in_C]
                met = min(token_ends[-1], room_ends_C[-1])
                tokens_R[in_R] = np.minimum(tokens_R, np.maximum(token_ends - met, 0))[in_R]
                room_C[in_C] = np.minimum(room_C, np.maximum(room_ends_C - met, 0))[in_C]
    return quota_P
