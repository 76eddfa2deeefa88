"""The search over one layer's slots for the `level` split, compiled: replicas that connect ranks.

Two ranks are neighbours if they hold replicas of the same expert: the split can move its tokens from one to the other,
so an expert with replicas is an edge of a graph whose nodes are the ranks, and its tokens are the edge's capacity.
`power_law_replicas` and `connect` build layers in which few edges lead from any rank to any other; `hill_climb`
exchanges slots and replaces replicas as long as the batches it is given get more level. Where ranks differ in speed,
what is levelled is their time.

Letters: E experts, P slots of the layer over all ranks, R ranks, C replicas of an expert, B batches. Loads are in mean
rank loads of their batch. All batches are split at once. `replica_split_reference` splits one, in whole tokens and over
all replicas of an expert at a time; here tokens are real numbers, and move between two replicas at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from epbackend.placement.search.compiled import entry, inner

# Starts: layers whose replicas connect the ranks


@entry
def power_law_replicas(weight_E, slots, most_replicas, exponent):
    """Replicas [E], given one at a time to the expert with the largest weight / replicas ** exponent.

    The exponent 1 makes the heaviest replica as light as it can be (see `layer_search.optimal_replicas`, which breaks
    ties otherwise); with larger ones more experts get replicas, and the heaviest experts fewer.
    """
    replicas_E = np.ones(weight_E.size, np.int64)
    worth_E = weight_E.copy()
    for _ in range(slots - weight_E.size):
        expert = np.argmax(worth_E)
        replicas_E[expert] += 1
        full = replicas_E[expert] == most_replicas
        worth_E[expert] = -1.0 if full else weight_E[expert] / replicas_E[expert] ** exponent
    return replicas_E


@entry
def connect(weight_E, replicas_E, order_E, first_R, chain):
    """The expert of every slot [P]; -1 in some slot if no rank was left that could take a replica.

    Experts in this order, those with several replicas before the others, as evenly over the ranks as possible. Their
    first replica goes to the emptiest rank, or with `chain` to one that has replicas already. Each further replica goes
    to the rank that is the most steps away in the graph, or not connected at all; of several, to the least loaded.
    """
    ranks, experts = first_R.size - 1, weight_E.size
    expert_P = np.full(first_R[-1], -1, np.int64)
    next_R = first_R[:-1].copy()
    load_R = np.zeros(ranks)
    ranks_EC = np.empty((experts, replicas_E.max()), np.int64)
    placed_E = np.zeros(experts, np.int64)
    shared = 0
    for expert in range(experts):
        shared += replicas_E[expert] if replicas_E[expert] > 1 else 0
    fair = (shared + ranks - 1) // ranks
    steps_R, queue_R = np.empty(ranks, np.int64), np.empty(ranks, np.int64)
    for alone in (False, True):
        for expert in order_E:
            if (replicas_E[expert] == 1) != alone:
                continue
            for replica in range(replicas_E[expert]):
                for rank in range(ranks):
                    steps_R[rank] = ranks
                if replica:
                    _count_steps(expert, expert_P, first_R, next_R, ranks_EC, placed_E, steps_R, queue_R)
                chosen, most, least = -1, 0, 0.0
                for rank in range(ranks):
                    used, steps = next_R[rank] - first_R[rank], steps_R[rank]
                    if next_R[rank] == first_R[rank + 1] or steps == 0:
                        continue
                    if not alone:
                        steps = used if chain and replica == 0 else steps
                        steps -= 2 * ranks if used >= fair else 0
                    if chosen < 0 or steps > most or (steps == most and load_R[rank] < least):
                        chosen, most, least = rank, steps, load_R[rank]
                if chosen < 0:
                    return expert_P
                expert_P[next_R[chosen]] = expert
                next_R[chosen] += 1
                load_R[chosen] += weight_E[expert] / replicas_E[expert]
                ranks_EC[expert, replica] = chosen
                placed_E[expert] += 1
    return expert_P


@inner
def _count_steps(expert, expert_P, first_R, next_R, ranks_EC, placed_E, steps_R, queue_R):
    """Breadth-first search: writes the steps from the ranks that hold the expert to each rank connected with them."""
    size = placed_E[expert]
    for replica in range(size):
        queue_R[replica] = ranks_EC[expert, replica]
        steps_R[queue_R[replica]] = 0
    head = 0
    while head < size:
        rank = queue_R[head]
        head += 1
        for slot in range(first_R[rank], next_R[rank]):
            shared = expert_P[slot]
            for replica in range(placed_E[shared]):
                neighbour = ranks_EC[shared, replica]
                if steps_R[neighbour] == steps_R.size:
                    steps_R[neighbour] = steps_R[rank] + 1
                    queue_R[size] = neighbour
                    size += 1


# Hill climbing

SWEEPS = 2
"""Sweeps after a change; they go on from the split before it."""
FIRST_SWEEPS = 32
"""Sweeps from the even split."""

FULL = 0.999
"""Times the load of the fullest rank: ranks above it count as equally full."""
LEVEL_ENOUGH = 1.001
"""Mean cost at which nothing is left to gain."""


class LevelSplit(NamedTuple):
    """The expert of every slot, and how each batch is split over the slots."""

    rank_P: np.ndarray
    """The rank of each slot."""
    expert_P: np.ndarray
    replicas_E: np.ndarray
    slots_EC: np.ndarray
    """The slots of each expert, in any order; undefined behind its last replica."""
    share_PB: np.ndarray
    """What each slot gets of each batch, in mean rank loads."""
    load_RB: np.ndarray
    """The load of each rank by each batch: sums over its slots."""
    slow_R: np.ndarray
    """One over the speed of each rank."""


@entry
def hill_climb(expert_P, first_R, slow_R, tokens_EB, weight_B, tries, seed):
    """The experts [P] after `tries` random changes, of which those that do not raise the cost (`split_cost`) are kept.

    A change takes load from the fullest rank of a batch: it exchanges one of its experts for another, or replaces some
    other replica by a further replica of one of its experts.
    """
    random_1 = np.full(1, seed, np.uint64)
    split = _even(expert_P, first_R, slow_R, tokens_EB)
    _sweep(split, FIRST_SWEEPS)
    best = _cost(split, weight_B)
    share_PB, load_RB = split.share_PB.copy(), split.load_RB.copy()
    for _ in range(tries):
        if best < LEVEL_ENOUGH:
            break
        batch = random_below(random_1, weight_B.size)
        fullest = _a_full_rank(load_RB, slow_R, batch, random_below(random_1, first_R.size - 1))
        slot = first_R[fullest] + random_below(random_1, first_R[fullest + 1] - first_R[fullest])
        other = random_below(random_1, expert_P.size)
        expert, partner, rank = split.expert_P[slot], split.expert_P[other], split.rank_P[other]
        if _holds(split, rank, expert):
            continue
        replaces = split.replicas_E[partner] > 1 and random_below(random_1, 2) == 0
        if replaces:
            _replace(split, other, expert)
        else:
            moves = share_PB[slot, batch] - share_PB[other, batch]
            fuller = (load_RB[rank, batch] + moves) * slow_R[rank] >= load_RB[fullest, batch] * slow_R[
                fullest
            ]
            alone = split.replicas_E[expert] == 1 and split.replicas_E[partner] == 1
            if (alone and (moves < 0.0 or fuller)) or _holds(split, fullest, partner):
                continue
            _swap(split, slot, other)
        _sweep(split, SWEEPS)
        cost = _cost(split, weight_B)
        if cost <= best:
            best = cost
            _copy_rows(split.share_PB, share_PB)
            _copy_rows(split.load_RB, load_RB)
            continue
        if replaces:
            _replace(split, other, partner)
        else:
            _swap(split, slot, other)
        for changed in range(expert_P.size):
            if split.replicas_E[split.expert_P[changed]] > 1 or changed in (slot, other):
                _copy(share_PB[changed], split.share_PB[changed])
        _copy_rows(load_RB, split.load_RB)
    return split.expert_P


@entry
def split_cost(expert_P, first_R, slow_R, tokens_EB, weight_B):
    """The time of the fullest rank after the split, as a weighted mean over the batches."""
    split = _even(expert_P, first_R, slow_R, tokens_EB)
    _sweep(split, FIRST_SWEEPS)
    return _cost(split, weight_B)


@inner
def _even(expert_P, first_R, slow_R, tokens_EB):
    """The state in which all batches are split evenly over replicas."""
    experts, batches = tokens_EB.shape
    ranks = first_R.size - 1
    split = LevelSplit(
        np.empty(expert_P.size, np.int64),
        expert_P.copy(),
        np.zeros(experts, np.int64),
        np.empty((experts, ranks), np.int64),
        np.empty((expert_P.size, batches)),
        np.zeros((ranks, batches)),
        slow_R,
    )
    for rank in range(ranks):
        for slot in range(first_R[rank], first_R[rank + 1]):
            split.rank_P[slot] = rank
            _append(split, expert_P[slot], slot)
    for slot in range(expert_P.size):
        expert = expert_P[slot]
        for batch in range(batches):
            split.share_PB[slot, batch] = tokens_EB[expert, batch] / split.replicas_E[expert]
        _add(split.share_PB[slot], split.load_RB[split.rank_P[slot]], 1.0)
    return split


@inner
def _sweep(split, sweeps):
    """Block-coordinate descent on the sum of squared rank loads, over pairs of replicas that follow each other."""
    for _ in range(sweeps):
        for expert in range(split.replicas_E.size):
            replicas = split.replicas_E[expert]
            for replica in range(replicas if replicas > 2 else replicas - 1):
                slot, other = (
                    split.slots_EC[expert, replica],
                    split.slots_EC[expert, (replica + 1) % replicas],
                )
                rank, other_rank = split.rank_P[slot], split.rank_P[other]
                slow, other_slow = split.slow_R[rank], split.slow_R[other_rank]
                part = slow / (slow + other_slow)
                _level_pair(
                    split.share_PB[slot],
                    split.share_PB[other],
                    split.load_RB[rank],
                    split.load_RB[other_rank],
                    part,
                    1.0 - part,
                )


@inner
def _level_pair(share_B, other_share_B, load_B, other_load_B, part, other_part):
    """Moves tokens between two replicas until their ranks take as long, or one replica has none left."""
    for batch in range(share_B.size):
        moves = part * load_B[batch] - other_part * other_load_B[batch]
        moves = moves if moves < share_B[batch] else share_B[batch]
        moves = moves if moves > -other_share_B[batch] else -other_share_B[batch]
        share_B[batch] -= moves
        other_share_B[batch] += moves
        load_B[batch] -= moves
        other_load_B[batch] += moves


@inner
def _cost(split, weight_B):
    """See `split_cost`."""
    most_B = np.zeros(weight_B.size)
    for rank in range(split.load_RB.shape[0]):
        for batch in range(most_B.size):
            load = split.load_RB[rank, batch] * split.slow_R[rank]
            most_B[batch] = load if load > most_B[batch] else most_B[batch]
    cost = 0.0
    for batch in range(most_B.size):
        cost += weight_B[batch] * most_B[batch]
    return cost


@inner
def random_below(random_1, limit):  # written twice, as in layer_search: numba would not notice a change there
    """The next random number in [0, limit), by SplitMix64 (Steele, Lea, Flood 2014)."""
    random_1[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = random_1[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((mixed ^ (mixed >> np.uint64(31))) % np.uint64(limit))


@inner
def _a_full_rank(load_RB, slow_R, batch, start):
    """One of the ranks that are as full as the fullest: the first one from `start` on, cyclically."""
    most = 0.0
    for rank in range(load_RB.shape[0]):
        most = max(most, load_RB[rank, batch] * slow_R[rank])
    while load_RB[start, batch] * slow_R[start] < FULL * most:
        start = (start + 1) % load_RB.shape[0]
    return start


@inner
def _holds(split, rank, expert):
    held = False
    for replica in range(split.replicas_E[expert]):
        held |= split.rank_P[split.slots_EC[expert, replica]] == rank
    return held


@inner
def _swap(split, slot, other):
    """Exchanges the experts of two slots, and with them the shares."""
    expert, partner = split.expert_P[slot], split.expert_P[other]
    _rename(split, expert, slot, other)
    _rename(split, partner, other, slot)
    split.expert_P[slot], split.expert_P[other] = partner, expert
    load_B, other_load_B = split.load_RB[split.rank_P[slot]], split.load_RB[split.rank_P[other]]
    share_B, other_share_B = split.share_PB[slot], split.share_PB[other]
    for batch in range(share_B.size):
        moves = share_B[batch] - other_share_B[batch]
        share_B[batch] -= moves
        other_share_B[batch] += moves
        load_B[batch] -= moves
        other_load_B[batch] += moves


@inner
def _replace(split, slot, expert):
    """Makes the slot a replica of another expert, at first without tokens; another replica of its old expert takes over
    its tokens."""
    loser = split.expert_P[slot]
    split.replicas_E[loser] -= 1
    _rename(split, loser, slot, split.slots_EC[loser, split.replicas_E[loser]])
    remaining = split.slots_EC[loser, 0]
    share_B = split.share_PB[slot]
    _add(share_B, split.share_PB[remaining], 1.0)
    _add(share_B, split.load_RB[split.rank_P[remaining]], 1.0)
    _add(share_B, split.load_RB[split.rank_P[slot]], -1.0)
    for batch in range(share_B.size):
        share_B[batch] = 0.0
    split.expert_P[slot] = expert
    _append(split, expert, slot)


@inner
def _append(split, expert, slot):
    split.slots_EC[expert, split.replicas_E[expert]] = slot
    split.replicas_E[expert] += 1


@inner
def _rename(split, expert, slot, new):
    """Records that the expert's replica in `slot` is now in `new`."""
    for replica in range(split.replicas_E[expert]):
        if split.slots_EC[expert, replica] == slot:
            split.slots_EC[expert, replica] = new
            return


@inner
def _add(source_B, target_B, sign):
    for batch in range(source_B.size):
        target_B[batch] += sign * source_B[batch]


@inner
def _copy(source_B, target_B):
    for batch in range(source_B.size):
        target_B[batch] = source_B[batch]


@inner
def _copy_rows(source_XB, target_XB):
    for row in range(len(source_XB)):
        _copy(source_XB[row], target_XB[row])
