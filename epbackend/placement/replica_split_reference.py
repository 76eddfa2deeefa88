"""The splits `level` and `level_by_node` in plain Python, integer for integer what is compiled: the text to port.

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
BY_NODE_BITS = 6
"""For tokens that stay on their node a rank may take longer than the slowest of `level`, by 2^-6 of that."""
BY_NODE_SWEEPS = 16
"""Most layers need less than 12; where all ranks have to be full to the last token, many more would not do."""
NO_LIMIT = 2**62
"""Tokens: more than any rank has."""

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


def level_by_node_shares(
    counts_ME: np.ndarray, layout: Layout, node_ranks: int, rank_speed: tuple[float, ...] = ()
) -> np.ndarray:
    """shares_P (int64) that leave tokens on their node, as far as ranks take hardly longer than with `level`.

    Their limit is the time of the slowest rank under `level`, and 2^-BY_NODE_BITS of it more.

    At first each node's tokens of an expert fill its replicas there, however full they get. Then sweeps fill one
    expert after the other anew: what fits under the limit at home, and the rest by water-filling wherever
    it levels, until no rank is above the limit; in between a tree of ranks is levelled, as `level` does. Where that is
    not reached, or leaves fewer tokens on their node than `level` does, the shares are those of `level`.
    """
    weight_R = rank_weights(rank_speed, layout.ranks)
    tokens_E = counts_ME.sum(axis=0)
    level_P = level_shares(tokens_E, layout, rank_speed)
    most_R = _most_loads(level_P, layout, weight_R)
    slots_of = [_one_slot_a_rank(layout, expert) for expert in range(layout.experts)]
    ranks_of = [layout.rank_of_slot_P[slots] for slots in slots_of]
    home_of = [counts_ME[ranks // node_ranks, expert] for expert, ranks in enumerate(ranks_of)]
    shares_of = [np.zeros(len(ranks), np.int64) for ranks in ranks_of]
    loads_R = np.zeros(layout.ranks, dtype=np.int64)

    def fill(limit_R: np.ndarray, expert: int) -> None:
        ranks = ranks_of[expert]
        loads_R[ranks] -= shares_of[expert]
        shares_of[expert] = fill_nodes(
            int(tokens_E[expert]),
            home_of[expert],
            loads_R[ranks],
            weight_R[ranks],
            limit_R[ranks],
            ranks // node_ranks,
        )
        loads_R[ranks] += shares_of[expert]

    # An expert on one rank comes first: its tokens are there whatever the others do.
    for expert in sorted(range(layout.experts), key=lambda expert: len(ranks_of[expert]) > 1):
        fill(np.full(layout.ranks, NO_LIMIT), expert)
    for sweep in range(BY_NODE_SWEEPS):
        if (loads_R <= most_R).all():
            break
        if sweep % 2:
            level_tree(
                loads_R, weight_R, ranks_of, shares_of, grow_tree(loads_R, weight_R, ranks_of, shares_of)
            )
        for expert in range(layout.experts):
            fill(most_R, expert)
    shares_P = np.zeros(layout.slots, dtype=np.int64)
    shares_P[np.concatenate(slots_of)] = np.concatenate(shares_of)
    kept, kept_by_level = (at_home(each_P, counts_ME, layout, node_ranks) for each_P in (shares_P, level_P))
    return shares_P if kept >= kept_by_level and (loads_R <= most_R).all() else level_P


def fill_nodes(
    tokens: int,
    home_C: np.ndarray,
    loads_C: np.ndarray,
    weight_C: np.ndarray,
    most_C: np.ndarray,
    node_C: np.ndarray,
) -> np.ndarray:
    """Shares (int64 [C]) of `tokens`, of which home_C are on each replica's node: these stay there, up to most_C.

    >>> one = np.ones(3, np.int64)
    >>> fill_nodes(9, np.array([6, 6, 3]), np.array([2, 4, 0]), one, one * 5, np.array([0, 0, 1])).tolist()
    [3, 1, 5]
    """
    kept_C = np.zeros(len(loads_C), dtype=np.int64)
    for node in np.unique(node_C):
        here = node_C == node
        kept_C[here] = water_fill(int(home_C[here][0]), loads_C[here], weight_C[here])
    kept_C = np.minimum(kept_C, np.maximum(most_C - loads_C, 0))
    return kept_C + water_fill(tokens - int(kept_C.sum()), loads_C + kept_C, weight_C)


def at_home(shares_P: np.ndarray, counts_ME: np.ndarray, layout: Layout, node_ranks: int) -> int:
    """Tokens that stay on their node with these shares."""
    shares_ME = np.zeros_like(counts_ME)
    np.add.at(shares_ME, (layout.rank_of_slot_P // node_ranks, layout.slot_to_expert_P), shares_P)
    return int(np.minimum(shares_ME, counts_ME).sum())


def _most_loads(shares_P: np.ndarray, layout: Layout, weight_R: np.ndarray) -> np.ndarray:
    """most_R: what each rank may have, by the time of the slowest one with these shares and BY_NODE_BITS."""
    loads_R = np.zeros(layout.ranks, dtype=np.int64)
    np.add.at(loads_R, layout.rank_of_slot_P, shares_P)
    root = 0
    for rank in range(layout.ranks):
        if loads_R[rank] * weight_R[root] > loads_R[root] * weight_R[rank]:
            root = rank
    return (loads_R[root] + (loads_R[root] >> BY_NODE_BITS)) * weight_R // weight_R[root]


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
