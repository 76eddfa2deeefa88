"""Copies of an expert that crowd on one node while another node has none.

Tokens that prefer their own node (`nearest`) must leave it for an expert that the node lacks. So each copy beyond the
first on a node counts as crowded, as long as some node has no copy; at least 0, at most an expert's copies - 1.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.compiled.jit import inner


@inner
def crowded(problem, state):
    """Crowded copies of all experts."""
    total = 0
    for expert in range(state.copies_E.size):
        if state.copies_E[expert] > 1:
            total += _crowded(problem, state, expert, -1, -1)
    return total


@inner
def swap_crowds(problem, state, slot, other):
    """How many more copies would be crowded if the two slots exchanged their experts."""
    home, away = problem.node_R[problem.rank_P[slot]], problem.node_R[problem.rank_P[other]]
    if home == away:
        return 0
    expert, partner = state.expert_P[slot], state.expert_P[other]
    after = _crowded(problem, state, expert, home, away) + _crowded(problem, state, partner, away, home)
    return after - _crowded(problem, state, expert, -1, -1) - _crowded(problem, state, partner, -1, -1)


@inner
def shares_node(problem, state, slot):
    """Whether the slot's node holds another copy of its expert."""
    copies, node = 0, problem.node_R[problem.rank_P[slot]]
    for rank in range(state.cost_R.size):
        if problem.node_R[rank] == node:
            copies += state.held_RE[rank, state.expert_P[slot]]
    return copies > 1


@inner
def _crowded(problem, state, expert, source, target):
    """Crowded copies of the expert, once one of them has moved from the source node to the target (-1: none has)."""
    on_node_N = np.zeros(problem.node_R[-1] + 1, np.int64)
    for rank in range(state.cost_R.size):
        on_node_N[problem.node_R[rank]] += state.held_RE[rank, expert]
    if source >= 0:
        on_node_N[source] -= 1
        on_node_N[target] += 1
    reached = 0
    for copies in on_node_N:
        reached += copies > 0
    return 0 if reached == on_node_N.size else state.copies_E[expert] - reached
