"""The `level` split compiled: what `epbackend.placement.replica_split_reference` computes, integer for integer.

X counts the replicated experts, C the replicas of one of them that are on different ranks. Loops instead of array
expressions keep the compilation short.
"""

from __future__ import annotations

import numpy as np
from numba import njit

GAP_BITS = 10
"""Sweeps end once the largest rank load is proven to be within 2^-10 of the optimum."""
MOST_SWEEPS = 64
"""Two are enough on average; of 950 layers made to be hard (chains and rings of 320 ranks) none needed more than 45."""


@njit(cache=True, error_model="numpy")
def level_shares(tokens_E, slots_EC, rank_of_slot_P, ranks):
    shares_P = np.zeros(rank_of_slot_P.size, np.int64)
    loads_R = np.zeros(ranks, np.int64)
    tokens_X = np.empty(tokens_E.size, np.int64)
    replicas_X = np.empty(tokens_E.size, np.int64)
    slots_XC = np.empty(slots_EC.shape, np.int64)
    replicated = _place_single(
        tokens_E, slots_EC, rank_of_slot_P, shares_P, loads_R, tokens_X, replicas_X, slots_XC
    )
    ranks_XC = np.empty((replicated, slots_EC.shape[1]), np.int64)
    shares_XC = np.empty((replicated, slots_EC.shape[1]), np.int64)
    for x in range(replicated):
        for replica in range(replicas_X[x]):
            ranks_XC[x, replica] = rank_of_slot_P[slots_XC[x, replica]]
            shares_XC[x, replica] = tokens_X[x] // replicas_X[x] + (replica < tokens_X[x] % replicas_X[x])
            loads_R[ranks_XC[x, replica]] += shares_XC[x, replica]
    tree_R = np.empty(ranks, np.int64)
    joined_R3 = np.empty((ranks, 3), np.int64)
    for sweep in range(MOST_SWEEPS):
        size, total = _grow_tree(loads_R, replicas_X, ranks_XC, shares_XC, tree_R, joined_R3)
        most = loads_R[tree_R[0]]
        if most - (most >> GAP_BITS) <= (total + size - 1) // size:
            break
        if sweep % 2:
            _carry(loads_R, ranks_XC, shares_XC, tree_R, joined_R3, size, total)
        _sweep(loads_R, tokens_X, replicas_X, ranks_XC, shares_XC)
    for x in range(replicated):
        for replica in range(replicas_X[x]):
            shares_P[slots_XC[x, replica]] = shares_XC[x, replica]
    return shares_P


@njit(cache=True, error_model="numpy")
def _place_single(tokens_E, slots_EC, rank_of_slot_P, shares_P, loads_R, tokens_X, replicas_X, slots_XC):
    """Gives experts on a single rank their tokens, lists the others, and says how many these are."""
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
                slots_XC[replicated, replicas] = slot
                replicas += 1
        if replicas == 1:
            shares_P[slots_XC[replicated, 0]] = tokens_E[expert]
            loads_R[last_rank] += tokens_E[expert]
        else:
            tokens_X[replicated], replicas_X[replicated] = tokens_E[expert], replicas
            replicated += 1
    return replicated


@njit(cache=True, error_model="numpy")
def _sweep(loads_R, tokens_X, replicas_X, ranks_XC, shares_XC):
    """Pours every replicated expert anew."""
    for x in range(len(ranks_XC)):
        replicas = under = replicas_X[x]
        total = tokens_X[x]
        for replica in range(replicas):
            loads_R[ranks_XC[x, replica]] -= shares_XC[x, replica]
            total += loads_R[ranks_XC[x, replica]]
        level = total // under
        while True:
            still_under = 0
            total = tokens_X[x]
            for replica in range(replicas):
                load = loads_R[ranks_XC[x, replica]]
                if load <= level:
                    still_under += 1
                    total += load
            if still_under == under:
                break
            under = still_under
            level = total // under
        left = total - level * under
        for replica in range(replicas):
            share = 0
            if loads_R[ranks_XC[x, replica]] <= level:
                share = level - loads_R[ranks_XC[x, replica]] + (left > 0)
                left -= 1
            shares_XC[x, replica] = share
            loads_R[ranks_XC[x, replica]] += share


@njit(cache=True, error_model="numpy")
def _grow_tree(loads_R, replicas_X, ranks_XC, shares_XC, tree_R, joined_R3):
    """Writes the ranks of the tree in order of joining, and what joined each; says how many they are and their load."""
    root = 0
    for rank in range(loads_R.size):
        joined_R3[rank, 0] = -1
        if loads_R[rank] > loads_R[root]:
            root = rank
    tree_R[0] = root
    joined_R3[root, 0] = 0
    total = loads_R[root]
    grown = 0
    size = 1
    while size > grown:
        grown = size
        for x in range(len(ranks_XC)):
            giver = -1
            for replica in range(replicas_X[x]):
                if joined_R3[ranks_XC[x, replica], 0] >= 0 and shares_XC[x, replica] > 0:
                    giver = replica
                    break
            if giver < 0:
                continue
            for replica in range(replicas_X[x]):
                rank = ranks_XC[x, replica]
                if joined_R3[rank, 0] < 0:
                    joined_R3[rank, 0], joined_R3[rank, 1], joined_R3[rank, 2] = x, giver, replica
                    tree_R[size] = rank
                    total += loads_R[rank]
                    size += 1
    return size, total


@njit(cache=True, error_model="numpy")
def _carry(loads_R, ranks_XC, shares_XC, tree_R, joined_R3, size, total):
    mean = total // size
    left = total - mean * size
    for index in range(size - 1, 0, -1):
        rank = tree_R[index]
        x, giver, replica = joined_R3[rank, 0], joined_R3[rank, 1], joined_R3[rank, 2]
        surplus = loads_R[rank] - mean - (index < left)
        surplus = max(min(surplus, shares_XC[x, replica]), -shares_XC[x, giver])
        shares_XC[x, replica] -= surplus
        shares_XC[x, giver] += surplus
        loads_R[rank] -= surplus
        loads_R[ranks_XC[x, giver]] += surplus


@njit(cache=True, error_model="numpy")
def own_quota(counts_RE, shares_P, slots_EC, rank_of_slot_P, source_rank, node_ranks):
    """Walks along the two lines of the reference at once, instead of cutting intervals out of them."""
    ranks, experts = counts_RE.shape
    quota_P = np.zeros(shares_P.size, np.int64)
    tokens_R = np.empty(ranks, np.int64)
    room_C = np.empty(slots_EC.shape[1], np.int64)
    for expert in range(experts):
        replicas = 0
        while replicas < slots_EC.shape[1] and slots_EC[expert, replicas] >= 0:
            room_C[replicas] = shares_P[slots_EC[expert, replicas]]
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
                while room_C[replica] > 0 and rank < min((block + 1) * block_ranks, ranks):
                    met = min(room_C[replica], tokens_R[rank])
                    room_C[replica] -= met
                    tokens_R[rank] -= met
                    if rank == source_rank:
                        quota_P[slot] += met
                    if tokens_R[rank] == 0:
                        rank += 1
    return quota_P
