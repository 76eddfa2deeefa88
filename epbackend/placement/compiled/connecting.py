"""Copies that connect ranks: wherever a batch is heavy, its tokens find a way to where it is light.

Two ranks are neighbours if they hold copies of the same expert: the split can move its tokens from one to the other.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.compiled.jit import entry, inner


@entry
def steep_copies(weight_E, slots, most_copies, steepness):
    """The copies [E], one at a time to the expert with the largest weight / copies ** steepness.

    1 makes the heaviest copy as light as it can be; above, more experts get a copy, and the heaviest fewer.
    """
    copies_E = np.ones(weight_E.size, np.int64)
    worth_E = weight_E.copy()
    for _ in range(slots - weight_E.size):
        expert = np.argmax(worth_E)
        copies_E[expert] += 1
        full = copies_E[expert] == most_copies
        worth_E[expert] = -1.0 if full else weight_E[expert] / copies_E[expert] ** steepness
    return copies_E


@entry
def connect(weight_E, copies_E, order_E, first_R, chain):
    """The expert of every slot [P], or of a slot -1 where this way no place was left for it.

    Experts in this order, those with copies before the others, as evenly over the ranks as can be. Their first copy
    goes to the emptiest rank, or with `chain` to one that has copies already; each further copy to the rank that is
    the most steps away, best of all out of reach; the least loaded of several.
    """
    ranks, experts = first_R.size - 1, weight_E.size
    expert_P = np.full(first_R[-1], -1, np.int64)
    next_R = first_R[:-1].copy()
    load_R = np.zeros(ranks)
    ranks_EC = np.empty((experts, copies_E.max()), np.int64)
    placed_E = np.zeros(experts, np.int64)
    shared = 0
    for expert in range(experts):
        shared += copies_E[expert] if copies_E[expert] > 1 else 0
    fair = (shared + ranks - 1) // ranks
    steps_R, queue_R = np.empty(ranks, np.int64), np.empty(ranks, np.int64)
    for alone in (False, True):
        for expert in order_E:
            if (copies_E[expert] == 1) != alone:
                continue
            for copy in range(copies_E[expert]):
                for rank in range(ranks):
                    steps_R[rank] = ranks
                if copy:
                    _count_steps(expert, expert_P, first_R, next_R, ranks_EC, placed_E, steps_R, queue_R)
                chosen, most, least = -1, 0, 0.0
                for rank in range(ranks):
                    used, steps = next_R[rank] - first_R[rank], steps_R[rank]
                    if next_R[rank] == first_R[rank + 1] or steps == 0:
                        continue
                    if not alone:
                        steps = used if chain and copy == 0 else steps
                        steps -= 2 * ranks if used >= fair else 0
                    if chosen < 0 or steps > most or (steps == most and load_R[rank] < least):
                        chosen, most, least = rank, steps, load_R[rank]
                if chosen < 0:
                    return expert_P
                expert_P[next_R[chosen]] = expert
                next_R[chosen] += 1
                load_R[chosen] += weight_E[expert] / copies_E[expert]
                ranks_EC[expert, copy] = chosen
                placed_E[expert] += 1
    return expert_P


@inner
def _count_steps(expert, expert_P, first_R, next_R, ranks_EC, placed_E, steps_R, queue_R):
    """Writes how many steps each rank is away from those that hold the expert, where it can be reached at all."""
    size = placed_E[expert]
    for copy in range(size):
        queue_R[copy] = ranks_EC[expert, copy]
        steps_R[queue_R[copy]] = 0
    head = 0
    while head < size:
        rank = queue_R[head]
        head += 1
        for slot in range(first_R[rank], next_R[rank]):
            shared = expert_P[slot]
            for copy in range(placed_E[shared]):
                neighbour = ranks_EC[shared, copy]
                if steps_R[neighbour] == steps_R.size:
                    steps_R[neighbour] = steps_R[rank] + 1
                    queue_R[size] = neighbour
                    size += 1
