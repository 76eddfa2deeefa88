"""The state of a search over one layer: which expert each slot holds, and what every rank costs because of it.

A rank's cost is the largest of F features, or a table over pairs of them. Both kinds share one source: numba compiles
it for problems whose table is None, and again only for those that have one.

Letters: E experts, P slots, R ranks, F features. Loops instead of array expressions keep the compilation short; what
the innermost loops call takes few arrays, as each array that is handed over costs a reference count.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from epbackend.placement.compiled.jit import inner


class Problem(NamedTuple):
    """What is asked about one layer, as plain arrays."""

    share_EF: np.ndarray
    """Share of the layer's tokens that goes to each expert, in the window which the feature looks at."""
    weights_F2: np.ndarray
    """How much the tokens of a copy, and how much its activation, add to the feature."""
    batch: float
    """Tokens of a batch, for the activation."""
    table: Any
    """None, or the objective's (tokens_X, experts_Y, cost_XY); features are then pairs of tokens and experts."""
    first_R: np.ndarray
    """The first slot of each rank, and behind the last rank all slots: R + 1 entries."""
    rank_P: np.ndarray
    node_R: np.ndarray
    """The node of each rank, from 0."""
    crowd_price: float
    """What a crowded copy costs (see `crowding`), in units of a rank's cost; 0: nothing, and nodes play no part."""


class State(NamedTuple):
    """Arrays that follow `expert_P` through every change."""

    expert_P: np.ndarray
    held_RE: np.ndarray
    """Copies of each expert on each rank."""
    copies_E: np.ndarray
    value_EF: np.ndarray
    """What one copy adds to the features of its rank."""
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
        state.copies_E[expert] = 0
    for slot in range(expert_P.size):
        expert = expert_P[slot]
        state.expert_P[slot] = expert
        state.held_RE[problem.rank_P[slot], expert] += 1
        state.copies_E[expert] += 1
    set_values(problem, state, 0, experts)
    for rank in range(ranks):
        set_cost(problem, state, rank)


@inner
def copy_value(share, weights_2, batch):
    """What a copy with this share of the tokens adds to a feature: its tokens, and how likely a batch needs it."""
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
    tokens_X, experts_Y, cost_XY = table
    x, y = _cell(tokens_X, tokens), _cell(experts_Y, experts)
    fx = (tokens - tokens_X[x]) / (tokens_X[x + 1] - tokens_X[x])
    fy = (experts - experts_Y[y]) / (experts_Y[y + 1] - experts_Y[y])
    low = cost_XY[x, y] + fy * (cost_XY[x, y + 1] - cost_XY[x, y])
    high = cost_XY[x + 1, y] + fy * (cost_XY[x + 1, y + 1] - cost_XY[x + 1, y])
    return low + fx * (high - low)


@inner
def _cell(axis, value):
    index = 0
    while index < axis.size - 2 and axis[index + 1] <= value:
        index += 1
    return index


@inner
def set_values(problem, state, first, last):
    """Brings the value of a copy up to date with the number of copies, of the experts from `first` to before `last`."""
    for expert in range(first, last):
        for feature in range(state.value_EF.shape[1]):
            share = problem.share_EF[expert, feature] / state.copies_E[expert]
            state.value_EF[expert, feature] = copy_value(share, problem.weights_F2[feature], problem.batch)


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
    """Makes the slot a copy of another expert, so that one expert has a copy less and one a copy more."""
    loser, home = state.expert_P[slot], problem.rank_P[slot]
    state.expert_P[slot] = expert
    state.held_RE[home, loser] -= 1
    state.held_RE[home, expert] += 1
    state.copies_E[loser] -= 1
    state.copies_E[expert] += 1
    set_values(problem, state, loser, loser + 1)
    set_values(problem, state, expert, expert + 1)
    for rank in range(state.cost_R.size):
        if rank == home or state.held_RE[rank, loser] or state.held_RE[rank, expert]:
            set_cost(problem, state, rank)
