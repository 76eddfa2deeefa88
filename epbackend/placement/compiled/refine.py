"""Refinement of a layer: swaps and replaced copies until none helps.

The aim is the cost of the worst rank, plus the price of crowded copies where there is one. One rank is the worst, so
only changes that relieve it can help; it meets the cheapest other rank first, which mostly settles the matter.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.compiled.crowding import shares_node, swap_crowds
from epbackend.placement.compiled.jit import inner
from epbackend.placement.compiled.ranks import copy_value, cost_of, look_up, replace, swap

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

    Either the worst rank gives up a copy for something lighter, or an expert of the worst rank gets one copy more.
    """
    best, best_slot, best_expert = state.cost_R[worst] * (1.0 - LEAST_GAIN), -1, -1
    experts, first, last = state.copies_E.size, problem.first_R[worst], problem.first_R[worst + 1]
    for slot in range(state.expert_P.size):
        home, loser = problem.rank_P[slot], state.expert_P[slot]
        gives_up = home == worst
        if state.copies_E[loser] < 2 or (not gives_up and state.held_RE[worst, loser]):
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
    """A rank that the slot's tokens would push to the limit if its expert's other copies took them; -1: there is none.

    Only an expert on that very rank, which gets lighter there, can take the slot.
    """
    expert = state.expert_P[slot]
    with_F = np.empty(state.load_RF.shape[1])
    for rank in range(state.cost_R.size):
        if not state.held_RE[rank, expert] or rank == problem.rank_P[slot]:
            continue
        for feature in range(with_F.size):
            share = problem.share_EF[expert, feature] / (state.copies_E[expert] - 1)
            value = copy_value(share, problem.weights_F2[feature], problem.batch)
            with_F[feature] = state.load_RF[rank, feature] + value - state.value_EF[expert, feature]
        if cost_of(with_F, problem.table) >= limit:
            return rank
    return -1


@inner
def replaced_cost(problem, state, slot, expert, limit):
    """What happens to the ranks that hold either expert when the slot becomes a copy of `expert`.

    The cost of the dearest of them, and how much less they exceed the limit, all together.
    """
    loser, home = state.expert_P[slot], problem.rank_P[slot]
    features = state.load_RF.shape[1]
    loses_F, gains_F, with_F = np.empty(features), np.empty(features), np.empty(features)
    for feature in range(features):
        share = problem.share_EF[loser, feature] / (state.copies_E[loser] - 1)
        loses_F[feature] = copy_value(share, problem.weights_F2[feature], problem.batch)
        share = problem.share_EF[expert, feature] / (state.copies_E[expert] + 1)
        gains_F[feature] = copy_value(share, problem.weights_F2[feature], problem.batch)
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
    """Swaps that scatter crowded copies, while that is worth what the worst rank then costs more."""
    while True:
        worst = state.cost_R.max()
        best, best_slot, best_other = -LEAST_GAIN * worst, -1, -1
        for slot in range(state.expert_P.size):
            rank, expert = problem.rank_P[slot], state.expert_P[slot]
            if state.copies_E[expert] < 2 or not shares_node(problem, state, slot):
                continue
            for other in range(state.expert_P.size):
                other_rank, partner = problem.rank_P[other], state.expert_P[other]
                if state.held_RE[other_rank, expert] or state.held_RE[rank, partner]:
                    continue
                costs = swapped_costs(
                    state.load_RF, state.value_EF, rank, other_rank, expert, partner, problem.table
                )
                rise = max(max(costs) - worst, 0.0)
                if rise - 2 * problem.crowd_price >= best:  # a swap moves two copies
                    continue
                change = rise + problem.crowd_price * swap_crowds(problem, state, slot, other)
                if change < best:
                    best, best_slot, best_other = change, slot, other
        if best_slot < 0:
            break
        swap(problem, state, best_slot, best_other)
