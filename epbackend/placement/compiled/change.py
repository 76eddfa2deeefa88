"""From the placement in use to a balanced one, with few changes.

Ranks above a limit are to get below it; whatever is below is left alone. Each step takes the change of the worst rank,
a swap or a replaced copy, that brings the most relief for each expert that a rank has to fetch.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.compiled.jit import entry, inner
from epbackend.placement.compiled.ranks import new_state, replace, swap
from epbackend.placement.compiled.refine import burdened_rank, replaced_cost, swapped_costs

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
    """Replaces copies that share a rank with another copy of their expert, whatever the balance."""
    for slot in range(state.expert_P.size):
        rank, double = problem.rank_P[slot], state.expert_P[slot]
        if state.held_RE[rank, double] < 2:
            continue
        best, best_expert = np.inf, -1
        for expert in range(state.copies_E.size):
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
    """The replaced copy that brings the most relief for each fetched expert: slot, new expert, and that relief."""
    best, best_slot, best_expert = 0.0, -1, -1
    experts, first, last = state.copies_E.size, problem.first_R[worst], problem.first_R[worst + 1]
    for slot in range(state.expert_P.size):
        home, loser = problem.rank_P[slot], state.expert_P[slot]
        gives_up = home == worst
        if state.copies_E[loser] < 2 or (not gives_up and state.held_RE[worst, loser]):
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
