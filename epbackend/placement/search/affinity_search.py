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


@inner
def _part(held_EM, expert, holders, source, node):
    """The part of an expert's choices by tokens of `source` that goes to `node`, where nodes hold so many replicas."""
    if held_EM[expert, source] > 0:
        return 1.0 if node == source else 0.0
    return held_EM[expert, node] / holders


@inner
def _load_part(held_EM, expert, holders, node):
    """The part of an expert's choices, by the tokens of all nodes, that goes to `node`."""
    if holders == 1:
        return float(held_EM[expert, node])
    if held_EM[expert, node] == 0:
        return 0.0
    nodes = held_EM.shape[1]
    without = 0
    for other in range(nodes):
        without += held_EM[expert, other] == 0
    return (1.0 + without * held_EM[expert, node] / holders) / nodes


@inner
def _change(held_EM, expert, holders, home, away, change_MM):
    """Writes how the parts change when a replica goes from one node to another."""
    nodes = held_EM.shape[1]
    for source in range(nodes):
        for node in range(nodes):
            change_MM[source, node] = -_part(held_EM, expert, holders, source, node)
    held_EM[expert, home] -= 1
    held_EM[expert, away] += 1
    for source in range(nodes):
        for node in range(nodes):
            change_MM[source, node] += _part(held_EM, expert, holders, source, node)
    held_EM[expert, home] += 1
    held_EM[expert, away] -= 1


@inner
def _gain(problem, expert, change_MM, with_EMM):
    """How much the cost falls by a change of the expert alone."""
    gain = 0.0
    for source in range(change_MM.shape[0]):
        for node in range(change_MM.shape[0]):
            if source != node and change_MM[source, node] != 0.0:
                gain += change_MM[source, node] * (
                    with_EMM[expert, source, node] - problem.price * problem.chance_E[expert]
                )
    return gain


@inner
def _moved_gain(problem, expert, home, away, held_EM, holders_E, with_EMM, arrive_EM, change_MM):
    """How much the cost falls when one replica of the expert goes from one node to another."""
    if holders_E[expert] == 1:  # then as many choices leave as before
        return arrive_EM[expert, away] - arrive_EM[expert, home]
    _change(held_EM, expert, holders_E[expert], home, away, change_MM)
    return _gain(problem, expert, change_MM, with_EMM)


@inner
def _apply(problem, expert, change_MM, holders_E, with_EMM, arrive_EM, step_M):
    """Brings what others find beside them up to date with a change of the expert; `with_EMM` only where it is read."""
    nodes = change_MM.shape[0]
    for node in range(nodes):
        step_M[node] = -change_MM[node, node]
        for source in range(nodes):
            step_M[node] += change_MM[source, node]
    for other in range(with_EMM.shape[0]):
        both = problem.both_EE[expert, other]
        if both == 0.0:
            continue
        for node in range(nodes):
            if step_M[node] != 0.0:
                arrive_EM[other, node] += both * step_M[node]
        if holders_E[other] > 1:
            for source in range(nodes):
                for node in range(nodes):
                    if change_MM[source, node] != 0.0:
                        with_EMM[other, source, node] += both * change_MM[source, node]


@entry
def gather_on_nodes(problem, expert_P, first_M, most_M, sweeps):
    """Swaps slots between nodes in place, as long as it gains; returns the number of swaps.

    Node m has the slots first_M[m] to first_M[m + 1] - 1. None gets more load than most_M[m], in shares of the layer,
    or than it had. A pair of nodes between which no slot had enough to gain when a sweep began is passed over in it.
    """
    slots, experts = expert_P.size, problem.share_E.size
    ranks, nodes = problem.node_R.size, first_M.size - 1
    held_EM = np.zeros((experts, nodes), np.int64)
    holders_E = np.zeros(experts, np.int64)
    for node in range(nodes):
        for slot in range(first_M[node], first_M[node + 1]):
            held_EM[expert_P[slot], node] += 1
            holders_E[expert_P[slot]] += 1
    with_EMM = np.zeros((experts, nodes, nodes))
    arrive_EM = np.zeros((experts, nodes))
    load_M = np.zeros(nodes)
    change_MM = np.empty((nodes, nodes))
    other_MM = np.empty((nodes, nodes))
    step_M = np.empty(nodes)
    for expert in range(experts):
        for node in range(nodes):
            load_M[node] += problem.share_E[expert] * _load_part(held_EM, expert, holders_E[expert], node)
            for source in range(nodes):
                change_MM[source, node] = _part(held_EM, expert, holders_E[expert], source, node)
        _apply(problem, expert, change_MM, holders_E, with_EMM, arrive_EM, step_M)
    swaps = 0
    move_PM = np.empty((slots, nodes))
    top_MM = np.empty((nodes, nodes))
    for _ in range(sweeps):
        before = swaps
        top_MM[:] = -np.inf
        for home in range(nodes):
            for slot in range(first_M[home], first_M[home + 1]):
                for away in range(nodes):
                    gain = _moved_gain(
                        problem,
                        expert_P[slot],
                        home,
                        away,
                        held_EM,
                        holders_E,
                        with_EMM,
                        arrive_EM,
                        change_MM,
                    )
                    move_PM[slot, away] = gain
                    top_MM[home, away] = max(top_MM[home, away], gain)
        for home in range(nodes):
            for slot in range(first_M[home], first_M[home + 1]):
                expert = expert_P[slot]
                best, best_away, best_gain = -1, -1, LEAST_GAIN
                for away in range(nodes):
                    own = move_PM[slot, away]
                    if holders_E[expert] == 1:
                        own = arrive_EM[expert, away] - arrive_EM[expert, home]
                    if away == home or own + top_MM[away, home] <= best_gain:
                        continue
                    for other in range(first_M[away], first_M[away + 1]):
                        partner = expert_P[other]
                        if holders_E[partner] == 1:
                            gain = own + arrive_EM[partner, home] - arrive_EM[partner, away]
                            if holders_E[expert] == 1:
                                gain -= 2 * (nodes - 1) * problem.both_EE[expert, partner]
                        else:  # of earlier in this sweep: to be computed again before it is believed
                            gain = own + move_PM[other, home]
                        if (
                            gain > best_gain
                            and partner != expert
                            and _fits(
                                problem,
                                expert,
                                partner,
                                home,
                                away,
                                held_EM,
                                holders_E,
                                load_M,
                                most_M,
                                ranks,
                            )
                        ):
                            best, best_away, best_gain = other, away, gain
                if best < 0:
                    continue
                partner, away = expert_P[best], best_away
                gain = _moved_gain(
                    problem, expert, home, away, held_EM, holders_E, with_EMM, arrive_EM, change_MM
                )
                gain += _moved_gain(
                    problem, partner, away, home, held_EM, holders_E, with_EMM, arrive_EM, other_MM
                )
                _change(held_EM, expert, holders_E[expert], home, away, change_MM)
                _change(held_EM, partner, holders_E[partner], away, home, other_MM)
                for source in range(nodes):
                    for node in range(nodes):
                        if source != node:
                            together = change_MM[source, node] * other_MM[source, node]
                            gain += together * problem.both_EE[expert, partner]
                if gain <= LEAST_GAIN:
                    continue
                for node in range(nodes):
                    step_M[node] = _swapped_load(
                        problem, expert, partner, home, away, held_EM, holders_E, node
                    )
                for node in range(nodes):
                    load_M[node] += step_M[node]
                _apply(problem, expert, change_MM, holders_E, with_EMM, arrive_EM, step_M)
                _apply(problem, partner, other_MM, holders_E, with_EMM, arrive_EM, step_M)
                held_EM[expert, home] -= 1
                held_EM[expert, away] += 1
                held_EM[partner, away] -= 1
                held_EM[partner, home] += 1
                expert_P[slot], expert_P[best] = partner, expert
                for node in range(nodes):
                    if holders_E[partner] > 1:
                        move_PM[slot, node] = _moved_gain(
                            problem, partner, home, node, held_EM, holders_E, with_EMM, arrive_EM, change_MM
                        )
                    if holders_E[expert] > 1:
                        move_PM[best, node] = _moved_gain(
                            problem, expert, away, node, held_EM, holders_E, with_EMM, arrive_EM, change_MM
                        )
                swaps += 1
        if swaps == before:
            break
    return swaps


@inner
def _swapped_load(problem, expert, partner, home, away, held_EM, holders_E, node):
    """What the load of `node` changes by if the expert goes from home to away, and its partner the other way."""
    change = 0.0
    for moved, start, end in ((expert, home, away), (partner, away, home)):
        holders = holders_E[moved]
        if holders == 1:
            change += problem.share_E[moved] * ((node == end) - (node == start))
            continue
        part = -_load_part(held_EM, moved, holders, node)
        held_EM[moved, start] -= 1
        held_EM[moved, end] += 1
        part += _load_part(held_EM, moved, holders, node)
        held_EM[moved, start] += 1
        held_EM[moved, end] -= 1
        change += problem.share_E[moved] * part
    return change


@inner
def _fits(problem, expert, partner, home, away, held_EM, holders_E, load_M, most_M, ranks):
    """Whether a swap leaves no rank with two replicas of an expert, and no node with too much load."""
    ranks_of_node = ranks // load_M.size
    if held_EM[expert, away] >= ranks_of_node or held_EM[partner, home] >= ranks_of_node:
        return False
    if (
        held_EM[expert, home] == 1
        and held_EM[expert, away] == 0
        and held_EM[partner, away] == 1
        and held_EM[partner, home] == 0
    ):  # then each takes its load along, and no other node is concerned
        heavier = problem.share_E[partner] * _load_part(held_EM, partner, holders_E[partner], away)
        heavier -= problem.share_E[expert] * _load_part(held_EM, expert, holders_E[expert], home)
        full = home if heavier > 0.0 else away
        return load_M[full] + abs(heavier) <= most_M[full] or heavier == 0.0
    for node in range(load_M.size):
        change = _swapped_load(problem, expert, partner, home, away, held_EM, holders_E, node)
        if change > 0.0 and load_M[node] + change > most_M[node]:
            return False
    return True


@entry
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
def gather_on_ranks(problem, expert_P, first_R, most_time, sweeps):
    """Swaps slots within each node in place, so that experts chosen together share a rank; returns the swaps.

    No rank takes longer than `most_time`, its share of the layer over its speed, or than it took.
    """
    slots, experts, ranks = expert_P.size, problem.share_E.size, problem.node_R.size
    share_P = replica_shares(problem, expert_P)
    # Of what a token chooses, the part that comes to this replica.
    part_P = np.empty(slots)
    load_R = np.zeros(ranks)
    with_ER = np.zeros((experts, ranks))
    for slot in range(slots):
        share = problem.share_E[expert_P[slot]]
        part_P[slot] = share_P[slot] / share if share > 0.0 else 1.0
        rank = problem.rank_P[slot]
        load_R[rank] += share_P[slot]
        for other in range(experts):
            with_ER[other, rank] += part_P[slot] * problem.both_EE[expert_P[slot], other]
    most_R = most_time * problem.speed_R
    swaps = 0
    for _ in range(sweeps):
        before = swaps
        for slot in range(slots):
            best, best_gain = -1, LEAST_GAIN
            expert, home = expert_P[slot], problem.rank_P[slot]
            node = problem.node_R[home]
            for other in range(slots):
                rank = problem.rank_P[other]
                if rank == home or problem.node_R[rank] != node:
                    continue
                step = share_P[slot] - share_P[other]
                if step > 0.0 and load_R[rank] + step > most_R[rank]:
                    continue
                if step < 0.0 and load_R[home] - step > most_R[home]:
                    continue
                partner = expert_P[other]
                gain = part_P[slot] * (with_ER[expert, rank] - with_ER[expert, home])
                gain += part_P[other] * (with_ER[partner, home] - with_ER[partner, rank])
                gain -= 2 * part_P[slot] * part_P[other] * problem.both_EE[expert, partner]
                if gain <= best_gain or partner == expert:
                    continue
                if _holds(expert_P, first_R, rank, expert) or _holds(expert_P, first_R, home, partner):
                    continue
                best, best_gain = other, gain
            if best < 0:
                continue
            partner, rank = expert_P[best], problem.rank_P[best]
            for third in range(experts):
                step = part_P[best] * problem.both_EE[partner, third]
                step -= part_P[slot] * problem.both_EE[expert, third]
                with_ER[third, home] += step
                with_ER[third, rank] -= step
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
def visit_moments(expert_P, first_X, node_X, held_EM, both_EE):
    """Two moments of what a token of each node finds at each of X places: mean_MX, and twice_MX of ordered pairs.

    Place x, a rank or a node, has the slots first_X[x] to first_X[x + 1] - 1 and is on node_X[x]. `both_EE` has the
    chances of single experts on its diagonal.
    """
    nodes, places = held_EM.shape[1], node_X.size
    mean_MX, twice_MX = np.zeros((nodes, places)), np.zeros((nodes, places))
    holders_E = np.zeros(len(held_EM))
    for expert in range(len(held_EM)):
        for node in range(nodes):
            holders_E[expert] += held_EM[expert, node]
    part_P = np.empty(expert_P.size)
    for place in range(places):
        begin, end, home = first_X[place], first_X[place + 1], node_X[place]
        for source in range(nodes):
            for slot in range(begin, end):
                expert = expert_P[slot]
                part_P[slot] = 1.0 / holders_E[expert]
                if held_EM[expert, source] > 0:
                    part_P[slot] = 1.0 / held_EM[expert, home] if source == home else 0.0
                mean_MX[source, place] += part_P[slot] * both_EE[expert, expert]
            for slot in range(begin, end):
                if part_P[slot] == 0.0:
                    continue
                expert = expert_P[slot]
                found = 0.0
                for other in range(begin, slot):
                    if expert_P[other] != expert:
                        found += part_P[other] * both_EE[expert, expert_P[other]]
                twice_MX[source, place] += 2.0 * found * part_P[slot]
    return mean_MX, twice_MX
