"""The `level` split, compiled: what `epbackend.placement.replica_split_reference` computes, integer for integer.

The reference describes the algorithms; `epbackend.placement.replica_split` checks the arguments and describes them.
Letters: V experts that have replicas on several ranks, C the replicas of one of them on different ranks; others as in
`epbackend.placement`. Loops instead of array expressions keep the compilation short.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.replica_split_reference import GAP_BITS, MOST_SWEEPS
from epbackend.placement.search.compiled import entry, inner


@entry
def level_shares(tokens_E, slots_EC, rank_of_slot_P, weight_R):
    """shares_P (int64) with the smallest largest rank time, load over weight."""
    ranks = weight_R.size
    shares_P = np.zeros(rank_of_slot_P.size, np.int64)
    loads_R = np.zeros(ranks, np.int64)
    tokens_V = np.empty(tokens_E.size, np.int64)
    replicas_V = np.empty(tokens_E.size, np.int64)
    slots_VC = np.empty(slots_EC.shape, np.int64)
    replicated = _place_single(
        tokens_E, slots_EC, rank_of_slot_P, shares_P, loads_R, tokens_V, replicas_V, slots_VC
    )
    ranks_VC = np.empty((replicated, slots_EC.shape[1]), np.int64)
    shares_VC = np.empty((replicated, slots_EC.shape[1]), np.int64)
    for index in range(replicated):
        weight = 0
        for replica in range(replicas_V[index]):
            ranks_VC[index, replica] = rank_of_slot_P[slots_VC[index, replica]]
            weight += weight_R[ranks_VC[index, replica]]
        left = tokens_V[index]
        level = left // weight
        rest = left - level * weight
        for replica in range(replicas_V[index]):
            shares_VC[index, replica] = _part(level, rest, weight_R[ranks_VC[index, replica]], weight)
            left -= shares_VC[index, replica]
        for replica in range(replicas_V[index]):
            shares_VC[index, replica] += replica < left
            loads_R[ranks_VC[index, replica]] += shares_VC[index, replica]
    tree_R = np.empty(ranks, np.int64)
    joined_R3 = np.empty((ranks, 3), np.int64)
    for sweep in range(MOST_SWEEPS):
        size, total, weight = _grow_tree(
            loads_R, weight_R, replicas_V, ranks_VC, shares_VC, tree_R, joined_R3
        )
        root = tree_R[0]
        # Within 64 bits; `_part` says why.
        level = total // weight
        rest = total - level * weight
        bound = level * weight_R[root] + (rest * weight_R[root] + weight - 1) // weight
        if loads_R[root] - (loads_R[root] >> GAP_BITS) <= bound:
            break
        if sweep % 2:
            _level_tree(loads_R, weight_R, ranks_VC, shares_VC, tree_R, joined_R3, size, level, rest, weight)
        _water_fill(loads_R, weight_R, tokens_V, replicas_V, ranks_VC, shares_VC)
    for index in range(replicated):
        for replica in range(replicas_V[index]):
            shares_P[slots_VC[index, replica]] = shares_VC[index, replica]
    return shares_P


@entry
def _place_single(tokens_E, slots_EC, rank_of_slot_P, shares_P, loads_R, tokens_V, replicas_V, slots_VC):
    """Gives experts on a single rank their tokens, lists the others, and returns how many these are."""
    replicated = 0
    for expert in range(tokens_E.size):
        replicas = 0
        last_rank = -1
        for replica in range(slots_EC.shape[1]):
            slot = slots_EC[expert, replica]
            if slot < 0:
                break
            if rank_of_slot_P[slot] != last_rank:
                last_rank = rank_of_slot_P[slot]
                slots_VC[replicated, replicas] = slot
                replicas += 1
        if replicas == 1:
            shares_P[slots_VC[replicated, 0]] = tokens_E[expert]
            loads_R[last_rank] += tokens_E[expert]
        else:
            tokens_V[replicated], replicas_V[replicated] = tokens_E[expert], replicas
            replicated += 1
    return replicated


@inner
def _part(level, rest, weight, of):
    """A rank's part of a total of level * of + rest: weight over `of`, the weight of all, rounded down.

    The total comes in two parts, so that no product is too large, and equal ranks (weight 1) are spared the division.
    """
    return level if weight == 1 else level * weight + rest * weight // of


@entry
def _water_fill(loads_R, weight_R, tokens_V, replicas_V, ranks_VC, shares_VC):
    """Reassigns the tokens of every replicated expert by water-filling, in place."""
    for index in range(len(ranks_VC)):
        replicas = under = replicas_V[index]
        total, weight = tokens_V[index], 0
        for replica in range(replicas):
            rank = ranks_VC[index, replica]
            loads_R[rank] -= shares_VC[index, replica]
            total += loads_R[rank]
            weight += weight_R[rank]
        level = total // weight
        rest = total - level * weight
        while True:
            still_under, still_weight = 0, 0
            total = tokens_V[index]
            for replica in range(replicas):
                rank = ranks_VC[index, replica]
                if loads_R[rank] <= _part(level, rest, weight_R[rank], weight):
                    still_under += 1
                    still_weight += weight_R[rank]
                    total += loads_R[rank]
            if still_under == under:
                break
            under, weight = still_under, still_weight
            level = total // weight
            rest = total - level * weight
        left = tokens_V[index]
        for replica in range(replicas):
            rank = ranks_VC[index, replica]
            shares_VC[index, replica] = max(_part(level, rest, weight_R[rank], weight) - loads_R[rank], -1)
            left -= max(shares_VC[index, replica], 0)
        for replica in range(replicas):
            if shares_VC[index, replica] < 0:
                shares_VC[index, replica] = 0
            elif left > 0:
                shares_VC[index, replica] += 1
                left -= 1
            loads_R[ranks_VC[index, replica]] += shares_VC[index, replica]


@entry
def _grow_tree(loads_R, weight_R, replicas_V, ranks_VC, shares_VC, tree_R, joined_R3):
    """Writes the ranks of the tree in order of joining, and by what each joined; returns number, load and weight."""
    root = 0
    for rank in range(loads_R.size):
        joined_R3[rank, 0] = -1
        if loads_R[rank] * weight_R[root] > loads_R[root] * weight_R[rank]:
            root = rank
    tree_R[0] = root
    joined_R3[root, 0] = 0
    total, weight = loads_R[root], weight_R[root]
    grown = 0
    size = 1
    while size > grown:
        grown = size
        for index in range(len(ranks_VC)):
            giver = -1
            for replica in range(replicas_V[index]):
                if joined_R3[ranks_VC[index, replica], 0] >= 0 and shares_VC[index, replica] > 0:
                    giver = replica
                    break
            if giver < 0:
                continue
            for replica in range(replicas_V[index]):
                rank = ranks_VC[index, replica]
                if joined_R3[rank, 0] < 0:
                    joined_R3[rank, 0], joined_R3[rank, 1], joined_R3[rank, 2] = index, giver, replica
                    tree_R[size] = rank
                    total += loads_R[rank]
                    weight += weight_R[rank]
                    size += 1
    return size, total, weight


@entry
def _level_tree(loads_R, weight_R, ranks_VC, shares_VC, tree_R, joined_R3, size, level, rest, weight):
    """Moves tokens along the branches of the tree, so far as shares allow, towards equal times; in place."""
    left = level * weight + rest
    for position in range(size):
        left -= _part(level, rest, weight_R[tree_R[position]], weight)
    for position in range(size - 1, 0, -1):
        rank = tree_R[position]
        index, giver, replica = joined_R3[rank, 0], joined_R3[rank, 1], joined_R3[rank, 2]
        surplus = loads_R[rank] - _part(level, rest, weight_R[rank], weight) - (position < left)
        surplus = max(min(surplus, shares_VC[index, replica]), -shares_VC[index, giver])
        shares_VC[index, replica] -= surplus
        shares_VC[index, giver] += surplus
        loads_R[rank] -= surplus
        loads_R[ranks_VC[index, giver]] += surplus


@entry
def own_quota(counts_RE, shares_P, slots_EC, rank_of_slot_P, source_rank, node_ranks):
    """quota_P (int64) of `source_rank`; walks along both lines of the reference at once, not interval by interval."""
    ranks, experts = counts_RE.shape
    quota_P = np.zeros(shares_P.size, np.int64)
    tokens_R = np.empty(ranks, np.int64)
    capacity_C = np.empty(slots_EC.shape[1], np.int64)
    for expert in range(experts):
        replicas = 0
        while replicas < slots_EC.shape[1] and slots_EC[expert, replicas] >= 0:
            capacity_C[replicas] = shares_P[slots_EC[expert, replicas]]
            replicas += 1
        if replicas == 1:
            quota_P[slots_EC[expert, 0]] = counts_RE[source_rank, expert]
            continue
        for rank in range(ranks):
            tokens_R[rank] = counts_RE[rank, expert]
        for step in range(3):
            block_ranks = 1 if step == 0 else node_ranks if step == 1 else ranks
            block = -1
            rank = 0
            for replica in range(replicas):
                slot = slots_EC[expert, replica]
                if rank_of_slot_P[slot] // block_ranks > block:
                    block = rank_of_slot_P[slot] // block_ranks
                    rank = block * block_ranks
                while capacity_C[replica] > 0 and rank < min((block + 1) * block_ranks, ranks):
                    met = min(capacity_C[replica], tokens_R[rank])
                    capacity_C[replica] -= met
                    tokens_R[rank] -= met
                    if rank == source_rank:
                        quota_P[slot] += met
                    if tokens_R[rank] == 0:
                        rank += 1
    return quota_P
