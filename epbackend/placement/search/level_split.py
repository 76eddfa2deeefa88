"""The splits `level` and `level_by_node`, compiled.

They are what `epbackend.placement.replica_split_reference` computes, integer for integer.

The reference describes the algorithms; `epbackend.placement.replica_split` checks the arguments and describes them.
Letters: V experts that have replicas on several ranks, C the replicas of one of them on different ranks; others as in
`epbackend.placement`. Loops instead of array expressions keep the compilation short.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.search.compiled import entry, inner

GAP_BITS = 10
MOST_SWEEPS = 64
BY_NODE_BITS = 6
BY_NODE_SWEEPS = 16
NO_LIMIT = 2**62
"""As in the reference, not imported from there: numba would go on with old values where they change in that file."""


@entry
def level_shares(tokens_E, slots_EC, rank_of_slot_P, weight_R):
    """shares_P (int64) with the smallest largest rank time, load over weight."""
    ranks = weight_R.size
    shares_P, loads_R, expert_V, replicas_V, slots_VC, ranks_VC = _rows(
        tokens_E, slots_EC, rank_of_slot_P, ranks
    )
    shares_VC = np.empty(ranks_VC.shape, np.int64)
    for index in range(len(ranks_VC)):
        weight = 0
        for replica in range(replicas_V[index]):
            weight += weight_R[ranks_VC[index, replica]]
        left = tokens_E[expert_V[index]]
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
        for index in range(len(ranks_VC)):
            _take_away(loads_R, ranks_VC, shares_VC, index, replicas_V[index])
            tokens = tokens_E[expert_V[index]]
            _fill(tokens, loads_R, weight_R, ranks_VC, shares_VC, index, 0, replicas_V[index])
    for index in range(len(ranks_VC)):
        for replica in range(replicas_V[index]):
            shares_P[slots_VC[index, replica]] = shares_VC[index, replica]
    return shares_P


@entry
def level_by_node_shares(counts_ME, slots_EC, rank_of_slot_P, weight_R, node_ranks):
    """shares_P (int64) that leave tokens on their node, as far as ranks take hardly longer than with `level`."""
    tokens_E = np.zeros(counts_ME.shape[1], np.int64)
    for node in range(len(counts_ME)):
        for expert in range(tokens_E.size):
            tokens_E[expert] += counts_ME[node, expert]
    level_P = level_shares(tokens_E, slots_EC, rank_of_slot_P, weight_R)
    ranks = weight_R.size
    shares_P, loads_R, expert_V, replicas_V, slots_VC, ranks_VC = _rows(
        tokens_E, slots_EC, rank_of_slot_P, ranks
    )
    most_R = _most_loads(level_P, rank_of_slot_P, weight_R)
    no_limit_R = np.full(ranks, NO_LIMIT)
    home_VC = np.zeros(ranks_VC.shape, np.int64)
    shares_VC = np.zeros(ranks_VC.shape, np.int64)
    for index in range(len(ranks_VC)):
        for replica in range(replicas_V[index]):
            home_VC[index, replica] = counts_ME[ranks_VC[index, replica] // node_ranks, expert_V[index]]
        tokens, replicas = tokens_E[expert_V[index]], replicas_V[index]
        _fill_nodes(
            tokens, loads_R, weight_R, no_limit_R, ranks_VC, home_VC, shares_VC, index, replicas, node_ranks
        )
    tree_R = np.empty(ranks, np.int64)
    joined_R3 = np.empty((ranks, 3), np.int64)
    within = (loads_R <= most_R).all()
    sweep = 0
    while not within and sweep < BY_NODE_SWEEPS:
        if sweep % 2:
            size, total, weight = _grow_tree(
                loads_R, weight_R, replicas_V, ranks_VC, shares_VC, tree_R, joined_R3
            )
            level = total // weight
            rest = total - level * weight
            _level_tree(loads_R, weight_R, ranks_VC, shares_VC, tree_R, joined_R3, size, level, rest, weight)
        for index in range(len(ranks_VC)):
            tokens, replicas = tokens_E[expert_V[index]], replicas_V[index]
            _take_away(loads_R, ranks_VC, shares_VC, index, replicas)
            _fill_nodes(
                tokens, loads_R, weight_R, most_R, ranks_VC, home_VC, shares_VC, index, replicas, node_ranks
            )
        within = (loads_R <= most_R).all()
        sweep += 1
    level_VC = np.zeros(ranks_VC.shape, np.int64)
    for index in range(len(ranks_VC)):
        for replica in range(replicas_V[index]):
            level_VC[index, replica] = level_P[slots_VC[index, replica]]
    at_home = _at_home(replicas_V, ranks_VC, home_VC, shares_VC, node_ranks)
    if not within or at_home < _at_home(replicas_V, ranks_VC, home_VC, level_VC, node_ranks):
        return level_P
    for index in range(len(ranks_VC)):
        for replica in range(replicas_V[index]):
            shares_P[slots_VC[index, replica]] = shares_VC[index, replica]
    return shares_P


@inner
def _rows(tokens_E, slots_EC, rank_of_slot_P, ranks):
    """Experts on a single rank have their tokens in shares_P and loads_R; the others are listed, a row each."""
    shares_P = np.zeros(rank_of_slot_P.size, np.int64)
    loads_R = np.zeros(ranks, np.int64)
    expert_V = np.empty(tokens_E.size, np.int64)
    replicas_V = np.empty(tokens_E.size, np.int64)
    slots_VC = np.empty(slots_EC.shape, np.int64)
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
            expert_V[replicated], replicas_V[replicated] = expert, replicas
            replicated += 1
    ranks_VC = np.zeros((replicated, slots_EC.shape[1]), np.int64)
    for index in range(replicated):
        for replica in range(replicas_V[index]):
            ranks_VC[index, replica] = rank_of_slot_P[slots_VC[index, replica]]
    return shares_P, loads_R, expert_V, replicas_V, slots_VC, ranks_VC


@inner
def _part(level, rest, weight, of):
    """A rank's part of a total of level * of + rest: weight over `of`, the weight of all, rounded down.

    The total comes in two parts, so that no product is too large, and equal ranks (weight 1) are spared the division.
    """
    return level if weight == 1 else level * weight + rest * weight // of


@inner
def _take_away(loads_R, ranks_VC, shares_VC, index, replicas):
    """Takes an expert's tokens from its ranks."""
    for replica in range(replicas):
        loads_R[ranks_VC[index, replica]] -= shares_VC[index, replica]
        shares_VC[index, replica] = 0


@inner
def _fill(tokens, loads_R, weight_R, ranks_VC, shares_VC, index, first, last):
    """Adds tokens of an expert to the ranks of its replicas from `first` up to `last`, by water-filling."""
    under, total, weight = last - first, tokens, 0
    for replica in range(first, last):
        rank = ranks_VC[index, replica]
        total += loads_R[rank]
        weight += weight_R[rank]
    level = total // weight
    rest = total - level * weight
    while True:
        still_under, still_weight = 0, 0
        total = tokens
        for replica in range(first, last):
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
    left = tokens
    for replica in range(first, last):
        rank = ranks_VC[index, replica]
        left -= max(_part(level, rest, weight_R[rank], weight) - loads_R[rank], 0)
    for replica in range(first, last):
        rank = ranks_VC[index, replica]
        gained = _part(level, rest, weight_R[rank], weight) - loads_R[rank]
        if gained >= 0:
            if left > 0:
                gained += 1
                left -= 1
            shares_VC[index, replica] += gained
            loads_R[rank] += gained


@inner
def _fill_nodes(tokens, loads_R, weight_R, most_R, ranks_VC, home_VC, shares_VC, index, replicas, node_ranks):
    """Adds an expert's tokens to its ranks: those of each node there, up to most_R, and the rest by water-filling."""
    left = tokens
    first = 0
    while first < replicas:
        last = first
        while last < replicas and ranks_VC[index, last] // node_ranks == ranks_VC[index, first] // node_ranks:
            last += 1
        _fill(home_VC[index, first], loads_R, weight_R, ranks_VC, shares_VC, index, first, last)
        for replica in range(first, last):
            rank = ranks_VC[index, replica]
            above = min(max(loads_R[rank] - most_R[rank], 0), shares_VC[index, replica])
            shares_VC[index, replica] -= above
            loads_R[rank] -= above
            left -= shares_VC[index, replica]
        first = last
    _fill(left, loads_R, weight_R, ranks_VC, shares_VC, index, 0, replicas)


@inner
def _most_loads(shares_P, rank_of_slot_P, weight_R):
    """most_R: what each rank may have, by the time of the slowest one with these shares and BY_NODE_BITS."""
    loads_R = np.zeros(weight_R.size, np.int64)
    for slot in range(shares_P.size):
        loads_R[rank_of_slot_P[slot]] += shares_P[slot]
    root = 0
    for rank in range(weight_R.size):
        if loads_R[rank] * weight_R[root] > loads_R[root] * weight_R[rank]:
            root = rank
    most = loads_R[root] + (loads_R[root] >> BY_NODE_BITS)
    most_R = np.empty(weight_R.size, np.int64)
    for rank in range(weight_R.size):
        most_R[rank] = most * weight_R[rank] // weight_R[root]
    return most_R


@inner
def _at_home(replicas_V, ranks_VC, home_VC, shares_VC, node_ranks):
    """Tokens of the replicated experts that can stay on their node."""
    kept = 0
    for index in range(len(ranks_VC)):
        first = 0
        while first < replicas_V[index]:
            node, share, last = ranks_VC[index, first] // node_ranks, 0, first
            while last < replicas_V[index] and ranks_VC[index, last] // node_ranks == node:
                share += shares_VC[index, last]
                last += 1
            kept += min(home_VC[index, first], share)
            first = last
    return kept


@inner
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


@inner
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
