"""How placement is compiled: `entry` for what Python calls, kept on disk; `inner` for what only compiled code calls.

Random numbers for searches: the same on every machine.

The state of a search over one layer: which expert each slot holds, and what every rank costs because of it.

A rank's cost is the largest of F features, or a table over pairs of them. Both kinds share one source: numba compiles
it for problems whose table is None, and again only for those that have one.

Letters: E experts, P slots, R ranks, F features. Loops instead of array expressions keep the compilation short; what
the innermost loops call takes few arrays, as each array that is handed over costs a reference count.

Replicas of an expert that crowd on one node while another node has none.

Tokens that prefer their own node (`nearest`) must leave it for an expert that the node lacks. So each replica beyond
the first on a node counts as crowded, as long as some node has no replica; at least 0, at most an expert's replicas -
1.

Refinement of a layer: swaps and replaced replicas until none helps.

The aim is the cost of the worst rank, plus the price of crowded replicas where there is one. One rank is the worst, so
only changes that relieve it can help; it meets the cheapest other rank first, which mostly settles the matter.

How many replicas each expert gets, and a first place for every replica.

Search: random kicks, and refinement again after each.

From the placement in use to a balanced one, with few changes.

Ranks above a limit are to get below it; whatever is below is left alone. Each step takes the change of the worst rank,
a swap or a replaced replica, that brings the most relief for each expert that a rank has to fetch.

The convex envelope of a falling curve.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

entry = njit(cache=True, error_model="numpy")

inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]
"""No wrapper for Python, which takes longer to compile than most of these functions."""


@inner
def below(random_1, limit):
    """The next random number in [0, limit), by SplitMix64 (Steele, Lea, Flood 2014)."""
    random_1[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = random_1[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((mixed ^ (mixed >> np.uint64(31))) % np.uint64(limit))


class LayerProblem(NamedTuple):
    """What is asked about one layer, as plain arrays."""

    share_EF: np.ndarray
    """Share of the layer's tokens that goes to each expert, in the window which the feature looks at."""
    weights_F2: np.ndarray
    """How much the tokens of a replica, and how much its activation, add to the feature."""
    batch: float
    """Tokens of a batch, for the activation."""
    table: Any
    """None, or the objective's (tokens_X, experts_A, cost_XA); features are then pairs of tokens and experts."""
    first_R: np.ndarray
    """The first slot of each rank, and behind the last rank all slots: R + 1 entries."""
    rank_P: np.ndarray
    node_R: np.ndarray
    """The node of each rank, from 0."""
    crowd_price: float
    """What a crowded replica costs (see `crowding`), in units of a rank's cost; 0: nothing, and nodes play no part."""


class State(NamedTuple):
    """Arrays that follow `expert_P` through every change."""

    expert_P: np.ndarray
    held_RE: np.ndarray
    """Replicas of each expert on each rank."""
    replicas_E: np.ndarray
    value_EF: np.ndarray
    """What one replica adds to the features of its rank."""
    load_RF: np.ndarray
    cost_R: np.ndarray


@inner
def new_state(problem, expert_P):
    """The state in which slots hold these experts."""
    experts, features = problem.share_EF.shape
    ranks = problem.node_R.size
    state = State(
        np.empty(expert_P.size, np.int64),
        np.empty((ranks, experts), np.int16),
        np.empty(experts, np.int64),
        np.empty((experts, features)),
        np.empty((ranks, features)),
        np.empty(ranks),
    )
    place(problem, state, expert_P)
    return state


@inner
def place(problem, state, expert_P):
    """Replaces what all slots hold."""
    ranks, experts = state.held_RE.shape
    for rank in range(ranks):
        for expert in range(experts):
            state.held_RE[rank, expert] = 0
    for expert in range(experts):
        state.replicas_E[expert] = 0
    for slot in range(expert_P.size):
        expert = expert_P[slot]
        state.expert_P[slot] = expert
        state.held_RE[problem.rank_P[slot], expert] += 1
        state.replicas_E[expert] += 1
    set_values(problem, state, 0, experts)
    for rank in range(ranks):
        set_cost(problem, state, rank)


@inner
def replica_value(share, weights_2, batch):
    """What a replica with this share of the tokens adds to a feature: its tokens, and how likely a batch needs it."""
    if weights_2[1] == 0.0:
        return weights_2[0] * share
    return weights_2[0] * share - weights_2[1] * math.expm1(batch * math.log1p(-share))


@inner
def cost_of(load_F, table):
    """Cost of a rank with these features."""
    worst = 0.0
    if table is None:
        for feature in range(load_F.size):
            worst = max(worst, load_F[feature])
        return worst
    for feature in range(0, load_F.size, 2):
        worst = max(worst, look_up(load_F[feature], load_F[feature + 1], table))
    return worst


@inner
def look_up(tokens, experts, table):
    """The objective's table: bilinear, and outside of it as its outermost cells."""
    tokens_X, experts_A, cost_XA = table
    x, y = _cell(tokens_X, tokens), _cell(experts_A, experts)
    fx = (tokens - tokens_X[x]) / (tokens_X[x + 1] - tokens_X[x])
    fy = (experts - experts_A[y]) / (experts_A[y + 1] - experts_A[y])
    low = cost_XA[x, y] + fy * (cost_XA[x, y + 1] - cost_XA[x, y])
    high = cost_XA[x + 1, y] + fy * (cost_XA[x + 1, y + 1] - cost_XA[x + 1, y])
    return low + fx * (high - low)


@inner
def _cell(axis, value):
    index = 0
    while index < axis.size - 2 and axis[index + 1] <= value:
        index += 1
    return index


@inner
def set_values(problem, state, first, last):
    """Brings the value of a replica up to date with the number of replicas, of the experts from `first` to before
    `last`."""
    for expert in range(first, last):
        for feature in range(state.value_EF.shape[1]):
            share = problem.share_EF[expert, feature] / state.replicas_E[expert]
            state.value_EF[expert, feature] = replica_value(share, problem.weights_F2[feature], problem.batch)


@inner
def set_cost(problem, state, rank):
    """Brings the rank's features and cost up to date; summed afresh, so that rounding errors cannot pile up."""
    for feature in range(state.load_RF.shape[1]):
        load = 0.0
        for slot in range(problem.first_R[rank], problem.first_R[rank + 1]):
            load += state.value_EF[state.expert_P[slot], feature]
        state.load_RF[rank, feature] = load
    state.cost_R[rank] = cost_of(state.load_RF[rank], problem.table)


@inner
def swap(problem, state, slot, other):
    """Exchanges the experts of two slots."""
    expert, partner = state.expert_P[slot], state.expert_P[other]
    rank, other_rank = problem.rank_P[slot], problem.rank_P[other]
    state.expert_P[slot], state.expert_P[other] = partner, expert
    state.held_RE[rank, expert] -= 1
    state.held_RE[rank, partner] += 1
    state.held_RE[other_rank, partner] -= 1
    state.held_RE[other_rank, expert] += 1
    set_cost(problem, state, rank)
    set_cost(problem, state, other_rank)


@inner
def replace(problem, state, slot, expert):
    """Makes the slot a replica of another expert, so that one expert has a replica less and one a replica more."""
    loser, home = state.expert_P[slot], problem.rank_P[slot]
    state.expert_P[slot] = expert
    state.held_RE[home, loser] -= 1
    state.held_RE[home, expert] += 1
    state.replicas_E[loser] -= 1
    state.replicas_E[expert] += 1
    set_values(problem, state, loser, loser + 1)
    set_values(problem, state, expert, expert + 1)
    for rank in range(state.cost_R.size):
        if rank == home or state.held_RE[rank, loser] or state.held_RE[rank, expert]:
            set_cost(problem, state, rank)


@inner
def crowded(problem, state):
    """Crowded replicas of all experts."""
    total = 0
    for expert in range(state.replicas_E.size):
        if state.replicas_E[expert] > 1:
            total += _crowded(problem, state, expert, -1, -1)
    return total


@inner
def swap_crowds(problem, state, slot, other):
    """How many more replicas would be crowded if the two slots exchanged their experts."""
    home, away = problem.node_R[problem.rank_P[slot]], problem.node_R[problem.rank_P[other]]
    if home == away:
        return 0
    expert, partner = state.expert_P[slot], state.expert_P[other]
    after = _crowded(problem, state, expert, home, away) + _crowded(problem, state, partner, away, home)
    return after - _crowded(problem, state, expert, -1, -1) - _crowded(problem, state, partner, -1, -1)


@inner
def shares_node(problem, state, slot):
    """Whether the slot's node holds another replica of its expert."""
    replicas, node = 0, problem.node_R[problem.rank_P[slot]]
    for rank in range(state.cost_R.size):
        if problem.node_R[rank] == node:
            replicas += state.held_RE[rank, state.expert_P[slot]]
    return replicas > 1


@inner
def _crowded(problem, state, expert, source, target):
    """Crowded replicas of the expert, once one of them has moved from the source node to the target (-1: none has)."""
    on_node_N = np.zeros(problem.node_R[-1] + 1, np.int64)
    for rank in range(state.cost_R.size):
        on_node_N[problem.node_R[rank]] += state.held_RE[rank, expert]
    if source >= 0:
        on_node_N[source] -= 1
        on_node_N[target] += 1
    reached = 0
    for replicas in on_node_N:
        reached += replicas > 0
    return 0 if reached == on_node_N.size else state.replicas_E[expert] - reached


LEAST_GAIN = 1e-9
"""Relative gain below which a change is rounding noise; every accepted change gains more, so refinement ends."""


@inner
def refine(problem, state):
    """Relieves the worst rank, whichever it is, until no swap and no replacement can."""
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
    if problem.crowd_price > 0.0:
        _spread(problem, state)


@inner
def best_swap(problem, state, worst, table):
    """Two slots to exchange, one of the worst rank, so that both ranks get cheaper than it was, or (-1, -1).

    The other rank is the cheapest if that will do, or else the first that will; of its swaps the best is taken.
    """
    best, best_slot, best_other = state.cost_R[worst] * (1.0 - LEAST_GAIN), -1, -1
    load_RF, value_EF, held_RE, expert_P = state.load_RF, state.value_EF, state.held_RE, state.expert_P
    features = load_RF.shape[1]
    cheapest = np.argmin(state.cost_R)
    for step in range(state.cost_R.size):
        rank = cheapest if step == 0 else step - (step <= cheapest)
        # No swap gets both below their mean. Of a table, which may have any shape, this is no more than a good guess.
        here, there = load_RF[worst, 0], load_RF[rank, 0]
        bound = 0.5 * (here + there) if table is None else state.cost_R[rank]
        if rank == worst or bound >= best:
            continue
        for slot in range(problem.first_R[worst], problem.first_R[worst + 1]):
            expert = expert_P[slot]
            if held_RE[rank, expert]:
                continue
            for other in range(problem.first_R[rank], problem.first_R[rank + 1]):
                partner = expert_P[other]
                # The first feature alone rules out most: this is the innermost loop of the search.
                change = value_EF[partner, 0] - value_EF[expert, 0]
                cost = max(here + change, there - change) if table is None else 0.0
                if cost >= best or held_RE[worst, partner]:
                    continue
                if features > 1:
                    cost = max(swapped_costs(load_RF, value_EF, worst, rank, expert, partner, table))
                if problem.crowd_price > 0.0:
                    cost += problem.crowd_price * swap_crowds(problem, state, slot, other)
                if cost < best:
                    best, best_slot, best_other = cost, slot, other
        if best_slot >= 0:
            break
    return best_slot, best_other


@inner
def swapped_costs(load_RF, value_EF, rank, other_rank, expert, partner, table):
    """Costs of two ranks after `expert` left the first for the second, in exchange for `partner`."""
    here, there = 0.0, 0.0
    if table is None:
        for feature in range(load_RF.shape[1]):
            change = value_EF[partner, feature] - value_EF[expert, feature]
            here = max(here, load_RF[rank, feature] + change)
            there = max(there, load_RF[other_rank, feature] - change)
        return here, there
    for feature in range(0, load_RF.shape[1], 2):
        tokens = value_EF[partner, feature] - value_EF[expert, feature]
        experts = value_EF[partner, feature + 1] - value_EF[expert, feature + 1]
        cost = look_up(load_RF[rank, feature] + tokens, load_RF[rank, feature + 1] + experts, table)
        here = max(here, cost)
        cost = look_up(
            load_RF[other_rank, feature] - tokens, load_RF[other_rank, feature + 1] - experts, table
        )
        there = max(there, cost)
    return here, there


@inner
def best_replacement(problem, state, worst):
    """The slot, and the expert to put there, that leave all ranks concerned cheapest; (-1, -1) where none helps.

    Either the worst rank gives up a replica for something lighter, or an expert of the worst rank gets one replica
    more.
    """
    best, best_slot, best_expert = state.cost_R[worst] * (1.0 - LEAST_GAIN), -1, -1
    experts, first, last = state.replicas_E.size, problem.first_R[worst], problem.first_R[worst + 1]
    for slot in range(state.expert_P.size):
        home, loser = problem.rank_P[slot], state.expert_P[slot]
        gives_up = home == worst
        if state.replicas_E[loser] < 2 or (not gives_up and state.held_RE[worst, loser]):
            continue
        burdened = burdened_rank(problem, state, slot, best)
        for index in range(experts if gives_up else last - first):
            expert = index if gives_up else state.expert_P[first + index]
            if state.held_RE[home, expert] or (burdened >= 0 and not state.held_RE[burdened, expert]):
                continue
            cost, _ = replaced_cost(problem, state, slot, expert, best)
            if cost < best:
                best, best_slot, best_expert = cost, slot, expert
    return best_slot, best_expert


@inner
def burdened_rank(problem, state, slot, limit):
    """A rank that the slot's tokens would push to the limit if its expert's other replicas took them; -1: there is
    none.

    Only an expert on that very rank, which gets lighter there, can take the slot.
    """
    expert = state.expert_P[slot]
    with_F = np.empty(state.load_RF.shape[1])
    for rank in range(state.cost_R.size):
        if not state.held_RE[rank, expert] or rank == problem.rank_P[slot]:
            continue
        for feature in range(with_F.size):
            share = problem.share_EF[expert, feature] / (state.replicas_E[expert] - 1)
            value = replica_value(share, problem.weights_F2[feature], problem.batch)
            with_F[feature] = state.load_RF[rank, feature] + value - state.value_EF[expert, feature]
        if cost_of(with_F, problem.table) >= limit:
            return rank
    return -1


@inner
def replaced_cost(problem, state, slot, expert, limit):
    """What happens to the ranks that hold either expert when the slot becomes a replica of `expert`.

    The cost of the dearest of them, and how much less they exceed the limit, all together.
    """
    loser, home = state.expert_P[slot], problem.rank_P[slot]
    features = state.load_RF.shape[1]
    loses_F, gains_F, with_F = np.empty(features), np.empty(features), np.empty(features)
    for feature in range(features):
        share = problem.share_EF[loser, feature] / (state.replicas_E[loser] - 1)
        loses_F[feature] = replica_value(share, problem.weights_F2[feature], problem.batch)
        share = problem.share_EF[expert, feature] / (state.replicas_E[expert] + 1)
        gains_F[feature] = replica_value(share, problem.weights_F2[feature], problem.batch)
    worst, relief = 0.0, 0.0
    for rank in range(state.cost_R.size):
        loses, gains = state.held_RE[rank, loser], state.held_RE[rank, expert]
        if loses == 0 and gains == 0:
            continue
        for feature in range(features):
            change = loses * (loses_F[feature] - state.value_EF[loser, feature])
            change += gains * (gains_F[feature] - state.value_EF[expert, feature])
            if rank == home:
                change += gains_F[feature] - loses_F[feature]
            with_F[feature] = state.load_RF[rank, feature] + change
        cost = cost_of(with_F, problem.table)
        worst = max(worst, cost)
        relief += max(state.cost_R[rank] - limit, 0.0) - max(cost - limit, 0.0)
    return worst, relief


@inner
def _spread(problem, state):
    """Swaps that scatter crowded replicas, while that is worth what the worst rank then costs more."""
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
                    state.load_RF, state.value_EF, rank, other_rank, expert, partner, problem.table
                )
                rise = max(max(costs) - worst, 0.0)
                if rise - 2 * problem.crowd_price >= best:  # a swap moves two replicas
                    continue
                change = rise + problem.crowd_price * swap_crowds(problem, state, slot, other)
                if change < best:
                    best, best_slot, best_other = change, slot, other
        if best_slot < 0:
            break
        swap(problem, state, best_slot, best_other)


@entry
def optimal_replicas(weight_E, order_E, slots, most_replicas):
    """The replicas [E] that minimise the largest weight of a replica: one at a time, to the expert whose replica
    weighs most.

    `order_E` lists the experts by falling weight: a whole expert bounds all that follow, so that few are looked at.
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
    """The replicas [E] that add the least to the sum of all features, one at a time.

    Tokens are only shared out by a replica, but a batch that needs an expert may need all of its replicas: where
    activated experts count, replicas of rarely used experts are the cheapest.
    """
    experts, features = problem.share_EF.shape
    replicas_E = np.ones(experts, np.int64)
    extra_E = np.empty(experts)
    for step in range(problem.rank_P.size):
        changed = step if step < experts else int(np.argmin(extra_E))
        replicas_E[changed] += step >= experts
        extra_E[changed] = np.inf
        if replicas_E[changed] < problem.node_R.size:
            extra_E[changed] = 0.0
            for feature in range(features):
                share, weights_2 = problem.share_EF[changed, feature], problem.weights_F2[feature]
                now, then = replicas_E[changed], replicas_E[changed] + 1
                extra_E[changed] += then * replica_value(share / then, weights_2, problem.batch)
                extra_E[changed] -= now * replica_value(share / now, weights_2, problem.batch)
    return replicas_E


@entry
def pack(problem, replicas_E, order_E):
    """The expert of every slot [P]: experts in this order, each replica to the rank that is cheapest with it.

    With the heaviest replicas first this is LPT, longest processing time first (Graham 1969), for ranks with so many
    places each and never two replicas of an expert; no expert may have more replicas than there are ranks.
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
            share = problem.share_EF[expert, feature] / replicas_E[expert]
            value_F[feature] = replica_value(share, problem.weights_F2[feature], problem.batch)
        for _ in range(replicas_E[expert]):
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
    raise ValueError("an expert has more replicas than there are ranks")


REPLACEMENTS = 2
"""One change of a kick in so many replaces a replica; the others exchange slots."""

PATIENCE = 2
"""Kicks for every slot without a gain, after which a run is stuck."""


@entry
def improve(problem, expert_P, start_P, kicks, seed):
    """Iterated local search (Lourenço, Martin, Stützle 2003): the best of so many kicks [P], and what it costs.

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
            place(problem, state, start_P)
            home, failures = np.inf, 0
        if kick:
            _kick(problem, state, random_1)
        refine(problem, state)
        cost = total_cost(problem, state)
        failures = 0 if cost < home else failures + 1
        if cost > home:
            place(problem, state, home_P)
            continue
        home = cost
        _copy(state.expert_P, home_P)
        if cost < best:
            best = cost
            _copy(home_P, best_P)
    return best_P, best


@entry
def judge(problem, expert_P):
    """What these experts cost."""
    return total_cost(problem, new_state(problem, expert_P))


@inner
def total_cost(problem, state):
    """The worst rank, and the price of the crowded replicas."""
    cost = state.cost_R.max()
    if problem.crowd_price > 0.0:
        cost += problem.crowd_price * crowded(problem, state)
    return cost


@inner
def _kick(problem, state, random_1):
    """One to three random changes: swaps, of which the first takes a slot from the worst rank, or replacements."""
    for change in range(1 + below(random_1, 3)):
        slot = below(random_1, state.expert_P.size)
        if below(random_1, REPLACEMENTS) == 0:
            expert = below(random_1, state.replicas_E.size)
            if state.replicas_E[state.expert_P[slot]] > 1 and not state.held_RE[problem.rank_P[slot], expert]:
                replace(problem, state, slot, expert)
            continue
        if change == 0:
            worst = np.argmax(state.cost_R)
            first = problem.first_R[worst]
            slot = first + slot % (problem.first_R[worst + 1] - first)
        other = below(random_1, state.expert_P.size)
        rank, other_rank = problem.rank_P[slot], problem.rank_P[other]
        if not (
            state.held_RE[rank, state.expert_P[other]] or state.held_RE[other_rank, state.expert_P[slot]]
        ):
            swap(problem, state, slot, other)


@inner
def _copy(source_P, target_P):
    for slot in range(source_P.size):
        target_P[slot] = source_P[slot]


LEAST_RELIEF = 1e-9
"""Relief, relative to the limit, below which a change is rounding noise."""

FREE = 0.25
"""Fetched experts that a change counts as if it needs none, because it undoes an earlier one: few, and not zero."""


@entry
def change(problem, current_P, target):
    """The expert of every slot [P], and whether single steps were enough.

    That is, whether no rank costs more than `target` times the mean, nor more than the worst rank did before.
    """
    state = new_state(problem, current_P)
    before_RE = state.held_RE.copy()
    target = min(target, state.cost_R.max() / state.cost_R.mean())
    _separate(problem, state)
    while True:
        limit = target * state.cost_R.mean()
        worst = np.argmax(state.cost_R)
        if state.cost_R[worst] <= limit * (1.0 + LEAST_RELIEF):
            return state.expert_P, True
        slot, other, swap_worth = _best_swap(problem, state, before_RE, worst, limit)
        replaced, expert, replacement_worth = _best_replacement(problem, state, before_RE, worst, limit)
        if max(swap_worth, replacement_worth) <= LEAST_RELIEF * limit:
            return state.expert_P, False
        if swap_worth >= replacement_worth:
            swap(problem, state, slot, other)
        else:
            replace(problem, state, replaced, expert)


@inner
def _separate(problem, state):
    """Replaces replicas that share a rank with another replica of their expert, whatever the balance."""
    for slot in range(state.expert_P.size):
        rank, double = problem.rank_P[slot], state.expert_P[slot]
        if state.held_RE[rank, double] < 2:
            continue
        best, best_expert = np.inf, -1
        for expert in range(state.replicas_E.size):
            if state.held_RE[rank, expert] == 0:
                cost, _ = replaced_cost(problem, state, slot, expert, best)
                if cost < best:
                    best, best_expert = cost, expert
        replace(problem, state, slot, best_expert)


@inner
def _fetched(held_RE, before_RE, rank, gains, loses):
    """How many more experts the rank has to fetch if it holds one expert instead of another: -1, 0 or 1."""
    more = 1 if held_RE[rank, gains] >= before_RE[rank, gains] else 0
    return more - 1 if held_RE[rank, loses] > before_RE[rank, loses] else more


@inner
def _best_swap(problem, state, before_RE, worst, limit):
    """The swap that brings the most relief for each fetched expert: two slots, and that relief."""
    best, best_slot, best_other = 0.0, -1, -1
    held_RE = state.held_RE
    for slot in range(problem.first_R[worst], problem.first_R[worst + 1]):
        expert = state.expert_P[slot]
        for other in range(state.expert_P.size):
            rank, partner = problem.rank_P[other], state.expert_P[other]
            if held_RE[rank, expert] or held_RE[worst, partner]:
                continue
            here, there = swapped_costs(
                state.load_RF, state.value_EF, worst, rank, expert, partner, problem.table
            )
            relief = state.cost_R[worst] - max(here, limit)
            relief += max(state.cost_R[rank], limit) - max(there, limit)
            if relief <= 0.0:
                continue
            fetched = _fetched(held_RE, before_RE, worst, partner, expert)
            fetched += _fetched(held_RE, before_RE, rank, expert, partner)
            worth = relief / max(fetched, FREE)
            if worth > best:
                best, best_slot, best_other = worth, slot, other
    return best_slot, best_other, best


@inner
def _best_replacement(problem, state, before_RE, worst, limit):
    """The replaced replica that brings the most relief for each fetched expert: slot, new expert, and that relief."""
    best, best_slot, best_expert = 0.0, -1, -1
    experts, first, last = state.replicas_E.size, problem.first_R[worst], problem.first_R[worst + 1]
    for slot in range(state.expert_P.size):
        home, loser = problem.rank_P[slot], state.expert_P[slot]
        gives_up = home == worst
        if state.replicas_E[loser] < 2 or (not gives_up and state.held_RE[worst, loser]):
            continue
        burdened = burdened_rank(problem, state, slot, limit)
        for index in range(experts if gives_up else last - first):
            expert = index if gives_up else state.expert_P[first + index]
            if state.held_RE[home, expert] or (burdened >= 0 and not state.held_RE[burdened, expert]):
                continue
            _, relief = replaced_cost(problem, state, slot, expert, limit)
            if relief > 0.0:
                worth = relief / max(_fetched(state.held_RE, before_RE, home, expert, loser), FREE)
                if worth > best:
                    best, best_slot, best_expert = worth, slot, expert
    return best_slot, best_expert, best


@entry
def falls(curve_X):
    """How far the lower convex envelope of the curve falls at each of its X - 1 steps; never more than a step before.

    Andrew's monotone chain (1979), on points that come in order.
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
