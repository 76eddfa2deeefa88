"""The search for a layer whose tokens visit fewer nodes and ranks, compiled: swaps of slots that keep the balance.

Tokens take the nearest replica, and come from all nodes alike. What is lowered, in a linear form:

    sum over nodes s, m, s != m:   price * mean_sm - twice_sm / 2

mean_sm is how many of its experts a token of node s finds at node m on average, and twice_sm how many ordered pairs of
them: the fewer choices leave, and the more of them leave together, the fewer nodes are visited. `gather_on_nodes`
swaps slots between nodes, `pack_ranks` spreads a node's slots over its ranks again, and `gather_on_ranks` swaps slots
within each node so that experts that are chosen together share a rank.

Letters: E experts, P slots, R ranks, M nodes. Nodes have equally many ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from epbackend.placement.search.compiled import entry, inner

SWEEPS = 3
"""Passes over all slots, unless one changes nothing; three more lower the visits by another tenth of a percent."""
LEAST_GAIN = 1e-9
"""In pairs of choices a token: less is noise of rounding."""


class Gathering(NamedTuple):
    """What is asked about one layer."""

    share_E: np.ndarray
    """Share of the layer's choices that goes to each expert, 0 to 1: what is balanced."""
    chance_E: np.ndarray
    """The chance that a token chooses the expert."""
    both_EE: np.ndarray
    """The chance that it chooses both, 0 on the diagonal."""
    rank_P: np.ndarray
    node_R: np.ndarray
    price: float
    """What a choice that leaves its node costs, in pairs of choices that leave together."""
    speed_R: np.ndarray
    """How fast each rank is; 1 where all are alike."""


class Nodes(NamedTuple):
    """Which nodes hold what, and what follows from it; kept up to date swap by swap."""

    count_EM: np.ndarray
    """Replicas of each expert on each node."""
    total_E: np.ndarray
    """Replicas of each expert."""
    load_M: np.ndarray
    """Share of the layer's choices that each node gets."""
    arrive_ME: np.ndarray
    """Of what a token of another node finds at a node, what it chooses together with the expert; of all other nodes."""
    with_MMV: np.ndarray
    """The same for tokens of each single node (first) at each (second), for the V experts with several replicas."""
    both_EV: np.ndarray
    """`Gathering.both_EE` for these."""
    row_E: np.ndarray
    """The place of an expert among these, or -1."""


@inner
def _nodes(problem, expert_P, first_M):
    """Node m has the slots first_M[m] to first_M[m + 1] - 1."""
    experts, nodes = problem.share_E.size, first_M.size - 1
    count_EM = np.zeros((experts, nodes), np.int64)
    total_E = np.zeros(experts, np.int64)
    for node in range(nodes):
        for slot in range(first_M[node], first_M[node + 1]):
            count_EM[expert_P[slot], node] += 1
            total_E[expert_P[slot]] += 1
    row_E = np.full(experts, -1, np.int64)
    several = 0
    for expert in range(experts):
        if total_E[expert] > 1:
            row_E[expert] = several
            several += 1
    both_EV = np.empty((experts, several))
    for expert in range(experts):
        for other in range(experts):
            if row_E[other] >= 0:
                both_EV[expert, row_E[other]] = problem.both_EE[expert, other]
    found = Nodes(
        count_EM,
        total_E,
        np.zeros(nodes),
        np.zeros((nodes, experts)),
        np.zeros((nodes, nodes, several)),
        both_EV,
        row_E,
    )
    part_MM = np.empty((nodes, nodes))
    for expert in range(experts):
        for node in range(nodes):
            found.load_M[node] += problem.share_E[expert] * _load_part(
                count_EM, expert, total_E[expert], node
            )
            for source in range(nodes):
                part_MM[source, node] = _part(found, expert, source, node)
        _apply(problem, found, expert, part_MM)
    return found


@inner
def _part(nodes, expert, source, node):
    """The part of an expert's choices by tokens of `source` that goes to `node`."""
    if nodes.count_EM[expert, source] > 0:
        return 1.0 if node == source else 0.0
    return nodes.count_EM[expert, node] / nodes.total_E[expert]


@inner
def _load_part(count_EM, expert, total, node):
    """The part of an expert's choices, by the tokens of all nodes, that goes to `node`; it has `total` replicas."""
    if count_EM[expert, node] == 0:
        return 0.0
    without = 0
    for other in range(count_EM.shape[1]):
        without += count_EM[expert, other] == 0
    return (1.0 + without * count_EM[expert, node] / total) / count_EM.shape[1]


@inner
def _change(nodes, expert, home, away, change_MM):
    """Writes how the parts change when a replica goes from one node to another."""
    for sign in (-1.0, 1.0):
        for source in range(change_MM.shape[0]):
            for node in range(change_MM.shape[0]):
                part = sign * _part(nodes, expert, source, node)
                change_MM[source, node] = part if sign < 0.0 else change_MM[source, node] + part
        step = 1 if sign < 0.0 else -1
        nodes.count_EM[expert, home] -= step
        nodes.count_EM[expert, away] += step


@inner
def _apply(problem, nodes, expert, change_MM):
    """Brings what others find beside them up to date with a change of the expert's parts."""
    for node in range(change_MM.shape[0]):
        step = -change_MM[node, node]
        for source in range(change_MM.shape[0]):
            change = change_MM[source, node]
            step += change
            if change != 0.0:
                _add(nodes.with_MMV[source, node], change, nodes.both_EV[expert])
        if step != 0.0:
            _add(nodes.arrive_ME[node], step, problem.both_EE[expert])


@inner
def _add(sums_X, factor, values_X):
    for index in range(sums_X.size):
        sums_X[index] += factor * values_X[index]


@inner
def _price_moves(problem, nodes, move_VMM, expert):
    """Writes how much the cost falls when a replica of an expert with several goes from one node to another.

    Tokens of a node without a replica find one less at the first node and one more at the second. Tokens of the first
    node leave it where it has none any more, and those of the second no longer do where it had none.
    """
    row, count_M, total = nodes.row_E[expert], nodes.count_EM[expert], nodes.total_E[expert]
    cost = problem.price * problem.chance_E[expert]
    leave_M, find_M = np.zeros(count_M.size), np.zeros(count_M.size)
    for source in range(count_M.size):
        for node in range(count_M.size):
            if node != source:
                together = nodes.with_MMV[source, node, row]
                leave_M[source] += count_M[node] * (together - cost)
                if count_M[source] == 0:
                    find_M[node] += together
    for home in range(count_M.size):
        for away in range(count_M.size):
            gain = find_M[away] - find_M[home]
            if count_M[home] == 1:
                gain += leave_M[home] + nodes.with_MMV[home, away, row] - cost
            if count_M[away] == 0:
                gain += nodes.with_MMV[away, home, row] - leave_M[away]
            move_VMM[row, home, away] = gain / total if home != away else 0.0


@inner
def _move(nodes, move_VMM, expert, home, away):
    """How much the cost falls when a replica goes; of an expert with several as `_price_moves` last found it."""
    if nodes.total_E[expert] == 1:  # then as many choices leave as before
        return nodes.arrive_ME[away, expert] - nodes.arrive_ME[home, expert]
    return move_VMM[nodes.row_E[expert], home, away]


@entry
def gather_on_nodes(problem, expert_P, first_M, most_M):
    """Swaps slots between nodes in place, as long as it gains; returns the number of swaps.

    Node m has the slots first_M[m] to first_M[m + 1] - 1. None gets more load than most_M[m], in shares of the layer,
    or than it had. A pair of nodes between which no slot had enough to gain when a sweep began is passed over in it.
    """
    count = first_M.size - 1
    nodes = _nodes(problem, expert_P, first_M)
    move_VMM = np.zeros((nodes.both_EV.shape[1], count, count))
    top_MM = np.empty((count, count))
    change_MM, other_MM, step_M = np.empty((count, count)), np.empty((count, count)), np.empty(count)
    swaps = 0
    for _ in range(SWEEPS):
        before = swaps
        for expert in range(nodes.row_E.size):
            if nodes.row_E[expert] >= 0:
                _price_moves(problem, nodes, move_VMM, expert)
        top_MM[:] = -np.inf
        for home in range(count):
            for slot in range(first_M[home], first_M[home + 1]):
                for away in range(count):
                    gain = _move(nodes, move_VMM, expert_P[slot], home, away)
                    top_MM[home, away] = max(top_MM[home, away], gain)
        for home in range(count):
            for slot in range(first_M[home], first_M[home + 1]):
                expert = expert_P[slot]
                if nodes.row_E[expert] >= 0:
                    _price_moves(problem, nodes, move_VMM, expert)
                best, away = _partner(problem, nodes, move_VMM, top_MM, expert_P, first_M, most_M, slot, home)
                if best < 0:
                    continue
                partner = expert_P[best]
                if nodes.row_E[partner] >= 0:
                    _price_moves(problem, nodes, move_VMM, partner)
                _change(nodes, expert, home, away, change_MM)
                _change(nodes, partner, away, home, other_MM)
                gain = _move(nodes, move_VMM, expert, home, away)
                gain += _move(nodes, move_VMM, partner, away, home)
                for source in range(count):
                    for node in range(count):
                        if source != node:
                            together = change_MM[source, node] * other_MM[source, node]
                            gain += together * problem.both_EE[expert, partner]
                if gain <= LEAST_GAIN:
                    continue
                _swapped_load(problem, nodes, expert, partner, home, away, step_M)
                _add(nodes.load_M, 1.0, step_M)
                _apply(problem, nodes, expert, change_MM)
                _apply(problem, nodes, partner, other_MM)
                nodes.count_EM[expert, home] -= 1
                nodes.count_EM[expert, away] += 1
                nodes.count_EM[partner, away] -= 1
                nodes.count_EM[partner, home] += 1
                expert_P[slot], expert_P[best] = partner, expert
                for moved in (expert, partner):
                    if nodes.row_E[moved] >= 0:
                        _price_moves(problem, nodes, move_VMM, moved)
                swaps += 1
        if swaps == before:
            break
    return swaps


@inner
def _partner(problem, nodes, move_VMM, top_MM, expert_P, first_M, most_M, slot, home):
    """The slot of another node that it gains most to change places with, and its node; -1 where nothing gains.

    The gain with an expert of several replicas is of earlier in this sweep, and each alone: to be computed again
    before it is believed.
    """
    expert, count = expert_P[slot], first_M.size - 1
    ranks_of_node = problem.node_R.size // count
    step_M = np.empty(count)
    best, best_away, best_gain = -1, -1, LEAST_GAIN
    for away in range(count):
        own = _move(nodes, move_VMM, expert, home, away)
        if away == home or own + top_MM[away, home] <= best_gain:
            continue
        if nodes.count_EM[expert, away] >= ranks_of_node:
            continue
        for other in range(first_M[away], first_M[away + 1]):
            partner = expert_P[other]
            gain = own + _move(nodes, move_VMM, partner, away, home)
            if nodes.total_E[expert] == 1 and nodes.total_E[partner] == 1:
                gain -= 2 * (count - 1) * problem.both_EE[expert, partner]
            if gain <= best_gain or partner == expert or nodes.count_EM[partner, home] >= ranks_of_node:
                continue
            if _fits(problem, nodes, expert, partner, home, away, most_M, step_M):
                best, best_away, best_gain = other, away, gain
    return best, best_away


@inner
def _swapped_load(problem, nodes, expert, partner, home, away, step_M):
    """Writes what the load of each node changes by if the expert goes from home to away, its partner the other way."""
    step_M[:] = 0.0
    for moved, start, end in ((expert, home, away), (partner, away, home)):
        count_M, total, without = nodes.count_EM[moved], nodes.total_E[moved], 0
        for node in range(step_M.size):
            without += count_M[node] == 0
        then_without = without + (count_M[start] == 1) - (count_M[end] == 0)
        for node in range(step_M.size):
            then = count_M[node] - (node == start) + (node == end)
            if then == count_M[node] and then_without == without:
                continue
            part = 0.0
            if then > 0:
                part += 1.0 + then_without * then / total
            if count_M[node] > 0:
                part -= 1.0 + without * count_M[node] / total
            step_M[node] += problem.share_E[moved] * part / step_M.size


@inner
def _fits(problem, nodes, expert, partner, home, away, most_M, step_M):
    """Whether a swap leaves no node with too much load."""
    if nodes.total_E[expert] == 1 and nodes.total_E[partner] == 1:  # then no other node is concerned
        heavier = problem.share_E[partner] - problem.share_E[expert]
        full = home if heavier > 0.0 else away
        return heavier == 0.0 or nodes.load_M[full] + abs(heavier) <= most_M[full]
    _swapped_load(problem, nodes, expert, partner, home, away, step_M)
    for node in range(step_M.size):
        if step_M[node] > 0.0 and nodes.load_M[node] + step_M[node] > most_M[node]:
            return False
    return True


@inner
def replica_shares(problem, expert_P):
    """The share of the layer's choices that each slot gets, [P]."""
    experts, nodes = problem.share_E.size, problem.node_R[-1] + 1
    held_EM = np.zeros((experts, nodes), np.int64)
    holders_E = np.zeros(experts, np.int64)
    for slot in range(expert_P.size):
        held_EM[expert_P[slot], problem.node_R[problem.rank_P[slot]]] += 1
        holders_E[expert_P[slot]] += 1
    share_P = np.empty(expert_P.size)
    for slot in range(expert_P.size):
        expert, node = expert_P[slot], problem.node_R[problem.rank_P[slot]]
        part = _load_part(held_EM, expert, holders_E[expert], node)
        share_P[slot] = problem.share_E[expert] * part / held_EM[expert, node]
    return share_P


@entry
def pack_ranks(problem, expert_P, first_R):
    """Spreads the slots of each node over its ranks again, in place, so that its fullest rank gets little.

    The heaviest replica first, to the rank with least time, load over speed, that has room and does not hold its expert
    (LPT); then swaps with the fullest rank, as long as they relieve it. Returns the largest time of a rank, or -1 where
    two replicas of an expert would have to share a rank.
    """
    share_P = replica_shares(problem, expert_P)
    ranks, nodes = problem.node_R.size, problem.node_R[-1] + 1
    size = ranks // nodes
    time_R = np.zeros(ranks)
    packed_P = np.full(expert_P.size, -1, np.int64)
    weight_P = np.zeros(expert_P.size)
    next_R = first_R[:-1].copy()
    for node in range(nodes):
        begin, end = first_R[node * size], first_R[(node + 1) * size]
        for position in np.argsort(-share_P[begin:end], kind="mergesort"):
            expert = expert_P[begin + position]
            chosen = -1
            for rank in range(node * size, (node + 1) * size):
                if next_R[rank] == first_R[rank + 1] or _holds(packed_P, first_R, rank, expert):
                    continue
                if chosen < 0 or time_R[rank] < time_R[chosen]:
                    chosen = rank
            if chosen < 0:
                return -1.0
            packed_P[next_R[chosen]], weight_P[next_R[chosen]] = expert, share_P[begin + position]
            next_R[chosen] += 1
            time_R[chosen] += share_P[begin + position] / problem.speed_R[chosen]
        _relieve_node(problem, packed_P, weight_P, time_R, first_R, node * size, (node + 1) * size)
    expert_P[:] = packed_P
    return time_R.max()


@inner
def _holds(expert_P, first_R, rank, expert):
    held = False
    for slot in range(first_R[rank], first_R[rank + 1]):
        held |= expert_P[slot] == expert
    return held


@inner
def _relieve_node(problem, expert_P, weight_P, time_R, first_R, begin, end):
    """Swaps a slot of the fullest rank, of those from `begin` to `end`, with one of another, until none helps."""
    for _ in range(4 * (first_R[end] - first_R[begin])):
        full = begin
        for rank in range(begin, end):
            if time_R[rank] > time_R[full]:
                full = rank
        best, best_other, best_rank, least = -1, -1, -1, time_R[full] - 1e-12
        for rank in range(begin, end):
            if rank == full:
                continue
            for slot in range(first_R[full], first_R[full + 1]):
                for other in range(first_R[rank], first_R[rank + 1]):
                    step = weight_P[slot] - weight_P[other]
                    if step <= 0.0:
                        continue
                    longest = max(
                        time_R[full] - step / problem.speed_R[full],
                        time_R[rank] + step / problem.speed_R[rank],
                    )
                    if longest >= least:
                        continue
                    if _holds(expert_P, first_R, rank, expert_P[slot]) or _holds(
                        expert_P, first_R, full, expert_P[other]
                    ):
                        continue
                    best, best_other, best_rank, least = slot, other, rank, longest
        if best < 0:
            return
        step = weight_P[best] - weight_P[best_other]
        time_R[full] -= step / problem.speed_R[full]
        time_R[best_rank] += step / problem.speed_R[best_rank]
        weight_P[best], weight_P[best_other] = weight_P[best_other], weight_P[best]
        expert_P[best], expert_P[best_other] = expert_P[best_other], expert_P[best]


@entry
def gather_on_ranks(problem, expert_P, first_R, most_time):
    """Swaps slots within each node in place, so that experts chosen together share a rank; returns the swaps.

    No rank takes longer than `most_time`, its share of the layer over its speed, or than it took.
    """
    slots, experts, ranks = expert_P.size, problem.share_E.size, problem.node_R.size
    share_P = replica_shares(problem, expert_P)
    # Of what a token chooses, the part that comes to this replica.
    part_P = np.empty(slots)
    load_R = np.zeros(ranks)
    with_RE = np.zeros((ranks, experts))
    for slot in range(slots):
        share = problem.share_E[expert_P[slot]]
        part_P[slot] = share_P[slot] / share if share > 0.0 else 1.0
        load_R[problem.rank_P[slot]] += share_P[slot]
        _add(with_RE[problem.rank_P[slot]], part_P[slot], problem.both_EE[expert_P[slot]])
    most_R = most_time * problem.speed_R
    size = ranks // (problem.node_R[-1] + 1)
    swaps = 0
    for _ in range(SWEEPS):
        before = swaps
        for slot in range(slots):
            best, best_gain = -1, LEAST_GAIN
            expert, home = expert_P[slot], problem.rank_P[slot]
            first = home - home % size
            for other in range(first_R[first], first_R[first + size]):
                rank = problem.rank_P[other]
                if rank == home:
                    continue
                step = share_P[slot] - share_P[other]
                if step > 0.0 and load_R[rank] + step > most_R[rank]:
                    continue
                if step < 0.0 and load_R[home] - step > most_R[home]:
                    continue
                partner = expert_P[other]
                gain = part_P[slot] * (with_RE[rank, expert] - with_RE[home, expert])
                gain += part_P[other] * (with_RE[home, partner] - with_RE[rank, partner])
                gain -= 2 * part_P[slot] * part_P[other] * problem.both_EE[expert, partner]
                if gain <= best_gain or partner == expert:
                    continue
                if _holds(expert_P, first_R, rank, expert) or _holds(expert_P, first_R, home, partner):
                    continue
                best, best_gain = other, gain
            if best < 0:
                continue
            partner, rank = expert_P[best], problem.rank_P[best]
            for place, sign in ((home, 1.0), (rank, -1.0)):
                _add(with_RE[place], sign * part_P[best], problem.both_EE[partner])
                _add(with_RE[place], -sign * part_P[slot], problem.both_EE[expert])
            step = share_P[slot] - share_P[best]
            load_R[home] -= step
            load_R[rank] += step
            share_P[slot], share_P[best] = share_P[best], share_P[slot]
            part_P[slot], part_P[best] = part_P[best], part_P[slot]
            expert_P[slot], expert_P[best] = partner, expert
            swaps += 1
        if swaps == before:
            break
    return swaps


@entry
def visit_moments(expert_P, first_X, rank_P, node_R, held_ER, held_EM, pair_EE):
    """What a rank's tokens find at each of X places: mean_RX choices in all, and twice_RX ordered pairs of them.

    Place x, a rank or a node, has the slots first_X[x] to first_X[x + 1] - 1. `held_ER` and `held_EM` are the replicas
    of each expert on each rank and node; `pair_EE` are tokens that chose both experts, on the diagonal the expert.
    """
    places = first_X.size - 1
    mean_RX, twice_RX = np.zeros((node_R.size, places)), np.zeros((node_R.size, places))
    part_P, holders_E = np.empty(expert_P.size), held_EM.sum(axis=1)
    for source in range(node_R.size):
        node = node_R[source]
        for slot in range(expert_P.size):
            expert, home = expert_P[slot], rank_P[slot]
            if held_ER[expert, source] > 0:
                part_P[slot] = 1.0 / held_ER[expert, source] if home == source else 0.0
            elif held_EM[expert, node] > 0:
                part_P[slot] = 1.0 / held_EM[expert, node] if node_R[home] == node else 0.0
            else:
                part_P[slot] = 1.0 / holders_E[expert]
        for place in range(places):
            for slot in range(first_X[place], first_X[place + 1]):
                if part_P[slot] == 0.0:
                    continue
                expert = expert_P[slot]
                mean_RX[source, place] += part_P[slot] * pair_EE[expert, expert]
                found = 0.0
                for other in range(first_X[place], slot):
                    if expert_P[other] != expert:
                        found += part_P[other] * pair_EE[expert, expert_P[other]]
                twice_RX[source, place] += 2.0 * found * part_P[slot]
    return mean_RX, twice_RX
