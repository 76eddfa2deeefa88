"""How many copies each expert gets, and a first place for every copy."""

from __future__ import annotations

import numpy as np

from epbackend.placement.compiled.jit import entry, inner
from epbackend.placement.compiled.ranks import copy_value, cost_of


@entry
def optimal_copies(weight_E, order_E, slots, most_copies):
    """The copies [E] that minimise the largest weight of a copy: one at a time, to the expert whose copy weighs most.

    `order_E` lists the experts by falling weight: a whole expert bounds all that follow, so that few are looked at.
    """
    copies_E = np.ones(weight_E.size, np.int64)
    for _ in range(slots - weight_E.size):
        heaviest, weight = -1, -1.0
        for expert in order_E:
            if weight_E[expert] <= weight:
                break
            if weight_E[expert] / copies_E[expert] > weight and copies_E[expert] < most_copies:
                heaviest, weight = expert, weight_E[expert] / copies_E[expert]
        copies_E[heaviest] += 1
    return copies_E


@entry
def cheapest_copies(problem):
    """The copies [E] that add the least to the sum of all features, one at a time.

    Tokens are only shared out by a copy, but a batch that needs an expert may need all of its copies: where activated
    experts count, copies of rarely used experts are the cheapest.
    """
    experts, features = problem.share_EF.shape
    copies_E = np.ones(experts, np.int64)
    extra_E = np.empty(experts)
    for step in range(problem.rank_P.size):
        changed = step if step < experts else int(np.argmin(extra_E))
        copies_E[changed] += step >= experts
        extra_E[changed] = np.inf
        if copies_E[changed] < problem.node_R.size:
            extra_E[changed] = 0.0
            for feature in range(features):
                share, weights_2 = problem.share_EF[changed, feature], problem.weights_F2[feature]
                now, then = copies_E[changed], copies_E[changed] + 1
                extra_E[changed] += then * copy_value(share / then, weights_2, problem.batch)
                extra_E[changed] -= now * copy_value(share / now, weights_2, problem.batch)
    return copies_E


@entry
def pack(problem, copies_E, order_E):
    """The expert of every slot [P]: experts in this order, each copy to the rank that is cheapest with it.

    With the heaviest copies first this is LPT, longest processing time first (Graham 1969), for ranks with so many
    places each and never two copies of an expert; no expert may have more copies than there are ranks.
    """
    experts, features = problem.share_EF.shape
    ranks = problem.node_R.size
    expert_P = np.empty(problem.rank_P.size, np.int64)
    next_R = np.empty(ranks, np.int64)
    load_RF = np.zeros((ranks, features))
    held_RE = np.zeros((ranks, experts), np.bool_)
    value_F, with_F = np.empty(features), np.empty(features)
    for rank in range(ranks):
        next_R[rank] = problem.first_R[rank]
    for expert in order_E:
        for feature in range(features):
            share = problem.share_EF[expert, feature] / copies_E[expert]
            value_F[feature] = copy_value(share, problem.weights_F2[feature], problem.batch)
        for _ in range(copies_E[expert]):
            chosen, least = -1, np.inf
            for rank in range(ranks):
                if next_R[rank] == problem.first_R[rank + 1] or held_RE[rank, expert]:
                    continue
                if problem.table is None and load_RF[rank, 0] + value_F[0] >= least:
                    continue
                for feature in range(features):
                    with_F[feature] = load_RF[rank, feature] + value_F[feature]
                cost = cost_of(with_F, problem.table)
                if cost < least:
                    chosen, least = rank, cost
            if chosen >= 0:
                slot = next_R[chosen]
                next_R[chosen] += 1
            else:
                slot = _make_room(problem, expert, expert_P, next_R, held_RE)
                chosen = problem.rank_P[slot]
            expert_P[slot] = expert
            held_RE[chosen, expert] = True
            for feature in range(features):
                load_RF[chosen, feature] += value_F[feature]
    return expert_P


@inner
def _make_room(problem, expert, expert_P, next_R, held_RE):
    """A slot of a full rank without the expert, whose own expert goes to a rank with room.

    Needed when all ranks with room hold the expert already. As ranks differ by one slot at most, the full rank holds
    something that the other lacks. The last such slot is the lightest; refinement levels what it changes.
    """
    for room in range(next_R.size):
        if next_R[room] == problem.first_R[room + 1]:
            continue
        for full in range(next_R.size):
            if held_RE[full, expert]:
                continue
            for slot in range(next_R[full] - 1, problem.first_R[full] - 1, -1):
                moved = expert_P[slot]
                if not held_RE[room, moved]:
                    expert_P[next_R[room]] = moved
                    next_R[room] += 1
                    held_RE[room, moved], held_RE[full, moved] = True, False
                    return slot
    raise ValueError("an expert has more copies than there are ranks")
