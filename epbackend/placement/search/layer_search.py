"""The search over one layer's slots, compiled: which expert each slot holds, so that the worst rank costs least.

A layer starts from replica counts and a bin packing (`optimal_replicas`, `bin_pack`), is refined by swaps and replaced
replicas until none helps, then kicked at random and refined again (`improve`). `relieve` goes from the placement in use
to a balanced one with few moves instead.

A rank's cost is the largest of Q features of its slots, or a table over pairs of them; over the rank's speed, where
ranks differ in it. Both kinds share one source:
numba compiles it for problems whose table is None, and again only for those that have one.

Letters: E experts, P slots of the layer over all ranks, R ranks, Q features of a rank, M nodes. `entry` marks what
Python calls, kept on disk; `inner` what only compiled code calls. Loops instead of array expressions keep the
compilation short; what the innermost loops call takes few arrays, as each array that is handed over costs a reference
count.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from epbackend.placement.search.compiled import entry, inner

# The problem, and the state of a search


class LayerProblem(NamedTuple):
    """What is asked about one layer, as plain arrays. Rank r has the slots first_R[r] to first_R[r + 1] - 1."""

    share_EQ: np.ndarray
    """Share of the layer's tokens that goes to each expert (0 to 1), in the window that the feature is about."""
    weights_Q2: np.ndarray
    """The weights of a feature: of all of the layer's tokens, and of one activated expert."""
    batch: float
    """Tokens of a batch, on which the activation of an expert depends; 0 where no feature counts activations."""
    table: Any
    """None, or the objective's (tokens_X, experts_A, cost_XA); features are then pairs: tokens, activated experts."""
    first_R: np.ndarray
    """The first slot of each rank, and at the end the number of slots: R + 1 entries."""
    rank_P: np.ndarray
    """The rank of each slot."""
    node_R: np.ndarray
    """The node of each rank, from 0."""
    locality_price: float
    """What a crowded replica costs (see "Node locality"), in units of a rank's cost; 0: nodes play no part."""
    slow_R: np.ndarray
    """One over the speed of each rank, by which its cost is multiplied; 1 for the fastest."""


class State(NamedTuple):
    """The expert of every slot, and what follows from it; kept up to date through every change."""

    expert_P: np.ndarray
    held_RE: np.ndarray
    """Replicas of each expert on each rank."""
    holder_ER: np.ndarray
    """The ranks that hold each expert, in any order: as many of a row as `holders_E` says."""
    holders_E: np.ndarray
    replicas_E: np.ndarray
    value_EQ: np.ndarray
    """What one replica adds to the features of its rank."""
    load_RQ: np.ndarray
    """The features of each rank: sums over its slots."""
    cost_R: np.ndarray


@inner
def new_state(problem, expert_P):
    """The state in which the slots hold these experts."""
    experts, features = problem.share_EQ.shape
    ranks = problem.node_R.size
    state = State(
        np.empty(expert_P.size, np.int64),
        np.empty((ranks, experts), np.int16),
        np.empty((experts, ranks), np.int32),
        np.empty(experts, np.int64),
        np.empty(experts, np.int64),
        np.empty((experts, features)),
        np.empty((ranks, features)),
        np.empty(ranks),
    )
    hold(problem, state, expert_P)
    return state


@inner
def hold(problem, state, expert_P):
    """Makes the slots hold these experts, whatever they held before."""
    ranks, experts = state.held_RE.shape
    for rank in range(ranks):
        for expert in range(experts):
            state.held_RE[rank, expert] = 0
    for expert in range(experts):
        state.replicas_E[expert] = 0
        state.holders_E[expert] = 0
    for slot in range(expert_P.size):
        expert = expert_P[slot]
        state.expert_P[slot] = expert
        _put(state, problem.rank_P[slot], expert)
        state.replicas_E[expert] += 1
    update_values(problem, state, 0, experts)
    for rank in range(ranks):
        update_cost(problem, state, rank)


@inner
def _put(state, rank, expert):
    """The rank holds one replica of the expert more."""
    if state.held_RE[rank, expert] == 0:
        state.holder_ER[expert, state.holders_E[expert]] = rank
        state.holders_E[expert] += 1
    state.held_RE[rank, expert] += 1


@inner
def _take(state, rank, expert):
    """The rank holds one replica of the expert less."""
    state.held_RE[rank, expert] -= 1
    if state.held_RE[rank, expert] == 0:
        state.holders_E[expert] -= 1
        index = 0
        while state.holder_ER[expert, index] != rank:
            index += 1
        state.holder_ER[expert, index] = state.holder_ER[expert, state.holders_E[expert]]


@entry
def slots_cost(problem, expert_P):
    """The cost of a layer whose slots hold these experts."""
    return total_cost(problem, new_state(problem, expert_P))


@inner
def total_cost(problem, state):
    """The worst rank, and the price of the crowded replicas."""
    cost = state.cost_R.max()
    if problem.locality_price > 0.0:
        cost += problem.locality_price * crowded_replicas(problem, state)
    return cost


@inner
def mean_cost(problem, state):
    """The mean over the ranks, each as much as its speed: what all would cost if they ended together."""
    cost, speed = 0.0, 0.0
    for rank in range(state.cost_R.size):
        cost += state.cost_R[rank] / problem.slow_R[rank]
        speed += 1.0 / problem.slow_R[rank]
    return cost / speed


@inner
def update_values(problem, state, first, last):
    """Updates the value of a replica after the number of replicas changed, for experts first to last - 1."""
    for expert in range(first, last):
        for feature in range(state.value_EQ.shape[1]):
            share = problem.share_EQ[expert, feature] / state.replicas_E[expert]
            state.value_EQ[expert, feature] = replica_value(share, problem.weights_Q2[feature], problem.batch)


@inner
def update_cost(problem, state, rank):
    """Updates the rank's features and cost; summed over its slots each time, so that rounding errors do not add up."""
    for feature in range(state.load_RQ.shape[1]):
        load = 0.0
        for slot in range(problem.first_R[rank], problem.first_R[rank + 1]):
            load += state.value_EQ[state.expert_P[slot], feature]
        state.load_RQ[rank, feature] = load
    state.cost_R[rank] = cost_of(state.load_RQ[rank], problem.table) * problem.slow_R[rank]


@inner
def swap(problem, state, slot, other):
    """Exchanges the experts of two slots."""
    expert, partner = state.expert_P[slot], state.expert_P[other]
    rank, other_rank = problem.rank_P[slot], problem.rank_P[other]
    state.expert_P[slot], state.expert_P[other] = partner, expert
    _take(state, rank, expert)
    _put(state, rank, partner)
    _take(state, other_rank, partner)
    _put(state, other_rank, expert)
    update_cost(problem, state, rank)
    update_cost(problem, state, other_rank)


@inner
def replace(problem, state, slot, expert):
    """Makes the slot a replica of another expert: its old expert has one replica less, the new one has one more."""
    loser, home = state.expert_P[slot], problem.rank_P[slot]
    state.expert_P[slot] = expert
    _take(state, home, loser)
    _put(state, home, expert)
    state.replicas_E[loser] -= 1
    state.replicas_E[expert] += 1
    update_values(problem, state, loser, loser + 1)
    update_values(problem, state, expert, expert + 1)
    update_cost(problem, state, home)
    for changed in (loser, expert):
        for index in range(state.holders_E[changed]):
            update_cost(problem, state, state.holder_ER[changed, index])


# What a rank costs


@inner
def replica_value(share, weights_2, batch):
    """What a replica with this share of the tokens adds to a feature: tokens, and the chance that a batch needs it."""
    if weights_2[1] == 0.0:
        return weights_2[0] * share
    return weights_2[0] * share - weights_2[1] * math.expm1(batch * math.log1p(-share))


@inner
def cost_of(load_Q, table):
    """Cost of a rank of speed 1 with these features."""
    worst = 0.0
    if table is None:
        for feature in range(load_Q.size):
            worst = max(worst, load_Q[feature])
        return worst
    for feature in range(0, load_Q.size, 2):
        worst = max(worst, interpolate(load_Q[feature], load_Q[feature + 1], table))
    return worst


@inner
def interpolate(tokens, experts, table):
    """The objective's table between its points: bilinear, and outside of it as its outermost cells."""
    tokens_X, experts_A, cost_XA = table
    x, y = _cell(tokens_X, tokens), _cell(experts_A, experts)
    fx = (tokens - tokens_X[x]) / (tokens_X[x + 1] - tokens_X[x])
    fy = (experts - experts_A[y]) / (experts_A[y + 1] - experts_A[y])
    low = cost_XA[x, y] + fy * (cost_XA[x, y + 1] - cost_XA[x, y])
    high = cost_XA[x + 1, y] + fy * (cost_XA[x + 1, y + 1] - cost_XA[x + 1, y])
    return low + fx * (high - low)


@inner
def _cell(axis, value):
    """The cell of the axis that holds the value: of one number. `objectives._cell` is the form for arrays."""
    index = 0
    while index < axis.size - 2 and axis[index + 1] <= value:
        index += 1
    return index


# Node locality
#
# Tokens that prefer their own node (the split `nearest`) must leave it for an expert that the node lacks. So a replica
# is crowded if it shares its node with another one of its expert while some node has none: at least 0, at most an
# expert's replicas - 1.


@inner
def crowded_replicas(problem, state):
    """Crowded replicas, over all experts."""
    total = 0
    for expert in range(state.replicas_E.size):
        if state.replicas_E[expert] > 1:
            total += _crowded_of(problem, state, expert, -1, -1)
    return total


@inner
def _crowded_of(problem, state, expert, from_node, to_node):
    """Crowded replicas of the expert, after a move of one from a node to another (both -1: without a move)."""
    on_node_M = np.zeros(problem.node_R[-1] + 1, np.int64)
    for rank in range(state.cost_R.size):
        on_node_M[problem.node_R[rank]] += state.held_RE[rank, expert]
    if from_node >= 0:
        on_node_M[from_node] -= 1
        on_node_M[to_node] += 1
    reached = 0
    for replicas in on_node_M:
        reached += replicas > 0
    return 0 if reached == on_node_M.size else state.replicas_E[expert] - reached


@inner
def crowded_by_swap(problem, state, slot, other):
    """How many more replicas would be crowded if the two slots exchanged their experts."""
    home, away = problem.node_R[problem.rank_P[slot]], problem.node_R[problem.rank_P[other]]
    if home == away:
        return 0
    expert, partner = state.expert_P[slot], state.expert_P[other]
    after = _crowded_of(problem, state, expert, home, away) + _crowded_of(problem, state, partner, away, home)
    return after - _crowded_of(problem, state, expert, -1, -1) - _crowded_of(problem, state, partner, -1, -1)


@inner
def shares_node(problem, state, slot):
    """Whether the slot's node holds another replica of its expert."""
    replicas, node = 0, problem.node_R[problem.rank_P[slot]]
    for rank in range(state.cost_R.size):
        if problem.node_R[rank] == node:
            replicas += state.held_RE[rank, state.expert_P[slot]]
    return replicas > 1


# Starts: how many replicas each expert gets, and a first slot for each


@entry
def optimal_replicas(weight_E, order_E, slots, most_replicas):
    """Replicas [E] that minimise the largest weight of a replica: one at a time, to the expert with the heaviest one.

    `order_E` lists the experts by falling weight: an undivided expert bounds all that follow, so few are looked at.

    The same greedy rule is written four times, as its ties and types decide plans: here a tie goes to the expert with
    the larger weight, in `omni` and `level_search.power_law_replicas` to the one with the lower number (`omni` does
    without numba), and `eplb` divides in float32 and notes the order in which replicas are given.
    """
    replicas_E = np.ones(weight_E.size, np.int64)
    for _ in range(slots - weight_E.size):
        heaviest, weight = -1, -1.0
        for expert in order_E:
            if weight_E[expert] <= weight:
                break
            if weight_E[expert] / replicas_E[expert] > weight and replicas_E[expert] < most_replicas:
                heaviest, weight = expert, weight_E[expert] / replicas_E[expert]
        replicas_E[heaviest] += 1
    return replicas_E


@entry
def cheapest_replicas(problem):
    """Replicas [E], given one at a time so that each adds least to the sum of all features.

    A replica takes tokens from others, but a batch that needs an expert may need all of its replicas: where activated
    experts count, replicas of rarely used experts are the cheapest.
    """
    experts, features = problem.share_EQ.shape
    replicas_E = np.ones(experts, np.int64)
    extra_E = np.empty(experts)
    for step in range(problem.rank_P.size):
        changed = step if step < experts else int(np.argmin(extra_E))
        replicas_E[changed] += step >= experts
        extra_E[changed] = np.inf
        if replicas_E[changed] < problem.node_R.size:
            extra_E[changed] = 0.0
            for feature in range(features):
                share, weights_2 = problem.share_EQ[changed, feature], problem.weights_Q2[feature]
                now, then = replicas_E[changed], replicas_E[changed] + 1
                extra_E[changed] += then * replica_value(share / then, weights_2, problem.batch)
                extra_E[changed] -= now * replica_value(share / now, weights_2, problem.batch)
    return replicas_E


@entry
def bin_pack(problem, replicas_E, order_E):
    """The expert of every slot [P]: experts in this order, each replica to the rank that is cheapest with it.

    With the heaviest replicas first this is LPT, longest processing time first (Graham 1969), with a limited number of
    slots on each rank and never two replicas of an expert there. No expert may have more replicas than there are ranks.
    """
    experts, features = problem.share_EQ.shape
    ranks = problem.node_R.size
    expert_P = np.empty(problem.rank_P.size, np.int64)
    next_R = np.empty(ranks, np.int64)
    load_RQ = np.zeros((ranks, features))
    held_RE = np.zeros((ranks, experts), np.bool_)
    value_Q, with_Q = np.empty(features), np.empty(features)
    for rank in range(ranks):
        next_R[rank] = problem.first_R[rank]
    for expert in order_E:
        for feature in range(features):
            share = problem.share_EQ[expert, feature] / replicas_E[expert]
            value_Q[feature] = replica_value(share, problem.weights_Q2[feature], problem.batch)
        for _ in range(replicas_E[expert]):
            chosen, least = -1, np.inf
            for rank in range(ranks):
                if next_R[rank] == problem.first_R[rank + 1] or held_RE[rank, expert]:
                    continue
                slow = problem.slow_R[rank]
                if problem.table is None and (load_RQ[rank, 0] + value_Q[0]) * slow >= least:
                    continue
                for feature in range(features):
                    with_Q[feature] = load_RQ[rank, feature] + value_Q[feature]
                cost = cost_of(with_Q, problem.table) * slow
                if cost < least:
                    chosen, least = rank, cost
            if chosen >= 0:
                slot = next_R[chosen]
                next_R[chosen] += 1
            else:
                slot = _make_room(problem, expert, expert_P, next_R, held_RE)
                if slot < 0:
                    continue
                chosen = problem.rank_P[slot]
            expert_P[slot] = expert
            held_RE[chosen, expert] = True
            for feature in range(features):
                load_RQ[chosen, feature] += value_Q[feature]
    for rank in range(ranks):
        for slot in range(next_R[rank], problem.first_R[rank + 1]):
            for expert in order_E:
                if not held_RE[rank, expert]:
                    expert_P[slot] = expert
                    held_RE[rank, expert] = True
                    break
    return expert_P


@inner
def _make_room(problem, expert, expert_P, next_R, held_RE):
    """A slot of a full rank without the expert, whose own expert moves to a rank with a free slot; -1: there is none.

    Needed when all ranks with a free slot hold the expert already. If ranks differ by one slot at most, the full rank
    holds an expert that the other lacks. The last such slot is the lightest; refinement makes up for the change.
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
    return -1


# Refinement: swaps and replaced replicas until none helps
#
# The aim is the cost of the worst rank, plus the price of crowded replicas where there is one. Only changes that
# relieve the worst rank can help; it is paired with the cheapest other rank first, which is mostly enough.

LEAST_GAIN = 1e-9
"""Relative gain below which a change is rounding noise; every accepted change gains more, so refinement ends."""


@inner
def refine(problem, state):
    """Swaps and replacements that relieve the rank which is worst at that time, until none does."""
    while True:
        worst = np.argmax(state.cost_R)
        slot, other = best_swap(problem, state, worst, problem.table)
        if slot >= 0:
            swap(problem, state, slot, other)
            continue
        slot, expert = best_replacement(problem, state, worst)
        if slot < 0:
            break
        replace(problem, state, slot, expert)
    if problem.locality_price > 0.0:
        _improve_locality(problem, state)


@inner
def best_swap(problem, state, worst, table):
    """Two slots to exchange, one of them on the worst rank, so that both ranks cost less than it did, or (-1, -1).

    The other rank is the cheapest if that helps, or else the first that helps; of its swaps the best is taken.
    """
    best, best_slot, best_other = state.cost_R[worst] * (1.0 - LEAST_GAIN), -1, -1
    load_RQ, value_EQ, held_RE, expert_P = state.load_RQ, state.value_EQ, state.held_RE, state.expert_P
    features, slow_R = load_RQ.shape[1], problem.slow_R
    here_slow = slow_R[worst]
    cheapest = np.argmin(state.cost_R)
    for step in range(state.cost_R.size):
        rank = cheapest if step == 0 else step - (step <= cheapest)
        # No swap gets both below what they would take if they ended together. With a table, which may have any shape,
        # the bound is only a guess.
        here, there, slow = load_RQ[worst, 0], load_RQ[rank, 0], slow_R[rank]
        bound = (
            here_slow * slow / (here_slow + slow) * (here + there) if table is None else state.cost_R[rank]
        )
        if rank == worst or bound >= best:
            continue
        for slot in range(problem.first_R[worst], problem.first_R[worst + 1]):
            expert = expert_P[slot]
            if held_RE[rank, expert]:
                continue
            for other in range(problem.first_R[rank], problem.first_R[rank + 1]):
                partner = expert_P[other]
                # The first feature alone rules out most: this is the innermost loop of the search.
                change = value_EQ[partner, 0] - value_EQ[expert, 0]
                cost = max((here + change) * here_slow, (there - change) * slow) if table is None else 0.0
                if cost >= best or held_RE[worst, partner]:
                    continue
                if features > 1:
                    cost = max(swapped_costs(load_RQ, value_EQ, slow_R, worst, rank, expert, partner, table))
                if problem.locality_price > 0.0:
                    cost += problem.locality_price * crowded_by_swap(problem, state, slot, other)
                if cost < best:
                    best, best_slot, best_other = cost, slot, other
        if best_slot >= 0:
            break
    return best_slot, best_other


@inner
def swapped_costs(load_RQ, value_EQ, slow_R, rank, other_rank, expert, partner, table):
    """Costs of two ranks after `expert` moved from the first to the second, in exchange for `partner`."""
    here, there = 0.0, 0.0
    if table is None:
        for feature in range(load_RQ.shape[1]):
            change = value_EQ[partner, feature] - value_EQ[expert, feature]
            here = max(here, load_RQ[rank, feature] + change)
            there = max(there, load_RQ[other_rank, feature] - change)
        return here * slow_R[rank], there * slow_R[other_rank]
    for feature in range(0, load_RQ.shape[1], 2):
        tokens = value_EQ[partner, feature] - value_EQ[expert, feature]
        experts = value_EQ[partner, feature + 1] - value_EQ[expert, feature + 1]
        cost = interpolate(load_RQ[rank, feature] + tokens, load_RQ[rank, feature + 1] + experts, table)
        here = max(here, cost)
        cost = interpolate(
            load_RQ[other_rank, feature] - tokens, load_RQ[other_rank, feature + 1] - experts, table
        )
        there = max(there, cost)
    return here * slow_R[rank], there * slow_R[other_rank]


@inner
def best_replacement(problem, state, worst):
    """The slot, and its new expert, after which the dearest rank concerned is cheapest; (-1, -1) where none helps.

    Either the worst rank gives up a replica for a lighter one, or an expert of the worst rank gets a further replica.
    """
    best, best_slot, best_expert = state.cost_R[worst] * (1.0 - LEAST_GAIN), -1, -1
    experts, first, last = state.replicas_E.size, problem.first_R[worst], problem.first_R[worst + 1]
    for slot in range(state.expert_P.size):
        home, loser = problem.rank_P[slot], state.expert_P[slot]
        gives_up = home == worst
        if state.replicas_E[loser] < 2 or (not gives_up and state.held_RE[worst, loser]):
            continue
        exceeding = exceeding_rank(problem, state, slot, best)
        for index in range(experts if gives_up else last - first):
            expert = index if gives_up else state.expert_P[first + index]
            if state.held_RE[home, expert] or (exceeding >= 0 and not state.held_RE[exceeding, expert]):
                continue
            cost, _ = replaced_cost(problem, state, slot, expert, best)
            if cost < best:
                best, best_slot, best_expert = cost, slot, expert
    return best_slot, best_expert


@inner
def exceeding_rank(problem, state, slot, limit):
    """A rank that would exceed the limit if the expert's other replicas took over the slot's tokens; -1: none would.

    Only an expert that this rank holds, and that gets lighter there, can then take the slot.
    """
    expert = state.expert_P[slot]
    with_Q = np.empty(state.load_RQ.shape[1])
    for index in range(state.holders_E[expert]):
        rank = state.holder_ER[expert, index]
        if rank == problem.rank_P[slot]:
            continue
        for feature in range(with_Q.size):
            share = problem.share_EQ[expert, feature] / (state.replicas_E[expert] - 1)
            value = replica_value(share, problem.weights_Q2[feature], problem.batch)
            with_Q[feature] = state.load_RQ[rank, feature] + value - state.value_EQ[expert, feature]
        if cost_of(with_Q, problem.table) * problem.slow_R[rank] >= limit:
            return rank
    return -1


@inner
def replaced_cost(problem, state, slot, expert, limit):
    """The effect on the ranks that hold either expert, if the slot becomes a replica of `expert`.

    The cost of the dearest of them, and by how much less they exceed the limit, added up.
    """
    loser, home = state.expert_P[slot], problem.rank_P[slot]
    features = state.load_RQ.shape[1]
    loses_Q, gains_Q, with_Q = np.empty(features), np.empty(features), np.empty(features)
    for feature in range(features):
        share = problem.share_EQ[loser, feature] / (state.replicas_E[loser] - 1)
        loses_Q[feature] = replica_value(share, problem.weights_Q2[feature], problem.batch)
        share = problem.share_EQ[expert, feature] / (state.replicas_E[expert] + 1)
        gains_Q[feature] = replica_value(share, problem.weights_Q2[feature], problem.batch)
    worst, relief = 0.0, 0.0
    of_loser = state.holders_E[loser]
    for index in range(of_loser + state.holders_E[expert]):
        rank = (
            state.holder_ER[loser, index] if index < of_loser else state.holder_ER[expert, index - of_loser]
        )
        loses, gains = state.held_RE[rank, loser], state.held_RE[rank, expert]
        if index >= of_loser and loses:
            continue
        for feature in range(features):
            change = loses * (loses_Q[feature] - state.value_EQ[loser, feature])
            change += gains * (gains_Q[feature] - state.value_EQ[expert, feature])
            if rank == home:
                change += gains_Q[feature] - loses_Q[feature]
            with_Q[feature] = state.load_RQ[rank, feature] + change
        cost = cost_of(with_Q, problem.table) * problem.slow_R[rank]
        worst = max(worst, cost)
        relief += max(state.cost_R[rank] - limit, 0.0) - max(cost - limit, 0.0)
    return worst, relief


@inner
def _improve_locality(problem, state):
    """Swaps that make fewer replicas crowded, as long as that is worth more than the worst rank rises."""
    while True:
        worst = state.cost_R.max()
        best, best_slot, best_other = -LEAST_GAIN * worst, -1, -1
        for slot in range(state.expert_P.size):
            rank, expert = problem.rank_P[slot], state.expert_P[slot]
            if state.replicas_E[expert] < 2 or not shares_node(problem, state, slot):
                continue
            for other in range(state.expert_P.size):
                other_rank, partner = problem.rank_P[other], state.expert_P[other]
                if state.held_RE[other_rank, expert] or state.held_RE[rank, partner]:
                    continue
                costs = swapped_costs(
                    state.load_RQ,
                    state.value_EQ,
                    problem.slow_R,
                    rank,
                    other_rank,
                    expert,
                    partner,
                    problem.table,
                )
                rise = max(max(costs) - worst, 0.0)
                if rise - 2 * problem.locality_price >= best:  # a swap moves two replicas
                    continue
                change = rise + problem.locality_price * crowded_by_swap(problem, state, slot, other)
                if change < best:
                    best, best_slot, best_other = change, slot, other
        if best_slot < 0:
            break
        swap(problem, state, best_slot, best_other)


# Iterated local search: random kicks, and refinement again after each

REPLACEMENTS = 2
"""One in this many changes of a kick replaces a replica; the others exchange slots."""

PATIENCE = 2
"""A run is stuck after this many kicks without a gain, times the slots."""


@entry
def improve(problem, expert_P, start_P, kicks, seed):
    """Iterated local search (Lourenço, Martin, Stützle 2003): the best layer [P] after `kicks` kicks, and its cost.

    A run that is stuck starts again from `start_P`. The result is never worse than `expert_P`, and the same for the
    same seed.
    """
    state = new_state(problem, expert_P)
    random_1 = np.full(1, seed, np.uint64)
    best_P, best = expert_P.copy(), total_cost(problem, state)
    home_P, home = expert_P.copy(), best
    failures = 0
    for kick in range(kicks + 1):
        if failures == PATIENCE * expert_P.size:
            hold(problem, state, start_P)
            home, failures = np.inf, 0
        if kick:
            _kick(problem, state, random_1)
        refine(problem, state)
        cost = total_cost(problem, state)
        failures = 0 if cost < home else failures + 1
        if cost > home:
            hold(problem, state, home_P)
            continue
        home = cost
        _copy(state.expert_P, home_P)
        if cost < best:
            best = cost
            _copy(home_P, best_P)
    return best_P, best


@inner
def _kick(problem, state, random_1):
    """One to three random changes: replacements, or swaps, of which the first takes a slot of the worst rank."""
    for change in range(1 + random_below(random_1, 3)):
        slot = random_below(random_1, state.expert_P.size)
        if random_below(random_1, REPLACEMENTS) == 0:
            expert = random_below(random_1, state.replicas_E.size)
            if state.replicas_E[state.expert_P[slot]] > 1 and not state.held_RE[problem.rank_P[slot], expert]:
                replace(problem, state, slot, expert)
            continue
        if change == 0:
            worst = np.argmax(state.cost_R)
            first = problem.first_R[worst]
            slot = first + slot % (problem.first_R[worst + 1] - first)
        other = random_below(random_1, state.expert_P.size)
        rank, other_rank = problem.rank_P[slot], problem.rank_P[other]
        if not (
            state.held_RE[rank, state.expert_P[other]] or state.held_RE[other_rank, state.expert_P[slot]]
        ):
            swap(problem, state, slot, other)


@inner
def _copy(source_P, target_P):
    """As a loop, which compiles faster than an array expression."""
    for slot in range(source_P.size):
        target_P[slot] = source_P[slot]


@inner
def random_below(random_1, limit):
    """The next random number in [0, limit), by SplitMix64 (Steele, Lea, Flood 2014)."""
    random_1[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = random_1[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((mixed ^ (mixed >> np.uint64(31))) % np.uint64(limit))


# From the placement in use to a balanced one, with few moves
#
# Ranks above a limit are brought below it; all others are left alone. Each step takes the change of the worst rank, a
# swap or a replaced replica, that brings the most relief for each expert that a rank has to fetch. The limit is the
# target at first. Where no step brings relief, because what leaves one rank above the limit only lifts others above it,
# the limit rises towards the worst rank, and follows it down again.

LEAST_RELIEF = 1e-9
"""Relief relative to the limit, below which a change is rounding noise."""

LEAST_STEP = 0.01
"""By this part of its cost the worst rank has to be relieved at least, when the limit has risen as far as it can."""

RISES = 8
"""Rises of the limit after which the search ends, if nothing better was found in between."""

STEPS = 4
"""Steps at most, times the slots: what a lower limit brings may undo what a higher one brought."""

FREE = 0.25
"""What a change without a fetched expert counts as, because it undoes an earlier one: little, but not zero."""


@entry
def relieve(problem, before_P, target, least, price, most_fetched):
    """The expert of every slot [P], how many a rank has to fetch for it, and whether the steps reached the target.

    That is: no rank costs more than `target` times the mean (or than `least`, which no placement gets below), nor more
    than the worst rank did before. Of all steps of the way the one is taken at which the worst rank over the mean, and
    `price` for each fetched expert, are least together. No more than `most_fetched` are fetched.
    """
    state = new_state(problem, before_P)
    before_RE = np.zeros(state.held_RE.shape, np.int16)  # counted again: faster than compiled code copies
    for slot in range(before_P.size):
        before_RE[problem.rank_P[slot], before_P[slot]] += 1
    target = min(target, state.cost_R.max() / mean_cost(problem, state))
    fetched = _separate(problem, state, before_RE, most_fetched)
    best, best_fetched, best_P = np.inf, 0, state.expert_P.copy()
    more_EQ, fewer_EQ = np.empty(state.value_EQ.shape), np.empty(state.value_EQ.shape)
    for expert in range(state.replicas_E.size):
        _values_if_changed(problem, state, expert, more_EQ, fewer_EQ)
    touched_R = np.zeros(state.cost_R.size, np.bool_)
    limit, rises = 0.0, 0
    for _ in range(STEPS * before_P.size):
        worst, mean = np.argmax(state.cost_R), mean_cost(problem, state)
        value = state.cost_R[worst] / mean + price * fetched
        if value < best:
            best, best_fetched, rises = value, fetched, 0
            _copy(state.expert_P, best_P)
        goal, highest = max(target * mean, least), state.cost_R[worst] * (1.0 - LEAST_STEP)
        if state.cost_R[worst] <= goal * (1.0 + LEAST_RELIEF):
            return best_P, best_fetched, True
        limit = max(goal, min(limit, highest))
        slot, other, swap_worth = _most_relieving_swap(problem, state, before_RE, worst, limit)
        replaced, expert, replacement_worth = _most_relieving_replacement(
            problem, state, before_RE, worst, limit, more_EQ, fewer_EQ, touched_R
        )
        if max(swap_worth, replacement_worth) <= LEAST_RELIEF * limit:
            rises += 1
            if limit >= highest or rises > RISES:
                break
            limit = min(0.5 * (limit + state.cost_R[worst]), highest)
            continue
        if swap_worth >= replacement_worth:
            fetched += _fetched_by_swap(problem, state, before_RE, slot, other)
            swap(problem, state, slot, other)
            touched_R[worst] = touched_R[problem.rank_P[other]] = True
        else:
            touched_R[problem.rank_P[replaced]] = True
            loser = state.expert_P[replaced]
            fetched += _fetched(state.held_RE, before_RE, problem.rank_P[replaced], expert, loser)
            replace(problem, state, replaced, expert)
            _values_if_changed(problem, state, loser, more_EQ, fewer_EQ)
            _values_if_changed(problem, state, expert, more_EQ, fewer_EQ)
        if fetched > most_fetched:
            break
    return best_P, best_fetched, False


@inner
def _separate(problem, state, before_RE, most_fetched):
    """Replaces replicas that share a rank with another replica of their expert, even if the balance suffers.

    Returns how many experts have to be fetched for it, `most_fetched` at most.
    """
    fetched = 0
    for slot in range(state.expert_P.size):
        rank, double = problem.rank_P[slot], state.expert_P[slot]
        if state.held_RE[rank, double] < 2 or fetched == most_fetched:
            continue
        best, best_expert = np.inf, -1
        for expert in range(state.replicas_E.size):
            if state.held_RE[rank, expert] == 0:
                cost, _ = replaced_cost(problem, state, slot, expert, best)
                if cost < best:
                    best, best_expert = cost, expert
        fetched += _fetched(state.held_RE, before_RE, rank, best_expert, double)
        replace(problem, state, slot, best_expert)
    return fetched


@inner
def _most_relieving_swap(problem, state, before_RE, worst, limit):
    """The swap that brings the most relief for each fetched expert: two slots, and that relief."""
    best, best_slot, best_other = 0.0, -1, -1
    held_RE, value_EQ, features = state.held_RE, state.value_EQ, state.value_EQ.shape[1]
    slow_R = problem.slow_R
    first_R, alone = problem.first_R, problem.first_R[worst + 1] - problem.first_R[worst] == 1
    for slot in range(first_R[worst], first_R[worst + 1]):
        expert = state.expert_P[slot]
        for other in range(state.expert_P.size):
            rank, partner = problem.rank_P[other], state.expert_P[other]
            # They would exchange their costs.
            if alone and first_R[rank + 1] - first_R[rank] == 1 and slow_R[rank] == slow_R[worst]:
                continue
            # Tokens alone: only a lighter expert relieves the worst rank. This rules out most.
            if features == 1 and problem.table is None and value_EQ[partner, 0] >= value_EQ[expert, 0]:
                continue
            if held_RE[rank, expert] or held_RE[worst, partner]:
                continue
            here, there = swapped_costs(
                state.load_RQ, value_EQ, slow_R, worst, rank, expert, partner, problem.table
            )
            relief = state.cost_R[worst] - max(here, limit)
            relief += max(state.cost_R[rank], limit) - max(there, limit)
            if relief <= FREE * best:
                continue
            worth = relief / max(_fetched_by_swap(problem, state, before_RE, slot, other), FREE)
            if worth > best:
                best, best_slot, best_other = worth, slot, other
    return best_slot, best_other, best


@inner
def _most_relieving_replacement(problem, state, before_RE, worst, limit, more_EQ, fewer_EQ, touched_R):
    """The replacement that brings the most relief for each fetched expert: slot, new expert, and that relief.

    The values are those of `_values_if_changed`.

    It tries what `best_replacement` tries, but by sums that are made once for each expert. They count a rank that holds
    both experts as if each changed it alone, which is less relief than it gets.
    """
    best, best_slot, best_expert = 0.0, -1, -1
    experts, first, last = state.replicas_E.size, problem.first_R[worst], problem.first_R[worst + 1]
    load_RQ, value_EQ, cost_R, table = state.load_RQ, state.value_EQ, state.cost_R, problem.table
    expert_P, rank_P, held_RE = state.expert_P, problem.rank_P, state.held_RE
    holder_ER, holders_E, replicas_E = state.holder_ER, state.holders_E, state.replicas_E
    slow_R = problem.slow_R
    relief_E, burden_E = np.zeros(experts), np.zeros(experts)
    for expert in range(experts):
        # On each rank; `held_RE` is too large for the fast caches.
        single = holders_E[expert] == replicas_E[expert]
        for index in range(holders_E[expert]):
            rank = holder_ER[expert, index]
            held = 1 if single else held_RE[rank, expert]
            if cost_R[rank] > limit:
                relief_E[expert] += cost_R[rank] - limit
                relief_E[expert] -= _excess(
                    load_RQ, value_EQ, slow_R, rank, expert, held, more_EQ, table, limit
                )
            if replicas_E[expert] > 1:
                burden_E[expert] += _excess(
                    load_RQ, value_EQ, slow_R, rank, expert, held, fewer_EQ, table, limit
                )
                burden_E[expert] -= max(cost_R[rank] - limit, 0.0)
    with_Q = np.empty(value_EQ.shape[1])
    for slot in range(expert_P.size):
        home, loser = rank_P[slot], expert_P[slot]
        gives_up = home == worst
        if replicas_E[loser] < 2 or (not gives_up and held_RE[worst, loser]):
            continue
        held = 1 if holders_E[loser] == replicas_E[loser] else held_RE[home, loser]
        least_fetched = FREE if touched_R[home] else 1.0
        # The other ranks' part: `home` is not one of them, so what it would have to bear is taken out.
        home_excess = max(cost_R[home] - limit, 0.0)
        spared = _excess(load_RQ, value_EQ, slow_R, home, loser, held, fewer_EQ, table, limit) - home_excess
        for index in range(experts if gives_up else last - first):
            expert = index if gives_up else expert_P[first + index]
            relief = relief_E[expert] - burden_E[loser] + spared + home_excess
            if relief <= least_fetched * best:  # most cannot be the best, even if all is well with this rank
                continue
            for feature in range(with_Q.size):
                stay = (held - 1) * (fewer_EQ[loser, feature] - value_EQ[loser, feature])
                change = more_EQ[expert, feature] - value_EQ[loser, feature] + stay
                with_Q[feature] = load_RQ[home, feature] + change
            relief -= max(cost_of(with_Q, table) * slow_R[home] - limit, 0.0)
            if relief <= least_fetched * best or held_RE[home, expert]:
                continue
            worth = relief / max(_fetched(held_RE, before_RE, home, expert, loser), FREE)
            if worth > best:
                best, best_slot, best_expert = worth, slot, expert
    return best_slot, best_expert, best


@inner
def _excess(load_RQ, value_EQ, slow_R, rank, expert, held, new_EQ, table, limit):
    """By how much the rank would exceed the limit if its replicas of the expert had the new values."""
    cost = 0.0
    if table is None:
        for feature in range(load_RQ.shape[1]):
            change = held * (new_EQ[expert, feature] - value_EQ[expert, feature])
            cost = max(cost, load_RQ[rank, feature] + change)
    else:
        for feature in range(0, load_RQ.shape[1], 2):
            tokens = held * (new_EQ[expert, feature] - value_EQ[expert, feature])
            experts = held * (new_EQ[expert, feature + 1] - value_EQ[expert, feature + 1])
            at = load_RQ[rank, feature] + tokens, load_RQ[rank, feature + 1] + experts
            cost = max(cost, interpolate(at[0], at[1], table))
    return max(cost * slow_R[rank] - limit, 0.0)


@inner
def _values_if_changed(problem, state, expert, more_EQ, fewer_EQ):
    """Writes what a replica of the expert adds to the features of its rank, if there is one more of them, or fewer."""
    replicas = state.replicas_E[expert]
    for feature in range(more_EQ.shape[1]):
        share, weights_2 = problem.share_EQ[expert, feature], problem.weights_Q2[feature]
        more_EQ[expert, feature] = replica_value(share / (replicas + 1), weights_2, problem.batch)
        fewer_EQ[expert, feature] = replica_value(share / max(replicas - 1, 1), weights_2, problem.batch)


@inner
def _fetched_by_swap(problem, state, before_RE, slot, other):
    """How many more experts the ranks of two slots have to fetch if these exchange theirs: -2 to 2."""
    rank, other_rank = problem.rank_P[slot], problem.rank_P[other]
    expert, partner = state.expert_P[slot], state.expert_P[other]
    more = _fetched(state.held_RE, before_RE, rank, partner, expert)
    return more + _fetched(state.held_RE, before_RE, other_rank, expert, partner)


@inner
def _fetched(held_RE, before_RE, rank, gains, loses):
    """How many more experts the rank has to fetch if it gains one expert and loses another: -1, 0 or 1."""
    more = 1 if held_RE[rank, gains] >= before_RE[rank, gains] else 0
    return more - 1 if held_RE[rank, loses] > before_RE[rank, loses] else more


# The convex envelope of a falling curve, by which a budget of slots is shared out over layers


@entry
def envelope_falls(curve_X):
    """How far the lower convex envelope of a curve of X points falls at each step; no step falls more than the last.

    Andrew's monotone chain (1979), on points that are in order.
    """
    corner_X = np.empty(curve_X.size, np.int64)
    corners = 0
    for x in range(curve_X.size):
        while corners >= 2:
            a, b = corner_X[corners - 2], corner_X[corners - 1]
            if (curve_X[a] - curve_X[b]) * (x - b) > (curve_X[b] - curve_X[x]) * (b - a):
                break
            corners -= 1
        corner_X[corners] = x
        corners += 1
    fall_X = np.empty(curve_X.size - 1)
    for corner in range(corners - 1):
        a, b = corner_X[corner], corner_X[corner + 1]
        for x in range(a, b):
            fall_X[x] = (curve_X[a] - curve_X[b]) / (b - a)
    return fall_X
