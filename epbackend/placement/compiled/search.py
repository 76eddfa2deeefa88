"""Search: random kicks, and refinement again after each."""

from __future__ import annotations

import numpy as np

from epbackend.placement.compiled.crowding import crowded
from epbackend.placement.compiled.jit import entry, inner
from epbackend.placement.compiled.random import below
from epbackend.placement.compiled.ranks import new_state, place, replace, swap
from epbackend.placement.compiled.refine import refine

REPLACEMENTS = 2
"""One change of a kick in so many replaces a copy; the others exchange slots."""

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
    """The worst rank, and the price of the crowded copies."""
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
            expert = below(random_1, state.copies_E.size)
            if state.copies_E[state.expert_P[slot]] > 1 and not state.held_RE[problem.rank_P[slot], expert]:
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
